"""torchmetrics: a `MetricCollection`, which gathers each state of each metric by itself."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import ClassVar

import torch
from torchmetrics import CatMetric, MaxMetric, MeanMetric, MetricCollection, MinMetric, SumMetric

from benchmarks.peers.contender import Modules


class MetricCollections(Modules):
    kinds: ClassVar = (SumMetric, MeanMetric, MaxMetric, MinMetric, CatMetric)
    # Groups are for metrics that are all updated with the same values.
    collection: ClassVar = partial(MetricCollection, {}, compute_groups=False)

    def computed(self) -> Mapping[str, torch.Tensor]:
        return self.metrics.compute()
