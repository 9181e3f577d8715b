"""What counts as a number, and what it is computed in."""

from __future__ import annotations

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from metricfold._core.device.arrays import unwrapped
from metricfold._core.runtime.imported import is_of

__all__ = ["Parts", "as_array", "as_parts", "is_readable", "put", "refuse_masked", "wide"]

Parts: TypeAlias = tuple[jax.Array, ...]
"""Arrays that add up to numbers: one, or two float32."""


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
        return put(host)
    raise TypeError(
        f"{where} is {value!r}, of type {type(value).__name__}, which is no number: take it out, or "
        'let reduce_custom leave it as it is ({"name": None})'
    )


def put(host: np.ndarray[Any, Any]) -> jax.Array:
    """Return an array of the host on the device."""
    with jax.transfer_guard("allow"):  # asked for by giving it
        return jnp.asarray(host)


def is_readable(array: Any) -> bool:
    """Return whether all of an array is on this process."""
    on_host = not isinstance(array, jax.Array)
    return on_host or array.is_fully_addressable or array.is_fully_replicated


def as_parts(value: Any, where: str) -> Parts:
    """Return real numbers as arrays that add up to them: two float32 of what is wider on the host.

    Raises:
        TypeError: `value` is no real number.
        ValueError: `value` is masked, or an integer that takes more than 48 bits.
    """
    value = unwrapped(value)
    refuse_masked(value, where)
    if isinstance(value, (bool, int, float, np.generic, np.ndarray)):
        value = np.asarray(value)
        if value.dtype == object or (value.dtype.kind in "iu" and value.dtype.itemsize > 4):
            held = np.iinfo(np.int32)
            if value.dtype == object or (
                value.size and not held.min <= value.min() <= value.max() <= held.max
            ):
                return _exact_pair(value, where)
            value = value.astype(np.int32)
        elif value.dtype.kind == "f" and value.dtype.itemsize > 4:
            high, low = _pair(value)
            return put(high), put(low)
    array = as_array(value, where)
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise TypeError(f"{where} are complex: give their real part or their magnitude")
    return (lax.stop_gradient(array),)


def _pair(wide: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    with np.errstate(all="ignore"):
        high = wide.astype(np.float32)
        return high, np.where(np.isfinite(high), wide - high, 0.0).astype(np.float32)


def _exact_pair(integers: np.ndarray[Any, Any], where: str) -> Parts:
    """Return two float32 that add up to integers, or raise ValueError if none do."""
    exact = integers.astype(object)
    if not all(isinstance(one, int) for one in exact.flat):
        raise TypeError(f"{where} are {integers!r}, which are no numbers")
    try:
        wide = exact.astype(np.float64)
    except OverflowError:
        wide = np.full(exact.shape, np.inf)
    high, low = _pair(wide)
    wrong = np.asarray((high.astype(np.float64) + low).astype(object) != exact)
    if wrong.any():
        raise ValueError(
            f"{where} are {exact[wrong].flat[0]}, which takes more than the 48 bits that an accumulator "
            "holds: give a number with fewer digits, or record() it, which is exact up to 2^53"
        )
    return put(high), put(low)


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
