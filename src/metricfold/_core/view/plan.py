"""The results of all keys that have lanes: by kind, and not by key.

A `Plan` is made once for each schema. It lists all that its keys may print, in that order, and puts
those keys into one *block* that one handler finalises and that have the same lanes: fifty means are
one block, and one division. What is not built in, or overrides what is, is asked key by key.

    found = plan.finalize(window, lanes)        # lanes: what gives those of a view
    found.table()                               # groups of values, by dataset
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import compress
from operator import is_
from typing import NamedTuple, TypeAlias

import numpy as np

from metricfold._core.fold.builtin import folds_as
from metricfold._core.fold.handlers import AggregationHandler, LaneHandler
from metricfold._core.fold.sample import FloatArray, Pool
from metricfold._core.fold.state import COUNT, ReducedState, ReducedStates
from metricfold._core.reduce.schema import Entry, IndexArray, Key, Schema
from metricfold._core.view.tables import Group, Table
from metricfold._core.view.windows import View, WindowLike, view_of

__all__ = ["Found", "Lanes", "LanesOf", "Plan"]

_NO_VALUES = Pool()

Places: TypeAlias = slice | IndexArray


class Lanes(NamedTuple):
    """What one view holds of all keys.

    Args:
        sums: SUM lanes, shape (n,).
        maxs: MAX lanes, shape (m,).
        seconds: wall time that it speaks about.
        pool: the values of a DISTRIBUTION.
    """

    sums: FloatArray
    maxs: FloatArray
    seconds: float
    pool: Callable[[Entry], Pool]

    def state(self, entry: Entry, sums: Places, maxs: Places) -> ReducedState:
        """Return the merged state of one key, whose lanes stand there."""
        return ReducedState(
            tuple(self.sums[sums].tolist()),
            tuple(self.maxs[maxs].tolist()),
            self.seconds,
            self.pool(entry) if entry.distributed else _NO_VALUES,
            entry.categories,
        )


LanesOf: TypeAlias = Callable[[View], Lanes]


class _Block(NamedTuple):
    """Keys that one handler finalises and that have the same lanes.

    Args:
        handler: of all of them.
        entries: the k keys.
        places: of the keys in the plan, shape (k,).
        sums: places of their SUM lanes, shape (k, n).
        maxs: places of their MAX lanes, shape (k, m).
        results: places of what they print, shape (k, s); None: they are asked one by one.
    """

    handler: LaneHandler
    entries: list[Entry]
    places: IndexArray
    sums: IndexArray
    maxs: IndexArray
    results: IndexArray | None

    def views(self, window: WindowLike) -> Iterator[tuple[View, _Block]]:
        """Yield each view that is shown of some of the keys, and those."""
        is_total = self.handler.is_total
        if isinstance(window, str):
            yield view_of(window, "", is_total=is_total), self
            return
        views = [view_of(window, one.key[1], is_total=is_total) for one in self.entries]
        for view in dict.fromkeys(views):
            some = [place for place, one in enumerate(views) if one == view]
            yield view, self._part(some)

    def _part(self, some: list[int]) -> _Block:
        return self._replace(
            entries=[self.entries[place] for place in some],
            places=self.places[some],
            sums=self.sums[some],
            maxs=self.maxs[some],
            results=None if self.results is None else self.results[some],
        )


class _Piece(NamedTuple):
    """A stretch of what one dataset prints; or, without one, a key that is asked by itself."""

    dataset: str
    start: int
    stop: int
    place: int | None


class Plan:
    """What the keys of a schema may print, and how it is computed.

    Args:
        schema: the keys.
        handlers: of each of them.

    Attributes:
        entries: the keys that have lanes.
        handlers: of each of these.
        lanes: where the SUM and MAX lanes of each stand.
        names: what is printed at once, behind the dataset.
        starts: where the names of each key begin, and where the last ones end.
        datasets: that the schema has a key of.
        pieces: what is printed, dataset by dataset.
        blocks: what is computed at once.
    """

    def __init__(self, schema: Schema, handlers: Mapping[Key, AggregationHandler]) -> None:
        self.entries = [entry for entry in schema if not entry.custom]
        self.handlers = [handlers[entry.key].laned() for entry in self.entries]
        self.lanes = [(schema.sums[entry.key], schema.maxs[entry.key]) for entry in self.entries]
        self.names: list[str] = []
        self.starts: list[int] = []
        self.pieces: list[_Piece] = []
        self.datasets = {entry.key[0] for entry in schema}
        blocks: dict[tuple[object, ...], list[int]] = {}
        for place, (entry, handler) in enumerate(zip(self.entries, self.handlers, strict=True)):
            at_once = folds_as(handler) is not None
            like = (id(handler), entry.sums, entry.maxs, entry.categories)
            blocks.setdefault(like, []).append(place)
            start = len(self.names)
            self.starts.append(start)
            dataset, name = entry.key
            if at_once:
                self.names += [name + suffix for suffix in handler.columns(entry.categories)]
            last = self.pieces[-1] if self.pieces else None
            if at_once and last is not None and last.place is None and last.dataset == dataset:
                self.pieces[-1] = last._replace(stop=len(self.names))
            else:
                alone = None if at_once else place
                self.pieces.append(_Piece(dataset, start, len(self.names), alone))
        self.starts.append(len(self.names))
        self.blocks = [self._block(places) for places in blocks.values()]

    def _block(self, places: list[int]) -> _Block:
        entries = [self.entries[place] for place in places]
        handler = self.handlers[places[0]]
        sums, maxs = zip(*[self.lanes[place] for place in places], strict=True)
        results = None
        if folds_as(handler) is not None:
            width = len(handler.columns(entries[0].categories))
            results = _ranges([self.starts[place] for place in places], width)
        return _Block(
            handler,
            entries,
            np.array(places, dtype=np.intp),
            _ranges([one.start for one in sums], entries[0].sum_width),
            _ranges([one.start for one in maxs], entries[0].maxs),
            results,
        )

    def fits(self, handlers: Mapping[Key, AggregationHandler]) -> bool:
        """Return whether these are still the handlers, and fold at once those that did."""
        now = [handlers.get(entry.key) for entry in self.entries]
        return all(map(is_, now, self.handlers)) and all(
            (folds_as(block.handler) is None) == (block.results is None) for block in self.blocks
        )

    def finalize(self, window: WindowLike, lanes_of: LanesOf) -> Found:
        """Return what the keys print."""
        found = Found(self)
        values, there = np.empty(len(self.names)), np.zeros(len(self.names), dtype=np.bool_)
        for block in self.blocks:
            for view, part in block.views(window):
                lanes = lanes_of(view)
                sums = lanes.sums[part.sums]
                having = sums[:, COUNT] != 0
                found.having[part.places] = having
                if not having.any():
                    continue
                if part.results is None:
                    for i in np.flatnonzero(having).tolist():
                        state = lanes.state(part.entries[i], part.sums[i], part.maxs[i])
                        found.apart[int(part.places[i])] = part.handler.finalize(state)
                    continue
                pools: Sequence[Pool] = ()
                if part.entries[0].distributed:
                    pools = [
                        lanes.pool(entry) if one else _NO_VALUES
                        for entry, one in zip(part.entries, having.tolist(), strict=True)
                    ]
                maxs, categories = lanes.maxs[part.maxs], part.entries[0].categories
                states = ReducedStates(sums, maxs, lanes.seconds, pools, categories)
                numbers, known = part.handler.finalize_all(states)
                values[part.results] = numbers
                there[part.results] = known & having[:, np.newaxis]
        found.values, found.there = values.tolist(), there.tolist()
        return found


class Found:
    """What the keys of a plan print.

    Attributes:
        having: of which keys there are values, shape (k,).
        values: all results, as the plan names them.
        there: which of them there are.
        apart: the results of keys that are asked by themselves, by place.
    """

    values: list[float]
    there: list[bool]

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.having = np.zeros(len(plan.entries), dtype=np.bool_)
        self.apart: dict[int, dict[str, float]] = {}

    def table(self) -> Table:
        """Return the values by dataset."""
        table: Table = {}
        for dataset, start, stop, place in self.plan.pieces:
            found = self._between(start, stop) if place is None else self.results(place)
            if dataset in table:
                table[dataset].values.update(found)
            elif found:
                table[dataset] = Group(found)
        return table

    def results(self, place: int) -> dict[str, float]:
        """Return what one key prints."""
        if place in self.apart:
            name = self.plan.entries[place].key[1]
            return {name + suffix: value for suffix, value in self.apart[place].items()}
        return self._between(*self.plan.starts[place : place + 2])

    def _between(self, start: int, stop: int) -> dict[str, float]:
        named = zip(self.plan.names[start:stop], self.values[start:stop], strict=True)
        return dict(compress(named, self.there[start:stop]))


def _ranges(starts: Sequence[int], width: int) -> IndexArray:
    """Return places from each start on, shape (k, width)."""
    found: IndexArray = np.add.outer(np.array(starts, dtype=np.intp), np.arange(width))
    return found
