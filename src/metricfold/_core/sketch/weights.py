"""How much a value may weigh."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["LARGEST_WEIGHT", "weighable"]

LARGEST_WEIGHT = 1e150
"""The squares of weights must add up to a number."""


def weighable(weights: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Return which of `weights` a value that counts may have."""
    return (weights > 0.0) & (weights <= LARGEST_WEIGHT)
