"""torcheval: `sync_and_compute_collection`, which gathers each state of each metric by itself.

For a distribution there is `Cat`, which keeps all values and gathers them all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torcheval.metrics import Cat, Max, Mean, Metric, Min, Sum
from torcheval.metrics.toolkit import sync_and_compute_collection

from benchmarks.peers.peer import Peer, percentiles
from benchmarks.workloads import Column, Workload

__all__ = ["SyncAndCompute"]

_METRICS: dict[str, type[Metric[Any]]] = {
    "sum": Sum,
    "mean": Mean,
    "max": Max,
    "min": Min,
    "distribution": Cat,
}


class SyncAndCompute(Peer):
    """`sync_and_compute_collection` on a dict of metrics."""

    def __init__(self, workload: Workload, rank: int, floats: int) -> None:
        super().__init__(workload, rank, floats)
        self._metrics: dict[str, Metric[Any]] = {}

    def _add(self, column: Column, values: torch.Tensor) -> None:
        key = column.key
        if key not in self._metrics:
            self._metrics[key] = _METRICS[column.aggregation]()
        self._metrics[key].update(values)

    def log(self) -> Mapping[str, float]:
        logged: dict[str, float] = {}
        for key, value in sync_and_compute_collection(self._metrics).items():
            if isinstance(self._metrics[key], Cat):
                logged |= percentiles(key, value.numpy())
            else:
                logged[key] = value.item()
        for metric in self._metrics.values():
            metric.reset()
        return logged
