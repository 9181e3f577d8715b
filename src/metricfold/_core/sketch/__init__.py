"""Histograms: a mergeable sketch of any number of values, and the record that sinks draw.

Four questions, four files: *which bucket is this value in* (`indexing`), *which buckets are kept,
and how fine* (`layout`), *how are their contents stored, folded and re-binned* (`grid`), and *what
do they say about the values* (`estimation`). `sketch` joins them in `LogLinearHistogram`; `contents`
is what it holds in the form that merges, `wire` and `plain` write that as lanes for collectives
and as plain types for checkpoints.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from metricfold._core.sketch.record import Histogram

if TYPE_CHECKING:
    from metricfold._core.sketch.indexing import bucket_index
    from metricfold._core.sketch.sketch import LogLinearHistogram
    from metricfold._core.sketch.wire import EXTENTS_WIDTH, fitting, slot_width

__all__ = [
    "EXTENTS_WIDTH",
    "Histogram",
    "LogLinearHistogram",
    "bucket_index",
    "fitting",
    "slot_width",
]

# Loaded when asked for: those who only log should not wait for it.
_HOMES = {
    "EXTENTS_WIDTH": "wire",
    "LogLinearHistogram": "sketch",
    "bucket_index": "indexing",
    "fitting": "wire",
    "slot_width": "wire",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = found  # so that this is not asked again
    return found
