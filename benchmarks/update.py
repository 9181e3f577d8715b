"""`update` in the training process, per metric, against one Python handler call per metric."""

from __future__ import annotations

import pickle
from collections.abc import Iterator

import numpy as np

from benchmarks.baselines import Aggregation, FrozenMetric, MetricStates
from benchmarks.sizes import Sizes
from benchmarks.table import Budget, Section, at_least, speedup
from benchmarks.timing import interleaved
from metricfold import AggregationType, Metric, MetricBatch, MetricsAggregator

__all__ = ["measure"]

_DATASETS = ("alpaca", "orca")
_METRICS = (("samples_seen", "sum"), ("tokens_seen", "sum"), ("seq_len", "distribution"))
_WINDOW = 1000
_VALUES = 40_000
"""Between two logs, which are not part of the time; what comes in is folded several times until then."""
_BUDGETS: dict[int, Budget] = {8: at_least(2.8), 64: at_least(20)}
"""By samples per batch: what one rank takes in per step."""


def measure(sizes: Sizes) -> list[Section]:
    """Return how long `update` takes, for lists and collated batches of several sizes."""
    section = Section("update, per metric: 3 metrics a sample, 2 datasets")
    for samples in (8, 64, 512):
        _measure(section, samples, sizes)
    return [section]


def _measure(section: Section, samples: int, sizes: Sizes) -> None:
    rows = list(_values(samples))
    metrics = [
        Metric(dataset, name, value, AggregationType(agg)) for dataset, name, value, agg in rows
    ]
    frozen = [
        FrozenMetric(dataset, name, value, Aggregation(agg)) for dataset, name, value, agg in rows
    ]
    # As it comes out of a data worker.
    batch = pickle.loads(pickle.dumps(MetricBatch.from_metrics(metrics)))
    of_lists, of_batches = MetricsAggregator(_WINDOW), MetricsAggregator(_WINDOW)
    handlers = MetricStates(_WINDOW)
    times = interleaved(
        {
            "list": lambda: of_lists.update(metrics),
            "batch": lambda: of_batches.update(batch),
            "handlers": lambda: handlers.update(frozen),
        },
        4 * sizes.rounds,
        calls_per_turn=_VALUES // len(metrics),
        afterwards={"list": of_lists.reduce, "batch": of_batches.reduce},
    )
    per_metric = {name: [t / len(metrics) for t in found] for name, found in times.items()}
    for name, what, budget in (
        ("batch", "collated batch", _BUDGETS.get(samples)),
        ("list", "list", None),
    ):
        section.rows.append(
            speedup(
                f"{what} of {samples} samples",
                per_metric[name],
                "a handler call each",
                per_metric["handlers"],
                budget,
            )
        )


def _values(samples: int) -> Iterator[tuple[str, str, int, str]]:
    random = np.random.default_rng(0)
    lengths = random.integers(16, 2048, samples).tolist()
    for index, length in enumerate(lengths):
        dataset = _DATASETS[index % len(_DATASETS)]
        for (name, agg), value in zip(_METRICS, (1, length, length), strict=True):
            yield dataset, name, value, agg
