"""Which buckets are kept, and how fine: a function of the extremes alone.

The floats of each sign are cut into `SEGMENTS` segments: single octaves around 1, wider ones far
from it. A histogram knows of each segment the lowest and the highest bucket that holds anything
(its *extents*), and gives every occupied segment an equal share of its budget. A segment that wants
less than its share, because it holds one outlier or narrow data, leaves the rest to the others.
Each segment is as fine as its share allows:

    300 ± 0.1 and one outlier of 1e30, 2048 buckets:
        the octave of 300 needs some 200 buckets at m = 16 and gets them; the outlier needs one.
    log-normal over 20 octaves: each gets 2048 / 20 = 102 buckets, so m = 6.

Extents only grow, and every step from them to the layout is monotone: shares, resolutions and the
kept range can only shrink. So a histogram that coarsens as values come in arrives where one that
had known all the extremes from the start would be: the layout depends on neither order nor split.
The same holds across ranks: extents merge by elementwise MAX, and all ranks derive one layout.

If even m = 4 is too fine for all that is occupied, segments are *dropped* to a single bucket each,
in `DROP_ORDER`: first those beyond 2^±64, where no metric is unless something broke, then the
smallest magnitudes. They are the underflow and overflow cells.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from metricfold._core.sketch.indexing import BIAS, FINEST, FRACTION_BITS, MAGNITUDE, IntArray

__all__ = [
    "COARSEST",
    "DROP_ORDER",
    "END_FIELDS",
    "FEWEST_BUCKETS",
    "FIELDS",
    "FIRST_FIELDS",
    "MIDDLE_EXPONENTS",
    "NOTHING",
    "SEGMENTS",
    "SEGMENT_OF_PREFIX",
    "SIGNED",
    "WHOLE",
    "BoolArray",
    "Extents",
    "Layout",
    "kept_magnitudes",
    "resolve",
    "segment_of",
]

BoolArray: TypeAlias = npt.NDArray[np.bool_]

COARSEST = 4
"""The smallest `m` that a histogram comes to by itself."""
_SMALLEST_SHARE = 1 << COARSEST
"""Of buckets per segment; below it, segments are dropped. An octave needs no more for m = 4."""
WHOLE = -1
"""Stands for `m` where a segment is one bucket, whatever its size."""

FIELDS = 2047
"""Exponent fields of finite floats; 0 is that of the subnormals."""
_STARTS = np.array(
    [
        0,
        *range(BIAS - 256, BIAS - 128, 64),
        *range(BIAS - 128, BIAS - 64, 16),
        *range(BIAS - 64, BIAS - 32, 4),
        *range(BIAS - 32, BIAS + 32),
        *range(BIAS + 32, BIAS + 64, 4),
        *range(BIAS + 64, BIAS + 128, 16),
        *range(BIAS + 128, BIAS + 256, 64),
        BIAS + 256,
    ],
    dtype=np.int64,
)
"""The exponent field with which each segment begins."""
_FAR = 7
"""Segments at either end that lie beyond 2^±64."""

SEGMENTS = len(_STARTS)
SIGNED = 2 * SEGMENTS
"""Segments of both signs, the positive ones first."""

FIRST_FIELDS = np.tile(_STARTS, 2)
END_FIELDS = np.tile(np.append(_STARTS[1:], FIELDS), 2)
"""The exponent fields, from and to (exclusive), of each signed segment."""
MIDDLE_EXPONENTS = ((FIRST_FIELDS + END_FIELDS) // 2 - BIAS).astype(np.int32)
"""Between the ends of each signed segment, so that squares in its unit are floats at both ends."""

DROP_ORDER = np.array(
    [
        *(place for far in range(_FAR) for place in (SEGMENTS - 1 - far, far)),
        *range(_FAR, SEGMENTS - _FAR),
    ]
)

FEWEST_BUCKETS = 320
"""Enough for one bucket per segment and, in the one that would be dropped last, for m = 4."""

_segment_of_field = np.searchsorted(_STARTS, np.arange(2048), side="right") - 1
SEGMENT_OF_PREFIX = np.concatenate([_segment_of_field, _segment_of_field + SEGMENTS])
"""The segment of a float by its top 12 bits: sign and exponent field."""

_SHIFTS = FINEST - np.arange(FINEST + 1)[:, np.newaxis]
"""From the finest index to that at each resolution."""
_NO_LOW = np.iinfo(np.int64).max
_NO_HIGH = -1


def segment_of(bits: IntArray) -> IntArray:
    """Return the signed segment of each float of which `bits` are the bits."""
    # Negative numbers shift to -2048..-1, which index from the end.
    segments: IntArray = SEGMENT_OF_PREFIX[bits >> FRACTION_BITS]
    return segments


def kept_magnitudes(dropped: int) -> tuple[float, float]:
    """Return the magnitudes, from and to (exclusive), that remain of `dropped` segments."""
    kept = np.sort(DROP_ORDER[dropped:])
    low, high = int(FIRST_FIELDS[kept[0]]), int(END_FIELDS[kept[-1]])
    return (
        math.ldexp(1.0, low - BIAS) if low else 0.0,
        math.ldexp(1.0, high - BIAS) if high < FIELDS else math.inf,
    )


@dataclass(frozen=True, slots=True, eq=False)
class Extents:
    """The lowest and the highest occupied bucket of each signed segment, at m = 16.

    A bucket of a coarser histogram counts as all the fine ones inside it: that changes nothing,
    since its segment is never going to be finer again.

    Args:
        low: shape (SIGNED,); the largest int64 where nothing is.
        high: shape (SIGNED,); -1 where nothing is.
    """

    low: IntArray
    high: IntArray

    @classmethod
    def empty(cls) -> Extents:
        return cls(np.full(SIGNED, _NO_LOW), np.full(SIGNED, _NO_HIGH))

    @classmethod
    def of(cls, segment: IntArray, index: IntArray, m: IntArray) -> Extents:
        """Return the extents of buckets, given the signed segment, index and `m` of each."""
        low, high = _at_finest(segment, index, index, m)
        extents = cls.empty()
        np.minimum.at(extents.low, segment, low)
        np.maximum.at(extents.high, segment, high)
        return extents

    @classmethod
    def of_bits(cls, bits: IntArray) -> Extents:
        """Return the extents of values other than 0, given by their bits."""
        segment = segment_of(bits)
        index = (bits & MAGNITUDE) >> (FRACTION_BITS - FINEST)
        extents = cls.empty()
        np.minimum.at(extents.low, segment, index)
        np.maximum.at(extents.high, segment, index)
        return extents

    def joined(self, other: Extents) -> Extents:
        return Extents(np.minimum(self.low, other.low), np.maximum(self.high, other.high))

    @property
    def occupied(self) -> BoolArray:
        return self.high >= 0


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the buckets of each segment are, in one row of buckets.

    Args:
        m: resolution of each signed segment, or `WHOLE`.
        first: index of its lowest bucket.
        size: how many buckets it has, from there on without a gap.
        dropped: how many segments of `DROP_ORDER` have been dropped.
        finest: the largest resolution that any segment may have.
        roomy: whether there are buckets beyond those that are occupied.
    """

    m: IntArray
    first: IntArray
    size: IntArray
    dropped: int
    finest: int
    roomy: bool = False

    @cached_property
    def extents(self) -> Extents:
        """The extents that determine this layout, unless it is roomy."""
        used = np.flatnonzero(self.size)
        first, m = self.first[used], self.m[used]
        extents = Extents.empty()
        extents.low[used], extents.high[used] = _at_finest(
            used, first, first + self.size[used] - 1, m
        )
        return extents

    @cached_property
    def start(self) -> IntArray:
        """Place of each segment's first bucket in the row."""
        return self.size.cumsum() - self.size

    @cached_property
    def total(self) -> int:
        """Number of buckets."""
        return int(self.start[-1] + self.size[-1])

    @cached_property
    def divided(self) -> BoolArray:
        """Which segments have buckets by their values' bits."""
        divided: BoolArray = (self.size > 0) & (self.m != WHOLE)
        return divided

    @cached_property
    def coarsest(self) -> int:
        """The smallest resolution of a segment, but for those that have been dropped."""
        most = min(self.finest, COARSEST) if self.dropped else self.finest
        return int(self.m.min(initial=most, where=self.divided))

    def with_room(self) -> Layout:
        """Return the layout with room on both sides of each segment's buckets.

        So that a stream that slowly widens is laid out anew a few times, not at every extreme.
        """
        m = np.maximum(self.m, 0)
        margin = self.size // 2 + 8
        first = np.maximum(self.first - margin, FIRST_FIELDS << m)
        last = np.minimum(self.first + self.size + margin, END_FIELDS << m)
        return replace(
            self,
            first=np.where(self.divided, first, self.first),
            size=np.where(self.divided, last - first, self.size),
            roomy=True,
        )


def resolve(extents: Extents, budget: int, finest: int = FINEST, dropped: int = 0) -> Layout:
    """Return the layout that `extents` determine.

    Args:
        extents: what is occupied.
        budget: how many buckets there may be.
        finest: the largest resolution allowed.
        dropped: how many segments have been dropped before.
    """
    occupied = np.flatnonzero(extents.occupied)
    low, high = extents.low[occupied], extents.high[occupied]
    shifts = _SHIFTS[: finest + 1]
    sizes = (high >> shifts) - (low >> shifts) + 1

    # At the coarsest resolution a segment has what it needs, whatever its share.
    coarsest = min(COARSEST, finest)
    wanted, needed = sizes[finest], sizes[coarsest]
    share = _SMALLEST_SHARE if dropped else _share(wanted, needed, budget)
    if share <= _SMALLEST_SHARE:
        share = _SMALLEST_SHARE
        charges = _nothing()
        charges[occupied] = np.minimum(wanted, np.maximum(share, needed))
        dropped = max(dropped, _drop(charges, budget))
    chosen = np.maximum((sizes <= share).sum(axis=0) - 1, coarsest)

    m, first, size = np.full(SIGNED, finest), _nothing(), _nothing()
    m[occupied] = chosen
    first[occupied] = low >> (FINEST - chosen)
    size[occupied] = sizes[chosen, np.arange(occupied.size)]
    if dropped:
        whole = _dropped(dropped) & (size > 0)
        m[whole], first[whole], size[whole] = WHOLE, 0, 1
    return Layout(m, first, size, dropped, finest)


def _nothing() -> IntArray:
    return np.zeros(SIGNED, dtype=np.int64)


def _at_finest(
    segment: IntArray, first: IntArray, last: IntArray, m: IntArray
) -> tuple[IntArray, IntArray]:
    """Return the lowest and the highest of the finest buckets from `first` to `last` at `m`."""
    whole = m == WHOLE
    if whole.any():
        first = np.where(whole, FIRST_FIELDS[segment], first)
        last = np.where(whole, END_FIELDS[segment] - 1, last)
        m = np.maximum(m, 0)
    shift = FINEST - m
    return first << shift, ((last + 1) << shift) - 1


def _share(wanted: IntArray, needed: IntArray, budget: int) -> int:
    """Return the largest share with which all segments together stay in the budget; or less than 0.

    A segment is charged its share or what it needs, but never more than it wants.
    """
    if wanted.sum() <= budget:
        return int(wanted.max(initial=0))
    # What is charged grows with the share at one rate between these, and not at all beyond them.
    corners = np.concatenate([needed, wanted])
    corners.sort()
    charged = np.minimum(wanted, np.maximum(corners[:, np.newaxis], needed)).sum(axis=1)
    last = int(charged.searchsorted(budget, side="right")) - 1
    if last < 0:
        return -1
    sharing = np.count_nonzero((needed <= corners[last]) & (corners[last] < wanted))
    return int(corners[last] + (budget - charged[last]) // sharing)


def _drop(charges: IntArray, budget: int) -> int:
    """Return how many segments to drop so that what remains stays in the budget."""
    saved = (charges - (charges > 0)).reshape(2, SEGMENTS).sum(axis=0)[DROP_ORDER]
    excess = int(charges.sum()) - budget
    return int(np.searchsorted(np.cumsum(saved), excess)) + 1 if excess > 0 else 0


def _dropped(dropped: int) -> BoolArray:
    gone = np.zeros(SEGMENTS, dtype=np.bool_)
    gone[DROP_ORDER[:dropped]] = True
    return np.tile(gone, 2)


NOTHING = resolve(Extents.empty(), FEWEST_BUCKETS)
"""The layout of a histogram that is empty."""
