"""Values and their weights: what may count, how much one may weigh, and many together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "LARGEST_COUNT",
    "LARGEST_WEIGHT",
    "Waiting",
    "concatenated",
    "countable",
    "only",
    "weighable",
]

LARGEST_WEIGHT = 1e150
"""The squares of weights must add up to a number."""
LARGEST_COUNT = 2.0**53
"""Whole numbers up to here a float64 holds exactly."""


def countable(numbers: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Return which of `numbers` may count something."""
    return (numbers >= 0.0) & (numbers <= LARGEST_COUNT) & (numbers == np.floor(numbers))  # type: ignore[no-any-return]


def weighable(weights: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Return which of `weights` a value that counts may have."""
    return (weights > 0.0) & (weights <= LARGEST_WEIGHT)


def only(
    values: npt.NDArray[Any], weights: npt.NDArray[np.float64] | None, which: Any
) -> tuple[npt.NDArray[Any], npt.NDArray[np.float64] | None]:
    """Return some of `values`, and their weights if they have any."""
    return values[which], None if weights is None else weights[which]


def concatenated(
    parts: Sequence[tuple[npt.NDArray[np.float64], npt.NDArray[np.float64] | None]],
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64] | None]:
    """Return all values, and their weights if any part has some."""
    if len(parts) < 2:
        return parts[0] if parts else (np.empty(0), None)
    values = np.concatenate([values for values, _ in parts], axis=None)
    if all(weights is None for _, weights in parts):
        return values, None
    weighing = [np.ones(v.size) if w is None else w for v, w in parts]
    return values, np.concatenate(weighing)


class Waiting:
    """Values, each with its weight or all without, that wait until they are many enough for a step."""

    __slots__ = ("_parts", "size")

    def __init__(self) -> None:
        self._parts: list[tuple[npt.NDArray[np.float64], npt.NDArray[np.float64] | None]] = []
        self.size = 0

    def add(self, values: npt.NDArray[np.float64], weights: npt.NDArray[np.float64] | None) -> None:
        self._parts.append((values, weights))
        self.size += values.size

    def taken(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64] | None]:
        """Return all of them, of which none waits any more."""
        parts, self._parts, self.size = self._parts, [], 0
        return concatenated(parts)
