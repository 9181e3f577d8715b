"""Lightning: `self.log(..., sync_dist=True)` in its Trainer, which reduces each number by itself.

A small model trains under DDP. At the end of an interval of steps every metric is logged: what this
rank has folded by hand, reduced over the ranks by the metric's own reduction. There is none for
percentiles; those of the ranks are averaged. A log lasts until the Trainer's `callback_metrics` have
every value.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from itertools import repeat
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from benchmarks.baselines import percentiles
from benchmarks.meter import Meter
from benchmarks.peers.contender import ByHand
from benchmarks.workloads import Column

_WIDTH = 8


class SelfLog(ByHand):
    keeps_recent = True
    _module: LightningModule

    def run(self, meter: Meter) -> None:
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        trainer = Trainer(
            accelerator="cpu",
            strategy="ddp",
            devices=torch.distributed.get_world_size(),
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        self._module = _Module(self, meter)
        trainer.fit(self._module, repeat(torch.ones(1, _WIDTH)))

    def log(self) -> Mapping[str, float]:
        """Call `self.log` for each metric, from a hook of the module."""
        for key, metric in self._running.items():
            if metric.aggregation == "distribution":
                values, by = percentiles(key, metric.values.numpy()), "mean"
            else:
                mean = metric.aggregation == "mean"
                values = {key: metric.total / metric.count if mean else metric.total}
                by = metric.aggregation
            for name, value in values.items():
                self._module.log(
                    name, value, reduce_fx=by, sync_dist=True, on_step=True, logger=False
                )
        self._running = {}
        metrics = self._module.trainer.callback_metrics
        return {key: value.item() for key, value in metrics.items()}


class _Module(LightningModule):
    """A small model that tells a contender when an interval has ended."""

    def __init__(self, contender: SelfLog, meter: Meter) -> None:
        super().__init__()
        self.layer = nn.Linear(_WIDTH, 1)
        self._contender = contender
        self._meter = meter
        self._batches: Iterator[list[Column]] = iter(())
        self._steps = 0

    def on_train_batch_start(self, batch: torch.Tensor, batch_idx: int) -> int | None:
        if self._steps == 0:
            if not self._meter.wants_more():
                return -1  # ends the epoch
            self._steps, self._batches = self._contender.steps, self._contender.batches()
        return None

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self._contender.take(next(self._batches))
        self._steps -= 1
        return self.layer(batch).square().mean()

    def on_train_batch_end(self, outputs: Any, batch: torch.Tensor, batch_idx: int) -> None:
        if self._steps == 0:
            self._meter.take(self._contender.log)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)
