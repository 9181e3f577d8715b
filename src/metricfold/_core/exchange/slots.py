"""A histogram in a vector: a slot of one size, whatever the histogram holds.

Its *extents* merge by MAX, its *lanes* by SUM once they are laid out by everyone's extents. A
histogram that travels with extents of its own describes itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from metricfold._core import sketch as histogram  # what is in it loads when it is first needed
from metricfold._core.fold.sample import BUCKETS, FloatArray

if TYPE_CHECKING:
    from metricfold._core.sketch import LogLinearHistogram

__all__ = ["described", "extents_width", "fitting", "laid_out", "lanes_width", "unpacked"]


def extents_width() -> int:
    """Return how many numbers say what is occupied."""
    return histogram.EXTENTS_WIDTH


def lanes_width() -> int:
    """Return how many numbers say what is there."""
    return histogram.slot_width(BUCKETS)


def described(content: LogLinearHistogram) -> tuple[FloatArray, FloatArray]:
    """Return extents and lanes of a histogram that travels by itself."""
    extents = content.extents()
    return extents, laid_out(content, extents)


def laid_out(content: LogLinearHistogram, extents: FloatArray) -> FloatArray:
    """Return the lanes of a histogram, laid out by everyone's extents."""
    return content.pack(extents, BUCKETS)


def fitting(extents: FloatArray, lanes: FloatArray) -> npt.NDArray[np.bool_]:
    """Return which slots can hold a histogram, or nothing; one a row."""
    return histogram.fitting(extents, lanes)


def unpacked(extents: FloatArray, lanes: FloatArray) -> LogLinearHistogram | None:
    """Return what is in a slot; None if nothing is."""
    if not lanes.any():
        return None
    return histogram.LogLinearHistogram.unpack(extents, lanes, BUCKETS)
