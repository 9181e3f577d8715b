"""What the simulated ranks have to log."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from benchmarks.workloads import Column, Kind, Mixture, Workload, large, small
from metricfold import Metric, MetricBatch, MetricsAggregator

__all__ = ["MEANS", "MIXTURE", "PERCENTILES", "feed", "many_samples"]

_DIFFERENT = 3
"""So many different intervals are prepared, and fed in turn."""


def _hundred(size: int, window: int | None, repeats: int = 1) -> Mixture:
    kinds = (
        *(Kind(f"mean_{number:02d}", "mean", 16) for number in range(80)),
        *(Kind(f"length_{number:02d}", "distribution", size) for number in range(20)),
    )
    return Mixture("80 means, 20 distributions", 1, kinds, window, repeats=repeats)


MEANS = small(100)
PERCENTILES = _hundred(1000, 1000)
MIXTURE = replace(
    large(50, 1000),
    title="50 datasets: 250 scalars, 50 distributions, 1,000 categories",
)


def many_samples(samples: int) -> Mixture:
    """Return 80 means and 20 unbounded distributions, with so many values of each a rank."""
    size = min(samples, 1000)
    return _hundred(size, None, samples // size)


def feed(aggregator: MetricsAggregator, workload: Workload, rank: int, number: int) -> None:
    """Let `aggregator` take in an interval."""
    for batch in _batches(workload, rank, number % _DIFFERENT) * workload.repeats:
        aggregator.update(batch)


@cache
def _batches(workload: Workload, rank: int, number: int) -> list[MetricBatch]:
    return [
        MetricBatch.from_metrics(_metrics(columns)) for columns in workload.interval(rank, number)
    ]


def _metrics(columns: list[Column]) -> list[Metric]:
    return [
        Metric(column.dataset, column.name, value, column.aggregation)
        for column in columns
        for value in column.plain()
    ]
