"""`MetricsAggregator(spread=True)`: how far a mean may be off, over ranks, restarts and devices."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from ranks import run_threads

from metricfold import Metric, MetricBatch, MetricsAggregator

RNG = np.random.default_rng(5)
VALUES = RNG.normal(2.0, 0.5, 120)
WEIGHTS = RNG.integers(1, 5, 120).astype(float)


def kish(values: np.ndarray, weights: np.ndarray) -> float:
    """Standard error of a weighted mean whose values were drawn at random, by its definition."""
    mean = np.average(values, weights=weights)
    variance = np.average((values - mean) ** 2, weights=weights)
    number = weights.sum() ** 2 / (weights**2).sum()
    return math.sqrt(variance / (number - 1))


@pytest.mark.parametrize("route", ["gather", "tree"])
@pytest.mark.parametrize("ranks", [1, 3])
def test_the_standard_error_is_that_of_all_ranks_values(route: str, ranks: int) -> None:
    def of_rank(communicator: Any) -> dict[str, float]:
        aggregator = MetricsAggregator(spread=True, route=route, communicator=communicator)
        parts = np.array_split(np.arange(120), [17, 60][: ranks - 1])
        for place in parts[communicator.rank].tolist():
            aggregator.record("loss", VALUES[place], weight=WEIGHTS[place])
            aggregator.record("plain", float(VALUES[place]))
        return aggregator.get_metrics_for_logging("t")

    for found in run_threads(of_rank, ranks):
        assert found["t/loss"] == pytest.approx(np.average(VALUES, weights=WEIGHTS), rel=1e-12)
        assert found["t/loss_weight"] == WEIGHTS.sum()
        assert found["t/loss_stderr"] == pytest.approx(kish(VALUES, WEIGHTS), rel=1e-9)
        assert found["t/plain_stderr"] == pytest.approx(VALUES.std(ddof=1) / math.sqrt(120))


def test_ways_to_give_values_come_to_the_same_error() -> None:
    aggregator = MetricsAggregator(spread=True)
    aggregator.record("array", VALUES, weight=WEIGHTS)
    for value, weight in zip(VALUES, WEIGHTS, strict=True):
        aggregator.update([Metric("d", "list", float(value), "mean", float(weight))])
    cells = {"axes": {"layer": 2}, "ids": {"layer": 1}}
    for value, weight in zip(VALUES, WEIGHTS, strict=True):
        aggregator.record("cells", value, weight=weight, **cells)
    found = aggregator.reduce().as_dict("t", by="layer")
    for key in ("t/array", "t_d/list", "t/cells", "t/cells/layer_1"):
        assert found[f"{key}_stderr"] == pytest.approx(kish(VALUES, WEIGHTS), rel=1e-9), key


def test_without_it_nothing_more_is_reported_and_the_mean_is_bit_for_bit_the_same() -> None:
    found = []
    for spread in (False, True):
        aggregator = MetricsAggregator(spread=spread)
        for value, weight in zip(VALUES.tolist(), WEIGHTS.tolist(), strict=True):
            aggregator.record("loss", value, weight=weight)
        found.append(aggregator.get_metrics_for_logging("t"))
    assert found[0] == {"t/loss": found[1]["t/loss"]}


@pytest.mark.parametrize(
    ("values", "weights"),
    [
        ([3.0], [5.0]),  # a single value
        ([3.0, 4.0], [5.0, 0.0]),  # of which the second does not count
        ([3.0, math.nan], [1.0, 1.0]),
        ([3.0, math.inf], [1.0, 1.0]),
    ],
)
def test_there_is_no_error_where_none_is_known(values: list[float], weights: list[float]) -> None:
    aggregator = MetricsAggregator(spread=True)
    for value, weight in zip(values, weights, strict=True):
        aggregator.record("loss", value, weight=weight)
    assert "t/loss_stderr" not in aggregator.get_metrics_for_logging("t")


def test_nan_that_is_skipped_is_in_no_error() -> None:
    aggregator = MetricsAggregator(spread=True, on_nan="skip")
    for value in (1.0, math.nan, 3.0):
        aggregator.record("loss", value)
    found = aggregator.get_metrics_for_logging("t")
    assert found == {
        "t/loss": 2.0,
        "t/loss_weight": 2.0,
        "t/loss_stderr": 1.0,
        "t/loss_nan_count": 1,
    }


def test_values_that_are_all_the_same_have_no_error_however_large() -> None:
    aggregator = MetricsAggregator(spread=True)
    aggregator.record("loss", np.full(7, 1e15 / 3), each=True)
    error = aggregator.get_metrics_for_logging("t")["t/loss_stderr"]
    assert 0 <= error <= 1e-8 * 1e15


def test_a_checkpoint_with_or_without_loads_into_either() -> None:
    def saved(spread: bool, *, axes: bool = False) -> MetricsAggregator:
        aggregator = MetricsAggregator(spread=spread)
        for value in (10.0, 20.0):
            aggregator.record("loss", value, weight=3)
            aggregator.record("cells", np.array([value, 1.0]), axes={"layer": 2})
            aggregator.record("tag", "a", "categorical_count")
            aggregator.record("top", value, "max")
        return aggregator

    for before, after in ((False, True), (True, False), (True, True), (False, False)):
        aggregator = MetricsAggregator(spread=after)
        aggregator.load_state_dict(saved(before).state_dict())
        for value in (1.0, 2.0):
            aggregator.record("loss", value, weight=1)
        found = aggregator.reduce().as_dict("t", "run", by="layer")
        assert found["t/loss"] == 93.0 / 8
        assert found["t/cells/layer_0"] == 15.0
        assert (found["t/tag_count_a"], found["t/top"]) == (2.0, 20.0)
        assert found.get("t/loss_weight") == (8.0 if after else None)
        # What came before without squares is in the mean, and the error speaks of what came after.
        expected = {
            (False, True): 0.5,
            (True, True): kish(np.array([10, 20, 1, 2.0]), np.array([3, 3, 1, 1.0])),
        }.get((before, after))
        assert found.get("t/loss_stderr") == (None if expected is None else pytest.approx(expected))
        again = MetricsAggregator(spread=True)
        again.load_state_dict(aggregator.state_dict())
        assert again.reduce().as_dict("t", "run")["t/loss"] == 93.0 / 8


def test_what_was_folded_elsewhere_is_in_the_mean_alone() -> None:
    torch = pytest.importorskip("torch")
    from metricfold.torch import DeviceAccumulator

    aggregator = MetricsAggregator(spread=True)
    batch = MetricBatch.from_metrics([Metric("d", "loss", x, "mean") for x in (100.0, 200.0)])
    for _ in range(2):  # the first batch of a key takes another way
        aggregator.update(batch)
    aggregator.update([Metric("d", "loss", x, "mean") for x in (1.0, 3.0)])
    accumulator = DeviceAccumulator({"device": "mean"}, ("d",), device="cpu")
    accumulator.update("device", torch.tensor([5.0, 6.0]), dataset_ids=torch.tensor([0, 0]))
    aggregator.drain(accumulator)
    found = aggregator.get_metrics_for_logging("t")
    assert (found["t_d/loss"], found["t_d/loss_weight"]) == (604 / 6, 6.0)
    assert found["t_d/loss_stderr"] == 1.0
    assert found["t_d/device"] == 5.5
    assert "t_d/device_stderr" not in found


def test_ranks_that_differ_in_it_get_one_error_that_names_the_metric() -> None:
    def of_rank(communicator: Any) -> str:
        aggregator = MetricsAggregator(spread=communicator.rank == 1, communicator=communicator)
        aggregator.record("loss", 1.0)
        with pytest.raises(ValueError, match="'loss'") as caught:
            aggregator.reduce()
        return str(caught.value)

    one, other = run_threads(of_rank, 2)
    assert one == other
    assert "8 SUM" in one


def test_a_name_that_it_prints_is_taken() -> None:
    aggregator = MetricsAggregator(spread=True)
    aggregator.record("loss", 1.0)
    with pytest.raises(ValueError, match="loss_stderr"):
        aggregator.record("loss_stderr", 1.0)
