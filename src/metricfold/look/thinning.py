"""Fewer points of a curve, so that nothing that can be seen is lost: extremes and what is not finite stay.

Each of some thousand stretches of the curve keeps its smallest and its largest value and the first that is
not finite, each at its own step. A mean of each stretch is kept beside them, since smoothing a curve of
extremes would not give the curve of the means.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Thinned", "thinned"]

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Thinned:
    """What is left of a curve.

    Args:
        points: which of its points are drawn, ascending.
        middles: a point in the middle of each stretch.
        means: the mean of each stretch; NaN if one of its values is not finite.
        length: how many values a stretch has.
    """

    points: npt.NDArray[np.int64]
    middles: npt.NDArray[np.int64]
    means: Floats
    length: int


def thinned(values: Floats, most: int) -> Thinned | None:
    """Return about `most` points of `values`, with half as many means; None where that saves nothing.

    >>> import numpy as np
    >>> curve = np.zeros(10_000)
    >>> curve[1234], curve[777], curve[5000] = 9.0, -9.0, np.nan
    >>> kept = thinned(curve, 100).points
    >>> sorted({1234, 777, 5000} - set(kept.tolist())), len(kept) <= 110
    ([], True)
    """
    if 2 * values.size <= 3 * most:
        return None
    length = -(-2 * values.size // most)
    stretches = -(-values.size // length)
    # The last stretch is filled up with its own last value, which changes none of its extremes.
    rows = np.pad(values, (0, stretches * length - values.size), mode="edge")
    rows = rows.reshape(stretches, length)
    finite = np.isfinite(rows)
    starts = np.arange(stretches) * length
    found: list[npt.NDArray[Any]] = [
        starts + np.where(finite, rows, np.inf).argmin(axis=1),
        starts + np.where(finite, rows, -np.inf).argmax(axis=1),
        (starts + (~finite).argmax(axis=1))[~finite.all(axis=1)],
        np.array([0, values.size - 1]),
    ]
    points = np.unique(np.minimum(np.concatenate(found), values.size - 1))
    middles = np.minimum(starts + length // 2, values.size - 1)
    with np.errstate(invalid="ignore", over="ignore"):
        # An infinity makes a NaN of it as NaN itself does.
        means = np.where(finite.all(axis=1), rows.mean(axis=1), np.nan)
    return Thinned(points, middles, means, length)
