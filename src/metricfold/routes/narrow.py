"""The narrow route: one all-gather of ``[header | MAX lanes | SUM lanes | values]``.

Of each DISTRIBUTION a rank sends its window: how many values, how many of them belong to the open
interval, the values, their weights, and, if it was ever needed, a histogram that describes itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from metricfold.communicator.base import Communicator
from metricfold.naming import Key
from metricfold.pool import FloatArray, Pool, Window
from metricfold.routes.base import Exchanged, Merged, Outgoing, Recent, Route, objections
from metricfold.routes.slots import described, extents_width, lanes_width, unpacked
from metricfold.schema import HEADER_SIZE, Entry, Field, Schema, places
from metricfold.totals import Rows

if TYPE_CHECKING:
    from metricfold.histogram import LogLinearHistogram

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
        lanes = Rows(
            self.schema,
            rows[:, self._sum_start : self._values_start],
            rows[:, self._max_start : self._sum_start],
        )
        delta = lanes.merged(float(headers[:, Field.SECONDS].max()))
        failed = bool(headers[:, Field.SINK_FAILED].any())
        return Exchanged(headers, Merged(delta, lanes, Gathered(self, rows), sink_failed=failed))

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
        return [self._route.window_of(row, key) for row in self._rows]

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
