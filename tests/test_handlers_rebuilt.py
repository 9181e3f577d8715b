"""The metrics module's six handlers, written from its contract alone, next to the built-in ones.

Each is what a user would write who knows the four methods and nothing else of ours: states in
`value` and `metadata`, one state after the other, results that are combined over ranks.
"""

from __future__ import annotations

from collections import Counter, deque
from typing import Any

import numpy as np
import pytest
from ranks import run_threads

from metricfold import AggregationHandler, AggregationType, Metric, MetricsAggregator, MetricState
from metricfold.communicator import Communicator


class Rebuilt(AggregationHandler):
    """What the six have in common: a state begins with a value and metadata."""

    start: Any = 0.0

    def begin(self) -> dict[str, Any]:
        return {}

    def initialize_metric_state(
        self, dataset_name: str, metric_name: str, agg_type: Any
    ) -> MetricState:
        return MetricState(dataset_name, metric_name, self.start, agg_type, self.begin())

    def finalize_local_agg(self, local_agg_metric: MetricState) -> list[MetricState]:
        return [local_agg_metric]


def result(states: list[MetricState], value: float) -> MetricState:
    first = states[0]
    return MetricState(first.dataset_name, first.metric_name, value, first.agg_type)


class Total(Rebuilt):
    def update(self, local_agg_metric: MetricState, metric: Metric) -> None:
        local_agg_metric.value += metric.value

    def finalize_dist_agg(self, local_agg_metrics: list[MetricState]) -> MetricState:
        return result(local_agg_metrics, sum(state.value for state in local_agg_metrics))


class Largest(Rebuilt):
    start = float("-inf")

    def update(self, local_agg_metric: MetricState, metric: Metric) -> None:
        local_agg_metric.value = max(local_agg_metric.value, metric.value)

    def finalize_dist_agg(self, local_agg_metrics: list[MetricState]) -> MetricState:
        return result(local_agg_metrics, max(state.value for state in local_agg_metrics))


class Smallest(Rebuilt):
    start = float("inf")

    def update(self, local_agg_metric: MetricState, metric: Metric) -> None:
        local_agg_metric.value = min(local_agg_metric.value, metric.value)

    def finalize_dist_agg(self, local_agg_metrics: list[MetricState]) -> MetricState:
        return result(local_agg_metrics, min(state.value for state in local_agg_metrics))


class Average(Rebuilt):
    def begin(self) -> dict[str, Any]:
        return {"sum": 0.0, "count": 0}

    def update(self, local_agg_metric: MetricState, metric: Metric) -> None:
        local_agg_metric.metadata["sum"] += metric.weight * metric.value
        local_agg_metric.metadata["count"] += metric.weight

    def finalize_local_agg(self, local_agg_metric: MetricState) -> list[MetricState]:
        metadata = local_agg_metric.metadata
        local_agg_metric.value = metadata["sum"] / metadata["count"]
        return [local_agg_metric]

    def finalize_dist_agg(self, local_agg_metrics: list[MetricState]) -> MetricState:
        total = sum(state.metadata["sum"] for state in local_agg_metrics)
        return result(
            local_agg_metrics, total / sum(state.metadata["count"] for state in local_agg_metrics)
        )


class AverageOfTheirs(Average):
    """Finalises to a built-in MEAN with its own metadata, as the metrics module's states have."""

    def finalize_local_agg(self, local_agg_metric: MetricState) -> list[MetricState]:
        (state,) = super().finalize_local_agg(local_agg_metric)
        state.agg_type = AggregationType.MEAN
        return [state]


class Pooled(Rebuilt):
    """Computes a statistic of all ranks' values: the type of a result of `Window`."""

    def __init__(self, statistic: Any) -> None:
        self.statistic = statistic

    def update(self, local_agg_metric: MetricState, metric: Metric) -> None:
        raise AssertionError("values go to Window")

    def finalize_dist_agg(self, local_agg_metrics: list[MetricState]) -> MetricState:
        values = [value for state in local_agg_metrics for value in state.metadata["pooled"]]
        return result(local_agg_metrics, self.statistic(values))


STATISTICS = {
    "std": lambda values: np.std(values, ddof=1),
    "p05": lambda values: np.quantile(values, 0.05),
    "p50": lambda values: np.quantile(values, 0.5),
    "p95": lambda values: np.quantile(values, 0.95),
}


class Window(Rebuilt):
    def begin(self) -> dict[str, Any]:
        return {"values": deque(maxlen=1000)}

    def update(self, local_agg_metric: MetricState, metric: Metric) -> None:
        local_agg_metric.metadata["values"].append(metric.value)

    def finalize_local_agg(self, local_agg_metric: MetricState) -> list[MetricState]:
        values = list(local_agg_metric.metadata["values"])

        def one(statistic: str, value: float, agg_type: Any, **metadata: Any) -> MetricState:
            name = f"{local_agg_metric.metric_name}_stat_{statistic}"
            return MetricState(local_agg_metric.dataset_name, name, value, agg_type, dict(metadata))

        mean = sum(values) / len(values)
        return [
            one("mean", mean, AggregationType.MEAN, sum=sum(values), count=len(values)),
            one("min", min(values), AggregationType.MIN),
            one("max", max(values), AggregationType.MAX),
            one("count", len(values), AggregationType.SUM),
            *(
                one(name, statistic(values), name, pooled=values)
                for name, statistic in STATISTICS.items()
            ),
        ]

    def finalize_dist_agg(self, local_agg_metrics: list[MetricState]) -> MetricState:
        raise AssertionError("none of the results is of this type")


class WindowOfTheirs(Window):
    """Finalises to a built-in DISTRIBUTION of all its values."""

    def finalize_local_agg(self, local_agg_metric: MetricState) -> list[MetricState]:
        local_agg_metric.agg_type = AggregationType.DISTRIBUTION
        return [local_agg_metric]


class Categories(Rebuilt):
    def begin(self) -> dict[str, Any]:
        return {"counts": Counter()}

    def update(self, local_agg_metric: MetricState, metric: Metric) -> None:
        local_agg_metric.metadata["counts"][metric.value] += 1

    def finalize_local_agg(self, local_agg_metric: MetricState) -> list[MetricState]:
        return [
            MetricState(
                local_agg_metric.dataset_name,
                f"{local_agg_metric.metric_name}_count_{category}",
                count,
                AggregationType.SUM,
            )
            for category, count in local_agg_metric.metadata["counts"].items()
        ]

    def finalize_dist_agg(self, local_agg_metrics: list[MetricState]) -> MetricState:
        raise AssertionError("none of the results is of this type")


class CategoriesOfTheirs(Categories):
    """Finalises to a built-in CATEGORICAL_COUNT of all its categories."""

    def finalize_local_agg(self, local_agg_metric: MetricState) -> list[MetricState]:
        local_agg_metric.agg_type = AggregationType.CATEGORICAL_COUNT
        return [local_agg_metric]


REBUILT = [
    (Total, "sum"),
    (Largest, "max"),
    (Smallest, "min"),
    (Average, "mean"),
    (AverageOfTheirs, "mean"),
    (Window, "distribution"),
    (WindowOfTheirs, "distribution"),
    (Categories, "categorical_count"),
    (CategoriesOfTheirs, "categorical_count"),
]


def logs(
    communicator: Communicator, handler: type[AggregationHandler] | None, built_in: str
) -> list[dict[str, float]]:
    """Log three intervals with a restart after the first, on the rebuilt type or the built-in one."""

    def new() -> MetricsAggregator:
        aggregator = MetricsAggregator(communicator=communicator)
        if handler is not None:
            aggregator.register_handler("rebuilt", handler())
        for name, statistic in STATISTICS.items():
            aggregator.register_handler(name, Pooled(statistic))
        return aggregator

    agg_type = built_in if handler is None else "rebuilt"
    random = np.random.default_rng(communicator.rank)
    aggregator = new()
    logged: list[dict[str, float]] = []
    for interval in range(3):
        numbers = (16 * random.normal(3.0, 2.0, 4 + communicator.rank + interval)).round() / 16
        values = ["abc"[int(v) % 3] for v in numbers] if "cat" in built_in else numbers.tolist()
        weights = random.integers(1, 4, len(values)).tolist() if built_in == "mean" else None
        half = len(values) // 2
        metrics = [
            Metric("d", "x", value, agg_type, *([] if weights is None else [weights[place]]))
            for place, value in enumerate(values)
        ]
        aggregator.update(metrics[:half])
        if interval == 1:
            state = aggregator.state_dict()
            aggregator = new()
            aggregator.load_state_dict(state)
        aggregator.update(metrics[half:])
        snapshot = aggregator.reduce()
        logged += [snapshot.as_dict("t", window) for window in ("run", "interval")]
    return logged


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(("handler", "built_in"), REBUILT)
def test_a_handler_written_from_the_contract_alone_gives_what_the_built_in_gives(
    handler: type[AggregationHandler], built_in: str, world_size: int
) -> None:
    expected = run_threads(logs, world_size, None, built_in)[0]
    found, *others = run_threads(logs, world_size, handler, built_in)
    assert others == [found] * (world_size - 1)
    assert [set(one) for one in found] == [set(one) for one in expected]
    assert found == [pytest.approx(one, rel=1e-12) for one in expected]
    assert len(expected[0]) == {"distribution": 8, "categorical_count": 3}.get(built_in, 1)
