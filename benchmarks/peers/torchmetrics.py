"""torchmetrics: a `MetricCollection`, which gathers each state of each metric by itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torchmetrics import CatMetric, MaxMetric, MeanMetric, MetricCollection, MinMetric, SumMetric

from benchmarks.peers.contender import Modules
from benchmarks.workloads import Column, Workload

__all__ = ["MetricCollections"]


class MetricCollections(Modules):
    """`MetricCollection.compute`, which synchronises first."""

    kinds: ClassVar = {
        "sum": SumMetric,
        "mean": MeanMetric,
        "max": MaxMetric,
        "min": MinMetric,
        "distribution": CatMetric,
    }

    def __init__(self, workload: Workload, rank: int, floats: int) -> None:
        super().__init__(workload, rank, floats)
        # Groups are for metrics that are all updated with the same values.
        self.metrics = MetricCollection({}, compute_groups=False)

    def _add(self, column: Column, values: torch.Tensor) -> None:
        if column.key not in self.metrics:
            self.metrics.add_metrics({column.key: self.kinds[column.aggregation]()})
        super()._add(column, values)

    def computed(self) -> Mapping[str, torch.Tensor]:
        return self.metrics.compute()
