"""What can log over ranks: ours, and what needs no other package; `peers` has other libraries.

A contender takes in the intervals of a `Workload` (`feed`, not timed) and reduces them over all
ranks (`log`, timed).
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.meter import Meter
from benchmarks.workloads import INTERVALS, Workload, batches
from metricfold import MetricsAggregator, Snapshot
from metricfold._core.fold.sample import FloatArray
from metricfold.communicator import Communicator, connect
from metricfold.communicator.tree import Merge


class Contender(ABC):
    """Something that reduces metrics over ranks; told of `floats`, the size of our vector in float64.

    Attributes:
        fed: how many intervals it has taken in; they come round after `INTERVALS`.
        floats: size of its own vector in float64, if it is ours.
    """

    fed = 0
    floats = 0

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
            meter.take(self.log)


class Metricfold(Contender):
    """`MetricsAggregator.reduce`.

    Attributes:
        snapshot: what the last log returned.
        own: CPU seconds of this process in each log, without those in its collectives.
    """

    snapshot: Snapshot

    def __init__(
        self,
        workload: Workload,
        rank: int,
        floats: int = 0,
        route: str = "auto",
        wire: Watched | None = None,
    ) -> None:
        self._workload, self._rank = workload, rank
        self._wire = wire or Watched(connect(f"{workload.title} {route}", None, None, 0))
        self.aggregator = MetricsAggregator(workload.window, communicator=self._wire, route=route)
        self.own: list[float] = []

    def feed(self) -> None:
        for batch in batches(self._workload, self._rank, self.fed):
            self.aggregator.update(batch)
        self.fed += 1

    def log(self) -> Mapping[str, float]:
        self._wire.begin()
        began = time.process_time()
        self.snapshot = self.aggregator.reduce()
        self.own.append(time.process_time() - began - self._wire.seconds)
        self.floats = self._wire.floats
        return {}


class MetricfoldEverywhere(Metricfold):
    """The same, and every rank turns the interval into a dict, needed or not."""

    def log(self) -> Mapping[str, float]:
        super().log()
        return self.snapshot.as_dict("train", "interval")


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


class Watched(Communicator):
    """Another communicator, how much went in, and the CPU seconds that passed in there."""

    def __init__(self, inner: Communicator) -> None:
        self._inner = inner
        self.rank, self.world_size = inner.rank, inner.world_size
        self.begin()

    def begin(self) -> None:
        """Begin another log."""
        self.seconds = 0.0
        self.floats = 0

    def _all_gather(self, vector: FloatArray) -> FloatArray:
        return self._timed(vector, lambda: self._inner.all_gather(vector))

    def _tree(self, vector: FloatArray, merge: Merge) -> FloatArray:
        return self._timed(vector, lambda: self._inner.tree(vector, merge))

    def _timed(self, vector: FloatArray, collective: Callable[[], FloatArray]) -> FloatArray:
        began = time.process_time()
        self.floats += vector.size
        result = collective()
        self.seconds += time.process_time() - began
        return result
