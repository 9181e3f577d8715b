"""What a log shows of a reduction: the results of all keys, totals over datasets, derived metrics."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from metricfold._core.exchange.reducer import Reduced
from metricfold._core.fold.custom import Result
from metricfold._core.fold.handlers import AggregationHandler
from metricfold._core.fold.names import ANYTHING, Claims, Meaning, printed, show, statistic_of
from metricfold._core.fold.sample import FloatArray
from metricfold._core.fold.state import COUNT, ReducedState, quiet
from metricfold._core.reduce.schema import Key
from metricfold._core.reduce.totals import Totals
from metricfold._core.view.cells import By, Cells, Found
from metricfold._core.view.derived import DerivedMetric, add_derived
from metricfold._core.view.plan import Lanes, Plan
from metricfold._core.view.rollup import DatasetTotals, Plans
from metricfold._core.view.tables import Origin, Rollup, Table, levels_of
from metricfold._core.view.windows import View, WindowLike, view_of
from metricfold.metric import check_key, check_name

__all__ = ["Handlers", "Report", "matches"]

_logger = logging.getLogger("metricfold")


@dataclass(frozen=True, slots=True)
class Handlers:
    """What finalises each key of a snapshot."""

    of_key: Mapping[Key, AggregationHandler]
    of_type: Mapping[str, AggregationHandler]  # by its label, for results of custom handlers
    derived: Mapping[str, DerivedMetric]  # by the name that they print
    warned: set[str]  # what has been said already
    plans: Plans = field(default_factory=Plans)  # how it is done, from one reduction to the next
    by: By = ()  # which axes remain


class Report:
    """What may be shown of one reduction; each part is computed when it is asked for."""

    def __init__(self, reduced: Reduced, handlers: Handlers, cells: Cells) -> None:
        self._reduced = reduced
        self._handlers = handlers
        self._cells = cells

    def totals_of(self, view: View) -> Totals:
        return self._reduced.run if view == "run" else self._reduced.interval

    @cached_property
    def _planned(self) -> tuple[Plan, dict[bool, DatasetTotals]]:
        return self._handlers.plans.of(self._reduced.schema, self._handlers.of_key)

    @property
    def plan(self) -> Plan:
        """How all keys that have lanes are finalised."""
        return self._planned[0]

    def over_datasets(self, *, levels: bool) -> DatasetTotals:
        """Return the totals over datasets, with `levels` also over some of them."""
        plan, totals = self._planned
        if levels not in totals:
            totals[levels] = DatasetTotals(plan, levels=levels)
        return totals[levels]

    def _lanes(self, window: WindowLike) -> Lanes:
        """Return what each key holds in the view that is shown of it."""
        plan, pool = self.plan, self._reduced.pool
        run, interval, views = self._reduced.run, self._reduced.interval, plan.views(window)
        return Lanes(
            np.where(views.sums, run.exact_sums(), interval.exact_sums()),
            np.where(views.maxs, run.maxs, interval.maxs),
            np.where(views.of_run, run.seconds, interval.seconds),
            lambda place: pool(plan.entries[place], views.of_keys[place]),
        )

    @cached_property
    def _of_interval(self) -> Lanes:
        """What rules ask for key by key."""
        return self._lanes("interval")

    def printed(self, key: Key, window: WindowLike) -> dict[str, float]:
        """Return what one key that has lanes prints, by suffix; nothing if there are no values."""
        place = self.plan.places[key]
        lanes = self._of_interval if window == "interval" else self._lanes(window)
        state = self.plan.state(place, lanes)
        with quiet():
            return self.plan.handlers[place].finalize(state) if state.sums[COUNT] else {}

    def level(self, key: Key) -> float | None:
        """Return what the lanes of a key come to in the interval, as one number; None without values."""
        lanes, place = self._of_interval, self.plan.places[key]
        sums, maxs = (
            tuple(values[own].tolist())
            for values, own in zip(lanes[:2], self.plan.lanes(place), strict=True)
        )
        if not sums[COUNT]:
            return None
        with quiet():
            state = ReducedState(sums, maxs, float(lanes.seconds[place]))
            return self.plan.handlers[place].finalize_lanes(state).get("")

    def suspects(self) -> list[Key]:
        """Return the keys whose results in the interval may not be finite, or that had NaN left out."""
        return self.plan.suspects(self._of_interval)

    def table(self, window: WindowLike, *, rollup: Rollup, macro: bool) -> Table:
        """Return the values of all metrics."""
        shown = self._recorded(window, rollup=rollup, macro=macro)
        if self._handlers.derived:
            self._add_derived(shown, window, rollup=rollup, macro=macro)
        return shown

    def _recorded(self, window: WindowLike, *, rollup: Rollup, macro: bool) -> Table:
        """Return the values of all metrics, but for derived ones."""
        with quiet():
            lanes = self._lanes(window)
            found = self.plan.finalize(lanes)
            table = found.table()
        self._add_custom(window, table)
        if rollup or macro:
            totals = self.over_datasets(levels=rollup == "levels")
            with quiet():
                totals.add_to(table, found, lanes, self.warn_once, totals=bool(rollup), macro=macro)
        return table

    def _add_custom(self, window: WindowLike, table: Table) -> None:
        """Add the results of handlers without lanes; one that fails is left out and named."""
        printing: dict[str, Result] = {}
        for view in ("run", "interval"):
            for result in self._reduced.custom.of(view):
                try:
                    check_key(*result.key)
                    handler = self._handlers.of_type.get(result.label)
                    is_total = handler is not None and handler.is_total
                    if view_of(window, result.key[1], is_total=is_total) != view:
                        continue
                    values = result.finalised(handler, self.totals_of(view).seconds)
                    for suffix in values:
                        self._check_printing(result, suffix, printing)
                except Exception as error:  # noqa: BLE001 - the user's handler
                    what = show(result.origin)
                    if result.key != result.origin:
                        what = f"the result {result.key[1]!r} of {what}"
                    self.warn_once(f"{result.key}", f"{what} is left out: {error!r}")
                    continue
                dataset, name = result.key
                for suffix, value in values.items():
                    printing[printed(result.key) + suffix] = result
                    table.put((dataset, name + suffix), value, Origin.RESULT, self.warn_once)

    def _check_printing(self, result: Result, suffix: str, printing: Mapping[str, Result]) -> None:
        """Refuse what a result would print if it is no name, or if something else prints it."""
        text, name = printed(result.key) + suffix, result.key[1] + suffix
        check_name("what it prints", name)
        owner = self.claims.owner(result.key, suffix)
        if owner is None and result.key != result.origin and result.key in self._reduced.schema:
            owner = result.key
        if owner is None and text in printing:
            owner = printing[text].origin
        if owner is not None:
            raise ValueError(f"{show(owner)} prints the name {name!r}: give one another name")
        if name in self._handlers.derived:
            raise ValueError(f"a derived metric has the name {name!r}: give one another name")

    @cached_property
    def claims(self) -> Claims:
        """What the agreed keys print, whether they have values now or not."""
        claims = Claims()
        claims.add((entry.key, entry.suffixes) for entry in self._reduced.schema)
        return claims

    def meaning(self, text: str) -> Meaning:
        """Return what something stands for that is printed, after the prefix."""
        known = self._claimed(text)
        if known is not None:
            return known
        place = (one for one in self._groups if text.startswith(printed((one, ""))))
        dataset = next(place, "")
        rest = text[len(printed((dataset, ""))) :]
        if rest in self._handlers.derived:
            return Meaning(dataset, rest, "", "derived")
        if (dataset, rest) in self._types:  # which prints statistics alone
            return Meaning(dataset, rest, "", self._types[dataset, rest])
        # A total over some datasets is called as that over all, or a handler has named a result.
        total = self._claimed(printed(("", rest)))
        return Meaning(dataset, rest) if total is None else total._replace(dataset=dataset)

    def _claimed(self, text: str) -> Meaning | None:
        owner = self.claims.owner_of(text)
        if owner is None:
            return None
        name = owner[1]
        dataset = "" if owner[0] == ANYTHING else owner[0]
        statistic = statistic_of(text.removeprefix(printed((dataset, name))))
        return Meaning(dataset, name, statistic, self._types.get(owner) or self._types["", name])

    @cached_property
    def _types(self) -> dict[Key, str]:
        """The type of each key, and of each name the first one."""
        first = {("", entry.key[1]): entry.type for entry in reversed([*self._reduced.schema])}
        return first | {entry.key: entry.type for entry in self._reduced.schema}

    @cached_property
    def _groups(self) -> list[str]:
        """What may stand for a dataset in keys; what begins with another one comes before that."""
        datasets = {entry.key[0] for entry in self._reduced.schema}
        return sorted(datasets.union(*map(levels_of, datasets)), key=len, reverse=True)

    def _add_derived(
        self, shown: Table, window: WindowLike, *, rollup: Rollup, macro: bool
    ) -> None:
        """Add derived metrics to the table that is shown, each from what its own window asks for."""
        tables: dict[str | None, Table] = {None: shown}
        for metric in self._handlers.derived.values():
            view = metric.window
            if view is not None and view not in tables:
                same = view == window
                tables[view] = shown if same else self._recorded(view, rollup=rollup, macro=macro)
        if self._cells.there:
            for of, table in tables.items():
                table.arrays = self._arrays_of(table, window if of is None else of, rollup=rollup)
        add_derived(
            self._handlers.derived, tables, self._may_print, self._cells.names, self.warn_once
        )

    def _arrays_of(
        self, table: Table, window: WindowLike, *, rollup: Rollup
    ) -> dict[Key, FloatArray | None]:
        """Return what functions get of metrics with axes in the place of a number; None: nothing."""
        found: dict[Key, FloatArray | None] = dict.fromkeys(self._with_cells(rollup=rollup))
        for key, (values, _) in self.arrays(window, rollup=rollup).items():
            found[key] = values
        return {key: one for key, one in found.items() if printed(key) in table.values}

    def _with_cells(self, *, rollup: Rollup) -> dict[Key, list[Key]]:
        """Return the metrics that have axes, and totals over such, each with what it is made of."""
        found = {key: [key] for key in self._cells.there}
        if rollup:
            totals = self.over_datasets(levels=rollup == "levels").members
            for key, members in totals.items():
                some = [entry.key for entry in members]
                if not found.keys().isdisjoint(some):
                    found.setdefault(key, some)
        return found

    def arrays(self, window: WindowLike, *, rollup: Rollup) -> dict[Key, Found]:
        """Return the cells of each metric with axes that has values, and of totals over datasets."""
        found: dict[Key, Found] = {}
        for key, some in self._with_cells(rollup=rollup).items():
            is_total = self._handlers.of_key[some[0]].is_total
            try:
                of = self._cells.of(some, view_of(window, key[1], is_total=is_total))
            except Exception as error:  # noqa: BLE001 - the user's handler
                self.warn_once(f"cells {key}", f"the cells of {show(key)} are left out: {error!r}")
                continue
            if of is not None:
                found[key] = of
        return found

    def _may_print(self, wanted: str) -> bool:
        """Return whether some key may print a name, now or in another interval."""
        return any(
            matches(wanted, name + suffix)
            for (_, name), handler in self._handlers.of_key.items()
            for suffix in (handler.laned().suffixes() if handler.has_lanes else (ANYTHING,))
        )

    def warn_once(self, about: str, message: str) -> None:
        if about not in self._handlers.warned:
            self._handlers.warned.add(about)
            if threading.current_thread() is threading.main_thread():
                warnings.warn(message, RuntimeWarning, stacklevel=4)
            else:  # of a logger, say, where warnings that are made errors would cost a record
                _logger.warning(message)


def matches(text: str, suffix: str) -> bool:
    """Return whether what is printed behind a name is one of the suffixes that this stands for."""
    return text.startswith(suffix[:-1]) if suffix.endswith(ANYTHING) else text == suffix
