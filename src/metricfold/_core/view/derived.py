"""Metrics that are computed from others: what `MetricsAggregator.derive` has been given."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

from metricfold._core.fold.names import printed
from metricfold._core.view.tables import Origin, Table, Warn
from metricfold._core.view.windows import View, check_view

__all__ = ["Derived", "DerivedMetric", "add_derived", "check_derived_window"]

Derived: TypeAlias = Callable[[Mapping[str, Any]], Any]
"""Takes the values of one dataset by name, an array of those that have axes, and returns a number."""


class DerivedMetric(NamedTuple):
    """A derived metric."""

    function: Derived  # takes the values of one dataset, by name
    window: View | None  # what these speak about; None: what the log shows


def check_derived_window(name: str, window: object) -> View | None:
    """Return the window of a derived metric, if it is one."""
    if window is None:
        return None
    if isinstance(window, str) and window in ("run", "interval"):
        return check_view(window)
    raise ValueError(
        f"derive({name!r}, ..., window={window!r}): use 'interval' or 'run' for inputs that all "
        "speak about the same, or leave it out for those that the log shows"
    )


def add_derived(
    metrics: Mapping[str, DerivedMetric],
    tables: Mapping[str | None, Table],
    printable: Callable[[str], bool],
    there: Callable[[], str],
    warn: Warn,
) -> None:
    """Add derived metrics to tables, in the order in which they were defined.

    Args:
        metrics: by the name that they print.
        tables: what the log shows, under None, and the tables of the windows that are asked for. All
            get all of them, for one may be derived from another.
        printable: whether some metric may print a name, now or in another interval.
        there: returns the names of all metrics, for messages.
        warn: says once what fails.
    """
    different = {id(table): table for table in tables.values()}.values()
    groups = {id(table): table.inputs() for table in different}
    for name, metric in metrics.items():
        source = tables[metric.window]
        found, lacking = _apply(name, metric.function, groups[id(source)], warn)
        unknown = [one for one in lacking if one not in metrics and not printable(one)]
        if unknown:
            warn(
                name,
                f"the derived metric {name!r} needs {', '.join(map(repr, unknown))}, which no "
                f"dataset has; there are: {there()}",
            )
        for table in different:
            results, of = found, source
            if metric.window is None and table is not source:
                # In silence: the same is said of the table that is shown.
                results, _ = _apply(name, metric.function, groups[id(table)], lambda *_: None)
                of = table
            totals = {of.added[text][0] for text, one in of.origins.items() if one is Origin.TOTAL}
            for dataset, value in results.items():
                origin = Origin.TOTAL if dataset in totals else Origin.RECORDED
                table.put((dataset, name), value, origin, warn)
                shown = table.values[printed((dataset, name))]
                groups[id(table)].setdefault(dataset, {})[name] = shown


def _apply(
    name: str, function: Derived, groups: Mapping[str, Mapping[str, Any]], warn: Warn
) -> tuple[dict[str, float], list[str]]:
    """Return the metric of each dataset, and if none has what it needs, the names that are missing."""
    found: dict[str, float] = {}
    missing: set[str] = set()
    tried = False
    for dataset, values in groups.items():
        try:
            found[dataset] = float(function(_Inputs(values)))
        except _MissingError as error:
            missing.add(error.args[0])
            continue
        except BaseException as error:  # the user's function; isolated, named
            if not isinstance(error, Exception) and _may_exit():
                raise
            where = f"dataset {dataset!r}" if dataset else "all datasets together"
            warn(name, f"the derived metric {name!r} failed for {where} and is left out: {error!r}")
        tried = True
    return found, [] if tried else sorted(missing)


def _may_exit() -> bool:
    """Return whether `sys.exit` would end the program here, and not just a thread of the logger."""
    return threading.current_thread() is threading.main_thread()


class _MissingError(KeyError):
    """A derived metric asked for a metric that its dataset does not have."""


class _Inputs(dict[str, Any]):
    def __missing__(self, name: str) -> Any:
        raise _MissingError(name)
