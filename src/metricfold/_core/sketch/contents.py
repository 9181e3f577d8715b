"""All that sketches hold, in the form that merges: totals, extremes and buckets, of any number of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from metricfold._core.sketch.buckets import FARTHEST, BoolArray, Buckets, united
from metricfold._core.sketch.indexing import FINEST, FloatArray, IntArray
from metricfold._core.sketch.weights import countable

__all__ = ["FEWEST_BUCKETS", "NOTHING", "Contents", "Limit", "Total", "check_max_buckets"]


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


class Limit(IntEnum):
    """What only rises as values come in, and where each is kept."""

    MINUS_LOW = 0
    """Of the least value the negative; -inf if there is none."""
    HIGH = 1
    """The greatest value; -inf if there is none."""
    COARSER = 2
    """By how much the largest resolution that the sketch may have is below the finest."""
    NEARER = 3
    """By how much nearer to 1 than all floats the octaves are among which buckets are shared out."""


NOTHING = np.array([-math.inf, -math.inf, 0.0, 0.0])
"""The limits of a sketch that has seen nothing."""
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
    """What p sketches hold."""

    totals: FloatArray
    """Indexed by `Total`, shape (p, 6)."""
    limits: FloatArray
    """Indexed by `Limit`, shape (p, 4)."""
    buckets: Buckets
    """Of all values but zeros."""

    @classmethod
    def empty(cls) -> Contents:
        """Return what one sketch holds that has seen nothing."""
        return cls(np.zeros((1, len(Total))), NOTHING[np.newaxis].copy(), Buckets.empty())

    @property
    def low(self) -> FloatArray:
        """The least value of each; inf if there is none."""
        return 0.0 - self.limits[:, Limit.MINUS_LOW]  # of two zeros the one without a sign

    @property
    def high(self) -> FloatArray:
        """The greatest value of each; -inf if there is none."""
        return self.limits[:, Limit.HIGH]

    @property
    def finest(self) -> IntArray:
        """The largest resolution that each may have."""
        return FINEST - self.limits[:, Limit.COARSER].astype(np.int64)

    @property
    def reach(self) -> IntArray:
        """Within how many octaves of 1 buckets are shared out."""
        return FARTHEST - self.limits[:, Limit.NEARER].astype(np.int64)

    def copy(self) -> Contents:
        """Return the same; what is added to it later changes it alone."""
        buckets = Buckets(self.buckets.key, self.buckets.sums.copy())
        return Contents(self.totals.copy(), self.limits.copy(), buckets)

    def joined(self, other: Contents, most: int) -> Contents:
        """Return what `self` and `other` hold together, sketch by sketch, in `most` buckets each.

        Associative and commutative: sums are added, the larger of limits holds, and the resolutions
        depend on what values there are alone.
        """
        limits = np.maximum(self.limits, other.limits)
        both = Contents(self.totals + other.totals, limits, Buckets.empty())
        buckets, reach = united(self.buckets, other.buckets, both.finest, both.reach, most)
        limits[:, Limit.NEARER] = FARTHEST - reach
        return Contents(both.totals, limits, buckets)

    def with_buckets(self, other: Buckets, most: int) -> Contents:
        """Return the same with more in buckets, of which totals and extremes are known already."""
        nothing = np.zeros_like(self.totals), np.full_like(self.limits, -math.inf)
        return self.joined(Contents(*nothing, other), most)

    def rows(self, begin: int, end: int) -> Contents:
        """Return the sketches from `begin` to `end`."""
        held = slice(*np.searchsorted(self.buckets.row, [begin, end]).tolist())
        buckets = Buckets(self.buckets.key[held], self.buckets.sums[:, held]).moved(-begin)
        return Contents(self.totals[begin:end], self.limits[begin:end], buckets)

    def sound(self) -> BoolArray:
        """Return which of the sketches values may have come to, shape (p,).

        What is sound merges, and is read, without an error.
        """
        coarser = self.limits[:, Limit.COARSER :]
        good = ((self.totals >= 0.0) & (self.totals <= _MOST)).all(axis=1)
        good &= countable(self.totals[:, _NUMBERS]).all(axis=1)
        good &= (countable(coarser) & (coarser <= [FINEST, FARTHEST + 1])).all(axis=1)
        some = self.totals[:, Total.COUNT] > 0.0
        finite = np.isfinite(self.low) & np.isfinite(self.high)
        good &= finite & (self.low <= self.high) | ~some

        buckets, row = self.buckets, self.buckets.row
        weight, first, second = buckets.sums
        with np.errstate(invalid="ignore"):
            wrong = buckets.faulty(np.where(good, self.finest, FINEST))
        # Written so that NaN is wrong.
        for larger, smaller in ((weight, first), (first, second)):
            wrong |= ~(smaller <= larger * (1.0 + _SLACK) + _TINY)
        wrong |= ~((weight > 0.0) & (weight <= _MOST) & (first >= 0.0) & (second >= 0.0))
        good[row[wrong]] = False
        weighed = np.bincount(row, minlength=good.size) > 0
        sound: BoolArray = good & (some == (weighed | (self.totals[:, Total.ZERO] > 0.0)))
        return sound
