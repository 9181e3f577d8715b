"""What a log costs after few and after many samples: it must not grow."""

from __future__ import annotations

import time

from benchmarks.sizes import Sizes
from benchmarks.table import Section, at_most, cost
from metricfold import AggregationType, Metric, MetricBatch, MetricsAggregator

__all__ = ["measure"]

_BATCH = 1000
_FLAT = 1.2
"""The most samples may cost so much more than the fewest: noise, and no more."""
_METRICS = (
    ("tokens", AggregationType.SUM),
    ("loss", AggregationType.MEAN),
    ("seq_len", AggregationType.DISTRIBUTION),
)


def measure(sizes: Sizes) -> list[Section]:
    """Return the cost of a log with its dict for several numbers of samples since the log before.

    In one process: what travels depends on the schema, and so on the samples not at all.
    """
    section = Section("A log and its dict against the samples seen since the log before")
    times = _log(sizes.samples, sizes.logs)
    fewest, most = sizes.samples[0], sizes.samples[-1]
    for samples in sizes.samples[1:]:
        budget = at_most(_FLAT) if samples == most else None
        against = f"{fewest:,} samples"
        row = cost(f"{samples:,} samples", times[samples], against, times[fewest], budget)
        section.rows.append(row)
    return [section]


def _log(numbers: tuple[int, ...], rounds: int) -> dict[int, list[float]]:
    """Return the seconds of each log, by samples before it."""
    aggregators = {samples: MetricsAggregator() for samples in numbers}
    batch = MetricBatch.from_metrics(
        Metric("alpaca", name, float(index), aggregation)
        for index in range(_BATCH)
        for name, aggregation in _METRICS
    )
    # Caches are as cold after as many updates of anyone, so each log has as many before it.
    bystander = MetricsAggregator()
    seconds: dict[int, list[float]] = {samples: [] for samples in numbers}
    for turn in range(-2, rounds):
        for samples, aggregator in aggregators.items():
            for _ in range((numbers[-1] - samples) // _BATCH):
                bystander.update(batch)
            for _ in range(samples // _BATCH):
                aggregator.update(batch)
            began = time.perf_counter()
            aggregator.get_metrics_for_logging("train")
            # The first rounds agree on the schema.
            if turn >= 0:
                seconds[samples].append(time.perf_counter() - began)
    return seconds
