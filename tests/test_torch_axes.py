"""Metrics with axes that accumulate on a device say of each cell what a plain metric of it would."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from metricfold import MetricsAggregator, Snapshot
from metricfold.torch import DeviceAccumulator

AXES = {"layer": 3, "expert": 4}
NAMES = ("web", "code")
KINDS = ("sum", "mean", "max", "min")
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.uint8)


@pytest.fixture
def warned() -> Iterator[list[str]]:
    """Yield what metricfold warns of."""
    texts: list[str] = []

    class Heard(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            texts.append(record.getMessage())

    heard = Heard()
    logging.getLogger("metricfold").addHandler(heard)
    yield texts
    logging.getLogger("metricfold").removeHandler(heard)


def drained(*accumulators: DeviceAccumulator) -> Snapshot:
    aggregator = MetricsAggregator()
    for acc in accumulators:
        aggregator.drain(acc)
    return aggregator.reduce()


def cells(
    snapshot: Snapshot, dataset: str | None, name: str, kind: str = "sum"
) -> np.ndarray[Any, Any]:
    values = snapshot.array(dataset, name)[0]
    return np.where(np.isnan(values), 0.0, values) if kind == "sum" else values


class Truth:
    """The same values, recorded one by one, a plain metric for each cell."""

    def __init__(self) -> None:
        self.aggregator = MetricsAggregator(None)
        self.known: set[tuple[str | None, str]] = set()

    def record(
        self, kind: str, values: Any, weights: Any, datasets: Any, layers: Any, experts: Any
    ) -> None:
        columns = (values, weights, datasets, layers, experts)
        for value, weight, dataset, layer, expert in zip(
            *(column.reshape(-1).tolist() for column in columns), strict=True
        ):
            inside = 0 <= dataset < 2 and 0 <= layer < 3 and 0 <= expert < 4
            if inside and weight:
                key = NAMES[dataset], f"{kind}.{layer}.{expert}"
                self.known.add(key)
                weight = weight if kind == "mean" else 1.0
                self.aggregator.record(key[1], value, kind, dataset=key[0], weight=weight)

    def cells(self, snapshot: Snapshot, dataset: str, kind: str) -> np.ndarray[Any, Any]:
        """Return what is known of each cell of a dataset."""
        found = np.full((3, 4), 0.0 if kind == "sum" else math.nan)
        for layer, expert in product(range(3), range(4)):
            if (dataset, f"{kind}.{layer}.{expert}") in self.known:
                found[layer, expert] = snapshot.value(dataset, f"{kind}.{layer}.{expert}")
        return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weighing", ["none", "mask", "weights"])
def test_any_cell_is_what_its_values_recorded_one_by_one_are(kind: str, weighing: str) -> None:
    rng = np.random.default_rng(KINDS.index(kind))
    acc = DeviceAccumulator({"plain": "mean", kind: (kind, "layer", "expert")}, NAMES, axes=AXES)
    truth = Truth()
    everything = torch.arange(3).view(3, 1), torch.arange(4)
    for turn, dtype in enumerate(DTYPES * 2):
        # What ids name: both axes, one, the other, or none; as one place or as one for each value.
        layer_last, expert_last = turn % 4 in (2, 3), turn % 4 in (1, 3)
        shape = (5, 2, *((3,) if layer_last else ()), *((4,) if expert_last else ()))
        values = torch.from_numpy(rng.integers(0, 100, shape) / 4.0).to(dtype)
        if dtype.is_floating_point and kind != "sum":
            values.view(-1)[rng.integers(values.numel())] = rng.choice([math.nan, -math.inf])
        datasets = torch.from_numpy(rng.integers(-1, 3, 5))
        ids: dict[str, Any] = {}
        if not layer_last:
            ids["layer"] = (
                1 if turn > 6 else torch.from_numpy(rng.integers(-1, 4, 5)).to(torch.int32)
            )
        if not expert_last:
            ids["expert"] = torch.from_numpy(rng.integers(-2, 6, shape))
        weights: Any = None
        if weighing != "none":
            weights = torch.from_numpy(rng.integers(0, 3, shape))
            weights = weights > 0 if weighing == "mask" else weights.double()
        acc.update(kind, values, ids=ids, dataset_ids=datasets, weights=weights)

        def wide(given: Any, shape: tuple[int, ...] = shape) -> torch.Tensor:
            tensor = torch.as_tensor(given)
            if tensor.ndim == 1 and len(tensor) == 5:
                tensor = tensor.view(5, *(1 for _ in shape[1:]))
            return tensor.expand(shape)

        last_layer = everything[0] if expert_last else everything[0].view(3)
        truth.record(
            kind,
            values,
            wide(1 if weights is None else weights),
            wide(datasets),
            wide(ids.get("layer", last_layer)),
            wide(ids.get("expert", everything[1])),
        )
    snapshot, merged = drained(acc), truth.aggregator.reduce()
    for dataset in NAMES:
        wanted = truth.cells(merged, dataset, kind)
        np.testing.assert_allclose(cells(snapshot, dataset, kind, kind), wanted, rtol=1e-12)
