"""The sketch of a distribution: any number of values in a fixed amount of memory, which merges exactly.

Which bucket is a value in (`indexing`), what do two sketches hold together (`buckets`, `contents`), how do
many values get in (`filling`), and what does it say about them (`estimate`, `shape`)? `sketch` joins these in
`LogLinearHistogram`; `slots` writes it into vectors, `plain` into a checkpoint. README.md is the whole
in a page.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from metricfold._core.sketch.record import Histogram

if TYPE_CHECKING:
    from metricfold._core.sketch.indexing import bucket_index
    from metricfold._core.sketch.sketch import LogLinearHistogram
    from metricfold._core.sketch.slots import fitting, joined, pack, slot_width, unpack

__all__ = [
    "BUCKETS",
    "Histogram",
    "LogLinearHistogram",
    "bucket_index",
    "fitting",
    "joined",
    "pack",
    "slot_width",
    "unpack",
]

BUCKETS = 512
"""Of a sketch that travels or accumulates: 16 kB. docs/histograms.md says how right that is."""

# Loaded when asked for: those who only log should not wait for it.
_HOMES = {
    "LogLinearHistogram": "sketch",
    "bucket_index": "indexing",
    "fitting": "slots",
    "joined": "slots",
    "pack": "slots",
    "slot_width": "slots",
    "unpack": "slots",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = found  # so that this is not asked again
    return found
