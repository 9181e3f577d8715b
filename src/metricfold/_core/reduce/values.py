"""How the values of DISTRIBUTIONs travel: each rank's own side by side, or joined on the way.

Side by side (`Windows`), a rank sends its window: how many values, how many of them belong to the
open interval, the values, their weights, and, if it was ever needed, a sketch. Nothing is merged
until somebody asks.

On the way (`Pools`), each key has a place for each view, of one size: points stay points while those
of both sides fit into it, and are a sketch beyond. Where nothing is older than the interval, and
nothing of it beyond the window, the recent values are those of the interval, and are merged once.

    [ how many points | the points (and their weights) ]
    [ -1 | the slot of a sketch ]
    [ -2 | nothing: what is in the interval's place ]
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from metricfold._core import sketch as sketches  # what is in it loads when it is first needed
from metricfold._core.fold.names import Key, show
from metricfold._core.fold.sample import MOST_SAVED, FloatArray, Pool, Window
from metricfold._core.reduce.schema import Entry, IndexArray, Schema
from metricfold._core.sketch.weights import countable, weighable

__all__ = ["Pools", "Recent", "Values", "Windows"]

BoolArray = npt.NDArray[np.bool_]

_NOTHING = Window()


class Recent:
    """The values of DISTRIBUTIONs, as one reduction brought them; merged when asked for.

    Args:
        values: know where each stands.
        rows: everyone's, or what they came to, as a row; shape (k, values.width).
    """

    def __init__(self, values: Values, rows: FloatArray) -> None:
        self._values, self._rows = values, rows
        self._sketched: dict[tuple[Key, bool], Pool] = {}

    def interval(self, key: Key) -> Pool:
        """Return what came in during the open interval."""
        return self._pool(key, of_interval=True)

    def recent(self, key: Key) -> Pool:
        """Return each rank's most recent values."""
        return self._pool(key, of_interval=False)

    def windows(self, key: Key) -> list[Window]:
        """Return what a checkpoint keeps: most recent values, and those of the open interval."""
        return self._values.windows(self._rows, key)

    def _pool(self, key: Key, *, of_interval: bool) -> Pool:
        known = self._sketched.get((key, of_interval))
        if known is None:
            known = self._values.pool(self._rows, key, of_interval=of_interval)
            # Exact values are soon put side by side again, and would be held as long as this is.
            if known.histogram is not None:
                self._sketched[key, of_interval] = known
        return known


class Values(ABC):
    """Where the values of DISTRIBUTIONs stand in a vector, and what becomes of them.

    Attributes:
        width: numbers that each rank sends.
    """

    width: int

    @abstractmethod
    def pack(self, vector: FloatArray, windows: Mapping[Key, Window]) -> None:
        """Write what a rank holds into `vector`, of zeros."""

    def join(self, lower: FloatArray, upper: FloatArray, out: FloatArray) -> None:  # noqa: B027
        """Write what each two rows hold together into `out`; nothing where all rows arrive."""

    @abstractmethod
    def wrong(self, rows: FloatArray) -> BoolArray:
        """Return which rows, shape (k, width), have what no ranks' values come to."""

    @abstractmethod
    def pool(self, rows: FloatArray, key: Key, *, of_interval: bool) -> Pool:
        """Return all ranks' values of a view, out of rows that are not wrong."""

    @abstractmethod
    def windows(self, rows: FloatArray, key: Key) -> list[Window]:
        """Return what a checkpoint keeps of them."""


# -- Side by side ----------------------------------------------------------------------------------

_SIZE, _FRESH, _COUNTS = 0, 1, 2


class Windows(Values):
    """Each rank's window, as it is."""

    def __init__(self, schema: Schema) -> None:
        self._entries = schema.entries
        self._places: dict[Key, slice] = {}
        self.width = 0
        for entry in schema.distributions:
            end = self.width + _window_width(entry)
            self._places[entry.key], self.width = slice(self.width, end), end

    def pack(self, vector: FloatArray, windows: Mapping[Key, Window]) -> None:
        for key, window in windows.items():
            place, entry, size = vector[self._places[key]], self._entries[key], window.values.size
            place[_SIZE], place[_FRESH] = size, window.fresh
            place[_COUNTS : _COUNTS + size] = window.values
            if entry.weighted:
                start = _COUNTS + entry.capacity
                place[start : start + size] = 1.0 if window.weights is None else window.weights
            if window.older is not None:
                place[-sketches.slot_width() :] = sketches.pack(window.older)

    def wrong(self, rows: FloatArray) -> BoolArray:
        if not self.width:
            return np.zeros(len(rows), dtype=np.bool_)
        bad = np.asarray(~np.isfinite(rows).all(axis=1))
        heads = rows[:, self._heads]
        sizes, fresh = heads[:, 0], heads[:, 1]
        bad |= ~(countable(sizes) & countable(fresh)).all(axis=1)
        bad |= ((sizes > self._capacities) | (fresh > sizes)).any(axis=1)
        for key, place in self._places.items():
            entry = self._entries[key]
            if entry.weighted:
                start = place.start + _COUNTS + entry.capacity
                weights = rows[:, start : start + entry.capacity]
                given = np.arange(entry.capacity) < rows[:, place.start, np.newaxis]
                bad |= (given & ~weighable(weights)).any(axis=1)
            if entry.condensed:
                bad |= ~sketches.fitting(rows[:, place.stop - sketches.slot_width() : place.stop])
        return bad

    @cached_property
    def _heads(self) -> IndexArray:
        """Where sizes stand, and how many values are fresh; shape (2, n)."""
        starts = [place.start for place in self._places.values() if place.stop > place.start]
        return np.add.outer([_SIZE, _FRESH], np.array(starts, dtype=np.intp))

    @cached_property
    def _capacities(self) -> IndexArray:
        found = [self._entries[key].capacity for key in self._places]
        return np.array([capacity for capacity in found if capacity], dtype=np.intp)

    def pool(self, rows: FloatArray, key: Key, *, of_interval: bool) -> Pool:
        entry = self._entries[key]
        if not entry.capacity or entry.weighted or entry.condensed:
            windows = self.windows(rows, key)
            return Pool.joined([w.interval() if of_interval else w.recent() for w in windows])
        places, which = rows[:, self._places[key]], _FRESH if of_interval else _SIZE
        if entry.bounded and (places[:, which] == entry.capacity).all():
            return Pool(places[:, _COUNTS:])
        ends = _COUNTS + places[:, _SIZE].astype(np.intp)
        starts = ends - places[:, which].astype(np.intp)
        slices = map(slice, starts.tolist(), ends.tolist())
        return Pool(np.concatenate([row[one] for row, one in zip(places, slices, strict=True)]))

    def windows(self, rows: FloatArray, key: Key) -> list[Window]:
        found = []
        for rank, row in enumerate(rows):
            try:
                found.append(self._window(row, key))
            except ValueError as error:
                raise RuntimeError(
                    f"rank {rank} sent values of {show(key)} that no rank sends: {error}. Look after "
                    "that rank's machine"
                ) from None
        return found

    def _window(self, row: FloatArray, key: Key) -> Window:
        """Return what one rank holds of a DISTRIBUTION, out of its row."""
        entry = self._entries[key]
        if not entry.capacity:
            return _NOTHING
        place = row[self._places[key]]
        size, start = int(place[_SIZE]), _COUNTS + entry.capacity
        return Window(
            place[_COUNTS : _COUNTS + size],
            place[start : start + size] if entry.weighted else None,
            int(place[_FRESH]),
            sketches.unpack(place[-sketches.slot_width() :]) if entry.condensed else None,
        )


def _window_width(entry: Entry) -> int:
    if not entry.capacity:
        return 0
    exact = entry.capacity * (2 if entry.weighted else 1)
    return _COUNTS + exact + (sketches.slot_width() if entry.condensed else 0)


# -- Joined on the way -----------------------------------------------------------------------------

_SKETCH = -1.0
"""Stands for the number of points where there is a sketch."""
_SAME = -2.0
"""Stands for it in the place of recent values that are those of the interval."""
_SAME_OR_NOTHING = {_SAME, 0.0}


class _Place(NamedTuple):
    """One key's place for one view.

    Args:
        at: where it is.
        interval: where that of the interval is; the same for its own.
        room: for so many points.
        weighted: whether these have weights.
    """

    key: Key
    at: slice
    interval: slice
    room: int
    weighted: bool

    @property
    def of_interval(self) -> bool:
        return self.at == self.interval

    def of(self, row: FloatArray) -> FloatArray:
        """Return what is in the place, or what it stands for."""
        numbers = row[self.at]
        return row[self.interval] if numbers[0] == _SAME else numbers


class Pools(Values):
    """All ranks' values of each view, in places of one size.

    Args:
        schema: the agreed keys.
        world_size: number of ranks.
    """

    def __init__(self, schema: Schema, world_size: int) -> None:
        self._places = list(_laid_out(schema, world_size))
        self._place_of = {(place.key, place.of_interval): place for place in self._places}
        self.width = self._places[-1].at.stop if self._places else 0

    def pack(self, vector: FloatArray, windows: Mapping[Key, Window]) -> None:
        for place in self._places:
            window = windows.get(place.key)
            if window is None:
                continue
            if place.of_interval:
                _write(vector[place.at], place, window.interval())
            elif window.older is None and window.fresh == window.values.size:
                vector[place.at.start] = _SAME
            else:
                _write(vector[place.at], place, window.recent())

    def join(self, lower: FloatArray, upper: FloatArray, out: FloatArray) -> None:
        # NaN where a row holds what no rank sends: whoever looks at the end sees that.
        condensed: list[tuple[FloatArray, FloatArray, FloatArray]] = []
        for place in self._places:
            for row, other_row, out_row in zip(lower, upper, out, strict=True):
                start, both = place.at.start, out_row[place.at]
                if (
                    _SAME in (row[start], other_row[start])
                    and {row[start], other_row[start]} <= _SAME_OR_NOTHING
                ):
                    both[0], both[1:] = _SAME, 0.0
                    continue
                one, other = place.of(row), place.of(other_row)
                if not _readable(one, place) or not _readable(other, place):
                    both[:] = np.nan
                elif one[0] == 0.0 or other[0] == 0.0:
                    both[:] = other if one[0] == 0.0 else one
                elif min(one[0], other[0]) > 0.0 and one[0] + other[0] <= place.room:
                    both[:] = 0.0
                    _write(both, place, Pool.joined([_read(one, place), _read(other, place)]))
                else:
                    condensed.append((_slot(one, place), _slot(other, place), both))
        if condensed:
            lowers, uppers, places_ = zip(*condensed, strict=True)
            for slot, both in zip(
                sketches.joined(np.stack(lowers), np.stack(uppers)), places_, strict=True
            ):
                both[0], both[1 : 1 + slot.size], both[1 + slot.size :] = _SKETCH, slot, 0.0

    def wrong(self, rows: FloatArray) -> BoolArray:
        return np.array([not self._sound(row) for row in rows], dtype=np.bool_)

    def _sound(self, row: FloatArray) -> bool:
        found = [(place.of(row), place) for place in self._places]
        if not all(_readable(numbers, place) for numbers, place in found):
            return False
        slots = [_slot(numbers, place) for numbers, place in found if numbers[0] == _SKETCH]
        return not slots or bool(sketches.fitting(np.stack(slots)).all())

    def pool(self, rows: FloatArray, key: Key, *, of_interval: bool) -> Pool:
        place, (vector,) = self._place_of[key, of_interval], rows
        try:
            return _read(place.of(vector), place)
        except ValueError as error:
            raise RuntimeError(
                f"a rank sent values of {show(key)} that no rank sends: {error}. route='gather' names it"
            ) from None

    def windows(self, rows: FloatArray, key: Key) -> list[Window]:
        # Whoever loads them keeps some of the newest: whose they were is not known any more, so that
        # each age has to hold a part of all.
        recent, interval = (self.pool(rows, key, of_interval=which) for which in (False, True))
        if recent.histogram is not None:
            size = min(recent.count, MOST_SAVED)
            drawn = recent.summary((np.arange(size) + 0.5) / size)[-1]
            return [Window(_spread(drawn), None, 0, interval.condensed())]
        # The values of the open interval must not get fewer: what is a sketch goes on as one.
        points = interval.histogram is None
        fresh = _pairs_of(interval) if points else np.empty((0, 2))
        values = np.concatenate((_spread(_without(_pairs_of(recent), fresh)), _spread(fresh)))
        weights = None if recent.weights is None else np.ascontiguousarray(values[:, 1])
        older = None if points else interval.histogram
        return [Window(np.ascontiguousarray(values[:, 0]), weights, len(fresh), older)]


def _laid_out(schema: Schema, world_size: int) -> Iterator[_Place]:
    start = 0
    for entry in schema.distributions:
        each = 2 if entry.weighted else 1
        # Where the points of all ranks fit, there will never be a sketch.
        width = sketches.slot_width()
        if not entry.condensed:
            width = min(width, world_size * entry.capacity * each)
        interval = slice(start, start + 1 + width)
        for _ in range(2 if entry.bounded else 1):
            at = slice(start, start + 1 + width)
            yield _Place(entry.key, at, interval, width // each, entry.weighted)
            start = at.stop


def _write(numbers: FloatArray, place: _Place, pool: Pool) -> None:
    size = pool.values.size
    if pool.histogram is None and size <= place.room:
        numbers[0], numbers[1 : 1 + size] = size, pool.values
        if place.weighted:
            start = 1 + place.room
            numbers[start : start + size] = 1.0 if pool.weights is None else pool.weights
    else:
        numbers[0], numbers[1 : 1 + sketches.slot_width()] = (
            _SKETCH,
            sketches.pack(pool.condensed()),
        )


def _read(numbers: FloatArray, place: _Place) -> Pool:
    if numbers[0] == _SKETCH:
        return Pool(histogram=sketches.unpack(numbers[1 : 1 + sketches.slot_width()]))
    size, start = int(numbers[0]), 1 + place.room
    weights = numbers[start : start + size] if place.weighted else None
    return Pool(numbers[1 : 1 + size], weights)


def _slot(numbers: FloatArray, place: _Place) -> FloatArray:
    """Return what is in a place as a sketch's slot."""
    if numbers[0] == _SKETCH:
        return numbers[1 : 1 + sketches.slot_width()]
    return sketches.pack(_read(numbers, place).condensed())


def _readable(numbers: FloatArray, place: _Place) -> bool:
    """Return whether a place holds points as ranks send them, or may hold a sketch."""
    count = numbers[0]
    if count == _SKETCH:
        return numbers.size > sketches.slot_width()
    if not countable(count) or count > place.room:
        return False
    size, start = int(count), 1 + place.room
    if not np.isfinite(numbers[1 : 1 + size]).all():
        return False
    return not place.weighted or bool(weighable(numbers[start : start + size]).all())


_GOLDEN = 0.6180339887498949
"""Multiples of the golden ratio, modulo 1, are spread evenly wherever they are cut off."""


def _pairs_of(pool: Pool) -> FloatArray:
    """Return values and weights as rows, ascending, shape (n, 2)."""
    weights = np.ones(pool.values.size) if pool.weights is None else pool.weights
    return np.stack((pool.values, weights), axis=1)[np.lexsort((weights, pool.values))]


def _without(pairs: FloatArray, some: FloatArray) -> FloatArray:
    """Return `pairs` but for `some` of them, shapes (n, 2); of equal ones as many as remain."""
    left = Counter(map(tuple, some.tolist()))
    kept = []
    for pair in map(tuple, pairs.tolist()):
        if left[pair]:
            left[pair] -= 1
        else:
            kept.append(pair)
    return np.array(kept, dtype=np.float64).reshape(-1, 2)


def _spread(values: FloatArray) -> FloatArray:
    """Return ascending values in an order of which each stretch holds a part of all."""
    return values[np.argsort(np.argsort(np.arange(len(values)) * _GOLDEN % 1.0))]
