"""A histogram as plain types, and back."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from itertools import pairwise
from operator import index
from typing import Any

import numpy as np

from metricfold._core.sketch import earlier
from metricfold._core.sketch.buckets import COARSEST, FARTHEST, Buckets
from metricfold._core.sketch.contents import Contents, Total, check_max_buckets
from metricfold._core.sketch.indexing import FINEST

__all__ = ["from_dict", "to_dict"]

_FORMAT = "metricfold histogram"
_VERSION = 2


def to_dict(contents: Contents, max_buckets: int) -> dict[str, Any]:
    """Return plain types; of the buckets, one group per octave, or one of all that are groups of octaves."""
    buckets, totals = contents.buckets, contents.totals[0]
    some = totals[Total.COUNT] > 0
    # As `bucket_index` says it.
    bucket = (buckets.edge >> (FINEST - buckets.m)) + 1
    signed = np.where(buckets.index < 0, -bucket, bucket)
    return {
        "format": _FORMAT,
        "version": _VERSION,
        "max_buckets": max_buckets,
        "finest": int(contents.finest[0]),
        "reach": int(contents.reach[0]),
        "minimum": float(contents.low[0]) if some else None,
        "maximum": float(contents.high[0]) if some else None,
        "totals": {total.name.lower(): float(totals[total]) for total in Total},
        "segments": [
            {
                "m": int(buckets.m[begin]),
                "cut": bool(buckets.cut[begin]),
                "index": signed[begin:end].tolist(),
                "sums": buckets.sums[:, begin:end].tolist(),
            }
            for begin, end in pairwise([*buckets.octaves().tolist(), signed.size])
        ],
        "checksum": _checksum(contents, max_buckets),
    }


def from_dict(state: Mapping[str, Any]) -> tuple[Contents, int]:
    """Return what a histogram holds of which `to_dict` gave `state`, and its `max_buckets`."""
    try:
        return _read(state)
    except KeyError as error:
        reason = f"it lacks {error}"
    except (ArithmeticError, AttributeError, IndexError, TypeError, ValueError) as error:
        reason = str(error)
    raise ValueError(f"this is not the state of a histogram, or it is damaged: {reason}")


def _read(state: Mapping[str, Any]) -> tuple[Contents, int]:
    if state["format"] != _FORMAT:
        raise ValueError(f"its format is {state['format']!r}")
    if state["version"] not in (1, _VERSION):
        raise ValueError(f"its version is {state['version']!r}, this is {_VERSION}")
    first = state["version"] == 1
    totals = np.array([[float(state["totals"][total.name.lower()]) for total in Total]])
    max_buckets = check_max_buckets(state["max_buckets"])
    finest, reach = index(state["finest"]), FARTHEST if first else index(state["reach"])
    if not 0 <= finest <= FINEST or not -1 <= reach <= FARTHEST:
        raise ValueError(f"it is as fine as m={finest} and reaches over {reach} octaves")
    low = high = -math.inf
    if totals[0, Total.COUNT] > 0:
        low, high = 0.0 - float(state["minimum"]), float(state["maximum"])
    limits = np.array([[low, high, FINEST - finest, FARTHEST - reach]])
    read = earlier.segment if first else _segment
    buckets = Buckets.of_all([Buckets.empty(), *map(read, state["segments"])])
    contents = Contents(totals, limits, buckets.ordered() if first else buckets)
    checksum = earlier.checksum(state, totals) if first else _checksum(contents, max_buckets)
    if state["checksum"] != checksum:
        raise ValueError("its checksum is wrong")
    if not contents.sound().all():
        raise ValueError("its numbers contradict each other, or are none")
    settled = contents.with_buckets(Buckets.empty(), max_buckets)
    # What a share has no use for would come back at the next save, in a form that nobody reads.
    if not first and (
        settled.reach[0] != reach or not np.array_equal(settled.buckets.key, buckets.key)
    ):
        raise ValueError("its buckets are not those that its values come to")
    return settled, max_buckets


def _segment(group: Mapping[str, Any]) -> Buckets:
    m, cut = index(group["m"]), group["cut"]
    if not COARSEST <= m <= FINEST or not isinstance(cut, bool) or not group["index"]:
        raise ValueError(f"it has buckets at m={m}, cut: {cut}")
    return Buckets.signed(group["index"], group["sums"], m, cut=cut)


def _checksum(contents: Contents, max_buckets: int) -> int:
    """Return 32 bits of all that a histogram holds, whatever type says it."""
    buckets = contents.buckets
    columns = [contents.totals[0], contents.low, contents.high, contents.finest]
    columns += [contents.reach, [max_buckets], buckets.key, *buckets.sums]
    return zlib.crc32(np.concatenate(columns).astype("<f8").tobytes())
