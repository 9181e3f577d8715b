"""What counts as a number, and what it is computed in."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metricfold._core.device.arrays import unwrapped
from metricfold._core.runtime.imported import is_of

__all__ = ["as_array", "refuse_masked", "wide"]


def as_array(value: Any, where: str, *, copies: int = 1) -> jax.Array:
    """Return a number, or an array of numbers, as a JAX array.

    Args:
        value: a Python, NumPy or JAX number or array, or what stands for one (`__jax_array__`).
        where: what the value is called, for error messages.
        copies: how many of it are added up.

    Raises:
        TypeError: `value` is no number.
        ValueError: `value` is masked; or it, or the sum of its copies, is a number that the JAX type it
            would get does not hold: an integer that is too large, or a float that would become another whole number,
            or infinite. Other floats are rounded, as ever in JAX.
    """
    value = unwrapped(value)
    if isinstance(value, jax.Array):
        _require_number_type(value.dtype, where)
        return value
    if isinstance(value, (bool, int, float, complex, np.generic, np.ndarray)):
        refuse_masked(value, where)
        host = np.asarray(value)
        if isinstance(value, int) and host.dtype == object:
            raise ValueError(f"{where} is {value}, which no integer type holds: {_ON_THE_HOST}")
        _require_number_type(host.dtype, where)
        _require_room(host, where, copies)
        with jax.transfer_guard("allow"):
            return jnp.asarray(host)
    raise TypeError(
        f"{where} is {value!r}, of type {type(value).__name__}, which is no number: take it out, or "
        'let reduce_custom leave it as it is ({"name": None})'
    )


def refuse_masked(value: Any, where: str) -> None:
    """Raise ValueError for what NumPy has masked: what lies under the mask would count."""
    if is_of(value, "numpy.ma", "MaskedArray") and np.ma.getmaskarray(value).any():
        raise ValueError(
            f"{where}: NumPy has masked a part, and JAX knows no masks: give x.filled(0), and ~x.mask as "
            "weights"
        )


def _require_number_type(dtype: Any, where: str) -> None:
    if not any(jnp.issubdtype(dtype, kind) for kind in (jnp.number, jnp.bool_)):
        raise TypeError(
            f"{where} is an array of type {dtype}, which is no number: take it out, or let "
            'reduce_custom leave it as it is ({"name": None})'
        )


_ON_THE_HOST = (
    "record it on the host, by MetricsAggregator.record(), where numbers have 64 bits, or enable "
    "jax_enable_x64"
)
_LARGEST_WHOLE = 2.0**53


def _require_room(host: np.ndarray[Any, Any], where: str, copies: int) -> None:
    """Refuse numbers that JAX, without 64-bit types, would make others of silently."""
    if not host.size:
        return
    held = jax.dtypes.canonicalize_dtype(host.dtype)
    if jnp.issubdtype(host.dtype, jnp.integer):
        low, high = int(host.min()), int(host.max())
        # Small types are added up in 32 bits.
        added_in = jnp.iinfo(held if copies == 1 else wide(held))
        if low * copies < added_in.min or high * copies > added_in.max:
            times = f", {copies} times," if copies > 1 else ","
            raise ValueError(
                f"{where} is {low if low * copies < added_in.min else high}{times} which "
                f"{added_in.dtype} does not hold: {_ON_THE_HOST}"
            )
    elif host.dtype.kind in "fc" and held.itemsize < host.dtype.itemsize:
        parts = np.stack([host.real, host.imag]) if host.dtype.kind == "c" else host
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            rounded = parts.astype(np.float32)
            whole = (np.abs(parts) <= _LARGEST_WHOLE) & (parts == np.rint(parts))
            other = np.isfinite(parts) & ((whole & (rounded != parts)) | np.isinf(rounded))
        if other.any():
            raise ValueError(
                f"{where} is {parts[other][0].item()!r}, which float32 does not hold: {_ON_THE_HOST}"
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
