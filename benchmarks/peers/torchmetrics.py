"""torchmetrics: a `MetricCollection`, which gathers each state of each metric by itself.

For a distribution there is `CatMetric`, which keeps all values and gathers them all.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torchmetrics import (
    CatMetric,
    MaxMetric,
    MeanMetric,
    Metric,
    MetricCollection,
    MinMetric,
    SumMetric,
)

from benchmarks.peers.peer import Peer, percentiles
from benchmarks.workloads import Column, Workload

__all__ = ["MetricCollections"]

_METRICS: dict[str, type[Metric]] = {
    "sum": SumMetric,
    "mean": MeanMetric,
    "max": MaxMetric,
    "min": MinMetric,
    "distribution": CatMetric,
}


class MetricCollections(Peer):
    """`MetricCollection.compute`, which synchronises first."""

    def __init__(self, workload: Workload, rank: int, floats: int) -> None:
        super().__init__(workload, rank, floats)
        # Groups are for metrics that are all updated with the same values.
        self._collection = MetricCollection({}, compute_groups=False)

    def _add(self, column: Column, values: torch.Tensor) -> None:
        key = column.key
        if key not in self._collection:
            self._collection.add_metrics({key: _METRICS[column.aggregation]()})
        self._collection[key].update(values)

    def log(self) -> Mapping[str, float]:
        logged: dict[str, float] = {}
        for key, value in self._collection.compute().items():
            if isinstance(self._collection[key], CatMetric):
                logged |= percentiles(key, value.numpy())
            else:
                logged[key] = value.item()
        self._collection.reset()
        return logged
