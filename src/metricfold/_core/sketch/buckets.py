"""What is in the occupied buckets of sketches, and how two of them become one.

A bucket is known by its lower edge: of ±|x| the exponent and the top 16 bits of the mantissa, as one
number that grows with x. Of the values in it three sums are kept, over their weights: of 1, u and u²,
where u in [0, 1) is the position between its edges. When halves become one bucket, they carry over
exactly: a value at u in half j lies at (j + u) / 2 of the whole.

An octave o (of one sign) is cut into 2^m_o buckets. With c_o for the number that are occupied at the
resolution in which its values came, 16 on a host,

    T     the share: the largest whole number with  Σ_o min(T, c_o) <= most
    m_o   the largest m at which o has no more than T occupied buckets.

Below 16, which is m = 4, T does not go: then the octaves far from 1 have one bucket each, and those within
*reach* share the others, from 2^-(r + 1) to 2^(r + 1) with the largest r at which each may have 16. Where
more octaves than buckets are occupied, 2^d neighbours each become one bucket, m = -d, in all of the sketch,
with the smallest d that is enough. README.md says why none of this depends on the order of values.

All functions work on many sketches at once: each bucket says in which `row` it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from metricfold._core.sketch.indexing import (
    BIAS,
    FIELDS,
    FINEST,
    FRACTION_BITS,
    MAGNITUDE,
    FloatArray,
    IntArray,
    from_bits,
)

__all__ = ["COARSEST", "FARTHEST", "MOMENTS", "ROW_BITS", "BoolArray", "Buckets", "united"]

BoolArray = npt.NDArray[np.bool_]

MOMENTS = 3
"""Sums per bucket: of 1, u and u²."""
COARSEST = -4
"""Of groups of 2^4 octaves there are 256, both signs together: there is room for them in any sketch."""

FARTHEST = BIAS
"""How far the octaves of all floats reach."""
_LEAST_SHARE = 16

_SHIFT = FRACTION_BITS - FINEST
_HALVINGS = np.ldexp(1.0, -np.arange(FINEST + 1))

# The key of a bucket, from the top: the row, the octave and the place in it, m, and whether it is cut.
_CUT_BITS, _KIND_BITS, ROW_BITS = 1, 6, 40
_ABOVE = 1 << 27
"""What makes the places of negative buckets positive."""
_PLACES = (1 << (ROW_BITS - _KIND_BITS)) - 1
_LOWEST = 1 - COARSEST
_KINDS = (1 << _KIND_BITS) - 1


@dataclass(frozen=True, slots=True, eq=False)
class Buckets:
    """Occupied buckets of any number of sketches, row by row, in ascending order of their values.

    Args:
        key: one number for each, which grows with the row and then with the values; shape (n,).
        sums: of 1, u and u²; shape (3, n).
    """

    key: IntArray
    sums: FloatArray

    @classmethod
    def of(
        cls, index: IntArray, m: IntArray | int, sums: FloatArray, cut: BoolArray | bool = False
    ) -> Buckets:
        """Return the buckets of one sketch.

        Args:
            index: of a positive bucket its lower edge, counted in the finest buckets from 0; of a
                negative one the complement of that. So both ascend with the values.
            m: its resolution.
            sums: of 1, u and u²; shape (3, n).
            cut: whether its octave is coarser than its values came.
        """
        kind = (m + _LOWEST << _CUT_BITS) + cut
        return cls((index + _ABOVE << _KIND_BITS) + kind, sums)

    @classmethod
    def empty(cls) -> Buckets:
        return cls(np.empty(0, dtype=np.int64), np.empty((MOMENTS, 0)))

    @classmethod
    def of_values(cls, bits: IntArray, weights: FloatArray | None, m: int) -> Buckets:
        """Return a bucket for each value, neither 0 nor infinite, given by its bits; in their order."""
        rest = (1 << (FRACTION_BITS - m)) - 1
        edge = (bits & MAGNITUDE & ~rest) >> _SHIFT
        sums = np.empty((MOMENTS, bits.size))
        sums[0] = 1.0 if weights is None else weights
        u = np.multiply(bits & rest, 2.0 ** (m - FRACTION_BITS), out=sums[2])
        np.multiply(sums[0], u, out=sums[1])
        u *= sums[1]
        return cls.of(edge ^ (bits >> 63), m, sums)

    @classmethod
    def signed(
        cls, index: npt.ArrayLike, sums: npt.ArrayLike, m: int, *, cut: bool = False
    ) -> Buckets:
        """Return buckets of one sketch given by the signed indices of `bucket_index`, 0 not among them.

        Raises:
            ValueError: an index is 0 or beyond those of floats, or there are not three sums of each.
        """
        given = np.asarray(index, dtype=np.int64)
        array = np.array(sums, dtype=np.float64)
        if given.ndim != 1 or array.shape != (MOMENTS, given.size):
            raise ValueError(
                f"indices of shape {given.shape} and sums of shape {array.shape}: give n indices, "
                f"and {MOMENTS} sums of each, shape ({MOMENTS}, n)"
            )
        bucket = np.abs(given) - 1
        if ((bucket < 0) | (bucket > ((FIELDS << FINEST) - 1) >> (FINEST - m))).any():
            raise ValueError(f"at m={m}, an index is 0 or beyond those of finite floats")
        edge = bucket << (FINEST - m)
        return cls.of(np.where(given < 0, ~edge, edge), m, array, cut)

    @classmethod
    def of_all(cls, parts: Sequence[Buckets]) -> Buckets:
        """Return what is in all `parts`, one after the other."""
        keys, sums = zip(*((part.key, part.sums) for part in parts), strict=True)
        return cls(np.concatenate(keys), np.concatenate(sums, axis=1))

    def taken(self, places: IntArray) -> Buckets:
        return Buckets(self.key.take(places), self.sums.take(places, axis=1))

    def ordered(self) -> Buckets:
        """Return those of one sketch in the order of their places: by digits, as that is fastest."""
        low = (self.key >> _KIND_BITS).astype(np.uint16)
        high = (self.key >> _KIND_BITS + FINEST).astype(np.uint16)
        order = np.argsort(low, kind="stable")
        return self.taken(order.take(np.argsort(high.take(order), kind="stable")))

    def moved(self, rows: int | IntArray) -> Buckets:
        """Return the same in other rows: so many further."""
        return replace(self, key=self.key + (rows << ROW_BITS))

    # -- Where they are

    @property
    def row(self) -> IntArray:
        """The sketch that each belongs to."""
        return self.key >> ROW_BITS

    @property
    def index(self) -> IntArray:
        """Its place: `index >> 16` is the octave."""
        return (self.key >> _KIND_BITS & _PLACES) - _ABOVE

    @property
    def m(self) -> IntArray:
        """Its resolution."""
        return (self.key >> _CUT_BITS & (1 << _KIND_BITS - _CUT_BITS) - 1) - _LOWEST

    @property
    def cut(self) -> BoolArray:
        """Whether its octave is coarser than its values came."""
        found: BoolArray = (self.key & 1).astype(np.bool_)
        return found

    @property
    def edge(self) -> IntArray:
        """The lower edge of the magnitudes, counted in the finest buckets."""
        index = self.index
        return index ^ (index >> 63)

    @property
    def origins(self) -> FloatArray:
        """The magnitude at u = 0."""
        return np.where(self.m < 0, 0.0, from_bits(self.edge << _SHIFT))

    @property
    def units(self) -> IntArray:
        """The magnitude at u = 1 is 2^unit more."""
        field, m = self.edge >> FINEST, self.m
        # Subnormal numbers share the lowest exponent. A group of octaves is measured from 0.
        inside = np.maximum(field, 1) - m
        return np.where(m < 0, field + (1 << -np.minimum(m, 0)), inside) - BIAS

    @property
    def bounds(self) -> tuple[FloatArray, FloatArray]:
        """The least and the greatest magnitude, other than 0, that belongs to each bucket."""
        edge = self.edge
        end = np.minimum(edge + (1 << (FINEST - self.m)), FIELDS << FINEST)
        return from_bits(np.maximum(edge << _SHIFT, 1)), from_bits((end << _SHIFT) - 1)

    @property
    def distance(self) -> IntArray:
        """How many octaves each is away from 1: 0 from 1/2 to 2."""
        exponent = (self.edge >> FINEST) - BIAS
        return exponent ^ (exponent >> 63)

    def octaves(self) -> IntArray:
        """Return the place of the first bucket of each octave."""
        return _new(self.key >> _KIND_BITS + FINEST).nonzero()[0]

    def faulty(self, finest: IntArray) -> BoolArray:
        """Return which are no bucket of a sketch, or stand where they cannot.

        Args:
            finest: the largest resolution that each sketch may have, shape (rows,).
        """
        m, edge = self.m, self.edge
        wrong = (m < COARSEST) | (m > finest[self.row]) | (edge >= FIELDS << FINEST)
        wrong |= (edge & ((1 << (FINEST - np.clip(m, COARSEST, FINEST))) - 1)) != 0
        place, kind = self.key >> _KIND_BITS, self.key & _KINDS
        octave, row = place >> FINEST, self.key >> ROW_BITS
        grouped = (m[1:] < 0) | (m[:-1] < 0)
        together = (octave[1:] == octave[:-1]) | (grouped & (row[1:] == row[:-1]))
        wrong[1:] |= (place[1:] <= place[:-1]) | (together & (kind[1:] != kind[:-1]))
        return wrong

    # -- How they become fewer

    def at(self, m: IntArray) -> Buckets:
        """Return the same contents in the coarser buckets that hold them, not yet joined."""
        index, now = self.index, self.m
        m = np.minimum(m, now)
        if (m == now).all():
            return self
        shift = FINEST - m
        sign = index >> 63
        inside = (index ^ sign) & ((np.int64(1) << shift) - 1)
        back = (inside ^ sign) - sign
        to = Buckets(self.key - (back << _KIND_BITS) + (m - now << _CUT_BITS), self.sums)
        # u in the coarser bucket is start + scale * u.
        if m.min() < 0:
            old, new = self.units, to.units
            start = np.ldexp(self.origins - to.origins, -new.astype(np.int32))
            scale = np.ldexp(1.0, (old - new).astype(np.int32))
        else:
            start = inside * _HALVINGS.take(shift)
            scale = _HALVINGS.take(now - m)
        count, first, second = self.sums
        started, scaled = start * count, scale * first
        square = start * (started + 2.0 * scaled) + scale * (scale * second)
        return Buckets(to.key, np.stack([count, started + scaled, square]))

    def joined(self, upper: BoolArray | None = None) -> Buckets:
        """Return each bucket once; what is in it is added up one after the other, on every machine.

        Args:
            upper: which belong to the second of two rows of sketches. Each side is added up by itself,
                so that it does not matter which is the first.
        """
        new = _new(self.key >> _KIND_BITS)
        starts = new.nonzero()[0]
        if starts.size == new.size:
            return self
        group, sides = new.cumsum() - 1, 1
        if upper is not None:
            group, sides = 2 * group + upper, 2
        sums = np.empty((MOMENTS, starts.size))
        for total, moment in zip(sums, self.sums, strict=True):
            added = np.bincount(group, moment, minlength=sides * starts.size)
            total[:] = added if upper is None else added[::2] + added[1::2]
        return Buckets(self.key[starts], sums)


def united(
    one: Buckets, other: Buckets, finest: IntArray, reach: IntArray, most: int
) -> tuple[Buckets, IntArray]:
    """Return what two rows of sketches hold together, sketch by sketch, and how far they reach.

    The same whichever is `one`: to the last bit. Either may hold a bucket twice.

    Args:
        one: of the first row, or of values in ascending order.
        other: of the second row, or of values in ascending order.
        finest: the largest resolution that each sketch may have, shape (rows,).
        reach: how far both reach, shape (rows,).
        most: how many buckets each may have.
    """
    if not (one.key.size and other.key.size):
        both, upper = one if one.key.size else other, None
    else:
        both = Buckets.of_all([one, other])
        # By their places alone: of two that are in one, ours are first.
        order = np.argsort(both.key >> _KIND_BITS, kind="stable")
        both, upper = both.taken(order), order >= one.key.size
    if not both.key.size:
        return both, reach
    first = both.octaves()
    sizes = np.diff(first, append=both.key.size)
    m, cut, reach = _resolutions(both, first, sizes, finest, reach, most)
    settled = Buckets(both.key | np.repeat(cut, sizes), both.sums)
    return settled.at(np.repeat(m, sizes)).joined(upper), reach


def _resolutions(
    buckets: Buckets,
    first: IntArray,
    sizes: IntArray,
    finest: IntArray,
    reach: IntArray,
    most: int,
) -> tuple[IntArray, BoolArray, IntArray]:
    """Return how fine each octave is to be, whether it is cut then, and how far sketches reach."""
    octaves = buckets.taken(first)
    row, distance = octaves.row, octaves.distance
    kinds = buckets.key & _KINDS
    largest = np.maximum.reduceat(kinds, first)
    # What shares an octave comes to the coarsest resolution in it.
    m = (np.minimum.reduceat(kinds, first) >> _CUT_BITS) - _LOWEST
    m = np.minimum(m, finest[row])
    cut = (m < (largest >> _CUT_BITS) - _LOWEST) | (largest & 1 == 1)

    occupied = _occupied(buckets.key >> _KIND_BITS, sizes)
    now = occupied[np.arange(first.size), np.maximum(m, 0)]
    charged = np.where(cut, most, now)  # one that is cut takes its share, whatever is occupied now
    share = _shares(row, charged, reach.size, most)
    short = ((share < _LEAST_SHARE) | (reach < FARTHEST)).nonzero()[0]
    if short.size:
        share[short] = _LEAST_SHARE
        reach = reach.copy()
        for each in short.tolist():
            here = row == each
            within = _reach(np.minimum(charged[here], _LEAST_SHARE), distance[here], most)
            reach[each] = min(int(reach[each]), within)
    limit = np.where(distance > reach[row], 1, share[row])
    # What is grouped once has had more octaves than buckets, and stays so.
    grouped = np.bincount(row, minlength=reach.size) > most
    grouped[row[m < 0]] = True
    over = (now > limit) | grouped[row]
    inside = (occupied[:, 1:] <= limit[:, np.newaxis]).sum(axis=1)
    m = np.where(over, np.minimum(m, inside), m)
    for each in grouped.nonzero()[0].tolist():
        here = row == each
        m[here] = _group_size(octaves.index[here] >> FINEST, int(m[here].min()), most)
    return m, cut | over, reach


def _occupied(place: IntArray, sizes: IntArray) -> IntArray:
    """Return how many buckets of each octave are occupied at m = 0..16, given all that are, in order."""
    # Neighbours that differ first in bit b of their places are two buckets where 16 - m <= b.
    bit = ((place[1:] ^ place[:-1]).astype(np.float64).view(np.int64) >> FRACTION_BITS) - BIAS
    octave = np.repeat(np.arange(sizes.size), sizes)[1:]
    inside = ((bit >= 0) & (bit < FINEST)).nonzero()[0]  # others: the same place, another octave
    split = np.bincount(
        octave[inside] * FINEST + (FINEST - bit[inside] - 1), minlength=sizes.size * FINEST
    )
    found = np.ones((sizes.size, FINEST + 1), dtype=np.int64)
    found[:, 1:] += split.reshape(-1, FINEST).cumsum(axis=1)
    return found


def _shares(row: IntArray, charged: IntArray, rows: int, most: int) -> IntArray:
    """Return the largest share that each sketch has the buckets for; 0 if it has none.

    Args:
        row: the sketch of each octave, ascending.
        charged: what it takes of a share that is as large.
        rows: how many sketches there are.
        most: how many buckets each may have.
    """
    # If all octaves but the k largest have what they can take, a k-th of the rest is left for each of
    # these. No k gives more than the share, and one gives the share.
    taken = charged[np.lexsort((charged, row))]
    held = np.bincount(row, minlength=rows)
    begin = held.cumsum() - held
    before = taken.cumsum() - taken
    before -= before[begin[row]]
    left = (begin + held)[row] - np.arange(row.size)
    share, some = np.full(rows, most), begin[held > 0]
    needed = np.add.reduceat(taken, some)
    largest = np.maximum.reduceat((most - before) // left, some)
    share[held > 0] = np.where(needed <= most, most, largest)
    return share


def _reach(charged: IntArray, distance: IntArray, most: int) -> int:
    """Return how far octaves of a sketch may be for the least share; those beyond take 1."""
    through = np.bincount(distance, charged - 1, minlength=FARTHEST + 1).cumsum()
    return int(through.searchsorted(most - charged.size, side="right")) - 1


def _group_size(octave: IntArray, m: int, most: int) -> int:
    """Return the m, no larger than given, at which neighbouring octaves make `most` groups or fewer."""
    m = min(m, -1)
    while np.count_nonzero(_new(octave >> -m)) > most:
        m -= 1
    return m


def _new(numbers: IntArray) -> BoolArray:
    """Return where another number begins."""
    new = np.ones(numbers.size, dtype=np.bool_)
    np.not_equal(numbers[1:], numbers[:-1], out=new[1:])
    return new
