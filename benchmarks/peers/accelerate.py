"""Accelerate: `gather_for_metrics`, which gathers each tensor that it is given by itself.

Scalars are folded on each rank by hand first. Of a distribution all values are gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from accelerate import Accelerator

from benchmarks.baselines import percentiles
from benchmarks.peers.contender import ByHand, Running
from benchmarks.workloads import Workload

_COMBINE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sum": torch.sum,
    "mean": lambda rows: rows[:, 0].sum() / rows[:, 1].sum(),
    "max": torch.max,
    "min": torch.min,
}


class GatherForMetrics(ByHand):
    def __init__(self, workload: Workload, rank: int, floats: int) -> None:
        super().__init__(workload, rank, floats)
        self._accelerator = Accelerator(cpu=True)

    def log(self) -> Mapping[str, float]:
        running = self._running
        gathered = self._accelerator.gather_for_metrics(
            {key: _tensor(metric) for key, metric in running.items()}
        )
        logged: dict[str, float] = {}
        for key, metric in running.items():
            if metric.aggregation == "distribution":
                logged |= percentiles(key, gathered[key].numpy())
            else:
                logged[key] = _COMBINE[metric.aggregation](gathered[key]).item()
        self._running = {}
        return logged


def _tensor(metric: Running) -> torch.Tensor:
    if metric.aggregation == "distribution":
        return metric.values
    if metric.aggregation == "mean":
        # Sum and count travel together, one row a rank.
        return torch.tensor([[metric.total.item(), float(metric.count)]], dtype=torch.float64)
    return metric.total
