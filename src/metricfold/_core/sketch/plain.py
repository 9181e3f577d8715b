"""A histogram as plain types, and back."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from itertools import pairwise
from operator import index
from typing import Any

import numpy as np

from metricfold._core.sketch.contents import Contents, Frame, Total, check_max_buckets
from metricfold._core.sketch.grid import MOMENTS, Buckets
from metricfold._core.sketch.indexing import FINEST, FloatArray
from metricfold._core.sketch.layout import FIELDS, FIRST_FIELDS, SEGMENT_OF_PREFIX, SEGMENTS, WHOLE

__all__ = ["from_dict", "to_dict"]

_FORMAT = "metricfold histogram"
_VERSION = 1


def to_dict(contents: Contents) -> dict[str, Any]:
    """Return plain types; of the buckets, those that are occupied, one group per segment."""
    frame, buckets = contents.frame, contents.buckets
    some = contents.totals[Total.COUNT] > 0
    cuts = np.flatnonzero(np.diff(buckets.segment, prepend=-1, append=-1))
    # As `bucket_index` says it; a segment that is one bucket has the index of its first octave.
    bucket = np.where(buckets.m == WHOLE, FIRST_FIELDS[buckets.segment], buckets.index) + 1
    signed = np.where(buckets.segment < SEGMENTS, bucket, -bucket)
    return {
        "format": _FORMAT,
        "version": _VERSION,
        "max_buckets": contents.max_buckets,
        "finest": frame.finest,
        "dropped": frame.dropped,
        "minimum": frame.minimum if some else None,
        "maximum": frame.maximum if some else None,
        "totals": {total.name.lower(): float(contents.totals[total]) for total in Total},
        "segments": [
            {
                "m": int(buckets.m[begin]),
                "index": signed[begin:end].tolist(),
                "sums": buckets.sums[:, begin:end].tolist(),
            }
            for begin, end in pairwise(cuts.tolist())
        ],
        "checksum": _checksum(contents.max_buckets, frame, contents.totals, buckets),
    }


def from_dict(state: Mapping[str, Any]) -> Contents:
    """Return the contents of which `to_dict` gave `state`."""
    try:
        return _read(state)
    except KeyError as error:
        reason = f"it lacks {error}"
    except (ArithmeticError, AttributeError, IndexError, TypeError, ValueError) as error:
        reason = str(error)
    raise ValueError(f"this is not the state of a histogram, or it is damaged: {reason}")


def _read(state: Mapping[str, Any]) -> Contents:
    if state["format"] != _FORMAT:
        raise ValueError(f"its format is {state['format']!r}")
    if state["version"] != _VERSION:
        raise ValueError(f"its version is {state['version']!r}, this is {_VERSION}")
    totals = np.array([float(state["totals"][total.name.lower()]) for total in Total])
    some = totals[Total.COUNT] > 0
    buckets = Buckets.joined(Buckets.empty(), *map(_read_segment, state["segments"]))
    frame = Frame(
        buckets.extents,
        float(state["minimum"]) if some else math.inf,
        float(state["maximum"]) if some else -math.inf,
        index(state["finest"]),
        index(state["dropped"]),
    )
    max_buckets = check_max_buckets(state["max_buckets"])
    if state["checksum"] != _checksum(max_buckets, frame, totals, buckets):
        raise ValueError("its checksum is wrong")
    if not 0 <= frame.finest <= FINEST or not 0 <= frame.dropped <= SEGMENTS:
        raise ValueError("it is finer, or has dropped more, than any")
    contents = Contents.of(max_buckets, frame, totals, buckets)
    contents.check()
    # What a layout has no use for would come back at the next save, in a form that nobody reads.
    if not _same(contents, frame, buckets):
        raise ValueError("its buckets are not those that its values come to")
    return contents


def _same(contents: Contents, frame: Frame, buckets: Buckets) -> bool:
    """Return whether `contents` hold what has been read, bucket for bucket."""
    settled, kept = contents.frame, contents.buckets
    return (settled.finest, settled.dropped) == (frame.finest, frame.dropped) and all(
        np.array_equal(getattr(kept, part), getattr(buckets, part))
        for part in ("segment", "index", "m", "sums")
    )


def _read_segment(group: Mapping[str, Any]) -> Buckets:
    m, signed = index(group["m"]), np.array(group["index"], dtype=np.int64)
    sums = np.array(group["sums"], dtype=np.float64).reshape(MOMENTS, signed.size)
    bucket = np.abs(signed) - 1
    if m != WHOLE and not 0 <= m <= FINEST:
        raise ValueError(f"it has buckets at m={m}")
    if ((bucket < 0) | (bucket >> max(m, 0) >= FIELDS)).any():
        raise ValueError("it has buckets beyond those of finite floats")
    segment = SEGMENT_OF_PREFIX[(bucket >> max(m, 0)) + 2048 * (signed < 0)]
    bucket = np.zeros_like(bucket) if m == WHOLE else bucket
    return Buckets(segment, bucket, np.full(bucket.size, m), sums)


def _checksum(max_buckets: int, frame: Frame, totals: FloatArray, buckets: Buckets) -> int:
    """Return 32 bits of all that a histogram holds, whatever type says it."""
    numbers = [max_buckets, frame.finest, frame.dropped, frame.minimum, frame.maximum]
    columns = [buckets.segment, buckets.index, buckets.m, *buckets.sums]
    everything = np.concatenate([numbers, totals, *columns]).astype("<f8")
    return zlib.crc32(everything.tobytes())
