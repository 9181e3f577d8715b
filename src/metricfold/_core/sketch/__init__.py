"""The sketch of a distribution: any number of values in a fixed amount of memory, which merges exactly.

Which bucket is a value in (`indexing`), what do two sketches hold together (`buckets`, `contents`), how do
many values get in (`filling`), and what does it say about them (`estimate`, `shape`)? `sketch` joins these in
`LogLinearHistogram`; `slots` writes it into vectors, `plain` into a checkpoint. README.md is the whole
in a page.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

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


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts of finite values between bucket edges, with the moments that loggers ask for.

    Args:
        edges: ascending bucket edges, shape (n + 1,).
        counts: (weighted) number of values in each bucket, shape (n,); a value on an inner edge
            belongs to the bucket above it, as in `numpy.histogram`.
        minimum: smallest value.
        maximum: largest value.
        total: (weighted) sum of the values.
        total_squares: (weighted) sum of the squares of the values.
    """

    edges: npt.NDArray[np.float64]
    counts: npt.NDArray[np.float64]
    minimum: float
    maximum: float
    total: float
    total_squares: float


def __getattr__(name: str) -> Any:
    """Load the rest when it is asked for: those who only log should not wait for it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = {"LogLinearHistogram": "sketch", "bucket_index": "indexing"}.get(name, "slots")
    found = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = found  # so that this is not asked again
    return found
