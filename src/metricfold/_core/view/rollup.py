"""Totals over datasets: over all of them, and over those whose names begin alike.

They are keys like others, whose lanes are those of their members, merged. So they have a `Plan` of
their own, and are computed by kind, too.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from metricfold._core.fold.handlers import AggregationHandler
from metricfold._core.fold.sample import Pool
from metricfold._core.reduce.schema import Entry, IndexArray, Key, Schema
from metricfold._core.view.cells import By, Folding
from metricfold._core.view.plan import Found, Lanes, Plan
from metricfold._core.view.tables import Origin, Table, Warn, levels_of

__all__ = ["DatasetTotals", "Plans"]


_KEPT = 4
"""So many plans are kept: for a log, for rules, and for what else is looked at."""


class Plans:
    """Keeps the newest plans, with those of their totals, from one reduction to the next."""

    def __init__(self) -> None:
        self._plans: list[tuple[Plan, dict[bool, DatasetTotals]]] = []
        self._foldings: list[Folding] = []

    def of(
        self, schema: Schema, handlers: Mapping[Key, AggregationHandler]
    ) -> tuple[Plan, dict[bool, DatasetTotals]]:
        """Return the plan of a schema whose keys have these handlers, and what is kept beside it."""
        for known in self._plans:
            if known[0].schema is schema and known[0].fits(handlers):
                return known
        made: tuple[Plan, dict[bool, DatasetTotals]] = (Plan(schema, handlers), {})
        self._plans = [made, *self._plans[: _KEPT - 1]]
        return made

    def folding(
        self, schema: Schema, of_key: Mapping[Key, AggregationHandler], by: By, world_size: int
    ) -> Folding:
        """Return what makes results of a schema with axes plain."""
        for known in self._foldings:
            alike = known.whole is schema and known.world_size == world_size and known.by == by
            if alike and known.handled == of_key:
                return known
        made = Folding(schema, of_key, by, world_size)
        self._foldings = [made, *self._foldings[: _KEPT - 1]]
        return made


class DatasetTotals:
    """The totals over the keys of a plan; with `levels` over some datasets, too.

    Attributes:
        members: the keys that each total is over, by its level, which is empty for all, and name.
    """

    def __init__(self, parts: Plan, *, levels: bool) -> None:
        datasets = {entry.key[0] for entry in parts.schema}
        self._taken: dict[str, str] = {}
        self._places: dict[Key, list[int]] = {}
        for place, entry in enumerate(parts.entries):
            dataset, name = entry.key
            if not dataset or entry.latest:  # a value of one rank, of which there is no total
                continue
            for level in ["", *(levels_of(dataset) if levels else ())]:
                if level and level in datasets:
                    self._taken.setdefault(level, dataset)
                else:
                    self._places.setdefault((level, name), []).append(place)
        self.members = {
            key: [parts.entries[one] for one in places] for key, places in self._places.items()
        }
        first = {key: parts.handlers[places[0]] for key, places in self._places.items()}
        self._schema = Schema(_total(key, of) for key, of in self.members.items() if _alike(of))
        self._plan = Plan(self._schema, first)
        self._sums, self._maxs = self._moves(parts)

    def _moves(self, parts: Plan) -> tuple[IndexArray, IndexArray]:
        """Return from where to where SUM and MAX lanes go, shape (2, n); members in their order."""
        sums: list[tuple[int, int]] = []
        maxs: list[tuple[int, int]] = []
        for total, entry in enumerate(self._plan.entries):
            own, tops = self._plan.lanes(total)
            fixed = range(own.start, own.start + entry.sums)
            of_category = dict(zip(entry.categories, range(fixed.stop, own.stop), strict=True))
            for place in self._places[entry.key]:
                lanes, top = parts.lanes(place)
                to = [*fixed, *map(of_category.__getitem__, parts.entries[place].categories)]
                sums += zip(range(lanes.start, lanes.stop), to, strict=True)
                maxs += zip(range(top.start, top.stop), range(tops.start, tops.stop), strict=True)
        return _columns(sums), _columns(maxs)

    def _merged(self, lanes: Lanes) -> Lanes:
        """Return the lanes of the totals."""
        sums = np.zeros(self._schema.sum_width)
        maxs = np.full(self._schema.max_width, -np.inf)
        # One after the other, and so to the same bits wherever it is done.
        np.add.at(sums, self._sums[1], lanes.sums[self._sums[0]])
        np.maximum.at(maxs, self._maxs[1], lanes.maxs[self._maxs[0]])
        places = [self._places[key] for key in self._plan.places]

        def pool(place: int) -> Pool:
            return Pool.joined([one for one in map(lanes.pool, places[place]) if one.count])

        return Lanes(sums, maxs, lanes.seconds[[some[0] for some in places]], pool)

    def add_to(
        self, table: Table, parts: Found, lanes: Lanes, warn: Warn, *, totals: bool, macro: bool
    ) -> None:
        """Add the metrics over several datasets, as far as one of these has a value.

        These are totals, or with `macro` means of the datasets' means, or both. `parts` and `lanes`
        are what the keys print and hold.
        """
        for level, dataset in self._taken.items():
            warn(
                f"level {level}",
                f"rollup='levels' leaves out the level {level!r}, for there is a dataset of that "
                f"name next to {dataset!r}: call it '{level}/...' to have it in",
            )
        found = self._plan.finalize(self._merged(lanes)) if totals else None
        for key, places in self._places.items():
            having = [place for place in places if parts.having[place]]
            total = self._plan.places.get(key)
            if having and total is None:
                _warn_of_types(self.members[key], warn)
            elif having and total is not None:
                for text, value in found.results(total).items() if found else ():
                    table.put(text, value, Origin.TOTAL, warn)
                if macro and not key[0] and self._plan.handlers[total].is_mean:
                    means = [
                        parts.results(one).get(parts.plan.entries[one].key, np.nan)
                        for one in having
                    ]
                    text = ("", f"{key[1]}_macro")
                    table.put(text, float(np.mean(means)), Origin.TOTAL, warn)


def _columns(pairs: list[tuple[int, int]]) -> IndexArray:
    return np.array(pairs, dtype=np.intp).reshape(-1, 2).T


def _alike(members: list[Entry]) -> bool:
    """Return whether their states merge."""
    return len({(entry.type, entry.sums, entry.maxs) for entry in members}) == 1


def _total(key: Key, members: list[Entry]) -> Entry:
    categories = {category for entry in members for category in entry.categories}
    return members[0]._replace(key=key, categories=tuple(sorted(categories)))


def _warn_of_types(members: list[Entry], warn: Warn) -> None:
    """Say that a name is of another type in another dataset, so that nothing adds up."""
    datasets: dict[str, str] = {}
    for entry in members:
        datasets.setdefault(entry.type, entry.key[0])
    said = " and ".join(f"{kind!r} in dataset {one!r}" for kind, one in datasets.items())
    name = members[0].key[1]
    warn(
        f"types of {name}",
        f"metric {name!r} is {said}, which do not add up, so there is no total over datasets: "
        "give one of them another name",
    )
