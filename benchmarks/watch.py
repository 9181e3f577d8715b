"""What it costs to watch a model: a step when it is due, and when it is not, for 1,008 parameters."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn

from benchmarks.table import Budget, Row, Section, at_most, cost
from benchmarks.timing import interleaved
from metricfold import MetricsAggregator
from metricfold.torch import ModelWatch

_NEVER = 10**9


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
    ways: dict[str, tuple[dict[str, object], Budget | None]] = {
        "not due": ({"every": _NEVER}, at_most(1.02)),
        "gradients": ({"params": False}, None),
        "gradients, octaves": ({"params": False, "octaves": True}, None),
        "gradients, parameters and updates": ({"updates": True}, None),
        "replicas alone": ({"params": False, "grads": False, "replicas": True}, None),
    }
    if compiled:
        ways["gradients, compiled"] = ({"params": False, "compiled": True}, at_most(1.1))
        settings = {"params": False, "octaves": True, "compiled": True}
        ways["gradients, octaves, compiled"] = (settings, at_most(1.15))
        ways["gradients and parameters, compiled"] = ({"compiled": True}, None)
    steps: dict[str, Callable[[], object]] = {"alone": Trained(layers).step}
    for name, (settings, _) in ways.items():
        trained = Trained(layers)
        ModelWatch(trained.model, trained.optimizer, **settings)  # type: ignore[arg-type]
        steps[name] = trained.step
    for step in steps.values():
        step()
    times = interleaved(steps, rounds, calls_per_turn=1, clock=time.process_time)
    return [
        cost(name, times[name], "the step alone", times["alone"], budget)
        for name, (_, budget) in ways.items()
    ]


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
