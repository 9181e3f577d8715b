"""What a sample costs in the data worker: transform, collate, and the way to the training process."""

from __future__ import annotations

import pickle
from typing import Any

from benchmarks.baselines import Aggregation, FrozenMetric
from benchmarks.table import Row, Section, at_most, cost
from benchmarks.timing import interleaved
from metricfold import DefaultTrainingMetricTransform, MetricsCollator

_BUDGETS = {64: at_most(0.35)}
"""By samples per batch."""


def measure(*, quick: bool) -> list[Section]:
    """Return the cost per sample of 3 metrics, for batches of several sizes."""
    section = Section("transform + collate + pickling both ways, per sample of 3 metrics")
    section.rows = [_row(samples, 3 if quick else 25) for samples in (8, 64, 512)]
    return [section]


def _row(samples: int, rounds: int) -> Row:
    transform = DefaultTrainingMetricTransform()
    transform.set_dataset_name("alpaca")
    collate = MetricsCollator(_no_tensors)
    bare = [{"tokens": [0] * (16 + index % 100)} for index in range(samples)]
    ways = {
        "ours": lambda: _sent(collate([transform(sample) for sample in bare])),
        "theirs": lambda: _sent([_frozen(sample) for sample in bare]),
    }
    found = interleaved(ways, rounds)
    ours, theirs = ([t / samples for t in found[name]] for name in ways)
    what, against = f"batches of {samples} samples", "3 frozen dataclasses"
    return cost(what, ours, against, theirs, _BUDGETS.get(samples))


def _sent(batch: Any) -> Any:
    """Return what arrives in the training process."""
    return pickle.loads(pickle.dumps(batch))


def _no_tensors(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Collate nothing: only the metrics' share is of interest."""
    return {}


def _frozen(sample: dict[str, Any]) -> list[FrozenMetric]:
    length = len(sample["tokens"])
    return [
        FrozenMetric("alpaca", "samples_seen", 1, Aggregation.SUM),
        FrozenMetric("alpaca", "tokens_seen", length, Aggregation.SUM),
        FrozenMetric("alpaca", "seq_len", length, Aggregation.DISTRIBUTION),
    ]
