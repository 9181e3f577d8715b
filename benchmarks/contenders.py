"""What can log over ranks: ours, and whatever it is compared with.

A contender takes in the intervals of a `Workload` (`feed`, not timed) and reduces them over all
ranks (`log`, timed). To compare with one more library, write such a class and add it to
`CONTENDERS`; a budget for it goes to `reduction`.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.baselines import Aggregation, FrozenMetric, MetricStates
from benchmarks.workloads import Workload
from metricfold import Metric, MetricBatch, MetricsAggregator
from metricfold.communicator import Communicator, connect

__all__ = [
    "BARE",
    "CONTENDERS",
    "DICT",
    "GATHER",
    "PICKLED",
    "REDUCE",
    "Contender",
    "Listed",
    "Metricfold",
]

_INTERVALS = 3
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
    """

    @abstractmethod
    def __init__(self, workload: Workload, rank: int, floats: int) -> None: ...

    @abstractmethod
    def feed(self) -> None:
        """Take in the values of one interval."""

    @abstractmethod
    def log(self) -> None:
        """Reduce what came in over all ranks."""

    def facts(self) -> dict[str, float]:
        """Return what else is worth knowing about the logs made so far."""
        return {}


class Metricfold(Contender):
    """`MetricsAggregator.reduce`."""

    prints = False

    def __init__(self, workload: Workload, rank: int, floats: int) -> None:
        self._rank = rank
        self._wire = Stopwatch(connect(f"{type(self).__name__} {workload.title}", None, None, 0))
        self.aggregator = MetricsAggregator(workload.window or 1, communicator=self._wire)
        self._intervals = _folded(workload, rank)
        self._phases: list[tuple[float, float, float]] = []
        self._turn = 0
        # Two logs bring the schema and its capacities to where they stay.
        for _ in range(2):
            self.feed()
            self.aggregator.reduce()
        self._steady = self.aggregator.collectives

    @property
    def floats(self) -> int:
        return self._wire.floats

    def feed(self) -> None:
        for batch in self._intervals[self._turn % _INTERVALS]:
            self.aggregator.update(batch)
        self._turn += 1

    def log(self) -> None:
        started = time.perf_counter()
        snapshot = self.aggregator.reduce()
        ended = time.perf_counter()
        entered, left = self._wire.entered, self._wire.left
        self._phases.append((entered - started, left - entered, ended - left))
        if self.prints and self._rank == 0:
            snapshot.as_dict("train")

    def facts(self) -> dict[str, float]:
        logs = len(self._phases)
        pack, gather, merge = np.median(np.array(self._phases), axis=0).tolist()
        return {
            "collectives": (self.aggregator.collectives - self._steady) / logs,
            "pack": pack,
            "gather": gather,
            "merge": merge,
        }


class MetricfoldDict(Metricfold):
    """The same, and rank 0 turns the snapshot into a dict."""

    prints = True


class BareAllReduce(Contender):
    """What no reduction over ranks can avoid: one all-reduce of as many numbers."""

    def __init__(self, workload: Workload, rank: int, floats: int) -> None:
        self._payloads = [
            torch.from_numpy(np.random.default_rng((rank, number)).normal(size=floats))
            for number in range(_INTERVALS)
        ]
        self._vector = torch.zeros(floats, dtype=torch.float64)
        self._turn = 0

    def feed(self) -> None:
        self._vector.copy_(self._payloads[self._turn % _INTERVALS])
        self._turn += 1

    def log(self) -> None:
        dist.all_reduce(self._vector)


class BareAllGather(BareAllReduce):
    """The collective that `reduce` is made of, alone: the rest of its time is our own."""

    def __init__(self, workload: Workload, rank: int, floats: int) -> None:
        super().__init__(workload, rank, floats)
        self._rows = torch.zeros(floats * dist.get_world_size(), dtype=torch.float64)

    def log(self) -> None:
        # The group's method, as newer versions of torch rename the public function.
        dist.group.WORLD._allgather_base(self._rows, self._vector).wait()


class PickledStates(Contender):
    """One `all_gather_object` of all state objects, and a merge of them on every rank."""

    finalise = False
    prints = False

    def __init__(self, workload: Workload, rank: int, floats: int) -> None:
        self._rank = rank
        self._states = MetricStates(workload.window or 1, finalise=self.finalise)
        self._intervals = _frozen(workload, rank)
        self._turn = 0

    def feed(self) -> None:
        self._states.update(self._intervals[self._turn % _INTERVALS])
        self._turn += 1

    def log(self) -> None:
        of_ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(of_ranks, self._states.local())
        merged = self._states.combine(of_ranks)
        if self.prints and self._rank == 0:
            self._states.report(merged, "train")


class PickledStatesDict(PickledStates):
    """The same, and rank 0 turns the states into a dict."""

    prints = True


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
    """Another communicator, and when its last all-gather began and ended."""

    def __init__(self, inner: Communicator) -> None:
        self._inner = inner
        self.rank = inner.rank
        self.world_size = inner.world_size
        self.entered = self.left = 0.0
        self.floats = 0

    def _all_gather(self, vector: Any) -> Any:
        self.floats = vector.size
        self.entered = time.perf_counter()
        rows = self._inner.all_gather(vector)
        self.left = time.perf_counter()
        return rows

    def _all_reduce(self, vector: Any, op: Literal["sum", "max"]) -> Any:
        return self._inner.all_reduce(vector, op)


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
        for number in range(_INTERVALS)
    ]


@cache
def _frozen(workload: Workload, rank: int) -> list[list[FrozenMetric]]:
    """Return intervals as lists of metrics."""
    return [
        [
            FrozenMetric(column.dataset, column.name, value, Aggregation(column.aggregation))
            for columns in workload.interval(rank, number)
            for column in columns
            for value in column.plain()
        ]
        for number in range(_INTERVALS)
    ]
