"""Which bucket a value is in: the float's own exponent and its top `m` mantissa bits.

The bits of a positive float, read as an integer, grow with the float. Cutting off all but the
exponent and `m` bits of the mantissa is therefore a bucket index that grows with the value, found
by an integer shift: 2^m buckets of equal width per octave, on which NumPy, torch and JAX agree bit for bit.
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
    array = np.asarray(values, dtype=np.float64)
    if not np.isfinite(array).all():
        raise ValueError("NaN and ±inf are in no bucket: leave them out")
    bits = np.atleast_1d(array).view(np.int64).reshape(array.shape)
    k = ((bits & MAGNITUDE) >> (FRACTION_BITS - m)) + 1
    return np.where(array == 0, 0, np.where(array < 0, -k, k))


def from_bits(bits: IntArray) -> FloatArray:
    return np.ascontiguousarray(bits, dtype=np.int64).view(np.float64)
