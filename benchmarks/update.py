"""What taking metrics in costs the training process: lists, batches, single values, and many keys."""

from __future__ import annotations

import pickle
import time
from functools import partial

import numpy as np

from benchmarks.baselines import Aggregation, FrozenMetric, MetricStates
from benchmarks.table import Budget, Row, Section, at_least, at_most, cost, seconds_of, speedup
from benchmarks.timing import interleaved
from metricfold import AggregationType, Metric, MetricBatch, MetricsAggregator

_DATASETS = ("alpaca", "orca")
_METRICS = (("samples_seen", "sum"), ("tokens_seen", "sum"), ("seq_len", "distribution"))
_WINDOW = 1000
_VALUES = 40_000
"""Between two logs, which are not part of the time; what comes in is folded several times until then."""
_LISTS: dict[int, Budget] = {8: at_most(1.7), 64: at_most(1.25)}
_BATCHES: dict[int, Budget] = {8: at_least(2.8), 64: at_least(20)}
"""By samples per batch: what one rank takes in per step."""


def measure(*, quick: bool) -> list[Section]:
    """Return how long it takes until metrics are in, and many keys until they are out again."""
    section = Section("update, per metric: 3 metrics a sample, 2 datasets")
    rounds = 3 if quick else 25
    for samples in (8, 64, 512):
        section.rows += _update(samples, 4 * rounds)
    rows = [_record(rounds), *_keys(500 if quick else 47_000)]
    return [section, Section("record, and many keys: CPU time", rows)]


def _update(samples: int, rounds: int) -> list[Row]:
    lengths = np.random.default_rng(0).integers(16, 2048, samples).tolist()
    rows = [
        (_DATASETS[index % len(_DATASETS)], name, value, agg)
        for index, length in enumerate(lengths)
        for (name, agg), value in zip(_METRICS, (1, length, length), strict=True)
    ]
    metrics = [Metric(*row[:3], AggregationType(row[3])) for row in rows]
    frozen = [FrozenMetric(*row[:3], Aggregation(row[3])) for row in rows]
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
        rounds,
        calls_per_turn=_VALUES // len(metrics),
        afterwards={"list": of_lists.reduce, "batch": of_batches.reduce},
    )
    each = {name: [t / len(metrics) for t in found] for name, found in times.items()}
    theirs = ("a handler call each", each["handlers"])
    budgets = _BATCHES.get(samples), _LISTS.get(samples)
    return [
        speedup(f"collated batch of {samples} samples", each["batch"], *theirs, budgets[0]),
        cost(f"list of {samples} samples", each["list"], *theirs, budgets[1]),
    ]


def _record(rounds: int) -> Row:
    aggregator = MetricsAggregator()
    times = interleaved(
        {"": partial(aggregator.record, "loss", 2.5)},
        rounds,
        calls_per_turn=_VALUES,
        afterwards={"": aggregator.reduce},
        clock=time.process_time,
    )
    return seconds_of("record of a float", times[""], "µs", at_most(1.5))


def _keys(many: int) -> list[Row]:
    """Return what so many keys take, as those of each layer and expert; they come once in a run."""
    few = many // 10
    turns = [(_first(few), _first(many)) for _ in range(3)]
    per_key = [[turn[which][0] / keys for turn in turns] for which, keys in enumerate((few, many))]
    taken, printed = ([turn[1][part] for turn in turns] for part in range(2))
    return [
        seconds_of(f"{many:,} keys: first records and reduce", taken, "s", at_most(2)),
        cost("the same, per key", per_key[1], f"{few:,} keys", per_key[0], at_most(2)),
        seconds_of(f"{many:,} keys: dict", printed, "s"),
    ]


def _first(keys: int) -> tuple[float, float]:
    """Return the seconds of the first records with their reduction, and of the dict."""
    aggregator = MetricsAggregator()
    names = [f"moe/layer_{i // 256:03d}/expert_{i % 256:03d}/load" for i in range(keys)]
    began = time.process_time()
    for name in names:
        aggregator.record(name, 1.5)
    snapshot = aggregator.reduce()
    reduced = time.process_time()
    snapshot.as_dict("train")
    return reduced - began, time.process_time() - reduced
