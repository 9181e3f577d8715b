"""What metrics cost while they stay on the device: PyTorch, one process, and that nobody waits for it.

On a GPU where there is one, else on the CPU, where the host waits for everything anyway: there
``loss.item()`` is nearly free, and what shows is the work of each way, not the waiting it spares.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.table import Row, Section, amount, at_most, cost, speedup
from benchmarks.timing import interleaved
from metricfold import MetricsAggregator
from metricfold.torch import DeviceAccumulator

_METRICS, _DATASETS, _SAMPLES = 10, 8, 32
_NAMES = [f"metric_{i}" for i in range(_METRICS)]
_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_WAITING = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2")
"""Operations whose result, or its size, the host has to know."""


def measure(*, quick: bool) -> list[Section]:
    """Return what metrics cost by themselves, and how often the host waits between two logs."""
    section = Section(
        f"torch, {_DEVICE}: {_METRICS} means of {_SAMPLES} samples from {_DATASETS} datasets"
    )
    values = torch.rand(_METRICS, _SAMPLES, device=_DEVICE)
    ids = torch.randint(0, _DATASETS, (_SAMPLES,), device=_DEVICE)
    of_each = _accumulator()

    def each() -> None:
        for name, row in zip(_NAMES, values, strict=True):
            of_each.update(name, row, dataset_ids=ids)

    ways: dict[str, Callable[[], object]] = {
        "update": each,
        "together": _together(values, ids),
        "scatter": _scattering(values, ids),
        "item": values[0, 0].item,
    }
    if not quick:  # the compiler alone takes half a minute
        ways["compiled"] = torch.compile(_together(values, ids), fullgraph=True)
    if find_spec("torchmetrics"):
        ways["torchmetrics"] = _updating_modules(values, ids)
    finished = {name: _finished(way) for name, way in ways.items()}
    times = interleaved(finished, 3 if quick else 25)
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
    section.rows.append(_waits(values, ids))
    return [section]


class _Waits(TorchDispatchMode):
    """Counts the operations for which the host waits, on any device."""

    counted = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.counted += func.overloadpacket.__name__ in _WAITING
        return func(*args, **(kwargs or {}))


def _waits(values: Tensor, ids: Tensor) -> Row:
    accumulator, aggregator = _accumulator(), MetricsAggregator()
    with _Waits() as waits:
        for _ in range(10):
            accumulator.update_all(dict(zip(_NAMES, values, strict=True)), dataset_ids=ids)
            aggregator.record("loss", values[0].mean(), weight=_SAMPLES)
    return amount("waits for the device between two logs", waits.counted, "", budget=at_most(0))


def _accumulator() -> DeviceAccumulator:
    datasets = [f"dataset_{i}" for i in range(_DATASETS)]
    return DeviceAccumulator(dict.fromkeys(_NAMES, "mean"), datasets, device=_DEVICE)


def _together(values: Tensor, ids: Tensor) -> Callable[[], None]:
    accumulator = _accumulator()

    def run() -> None:
        accumulator.update_all(dict(zip(_NAMES, values, strict=True)), dataset_ids=ids)

    return run


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


def _finished(way: Callable[[], object]) -> Callable[[], None]:
    """Return `way`, with a wait for the device, as an honest clock needs."""

    def run() -> None:
        way()
        if _DEVICE == "cuda":
            torch.cuda.synchronize()

    return run
