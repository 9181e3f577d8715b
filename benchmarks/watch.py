"""What it costs to watch a model: a step when it is due, and when it is not, for 1,008 parameters."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.table import Row, Section, at_most, cost
from benchmarks.timing import interleaved
from metricfold import MetricsAggregator
from metricfold.torch import ModelWatch

_NEVER = 10**9
_BUDGETS = {
    "not due": at_most(1.02),
    "gradients, compiled": at_most(1.1),
    "gradients, octaves, compiled": at_most(1.15),
}


def measure(*, quick: bool) -> list[Section]:
    """Return how long a step takes with a watch, and a log of it, against a step alone: CPU time."""
    layers, rounds = (4, 3) if quick else (84, 15)
    section = Section(f"a watched step: {12 * layers:,} parameters of a transformer, AdamW")
    section.rows = [*_steps(layers, rounds, compiled=not quick), *_log(layers, rounds)]
    return [section]


class Trained:
    """A small transformer, whose step is about its parameters' number rather than their size."""

    def __init__(self, layers: int, width: int = 16, device: str = "cpu") -> None:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True, dropout=0.0)
        self.model = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), foreach=True)
        self.x = torch.randn(2, 16, width).to(device)

    def step(self) -> None:
        self.model(self.x).pow(2).mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def _steps(layers: int, rounds: int, *, compiled: bool) -> list[Row]:
    ways: dict[str, dict[str, Any]] = {
        "not due": {"every": _NEVER},
        "gradients": {"params": False},
        "gradients, octaves": {"params": False, "octaves": True},
        "gradients, parameters and updates": {"updates": True},
        "replicas alone": {"params": False, "grads": False, "replicas": True},
    }
    if compiled:
        ways |= {
            f"{name}, compiled": {**ways[name], "compiled": True}
            for name in ("gradients", "gradients, octaves")
        }
        ways["gradients and parameters, compiled"] = {"compiled": True}
    steps: dict[str, Callable[[], object]] = {"alone": Trained(layers).step}
    for name, settings in ways.items():
        trained = Trained(layers)
        ModelWatch(trained.model, trained.optimizer, **settings)
        steps[name] = trained.step
    for step in steps.values():
        step()
    times = interleaved(steps, rounds, calls_per_turn=1, clock=time.process_time)
    alone = "the step alone", times["alone"]
    return [cost(name, times[name], *alone, _BUDGETS.get(name)) for name in ways]


def _log(layers: int, rounds: int) -> list[Row]:
    """Return what a drain and a reduction of it take, on one rank."""
    trained, aggregator = Trained(layers), MetricsAggregator()
    watch = ModelWatch(trained.model, trained.optimizer)

    def log() -> None:
        trained.step()
        aggregator.drain(watch)
        aggregator.reduce().as_dict("train", "auto")

    log()
    ways = {"watched": trained.step, "logged": log}
    times = interleaved(ways, rounds, calls_per_turn=1, clock=time.process_time)
    return [cost("a due step with its log", times["logged"], "without", times["watched"])]
