"""Two runs side by side: which is better and by how much, since when, and what else is different.

Three questions about when are three answers: at which step anything differs at all (another seed, a
kernel that adds in another order), since when the curves stay apart, and where they have crossed.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from metricfold.look.choosing import chosen, grouped, main_statistic
from metricfold.look.place import LookError
from metricfold.look.reading import Column, Key, RunFile, read
from metricfold.look.statistics import (
    apart_since,
    crossed_at,
    final,
    paired,
    shared_steps,
    smoothed,
    tail_of,
)
from metricfold.metric import escaped
from metricfold.sinks.config import flattened

__all__ = ["Comparison", "Condition", "Row", "compare"]

_COUNTS = re.compile(r"token|sample|example|document|sequence|byte|seen|row", re.IGNORECASE)
"""What counts the data that a run has seen is called so."""
_OF_THE_MACHINE = re.compile(
    r"second|_time|time_|per_s|mfu|memory|wait|_share|slowest", re.IGNORECASE
)
"""What tells how fast the machine was is called so."""
_NOTABLE = 0.01  # of a value, from which on a metric that is neither better nor worse is listed
_MOST_BAD = 10  # that are listed


@dataclass(frozen=True)
class Row:
    """One metric in two runs; `b` is the second one.

    Args:
        key: the metric as it is logged.
        prefix: of the key, as are `dataset`, `name` and `statistic`.
        logs: at how many steps, or stretches of steps, both have values.
        last_step: the last of these.
        a: the mean over the last part of those.
        b: the same.
        difference: b − a.
        error: half the width of the interval of the difference; those of all rows of a comparison
            hold together with 95 %. None: too few logs to tell.
        verdict: ``"="``: no difference beyond the error; ``"better"`` or ``"worse"``, of b, where it is
            known which way is better, otherwise ``"+"`` or ``"-"``; ``"?"``: too few logs.
        best_a: the best of a's means over short stretches, where it is known which way is better.
        best_b: the same.
        area: the mean of b − a over all steps that both have.
        first_difference: the first step at which the two are not equal, to the bit.
        apart_since: the step from which on they stay apart until the end.
        crossed_at: the step at which the lower one became the upper one for good.
    """

    key: str
    prefix: str
    dataset: str
    name: str
    statistic: str
    logs: int
    last_step: int | None
    a: float
    b: float
    difference: float
    error: float | None
    verdict: str
    best_a: float | None
    best_b: float | None
    area: float
    first_difference: int | None
    apart_since: int | None
    crossed_at: int | None

    @property
    def relative(self) -> float:
        """The difference as a part of a's value; of 0 it is 0 or infinite."""
        if self.difference == 0:
            return 0.0
        return self.difference / abs(self.a) if self.a else self.difference * math.inf


@dataclass(frozen=True)
class Comparison:
    """What two runs have in common, and what not.

    Args:
        a: what the first run is called; `b`: the second one.
        rows: the metrics that were asked for, or those of which it is known which way is better.
        also: others that are different by more than 1 %, and beyond their error; the clearest first.
        settings: values of the configurations that differ, by name, in pairs; None: unknown in one.
        first_difference: the first step at which any metric differs, and which; None: all are equal.
        data: whether both have seen as many tokens or samples at each step; None: nobody counted.
        data_differs: the first step at which they have not, and the metric that says so.
        not_finite: of each run the metrics with values that are not finite, with their last such step.
        only: of each run the metrics that the other one does not have.
        in_common: whether there is any step at which both have a value of the same metric.
    """

    a: str
    b: str
    rows: list[Row]
    also: list[Row] = field(default_factory=list)
    settings: dict[str, tuple[Any, Any]] | None = None
    first_difference: tuple[int, str] | None = None
    data: bool | None = None
    data_differs: tuple[int, str] | None = None
    not_finite: tuple[dict[str, int], dict[str, int]] = ({}, {})
    only: tuple[list[str], list[str]] = ([], [])
    in_common: bool = False
    steps: tuple[int | None, int | None] = (None, None)
    records: tuple[int, int] = (0, 0)

    def to_json(self) -> dict[str, Any]:
        """Return it as a JSON object has it; what is not finite is text, as in run files."""
        found: dict[str, Any] = _as_json(asdict(self))
        return found


def _as_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _as_json(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return json.dumps(value)
    return value


def compare(
    a: RunFile | str | os.PathLike[str],
    b: RunFile | str | os.PathLike[str],
    names: Sequence[str] = (),
) -> Comparison:
    """Return what is different between two runs.

    Values are compared at the steps that both have. The final value is the mean over the last tenth of
    them. The error of a difference allows for noise that lasts over several logs; it says nothing of
    what another seed would bring: for that, compare runs of several seeds.

    Args:
        a: a run, or its path.
        b: the run that is judged.
        names: which metrics, as `metricfold show` takes them; without any those of which it is known
            which way is better.

    Raises:
        LookError: there is no such run or metric.
    """
    a = a if isinstance(a, RunFile) else read(a)
    b = b if isinstance(b, RunFile) else read(b)
    both = [key for key in a.columns if key in b.columns]
    wanted = set(chosen([a, b], names)) if names else None
    directed = [key for key in both if main_statistic(key) and (a.better(key) or b.better(key))]
    asked = [key for key in both if key in wanted] if wanted is not None else directed
    keys = [key for some in grouped(asked).values() for key in some]
    rows = [_row(a, b, key, len(keys)) for key in keys]
    known = set(keys)
    others = [key for key in both if main_statistic(key) and key not in known and not names]
    also = [_row(a, b, key, len(others)) for key in others if _notable(a, b, key, len(others))]
    also.sort(key=lambda row: -abs(row.difference) / (row.error or 1e-300))
    data, data_differs = _same_data(a, b, both)
    labels = _labels(a, b)
    return Comparison(
        *labels,
        rows,
        also,
        _settings(a, b),
        _first_difference(a, b, both),
        data,
        data_differs,
        (_not_finite(a), _not_finite(b)),
        (_only(a, b, wanted), _only(b, a, wanted)),
        any(np.intersect1d(a.columns[key].steps, b.columns[key].steps).size for key in both),
        (a.last_step, b.last_step),
        (a.records, b.records),
    )


def _labels(a: RunFile, b: RunFile) -> tuple[str, str]:
    if a.label != b.label:
        return a.label, b.label
    # As far as their paths differ.
    return str(a.path), str(b.path)


def _row(a: RunFile, b: RunFile, key: Key, of: int = 1) -> Row:
    of_a, of_b = a.columns[key].ordered(), b.columns[key].ordered()
    steps, values_a, values_b = paired((of_a.steps, of_a.values), (of_b.steps, of_b.values))
    with np.errstate(over="ignore", invalid="ignore"):
        difference = values_b - values_a
        last = tail_of(len(steps))
        found = final(difference, of, last)
        ends = [
            math.nan if _ends_badly(column) else float(values[-last:].mean()) if last else math.nan
            for column, values in ((of_a, values_a), (of_b, values_b))
        ]
        way = a.better(key) or b.better(key)
        bests = [
            _best(values, way, last) if way and len(values) else None
            for values in (values_a, values_b)
        ]
        since = np.diff(steps, prepend=steps[:1]) if len(steps) else np.zeros(0)
        weights = np.maximum(since, since[1:].min(initial=1 << 62) if len(steps) > 1 else 1)
        area = float((difference * weights).sum() / weights.sum()) if len(steps) else math.nan
    verdict, error = _verdict(found.verdict, ends, way), found.error
    apart = apart_since(steps, difference) if verdict not in "=?" else None
    mean = found.mean if all(map(math.isfinite, ends)) else math.nan
    return Row(
        of_b.printed,
        *key,
        len(steps),
        int(steps[-1]) if len(steps) else None,
        ends[0],
        ends[1],
        mean,
        error,
        verdict,
        bests[0],
        bests[1],
        area,
        _differs(of_a, of_b),
        apart,
        crossed_at(steps, difference),
    )


def _ends_badly(column: Column) -> bool:
    """Return whether most of the last values of a curve, and the very last one, are not finite."""
    last = column.values[-tail_of(len(column)) :]
    return bool(len(last)) and not np.isfinite(last[-1]) and np.isfinite(last).mean() < 0.5


def _best(values: Any, way: str, last: int) -> float:
    means = smoothed(values, max(last // 10, 1))
    return float(means.min() if way == "lower" else means.max())


def _verdict(sign: str, ends: Sequence[float], way: str | None) -> str:
    bad = [not math.isfinite(end) for end in ends]
    if bad[0] != bad[1]:
        return "worse" if bad[1] else "better"
    if sign in "=?" or way is None or bad[0]:
        return "?" if bad[0] else sign
    return "better" if (sign == "-") == (way == "lower") else "worse"


def _notable(a: RunFile, b: RunFile, key: Key, of: int) -> bool:
    """Return whether a metric, one of so many, is different by more than chance and 1 %."""
    one, other = a.columns[key].ordered(), b.columns[key].ordered()
    steps, values_a, values_b = paired((one.steps, one.values), (other.steps, other.values))
    last = tail_of(len(steps))
    tail_a, tail_b = values_a[-last:], values_b[-last:]
    if last == 0 or np.array_equal(tail_a, tail_b):
        return False
    with np.errstate(over="ignore", invalid="ignore"):
        size = max(abs(tail_a.mean()), abs(tail_b.mean()))
        if not abs(tail_b.mean() - tail_a.mean()) >= _NOTABLE * size:
            return False
        return final(values_b - values_a, of, last).verdict in ("+", "-")


# -- Equality --------------------------------------------------------------------------------------


def _differs(a: Column, b: Column) -> int | None:
    """Return the first step that both have at which two curves are not equal, to the bit."""
    shared, at_a, at_b = shared_steps(a.steps, b.steps)
    one, other = a.values[at_a], b.values[at_b]
    unequal = np.flatnonzero((one != other) & ~(np.isnan(one) & np.isnan(other)))
    return int(shared[unequal[0]]) if unequal.size else None


def _first_difference(a: RunFile, b: RunFile, keys: Sequence[Key]) -> tuple[int, str] | None:
    found: tuple[int, str] | None = None
    for key in keys:
        if _is_of_the_machine(key, a.columns[key]):
            continue
        step = _differs(a.columns[key].ordered(), b.columns[key].ordered())
        if step is not None and (found is None or step < found[0]):
            found = step, a.columns[key].printed
    return found


def _is_of_the_machine(key: Key, column: Column) -> bool:
    """Return whether a metric tells time, which no two runs have alike."""
    return column.aggregation == "rate" or bool(_OF_THE_MACHINE.search(key.name))


def _same_data(
    a: RunFile, b: RunFile, keys: Sequence[Key]
) -> tuple[bool | None, tuple[int, str] | None]:
    known, found = None, None
    for key in keys:
        column = a.columns[key]
        summed = column.aggregation in ("sum", None) and key.statistic == ""
        if _is_of_the_machine(key, column) or not (summed and _COUNTS.search(key.name)):
            continue
        of_a, of_b = column.ordered(), b.columns[key].ordered()
        if not np.intersect1d(of_a.steps, of_b.steps).size:
            continue
        step = _differs(of_a, of_b)
        known = known is not False and step is None
        if step is not None and (found is None or step < found[0]):
            found = step, column.printed
    return known, found


def _settings(a: RunFile, b: RunFile) -> dict[str, tuple[Any, Any]] | None:
    if "config" not in a.header or "config" not in b.header:
        return None
    one, other = (_flat(run.header) for run in (a, b))
    names = [*one, *(name for name in other if name not in one)]
    return {
        name: (one.get(name), other.get(name))
        for name in names
        if one.get(name) != other.get(name) or (name in one) != (name in other)
    }


def _flat(header: Mapping[str, Any]) -> dict[str, Any]:
    config = header.get("config")
    flat = flattened(config) if isinstance(config, Mapping) else {}
    beside = ("world_size", "total_steps", "metricfold", "torch", "jax", "numpy", "python")
    return flat | {f"({name})": header[name] for name in beside if name in header}


def _not_finite(run: RunFile) -> dict[str, int]:
    found = {}
    for key, column in run.columns.items():
        bad = np.flatnonzero(~np.isfinite(column.values))
        if bad.size and not key.statistic:
            found[column.printed] = int(column.steps[bad[-1]])
    return dict(sorted(found.items(), key=lambda one: -one[1])[:_MOST_BAD])


def _only(run: RunFile, other: RunFile, wanted: set[Key] | None) -> list[str]:
    return [
        column.printed
        for key, column in run.columns.items()
        if key not in other.columns and main_statistic(key) and (wanted is None or key in wanted)
    ]


# -- Conditions ------------------------------------------------------------------------------------

_CONDITION = re.compile(
    r"\s*(?P<name>.+?)\s*(?P<than>[<>]=?)\s*(?P<sign>[+-]?)\s*"
    r"(?P<number>(\d+\.?\d*|\.\d+)(e[+-]?\d+)?)\s*(?P<percent>%?)\s*",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Condition:
    """What must not be true of a comparison, such as ``val/loss > +0.5%``.

    With a sign or a percentage it is about the difference to the first run, otherwise about the value
    of the second one.
    """

    text: str
    name: str
    than: str
    bound: float
    against_a: bool
    percent: bool

    @classmethod
    def of(cls, text: str) -> Condition:
        """Return the condition that a text states.

        Raises:
            LookError: it states none.

        >>> Condition.of("val/loss > +0.5%").bound
        0.5
        """
        found = _CONDITION.fullmatch(text)
        if found is None:
            raise LookError(
                f"{text!r} is no condition: write one such as 'val/loss > +0.5%' (against the first "
                "run), 'val/loss > +0.02' or 'val/accuracy < 0.7'"
            )
        sign, percent = found["sign"], bool(found["percent"])
        bound = float(found["number"]) * (-1 if sign == "-" else 1)
        return cls(text, found["name"], found["than"], bound, bool(sign) or percent, percent)

    def holds(self, a: RunFile, b: RunFile) -> list[str]:
        """Return in words where it is true; a value that is not finite makes it so.

        Raises:
            LookError: one of the runs has no such metric, or they have no steps in common.
        """
        keys = chosen([b], [self.name])
        exact = [key for key in keys if b.columns[key].printed == self.name]
        said = []
        for key in exact or keys:
            printed = escaped(b.columns[key].printed)
            if self.against_a and key not in a.columns:
                raise LookError(f"{printed} is not in {escaped(a.label)}, so {self.text!r} is open")
            row = _row(a if key in a.columns else b, b, key)
            if not row.logs and math.isfinite(row.b):
                raise LookError(f"{printed} has no step that both runs have")
            value = row.difference if self.against_a else row.b
            value = 100 * row.relative if self.percent else value
            known = math.isfinite(row.difference if self.against_a else row.b)
            if not known or _COMPARED[self.than](value, self.bound):
                unit = " %" if self.percent else ""
                what = "B − A is " if self.against_a else ""
                said.append(
                    f"{printed}: {what}{value:+.4g}{unit}"
                    if self.against_a
                    else f"{printed}: {value:.6g}"
                )
        return said


_COMPARED = {
    ">": lambda value, bound: value > bound,
    ">=": lambda value, bound: value >= bound,
    "<": lambda value, bound: value < bound,
    "<=": lambda value, bound: value <= bound,
}
