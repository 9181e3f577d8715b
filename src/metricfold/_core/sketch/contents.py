"""All that sketches hold, in the form that merges: totals, extremes and buckets, of any number of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import IntEnum

import numpy as np

from metricfold._core.sketch.buckets import FARTHEST, BoolArray, Buckets, united
from metricfold._core.sketch.indexing import FINEST, FloatArray, IntArray
from metricfold._core.sketch.weights import countable

__all__ = ["FEWEST_BUCKETS", "Contents", "Total", "check_max_buckets"]


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


_NUMBERS = [Total.COUNT, Total.NAN, Total.POSITIVE_INFINITY, Total.NEGATIVE_INFINITY]
_SLACK = 1e-3
"""By which moments may exceed their weights: sums on devices are rounded."""
_TINY = 1e-300
_MOST = 1e306
"""So that what many ranks hold together is a number still."""

FEWEST_BUCKETS = 320
MOST_BUCKETS = 2**20
"""A histogram of so many takes 48 MiB; a file may ask for no more."""


def check_max_buckets(max_buckets: int) -> int:
    """Return the number, or raise what says why it cannot be."""
    whole = isinstance(max_buckets, int | np.integer) and not isinstance(max_buckets, bool)
    if not whole or not FEWEST_BUCKETS <= max_buckets <= MOST_BUCKETS:
        raise ValueError(
            f"max_buckets={max_buckets!r}: give a whole number, {FEWEST_BUCKETS} or more and at most "
            f"{MOST_BUCKETS}"
        )
    return int(max_buckets)


@dataclass(frozen=True, slots=True, eq=False)
class Contents:
    """What p sketches hold.

    Args:
        totals: sums over all values, indexed by `Total`, shape (p, 6).
        low: the least value of each; inf if there is none; shape (p,).
        high: the greatest value of each; -inf if there is none.
        finest: the largest resolution that each may have.
        reach: within how many octaves of 1 buckets are shared out.
        buckets: what all values but zeros are in.
    """

    totals: FloatArray
    low: FloatArray
    high: FloatArray
    finest: IntArray
    reach: IntArray
    buckets: Buckets

    @classmethod
    def empty(cls) -> Contents:
        """Return what one sketch holds that has seen nothing."""
        return cls(
            np.zeros((1, len(Total))),
            np.array([math.inf]),
            np.array([-math.inf]),
            np.array([FINEST]),
            np.array([FARTHEST]),
            Buckets.empty(),
        )

    def copy(self) -> Contents:
        """Return the same; what is added to it later changes it alone."""
        return replace(
            self,
            totals=self.totals.copy(),
            low=self.low.copy(),
            high=self.high.copy(),
            buckets=replace(self.buckets, sums=self.buckets.sums.copy()),
        )

    def only(self, which: BoolArray) -> Contents:
        """Return the same sketches, all but `which` of them empty."""
        if which.all():
            return self
        return Contents(
            np.where(which[:, np.newaxis], self.totals, 0.0),
            np.where(which, self.low, math.inf),
            np.where(which, self.high, -math.inf),
            np.where(which, self.finest, FINEST),
            np.where(which, self.reach, FARTHEST),
            self.buckets.taken(np.flatnonzero(which[self.buckets.row])),
        )

    def joined(self, other: Contents, most: int) -> Contents:
        """Return what `self` and `other` hold together, sketch by sketch, in `most` buckets each.

        Associative and commutative: sums are added, extremes compared, and the resolutions depend on
        what values there are alone.
        """
        finest = np.minimum(self.finest, other.finest)
        reach = np.minimum(self.reach, other.reach)
        buckets, reach = united(self.buckets, other.buckets, finest, reach, most)
        return Contents(
            self.totals + other.totals,
            np.minimum(self.low, other.low),
            np.maximum(self.high, other.high),
            finest,
            reach,
            buckets,
        )

    def rows(self, begin: int, end: int) -> Contents:
        """Return the sketches from `begin` to `end`."""
        part = slice(begin, end)
        held = slice(*np.searchsorted(self.buckets.row, [begin, end]).tolist())
        return Contents(
            self.totals[part],
            self.low[part],
            self.high[part],
            self.finest[part],
            self.reach[part],
            Buckets(self.buckets.key[held], self.buckets.sums[:, held]).moved(-begin),
        )

    def sound(self) -> BoolArray:
        """Return which of the sketches values may have come to, shape (p,).

        What is sound merges, and is read, without an error.
        """
        rows, buckets = len(self.totals), self.buckets
        wrong = buckets.faulty(self.finest)
        weight, first, second = buckets.sums
        for larger, smaller in ((weight, first), (first, second)):
            # Written so that NaN is wrong.
            wrong |= ~((smaller >= 0.0) & (smaller <= larger * (1.0 + _SLACK) + _TINY))
        wrong |= ~((weight > 0.0) & (weight <= _MOST))
        row = buckets.row
        good = np.bincount(row, wrong, minlength=rows) == 0.0
        good &= ((self.totals >= 0.0) & (self.totals <= _MOST)).all(axis=1)
        good &= countable(self.totals[:, _NUMBERS]).all(axis=1)
        good &= (self.finest >= 0) & (self.finest <= FINEST)
        good &= (self.reach >= -1) & (self.reach <= FARTHEST)
        some = self.totals[:, Total.COUNT] > 0.0
        weighed = np.bincount(row, minlength=rows) > 0
        good &= some == (weighed | (self.totals[:, Total.ZERO] > 0.0))
        ordered = (self.low <= self.high) & np.isfinite(self.low) & np.isfinite(self.high)
        sound: BoolArray = good & (ordered | ~some)
        return sound
