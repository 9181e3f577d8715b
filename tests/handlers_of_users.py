"""Handlers as users write them: with lanes, and with states of their own."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

import numpy as np

from metricfold import (
    AggregationHandler,
    LaneHandler,
    Metric,
    MetricsAggregator,
    MetricState,
)
from metricfold.metric import TypeLike


class MyTypes(Enum):
    RMS = "rms"
    PRODUCT = "product"


class LaneRMS(LaneHandler):
    """Root mean square by lanes: rides in the packed collective."""

    sum_lanes = ("squares",)

    def sums_of(self, values: Any, weights: Any) -> tuple[float, ...]:
        return (float((values * values).sum()),)

    def result(self, lanes: Mapping[str, float]) -> float:
        return (lanes["squares"] / (lanes["count"] - lanes["nans"])) ** 0.5


class RMSHandler(AggregationHandler):
    """Root mean square; what a rank finalises to is not what it accumulates."""

    def initialize_metric_state(
        self, dataset_name: str, metric_name: str, agg_type: TypeLike
    ) -> MetricState:
        metadata = {"squares": 0.0, "count": 0}
        return MetricState(dataset_name, metric_name, 0.0, agg_type, metadata)

    def update(self, local_agg_metric: MetricState, metric: Metric) -> None:
        if metric.value == "bad":
            local_agg_metric.metadata["squares"] = float("nan")
            raise ValueError("a bad value, found halfway")
        local_agg_metric.metadata["squares"] += metric.value**2
        local_agg_metric.metadata["count"] += 1

    def finalize_local_agg(self, local_agg_metric: MetricState) -> list[MetricState]:
        metadata = local_agg_metric.metadata
        local_agg_metric.value = (metadata["squares"] / metadata["count"]) ** 0.5
        return [local_agg_metric]

    def finalize_dist_agg(self, local_agg_metrics: list[MetricState]) -> MetricState:
        squares = sum(state.value**2 * state.metadata["count"] for state in local_agg_metrics)
        count = sum(state.metadata["count"] for state in local_agg_metrics)
        first = local_agg_metrics[0]
        return MetricState(
            first.dataset_name, first.metric_name, (squares / count) ** 0.5, first.agg_type
        )


class FailingRMS(RMSHandler):
    """Raises as it finalises, when it is told to."""

    fails = False

    def finalize_local_agg(self, local_agg_metric: Any) -> Any:
        if self.fails:
            raise ZeroDivisionError("the handler's own")
        return super().finalize_local_agg(local_agg_metric)


class ProductHandler(AggregationHandler):
    """Product of all values, kept as a set of prime factors that JSON cannot hold as it is."""

    def initialize_metric_state(
        self, dataset_name: str, metric_name: str, agg_type: TypeLike
    ) -> MetricState:
        return MetricState(dataset_name, metric_name, None, agg_type, {"factors": {}})

    def update(self, local_agg_metric: MetricState, metric: Metric) -> None:
        factors: dict[int, int] = local_agg_metric.metadata["factors"]
        factors[metric.value] = factors.get(metric.value, 0) + 1

    def finalize_local_agg(self, local_agg_metric: MetricState) -> list[MetricState]:
        product = 1
        for factor, times in local_agg_metric.metadata["factors"].items():
            product *= factor**times
        local_agg_metric.value = product
        return [local_agg_metric]

    def finalize_dist_agg(self, local_agg_metrics: list[MetricState]) -> MetricState:
        first = local_agg_metrics[0]
        product = 1
        for state in local_agg_metrics:
            product *= state.value
        return MetricState(first.dataset_name, first.metric_name, product, first.agg_type)

    def serialize_metadata(self, metadata: dict[str, Any]) -> dict[str, Any]:
        return {"factors": [[factor, times] for factor, times in metadata["factors"].items()]}

    def deserialize_metadata(self, metadata: dict[str, Any]) -> dict[str, Any]:
        return {"factors": dict(metadata["factors"])}


class LaneMean(LaneHandler):
    """A mean by lanes of a user's own, which takes weights."""

    sum_lanes = ("total", "weight")
    weighted = True

    def sums_of(self, values: Any, weights: Any) -> tuple[float, ...]:
        assert weights is None or weights.all(), "a value of weight 0 has come to a fold"
        weights = np.ones_like(values) if weights is None else weights
        with np.errstate(invalid="ignore"):  # inf - inf
            return float(values @ weights), float(weights.sum())

    def result(self, lanes: Mapping[str, float]) -> float:
        return lanes["total"] / lanes["weight"]


class StateMean(AggregationHandler):
    """The same with a state of its own."""

    def initialize_metric_state(
        self, dataset_name: str, metric_name: str, agg_type: Any
    ) -> MetricState:
        return MetricState(dataset_name, metric_name, 0.0, agg_type, {"total": 0.0, "weight": 0.0})

    def update(self, local_agg_metric: MetricState, metric: Metric) -> None:
        assert metric.weight, "a value of weight 0 has come to a handler"
        self._add(local_agg_metric, metric.weight * metric.value, metric.weight)

    def finalize_local_agg(self, local_agg_metric: MetricState) -> list[MetricState]:
        return [local_agg_metric]

    def finalize_dist_agg(self, local_agg_metrics: list[MetricState]) -> MetricState:
        merged = self.initialize_metric_state("", "", "")
        for state in local_agg_metrics:
            self._add(merged, state.metadata["total"], state.metadata["weight"])
        return merged

    def _add(self, state: MetricState, total: float, weight: float) -> None:
        state.metadata["total"] += total
        state.metadata["weight"] += weight
        state.value = state.metadata["total"] / state.metadata["weight"]


def aggregator_of_users(**options: Any) -> MetricsAggregator:
    """Return an aggregator that knows all of these."""
    aggregator = MetricsAggregator(**options)
    aggregator.register_handler("lane rms", LaneRMS())
    aggregator.register_handler("lane mean", LaneMean())
    aggregator.register_handler("state mean", StateMean())
    aggregator.register_handler(MyTypes.RMS, RMSHandler())
    aggregator.register_handler(MyTypes.PRODUCT, ProductHandler())
    return aggregator
