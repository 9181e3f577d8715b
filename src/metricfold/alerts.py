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

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from metricfold._core.fold.elements import dissenting
from metricfold._core.reduce.header import name_ranks
from metricfold._core.runtime.listing import shortened
from metricfold._core.view.alert import Alert, Alerts, Severity
from metricfold._core.view.rules import Memory, Rule
from metricfold._core.view.snapshot import Snapshot

__all__ = ["Alert", "Alerts", "NonFinite", "ReplicasDiffer", "Rule", "Spike", "Straggler"]

_LEFT_OUT = {"_nan_count": "NaN", "_stat_nan_count": "NaN", "_stat_inf_count": "infinity"}
"""What may be printed of values that a result leaves out, by what follows the name."""
_MAD = 1.4826
"""So many median absolute deviations are one standard deviation of normally distributed values."""


@dataclass(frozen=True)
class NonFinite:
    """Finds metrics that are NaN or infinite in an interval, or that had NaN left out.

    It names the ranks whose own values are (`Alert.rank` is the lowest), where each rank's are known: as
    long as vectors are gathered; beyond that of MAX, MIN and LAST. Of a metric with axes it names the
    cells.

    Args:
        pattern: which metrics, as in `Snapshot.names`.
        severity: of what it finds.
    """

    pattern: str = "*"
    severity: Severity = "severe"

    def __call__(self, snapshot: Snapshot, memory: Memory) -> Iterator[Alert]:
        for dataset, name in snapshot.suspects(self.pattern):
            results = snapshot.results(dataset, name)
            bad = [value for value in results.values() if not math.isfinite(value)]
            left_out = [what for end, what in _LEFT_OUT.items() if results.get(end)]
            if not bad and not left_out:
                continue
            value = bad[0] if bad else math.nan
            text = f"is {value}" if bad else f"had {' and '.join(left_out)}, left out of it"
            if cells := snapshot.bad_cells(dataset, name):
                text += f", in {shortened(cells)}"
            ranks = [rank for rank, own in _own(snapshot, dataset, name) if not math.isfinite(own)]
            # Where vectors are merged on the way, it is known of maxima and minima alone.
            asked = (snapshot.nan_rank, snapshot.owner) if bad else (snapshot.nan_rank,)
            ranks = ranks or _said(snapshot, dataset, name, asked)
            rank = ranks[0] if ranks else None
            text = f"{_named(dataset, name)} {text}" + (
                f", on {name_ranks(ranks)}" if ranks else ""
            )
            yield Alert(text, self.severity, dataset, name, value, rank)


@dataclass(frozen=True)
class Spike:
    """Finds values far above those of the intervals before.

    Far is more than so many median absolute deviations (scaled to the standard deviation of normally
    distributed values) above the median. Up to half of the intervals that it remembers may be spikes
    themselves, which would hide the next one from a mean and a standard deviation; and a level that
    stays is the usual after half of them. Where most values are equal, the deviations of
    the others count; where all are, there is nothing to judge by.

    Args:
        pattern: which metrics, as in `Snapshot.names`; of a DISTRIBUTION its mean counts,
            of a CATEGORICAL_COUNT the number of values.
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
            value = snapshot.level(dataset, name)
            if value is None or not math.isfinite(value):
                continue
            known = memory.setdefault(f"{dataset or ''}/{name}", [])
            if len(known) >= self.least:
                middle, spread = _usual(known)
                if spread > 1e-12 * abs(middle) and value > middle + self.factor * spread:
                    yield self._alert(snapshot, dataset, name, value, (middle, spread))
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
        middle, spread = usual
        text = (
            f"{_named(dataset, name)} is {value:.6g}, {(value - middle) / spread:.0f} deviations above "
            f"its median of {middle:.6g}"
        )
        owns = [(own, -rank) for rank, own in _own(snapshot, dataset, name)]
        ranks = [-max(owns)[1]] if owns else _said(snapshot, dataset, name, (snapshot.owner,))
        if not ranks:
            return Alert(text, self.severity, dataset, name, value)
        return Alert(
            f"{text}, most on rank {ranks[0]}", self.severity, dataset, name, value, ranks[0]
        )


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
        # After a resume on other ranks that is another machine.
        memory["rank"] = [rank, snapshot.world_size]
        memory["times"] = times + 1 if memory["rank"] == before else 1
        if memory["times"] < self.logs:
            return None
        text = (
            f"rank {rank} spent {timing.slowest_share:.0%} of the interval on {self.timer!r}, "
            f"the median rank {usual:.0%}"
        )
        return Alert(text, self.severity, value=timing.slowest_share, rank=rank)


@dataclass(frozen=True)
class ReplicasDiffer:
    """Finds parameters of which ranks that should hold the same bits do not.

    It names the parameters, and the ranks that differ from most, where each rank's checksums are known: as
    long as vectors are gathered.

    Args:
        pattern: the metric of a `metricfold.torch.ModelWatch` with ``replicas=True``.
        severity: of what it finds.
    """

    pattern: str = "*/param/replicas"
    severity: Severity = "severe"

    def __call__(self, snapshot: Snapshot, memory: Memory) -> Iterator[Alert]:
        for dataset, name in snapshot.names(self.pattern):
            number = snapshot.results(dataset, name).get("", 0.0)
            if not number:
                continue
            values, (labels,) = snapshot.array(dataset, name, window="interval")
            named = [label for label, one in zip(labels, values.tolist(), strict=True) if one > 0]
            cells = snapshot.cells_of_ranks(dataset, name)
            apart = {} if cells is None else dissenting(cells[1])
            ranks = sorted({rank for some in apart.values() for rank in some})
            where = f", on {name_ranks(ranks)}" if ranks else ""
            rank = ranks[0] if len(ranks) == 1 else None
            text = f"the ranks hold different bits of {shortened(named)}{where}"
            yield Alert(text, self.severity, dataset, name, number, rank)


def _usual(values: Sequence[float]) -> tuple[float, float]:
    """Return the median of values, and how far from it they usually are; 0 if they are all equal."""
    middle = median(values)
    apart = [abs(value - middle) for value in values]
    # Most are equal where values are coarse, as a loss in bfloat16 or a count.
    others = [one for one in apart if one] if median(apart) == 0 else apart
    return middle, _MAD * median(others) if others else 0.0


def _own(snapshot: Snapshot, dataset: str | None, name: str) -> Iterator[tuple[int, float]]:
    """Yield each rank's own value of the interval, if these are known."""
    try:
        values = snapshot.per_rank(dataset, name)
    except ValueError:
        return
    yield from ((rank, value) for rank, value in enumerate(values) if value is not None)


def _said(
    snapshot: Snapshot,
    dataset: str | None,
    name: str,
    asked: Iterable[Callable[[str | None, str], int | None]],
) -> list[int]:
    """Return the rank that a snapshot knows of a metric whose ranks' own values it does not."""
    if snapshot.world_size == 1:
        return [0]
    for ask in asked:
        with contextlib.suppress(ValueError):  # not of this type
            rank = ask(dataset, name)
            if rank is not None:
                return [rank]
    return []


def _named(dataset: str | None, name: str) -> str:
    return f"{name} of {dataset}" if dataset else name
