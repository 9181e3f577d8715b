"""Totals over datasets: over all of them, and over those whose names begin alike.

They are keys like others, whose lanes are those of their members, merged. So they have a `Plan` of
their own, and are computed by kind, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import numpy as np

from metricfold._core.fold.handlers import AggregationHandler
from metricfold._core.fold.sample import Pool
from metricfold._core.reduce.schema import Entry, IndexArray, Key, Schema
from metricfold._core.view.plan import Found, Lanes, LanesOf, Plan
from metricfold._core.view.tables import Group, Origin, Table, Warn, levels_of
from metricfold._core.view.windows import WindowLike

__all__ = ["DatasetTotals", "Plans"]


class Plans:
    """Keeps the plan of the newest schema, and of its totals, from one reduction to the next."""

    def __init__(self) -> None:
        self._schema: Schema | None = None
        self._plan: Plan | None = None
        self._rollups: dict[bool, DatasetTotals] = {}

    def of(self, schema: Schema, handlers: Mapping[Key, AggregationHandler]) -> Plan:
        """Return the plan of a schema whose keys have these handlers."""
        plan = self._plan
        if plan is None or self._schema is not schema or not plan.fits(handlers):
            plan = Plan(schema, handlers)
            self._schema, self._plan, self._rollups = schema, plan, {}
        return plan

    def rollup(self, plan: Plan, *, levels: bool) -> DatasetTotals:
        """Return the totals over datasets, with `levels` also over some of them."""
        rollups = self._rollups if plan is self._plan else {}
        if levels not in rollups:
            rollups[levels] = DatasetTotals(plan, levels=levels)
        return rollups[levels]


class DatasetTotals:
    """The totals over the keys of a plan.

    Args:
        parts: the plan.
        levels: whether there are totals over some datasets, too.

    Attributes:
        members: the keys that each total is over, by its level, which is empty for all, and name.
    """

    def __init__(self, parts: Plan, *, levels: bool) -> None:
        self._parts = parts
        self._taken: dict[str, str] = {}
        places: dict[Key, list[int]] = {}
        for place, entry in enumerate(parts.entries):
            dataset, name = entry.key
            if not dataset:
                continue
            places.setdefault(("", name), []).append(place)
            for level in levels_of(dataset) if levels else ():
                if level in parts.datasets:
                    self._taken.setdefault(level, dataset)
                else:
                    places.setdefault((level, name), []).append(place)
        self._places = places
        self.members = {key: [parts.entries[one] for one in some] for key, some in places.items()}
        schema = Schema(_total(key, of) for key, of in self.members.items() if _alike(of))
        self._plan = Plan(schema, {key: parts.handlers[some[0]] for key, some in places.items()})
        self._place = {entry.key: place for place, entry in enumerate(self._plan.entries)}
        self._widths = schema.sum_width, schema.max_width
        self._sums, self._maxs = self._moves()

    def _moves(self) -> tuple[IndexArray, IndexArray]:
        """Return from where to where SUM and MAX lanes go, shape (2, n); members in their order."""
        sums: list[tuple[int, int]] = []
        maxs: list[tuple[int, int]] = []
        for entry, (lanes, tops) in zip(self._plan.entries, self._plan.lanes, strict=True):
            own = range(lanes.start, lanes.start + entry.sums)
            of_category = dict(zip(entry.categories, range(own.stop, lanes.stop), strict=True))
            for member, place in zip(self.members[entry.key], self._places[entry.key], strict=True):
                there, top = self._parts.lanes[place]
                to = [*own, *map(of_category.__getitem__, member.categories)]
                sums += zip(range(there.start, there.stop), to, strict=True)
                maxs += zip(range(top.start, top.stop), range(tops.start, tops.stop), strict=True)
        return tuple(np.array(moves, dtype=np.intp).reshape(-1, 2).T for moves in (sums, maxs))  # type: ignore[return-value]

    def _merged(self, lanes: Lanes) -> Lanes:
        """Return the lanes of the totals."""
        width, max_width = self._widths
        sums, maxs = np.zeros(width), np.full(max_width, -np.inf)
        # One after the other, and so to the same bits wherever it is done.
        np.add.at(sums, self._sums[1], lanes.sums[self._sums[0]])
        np.maximum.at(maxs, self._maxs[1], lanes.maxs[self._maxs[0]])

        def pool(entry: Entry) -> Pool:
            pools = [lanes.pool(member) for member in self.members[entry.key]]
            return Pool.joined([one for one in pools if one.count])

        return Lanes(sums, maxs, lanes.seconds, pool)

    def add_to(
        self,
        table: Table,
        parts: Found,
        window: WindowLike,
        lanes_of: LanesOf,
        warn: Warn,
        *,
        totals: bool,
        macro: bool,
    ) -> None:
        """Add the metrics over several datasets, as far as one of these has a value.

        Args:
            table: what they are added to.
            parts: what the keys print.
            window: as of these.
            lanes_of: gives the lanes of these.
            warn: says once what is left out.
            totals: whether totals are printed.
            macro: whether means of the datasets' means are.
        """
        for level, dataset in self._taken.items():
            warn(
                f"level {level}",
                f"rollup='levels' leaves out the level {level!r}, for there is a dataset of that "
                f"name next to {dataset!r}: call it '{level}/...' to have it in",
            )
        if totals:
            found = self._plan.finalize(window, cache(lambda view: self._merged(lanes_of(view))))
        for key, places in self._places.items():
            having = [place for place in places if parts.having[place]]
            if not having:
                continue
            if key not in self._place:
                _warn_of_types(self.members[key], warn)
                continue
            (level, name), place = key, self._place[key]
            group = table.setdefault(level, Group())
            for text, value in found.results(place).items() if totals else ():
                group.put(text, value, Origin.TOTAL, warn, level)
            if macro and not level and self._plan.handlers[place].is_mean:
                mean = float(np.mean([parts.results(one).get(name, np.nan) for one in having]))
                group.put(f"{name}_macro", mean, Origin.TOTAL, warn, level)


def _alike(members: list[Entry]) -> bool:
    """Return whether their states merge."""
    return len({(entry.type, entry.sums, entry.maxs) for entry in members}) == 1


def _total(key: Key, members: list[Entry]) -> Entry:
    categories = {category for entry in members for category in entry.categories}
    return members[0]._replace(key=key, categories=tuple(sorted(categories)))


def _warn_of_types(entries: list[Entry], warn: Warn) -> None:
    """Say that a name is of another type in another dataset, so that nothing adds up."""
    datasets: dict[str, str] = {}
    for entry in entries:
        datasets.setdefault(entry.type, entry.key[0])
    said = " and ".join(f"{kind!r} in dataset {one!r}" for kind, one in datasets.items())
    name = entries[0].key[1]
    warn(
        f"types of {name}",
        f"metric {name!r} is {said}, which do not add up, so there is no total over datasets: "
        "give one of them another name",
    )
