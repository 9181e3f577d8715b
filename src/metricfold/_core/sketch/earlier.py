"""States of version 1, which were cut into segments: of one octave around 1, of many far from it.

Where there were more of them than buckets, whole segments had been dropped to one bucket each.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from operator import index
from typing import Any

import numpy as np

from metricfold._core.sketch.buckets import MOMENTS, Buckets
from metricfold._core.sketch.indexing import BIAS, FIELDS, FINEST, FloatArray, IntArray, from_bits

__all__ = ["checksum", "segment"]

_DROPPED = -1
"""Stands for `m` of a segment that was one bucket."""
_WIDTHS = ((1, 32), (4, 64), (16, 128), (64, 256))
"""How many octaves were in a segment, as far away from 1 as that."""
_STARTS = np.unique(
    [0, FIELDS, *(BIAS + at for width, far in _WIDTHS for at in range(-far, far + 1, width))]
)
"""The exponent field with which each segment began, and the end of the last."""


def segment(group: Mapping[str, Any]) -> Buckets:
    """Return the buckets of one segment."""
    m = index(group["m"])
    if m != _DROPPED:
        if not 0 <= m <= FINEST:
            raise ValueError(f"it has buckets at m={m}")
        return Buckets.signed(group["index"], group["sums"], m)
    (signed,) = group["index"]
    return _spread(index(signed), np.array(group["sums"], dtype=np.float64).reshape(MOMENTS))


def _spread(signed: int, sums: FloatArray) -> Buckets:
    """Return two values that have the mean and the deviation of a segment that was dropped."""
    (which,) = _numbers(np.array([abs(signed) - 1], dtype=np.int64))
    begin, end = int(_STARTS[which]), int(_STARTS[which + 1])
    weight, first, second = sums
    if not (weight > 0.0 and np.isfinite(sums).all()):
        raise ValueError("its sums are no numbers")
    # The position was the magnitude in a unit between both ends. One value is the least of the segment.
    unit = (begin + end) // 2 - BIAS
    least, greatest = from_bits(np.array([max(begin << 52, 1), (end << 52) - 1]))
    with np.errstate(all="ignore"):
        low = np.ldexp(least, -unit)
        mean = max(first / weight - low, 0.0)
        square = max((second - 2.0 * low * first) / weight + low * low, mean * mean)
        part, high = (mean * mean / square, square / mean) if mean * square else (0.0, 0.0)
        values = np.clip(np.ldexp(low + np.array([0.0, high]), unit), least, greatest)
    weights = weight * np.array([1.0 - part, part])
    bits = (values * (1.0 if signed > 0 else -1.0)).view(np.int64)[weights > 0.0]
    return Buckets.of_values(bits, weights[weights > 0.0], FINEST).ordered().joined()


def _numbers(fields: IntArray) -> IntArray:
    """Return the number of the segment that each exponent field is in."""
    if ((fields < 0) | (fields >= FIELDS)).any():
        raise ValueError("it has buckets beyond those of finite floats")
    return np.searchsorted(_STARTS, fields, side="right") - 1


def checksum(state: Mapping[str, Any], totals: FloatArray) -> int:
    """Return the checksum of a state."""
    if not 0 <= index(state["dropped"]) < len(_STARTS):
        raise ValueError("it has dropped more segments than there are")
    some, groups = totals[0, 0] > 0, state["segments"]
    head = [
        state["max_buckets"],
        index(state["finest"]),
        index(state["dropped"]),
        float(state["minimum"]) if some else math.inf,
        float(state["maximum"]) if some else -math.inf,
    ]
    signed = np.array([index(one) for group in groups for one in group["index"]], dtype=np.int64)
    m = np.array([index(group["m"]) for group in groups for _ in group["index"]], dtype=np.int64)
    bucket: IntArray = np.abs(signed) - 1
    number = _numbers(np.right_shift(bucket, np.maximum(m, 0))) + (len(_STARTS) - 1) * (signed < 0)
    sums = [[one for group in groups for one in group["sums"][each]] for each in range(MOMENTS)]
    columns = [head, totals[0], number, np.where(m == _DROPPED, 0, bucket), m, *sums]
    return zlib.crc32(np.concatenate(columns).astype("<f8").tobytes())
