"""DISTRIBUTION at any size: exact while small, a histogram beyond, and no jump between them."""

from __future__ import annotations

import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypotheses import examples
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_threads

from metricfold import (
    AggregationType,
    JSONLSink,
    Metric,
    MetricBatch,
    MetricsAggregator,
    MetricsLogger,
    read_jsonl,
)
from metricfold._core.fold.sample import EXACT_VALUES
from metricfold.communicator import Communicator

PERCENTILES = (0.1, 1, 5, 25, 50, 75, 95, 99, 99.9)
SUFFIXES = ("p00.1", "p01", "p05", "p25", "p50", "p75", "p95", "p99", "p99.9")


def take(aggregator: MetricsAggregator, values: Any, *, batch: int = 64) -> None:
    """Take values in as a collator hands them over, a batch at a time."""
    values = np.asarray(values, dtype=np.float64).tolist()
    for start in range(0, len(values), batch):
        metrics = [
            Metric("d", "x", value, AggregationType.DISTRIBUTION)
            for value in values[start : start + batch]
        ]
        aggregator.update(pickle.loads(pickle.dumps(MetricBatch.from_metrics(metrics))))


def statistic(logged: dict[str, float], name: str) -> float:
    return logged[f"t_d/x_stat_{name}"]


def check_ranks(logged: dict[str, float], values: Any, most: float = 0.005) -> None:
    """Check that every percentile has about its rank among `values`, and the rest of the view."""
    values = np.sort(values)
    n = values.size
    assert statistic(logged, "count") == n
    assert statistic(logged, "min") == values[0]
    assert statistic(logged, "max") == values[-1]
    assert statistic(logged, "mean") == pytest.approx(values.mean(), rel=1e-9)
    assert statistic(logged, "std") == pytest.approx(values.std(ddof=1), rel=1e-6)
    for percentile, suffix in zip(PERCENTILES, SUFFIXES, strict=True):
        found = statistic(logged, suffix)
        wanted = percentile / 100 * (n - 1)
        slack = most * n + 1
        low, high = np.floor(max(wanted - slack, 0)), np.ceil(min(wanted + slack, n - 1))
        assert values[int(low)] <= found <= values[int(high)], suffix


# -- The interval speaks about everything that came in ---------------------------------------------


def two_intervals(communicator: Communicator, options: dict[str, Any], sizes: Any) -> Any:
    aggregator = MetricsAggregator(communicator=communicator, percentiles=PERCENTILES, **options)
    seen = []
    for number, size in enumerate(sizes):
        rng = np.random.default_rng((communicator.rank, number))
        take(aggregator, rng.lognormal(5, 1, size))
        seen.append(aggregator.reduce().as_dict("t", "interval"))
    return seen


@pytest.mark.parametrize("route", ["narrow", "wide"])
@pytest.mark.parametrize("window", [100, 1000, None])
@pytest.mark.parametrize("size", [99, 100, 101, 199, 200, 201, 999, 1000, 1001, 2001, 5000])
def test_an_interval_of_any_size_is_reported_whole(
    route: str, window: int | None, size: int
) -> None:
    options = {"route": route, "dist_window_size": window}
    sizes = (size, 30, size)
    seen = run_threads(two_intervals, 2, options, sizes)[0]
    for number, logged in enumerate(seen):
        values = [
            np.random.default_rng((rank, number)).lognormal(5, 1, sizes[number])
            for rank in range(2)
        ]
        check_ranks(logged, np.concatenate(values))


def test_saving_in_between_loses_nothing_of_an_interval() -> None:
    aggregator = MetricsAggregator(50, percentiles=PERCENTILES)
    values = np.random.default_rng(0).normal(300, 0.1, 700)
    for part in np.split(values, 7):
        take(aggregator, part)
        aggregator.state_dict()
    snapshot = aggregator.reduce()
    check_ranks(snapshot.as_dict("t", "interval"), values)
    assert snapshot.as_dict("t")["t_d/x_stat_count"] == 50
    assert snapshot.per_rank("d", "x") == [pytest.approx(values.mean())]


# -- No jump between exact and histogram -----------------------------------------------------------


@examples(40)
@given(
    seed=st.integers(0, 2**32 - 1),
    beyond=st.integers(-3, 3),
    kind=st.sampled_from(["lognormal", "normal", "narrow", "pareto", "integers", "constant"]),
    window=st.sampled_from([64, None]),
)
def test_there_is_no_jump_where_exact_becomes_a_histogram(
    seed: int, beyond: int, kind: str, window: int | None
) -> None:
    rng = np.random.default_rng(seed)
    size = 2 * (EXACT_VALUES if window is None else window) + beyond
    values = {
        "lognormal": lambda: rng.lognormal(5, 1, size),
        "normal": lambda: rng.normal(0, 1, size),
        "narrow": lambda: rng.normal(300, 0.1, size),
        "pareto": lambda: rng.pareto(1.5, size),
        "integers": lambda: rng.integers(0, 50, size),
        "constant": lambda: np.full(size, 2.5),
    }[kind]()
    aggregator = MetricsAggregator(window, percentiles=PERCENTILES)
    take(aggregator, values, batch=1)
    logged = aggregator.reduce().as_dict("t", "interval")
    for percentile, suffix in zip(PERCENTILES, SUFFIXES, strict=True):
        exact = np.percentile(values, percentile)
        # The bound of m = 5, which 512 buckets reach on streams as wide as these.
        near = sorted(np.abs(values - exact))[1]
        assert statistic(logged, suffix) == pytest.approx(exact, rel=2**-5, abs=near + 1e-12)


# -- Without a bound -------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ["narrow", "wide"])
@pytest.mark.parametrize("world_size", [1, 3])
def test_without_a_window_size_the_run_is_about_all_values(route: str, world_size: int) -> None:
    def live(communicator: Communicator) -> list[dict[str, float]]:
        aggregator = MetricsAggregator(
            None, communicator=communicator, route=route, percentiles=PERCENTILES
        )
        seen = []
        for interval in range(4):
            rng = np.random.default_rng((communicator.rank, interval))
            take(aggregator, rng.normal(0, 3, 10 ** (interval + 1)))
            seen.append(aggregator.get_metrics_for_logging("t"))
        return seen

    results = run_threads(live, world_size)
    assert all(repr(result) == repr(results[0]) for result in results)
    values = np.empty(0)
    for interval, logged in enumerate(results[0]):
        new = [
            np.random.default_rng((rank, interval)).normal(0, 3, 10 ** (interval + 1))
            for rank in range(world_size)
        ]
        values = np.concatenate([values, *new])
        check_ranks(logged, values)
        if values.size <= EXACT_VALUES and route == "narrow":
            medians = np.percentile(values, PERCENTILES)
            found = [statistic(logged, suffix) for suffix in SUFFIXES]
            assert found == pytest.approx(medians.tolist(), rel=1e-12)


def test_weighted_values_beyond_the_bound_keep_their_weights() -> None:
    rng = np.random.default_rng(1)
    values, weights = rng.normal(10, 1, 3000), rng.integers(0, 4, 3000)
    aggregator = MetricsAggregator(None, percentiles=PERCENTILES)
    for value, weight in zip(values.tolist(), weights.tolist(), strict=True):
        aggregator.record("x", value, "distribution", dataset="d", weight=weight)
    logged = aggregator.get_metrics_for_logging("t")
    assert statistic(logged, "count") == (weights > 0).sum()
    assert statistic(logged, "mean") == pytest.approx(np.average(values, weights=weights))
    repeated = np.percentile(np.repeat(values, weights), PERCENTILES)
    found = [statistic(logged, suffix) for suffix in SUFFIXES]
    assert found == pytest.approx(repeated.tolist(), abs=0.05)


def test_values_on_a_device_join_those_of_the_host() -> None:
    torch = pytest.importorskip("torch")
    aggregator = MetricsAggregator(None, percentiles=PERCENTILES)
    take(aggregator, np.arange(1500))
    for value in range(1500, 1510):
        aggregator.record("x", torch.tensor(float(value)), "distribution", dataset="d")
        take(aggregator, [value + 100])
    snapshot = aggregator.reduce()
    everything = np.concatenate([np.arange(1510), np.arange(1600, 1610)])
    check_ranks(snapshot.as_dict("t"), everything)
    assert snapshot.per_rank("d", "x") == [pytest.approx(everything.mean())]


def test_the_rollup_pools_exact_values_and_histograms() -> None:
    aggregator = MetricsAggregator(None, percentiles=PERCENTILES)
    small, large = np.arange(10.0), np.random.default_rng(0).normal(50, 5, 4000)
    take(aggregator, large)
    aggregator.update([Metric("e", "x", v, AggregationType.DISTRIBUTION) for v in small.tolist()])
    logged = aggregator.reduce().as_dict("t", rollup=True)
    everything = np.concatenate([small, large])
    assert logged["t/x_stat_count"] == 4010
    assert logged["t/x_stat_mean"] == pytest.approx(everything.mean())
    assert logged["t/x_stat_p50"] == pytest.approx(np.median(everything), rel=5e-3)
    assert logged["t_e/x_stat_p50"] == 4.5


def test_a_run_of_many_values_takes_bounded_memory() -> None:
    aggregator = MetricsAggregator(None)
    rng = np.random.default_rng(0)
    sizes = set()
    for _ in range(30):
        for _ in range(4):
            batch = rng.lognormal(5, 1, 2500)
            take(aggregator, batch, batch=2500)
            held = aggregator._held.inbox
            state: Any = held._stage.below.states.get(("d", "x"))
            assert state is None or state.sample.size <= 1000 + 16_384 + 2500
            assert sum(len(adders) for adders, _ in held._log) <= 4096
        aggregator.reduce()
        sizes.add(len(aggregator.state_dict()["payload"]) // 20_000)
    assert sizes <= {0, 1}
    assert aggregator.get_metrics_for_logging("t")["t_d/x_stat_count"] == 300_000


# -- Failures --------------------------------------------------------------------------------------


def fails_once(communicator: Communicator, window: int | None) -> dict[str, float]:
    aggregator = MetricsAggregator(window, communicator=communicator, percentiles=PERCENTILES)
    rng = np.random.default_rng(communicator.rank)
    take(aggregator, rng.normal(0, 1, 500))
    with pytest.raises(RuntimeError, match="different steps"):
        aggregator.reduce(step=communicator.rank)
    take(aggregator, rng.normal(0, 1, 500))
    with pytest.raises(RuntimeError, match="different steps"):
        aggregator.reduce(step=communicator.rank)
    return aggregator.reduce().as_dict("t", "interval")


@pytest.mark.parametrize("window", [100, None])
def test_a_failed_reduction_neither_loses_nor_doubles_values(window: int | None) -> None:
    values = [np.random.default_rng(rank).normal(0, 1, 1000) for rank in range(2)]
    check_ranks(run_threads(fails_once, 2, window)[0], np.concatenate(values))


def test_a_weight_beyond_what_squares_can_hold_is_refused() -> None:
    aggregator = MetricsAggregator()
    with pytest.raises(ValueError, match=r"'x': the weight 1e\+200 is too large"):
        aggregator.record("x", 1.0, "distribution", weight=1e200)
    assert aggregator.get_metrics_for_logging("t") == {}


def test_ranks_with_and_without_a_window_size_are_told_so() -> None:
    def live(communicator: Communicator) -> str:
        window = None if communicator.rank else 10
        aggregator = MetricsAggregator(window, communicator=communicator)
        aggregator.record("x", 1.0, "distribution")
        with pytest.raises(ValueError, match="dist_window_size") as raised:
            aggregator.reduce()
        return str(raised.value)

    first, second = run_threads(live, 2)
    assert first == second


# -- Whoever looks --------------------------------------------------------------------------------


def test_several_threads_may_read_one_snapshot() -> None:
    for seed in range(20):
        aggregator = MetricsAggregator(None, percentiles=PERCENTILES)
        take(aggregator, np.random.default_rng(seed).normal(0, 1, 3000), batch=3000)
        snapshot = aggregator.reduce()
        barrier = threading.Barrier(3)

        def look(snapshot: Any = snapshot, barrier: Any = barrier) -> dict[str, float]:
            barrier.wait()
            return snapshot.as_dict("t")

        with ThreadPoolExecutor(3) as pool:
            seen = [future.result() for future in [pool.submit(look) for _ in range(3)]]
        assert seen == [seen[0]] * 3
        check_ranks(seen[0], np.random.default_rng(seed).normal(0, 1, 3000))


def test_saving_while_a_log_is_written_changes_nothing(tmp_path: Path) -> None:
    aggregator = MetricsAggregator(None, percentiles=PERCENTILES)
    with MetricsLogger([JSONLSink(tmp_path / "run.jsonl")]) as logger:
        for step in range(15):
            metrics = [
                Metric("d", f"x{number}", value, AggregationType.DISTRIBUTION)
                for number in range(20)
                for value in np.random.default_rng(number).normal(0, 1, 1100).tolist()
            ]
            aggregator.update(metrics)
            logger.log(step, aggregator, prefix="t", window="run")
            aggregator.state_dict()
    records = list(read_jsonl(tmp_path / "run.jsonl"))
    assert len(records) == 15
    assert records[-1].metrics["t_d/x7_stat_count"] == 15 * 1100


# -- What a checkpoint brings ---------------------------------------------------------------------


def test_a_smaller_window_than_that_of_the_checkpoint_costs_what_it_says() -> None:
    def sizes(communicator: Communicator, state: Any) -> list[int]:
        aggregator = MetricsAggregator(10, communicator=communicator)
        if state is not None:
            aggregator.load_state_dict(state)
        sent = []
        original = communicator._all_gather

        def counted(vector: Any) -> Any:
            sent.append(vector.size)
            return original(vector)

        communicator._all_gather = counted  # type: ignore[method-assign]
        for _ in range(3):
            take(aggregator, range(8))
            aggregator.reduce()
        return sent

    saved = MetricsAggregator(5000)
    take(saved, range(5000))
    saved.reduce()
    state = saved.state_dict()
    assert run_threads(sizes, 2, state)[0][-1] == run_threads(sizes, 2, None)[0][-1] < 100


def test_percentiles_of_huge_values_stay_between_the_extremes() -> None:
    aggregator = MetricsAggregator(percentiles=PERCENTILES)
    take(aggregator, [-1.7e308, 1e308, 1.7e308])
    logged = aggregator.get_metrics_for_logging("t")
    found = [statistic(logged, suffix) for suffix in SUFFIXES]
    assert all(-1.7e308 <= value <= 1.7e308 for value in found)


def test_an_interval_of_many_ranks_is_exact_without_a_window_size_too() -> None:
    def live(communicator: Communicator) -> Any:
        aggregator = MetricsAggregator(None, communicator=communicator, percentiles=PERCENTILES)
        take(aggregator, np.random.default_rng(communicator.rank).lognormal(5, 1, 400))
        return aggregator.reduce().as_dict("t", "interval")

    logged = run_threads(live, 4)[0]
    values = np.concatenate([np.random.default_rng(r).lognormal(5, 1, 400) for r in range(4)])
    found = [statistic(logged, suffix) for suffix in SUFFIXES]
    assert found == pytest.approx(np.percentile(values, PERCENTILES).tolist(), rel=1e-12)


@pytest.mark.parametrize("per_rank", [8, 16, 1024])
def test_windows_that_ranks_have_filled_are_what_each_view_of_them_says(per_rank: int) -> None:
    def live(communicator: Communicator) -> None:
        aggregator = MetricsAggregator(dist_window_size=per_rank, communicator=communicator)
        for dataset in ("a", "b"):
            mine = np.random.default_rng((communicator.rank, ord(dataset))).normal(size=per_rank)
            aggregator.record("x", mine, "distribution", dataset=dataset, each=True)
        snapshot = aggregator.reduce()
        both = [
            np.random.default_rng((rank, ord(dataset))).normal(size=per_rank)
            for dataset in ("a", "b")
            for rank in range(3)
        ]
        found = snapshot.as_dict("train", rollup=True)
        for which, values in (("train_a", both[:3]), ("train_b", both[3:]), ("train", both)):
            quantiles = np.quantile(np.concatenate(values), (0.05, 0.5, 0.95))
            assert [found[f"{which}/x_stat_p{one}"] for one in ("05", "50", "95")] == [*quantiles]
            assert found[f"{which}/x_stat_mean"] == pytest.approx(np.mean(values), rel=1e-12)
            assert found[f"{which}/x_stat_std"] == pytest.approx(np.std(values, ddof=1), rel=1e-12)
        drawn = snapshot.histogram("a", "x")
        assert drawn.counts.sum() == 3 * per_rank
        assert drawn.total == pytest.approx(np.sum(both[:3]), rel=1e-9)
        assert aggregator.state_dict()

    run_threads(live, 3)
