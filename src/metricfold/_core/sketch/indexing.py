"""Which bucket a value is in: the float's own exponent and its top `m` mantissa bits.

The bits of a positive float, read as an integer, grow with the float. Cutting off all but the
exponent and `m` bits of the mantissa is therefore a bucket index that grows with the value, found
by an integer shift: 2^m buckets of equal width per octave, no logarithm, no rounding. NumPy, torch
and JAX, in float32 and in float64, agree on it bit for bit.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = [
    "BIAS",
    "FIELDS",
    "FINEST",
    "FRACTION_BITS",
    "MAGNITUDE",
    "FloatArray",
    "IntArray",
    "bucket_index",
    "from_bits",
    "magnitude_bits",
]

FloatArray: TypeAlias = npt.NDArray[np.float64]
IntArray: TypeAlias = npt.NDArray[np.int64]

FINEST = 16
"""The largest `m`: 65,536 buckets per octave."""
FRACTION_BITS = 52
BIAS = 1023
FIELDS = 2047
"""Exponent fields of finite floats; 0 is that of the subnormals."""
MAGNITUDE = np.int64(0x7FFF_FFFF_FFFF_FFFF)
"""All bits of a float64 but its sign."""


def bucket_index(values: npt.ArrayLike, m: int) -> IntArray:
    """Return the signed bucket index of each of `values`, at `m` mantissa bits.

    It grows with the value: 0 for ±0, ``k + 1`` for a positive value and ``-(k + 1)`` for a
    negative one, where k holds the float64's exponent field and the top `m` bits of its mantissa.
    A float32 gives the index of the same number in float64.

    Args:
        values: finite numbers, any shape.
        m: resolution, 0..16.

    Raises:
        ValueError: `m` is out of range, or a value is not finite.

    >>> bucket_index([-1.0, 0.0, 1.0, 1.49, 1.5], 1).tolist()
    [-2047, 0, 2047, 2047, 2048]
    """
    if not 0 <= m <= FINEST:
        raise ValueError(f"m={m!r}: the resolution must lie in 0..{FINEST}")
    array = np.asarray(values)
    if not np.isfinite(array).all():
        raise ValueError("NaN and ±inf are in no bucket: leave them out")
    if array.dtype == np.float32:
        return _index_of_float32(array, m)
    array = np.asarray(array, dtype=np.float64)
    k = (magnitude_bits(array) >> (FRACTION_BITS - m)) + 1
    return np.where(array == 0, 0, np.where(array < 0, -k, k))


def _index_of_float32(array: npt.NDArray[np.float32], m: int) -> IntArray:
    """Shift 32 bits: the way of a device that has no float64."""
    bits = np.atleast_1d(array).view(np.int32).reshape(array.shape)
    magnitude = (bits & np.int32(0x7FFF_FFFF)).astype(np.int64)
    # The exponent's bias is 127 in float32. Its subnormals are normal numbers in float64.
    k = (magnitude >> (23 - m)) + ((BIAS - 127) << m) + 1
    subnormal = magnitude < 1 << 23
    if subnormal.any():
        wide = magnitude_bits(np.where(subnormal, array, 0.0).astype(np.float64))
        k = np.where(subnormal, (wide >> (FRACTION_BITS - m)) + 1, k)
    return np.where(magnitude == 0, 0, np.where(bits < 0, -k, k))


def magnitude_bits(values: FloatArray) -> IntArray:
    """Return the bits of the absolute values, as integers that grow with them."""
    bits = np.atleast_1d(values).view(np.int64).reshape(values.shape)
    magnitude: IntArray = bits & MAGNITUDE
    return magnitude


def from_bits(bits: IntArray) -> FloatArray:
    """Return the floats of which `bits` are the bits."""
    return np.ascontiguousarray(bits, dtype=np.int64).view(np.float64)
