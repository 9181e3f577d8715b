"""What a console knows of one prefix: the newest numbers of each metric, and what came of its loss.

    readings_of(record)      what each number stands for, by prefix
    Board.take               the newest numbers, what was not finite, how the leading metric went
    Track                    of the leading metric of one dataset: change, best and where, so far

The *leading* metric is the one that a training is watched by: its loss, if it has one.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from metricfold.sinks.header import better
from metricfold.sinks.record import Meaning, Record

__all__ = ["Board", "Reading", "Track", "rank", "readings_of"]

_MOST = 128  # stretches that a track is kept in
_MOST_BAD = 256  # steps at which a metric was not finite
_MOST_STEPS = 2**53
_LOGS = 10  # over which the time of a step is taken


class Reading(NamedTuple):
    """A number, and what it stands for."""

    meaning: Meaning
    value: float


def readings_of(record: Record) -> dict[str, list[Reading]]:
    """Return the numbers of a record by prefix; what has none is with what came with it."""
    found: dict[str, list[Reading]] = {}
    loose: list[Reading] = []
    for key, value in record.metrics.items():
        meaning = record.keys.get(key)
        if meaning is not None:
            found.setdefault(record.prefix, []).append(Reading(meaning, value))
        elif (parts := _split(key, record.prefix)) is None:
            loose.append(Reading(Meaning("", key), value))
        else:
            prefix, dataset, name = parts
            found.setdefault(prefix, []).append(Reading(_guessed(dataset, name), value))
    if loose:
        only = next(iter(found)) if len(found) == 1 else ""
        found.setdefault(record.prefix or only, []).extend(loose)
    return found


def _split(key: str, prefix: str) -> tuple[str, str, str] | None:
    """Return prefix, dataset and name of a key that nobody explains; None if it has no ``/``.

    Where it does not start with the prefix that it was logged with, what comes before the first ``_`` is
    taken for one.
    """
    if prefix and key.startswith((f"{prefix}/", f"{prefix}_")):
        group, slash, name = key[len(prefix) :].partition("/")
        if slash:
            return prefix, group[1:], name
    group, slash, name = key.partition("/")
    if not slash:
        return None
    prefix, _, dataset = group.partition("_")
    return prefix, dataset, name


def _guessed(dataset: str, name: str) -> Meaning:
    whole, _, statistic = name.rpartition("_stat_")
    if whole and statistic:
        return Meaning(dataset, whole, statistic, "distribution")
    whole, _, category = name.rpartition("_count_")
    if whole and category:
        return Meaning(dataset, whole, category, "categorical_count")
    return Meaning(dataset, name)


# -- How one metric went ---------------------------------------------------------------------------


@dataclass(slots=True)
class _Stretch:
    """Some logs in a row.

    Args:
        first: the first one's step.
        last: the last one's.
        count: how many values are finite.
        total: their sum.
        bad: how many are not.
        lowest: the smallest of them and its step.
        highest: the largest.
    """

    first: int
    last: int
    count: int = 0
    total: float = 0.0
    bad: int = 0
    lowest: tuple[float, int] = (math.inf, 0)
    highest: tuple[float, int] = (-math.inf, 0)

    @classmethod
    def of(cls, step: int, value: float) -> _Stretch:
        if not math.isfinite(value):
            return cls(step, step, bad=1)
        return cls(step, step, 1, value, 0, (value, step), (value, step))

    def then(self, later: _Stretch) -> _Stretch:
        return _Stretch(
            self.first,
            later.last,
            self.count + later.count,
            self.total + later.total,
            self.bad + later.bad,
            later.lowest if later.lowest[0] < self.lowest[0] else self.lowest,
            later.highest if later.highest[0] > self.highest[0] else self.highest,
        )


class Track:
    """How a metric went, from the first log on, in bounded memory.

    Attributes:
        step: of the newest value.
        value: the newest.
        before: the one before it.
    """

    def __init__(self) -> None:
        self.step = -1
        self.value = self.before = math.nan
        self._stretches: list[_Stretch] = []
        self._each = 1  # logs in a stretch; the last one may have fewer
        self._open = 0  # logs in that

    def add(self, step: int, value: float) -> None:
        """Take the value of a later step, or another one of the same."""
        if step != self.step:
            self.before = self.value
            one = _Stretch.of(step, value)
            if self._open and self._open < self._each:
                self._stretches[-1] = self._stretches[-1].then(one)
                self._open += 1
            else:
                self._stretches.append(one)
                self._open = 1
            if len(self._stretches) > _MOST:
                pairs = zip(self._stretches[::2], self._stretches[1::2], strict=False)
                rest = self._stretches[-1:] if len(self._stretches) % 2 else []
                self._stretches = [*(one.then(two) for one, two in pairs), *rest]
                self._open += 0 if rest else self._each
                self._each *= 2
        self.step, self.value = step, value

    @property
    def change(self) -> float:
        """By how much the newest value differs from the one before it; NaN if either is not finite."""
        found = self.value - self.before
        return found if math.isfinite(found) else math.nan

    def best(self, way: str) -> tuple[float, int] | None:
        """Return the ``"lower"`` or ``"higher"`` best finite value and its step."""
        some = [one for one in self._stretches if one.count]
        if not some:
            return None
        if way == "lower":
            return min(one.lowest for one in some)
        value = max(one.highest[0] for one in some)
        return value, min(one.highest[1] for one in some if one.highest[0] == value)

    def curve(self, cells: int, since: int = 0) -> list[tuple[float, bool]]:
        """Return the mean of the finite values in each of at most so many cells, and whether others are there.

        Args:
            cells: how many.
            since: leave out what ended before this step.
        """
        some = [one for one in self._stretches if one.last >= since]
        n = min(cells, len(some))
        found = []
        for place in range(n):
            part = some[place * len(some) // n : (place + 1) * len(some) // n]
            count = sum(one.count for one in part)
            mean = sum(one.total for one in part) / count if count else math.nan
            if count and not math.isfinite(mean):
                # Their sum is larger than any float.
                mean = (
                    min(one.lowest for one in part)[0] / 2 + max(one.highest for one in part)[0] / 2
                )
            found.append((mean, any(one.bad for one in part)))
        return found

    @property
    def logs(self) -> int:
        """How many there have been."""
        return sum(one.count + one.bad for one in self._stretches)

    def rewind(self, step: int) -> bool:
        """Forget the steps after `step`; returns whether anything is left."""
        if self.step <= step:
            return True
        kept = [one for one in self._stretches if one.last <= step]
        self._stretches, self._open = kept, self._each
        self.step = kept[-1].last if kept else -1
        self.value = self.before = math.nan
        return bool(kept)


@dataclass(slots=True)
class Bad:
    """At which steps a metric was not finite, the newest last, and what it was then."""

    steps: deque[int] = field(default_factory=lambda: deque(maxlen=_MOST_BAD))
    times: int = 0
    value: float = math.nan

    def add(self, step: int, value: float) -> None:
        if not (self.steps and self.steps[-1] == step):
            self.steps.append(step)
            self.times += 1
        self.value = value


# -- A prefix --------------------------------------------------------------------------------------


class Board:
    """What there is to show of one prefix.

    Attributes:
        prefix: its name.
        run: what the run has said of itself.
        step: of the newest record.
        wall_time: when that was logged.
        current: its numbers by what they stand for.
        datasets: all that there have been, in order.
        names: of metrics, likewise.
        tracks: how the leading metric went, by dataset; empty: all together.
        bad: metrics that were not finite at some time, by dataset and name.
        alerts: the newest of each rule and metric.
    """

    def __init__(self, prefix: str, run: Mapping[str, Any]) -> None:
        self.prefix = prefix
        self.run = run
        self.step = -1
        self.wall_time = 0.0
        self.current: dict[Meaning, float] = {}
        self.datasets: dict[str, None] = {}
        self.names: dict[str, Meaning] = {}
        self.tracks: dict[str, Track] = {}
        self.bad: dict[tuple[str, str], Bad] = {}
        self.alerts: dict[tuple[Any, ...], dict[str, Any]] = {}
        self.leading: str | None = None
        self._logs: deque[tuple[int, float]] = deque(maxlen=_LOGS)

    def take(self, record: Record, readings: Iterable[Reading]) -> None:
        """Take the numbers of a record; those of the same step join what is there."""
        if record.step != self.step:
            self.current = {}
            if self._logs and record.step < self._logs[-1][0]:
                self._logs.clear()
            self._logs.append((record.step, record.wall_time))
        self.step, self.wall_time = record.step, record.wall_time
        for meaning, value in readings:
            self.current[meaning] = value
            if meaning.dataset:
                self.datasets.setdefault(meaning.dataset)
            if meaning.name not in self.names:
                self.names[meaning.name] = meaning
                self._lead(meaning)
            if not math.isfinite(value) and meaning.aggregation != "categorical_count":
                of = (meaning.dataset, meaning.name)
                self.bad.setdefault(of, Bad()).add(record.step, value)
            if meaning.name == self.leading and not meaning.statistic:
                self.tracks.setdefault(meaning.dataset, Track()).add(record.step, value)

    def remember(self, alert: dict[str, Any], step: int) -> None:
        """Keep an alert in mind, in the place of an earlier one of the same rule about the same."""
        of = (alert.get("rule"), alert.get("dataset"), alert.get("name"))
        self.alerts.pop(of, None)
        self.alerts[of] = {"step": step, **alert}

    def rewind(self, step: int) -> None:
        """Forget the steps after `step`."""
        if self.step > step:
            self.current = {}
        while self._logs and self._logs[-1][0] > step:
            self._logs.pop()
        self.step = self._logs[-1][0] if self._logs else min(self.step, step)
        self.tracks = {of: one for of, one in self.tracks.items() if one.rewind(step)}
        for of, bad in list(self.bad.items()):
            while bad.steps and bad.steps[-1] > step:
                bad.steps.pop()
                bad.times -= 1
            if not bad.steps:
                del self.bad[of]
        self.alerts = {of: one for of, one in self.alerts.items() if one["step"] <= step}

    @property
    def empty(self) -> bool:
        """Whether nothing is left of it."""
        return not (self.current or self.tracks)

    @property
    def total_steps(self) -> int | None:
        """How many steps there will be, if the run has said so."""
        total = self.run.get("total_steps")
        return total if isinstance(total, int) and 0 < total <= _MOST_STEPS else None

    def seconds_per_step(self) -> float | None:
        """Return the wall time of a step over the newest logs, or None if it is not known."""
        if len(self._logs) < 2:
            return None
        (first, began), (last, ended) = self._logs[0], self._logs[-1]
        steps = last - first
        # Steps that no float holds are no count of work.
        return (ended - began) / steps if 0 < steps <= _MOST_STEPS and ended > began else None

    def better(self) -> str | None:
        """Return which way the leading metric is better; None: nobody knows."""
        return None if self.leading is None else better(self.leading, "", self.run)

    def of(self, name: str, statistic: str = "", dataset: str = "") -> float | None:
        """Return a number of the newest record."""
        known = self.names[name]
        return self.current.get(Meaning(dataset, name, statistic, known.aggregation))

    def _lead(self, new: Meaning) -> None:
        """Let a new metric lead if it is the one to watch; its track begins anew."""
        if self.leading is None or rank(new) < rank(self.names[self.leading]):
            self.leading, self.tracks = new.name, {}


def rank(meaning: Meaning) -> int:
    """Return how much a training is watched by a metric; 0: by that first."""
    if meaning.statistic or meaning.aggregation == "categorical_count":
        return 5
    name = meaning.name.rpartition("/")[2]
    if name == "loss":
        return 0
    if name.endswith("_loss"):
        return 1
    if name == "perplexity":
        return 2
    return 4 if meaning.aggregation in ("sum", "rate") else 3
