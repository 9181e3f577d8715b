"""What can log over ranks: ours, and whatever it is compared with.

A contender takes in the intervals of a `Workload` (`feed`, not timed) and reduces them over all
ranks (`log`, timed). Those that stand here need no other package; `peers` has other libraries.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.baselines import Aggregation, FrozenMetric, MetricStates, State
from benchmarks.meter import Meter
from benchmarks.workloads import Workload
from metricfold import Metric, MetricBatch, MetricsAggregator, Snapshot
from metricfold.communicator import Communicator, connect

__all__ = [
    "BARE",
    "CONTENDERS",
    "DICT",
    "GATHER",
    "INTERVALS",
    "PICKLED",
    "REDUCE",
    "BareAllReduce",
    "Contender",
    "Listed",
    "Metricfold",
    "MetricfoldEverywhere",
    "PickledStatesEverywhere",
]

INTERVALS = 3
"""So many different intervals are prepared, and fed in turn."""

REDUCE = "reduce()"
DICT = "reduce() and rank 0's dict"
BARE = "bare all_reduce"
GATHER = "bare all_gather"
PICKLED = "pickled states"


class Contender(ABC):
    """Something that reduces metrics over ranks.

    Args:
        workload: what there is to log.
        rank: this rank.
        floats: size of metricfold's vector for this workload in float64.

    Attributes:
        fed: how many intervals it has taken in; they come round after `INTERVALS`.
    """

    fed = 0

    @abstractmethod
    def __init__(self, workload: Workload, rank: int, floats: int) -> None: ...

    @abstractmethod
    def feed(self) -> None:
        """Take in the values of one interval."""

    @abstractmethod
    def log(self) -> Mapping[str, float]:
        """Reduce what came in over all ranks; return values by key, if it has made any."""

    def run(self, meter: Meter) -> None:
        """Log as often as `meter` wants; who owns the training loop does so from inside it."""
        while meter.wants_more():
            self.feed()
            meter.begin()
            meter.end(self.log())

    def facts(self) -> dict[str, float]:
        """Return what else is worth knowing about the logs made so far."""
        return {}


class Metricfold(Contender):
    """`MetricsAggregator.reduce`."""

    warm_ups = 2
    """Two logs bring the schema and its capacities to where they stay."""

    def __init__(self, workload: Workload, rank: int, floats: int) -> None:
        self._rank = rank
        self._wire = Stopwatch(connect(f"{type(self).__name__} {workload.title}", None, None, 0))
        self.aggregator = MetricsAggregator(workload.window, communicator=self._wire)
        self._intervals = _folded(workload, rank)
        self._phases: list[tuple[float, float, float]] = []
        for _ in range(self.warm_ups):
            self.feed()
            self._wire.begin()
            self.aggregator.reduce()
        self._steady = self.aggregator.collectives

    @property
    def floats(self) -> int:
        """Return how many float64 this rank handed to the collectives of the last log."""
        return self._wire.floats

    def feed(self) -> None:
        for batch in self._intervals[self.fed % INTERVALS]:
            self.aggregator.update(batch)
        self.fed += 1

    def log(self) -> Mapping[str, float]:
        started = time.perf_counter()
        self._wire.begin()
        snapshot = self.aggregator.reduce()
        ended = time.perf_counter()
        entered, left = self._wire.entered, self._wire.left
        self._phases.append((entered - started, left - entered, ended - left))
        return self._report(snapshot)

    def _report(self, snapshot: Snapshot) -> Mapping[str, float]:
        return {}

    def facts(self) -> dict[str, float]:
        logs = len(self._phases)
        pack, gather, merge = np.median(np.array(self._phases), axis=0).tolist()
        return {
            "collectives": (self.aggregator.collectives - self._steady) / logs,
            "floats": self.floats,
            "pack": pack,
            "gather": gather,
            "merge": merge,
        }


class MetricfoldDict(Metricfold):
    """The same, and rank 0 turns the snapshot into a dict."""

    def _report(self, snapshot: Snapshot) -> Mapping[str, float]:
        return snapshot.as_dict("train") if self._rank == 0 else {}


class MetricfoldEverywhere(Metricfold):
    """The same, and every rank turns the interval into a dict, needed or not."""

    warm_ups = 0

    def _report(self, snapshot: Snapshot) -> Mapping[str, float]:
        return snapshot.as_dict("train", "interval")


class BareAllReduce(Contender):
    """What no reduction over ranks can avoid: one all-reduce of as many numbers."""

    def __init__(self, workload: Workload, rank: int, floats: int) -> None:
        self._payloads = [
            torch.from_numpy(np.random.default_rng((rank, number)).normal(size=floats))
            for number in range(INTERVALS)
        ]
        self._vector = torch.zeros(floats, dtype=torch.float64)

    def feed(self) -> None:
        self._vector.copy_(self._payloads[self.fed % INTERVALS])
        self.fed += 1

    def log(self) -> Mapping[str, float]:
        dist.all_reduce(self._vector)
        return {}


class BareAllGather(BareAllReduce):
    """The collective that `reduce` is made of, alone: the rest of its time is our own."""

    def __init__(self, workload: Workload, rank: int, floats: int) -> None:
        super().__init__(workload, rank, floats)
        self._rows = torch.zeros(floats * dist.get_world_size(), dtype=torch.float64)

    def log(self) -> Mapping[str, float]:
        # The group's method, as newer versions of torch rename the public function.
        dist.group.WORLD._allgather_base(self._rows, self._vector).wait()
        return {}


class PickledStates(Contender):
    """One `all_gather_object` of all state objects, and a merge of them on every rank."""

    finalise = False

    def __init__(self, workload: Workload, rank: int, floats: int) -> None:
        self._rank = rank
        self._window = workload.window
        self._intervals = _frozen(workload, rank)
        self._begin()

    def _begin(self) -> None:
        self._states = MetricStates(self._window, finalise=self.finalise)

    def feed(self) -> None:
        for batch in self._intervals[self.fed % INTERVALS]:
            self._states.update(batch)
        self.fed += 1

    def log(self) -> Mapping[str, float]:
        of_ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(of_ranks, self._states.local())
        return self._report(self._states.combine(of_ranks))

    def _report(self, merged: list[State]) -> Mapping[str, float]:
        return {}


class PickledStatesDict(PickledStates):
    """The same, and rank 0 turns the states into a dict."""

    def _report(self, merged: list[State]) -> Mapping[str, float]:
        return self._states.report(merged, "train") if self._rank == 0 else {}


class PickledStatesEverywhere(PickledStates):
    """The same, and every rank makes a dict and begins the next interval."""

    def _report(self, merged: list[State]) -> Mapping[str, float]:
        values = self._states.report(merged, "train")
        self._begin()
        return values


class PickledStatistics(PickledStates):
    """The same with distributions finalised before: fewer bytes, more objects, wrong percentiles."""

    finalise = True


@dataclass(frozen=True, slots=True)
class Listed:
    """A contender as the benchmark runs it.

    Args:
        name: how the table calls it.
        make: its class.
        beside: which of ours it is compared with.
        slow: whether it has a turn in some rounds only.
    """

    name: str
    make: Callable[[Workload, int, int], Contender]
    beside: tuple[str, ...] = ()
    slow: bool = False


CONTENDERS: Sequence[Listed] = (
    Listed(REDUCE, Metricfold),
    Listed(DICT, MetricfoldDict),
    Listed(BARE, BareAllReduce, (REDUCE, DICT)),
    Listed(GATHER, BareAllGather, (REDUCE,)),
    Listed(PICKLED, PickledStates, (REDUCE,), slow=True),
    Listed("pickled states and dict", PickledStatesDict, (DICT,), slow=True),
    Listed("pickled statistics", PickledStatistics, (REDUCE,), slow=True),
)


class Stopwatch(Communicator):
    """Another communicator, when it was first entered and last left, and what went in."""

    def __init__(self, inner: Communicator) -> None:
        self._inner = inner
        self.rank = inner.rank
        self.world_size = inner.world_size
        self.begin()

    def begin(self) -> None:
        """Begin another log."""
        self.entered = self.left = 0.0
        self.floats = 0

    def _all_gather(self, vector: Any) -> Any:
        return self._timed(vector, lambda: self._inner.all_gather(vector))

    def _all_reduce(self, vector: Any, op: Literal["sum", "max"]) -> Any:
        return self._timed(vector, lambda: self._inner.all_reduce(vector, op))

    def _timed(self, vector: Any, collective: Callable[[], Any]) -> Any:
        self.entered = self.entered or time.perf_counter()
        self.floats += vector.size
        result = collective()
        self.left = time.perf_counter()
        return result


@cache
def _folded(workload: Workload, rank: int) -> list[list[MetricBatch]]:
    """Return intervals as a data worker hands them over."""
    return [
        [
            MetricBatch.from_metrics(
                Metric(column.dataset, column.name, value, column.aggregation)
                for column in columns
                for value in column.plain()
            )
            for columns in workload.interval(rank, number)
        ]
        * workload.repeats
        for number in range(INTERVALS)
    ]


@cache
def _frozen(workload: Workload, rank: int) -> list[list[list[FrozenMetric]]]:
    """Return intervals as batches of metrics."""
    return [
        [
            [
                FrozenMetric(column.dataset, column.name, value, Aggregation(column.aggregation))
                for column in columns
                for value in column.plain()
            ]
            for columns in workload.interval(rank, number)
        ]
        * workload.repeats
        for number in range(INTERVALS)
    ]
