"""Histograms: how the values of one DISTRIBUTION metric spread, for sinks that draw them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Histogram"]


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
