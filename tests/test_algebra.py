"""Any split of the same values over workers, ranks, intervals and restarts gives one answer."""

from __future__ import annotations

import math
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from handlers_of_users import LaneRMS, MyTypes, ProductHandler, RMSHandler
from hypotheses import examples
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_threads

from metricfold import AggregationType, Metric, MetricBatch, MetricsAggregator
from metricfold.communicator import Communicator

numbers = st.one_of(
    st.integers(-1000, 1000),
    st.floats(-1e6, 1e6),
    st.sampled_from([0.0, -0.0, 1e-300, -3e200, 2**53 - 1, True]),
)
weights = st.sampled_from([1.0, 1.0, 0.0, 0.5, 3, 1e-3, 700.0])
# Elsewhere a value counts or does not.
counts = st.sampled_from([1.0, 1.0, 0.0])
WEIGHTED = (AggregationType.MEAN, AggregationType.DISTRIBUTION)


def metrics_of(agg_type: Any, values: st.SearchStrategy[Any]) -> st.SearchStrategy[Metric]:
    return st.builds(
        Metric,
        st.sampled_from(["alpaca", "orca"]),
        st.just(f"a {agg_type}"),
        values,
        st.just(agg_type),
        weights if agg_type in WEIGHTED else counts,
    )


any_metric = st.one_of(
    *(
        metrics_of(agg_type, numbers)
        for agg_type in (
            AggregationType.SUM,
            AggregationType.MEAN,
            AggregationType.MAX,
            AggregationType.MIN,
            AggregationType.DISTRIBUTION,
            "lane rms",
        )
    ),
    metrics_of(AggregationType.MAX, st.sampled_from([math.nan, math.inf, -math.inf, 1.0])),
    metrics_of(AggregationType.DISTRIBUTION, st.sampled_from([math.nan, math.inf, 2.0])),
    metrics_of(AggregationType.CATEGORICAL_COUNT, st.sampled_from(["a", "b", 3, "3", True])),
    metrics_of(MyTypes.RMS, st.integers(1, 9)),
    metrics_of(MyTypes.PRODUCT, st.sampled_from([2, 3, 5])),
)


@dataclass(frozen=True)
class Piece:
    """Some metrics, and where they come in."""

    metrics: list[Metric]
    rank: int
    collated: bool


pieces = st.builds(
    Piece, st.lists(any_metric, min_size=1, max_size=6), st.integers(0, 7), st.booleans()
)


@dataclass(frozen=True)
class Interval:
    """What happens between two reductions, and after the second."""

    pieces: list[Piece]
    saves: bool
    restarts_on: int | None


intervals = st.builds(
    Interval,
    st.lists(pieces, max_size=4),
    st.booleans(),
    st.one_of(st.none(), st.none(), st.integers(1, 4)),
)


def new_aggregator(communicator: Communicator | None = None, **options: Any) -> MetricsAggregator:
    aggregator = MetricsAggregator(communicator=communicator, **options)
    aggregator.register_handler("lane rms", LaneRMS(on_nan=options.get("on_nan", "propagate")))
    aggregator.register_handler(MyTypes.RMS, RMSHandler())
    aggregator.register_handler(MyTypes.PRODUCT, ProductHandler())
    return aggregator


def take_in(aggregator: MetricsAggregator, piece: Piece) -> None:
    if piece.collated:
        batch = MetricBatch.from_metrics(piece.metrics)
        aggregator.update(pickle.loads(pickle.dumps(batch)))
    else:
        aggregator.update(piece.metrics)


def run_rank(
    communicator: Communicator,
    parts: Sequence[Interval],
    state: dict[str, Any] | None,
    options: dict[str, Any],
) -> tuple[Any, ...]:
    """Live through some intervals on one rank; returns the views of the last, and its state."""
    aggregator = new_aggregator(communicator, **options)
    if state is not None:
        aggregator.load_state_dict(state)
    seen: list[dict[str, float]] = []
    for part in parts:
        for piece in part.pieces:
            if piece.rank % communicator.world_size == communicator.rank:
                take_in(aggregator, piece)
        if part.saves:
            aggregator.state_dict()
        if part.restarts_on is not None:
            break
        snapshot = aggregator.reduce()
        seen.append(snapshot.as_dict("t", "interval" if not snapshot.empty else "run"))
    state = aggregator.state_dict()
    return seen, aggregator.reduce().as_dict("t", "run"), state


def close_enough(ours: dict[str, float], truth: dict[str, float], scale: float) -> None:
    assert ours.keys() == truth.keys()
    for key, value in truth.items():
        if "count" in key or isinstance(value, int):
            assert ours[key] == value, key
        else:
            assert ours[key] == pytest.approx(value, rel=1e-9, abs=1e-12 * scale, nan_ok=True), key


def magnitude(metrics: Sequence[Metric]) -> float:
    """Return the sum of magnitudes, by which float sums may err."""
    total = 1.0
    for metric in metrics:
        if not isinstance(metric.value, str) and math.isfinite(metric.value):
            total += abs(metric.value) * max(metric.weight, 1)
    return total


@examples(60)
@given(
    story=st.lists(intervals, min_size=1, max_size=4),
    world_size=st.integers(1, 4),
    on_nan=st.sampled_from(["propagate", "skip"]),
    route=st.sampled_from(["gather", "tree"]),
    window=st.sampled_from([1000, None]),
)
def test_any_split_over_workers_ranks_intervals_and_restarts_gives_one_answer(
    story: list[Interval], world_size: int, on_nan: str, route: str, window: int | None
) -> None:
    options: dict[str, Any] = {"on_nan": on_nan, "route": route, "dist_window_size": window}
    alone = new_aggregator(**options)
    everything = [m for part in story for piece in part.pieces for m in piece.metrics]
    alone.update(everything)
    truth = alone.get_metrics_for_logging("t")

    state: dict[str, Any] | None = None
    rest = list(story)
    while True:
        until = next((i for i, part in enumerate(rest) if part.restarts_on is not None), None)
        now, rest = (rest, []) if until is None else (rest[: until + 1], rest[until + 1 :])
        results = run_threads(run_rank, world_size, now, state, options)
        for result in results[1:]:
            # Run totals and checkpoints are the same on all ranks, bit for bit.
            assert repr(result) == repr(results[0])
        state = results[0][2]
        if until is None or not rest:
            break
        world_size = now[-1].restarts_on or world_size
    close_enough(results[0][1], truth, magnitude(everything))


@examples(60)
@given(
    story=st.lists(intervals, min_size=2, max_size=3),
    world_size=st.integers(2, 3),
    route=st.sampled_from(["gather", "tree"]),
    window=st.sampled_from([1, 1000, None]),
)
def test_each_interval_speaks_about_what_came_in_since_the_one_before(
    story: list[Interval], world_size: int, route: str, window: int | None
) -> None:
    story = [Interval(part.pieces, part.saves, None) for part in story]
    options = {"route": route, "dist_window_size": window}
    results = run_threads(run_rank, world_size, story, None, options)
    for part, seen in zip(story, results[0][0], strict=True):
        metrics = [metric for piece in part.pieces for metric in piece.metrics]
        if not metrics:
            continue
        alone = new_aggregator()
        alone.update(metrics)
        snapshot = alone.reduce()
        if snapshot.empty:
            continue
        close_enough(seen, snapshot.as_dict("t", "interval"), magnitude(metrics))


@examples(80)
@given(
    values=st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=200),
    cuts=st.lists(st.integers(0, 200), max_size=5),
)
def test_float_sums_err_by_less_than_1e_12_of_the_sum_of_magnitudes(
    values: list[float], cuts: list[int]
) -> None:
    aggregator = MetricsAggregator()
    edges = [0, *sorted(min(cut, len(values)) for cut in cuts), len(values)]
    for start, stop in pairwise(edges):
        for value in values[start:stop]:
            aggregator.record("total", value, "sum")
        aggregator.reduce()
    total = aggregator.get_metrics_for_logging("t")["t/total"]
    assert abs(total - math.fsum(values)) <= 1e-12 * math.fsum(map(abs, values))


def test_a_million_additions_do_not_drift() -> None:
    aggregator = MetricsAggregator()
    batch = MetricBatch.from_metrics([Metric("d", "x", 0.1, AggregationType.SUM)])
    for _ in range(200_000):
        aggregator.update(batch)
    total = aggregator.get_metrics_for_logging("t")["t_d/x"]
    assert abs(total - 20_000.0) <= 1e-12 * 20_000.0


def test_integer_totals_are_exact_up_to_2_53() -> None:
    aggregator = MetricsAggregator()
    for value in (2**53 - 4, 1, 1, 1):
        aggregator.record("tokens", value, "sum")
        aggregator.reduce()
    assert aggregator.get_metrics_for_logging("t")["t/tokens"] == 2**53 - 1


@examples(100)
@given(
    values=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60),
    q=st.lists(st.floats(0, 100), min_size=1, max_size=4, unique=True),
)
def test_percentiles_of_pooled_values_are_numpys(values: list[float], q: list[float]) -> None:
    percentiles = sorted({*q, 100.0})  # all below 1 would be taken for fractions

    def rank(communicator: Communicator) -> dict[str, float]:
        aggregator = MetricsAggregator(communicator=communicator, percentiles=percentiles)
        mine = values[communicator.rank :: communicator.world_size]
        aggregator.update([Metric("d", "x", v, AggregationType.DISTRIBUTION) for v in mine])
        return aggregator.get_metrics_for_logging("t")

    logged = run_threads(rank, 3)[0]
    quantiles = [value for key, value in logged.items() if "_stat_p" in key]
    assert quantiles == pytest.approx(np.percentile(values, percentiles).tolist(), rel=1e-12)
