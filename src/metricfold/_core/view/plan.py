"""The results of all keys that have lanes: by kind, and not by key.

A `Plan` is made once for each schema. It lists all that its keys may print, and puts those into one
*block* that one handler finalises and that have the same lanes: fifty means are one block, and one
division. What is not built in, or overrides what is, is asked key by key.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import compress
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from metricfold._core.fold.builtin import folds_as
from metricfold._core.fold.handlers import AggregationHandler, LaneHandler
from metricfold._core.fold.names import printed
from metricfold._core.fold.sample import FloatArray, Pool
from metricfold._core.fold.state import COUNT, NANS, ReducedState, ReducedStates
from metricfold._core.reduce.schema import IndexArray, Key, Schema
from metricfold._core.view.tables import Table
from metricfold._core.view.windows import View, WindowLike, view_of

__all__ = ["Found", "Lanes", "Plan"]

BoolArray: TypeAlias = npt.NDArray[np.bool_]

_NO_VALUES = Pool()
_SAMPLES = 64
"""Distributions of a block: the values of so many are put side by side at a time."""
_SQUARED = 1e150
"""The square of what is below, and the sum of many such squares, is finite."""


class Lanes(NamedTuple):
    """What all keys of a plan hold, each in the view that is shown of it."""

    sums: FloatArray  # SUM lanes, shape (n,)
    maxs: FloatArray  # MAX lanes, shape (m,)
    seconds: FloatArray  # wall time that each of the k keys speaks about, shape (k,)
    pool: Callable[[int], Pool]  # the values of the DISTRIBUTION at a place of the plan


class Views(NamedTuple):
    """Which view a window shows of each of k keys, and of each of their lanes whether it is the run's."""

    of_keys: list[View]
    of_run: BoolArray  # shape (k,)
    sums: BoolArray  # shape (n,)
    maxs: BoolArray  # shape (m,)


class _Block(NamedTuple):
    """Keys that one handler finalises and that have the same lanes."""

    handler: LaneHandler
    places: list[int]  # of the k keys in the plan
    sums: IndexArray  # places of their SUM lanes, shape (k, n)
    maxs: IndexArray  # places of their MAX lanes, shape (k, m)
    results: (
        IndexArray | None
    )  # places of what they print, shape (k, s); None: they are asked one by one


class Plan:
    """What the keys of a schema may print, and how it is computed.

    Attributes:
        entries: the keys that have lanes.
        places: of each of these among them.
        handlers: of each.
        names: what is printed of all, in their order: the dataset, and what follows the slash.
        texts: the same as it is printed after the prefix.
        keys: what each text stands for.
        starts: where those of each key begin, and where the last ones end.
        checked: prefixes that have been compared with the names of the keys.
    """

    def __init__(self, schema: Schema, handlers: Mapping[Key, AggregationHandler]) -> None:
        self.schema, self._handled = schema, handlers
        self.checked: set[str] = set()
        self._views: dict[str, Views] = {}
        self.entries = [entry for entry in schema if not entry.custom]
        self.places = {entry.key: place for place, entry in enumerate(self.entries)}
        self.handlers = [handlers[key].laned() for key in self.places]
        widths = [(entry.sum_width, entry.maxs) for entry in self.entries]
        self._widths = np.array(widths, dtype=np.intp).reshape(-1, 2).T
        self._ends = self._widths.cumsum(axis=1)
        self.names: list[Key] = []
        self.starts = [0]
        alike: dict[tuple[object, ...], tuple[list[int], tuple[str, ...]]] = {}
        for place, (entry, handler) in enumerate(zip(self.entries, self.handlers, strict=True)):
            like = (id(handler), entry.sums, entry.maxs, entry.categories)
            if like not in alike:
                at_once = folds_as(handler) is not None
                alike[like] = ([], handler.columns(entry.categories) if at_once else ())
            places, columns = alike[like]
            places.append(place)
            dataset, name = entry.key
            self.names += [(dataset, name + suffix) for suffix in columns]
            self.starts.append(len(self.names))
        self.texts = [printed(key) for key in self.names]
        self.keys = dict(zip(self.texts, self.names, strict=True))
        self._blocks: list[_Block] = []
        for places, _ in alike.values():
            most = _SAMPLES if self.handlers[places[0]].has_sample else len(places)
            for first in range(0, len(places), most):
                self._blocks.append(self._block(places[first : first + most]))

    def _block(self, places: list[int]) -> _Block:
        handler, first = self.handlers[places[0]], places[0]
        results = None
        if folds_as(handler) is not None:
            starts = np.array([self.starts[place] for place in places], dtype=np.intp)
            results = _ranges(starts, self.starts[first + 1] - self.starts[first])
        sums, maxs = (
            _ranges((ends - widths)[places], int(widths[first]))
            for ends, widths in zip(self._ends, self._widths, strict=True)
        )
        return _Block(handler, places, sums, maxs, results)

    def lanes(self, place: int) -> tuple[slice, slice]:
        """Return where the SUM and the MAX lanes of a key stand."""
        ends, widths = self._ends[:, place].tolist(), self._widths[:, place].tolist()
        sums, maxs = (slice(end - width, end) for end, width in zip(ends, widths, strict=True))
        return sums, maxs

    def views(self, window: WindowLike) -> Views:
        """Return the view that is shown of each key."""
        if isinstance(window, str) and window in self._views:
            return self._views[window]
        of_keys = [
            view_of(window, name, is_total=handler.is_total)
            for (_, name), handler in zip(self.places, self.handlers, strict=True)
        ]
        of_run = np.array([view == "run" for view in of_keys], dtype=np.bool_)
        views = Views(of_keys, of_run, *(np.repeat(of_run, widths) for widths in self._widths))
        if isinstance(window, str):
            self._views[window] = views
        return views

    def fits(self, handlers: Mapping[Key, AggregationHandler]) -> bool:
        """Return whether these are still the handlers, and are asked at once if they were."""
        return handlers is self._handled and all(
            (folds_as(block.handler) is None) == (block.results is None) for block in self._blocks
        )

    def state(self, place: int, lanes: Lanes) -> ReducedState:
        """Return the merged state of one key."""
        entry, (sums, maxs) = self.entries[place], self.lanes(place)
        return ReducedState(
            tuple(lanes.sums[sums].tolist()),
            tuple(lanes.maxs[maxs].tolist()),
            float(lanes.seconds[place]),
            lanes.pool(place) if entry.distributed else _NO_VALUES,
            entry.categories,
        )

    def suspects(self, lanes: Lanes) -> list[Key]:
        """Return the keys with a lane that is not finite, or so large that its square is not, or a NaN.

        And all that are not built in: who knows what those compute.
        """
        counts = (self._ends - self._widths)[0] + COUNT
        doubtful = lanes.sums[counts + (NANS - COUNT)] != 0
        for values, ends in zip((lanes.sums, lanes.maxs), self._ends, strict=True):
            large = np.flatnonzero(~(np.abs(values) < _SQUARED))
            doubtful[np.searchsorted(ends, large, side="right")] = True
        for block in self._blocks:
            if block.results is None:
                doubtful[block.places] = True
            elif (
                block.handler.has_sample
            ):  # which counts infinities behind NaN, and leaves both out
                doubtful[block.places] |= lanes.sums[block.sums[:, NANS + 1]] != 0
        doubtful &= lanes.sums[counts] != 0
        return [self.entries[place].key for place in np.flatnonzero(doubtful).tolist()]

    def finalize(self, lanes: Lanes) -> Found:
        """Return what all keys print."""
        values, there = np.empty(len(self.names)), np.zeros(len(self.names), dtype=np.bool_)
        having = np.zeros(len(self.entries), dtype=np.bool_)
        apart: dict[int, dict[str, float]] = {}
        for block in self._blocks:
            having[block.places] = has = lanes.sums[block.sums[:, COUNT]] != 0
            if block.results is None:
                for place in compress(block.places, has.tolist()):
                    apart[place] = block.handler.finalize(self.state(place, lanes))
            elif has.any():
                states = self._states(block, lanes, has.tolist())
                values[block.results], known = block.handler.finalize_all(states)
                there[block.results] = known & has[:, np.newaxis]
                # Values side by side take memory, which the next block's can have.
                del states
        return Found(self, having, values.tolist(), there.tolist(), apart)

    def _states(self, block: _Block, lanes: Lanes, has: list[bool]) -> ReducedStates:
        pools: Sequence[Pool] = ()
        if block.handler.has_sample:
            pools = [
                lanes.pool(place) if one else _NO_VALUES
                for place, one in zip(block.places, has, strict=True)
            ]
        seconds, categories = lanes.seconds[block.places], self.entries[block.places[0]].categories
        sums, maxs = lanes.sums[block.sums], lanes.maxs[block.maxs]
        return ReducedStates(sums, maxs, seconds, pools, categories)


class Found(NamedTuple):
    """What the keys of a plan print."""

    plan: Plan
    having: BoolArray  # of which keys there are values, shape (k,)
    values: list[float]  # all results, as the plan names them
    there: list[bool]  # which of them there are
    apart: Mapping[int, Mapping[str, float]]  # of keys that are asked by themselves, by suffix

    def table(self) -> Table:
        """Return all of them."""
        texts = zip(self.plan.texts, self.values, strict=True)
        table = Table(dict(compress(texts, self.there)), self.plan.keys)
        for place in self.apart:
            for key, value in self.results(place).items():
                table.added[printed(key)], table.values[printed(key)] = key, value
        return table

    def results(self, place: int) -> dict[Key, float]:
        """Return what one key prints."""
        if place in self.apart:
            dataset, name = self.plan.entries[place].key
            return {(dataset, name + end): value for end, value in self.apart[place].items()}
        own = slice(*self.plan.starts[place : place + 2])
        named = zip(self.plan.names[own], self.values[own], strict=True)
        return dict(compress(named, self.there[own]))


def _ranges(starts: IndexArray, width: int) -> IndexArray:
    """Return so many places from each start on, shape (k, width)."""
    found: IndexArray = np.add.outer(starts, np.arange(width))
    return found
