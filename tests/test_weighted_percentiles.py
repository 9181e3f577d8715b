"""A weight is a number of copies: whole weights say what repeating the values would.

Of n values, N = max(sum(w), n) stand there; quantile q is the mean of the ascending values over the
stretch from q(N - 1) to q(N - 1) + 1 of cumulated weight, on whichever way they were pooled.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_threads

from metricfold import AggregationType, LogLinearHistogram, Metric, MetricsAggregator
from metricfold._core.fold.sample import quantiles

DISTRIBUTION = AggregationType.DISTRIBUTION
PERCENTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)
Q = np.array(PERCENTILES) / 100

some = st.integers(1, 25).flatmap(
    lambda n: st.tuples(
        st.lists(st.floats(-1e6, 1e6), min_size=n, max_size=n),
        st.lists(st.integers(1, 300), min_size=n, max_size=n),
    )
)


def brute(values: Any, weights: Any, q: float) -> float:
    """Walk over the ascending values, in exact arithmetic."""
    order = np.argsort(values, kind="stable")
    x = [Fraction(float(value)) for value in np.asarray(values)[order]]
    w = [Fraction(float(weight)) for weight in np.asarray(weights)[order]]
    standing = max(sum(w), Fraction(len(w)))
    scale = standing / sum(w)
    start = Fraction(float(q)) * (standing - 1)
    reached = mean = Fraction(0)
    for value, weight in zip(x, w, strict=True):
        share = min(reached + weight * scale, start + 1) - max(reached, start)
        mean += value * max(share, Fraction(0))
        reached += weight * scale
    return float(mean)


def close(found: Any, expected: Any, values: Any) -> None:
    spread = float(np.abs(values).max()) or 1.0
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12 * spread)


# -- The rule ---------------------------------------------------------------------------------------


@given(some)
def test_whole_weights_are_numbers_of_copies(sample: Any) -> None:
    values, weights = map(np.array, sample)
    expected = np.quantile(np.repeat(values, weights), Q)
    close(quantiles(values, weights.astype(float), Q), expected, values)


@given(some, st.sampled_from([1.0, 0.5, 0.01, 1e-9, 1e-300, 5e-324]))
def test_equal_weights_up_to_1_are_no_weights(sample: Any, weight: float) -> None:
    values = np.array(sample[0])
    found = quantiles(values, np.full(values.size, weight), Q)
    assert found.tolist() == np.quantile(values, Q).tolist()


@given(some, st.floats(-12, 12), st.integers(0, 2**32))
def test_any_weights_follow_the_rule_and_stay_in_the_data(
    sample: Any, exponent: float, seed: int
) -> None:
    values = np.array(sample[0])
    rng = np.random.default_rng(seed)
    weights = rng.lognormal(0, 2, values.size) * 10**exponent
    q = np.sort(np.concatenate([rng.random(4), [0.0, 1.0]]))
    found = quantiles(values, weights, q)
    expected = [brute(values, weights, one) for one in q]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6 * np.abs(values).max())
    assert values.min() <= found.min()
    assert found.max() <= values.max()
    assert (np.diff(found) >= -1e-9 * np.ptp(values)).all()


def test_a_percentile_of_heavy_values_is_one_of_them() -> None:
    """The median of 1 with weight 90 and 1000 with weight 10 was 13.2, which nothing is near."""
    values, weights = np.array([1.0, 1000.0]), np.array([90.0, 10.0])
    assert quantiles(values, weights, np.array([0.05, 0.5, 0.95])).tolist() == [1.0, 1.0, 1000.0]
    # Shares are scaled to 2 values, 1.8 and 0.2 of them: the stretch from 0.95 to 1.95 holds both.
    shares = quantiles(values, weights / 100, np.array([0.5, 0.95]))
    assert shares.tolist() == pytest.approx([1.0, 0.85 * 1 + 0.15 * 1000])


def test_equal_weights_above_1_are_copies_where_they_were_no_weights() -> None:
    """Equal weights of any size gave the percentiles of the values without weights."""
    values = [5.0, 1.0, 8.0, 2.5, 2.5, 9.0]
    plain, weighted = MetricsAggregator(), MetricsAggregator()
    plain.update([Metric("d", "len", value, DISTRIBUTION) for value in values])
    weighted.update([Metric("d", "len", value, DISTRIBUTION, 7.0) for value in values])
    expected, found = (one.get_metrics_for_logging("t") for one in (plain, weighted))
    for p in (5, 50, 95):
        name = f"t_d/len_stat_p{p:02d}"
        assert found.pop(name) == np.quantile(np.repeat(values, 7), p / 100)
        assert expected.pop(name) == np.quantile(values, p / 100)
    assert found == pytest.approx(expected)
    assert np.quantile([1, 9], 0.25) == 3
    assert quantiles(np.array([1.0, 9.0]), np.array([2.0, 2.0]), np.array([0.25]))[0] == 1


REPORTED = {
    # fastverse/collapse#743: the median of repeated values is 11600.
    "collapse 743": (
        [11600, 35129, 58658, 82187, 105716, 129245, 152774, 223361],
        [358, 57, 19, 11, 3, 3, 3, 1],
    ),
    # harrelfe/Hmisc#81: weights of 0 moved the upper quantiles.
    "Hmisc 81": ([1, 2, 3, 4, 5], [0, 1, 2, 1, 0]),
    # numpy/numpy#27549: the 0-quantile was a value of weight 0.
    "numpy 27549": ([0, 1, 2], [0, 0, 1]),
    # tdunning/t-digest#167, apache/datafusion#19940: not what the repeated values say.
    "t-digest 167": ([9000, 3000, 3000, 1000, 1000], [2, 5, 6, 10, 16]),
    # JuliaStats/StatsBase.jl#933: the median was 2.5, whichever value had the weight.
    "StatsBase 933": ([1, 2, 3, 4], [1, 1000, 1, 1]),
}


@pytest.mark.parametrize("report", REPORTED)
def test_what_other_libraries_were_reported_for_equals_the_repeated_values(report: str) -> None:
    values, weights = (np.array(part, dtype=float) for part in REPORTED[report])
    expected = np.quantile(np.repeat(values, weights.astype(int)), Q).tolist()
    aggregator = MetricsAggregator(percentiles=PERCENTILES)
    pairs = zip(values.tolist(), weights.tolist(), strict=True)
    aggregator.update([Metric("d", "x", x, DISTRIBUTION, w) for x, w in pairs])
    found = list(percentiles(aggregator.get_metrics_for_logging("t")).values())
    assert found == pytest.approx(expected, rel=1e-12)
    empty, sketch = LogLinearHistogram(), LogLinearHistogram()
    sketch.update(values, weights)
    empty.merge(sketch)
    for histogram in (sketch, empty):
        assert histogram.quantile(Q).tolist() == pytest.approx(expected, rel=2.0**-histogram.m)


def test_weights_that_are_shares_let_the_heavy_value_be_the_median() -> None:
    """JuliaStats/StatsBase.jl#933 with probabilities: 2.5 for each of these."""
    values = np.array([1.0, 2.0, 3.0, 4.0])
    for place in range(4):
        weights = np.ones(4)
        weights[place] = 1000
        found = quantiles(values, weights / 1003, np.array([0.5]))
        assert found[0] == pytest.approx(values[place])


def test_values_whose_weights_are_all_0_are_no_values() -> None:
    """numpy/numpy#28589: the first value came out."""
    aggregator = MetricsAggregator()
    aggregator.update([Metric("d", "x", value, DISTRIBUTION, 0) for value in (1, 2, 3)])
    assert aggregator.get_metrics_for_logging("t") == {}
    histogram = LogLinearHistogram()
    histogram.update([1, 2, 3], [0, 0, 0])
    assert math.isnan(histogram.quantile(0.5))


@pytest.mark.parametrize("heavy", [1e15, 1e17, 1e20, 1e150])
def test_huge_weights_leave_the_middle_in_the_middle(heavy: float) -> None:
    found = quantiles(np.array([1.0, 9.0]), np.array([heavy, heavy]), np.array([0.49, 0.5, 0.51]))
    assert found.tolist() == [1.0, 5.0, 9.0]
    apart = quantiles(np.array([1.0, 5.0, 9.0]), np.array([1.0, heavy, 1.0]), np.array([0, 0.5, 1]))
    assert apart.tolist() == [1.0, 5.0, 9.0]


@pytest.mark.parametrize("weights", [(5e-324, 1e150), (1e150, 5e-324), (1.0, 0.3)])
def test_values_at_the_ends_of_the_floats_stay_numbers(weights: tuple[float, float]) -> None:
    largest = np.finfo(float).max
    values = np.array([-largest, largest] * 20)
    found = quantiles(values, np.array(weights * 20), Q)
    assert np.isfinite(found).all()
    assert found.tolist() == sorted(found.tolist())


# -- The same on every way --------------------------------------------------------------------------


def expected_of(values: Any, weights: Any) -> dict[str, float]:
    # What has no weight or is not finite is in neither sum(w) nor n.
    kept = (weights > 0) & np.isfinite(values)
    return {
        f"t_d/x_stat_p{p:02d}": brute(values[kept], weights[kept], q)
        for p, q in zip(PERCENTILES, Q, strict=True)
    }


def percentiles(logged: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in logged.items() if "_stat_p" in name}


def on_rank(
    communicator: Any, values: Any, weights: Any, route: str, window: int | None
) -> list[dict[str, float]]:
    rank, size = communicator.rank, communicator.world_size
    aggregator = MetricsAggregator(
        window, communicator=communicator, route=route, percentiles=PERCENTILES
    )
    mine = zip(values[rank::size].tolist(), weights[rank::size].tolist(), strict=True)
    aggregator.update([Metric("d", "x", x, DISTRIBUTION, w) for x, w in mine])
    state = aggregator.state_dict()
    resumed = MetricsAggregator(window, percentiles=PERCENTILES)
    resumed.load_state_dict(state)
    return [
        aggregator.get_metrics_for_logging("t"),
        *([resumed.get_metrics_for_logging("t")] if size == 1 else []),
    ]


def of_kind(kind: str) -> tuple[Any, Any]:
    rng = np.random.default_rng(7)
    # Far apart: each has a bucket of its own, so that a sketch is exact.
    values = (rng.permutation(40) + 1) * 32.0
    weights = {
        "whole": rng.integers(1, 60, 40).astype(float),
        "shares": rng.integers(1, 60, 40) / 64,
        "above and below 1": np.where(rng.random(40) < 0.5, 1 / 8, 24.0),
        "equal, above 1": np.full(40, 3.0),
        "equal, below 1": np.full(40, 0.25),
        "with holes": rng.integers(0, 3, 40) / 4,
    }[kind]
    if kind == "with holes":
        values[3:6] = math.nan, math.inf, -math.inf
    return values, weights


KINDS = (
    *("whole", "shares", "above and below 1"),
    *("equal, above 1", "equal, below 1", "with holes"),
)


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_routes_windows_and_checkpoints_follow_one_rule(kind: str) -> None:
    values, weights = of_kind(kind)
    expected = pytest.approx(expected_of(values, weights), rel=1e-9)
    for ranks in (1, 2, 3):
        for route in ("narrow", "wide"):
            for window in (1000, None):
                results = run_threads(on_rank, ranks, values, weights, route, window)
                for logged in (one for result in results for one in result):
                    assert percentiles(logged) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_sketch_and_its_merges_follow_the_same_rule(kind: str) -> None:
    values, weights = of_kind(kind)
    whole = LogLinearHistogram(512)
    whole.update(values, weights)
    parts = [LogLinearHistogram(512) for _ in range(3)]
    for place, part in enumerate(parts):
        part.update(values[place::3], weights[place::3])
    parts[0].merge(*parts[1:])
    expected = list(expected_of(values, weights).values())
    for histogram in (whole, parts[0], LogLinearHistogram.from_dict(whole.to_dict())):
        assert histogram.quantile(Q).tolist() == pytest.approx(expected, rel=1e-9)


@given(st.integers(1, 400), st.sampled_from(["whole", "shares", "mixed"]), st.integers(0, 2**32))
def test_a_sketch_is_as_near_to_the_rule_as_its_buckets_are_wide(
    size: int, kind: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    values = rng.lognormal(2, 1, size)
    weights = {
        "whole": rng.integers(1, 500, size).astype(float),
        "shares": rng.random(size) + 1e-3,
        "mixed": rng.choice([1.0, 90.0, 0.01], size),
    }[kind]
    histogram = LogLinearHistogram(512)
    histogram.update(values, weights)
    found = histogram.quantile(Q)
    np.testing.assert_allclose(found, quantiles(values, weights, Q), rtol=2.0**-histogram.m)


@pytest.mark.parametrize("kind", KINDS)
def test_what_devices_send_follows_the_same_rule(kind: str) -> None:
    torch = pytest.importorskip("torch")
    from metricfold.torch import DeviceAccumulator

    values, weights = of_kind(kind)
    # 64 buckets per octave: small whole numbers have one each.
    values = values / 32
    expected = expected_of(values, weights)
    acc = DeviceAccumulator({"x": "distribution"}, ("d",))
    acc.update("x", torch.tensor(values), weights=torch.tensor(weights))
    aggregator = MetricsAggregator(percentiles=PERCENTILES)
    aggregator.drain(acc)
    logged = percentiles(aggregator.get_metrics_for_logging("t"))
    assert logged == pytest.approx(expected, rel=1e-9)


def test_what_jax_sends_follows_the_same_rule() -> None:
    jax = pytest.importorskip("jax")
    from metricfold.jax import DeviceAccumulator

    update = jax.jit(lambda acc, values, weights: acc.update("x", values, weights=weights))
    for kind in ("whole", "shares"):
        values, weights = of_kind(kind)
        values = values / 32
        acc = DeviceAccumulator({"x": "distribution"}, ("d",))
        aggregator = MetricsAggregator(percentiles=PERCENTILES)
        aggregator.drain(update(acc, values.astype(np.float32), weights.astype(np.float32)))
        logged = percentiles(aggregator.get_metrics_for_logging("t"))
        assert logged == pytest.approx(expected_of(values, weights), rel=1e-6)


def test_datasets_together_follow_the_same_rule() -> None:
    aggregator = MetricsAggregator()
    aggregator.update([Metric("a", "len", 1.0, DISTRIBUTION, 90)])
    aggregator.update([Metric("b", "len", 1000.0, DISTRIBUTION, 10)])
    logged = aggregator.reduce().as_dict("t", rollup=True)
    assert (logged["t/len_stat_p50"], logged["t/len_stat_p95"]) == (1.0, 1000.0)
    assert logged["t/len_stat_count"] == 2
