"""The wide route: an all-reduce by MAX, then one by SUM.

    MAX  [ ± what must agree, flags, seconds | MAX lanes | extents of histograms ]
    SUM  [ fault | SUM lanes | who had values | who had the maximum | per_rank keys | histograms ]

What the first one brings fixes the layout of the histograms in the second. Nothing in either grows
with the number of ranks but the lanes of the keys declared ``per_rank=True``.

What every rank sent can no longer be told apart, so presence is counted, and a rank is known only
where the sum of ranks has one term. Checkpoints want values rather than a histogram: saving takes
one more collective, a gather of the recent values, thinned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from metricfold._core.exchange.base import (
    Attendance,
    Exchanged,
    Merged,
    Outgoing,
    Recent,
    Route,
    uncounted,
)
from metricfold._core.exchange.slots import extents_width, fitting, laid_out, lanes_width, unpacked
from metricfold._core.fold.names import Key, show
from metricfold._core.fold.sample import MOST_SAVED, FloatArray, Pool, Window
from metricfold._core.fold.state import COUNT, NANS
from metricfold._core.reduce.header import AGREED, Field, Kind
from metricfold._core.reduce.schema import Entry, Schema, places
from metricfold._core.reduce.totals import NOBODY, IntArray, Rows, Totals
from metricfold._core.sketch.weights import weighable
from metricfold.communicator.base import Communicator

if TYPE_CHECKING:
    from metricfold._core.sketch import LogLinearHistogram

__all__ = ["Wide"]

_MOST_DRAWN = 4096
"""So many values stand for those of all ranks where these have not been gathered."""

_GOLDEN = 0.6180339887498949
"""Multiples of the golden ratio, modulo 1, are spread evenly wherever they are cut off."""

_WRONG = (
    "a rank sent numbers that no rank sends, or that contradict its header; where they are added up on "
    "the way nobody knows which. Nothing was reduced; route='narrow' names it"
)

_FLAGS = (Field.PENDING, Field.ERROR, Field.SECONDS, Field.SINK_FAILED)
_HEAD = 2 * AGREED + len(_FLAGS)


class _Slot(NamedTuple):
    """One histogram in the vectors: of which key and view, and where."""

    key: Key
    of_interval: bool
    extents: slice
    lanes: slice


@dataclass(slots=True)
class _Payload:
    """What one rank sends.

    Args:
        top: what is merged by MAX, but for the head. In MAX lanes inf stands for NaN, which a maximum
            may lose.
        sums: SUM lanes.
        no_numbers: which MAX lanes were NaN, 0 or 1.
        present: keys with values in the open interval, 0 or 1.
        histograms: one for each slot.
        windows: what it holds of each DISTRIBUTION.
    """

    top: FloatArray
    sums: FloatArray
    no_numbers: FloatArray
    present: FloatArray
    histograms: Sequence[LogLinearHistogram | None]
    windows: Mapping[Key, Window]


class Wide(Route):
    """Two all-reduces.

    Args:
        schema: the agreed keys.
        world_size: number of ranks.
    """

    def __init__(self, schema: Schema, world_size: int) -> None:
        self.schema = schema
        self._world_size = world_size
        keys = [entry.key for entry in schema if not entry.custom]
        self._counts = np.array([schema.sums[key].start + COUNT for key in keys], dtype=np.intp)
        self._nans = self._counts + (NANS - COUNT)
        self._keys = keys
        self._max_lanes = slice(_HEAD, _HEAD + schema.max_width)
        self._rank_lanes = schema.lanes_from(schema.per_rank)
        everyones = sum(lanes.size for lanes in self._rank_lanes)
        (
            self._fault,
            self._sums,
            self._present,
            self._with_nan,
            self._nan_ranks,
            self._owners,
            self._owner_ranks,
            self._no_numbers,
            self._rows,
        ) = _one_after_the_other(
            1,
            schema.sum_width,
            *(len(keys),) * 3,
            *(schema.max_width,) * 3,
            everyones * world_size,
        )
        self.slots = self._laid_out_slots(self._max_lanes.stop, self._rows.stop)
        last = self.slots[-1] if self.slots else None
        self.max_size = last.extents.stop if last else self._max_lanes.stop
        self.sum_size = last.lanes.stop if last else self._rows.stop
        self._saved, self._saved_size = places(self._windowed(), self._saved_width)

    def _laid_out_slots(self, extents: int, lanes: int) -> list[_Slot]:
        slots: list[_Slot] = []
        for entry in self.schema.distributions:
            for of_interval in (True, False) if entry.bounded else (True,):
                extents_end, lanes_end = extents + extents_width(), lanes + lanes_width()
                slots.append(
                    _Slot(
                        entry.key, of_interval, slice(extents, extents_end), slice(lanes, lanes_end)
                    )
                )
                extents, lanes = extents_end, lanes_end
        return slots

    def _windowed(self) -> list[Entry]:
        return [entry for entry in self.schema.distributions if entry.bounded]

    def _most_saved(self, entry: Entry) -> int:
        """Return how many values of a rank a checkpoint holds."""
        return min(entry.capacity, max(MOST_SAVED // self._world_size, 1))

    def _saved_width(self, entry: Entry) -> int:
        return 1 + self._most_saved(entry) * (2 if entry.weighted else 1)

    # -- Packing

    def pack(self, outgoing: Outgoing) -> tuple[_Payload | None, set[Key]]:
        sums, maxs, lacking = self.schema.lanes(outgoing.states)
        lacking |= self.schema.lacking(outgoing.windows)
        if lacking:
            return None, lacking
        payload = self._nothing()
        payload.sums[:] = sums
        payload.no_numbers[:] = np.isnan(maxs)
        payload.top[self._max_lanes] = np.where(payload.no_numbers > 0, np.inf, maxs)
        payload.histograms = self._histograms(outgoing.windows)
        payload.windows = outgoing.windows
        for slot, histogram in zip(self.slots, payload.histograms, strict=True):
            if histogram is not None:
                payload.top[slot.extents] = histogram.extents()
        payload.present[payload.sums[self._counts] > 0] = 1.0
        if outgoing.present:
            earlier = [place for place, key in enumerate(self._keys) if key in outgoing.present]
            payload.present[earlier] = 1.0
        return payload, lacking

    def _histograms(self, windows: Mapping[Key, Window]) -> list[LogLinearHistogram | None]:
        found: list[LogLinearHistogram | None] = []
        for slot in self.slots:
            window = windows.get(slot.key, Window())
            if slot.of_interval:
                found.append(window.interval().condensed())
            elif window.fresh == window.values.size and window.older is None:
                found.append(found[-1])  # nothing is older than the open interval
            else:
                found.append(window.recent().condensed())
        return found

    def _nothing(self) -> _Payload:
        schema = self.schema
        return _Payload(
            top=np.full(self.max_size, -np.inf),
            sums=np.zeros(schema.sum_width),
            no_numbers=np.zeros(schema.max_width),
            present=np.zeros(len(self._keys)),
            histograms=[None] * len(self.slots),
            windows={},
        )

    # -- Travelling

    def exchange(
        self, communicator: Communicator, header: FloatArray, payload: _Payload | None
    ) -> Exchanged:
        payload = payload or self._nothing()
        payload.top[:AGREED] = header[:AGREED]
        payload.top[AGREED : 2 * AGREED] = -header[:AGREED]
        payload.top[2 * AGREED : _HEAD] = header[list(_FLAGS)]
        top = communicator.all_reduce(payload.top, "max")
        agreed = (top[:AGREED] == -top[AGREED : 2 * AGREED]).all()
        pending, error, seconds, sink_failed = top[2 * AGREED : _HEAD].tolist()
        if pending or error or not agreed:
            return Exchanged(None, None)
        if np.isnan(top).any() or not 0.0 <= seconds < np.inf:
            return Exchanged(None, None, wrong=_WRONG)
        failure = ""
        bottom = np.zeros(self.sum_size)
        try:
            self._fill(bottom, payload, top, communicator.rank)
        except Exception as fault:  # noqa: BLE001 - the others go on: join them, and say so
            failure = f"it could not pack what it holds: {fault!r}"
            bottom[:] = 0.0
            bottom[self._fault] = 1.0
        bottom = communicator.all_reduce(bottom, "sum")
        if bottom[self._fault].any():
            return Exchanged(None, None, failure)
        if self._wrong(top, bottom):
            return Exchanged(None, None, wrong=_WRONG)
        saved = None
        if header[Field.KIND] == Kind.STATE_DICT and self._saved:
            saved = communicator.all_gather(self._thinned(payload.windows))
            if self._wrongly_saved(saved):
                return Exchanged(None, None, wrong=_WRONG)
        merged = self._merged(top, bottom, seconds, saved)
        return Exchanged(None, replace(merged, sink_failed=bool(sink_failed)))

    def _fill(self, bottom: FloatArray, payload: _Payload, top: FloatArray, rank: int) -> None:
        """Fill in the vector that is summed, given everyone's maxima."""
        bottom[self._sums] = payload.sums
        bottom[self._present] = payload.present
        with_nan = payload.sums[self._nans] > 0
        bottom[self._with_nan] = with_nan
        bottom[self._nan_ranks] = with_nan * rank
        maxs = payload.top[self._max_lanes]
        counts = self.schema.max_counts
        having = payload.sums[counts] > payload.sums[counts + (NANS - COUNT)]
        owned = having & (maxs == top[self._max_lanes])
        bottom[self._owners] = owned
        bottom[self._owner_ranks] = owned * rank
        bottom[self._no_numbers] = payload.no_numbers
        rows = bottom[self._rows].reshape(self._world_size, -1)
        if rows.size:
            sum_lanes, max_lanes = self._rank_lanes
            maxs = np.where(payload.no_numbers > 0, np.nan, maxs)
            rows[rank] = np.concatenate((payload.sums[sum_lanes], maxs[max_lanes]))
        for slot, histogram in zip(self.slots, payload.histograms, strict=True):
            if histogram is not None:
                bottom[slot.lanes] = laid_out(histogram, top[slot.extents])

    def _thinned(self, windows: Mapping[Key, Window]) -> FloatArray:
        """Return the recent values that a checkpoint holds of this rank."""
        vector = np.zeros(self._saved_size)
        for entry in self._windowed():
            most = self._most_saved(entry)
            window = windows.get(entry.key, Window()).thinned(most)
            place, size = vector[self._saved[entry.key]], window.values.size
            place[0] = size
            place[1 : 1 + size] = window.values
            if entry.weighted:
                place[1 + most : 1 + most + size] = (
                    1.0 if window.weights is None else window.weights
                )
        return vector

    # -- Arriving

    def _merged(
        self, top: FloatArray, bottom: FloatArray, seconds: float, saved: FloatArray | None
    ) -> Merged:
        owners = bottom[self._owners]
        per_rank = self.schema.per_rank
        rows = bottom[self._rows].reshape(self._world_size, -1)
        delta = Totals(
            self.schema,
            bottom[self._sums],
            np.zeros(self.schema.sum_width),
            np.where(bottom[self._no_numbers] > 0, np.nan, top[self._max_lanes]),
            _only(owners, bottom[self._owner_ranks]),
            owners.astype(np.int64),
            seconds,
        )
        attendance = Attendance(
            self._keys,
            bottom[self._present].astype(np.int64),
            _only(bottom[self._with_nan], bottom[self._nan_ranks]),
        )
        return Merged(
            delta,
            Rows(per_rank, rows[:, : per_rank.sum_width], rows[:, per_rank.sum_width :]),
            Summed(self, top, bottom, saved),
            attendance,
        )

    def _wrong(self, top: FloatArray, bottom: FloatArray) -> bool:
        """Return whether something has arrived that no ranks' numbers come to."""
        world_size = self._world_size
        lanes = [bottom[self._sums][self.schema.counting]]
        lanes += [bottom[self._present.start : self._rows.start]]
        rows = bottom[self._rows].reshape(world_size, -1)
        if any(
            uncounted(counts).any() for counts in (*lanes, rows[:, self.schema.per_rank.counting])
        ):
            return True
        of_ranks = (self._present, self._with_nan, self._owners, self._no_numbers)
        if any((bottom[counts] > world_size).any() for counts in of_ranks):
            return True
        owners = _only(bottom[self._owners], bottom[self._owner_ranks])
        with_nan = _only(bottom[self._with_nan], bottom[self._nan_ranks])
        if (owners >= world_size).any() or (with_nan >= world_size).any():
            return True
        if not self.slots:
            return False
        slots = (
            top[self.slots[0].extents.start :].reshape(-1, extents_width()),
            bottom[self.slots[0].lanes.start :].reshape(-1, lanes_width()),
        )
        return not fitting(*slots).all()

    def _wrongly_saved(self, saved: FloatArray) -> bool:
        """Return whether a rank's recent values are not as `_thinned` gives them."""
        if not np.isfinite(saved).all():
            return True
        for entry in self._windowed():
            rows, most = saved[:, self._saved[entry.key]], self._most_saved(entry)
            if uncounted(rows[:, 0]).any() or (rows[:, 0] > most).any():
                return True
            given = np.arange(most) < rows[:, :1]
            if entry.weighted and (given & ~weighable(rows[:, 1 + most :])).any():
                return True
        return False

    def window_of(self, row: FloatArray, key: Key) -> Window:
        """Return the values of one rank that a checkpoint holds."""
        entry = self.schema.entries[key]
        place, most = row[self._saved[key]], self._most_saved(entry)
        size = int(place[0])
        weights = place[1 + most : 1 + most + size] if entry.weighted else None
        return Window(place[1 : 1 + size], weights)


class Summed(Recent):
    """The histograms of all ranks.

    Args:
        route: knows where each is.
        top: what was merged by MAX.
        bottom: what was merged by SUM.
        saved: everyone's recent values, if this was for a checkpoint.
    """

    def __init__(
        self, route: Wide, top: FloatArray, bottom: FloatArray, saved: FloatArray | None
    ) -> None:
        super().__init__()
        self._route = route
        self._contents = {
            (slot.key, slot.of_interval): (top[slot.extents], bottom[slot.lanes])
            for slot in route.slots
        }
        self._saved = saved

    def pooled(self, key: Key, *, of_interval: bool) -> Pool:
        try:
            return Pool(histogram=unpacked(*self._contents[key, of_interval]))
        except ValueError as error:
            raise RuntimeError(
                f"a rank sent values of {show(key)} that no rank sends: {error}. route='narrow' names it"
            ) from None

    def windows(self, key: Key) -> list[Window]:
        if self._saved is None:
            # Nobody has everyone's values: as many that are spread as the histogram says.
            pool = self.recent(key)
            size = min(pool.count, _MOST_DRAWN)
            if not size:
                return []
            values = pool.quantiles((np.arange(size) + 0.5) / size)
            # Whoever loads them keeps some of the newest: these have to be spread like all.
            ages = np.argsort(np.argsort(np.arange(size) * _GOLDEN % 1.0))
            return [Window(values[ages])]
        first, *others = (self._route.window_of(row, key) for row in self._saved)
        return [first._replace(older=self.interval(key).histogram), *others]


def _one_after_the_other(*widths: int) -> list[slice]:
    ends = np.cumsum(widths).tolist()
    return [slice(end - width, end) for end, width in zip(ends, widths, strict=True)]


def _only(ranks: FloatArray, sums: FloatArray) -> IntArray:
    """Return the rank where there is one, given how many there are and what they sum up to."""
    only: IntArray = np.where(ranks == 1, sums, NOBODY).astype(np.int64)
    return only
