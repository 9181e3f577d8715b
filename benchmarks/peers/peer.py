"""What contenders have in common whose library takes in torch tensors."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from itertools import chain, repeat

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.contenders import INTERVALS, Contender
from benchmarks.workloads import Column, Workload

__all__ = ["PERCENTILES", "Peer", "percentiles"]

PERCENTILES = (5, 50, 95)


class Peer(Contender):
    """Takes in an interval batch by batch, as float32 tensors, which is what training has."""

    def __init__(self, workload: Workload, rank: int, floats: int) -> None:
        self._intervals = [list(workload.interval(rank, number)) for number in range(INTERVALS)]
        self._repeats = workload.repeats
        self._window = workload.window

    def feed(self) -> None:
        for columns in self.batches():
            self.take(columns)

    @property
    def steps(self) -> int:
        """How many batches an interval has."""
        return len(self._intervals[0]) * self._repeats

    def batches(self) -> Iterator[list[Column]]:
        """Return the batches of the next interval."""
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


def percentiles(key: str, values: npt.NDArray[np.float32]) -> Mapping[str, float]:
    """Return the percentiles of `values` as a log calls them."""
    found = np.percentile(values, PERCENTILES).tolist()
    return {f"{key}_stat_p{p:02d}": value for p, value in zip(PERCENTILES, found, strict=True)}
