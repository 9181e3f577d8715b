"""All that a histogram holds, in the form that merges."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import reduce

import numpy as np

from metricfold._core.sketch.grid import Buckets, Grid, place
from metricfold._core.sketch.indexing import FINEST, FloatArray
from metricfold._core.sketch.layout import FEWEST_BUCKETS, Extents, Layout, resolve

__all__ = ["Contents", "Frame", "Total", "check_max_buckets"]


class Total(IntEnum):
    """Sums over all values, and where each is kept."""

    COUNT = 0
    """Finite values."""
    SQUARES = 1
    """Of their weights."""
    NAN = 2
    POSITIVE_INFINITY = 3
    NEGATIVE_INFINITY = 4
    ZERO = 5
    """Weight of the values that are ±0."""


_NOT_FINITE = (Total.NAN, Total.POSITIVE_INFINITY, Total.NEGATIVE_INFINITY)


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """What fixes the layout of a histogram, and its extreme values; merges by taking extremes.

    Args:
        extents: which buckets are occupied.
        minimum: the least value; inf if there is none.
        maximum: the greatest value; -inf if there is none.
        finest: the largest resolution allowed.
        dropped: how many segments have been dropped.
    """

    extents: Extents
    minimum: float = math.inf
    maximum: float = -math.inf
    finest: int = FINEST
    dropped: int = 0

    def joined(self, other: Frame) -> Frame:
        return Frame(
            self.extents.joined(other.extents),
            min(self.minimum, other.minimum),
            max(self.maximum, other.maximum),
            min(self.finest, other.finest),
            max(self.dropped, other.dropped),
        )

    def layout(self, max_buckets: int) -> Layout:
        return resolve(self.extents, max_buckets, self.finest, self.dropped)


@dataclass(frozen=True, slots=True, eq=False)
class Contents:
    """What a histogram holds.

    Args:
        max_buckets: how many buckets there may be.
        minimum: the least value; inf if there is none.
        maximum: the greatest value; -inf if there is none.
        totals: sums over all values, indexed by `Total`.
        grid: what all values but zeros are in; in the layout that its occupied buckets determine.
    """

    max_buckets: int
    minimum: float
    maximum: float
    totals: FloatArray
    grid: Grid

    @classmethod
    def of(cls, max_buckets: int, frame: Frame, totals: FloatArray, buckets: Buckets) -> Contents:
        """Return what a histogram holds whose `frame` and occupied `buckets` are known."""
        grid = Grid(frame.layout(max_buckets))
        place(buckets, grid.layout, grid.sums)
        return cls(max_buckets, frame.minimum, frame.maximum, totals, grid)

    def check(self) -> None:
        """Refuse contents that no values come to.

        Raises:
            ValueError: says which numbers contradict each other.
        """
        totals, (weights, *moments) = self.totals, self.grid.sums
        numbers = [totals, weights, *moments]
        if not all(((array >= 0) & (array < math.inf)).all() for array in numbers):
            raise ValueError("its sums are negative, or no finite numbers")
        counts = totals[[Total.COUNT, *_NOT_FINITE]]
        if (counts != np.floor(counts)).any() or (counts > 2.0**53).any():
            raise ValueError("its counts are no whole numbers")
        some = totals[Total.COUNT] > 0
        if some != (weights.any() or totals[Total.ZERO] > 0):
            raise ValueError("its count contradicts its buckets")
        if some and not -math.inf < self.minimum <= self.maximum < math.inf:
            raise ValueError(f"it reaches from {self.minimum} to {self.maximum}")

    @property
    def frame(self) -> Frame:
        layout = self.grid.layout
        return Frame(layout.extents, self.minimum, self.maximum, layout.finest, layout.dropped)

    @property
    def buckets(self) -> Buckets:
        return Buckets.of(self.grid)

    def copy(self) -> Contents:
        return replace(self, totals=self.totals.copy(), grid=self.grid.copy())

    def joined(self, *others: Contents) -> Contents:
        parts = (self, *others)
        return Contents.of(
            min(part.max_buckets for part in parts),
            reduce(Frame.joined, [part.frame for part in parts]),
            np.sum([part.totals for part in parts], axis=0),
            Buckets.of(*(part.grid for part in parts)),
        )


MOST_BUCKETS = 2**20
"""A histogram of so many takes 24 MiB; a file may ask for no more."""


def check_max_buckets(max_buckets: int) -> int:
    """Return the number, or raise what says why it cannot be."""
    whole = isinstance(max_buckets, int | np.integer) and not isinstance(max_buckets, bool)
    if not whole or not FEWEST_BUCKETS <= max_buckets <= MOST_BUCKETS:
        raise ValueError(
            f"max_buckets={max_buckets!r}: give a whole number, {FEWEST_BUCKETS} or more and at most "
            f"{MOST_BUCKETS}"
        )
    return int(max_buckets)
