"""Histograms of fewer buckets, for backends that limit them or pay for each one."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from metricfold._core.sketch import Histogram

__all__ = ["coarsened"]


def coarsened(
    histogram: Histogram, max_buckets: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return counts, shape (n,), and edges, shape (n + 1,), of at most `max_buckets` buckets.

    Empty buckets at both ends are dropped and neighbours are joined, about equally many each. The
    edges are among those of `histogram`, so every count is exact.

    >>> histogram = Histogram(np.arange(6.0), np.array([0.0, 1, 2, 3, 4]), 1.0, 5.0, 30.0, 106.0)
    >>> coarsened(histogram, 2)
    (array([3., 7.]), array([1., 3., 5.]))
    """
    occupied = np.flatnonzero(histogram.counts)
    if not len(occupied):
        return np.zeros(0), histogram.edges[:1]
    first, last = int(occupied[0]), int(occupied[-1]) + 1
    cuts = np.linspace(first, last, min(last - first, max_buckets) + 1).round().astype(np.intp)
    return np.add.reduceat(histogram.counts[:last], cuts[:-1]), histogram.edges[cuts]
