"""What contenders have in common whose library takes in torch tensors."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, repeat
from typing import Any, ClassVar

import torch

from benchmarks.baselines import percentiles
from benchmarks.contenders import Contender
from benchmarks.workloads import INTERVALS, Column, Workload

AGGREGATIONS = ("sum", "mean", "max", "min", "distribution")


class Peer(Contender):
    """Takes in an interval batch by batch, as float32 tensors, which is what training has."""

    def __init__(self, workload: Workload, rank: int, floats: int) -> None:
        self._intervals = [list(workload.interval(rank, number)) for number in range(INTERVALS)]
        self._repeats = workload.repeats
        self._window = workload.window
        self.steps = len(self._intervals[0]) * workload.repeats

    def feed(self) -> None:
        for columns in self.batches():
            self.take(columns)

    def batches(self) -> Iterator[list[Column]]:
        """Return the batches of the next interval, `steps` of them."""
        batches = self._intervals[self.fed % INTERVALS]
        self.fed += 1
        return chain.from_iterable(repeat(batches, self._repeats))

    def take(self, columns: list[Column]) -> None:
        """Take in one batch."""
        for column in columns:
            # A tensor of its own for each batch, as training makes them.
            self._add(column, torch.tensor(column.values, dtype=torch.float32))

    @abstractmethod
    def _add(self, column: Column, values: torch.Tensor) -> None:
        """Take in the values of one metric."""


class Modules(Peer):
    """A library that has a class for each aggregation, and for a distribution one that keeps all.

    Attributes:
        kinds: these classes, in the order of `AGGREGATIONS`.
        collection: makes what holds metrics by key.
    """

    kinds: ClassVar[Sequence[Callable[[], Any]]]
    collection: ClassVar[Callable[[], Any]] = dict

    def __init__(self, workload: Workload, rank: int, floats: int) -> None:
        super().__init__(workload, rank, floats)
        self.metrics = self.collection()

    def _add(self, column: Column, values: torch.Tensor) -> None:
        if column.key not in self.metrics:
            self.metrics[column.key] = self.kinds[AGGREGATIONS.index(column.aggregation)]()
        self.metrics[column.key].update(values)

    def log(self) -> Mapping[str, float]:
        logged: dict[str, float] = {}
        for key, value in self.computed().items():
            if isinstance(self.metrics[key], self.kinds[-1]):
                logged |= percentiles(key, value.numpy())
            else:
                logged[key] = value.item()
        for metric in self.metrics.values():
            metric.reset()
        return logged

    @abstractmethod
    def computed(self) -> Mapping[str, torch.Tensor]:
        """Return what the ranks' values come to."""


@dataclass(slots=True)
class Running:
    """One metric on this rank since the last log; a distribution keeps so many recent values, or all."""

    aggregation: str
    keep: int | None = None
    total: torch.Tensor = field(default_factory=lambda: torch.tensor(0.0, dtype=torch.float64))
    count: int = 0
    values: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    def add(self, values: torch.Tensor) -> None:
        if self.aggregation == "distribution":
            self.values = torch.cat((self.values, values))[-(self.keep or 0) :]
        elif self.aggregation == "max":
            self.total = torch.maximum(self.total, values.max()) if self.count else values.max()
        elif self.aggregation == "min":
            self.total = torch.minimum(self.total, values.min()) if self.count else values.min()
        else:
            self.total = self.total + values.sum(dtype=torch.float64)
        self.count += values.numel()


class ByHand(Peer):
    """A library that moves numbers alone, which each rank has folded since the last log.

    Attributes:
        keeps_recent: whether a distribution keeps the workload's window, or else all.
    """

    keeps_recent = False

    def __init__(self, workload: Workload, rank: int, floats: int) -> None:
        super().__init__(workload, rank, floats)
        self._running: dict[str, Running] = {}

    def _add(self, column: Column, values: torch.Tensor) -> None:
        if column.key not in self._running:
            keep = self._window if self.keeps_recent else None
            self._running[column.key] = Running(column.aggregation, keep)
        self._running[column.key].add(values)
