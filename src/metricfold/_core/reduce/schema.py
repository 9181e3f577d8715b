"""The schema: the keys that all ranks have agreed on, and how each of them travels.

The lanes of a key stand where the schema says, whichever route a reduction takes. All ranks hold the
same schema, because it only changes by an exchange that all take part in: a vector of another size
would abort the process. `README.md` in the folder `reduce` tells the whole protocol.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property, lru_cache
from itertools import chain, pairwise, repeat
from json.encoder import encode_basestring_ascii
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from metricfold._core.fold.axes import Axes, IndexArray, cells, described, moved, united
from metricfold._core.fold.kinds import Parts, parts_of
from metricfold._core.fold.names import Key
from metricfold._core.fold.sample import FloatArray, Window
from metricfold._core.fold.state import COUNT, NANS, OTHER, State

__all__ = ["Entry", "IndexArray", "Key", "Schema", "digest", "places"]

BoolArray = npt.NDArray[np.bool_]

_HASH_BITS = 2**52 - 1
_NOWHERE = np.empty(0, dtype=np.intp)


def digest(data: bytes) -> int:
    """Return 52 bits of a hash of `data`: a float64 holds them exactly."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 12


class Entry(NamedTuple):
    """How one key travels: its kind, and the room that all ranks have agreed on.

    Args:
        key: (dataset name, metric name).
        kind: what its states are made of (`fold.kinds`).
        suffixes: what may be appended to the name when it is printed. They travel, because what
            a key claims must not depend on who is asked.
        per_rank: whether each rank's lanes are wanted, however many ranks there are.
        drained: whether devices send it, as sketches; then it is about all values, whatever the
            window size.
        capacity: places for values of one rank; grows by doubling.
        weighted: whether those carry weights.
        condensed: whether a rank had more values than it keeps as they are.
        categories: each has a SUM lane of its own.
        most: how many categories there may be.
        full: whether there were more; they are counted as `OTHER`, which is then a category.
        axes: along which it has cells, each with lanes of its own.
    """

    key: Key
    kind: str
    suffixes: tuple[str, ...] = ("",)
    per_rank: bool = False
    drained: bool = False
    capacity: int = 0
    weighted: bool = False
    condensed: bool = False
    categories: tuple[str, ...] = ()
    most: int = 0
    full: bool = False
    axes: Axes = ()

    @property
    def type(self) -> str:
        return parts_of(self.kind).label

    @property
    def sums(self) -> int:
        """SUM lanes of a cell, without those of categories; 0 for a handler without lanes."""
        return parts_of(self.kind).sums

    @property
    def maxs(self) -> int:
        """MAX lanes of a cell."""
        return parts_of(self.kind).maxs

    @property
    def cells(self) -> int:
        return cells(self.axes)

    @property
    def distributed(self) -> bool:
        """Whether it is a DISTRIBUTION, whose values travel too."""
        return parts_of(self.kind).sample != ""

    @property
    def bounded(self) -> bool:
        """Whether the view of the run is about recent values only."""
        return parts_of(self.kind).sample == "recent"

    @property
    def latest(self) -> bool:
        return parts_of(self.kind).last

    @property
    def sum_width(self) -> int:
        return self.sums * self.cells + len(self.categories)

    @property
    def custom(self) -> bool:
        """Whether its handler has no lanes."""
        return self.sums == 0

    @property
    def lanes(self) -> str:
        """How messages speak of its lanes."""
        return f"{self.sums} SUM and {self.maxs} MAX lanes" if self.sums else "no lanes"

    def joined(self, other: Entry) -> Entry:
        """Return this entry with room for what `other` brings, as far as there may be room.

        Associative and commutative, but for which categories come first.
        """
        if self == other:
            return self
        joined = self._replace(
            per_rank=self.per_rank or other.per_rank,
            drained=self.drained or other.drained,
            capacity=max(self.capacity, other.capacity),
            weighted=self.weighted or other.weighted,
            condensed=self.condensed or other.condensed,
            most=min(self.most, other.most),
            full=self.full or other.full,
            axes=united(self.axes, other.axes),
        )
        return joined.with_categories(other.categories)

    def joins_on_devices(self, other: Entry) -> bool:
        """Return whether both are one DISTRIBUTION, of recent values here and of devices there."""
        return (
            (self.drained or other.drained)
            and self.bounded != other.bounded
            and parts_of(self.kind)._replace(sample="") == parts_of(other.kind)._replace(sample="")
        )

    def united(self, other: Entry) -> Entry:
        """Return this entry with room for all that `other` holds, however many categories.

        Associative and commutative. Whoever goes on from it has a bound of its own.
        """
        joined = self._replace(categories=()).joined(other._replace(categories=()))
        return joined._replace(categories=tuple(sorted({*self.categories, *other.categories})))

    def with_categories(self, categories: Iterable[str]) -> Entry:
        """Return the entry with more categories, the first ones, as many as there is room for."""
        known = set(self.categories)
        new = [category for category in categories if category not in known]
        if self.full:
            new = [category for category in new if category != OTHER]
        room = max(self.most - len(known - {OTHER} if self.full else known), 0)
        full = self.full or len(new) > room
        kept = known.union(new[:room], [OTHER] if full else [])
        return self._replace(categories=tuple(sorted(kept)), full=full)

    @property
    def described(self) -> str:
        """What the entry is, for messages that tell it from another."""
        if self.distributed:
            return f"{self.type!r} of {'recent' if self.bounded else 'all'} values"
        if self.axes:
            return f"{self.type!r} with the axes {described(self.axes)}"
        return f"{self.type!r} with {self.lanes}"

    def holds(self, window: Window) -> bool:
        return (
            window.values.size <= self.capacity > 0
            and (self.weighted or window.weights is None)
            and (self.condensed or window.older is None)
        )

    # As JSON, in which a name that is a `numpy.str_` reads like any other text.

    def to_json(self) -> str:
        """Return the entry as it travels: its fields by name, without those that are as usual."""
        dataset, name = map(encode_basestring_ascii, self.key)
        return f'{{"key":[{dataset},{name}]{_fields(self[1:])}'

    def digest(self) -> int:
        """Return a hash that tells it from others, and is that of the same entry after a journey."""
        return digest(self.to_json().encode())


@lru_cache(maxsize=256)
def _fields(values: tuple[Any, ...]) -> str:
    """Return how an entry goes on behind its key: thousands of keys are alike but for their names."""
    usual = Entry._field_defaults
    named = zip(Entry._fields[1:], values, strict=True)
    found = {name: one for name, one in named if one != usual.get(name)}
    return "," + json.dumps(found, separators=(",", ":"))[1:]


class Schema:
    """The ordered keys that all ranks have agreed on, and where each one's lanes stand.

    Attributes:
        entries: each key's entry, sorted by key.
        hash: the same for the same entries, however the schema has grown.
    """

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self.entries: dict[Key, Entry] = {
            entry.key: entry for entry in sorted(entries, key=attrgetter("key"))
        }
        self.hash = sum(entry.digest() for entry in self) & _HASH_BITS
        # Where lanes go of the keys that a rank holds: mostly the same as the last time.
        self._latest_held: tuple[tuple[Key, ...], IndexArray, IndexArray] = ((), _NOWHERE, _NOWHERE)

    def grown(self, changed: Iterable[Entry]) -> Schema:
        """Return the schema with these entries, of new keys or in the place of those it has."""
        entries, number = dict(self.entries), self.hash
        for entry in changed:
            known = entries.get(entry.key)
            number += entry.digest() - (0 if known is None else known.digest())
            entries[entry.key] = entry
        grown = Schema()
        grown.entries = {key: entries[key] for key in sorted(entries)}
        grown.hash = number & _HASH_BITS
        return grown

    def __contains__(self, key: Key) -> bool:
        return key in self.entries

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries.values())

    # What follows from the entries, each found when it is first asked for.

    @cached_property
    def sums(self) -> dict[Key, slice]:
        """Places of each key's SUM lanes."""
        return _slices(self.entries, self._ends[0])

    @cached_property
    def maxs(self) -> dict[Key, slice]:
        """Places of each key's MAX lanes."""
        return _slices(self.entries, self._ends[1])

    @cached_property
    def sum_width(self) -> int:
        return int(self._ends[0, -1])

    @cached_property
    def max_width(self) -> int:
        return int(self._ends[1, -1])

    @cached_property
    def _parts(self) -> list[Parts]:
        return [parts_of(entry.kind) for entry in self]

    @cached_property
    def _fixed(self) -> IndexArray:
        """SUM lanes, without those of categories, and MAX lanes of each key, shape (2, k)."""
        return self._of_cell * self._cells

    @cached_property
    def _of_cell(self) -> IndexArray:
        """The same of one cell of each key."""
        widths = [(parts.sums, parts.maxs) for parts in self._parts]
        return np.array(widths, dtype=np.intp).reshape(-1, 2).T

    @cached_property
    def _cells(self) -> IndexArray:
        """How many cells each key has."""
        return np.array([cells(entry.axes) for entry in self], dtype=np.intp)

    @cached_property
    def _cell_starts(self) -> IndexArray:
        """Where the SUM lanes of each cell of each key begin."""
        within = places(np.zeros_like(self._cells), self._cells)
        starts, widths = (
            np.repeat(one, self._cells) for one in (self._ends[0, :-1], self._of_cell[0])
        )
        found: IndexArray = starts + within * widths
        return found

    @cached_property
    def _categories(self) -> IndexArray:
        """How many each key has."""
        return np.array([len(entry.categories) for entry in self], dtype=np.intp)

    @cached_property
    def _ends(self) -> IndexArray:
        """Where SUM and MAX lanes of each key begin, and where the last ones end, shape (2, k + 1)."""
        ends = np.zeros((2, len(self.entries) + 1), dtype=np.intp)
        np.cumsum(self._fixed, axis=1, out=ends[:, 1:])
        ends[0, 1:] += np.cumsum(self._categories)
        return ends

    @cached_property
    def _place_of(self) -> dict[Key, int]:
        return {key: place for place, key in enumerate(self.entries)}

    @cached_property
    def laned(self) -> list[Key]:
        """The keys whose handlers have lanes."""
        return [entry.key for entry in self if not entry.custom]

    @cached_property
    def has_custom(self) -> bool:
        """Whether a key's handler has no lanes, so that its results travel as bytes."""
        return len(self.laned) < len(self.entries)

    @cached_property
    def counts(self) -> IndexArray:
        """Where the count of values stands of each cell of each key with lanes."""
        found: IndexArray = self._cell_starts[np.repeat(self._of_cell[0] > 0, self._cells)] + COUNT
        return found

    def by_key(self, of_cells: BoolArray) -> BoolArray:
        """Return of which keys with lanes something is true of any cell, in the order of `laned`."""
        sizes = self._cells[self._of_cell[0] > 0]
        if len(of_cells) == len(sizes):
            return of_cells
        found: BoolArray = np.logical_or.reduceat(of_cells, sizes.cumsum() - sizes)
        return found

    @cached_property
    def counting(self) -> IndexArray:
        """Places of the SUM lanes that hold whole numbers: of values, of NaN, of each category."""
        return np.concatenate((self.counts, self.counts + (NANS - COUNT), self._named))

    @cached_property
    def _named(self) -> IndexArray:
        """Places of the SUM lanes of categories."""
        return places(self._ends[0, :-1] + self._fixed[0], self._categories)

    @cached_property
    def max_counts(self) -> IndexArray:
        """Where the count of values stands of the cell that each MAX lane belongs to."""
        return np.repeat(self._cell_starts + COUNT, np.repeat(self._of_cell[1], self._cells))

    @cached_property
    def latest(self) -> BoolArray:
        """Which MAX lanes hold the newest value, shape (max_width,)."""
        return np.repeat(np.array([parts.last for parts in self._parts], np.bool_), self._fixed[1])

    @cached_property
    def distributions(self) -> list[Entry]:
        return [entry for entry in self if entry.distributed]

    @cached_property
    def _counted(self) -> tuple[list[Entry], IndexArray, IndexArray]:
        """Keys with categories, where their counts stand, and where each one's begin among these."""
        found = [e for e, parts in zip(self, self._parts, strict=True) if parts.counts]
        at = np.array([self.sums[entry.key].start + COUNT for entry in found], dtype=np.intp)
        return found, at, np.cumsum([0, *(len(entry.categories) for entry in found)])

    @cached_property
    def per_rank(self) -> Schema:
        """The keys of which each rank's lanes are wanted, whatever the route.

        Without a lane for each category: there may be many, and their total is among the others.
        """
        return Schema(entry._replace(categories=()) for entry in self if entry.per_rank)

    def to_json(self) -> str:
        return self.entries_to_json(self)

    @staticmethod
    def entries_to_json(entries: Iterable[Entry]) -> str:
        return f"[{','.join([entry.to_json() for entry in entries])}]"

    # What one rank holds.

    def fill(self, sums: FloatArray, maxs: FloatArray, states: Mapping[Key, State]) -> set[Key]:
        """Write the lanes of one rank, where there are identities; returns the keys that lack a place.

        Lanes of which some lack a place are not to be sent.
        """
        lacking: set[Key] = set()
        if any(map(_axes_of, states.values())):
            with_cells = {key: state for key, state in states.items() if state.axes}
            states = {key: state for key, state in states.items() if not state.axes}
            lacking |= {
                key
                for key, state in with_cells.items()
                if not self._fill_cells(sums, maxs, key, state)
            }
        keys, sums_at, maxs_at = self._latest_held
        if keys != tuple(states):
            lacking.update(states.keys() - self.entries.keys())
            states = {key: state for key, state in states.items() if key not in lacking}
            held = np.array([*map(self._place_of.__getitem__, states)], dtype=np.intp)
            sums_at, maxs_at = map(places, self._ends[:, held], self._fixed[:, held])
            self._latest_held = tuple(states), sums_at, maxs_at
        for lanes, at, which in ((sums, sums_at, _sums_of), (maxs, maxs_at, _maxs_of)):
            if at.size:
                lanes[at] = _flat(map(which, states.values()), at.size)
        return lacking | self._fill_categories(sums, states)

    def _fill_categories(self, sums: FloatArray, states: Mapping[Key, State]) -> set[Key]:
        entries, at, begin = self._counted
        if not entries:
            return set()
        numbers = _flat(
            (
                map((held.counts or {}).get, entry.categories, repeat(0))
                if (held := states.get(entry.key)) is not None
                else repeat(0, len(entry.categories))
                for entry in entries
            ),
            self._named.size,
        )
        sums[self._named] = numbers
        beyond = sums[at] - np.diff(np.append(0.0, numbers.cumsum())[begin])
        lacking = set()
        for place in np.flatnonzero(beyond).tolist():
            entry = entries[place]
            if entry.full:
                other = entry.sums + entry.categories.index(OTHER)
                sums[at[place] - COUNT + other] += beyond[place]
            else:
                lacking.add(entry.key)
        return lacking

    def _fill_cells(self, sums: FloatArray, maxs: FloatArray, key: Key, state: State) -> bool:
        """Write the lanes of a key's cells; returns whether there is a place for each."""
        entry = self.entries.get(key)
        if entry is None or described(entry.axes) != described(state.axes):
            return False
        if united(entry.axes, state.axes) != entry.axes:
            return False
        own, tops = state.laid_out(entry.axes)
        sums[self.sums[key]], maxs[self.maxs[key]] = own.reshape(-1), tops.reshape(-1)
        return True

    def lacking(self, windows: Mapping[Key, Window]) -> set[Key]:
        """Return the keys of `windows` that the schema has no room for."""
        known = self.entries
        return {
            key for key, one in windows.items() if key not in known or not known[key].holds(one)
        }

    def beyond(self, entries: Iterable[Entry]) -> list[Entry]:
        """Return those of `entries` that this schema has no room for."""

        def has_room(entry: Entry) -> bool:
            known = self.entries.get(entry.key)
            return known is not None and known.kind == entry.kind and known.joined(entry) == known

        return [entry for entry in entries if not has_room(entry)]

    def lanes_from(self, older: Schema) -> tuple[IndexArray, IndexArray]:
        """Return where the SUM and the MAX lanes of `older`, a part of this schema, stand here.

        Categories that there was no room for stand where the others are counted.
        """
        here = np.array([*map(self._place_of.__getitem__, older.entries)], dtype=np.intp)
        sums, maxs = (
            places(starts[here], np.diff(ends))
            for starts, ends in zip(self._ends, older._ends, strict=True)
        )
        for old in older:
            if old.categories:
                new = self.entries[old.key]
                start = self.sums[old.key].start + new.sums
                lane_of = {category: start + i for i, category in enumerate(new.categories)}
                end, rest = older.sums[old.key].stop, lane_of.get(OTHER, 0)
                found = [lane_of.get(category, rest) for category in old.categories]
                sums[end - len(found) : end] = found
            if old.axes and (along := moved(old.axes, self.entries[old.key].axes)) is not None:
                for lanes, width, mine, theirs in (
                    (sums, old.sums, self.sums, older.sums),
                    (maxs, old.maxs, self.maxs, older.maxs),
                ):
                    cell = along[:, np.newaxis] * width + np.arange(width)
                    lanes[theirs[old.key]] = mine[old.key].start + cell.reshape(-1)
        return sums, maxs


_sums_of, _maxs_of, _axes_of = map(attrgetter, ("sums", "maxs", "axes"))


def _flat(parts: Iterable[Iterable[float]], size: int) -> FloatArray:
    return np.fromiter(chain.from_iterable(parts), np.float64, size)


def _slices(keys: Iterable[Key], ends: IndexArray) -> dict[Key, slice]:
    return {key: slice(*both) for key, both in zip(keys, pairwise(ends.tolist()), strict=True)}


def places(starts: IndexArray, widths: IndexArray) -> IndexArray:
    """Return the places of several stretches, one behind the other."""
    ends = widths.cumsum()
    found: IndexArray = np.arange(widths.sum()) + np.repeat(starts - ends + widths, widths)
    return found
