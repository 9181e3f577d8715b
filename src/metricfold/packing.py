"""Schema and lanes <-> one float64 vector.

Every rank packs ``[header | MAX lanes | SUM lanes | windows]``. The header says what the rank is
doing; the rest holds the keys of the *agreed schema*, in its order, with identities where the rank
has nothing. Sizes depend on the schema alone, and all ranks hold the same schema, because it only
changes by an exchange that all take part in: a vector of another size would abort the process.

`README.md` in the folder `communicator` tells the whole protocol.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from enum import IntEnum
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from metricfold.handlers import CategoryState, FloatArray, State, WindowState
from metricfold.naming import Key

__all__ = ["HEADER_SIZE", "Entry", "Field", "Key", "Kind", "Schema", "Window", "digest"]

PROTOCOL = 1


class Kind(IntEnum):
    """Which call a rank is in."""

    REDUCE = 1
    STATE_DICT = 2

    @property
    def label(self) -> str:
        return {Kind.REDUCE: "a reduction", Kind.STATE_DICT: "state_dict()"}[self]


class Field(IntEnum):
    """Where each number of the header stands; up to RUN, all ranks must send the same."""

    PROTOCOL = 0
    KIND = 1
    SEQUENCE = 2
    STEP = 3
    """The caller's step, or -1."""
    SCHEMA = 4
    """Hash of the agreed schema."""
    GENERATION = 5
    """How often state was loaded or reset."""
    RUN = 6
    """Hash of the run total."""
    PENDING = 7
    """1 if the rank holds something that the schema has no place for."""
    BLOB_HASH = 8
    BLOB_SIZE = 9
    """Hash and size of what is pending, or of the error."""
    ERROR = 10
    """1 if the rank has failed and takes part with identities."""
    SECONDS = 11
    """Wall time since the rank's last reduction."""
    CUSTOM_SIZE = 12
    """Size of the results of handlers without lanes."""


HEADER_SIZE = 16
"""A few more than there are fields, for later versions."""


def digest(data: bytes) -> int:
    """Return 52 bits of a hash of `data`: a float64 holds them exactly."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 12


@dataclass(frozen=True, slots=True)
class Entry:
    """How one key travels.

    Args:
        key: (dataset name, metric name).
        type: what `type_label` says of its aggregation type.
        sums: SUM lanes, without those of categories; 0 for a handler without lanes.
        maxs: MAX lanes.
        capacity: places for recent values; grows by doubling.
        weighted: whether those carry weights.
        categories: each has a SUM lane of its own.
        suffixes: what may be appended to the name when it is printed. They travel, because what
            a key claims must not depend on who is asked.
    """

    key: Key
    type: str
    sums: int
    maxs: int
    capacity: int = 0
    weighted: bool = False
    categories: tuple[str, ...] = ()
    suffixes: tuple[str, ...] = ("",)

    @property
    def sum_width(self) -> int:
        return self.sums + len(self.categories)

    @property
    def window_width(self) -> int:
        # How many values, how many of them belong to the open interval, then values and weights.
        return 2 + self.capacity * (2 if self.weighted else 1) if self.capacity else 0

    @property
    def custom(self) -> bool:
        return self.sums == 0

    def joined(self, other: Entry) -> Entry:
        """Return the smallest entry with room for both; associative and commutative."""
        if self == other:
            return self
        return replace(
            self,
            capacity=max(self.capacity, other.capacity),
            weighted=self.weighted or other.weighted,
            categories=tuple(sorted({*self.categories, *other.categories})),
        )

    def compatible(self, other: Entry) -> bool:
        return (self.type, self.sums, self.maxs) == (other.type, other.sums, other.maxs)


class Window(NamedTuple):
    """Recent values of one rank, oldest first.

    Args:
        values: shape (n,).
        weights: shape (n,), or None if all are 1.
        fresh: how many of them, at the end, came in during the interval that is still open.
    """

    values: FloatArray
    weights: FloatArray | None = None
    fresh: int = 0

    @classmethod
    def empty(cls) -> Window:
        return cls(np.empty(0))

    def followed_by(self, newer: WindowState, limit: int) -> Window:
        """Return the newest `limit` of these values and the `newer` ones."""
        values, weights = newer.newest()
        if values.size >= limit:
            return Window(values[-limit:], None if weights is None else weights[-limit:], limit)
        if weights is not None or self.weights is not None:
            ones = np.ones(self.values.size) if self.weights is None else self.weights
            new_ones = np.ones(values.size) if weights is None else weights
            weights = np.concatenate((ones, new_ones))[-limit:]
        fresh = min(self.fresh + values.size, limit)
        return Window(np.concatenate((self.values, values))[-limit:], weights, fresh)

    def closed(self) -> Window:
        """Return the same values, none of which belongs to the interval that now begins."""
        return Window(self.values, self.weights, 0)


class Schema:
    """The ordered keys that all ranks have agreed on, and where each stands in the vector."""

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self.entries: dict[Key, Entry] = {
            entry.key: entry for entry in sorted(entries, key=lambda entry: entry.key)
        }
        self.sums: dict[Key, slice] = {}
        self.maxs: dict[Key, slice] = {}
        self.windows: dict[Key, slice] = {}
        for places, width in (
            (self.sums, lambda entry: entry.sum_width),
            (self.maxs, lambda entry: entry.maxs),
            (self.windows, lambda entry: entry.window_width),
        ):
            _place(self.entries, places, width)
        self.sum_width = _end(self.sums)
        self.max_width = _end(self.maxs)
        self.window_width = _end(self.windows)
        self._max_start = HEADER_SIZE
        self._sum_start = self._max_start + self.max_width
        self._window_start = self._sum_start + self.sum_width
        self.size = self._window_start + self.window_width
        self.hash = digest(self.to_json().encode())

    def __contains__(self, key: Key) -> bool:
        return key in self.entries

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries.values())

    @cached_property
    def has_custom(self) -> bool:
        """Whether a key's handler has no lanes, so that its results travel as bytes."""
        return any(entry.custom for entry in self)

    def to_json(self) -> str:
        return json.dumps([asdict(entry) for entry in self], separators=(",", ":"))

    @staticmethod
    def entries_from_json(text: str) -> list[Entry]:
        return [
            Entry(
                **{
                    **entry,
                    "key": tuple(entry["key"]),
                    "categories": tuple(entry["categories"]),
                    "suffixes": tuple(entry["suffixes"]),
                }
            )
            for entry in json.loads(text)
        ]

    def beyond(self, entries: Iterable[Entry]) -> list[Entry]:
        """Return those of `entries` that this schema has no room for."""
        missing = []
        for entry in entries:
            agreed = self.entries.get(entry.key)
            if agreed is None or not agreed.compatible(entry) or agreed.joined(entry) != agreed:
                missing.append(entry)
        return missing

    # -- The vector

    def pack(
        self, states: Mapping[Key, State], windows: Mapping[Key, Window]
    ) -> tuple[FloatArray, set[Key]]:
        """Return the vector of one rank, with an empty header, and the keys that lack a place.

        What `states` lacks is sent as the identity. A vector that lacks places is not to be sent.
        """
        lacking: set[Key] = set()
        sums: list[float] = []
        maxs: list[float] = []
        found = 0
        for key, entry in self.entries.items():
            state = states.get(key)
            if state is None:
                sums += (0.0,) * entry.sum_width
                maxs += (-math.inf,) * entry.maxs
                continue
            found += 1
            sums += state.sums
            maxs += state.maxs
            if type(state) is CategoryState:
                counts = [state.counts.get(category, 0) for category in entry.categories]
                # Each that occurred counts 1 or more, so one that is missed shows in the number.
                if len(counts) - counts.count(0) < len(state.counts):
                    lacking.add(key)
                sums += counts
        if found < len(states):
            lacking.update(key for key in states if key not in self.entries)
        vector = np.zeros(self.size)
        vector[self._max_start : self._sum_start] = maxs
        vector[self._sum_start : self._window_start] = sums
        for key, window in windows.items():
            agreed = self.entries.get(key)
            if agreed is None or not self._pack_window(vector, agreed, window):
                lacking.add(key)
        return vector, lacking

    def _pack_window(self, vector: FloatArray, entry: Entry, window: Window) -> bool:
        """Pack `window` if there is a place for it; returns whether there was."""
        size = window.values.size
        needs_weights = window.weights is not None and not entry.weighted
        if size > entry.capacity or not entry.capacity or needs_weights:
            return False
        start = self._window_start + self.windows[entry.key].start
        vector[start], vector[start + 1] = size, window.fresh
        start += 2
        vector[start : start + size] = window.values
        if entry.weighted:
            start += entry.capacity
            vector[start : start + size] = 1.0 if window.weights is None else window.weights
        return True

    def split(self, rows: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Return the SUM lanes, MAX lanes and windows of rows of shape (world_size, size)."""
        return (
            rows[:, self._sum_start : self._window_start],
            rows[:, self._max_start : self._sum_start],
            rows[:, self._window_start :],
        )

    def window_of(self, row: FloatArray, key: Key) -> Window:
        """Return one rank's window out of its row of the windows' part."""
        entry = self.entries[key]
        place = row[self.windows[key]]
        if not place.size:
            return Window.empty()
        size, fresh = int(place[0]), int(place[1])
        values = place[2 : 2 + size]
        if not entry.weighted:
            return Window(values, None, fresh)
        start = 2 + entry.capacity
        return Window(values, place[start : start + size], fresh)

    # -- From one schema to the next

    def lanes_from(self, older: Schema) -> tuple[Any, Any]:
        """Return where the SUM and the MAX lanes of `older`, a part of this schema, stand here."""
        sums = np.zeros(older.sum_width, dtype=np.intp)
        maxs = np.zeros(older.max_width, dtype=np.intp)
        for old in older:
            new = self.entries[old.key]
            start = self.sums[old.key].start
            lanes = list(range(start, start + old.sums))
            if old.categories:
                lane_of = {c: start + new.sums + i for i, c in enumerate(new.categories)}
                lanes += [lane_of[category] for category in old.categories]
            sums[older.sums[old.key]] = lanes
            place = self.maxs[old.key]
            maxs[older.maxs[old.key]] = range(place.start, place.stop)
        return sums, maxs


def _place(
    entries: Mapping[Key, Entry], places: dict[Key, slice], width: Callable[[Entry], int]
) -> None:
    start = 0
    for key, entry in entries.items():
        places[key] = slice(start, start + width(entry))
        start += width(entry)


def _end(places: Mapping[Key, slice]) -> int:
    return max((int(place.stop) for place in places.values()), default=0)
