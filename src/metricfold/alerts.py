"""Rules that look for trouble in merged metrics, and so find it on all ranks at once.

    aggregator.alert_on(NonFinite("*/loss"), Spike("*/loss"), Straggler("data"))

    alerts = logger.log(step, aggregator, prefix="train")      # what the log before has found
    if alerts.severe:
        break                                                  # on every rank, at the same step

A rule of your own is a function of a `Snapshot` and of what it remembers, a dict that checkpoints
keep:

    def too_long(snapshot, memory):
        value = snapshot.value(None, "seq_len", "p99", "interval")
        if value is not None and value > 8192:
            return Alert(f"p99 of seq_len is {value:g}", "severe")

What it returns must follow from these two alone: then all ranks see the same. What may differ between
ranks, such as a full disk, is for ``alert_on(rule, local=True)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from metricfold._core.view.alert import Alert, Alerts, Severity
from metricfold._core.view.rules import Memory, Rule
from metricfold._core.view.snapshot import Snapshot

__all__ = ["Alert", "Alerts", "NonFinite", "Rule", "Spike", "Straggler"]

_NAN_COUNT = "_nan_count"
_MAD = 1.4826
"""So many median absolute deviations are one standard deviation of normally distributed values."""


@dataclass(frozen=True)
class NonFinite:
    """Finds metrics that are NaN or infinite in an interval, or that had NaN left out.

    It names the lowest rank whose own values are, where each rank's are known: as long as vectors are
    gathered, or recorded with the axis ``rank``.

    Args:
        pattern: which metrics, as in `Snapshot.names`.
        severity: of what it finds.
    """

    pattern: str = "*"
    severity: Severity = "severe"

    def __call__(self, snapshot: Snapshot, memory: Memory) -> Iterator[Alert]:
        for dataset, name in snapshot.names(self.pattern):
            results = snapshot.results(dataset, name)
            bad = [value for value in results.values() if not math.isfinite(value)]
            if not bad and not any(end.endswith(_NAN_COUNT) and n for end, n in results.items()):
                continue
            value = bad[0] if bad else math.nan
            rank = snapshot.nan_rank(dataset, name)
            if rank is None:
                rank = _first(snapshot, dataset, name, lambda own: not math.isfinite(own))
            text = f"{_named(dataset, name)} is {value}"
            if not bad:
                text = f"{_named(dataset, name)} had NaN, which was left out"
            yield Alert(text + _on(rank), self.severity, dataset, name, value, rank)


@dataclass(frozen=True)
class Spike:
    """Finds values far above those of the intervals before.

    Far is more than so many median absolute deviations (scaled to the standard deviation of normally
    distributed values) above the median. Up to half of the intervals that it remembers may be spikes
    themselves, which would hide the next one from a mean and a standard deviation; and a level that
    stays is the usual after half of them.

    Args:
        pattern: which metrics, as in `Snapshot.names`; of a DISTRIBUTION its mean counts.
        factor: how many deviations.
        window: how many intervals it remembers.
        least: how many it needs before it judges.
        severity: of what it finds.
    """

    pattern: str = "*/loss"
    factor: float = 8.0
    window: int = 128
    least: int = 16
    severity: Severity = "warning"

    def __post_init__(self) -> None:
        if not self.factor > 0:
            raise ValueError(f"factor={self.factor!r}: give a number above 0")
        if not 2 <= self.least <= self.window:
            raise ValueError(f"least={self.least!r} must be from 2 to window={self.window!r}")

    def __call__(self, snapshot: Snapshot, memory: Memory) -> Iterator[Alert]:
        for dataset, name in snapshot.names(self.pattern):
            results = snapshot.results(dataset, name)
            value = results.get("", results.get("_stat_mean", math.nan))
            if not math.isfinite(value):
                continue
            known = memory.setdefault(f"{dataset or ''}/{name}", [])
            if len(known) >= self.least:
                median = float(np.median(known))
                spread = _MAD * float(np.median(np.abs(np.array(known) - median)))
                if spread > 1e-12 * abs(median) and value > median + self.factor * spread:
                    yield self._alert(snapshot, dataset, name, value, (median, spread))
            known.append(value)
            del known[: -self.window]

    def _alert(
        self,
        snapshot: Snapshot,
        dataset: str | None,
        name: str,
        value: float,
        usual: tuple[float, float],
    ) -> Alert:
        median, spread = usual
        most = max((own for _, own in _own(snapshot, dataset, name)), default=math.nan)
        rank = _first(snapshot, dataset, name, lambda own: own == most)
        text = (
            f"{_named(dataset, name)} is {value:.6g}, {(value - median) / spread:.0f} deviations above "
            f"its median of {median:.6g}"
        )
        return Alert(text + _on(rank), self.severity, dataset, name, value, rank)


@dataclass(frozen=True)
class Straggler:
    """Finds a rank that spends more of its time in a timer than the others do.

    Args:
        timer: its name, as given to `MetricsAggregator.timer`.
        factor: how many times the median of all ranks.
        share: and how much of the interval, 0 to 1, more than that.
        logs: in so many intervals in a row, the same rank.
        severity: of what it finds.
    """

    timer: str
    factor: float = 1.5
    share: float = 0.05
    logs: int = 3
    severity: Severity = "warning"

    def __call__(self, snapshot: Snapshot, memory: Memory) -> Alert | None:
        before, times = memory.pop("rank", None), memory.pop("times", 0)
        try:
            timing = snapshot.timing(self.timer)
        except KeyError:
            return None
        usual = timing.median_share
        over = timing.slowest_share - usual
        if over <= self.share or timing.slowest_share < self.factor * usual:
            return None
        rank = timing.slowest
        memory["rank"], memory["times"] = rank, times + 1 if rank == before else 1
        if memory["times"] < self.logs:
            return None
        text = (
            f"rank {rank} spent {timing.slowest_share:.0%} of the interval on {self.timer!r}, "
            f"the median rank {usual:.0%}"
        )
        return Alert(text, self.severity, value=timing.slowest_share, rank=rank)


def _own(snapshot: Snapshot, dataset: str | None, name: str) -> Iterator[tuple[int, float]]:
    """Yield each rank's own value of the interval, if these are known."""
    try:
        values = snapshot.per_rank(dataset, name)
    except ValueError:
        return
    yield from ((rank, value) for rank, value in enumerate(values) if value is not None)


def _first(
    snapshot: Snapshot, dataset: str | None, name: str, wanted: Callable[[float], bool]
) -> int | None:
    only = 0 if snapshot.world_size == 1 else None
    return next((rank for rank, own in _own(snapshot, dataset, name) if wanted(own)), only)


def _named(dataset: str | None, name: str) -> str:
    return f"{name} of {dataset}" if dataset else name


def _on(rank: int | None) -> str:
    return "" if rank is None else f", on rank {rank}"
