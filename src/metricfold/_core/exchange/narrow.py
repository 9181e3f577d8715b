"""The narrow route: one all-gather of ``[header | MAX lanes | SUM lanes | values]``.

Of each DISTRIBUTION a rank sends its window: how many values, how many of them belong to the open
interval, the values, their weights, and, if it was ever needed, a histogram that describes itself.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from metricfold._core.exchange.base import (
    Exchanged,
    Merged,
    Outgoing,
    Recent,
    Route,
    objections,
    uncounted,
)
from metricfold._core.exchange.slots import described, extents_width, fitting, lanes_width, unpacked
from metricfold._core.fold.names import Key, show
from metricfold._core.fold.sample import FloatArray, Pool, Window
from metricfold._core.reduce.header import HEADER_SIZE, Field
from metricfold._core.reduce.schema import Entry, Schema, places
from metricfold._core.reduce.totals import IntArray, Rows
from metricfold._core.sketch.weights import weighable
from metricfold.communicator.base import Communicator

if TYPE_CHECKING:
    from metricfold._core.sketch import LogLinearHistogram

__all__ = ["Narrow"]

_SIZE, _FRESH, _COUNTS = 0, 1, 2


class Narrow(Route):
    """One all-gather.

    Attributes:
        size: numbers that each rank sends.
    """

    def __init__(self, schema: Schema) -> None:
        self.schema = schema
        self._max_start = HEADER_SIZE
        self._sum_start = self._max_start + schema.max_width
        self._values_start = self._sum_start + schema.sum_width
        self._windows, self.size = places(schema.distributions, _width, self._values_start)

    def pack(self, outgoing: Outgoing) -> tuple[FloatArray, set[Key]]:
        sums, maxs, lacking = self.schema.lanes(outgoing.states)
        lacking |= self.schema.lacking(outgoing.windows)
        vector = np.zeros(self.size)
        vector[self._max_start : self._sum_start] = maxs
        vector[self._sum_start : self._values_start] = sums
        for key, window in outgoing.windows.items():
            if key not in lacking:
                self._pack_window(vector[self._windows[key]], self.schema.entries[key], window)
        return vector, lacking

    @staticmethod
    def _pack_window(place: FloatArray, entry: Entry, window: Window) -> None:
        size = window.values.size
        place[_SIZE], place[_FRESH] = size, window.fresh
        place[_COUNTS : _COUNTS + size] = window.values
        if entry.weighted:
            start = _COUNTS + entry.capacity
            place[start : start + size] = 1.0 if window.weights is None else window.weights
        if window.older is not None:
            place[-_slot_width() :] = np.concatenate(described(window.older))

    def exchange(
        self, communicator: Communicator, header: FloatArray, payload: FloatArray | None
    ) -> Exchanged:
        if payload is None:
            payload = np.zeros(self.size)
            payload[self._max_start : self._sum_start] = -np.inf
        payload[:HEADER_SIZE] = header
        rows = communicator.all_gather(payload)
        headers = rows[:, :HEADER_SIZE]
        if objections(headers):
            return Exchanged(headers, None)
        wrong = self._wrong(rows)
        if wrong:
            return Exchanged(headers, None, wrong=wrong)
        lanes = Rows(
            self.schema,
            rows[:, self._sum_start : self._values_start],
            rows[:, self._max_start : self._sum_start],
        )
        delta = lanes.merged(float(headers[:, Field.SECONDS].max()))
        failed = bool(headers[:, Field.SINK_FAILED].any())
        return Exchanged(headers, Merged(delta, lanes, Gathered(self, rows), sink_failed=failed))

    def _wrong(self, rows: FloatArray) -> str:
        """Return which rank sent numbers that no rank sends, or nothing."""
        bad = uncounted(rows[:, self._counting]).any(axis=1)
        if self.size > self._values_start:
            numbers = np.isfinite(rows[:, self._values_start :])
            bad |= ~(numbers | self._open).all(axis=1)
            heads = rows[:, self._heads]
            sizes, fresh = heads[:, 0], heads[:, 1]
            bad |= (uncounted(sizes) | uncounted(fresh)).any(axis=1)
            bad |= ((sizes > self._capacities) | (fresh > sizes)).any(axis=1)
        for key, place in self._windows.items():
            entry = self.schema.entries[key]
            if entry.weighted:
                start = place.start + _COUNTS + entry.capacity
                weights = rows[:, start : start + entry.capacity]
                given = np.arange(entry.capacity) < rows[:, place.start, np.newaxis]
                bad |= (given & ~weighable(weights)).any(axis=1)
            if entry.condensed:
                slot, lanes = rows[:, place.stop - _slot_width() : place.stop], lanes_width()
                bad |= ~fitting(slot[:, :-lanes], slot[:, -lanes:])
        if not bad.any():
            return ""
        ranks = np.flatnonzero(bad)
        return (
            f"rank{'s' * (ranks.size > 1)} {', '.join(map(str, ranks.tolist()))} sent numbers that no "
            "rank sends: counts that are none, or values that are no numbers. Nothing was reduced; "
            "look after that rank's machine"
        )

    @cached_property
    def _counting(self) -> IntArray:
        places: IntArray = self._sum_start + self.schema.counting
        return places

    @cached_property
    def _heads(self) -> IntArray:
        """Where sizes stand, and how many values are fresh; shape (2, n)."""
        starts = [place.start for key, place in self._windows.items() if self._roomy(key)]
        return np.add.outer([_SIZE, _FRESH], np.array(starts, dtype=np.intp))

    @cached_property
    def _capacities(self) -> IntArray:
        keys = filter(self._roomy, self._windows)
        return np.array([self.schema.entries[key].capacity for key in keys], dtype=np.intp)

    @cached_property
    def _open(self) -> npt.NDArray[np.bool_]:
        """Which of the values may be infinite: those of a histogram's extents."""
        may = np.zeros(self.size - self._values_start, dtype=np.bool_)
        for key, place in self._windows.items():
            if self.schema.entries[key].condensed:
                end = place.stop - self._values_start
                may[end - _slot_width() : end] = True
        return may

    def _roomy(self, key: Key) -> bool:
        return self.schema.entries[key].capacity > 0

    def window_of(self, row: FloatArray, key: Key) -> Window:
        """Return what one rank holds of a DISTRIBUTION, out of its row."""
        entry = self.schema.entries[key]
        if not entry.capacity:
            return Window()
        place = row[self._windows[key]]
        size, fresh = int(place[_SIZE]), int(place[_FRESH])
        start = _COUNTS + entry.capacity
        return Window(
            place[_COUNTS : _COUNTS + size],
            place[start : start + size] if entry.weighted else None,
            fresh,
            _histogram(place) if entry.condensed else None,
        )


class Gathered(Recent):
    """What every rank sent of each DISTRIBUTION."""

    def __init__(self, route: Narrow, rows: FloatArray) -> None:
        super().__init__()
        self._route = route
        self._rows = rows

    def windows(self, key: Key) -> list[Window]:
        found = []
        for rank, row in enumerate(self._rows):
            try:
                found.append(self._route.window_of(row, key))
            except ValueError as error:
                raise RuntimeError(
                    f"rank {rank} sent values of {show(key)} that no rank sends: {error}. Look after "
                    "that rank's machine"
                ) from None
        return found

    def pooled(self, key: Key, *, of_interval: bool) -> Pool:
        windows = self.windows(key)
        return Pool.joined([w.interval() if of_interval else w.recent() for w in windows])


def _slot_width() -> int:
    return extents_width() + lanes_width()


def _width(entry: Entry) -> int:
    if not entry.capacity:
        return 0
    exact = entry.capacity * (2 if entry.weighted else 1)
    return _COUNTS + exact + (_slot_width() if entry.condensed else 0)


def _histogram(place: FloatArray) -> LogLinearHistogram | None:
    lanes = lanes_width()
    return unpacked(place[-_slot_width() : -lanes], place[-lanes:])
