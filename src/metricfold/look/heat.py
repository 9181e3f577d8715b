"""A distribution over time: the histograms of many logs over one set of bins."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from metricfold._core.sketch import Histogram
from metricfold.look.reading import Histograms

__all__ = ["Heat", "over_time"]

Floats = npt.NDArray[np.float64]

_BINS = 48
_COLUMNS = 160
_MOST_READ = 480
"""Of more logs every n-th is read."""
_LOG_FROM = 30.0
"""Bins are equal in the logarithm where positive values span such a factor."""


@dataclass(frozen=True)
class Heat:
    """How often values were in each bin, in each of some stretches of logs.

    Args:
        edges: of the bins, ascending.
        log: whether the bins are equal in the logarithm.
        steps: the last step of each stretch.
        shares: for each stretch and bin the square root of its share of the values, 255 for `most`.
        most: the largest share.
        logs: how many of the logs were read.
    """

    edges: Floats
    log: bool
    steps: npt.NDArray[np.int64]
    shares: npt.NDArray[np.uint8]
    most: float
    logs: int


def over_time(histograms: Histograms) -> Heat | None:
    """Return the histograms of a run as one picture; None if they hold no values."""
    count = len(histograms)
    every = max(1, -(-count // _MOST_READ))
    # Counted from the end, so that the last one is there.
    at = np.arange(count - 1, -1, -every)[::-1]
    at_step = histograms.steps
    read = [(int(at_step[i]), histograms[int(i)]) for i in at]
    read = [(step, one) for step, one in read if one.counts.sum() > 0]
    if not read:
        return None
    read.sort(key=lambda pair: pair[0])
    edges, log = _bins([one for _, one in read])
    stretch = -(-len(read) // _COLUMNS)
    steps, rows = [], []
    for start in range(0, len(read), stretch):
        group = read[start : start + stretch]
        counted = sum((_spread(one, edges) for _, one in group), np.zeros(edges.size - 1))
        rows.append(counted / max(float(counted.sum()), 1e-300))
        steps.append(group[-1][0])
    shares = np.array(rows)
    most = float(shares.max())
    scaled = np.sqrt(shares / most) * 255
    # What is there at all must be seen.
    small = np.where(shares > 0, np.maximum(scaled, 12), 0).round().astype(np.uint8)
    last = np.append(np.diff(steps) > 0, True)  # a step that was logged twice: the later one
    return Heat(edges, log, np.array(steps, dtype=np.int64)[last], small[last], most, len(read))


def _bins(read: list[Histogram]) -> tuple[Floats, bool]:
    lows, highs = zip(*(_middle(one) for one in read), strict=True)
    low, high = min(lows), max(highs)
    if low > 0 and high / low > _LOG_FROM:
        return np.geomspace(low, high, _BINS + 1), True
    if not high > low:
        room = abs(low) * 0.01 or 1.0
        low, high = low - room, high + room
    return np.linspace(low, high, _BINS + 1), False


def _middle(one: Histogram) -> tuple[float, float]:
    """Return between what all but 1 in 1000 of the values are: a single one far away hides the others."""
    total = np.cumsum(one.counts) / one.counts.sum()
    first = int(np.searchsorted(total, 0.0005, side="right"))
    last = int(np.searchsorted(total, 0.9995))
    last = min(last, one.counts.size - 1)
    return float(one.edges[first]), float(one.edges[last + 1])


def _spread(one: Histogram, edges: Floats) -> Floats:
    """Return the counts over `edges`; what lies beyond them counts in the outer bins."""
    below = np.concatenate([[0.0], np.cumsum(one.counts)])
    at = np.interp(edges, one.edges, below)
    at[0], at[-1] = 0.0, below[-1]
    return np.diff(at)
