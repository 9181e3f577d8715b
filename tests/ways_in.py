"""The ways in which the host hands metrics to an aggregator, and the built-in types by their names."""

from __future__ import annotations

import pickle
from collections.abc import Callable

from metricfold import AggregationType, Metric, MetricBatch, MetricsAggregator

Take = Callable[[MetricsAggregator, list[Metric]], None]
"""A way in."""

SUM, MEAN, MAX, MIN, DISTRIBUTION, CATEGORICAL, RATE = (
    AggregationType.SUM,
    AggregationType.MEAN,
    AggregationType.MAX,
    AggregationType.MIN,
    AggregationType.DISTRIBUTION,
    AggregationType.CATEGORICAL_COUNT,
    AggregationType.RATE,
)


def as_list(aggregator: MetricsAggregator, metrics: list[Metric]) -> None:
    aggregator.update(metrics)


def as_batch(aggregator: MetricsAggregator, metrics: list[Metric]) -> None:
    """As a data worker sends them."""
    aggregator.update(pickle.loads(pickle.dumps(MetricBatch.from_metrics(metrics))))


def one_by_one(aggregator: MetricsAggregator, metrics: list[Metric]) -> None:
    for dataset, name, value, agg, weight in metrics:
        aggregator.record(name, value, agg, dataset=dataset, weight=weight)


WAYS_IN: list[Take] = [as_list, as_batch, one_by_one]
