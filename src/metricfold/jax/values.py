"""What counts as a number, and what it is computed in."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["as_array", "wide"]


def as_array(value: Any, where: str) -> jax.Array:
    """Return a number, or an array of numbers, as a JAX array.

    Args:
        value: a Python, NumPy or JAX number or array.
        where: what the value is called, for error messages.

    Raises:
        TypeError: `value` is no number.
        ValueError: `value` is an integer that the JAX type it would get cannot hold.
    """
    if not isinstance(value, jax.Array) and callable(getattr(value, "__jax_array__", None)):
        value = value.__jax_array__()
    if isinstance(value, jax.Array):
        _require_number_type(value.dtype, where)
        return value
    if isinstance(value, (bool, int, float, complex, np.generic, np.ndarray)):
        host = np.asarray(value)
        if isinstance(value, int) and host.dtype == object:
            raise ValueError(f"{where} is {value}, which no integer type holds: give a float")
        _require_number_type(host.dtype, where)
        _require_room(host, where)
        return jnp.asarray(host)
    raise TypeError(
        f"{where} is {value!r}, of type {type(value).__name__}, which is no number: take it out, or "
        'let reduce_custom leave it as it is ({"name": None})'
    )


def _require_number_type(dtype: Any, where: str) -> None:
    if not any(jnp.issubdtype(dtype, kind) for kind in (jnp.number, jnp.bool_)):
        raise TypeError(
            f"{where} is an array of type {dtype}, which is no number: take it out, or let "
            'reduce_custom leave it as it is ({"name": None})'
        )


def _require_room(host: np.ndarray[Any, Any], where: str) -> None:
    """Refuse integers that JAX, without 64-bit types, would cut to 32 bits silently."""
    if not jnp.issubdtype(host.dtype, jnp.integer) or not host.size:
        return
    held = jnp.iinfo(jax.dtypes.canonicalize_dtype(host.dtype))
    low, high = int(host.min()), int(host.max())
    if low < held.min or high > held.max:
        raise ValueError(
            f"{where} is {low if low < held.min else high}, which {held.dtype} does not hold: give "
            "a float, or enable jax_enable_x64"
        )


def wide(dtype: Any) -> Any:
    """Return the type to add up in: at least 32 bits.

    float16 overflows at 65,504, bfloat16 stops counting at 256, int8 at 127. As in NumPy, booleans
    and small integers add up as integers.
    """
    if dtype == jnp.bool_:
        return np.dtype(np.int32)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return np.dtype(dtype)
    if jnp.issubdtype(dtype, jnp.floating):
        return np.dtype(np.float32) if jnp.finfo(dtype).bits < 32 else np.dtype(dtype)
    if jnp.iinfo(dtype).bits >= 32:
        return np.dtype(dtype)
    return np.dtype(np.int32 if jnp.issubdtype(dtype, jnp.signedinteger) else np.uint32)
