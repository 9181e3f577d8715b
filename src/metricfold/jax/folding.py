"""How the values of one update become additions to an accumulator's lanes and cells.

Metrics whose values have one shape are folded together: what is to be added up of them are columns of one
array of integers, and what is to be compared columns of another, so that a compiler sees two reductions for
all of them, and the DISTRIBUTIONs' cells on top.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import chain
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from metricfold._core.device.rows import CELLS, EXTREMA, FRACTION_BITS, SUMS, ZERO_CELL, Layout, M
from metricfold.jax.exact_sums import (
    Limbs,
    Segments,
    add_pairs,
    exact_product,
    exact_sum,
    exponents,
    magnitudes,
    pairs_of_counts,
)
from metricfold.jax.lanes import LOWEST, NOTHING, Lanes, floats, words
from metricfold.jax.ordering import to_sortable
from metricfold.metric import AggregationType

__all__ = ["CELL_SUMS", "REFUSED", "Batch", "Numbers"]

_SMALLEST = np.float32(np.finfo(np.float32).tiny)
_HEAVIEST = np.float32(2.0**63)
"""Of heavier weights a float32 does not hold the square."""
_MAGNITUDE = np.int32(0x7FFF_FFFF)
_FRACTION = np.int32((1 << FRACTION_BITS) - 1)
_SUM_LANES = {
    AggregationType.SUM: 1,
    AggregationType.MEAN: 2,
    AggregationType.DISTRIBUTION: 3,
}
"""How many of the SUM lanes each aggregation uses."""
_EXTREMA = {
    AggregationType.MAX: (0,),
    AggregationType.MIN: (1,),
    AggregationType.DISTRIBUTION: (0, 1),
}
"""Which of the largest x and the largest -x each aggregation uses."""
REFUSED = 3
"""Reasons why a value is left out: its dataset, its weight, more bits than are held."""
NONE = -1
"""The place of a column that is not there."""
CELL_SUMS = 4
"""Sums of a cell: of w, of w·k, and of w·k² divided by 2^17, whole and rest.

k is the place in the bucket, an integer of 17 bits. So of values without weights all sums are integers
that a pair holds exactly, however alike the values are; k² as one number would be rounded.
"""


@dataclass(frozen=True)
class Numbers:
    """The values of one metric, flat.

    Args:
        parts: float32 that add up to the values, shape (n,) each, the first the value rounded: two
            where a value has more bits than a float32.
        whole: whether they are integers, none of which is NaN or infinite.
        held: which values the parts add up to exactly; None for all.
    """

    parts: tuple[jax.Array, ...]
    whole: bool = False
    held: jax.Array | None = None

    @classmethod
    def of(cls, arrays: Sequence[jax.Array]) -> Numbers:
        """Return the numbers that one array holds, or several float32 that add up to them."""
        values, *rest = (array.reshape(-1) for array in arrays)
        dtype = values.dtype
        if rest:
            return cls((values, *rest))
        if dtype == jnp.float64:
            return cls(_pair(values))
        if jnp.issubdtype(dtype, jnp.floating):
            return cls((values.astype(jnp.float32),))
        if dtype == jnp.bool_:
            return cls((values.astype(jnp.float32),), whole=True)
        bits = jnp.iinfo(dtype).bits
        if bits < 32:
            return cls((values.astype(jnp.float32),), whole=True)
        if bits == 32:
            high = (values >> 16).astype(jnp.float32) * np.float32(1 << 16)
            return cls(exact_sum(high, (values & 0xFFFF).astype(jnp.float32)), whole=True)
        wide = values.astype(jnp.float64)  # which is there where int64 is
        high, low = _pair(wide)
        there = high.astype(jnp.float64) + low.astype(jnp.float64)
        most = np.float64(2.0 ** (bits - jnp.issubdtype(dtype, jnp.signedinteger)))
        held = (there.astype(dtype) == values) & (there < most)
        return cls((high, low), whole=True, held=held)

    @property
    def values(self) -> jax.Array:
        return self.parts[0]


def _pair(wide: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return two float32 that add up to float64, as far as they can."""
    high = wide.astype(jnp.float32)
    low = (wide - high.astype(wide.dtype)).astype(jnp.float32)
    return high, jnp.where(jnp.isfinite(high), low, 0)


class _Columns:
    """Columns of one array, shape (n, columns), to which several metrics contribute."""

    def __init__(self) -> None:
        self._columns: list[jax.Array] = []

    def place(self, column: jax.Array) -> int:
        """Take in a column, shape (n,), and return its place; one that is there already keeps its."""
        for place, known in enumerate(self._columns):
            if known is column:
                return place
        self._columns.append(column)
        return len(self._columns) - 1

    def array(self, size: int, dtype: Any) -> jax.Array:
        if not self._columns:
            return jnp.zeros((size, 0), dtype)
        return jnp.stack([column.astype(dtype) for column in self._columns], axis=-1)


def _picked(found: jax.Array, places: Any, nothing: Any) -> jax.Array:
    """Return, from columns, shape (d, columns, ...), those at `places`; `nothing` for `NONE`."""
    absent = jnp.full((found.shape[0], 1, *found.shape[2:]), nothing, found.dtype)
    return jnp.concatenate([found, absent], axis=1)[:, np.asarray(places)]


class Batch:
    """Values of one shape, by name, of metrics that share weights, None if all are 1, and where they go.

    `indices` say of each value which dataset it is of, if there are several, and which cell along each
    axis: integers, and how many there are; the last one is the fastest.
    """

    def __init__(
        self,
        layout: Layout,
        numbers: Mapping[str, Numbers],
        weights: Numbers | None,
        indices: Sequence[tuple[jax.Array, int]],
    ) -> None:
        self._layout = layout
        self._numbers = list(numbers.values())
        self.places = [layout.place(name) for name in numbers]
        self._types = [layout.types[place] for place in self.places]
        self._size = self._numbers[0].values.size
        self._number = math.prod(number for _, number in indices)
        # Fewer bits may not hold the number of datasets.
        indices = [
            (index.astype(jnp.int32) if jnp.iinfo(index.dtype).bits < 32 else index, number)
            for index, number in indices
        ]
        kept = jnp.ones(self._size, bool)
        for index, number in indices:
            kept &= (index >= 0) & (index < number)
        places = jnp.zeros(self._size, jnp.int32)
        for index, number in indices:
            places = places * number + jnp.where(kept, index, 0).astype(jnp.int32)
        strange, unweighable = ~kept, jnp.zeros(self._size, bool)
        self._weights = None
        if weights is not None:
            w = weights.values
            valid = (w >= 0) & (w <= _HEAVIEST)
            if weights.whole and len(weights.parts) > 1:
                valid &= weights.parts[1] == 0  # others are no float32
            strange &= w != 0  # padding may have any id
            unweighable = kept & ~valid
            kept &= valid & (w > 0)
            self._weights = jnp.where(kept, w, 0)
        self._kept, self._strange, self._unweighable = kept, strange, unweighable
        self._segments = Segments(jnp.where(kept, places, self._number), self._number)

    def _kept_of(self, numbers: Numbers) -> jax.Array:
        return self._kept if numbers.held is None else self._kept & numbers.held

    def refused(self) -> jax.Array:
        """Return how many values of each metric were left out, and why, shape (metrics, 3)."""
        shared = [_count(self._strange), _count(self._unweighable)]
        unheld = [
            jnp.int32(0) if numbers.held is None else _count(self._kept & ~numbers.held)
            for numbers in self._numbers
        ]
        return jnp.stack([jnp.stack([*shared, count]) for count in unheld])

    def fold(self) -> Lanes:
        """Return what these values come to, in rows of shape (rows of a metric, metrics, ...)."""
        flags, terms, ends = _Columns(), _Columns(), _Columns()
        counts, sums, extrema = [], [], []
        for agg_type, numbers in zip(self._types, self._numbers, strict=True):
            x = numbers.values
            kept = self._kept_of(numbers)
            seen, finite, count = kept, kept, [flags.place(kept), NONE, NONE, NONE]
            if not numbers.whole:
                nan = jnp.isnan(x)
                seen, finite = kept & ~nan, kept & jnp.isfinite(x)
                special = (nan, x == np.inf, x == -np.inf)
                count[1:] = (flags.place(kept & flag) for flag in special)
            counts.append(count)
            parts = numbers.parts
            if agg_type is AggregationType.DISTRIBUTION:
                parts, seen = (_normal(x),), finite
            sums.append(self._terms(terms, agg_type, parts, seen, finite))
            extrema.append(_ends(ends, agg_type, parts, seen))
        limbs = Limbs(self._size, 36)
        of_terms = terms.array(self._size, jnp.float32)
        number = of_terms.shape[1]
        compared = [magnitudes(of_terms), ends.array(self._size, jnp.int32)]
        largest = self._segments.largest(jnp.concatenate(compared, axis=1))
        exponent = exponents(largest[:, :number])
        cut = limbs.of(of_terms, self._segments.spread(exponent)).reshape(self._size, -1)
        of_flags = flags.array(self._size, jnp.int32)
        total = self._segments.total(jnp.concatenate([of_flags, cut], axis=1))
        counted, added = jnp.split(total, [of_flags.shape[1]], axis=1)
        pairs = limbs.pairs(added.reshape(self._number, number, limbs.count), exponent)
        found = _picked(counted, counts, 0)
        compared_to = self._extrema(largest[:, number:], extrema)
        return Lanes(found, self._sums(pairs, sums, found), compared_to)

    def _terms(
        self,
        terms: _Columns,
        agg_type: AggregationType,
        parts: Sequence[jax.Array],
        seen: jax.Array,
        finite: jax.Array,
    ) -> list[list[int]]:
        """Enter what is to be added up; returns the places for each of the sums."""
        lanes = _SUM_LANES.get(agg_type, 0)
        places: list[list[int]] = [[], [], []]
        if not lanes:
            return places
        w = self._weights if lanes > 1 else None
        if w is not None:
            parts = [half for part in parts for half in exact_product(w, part)]
            for lane, factor in enumerate((w, w * w)[: lanes - 1], 1):
                places[lane] = [terms.place(jnp.where(seen, factor, 0))]
        places[0] = [terms.place(jnp.where(finite, part, 0)) for part in parts]
        return places

    def _sums(
        self, pairs: jax.Array, places: Sequence[Sequence[Sequence[int]]], counts: jax.Array
    ) -> jax.Array:
        """Return the sums, shape (rows, metrics, 3, 2), from what their parts come to."""
        most = max(len(parts) for lanes in places for parts in lanes)
        if not most:
            return jnp.zeros((self._number, len(places), SUMS, 2), jnp.float32)
        by_part = np.full((most, len(places), SUMS), NONE)
        for metric, lanes in enumerate(places):
            for lane, parts in enumerate(lanes):
                by_part[: len(parts), metric, lane] = parts
        picked = [_picked(pairs, one, 0) for one in by_part]
        sums = reduce(add_pairs, picked)
        if self._weights is not None:
            return sums
        # Without weights those of w and w² are counts.
        finite = np.array([agg_type is AggregationType.DISTRIBUTION for agg_type in self._types])
        left_out = counts[..., 1] + jnp.where(finite, counts[..., 2] + counts[..., 3], 0)
        weighs = pairs_of_counts(counts[..., 0] - left_out)
        used = np.array([[_SUM_LANES.get(t, 0) > lane for lane in (1, 2)] for t in self._types])
        weighs = jnp.where(used[..., None], weighs[..., None, :], 0)
        return jnp.concatenate([sums[..., :1, :], weighs], axis=-2)

    def _extrema(self, largest: jax.Array, ends: Sequence[Sequence[_End]]) -> jax.Array | None:
        """Return the extrema, shape (rows, metrics, 2, 2), if anything was compared."""
        if not largest.shape[1]:
            return None
        largest = jnp.maximum(largest, NOTHING)
        high = _picked(largest, [[end.place for end in pair] for pair in ends], NOTHING)
        lower = _Columns()
        places = np.full((len(ends), EXTREMA), NONE)
        for place, end in zip(np.ndindex(places.shape), chain(*ends), strict=True):
            if end.low is not None:
                highest = self._segments.spread(largest[:, end.place])
                places[place] = lower.place(jnp.where(end.high == highest, end.low, LOWEST))
        if (places == NONE).all():
            return jnp.stack([high, jnp.zeros_like(high)], axis=-1)
        low = self._segments.largest(lower.array(self._size, jnp.int32))
        found = jnp.where(high == NOTHING, 0, _picked(low, places, 0))
        return jnp.stack([high, found], axis=-1)

    def into_grid(self, grid: jax.Array) -> jax.Array:
        """Return the cells of all DISTRIBUTIONs with these values in them.

        It touches only the cells that they fall into: an update costs what the batch is, not the grid.
        """
        taken = [
            (self._layout.distributions.index(self._layout.names[place]), numbers)
            for place, numbers in zip(self.places, self._numbers, strict=True)
            if self._layout.types[place] is AggregationType.DISTRIBUTION
        ]
        if not taken:
            return grid
        x = jnp.stack([_normal(numbers.values) for _, numbers in taken])
        starts = np.array([[place] for place, _ in taken], np.int32) * (self._number * CELLS)
        bits = words(x)
        magnitude = bits & _MAGNITUDE
        zero = magnitude < (1 << 23)
        bucket = (magnitude >> FRACTION_BITS) - (1 << M)
        cell = jnp.where(bits < 0, ZERO_CELL - 1 - bucket, ZERO_CELL + 1 + bucket)
        cell = jnp.where(zero, ZERO_CELL, cell)
        kept = jnp.stack([self._kept_of(numbers) for _, numbers in taken]) & jnp.isfinite(x)
        nowhere = grid.shape[0]
        cell = jnp.where(kept, starts + self._segments.places[None] * CELLS + cell, nowhere)
        k = jnp.where(kept & ~zero, magnitude & _FRACTION, 0)
        # Values of one cell side by side: each cell is then read and written once.
        columns = [cell.reshape(-1), k.reshape(-1)]
        if self._weights is not None:
            columns.append(jnp.where(kept, self._weights[None], 0).reshape(-1))
        cell, k, *weights = lax.sort(tuple(columns), num_keys=1)
        size = cell.size
        begins = jnp.concatenate([jnp.zeros(1, bool), cell[1:] != cell[:-1]])
        segments = Segments(jnp.cumsum(begins, dtype=jnp.int32), size, ascending=True)
        new = _cell_sums(segments, k, weights[0] if weights else None)
        cells = jnp.full(size, nowhere, jnp.int32)
        cells = cells.at[segments.places].min(cell, indices_are_sorted=True)
        old = floats(grid.at[cells].get(mode="fill", fill_value=0))
        return grid.at[cells].set(words(add_pairs(old, new)), mode="drop")


class _End(NamedTuple):
    """What is to be compared for an extremum: integers that sort like the values, if any."""

    place: int = NONE
    high: jax.Array | None = None
    low: jax.Array | None = None


def _ends(
    ends: _Columns, agg_type: AggregationType, parts: Sequence[jax.Array], seen: jax.Array
) -> list[_End]:
    found = [_End()] * EXTREMA
    for which in _EXTREMA.get(agg_type, ()):
        signed = [-part for part in parts] if which else parts
        high = jnp.where(seen, to_sortable(signed[0]), NOTHING)
        low = to_sortable(signed[1]) if len(signed) > 1 else None
        found[which] = _End(ends.place(high), high, low)
    return found


def _cell_sums(segments: Segments, k: jax.Array, weights: jax.Array | None) -> jax.Array:
    """Return the sums of each segment, which is a cell, as pairs, shape (n, CELL_SUMS, 2)."""
    a, b = k >> 9, k & 0x1FF
    middle = 2 * a * b
    low = ((middle & 0xFF) << 9) + b * b
    whole = 2 * a * a + (middle >> 8) + (low >> FRACTION_BITS)
    factors = [column.astype(jnp.float32) for column in (k, whole, low & _FRACTION)]
    limbs = Limbs(k.size, 36)
    if weights is None:
        terms = jnp.stack([jnp.ones_like(factors[0]), *factors], axis=-1)
        exponent = jnp.full((k.size, CELL_SUMS), FRACTION_BITS + 1, jnp.int32)
        return limbs.pairs(segments.total(limbs.of(terms, exponent)), exponent)
    products = [exact_product(weights, factor) for factor in factors]
    terms = jnp.stack(
        [weights, *(high for high, _ in products), *(rest for _, rest in products)], axis=-1
    )
    exponent = exponents(segments.largest(magnitudes(terms)))
    cut = limbs.of(terms, segments.spread(exponent))
    pairs = limbs.pairs(segments.total(cut), exponent)
    rest = jnp.pad(pairs[:, CELL_SUMS:], ((0, 0), (1, 0), (0, 0)))
    return add_pairs(pairs[:, :CELL_SUMS], rest)


def _normal(values: jax.Array) -> jax.Array:
    """Return values of which the subnormal ones, which a histogram takes for 0, are 0."""
    return jnp.where(jnp.abs(values) < _SMALLEST, np.float32(0), values)


def _count(flags: jax.Array) -> jax.Array:
    return flags.sum(dtype=jnp.int32)
