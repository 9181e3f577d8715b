"""What the metrics of a step cost while they stay on the device: PyTorch, one process.

On a GPU where there is one, else on the CPU, where the host waits for everything anyway: there
``loss.item()`` is nearly free, and what shows is the work of each way, not the waiting it spares.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - its name everywhere

from benchmarks.sizes import QUICK, Sizes
from benchmarks.table import Section, cost, speedup
from benchmarks.timing import interleaved
from metricfold import MetricsAggregator
from metricfold.demo.model import ByteTransformer
from metricfold.torch import DeviceAccumulator

__all__ = ["measure"]

_METRICS, _DATASETS, _SAMPLES = 10, 8, 32
_NAMES = [f"metric_{i}" for i in range(_METRICS)]
_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def measure(sizes: Sizes) -> list[Section]:
    """Return what metrics cost by themselves, and what they add to a training step."""
    return [_updates(sizes), _steps(sizes)]


def _updates(sizes: Sizes) -> Section:
    section = Section(
        f"torch, {_DEVICE}: {_METRICS} means of {_SAMPLES} samples from {_DATASETS} datasets"
    )
    values = torch.rand(_METRICS, _SAMPLES, device=_DEVICE)
    ids = torch.randint(0, _DATASETS, (_SAMPLES,), device=_DEVICE)
    ways: dict[str, Callable[[], object]] = {
        "update": _accumulating(values, ids),
        "together": _accumulating_together(values, ids),
        "scatter": _scattering(values, ids),
        "item": values[0, 0].item,
    }
    if sizes is not QUICK:  # the compiler alone takes half a minute
        ways["compiled"] = torch.compile(_accumulating_together(values, ids), fullgraph=True)
    if find_spec("torchmetrics"):
        ways["torchmetrics"] = _updating_modules(values, ids)
    else:
        section.notes.append("torchmetrics is not installed")
    times = interleaved({name: _finished(way) for name, way in ways.items()}, sizes.rounds)
    for name, what in (
        ("update", "DeviceAccumulator.update of each"),
        ("together", "DeviceAccumulator.update_all"),
        ("compiled", "the same in torch.compile"),
    ):
        if name not in times:
            continue
        section.rows += [
            cost(what, times[name], "a plain scatter_add of sums and counts", times["scatter"]),
            cost(what, times[name], "one loss.item()", times["item"]),
        ]
        if "torchmetrics" in times:
            against = "a torchmetrics MeanMetric per dataset"
            section.rows.append(speedup(what, times[name], against, times["torchmetrics"]))
    return section


def _steps(sizes: Sizes) -> Section:
    section = Section(f"torch, {_DEVICE}: a step of the demo's model, 4 texts of 64 bytes")
    ways = {name: _finished(_training(keep)) for name, keep in _keeping().items()}
    times = interleaved(ways, sizes.rounds)
    bare = "the step without metrics"
    section.rows = [
        cost(name, found, bare, times[bare]) for name, found in times.items() if name != bare
    ]
    return section


def _accumulating(values: Tensor, ids: Tensor) -> Callable[[], None]:
    accumulator = _accumulator(_NAMES)

    def run() -> None:
        for row, name in enumerate(_NAMES):
            accumulator.update(name, values[row], dataset_ids=ids)

    return run


def _accumulating_together(values: Tensor, ids: Tensor) -> Callable[[], None]:
    accumulator = _accumulator(_NAMES)

    def run() -> None:
        accumulator.update_all(dict(zip(_NAMES, values, strict=True)), dataset_ids=ids)

    return run


def _accumulator(names: list[str]) -> DeviceAccumulator:
    datasets = [f"dataset_{i}" for i in range(_DATASETS)]
    return DeviceAccumulator(dict.fromkeys(names, "mean"), datasets, device=_DEVICE)


def _scattering(values: Tensor, ids: Tensor) -> Callable[[], None]:
    sums, counts = torch.zeros(2, _METRICS, _DATASETS, device=_DEVICE)
    ones = torch.ones(_SAMPLES, device=_DEVICE)

    def run() -> None:
        for row in range(_METRICS):
            sums[row].scatter_add_(0, ids, values[row])
            counts[row].scatter_add_(0, ids, ones)

    return run


def _updating_modules(values: Tensor, ids: Tensor) -> Callable[[], None]:
    from torchmetrics import MeanMetric

    modules = [[MeanMetric().to(_DEVICE) for _ in range(_DATASETS)] for _ in range(_METRICS)]

    def run() -> None:
        for row, of_datasets in zip(values, modules, strict=True):
            for dataset, module in enumerate(of_datasets):
                module.update(row[ids == dataset])

    return run


_Keep = Callable[[Tensor, Tensor, Tensor], Any]
"""Takes logits, labels and dataset ids, and returns the loss."""


def _keeping() -> dict[str, _Keep]:
    """Return the ways to keep the loss of each dataset, and the plain step."""
    accumulator, aggregator = _accumulator(["loss"]), MetricsAggregator()

    def plain(logits: Tensor, labels: Tensor, ids: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    def recorded(logits: Tensor, labels: Tensor, ids: Tensor) -> Tensor:
        loss = plain(logits, labels, ids)
        aggregator.record("loss", loss, weight=labels.numel())
        return loss

    def waiting(logits: Tensor, labels: Tensor, ids: Tensor) -> Tensor:
        loss = plain(logits, labels, ids)
        loss.item()
        return loss

    def waiting_for_each(logits: Tensor, labels: Tensor, ids: Tensor) -> Tensor:
        losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        for dataset in range(_DATASETS):
            losses[ids == dataset].sum().item()
        return losses.mean()

    return {
        "the step without metrics": plain,
        "token_loss: the loss of each dataset": accumulator.token_loss,
        "aggregator.record of the loss": recorded,
        "loss.item()": waiting,
        "item() of each dataset's losses": waiting_for_each,
    }


def _training(keep: _Keep) -> Callable[[], None]:
    torch.manual_seed(0)
    model = ByteTransformer().to(_DEVICE)
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.randint(0, 256, (4, 65), device=_DEVICE)
    ids = torch.arange(4, device=_DEVICE)

    def run() -> None:
        loss = keep(model(tokens[:, :-1]), tokens[:, 1:], ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return run


def _finished(way: Callable[[], object]) -> Callable[[], None]:
    """Return `way`, with a wait for the device, as an honest clock needs."""

    def run() -> None:
        way()
        if _DEVICE == "cuda":
            torch.cuda.synchronize()

    return run
