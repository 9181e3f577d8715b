"""How often the host waits for the device between two logs; `gpu_check` asks a GPU itself."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.table import Section, amount, at_most
from metricfold import MetricsAggregator
from metricfold.torch import DeviceAccumulator

_WAITING = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2")
"""Operations whose result, or its size, the host has to know."""


class _Waits(TorchDispatchMode):
    """Counts the operations for which the host waits, on any device."""

    counted = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.counted += func.overloadpacket.__name__ in _WAITING
        return func(*args, **(kwargs or {}))


def measure(*, quick: bool) -> list[Section]:
    """Return how many operations of several steps wait."""
    accumulator, aggregator = DeviceAccumulator({"loss": "mean"}, ["a", "b"]), MetricsAggregator()
    losses, ids = torch.rand(32), torch.arange(32) % 2
    with _Waits() as waits:
        for _ in range(10):
            accumulator.update("loss", losses, dataset_ids=ids)
            aggregator.record("loss", losses.mean(), weight=32)
        waited = waits.counted
        losses.sum().item()
    if waits.counted != waited + 1:
        raise AssertionError("an item() was not counted as waiting")
    row = amount("torch, 10 steps", waited, "", budget=at_most(0))
    return [Section("Waits for the device between two logs", [row])]
