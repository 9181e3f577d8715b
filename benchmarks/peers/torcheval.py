"""torcheval: `sync_and_compute_collection`, which gathers each state of each metric by itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torcheval.metrics import Cat, Max, Mean, Min, Sum
from torcheval.metrics.toolkit import sync_and_compute_collection

from benchmarks.peers.contender import Modules


class SyncAndCompute(Modules):
    kinds: ClassVar = (Sum, Mean, Max, Min, Cat)

    def computed(self) -> Mapping[str, torch.Tensor]:
        return sync_and_compute_collection(self.metrics)
