"""A sketch in a vector: a slot of one size, whatever the sketch holds; a slot of zeros holds none."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from metricfold._core import sketch as histogram  # what is in it loads when it is first needed
from metricfold._core.fold.sample import BUCKETS, FloatArray, new_histogram

if TYPE_CHECKING:
    from metricfold._core.sketch import LogLinearHistogram

__all__ = ["fitting", "joined", "pack", "slot_width", "unpack"]


def slot_width() -> int:
    """Return how many numbers a slot has."""
    return histogram.EXTENTS_WIDTH + histogram.slot_width(BUCKETS)


def pack(content: LogLinearHistogram | None) -> FloatArray:
    """Return the slot of a sketch, shape (slot_width(),)."""
    if content is None:
        return np.zeros(slot_width())
    extents = content.extents()
    return np.concatenate((extents, content.pack(extents, BUCKETS)))


def unpack(slot: FloatArray) -> LogLinearHistogram | None:
    """Return what is in a slot; None if nothing is. Raises ValueError if no rank sends such a slot."""
    extents, lanes = slot[: histogram.EXTENTS_WIDTH], slot[histogram.EXTENTS_WIDTH :]
    if not lanes.any():
        return None
    return histogram.LogLinearHistogram.unpack(extents, lanes, BUCKETS)


def fitting(slots: FloatArray) -> npt.NDArray[np.bool_]:
    """Return which slots can hold a sketch, or nothing; shape (n, slot_width()) to (n,)."""
    return histogram.fitting(
        slots[:, : histogram.EXTENTS_WIDTH], slots[:, histogram.EXTENTS_WIDTH :]
    )


def joined(lower: FloatArray, upper: FloatArray) -> FloatArray:
    """Return slots of what each two hold together, shapes (n, slot_width()).

    NaN where one of the two is none that a rank sends: whoever looks at the end sees that.
    """
    out = np.full(lower.shape, np.nan)
    good = fitting(lower) & fitting(upper)
    for place in np.flatnonzero(good).tolist():
        try:
            parts = [unpack(lower[place]), unpack(upper[place])]
        except ValueError:
            continue
        held = [part for part in parts if part is not None]
        out[place] = pack(new_histogram(held) if len(held) > 1 else held[0] if held else None)
    return out
