"""Two routes to one result: a gather of all vectors, and a tree where that would be large."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from handlers_of_users import LaneRMS, MyTypes, RMSHandler
from hypotheses import examples
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_ranks, run_threads

from metricfold import AggregationType, Metric, MetricsAggregator
from metricfold._core.exchange import route as route_module
from metricfold._core.exchange.route import Exchange
from metricfold._core.reduce.header import RouteChoice
from metricfold._core.reduce.schema import Entry, Schema
from metricfold._core.reduce.wire import Wire
from metricfold.communicator import Communicator, LocalCommunicator

BOTH = pytest.mark.parametrize("route", ["gather", "tree"])

# -- Both give the same --------------------------------------------------------------------------

numbers = st.one_of(
    st.integers(-1000, 1000),
    st.floats(-1e6, 1e6),
    st.sampled_from([0.0, -0.0, 1e-300, 3e200, math.nan, math.inf, -math.inf]),
)
names = st.sampled_from(["a", "b", "c"])
weights = st.sampled_from([1.0, 1.0, 0.0, 0.5, 3])
# Elsewhere a value counts or does not.
counts = st.sampled_from([1.0, 1.0, 0.0])
WEIGHTED = (AggregationType.MEAN, AggregationType.DISTRIBUTION)


def of_type(agg_type: Any, values: st.SearchStrategy[Any]) -> st.SearchStrategy[Metric]:
    named = names.map(lambda name: f"{name} {agg_type}")
    datasets = st.sampled_from(["alpaca", "orca"])
    weighing = weights if agg_type in WEIGHTED else counts
    return st.builds(Metric, datasets, named, values, st.just(agg_type), weighing)


anything = st.one_of(
    *(
        of_type(agg_type, numbers)
        for agg_type in (
            AggregationType.SUM,
            AggregationType.MEAN,
            AggregationType.MAX,
            AggregationType.MIN,
            AggregationType.DISTRIBUTION,
            "lane rms",
        )
    ),
    of_type(AggregationType.CATEGORICAL_COUNT, st.sampled_from(["x", "y", 3, True])),
    of_type(MyTypes.RMS, st.integers(1, 9)),
)
interval_of_ranks = st.lists(st.lists(anything, max_size=12), min_size=4, max_size=4)


def live(
    communicator: Communicator, story: list[list[list[Metric]]], options: dict[str, Any]
) -> list[Any]:
    """Reduce a few intervals; returns all that the snapshots say on this rank."""
    aggregator = MetricsAggregator(communicator=communicator, **options)
    aggregator.register_handler("lane rms", LaneRMS())
    aggregator.register_handler(MyTypes.RMS, RMSHandler())
    said: list[Any] = []
    for number, ranks in enumerate(story):
        aggregator.update(ranks[communicator.rank])
        if number % 2:
            aggregator.state_dict()
        snapshot = aggregator.reduce(step=number)
        said += [
            snapshot.as_dict("t", window, rollup=True, macro=True)
            for window in ("run", "interval")
            if window == "run" or not snapshot.empty
        ]
        said.append(
            {
                key: (snapshot.lacking_count(*key), snapshot.lacking(*key))
                for ranks in story[: number + 1]
                for metrics in ranks
                for metric in metrics
                if metric.agg_type != MyTypes.RMS and metric.weight  # else it contributes no name
                for key in [(metric.dataset_name, metric.name)]
            }
        )
        said.append([len(found.counts) > 0 for found in snapshot.histograms("t").values()])
    return said


@examples(80)
@given(
    story=st.lists(interval_of_ranks, min_size=1, max_size=3),
    world_size=st.integers(1, 4),
    window=st.sampled_from([3, 1000, None]),
)
def test_both_routes_give_the_same(
    story: list[list[list[Metric]]], world_size: int, window: int | None
) -> None:
    story = [ranks[:world_size] for ranks in story]
    options = {"dist_window_size": window}
    gathered, *others = run_threads(live, world_size, story, {**options, "route": "gather"})
    for other in others:
        assert repr(other) == repr(gathered)
    merged, *others = run_threads(live, world_size, story, {**options, "route": "tree"})
    for other in others:
        assert repr(other) == repr(merged)
    magnitude = 1.0 + sum(
        abs(metric.value) * max(metric.weight, 1)
        for ranks in story
        for metrics in ranks
        for metric in metrics
        if isinstance(metric.value, int | float) and math.isfinite(metric.value)
    )
    for ours, theirs in zip(merged, gathered, strict=True):
        if not isinstance(ours, dict):
            assert ours == theirs
            continue
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            if "_stat_" in key and "count" not in key:
                # Of more points than one rank has room for a tree knows a sketch.
                near = pytest.approx(value, rel=1e-9, abs=1e-12 * magnitude, nan_ok=True)
                assert ours[key] == near, key
            else:
                # Lanes are merged in one order on both, and so come to the same bits.
                assert repr(ours[key]) == repr(value), key


# -- What each costs -----------------------------------------------------------------------------


class Counting:
    """Counts collectives, and the numbers that this rank hands to them."""

    def __init__(self, communicator: Communicator) -> None:
        self.sizes: list[int] = []
        for name in ("_all_gather", "_tree"):
            setattr(communicator, name, self._counting(getattr(communicator, name)))

    def _counting(self, collective: Any) -> Any:
        def counted(vector: Any, *args: Any) -> Any:
            self.sizes.append(vector.size)
            return collective(vector, *args)

        return counted


def hundred_metrics(communicator: Communicator, samples: int, route: str) -> tuple[list[int], int]:
    """Return the sizes of what a log sends in the steady state: 80 scalars, 20 distributions."""
    counting = Counting(communicator)
    aggregator = MetricsAggregator(communicator=communicator, route=route)
    rng = np.random.default_rng(communicator.rank)
    for _ in range(3):
        counting.sizes.clear()
        for number in range(80):
            agg = ("sum", "mean", "max", "min")[number % 4]
            aggregator.record(f"scalar {number}", number, agg)
        metrics = [
            Metric("d", f"dist {number}", value, AggregationType.DISTRIBUTION)
            for number in range(20)
            for value in rng.lognormal(5, 1, samples).tolist()
        ]
        aggregator.update(metrics)
        before = aggregator.collectives
        aggregator.reduce()
    return counting.sizes, aggregator.collectives - before


def test_what_a_rank_sends_into_a_tree_grows_with_neither_ranks_nor_samples(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = {
        (world_size, samples): run_threads(hundred_metrics, world_size, samples, "tree")[0]
        for world_size, samples in [(2, 1500), (4, 3000), (4, 10)]
    }
    sizes, collectives = found[4, 3000]
    assert collectives == len(sizes) == 1
    assert found[2, 1500] == (sizes, 1)
    assert sum(found[4, 10][0]) < sum(sizes) / 5
    with capsys.disabled():
        print(f"\n100 metrics, 20 of them distributions: {8 * sum(sizes):,} bytes a rank at most")
    gathered, collectives = run_threads(hundred_metrics, 2, 10, "gather")[0]
    assert collectives == len(gathered) == 1


def four_intervals(rank: int, route: str) -> tuple[list[int], list[dict[str, float]]]:
    aggregator = MetricsAggregator(None, route=route)
    rng = np.random.default_rng(rank)
    counted, logged = [], []
    for _ in range(4):
        for number, value in enumerate(rng.lognormal(0, 9, 300).tolist()):
            aggregator.record(f"loss {number}", value)
        values = rng.normal(0, 1, 2100).tolist()
        aggregator.update([Metric("d", "len", v, AggregationType.DISTRIBUTION) for v in values])
        before = aggregator.collectives
        logged.append(aggregator.get_metrics_for_logging("t"))
        counted.append(aggregator.collectives - before)
    return counted, logged


@BOTH
def test_real_ranks_come_to_the_same_bits_by_one_exchange(route: str) -> None:
    """Where the vectors of all were large, a log took two collectives."""
    results = run_ranks(four_intervals, 4, route)
    assert results[0][0][1:] == [1] * 3
    assert all(repr(result) == repr(results[0]) for result in results)
    last = results[0][1][-1]
    losses = [np.random.default_rng(rank).lognormal(0, 9, 300)[0] for rank in range(4)]
    assert results[0][1][0]["t/loss 0"] == pytest.approx(np.mean(losses))
    assert last["t_d/len_stat_count"] == 4 * 4 * 2100


def big(communicator: Communicator, metrics: int) -> tuple[bool, float]:
    """Log distributions whose windows are full; returns whether they were merged on the way."""
    trees: list[Any] = []
    tree = communicator.tree

    def watched(vector: Any, merge: Any) -> Any:
        trees.append(vector.size)
        return tree(vector, merge)

    communicator.tree = watched  # type: ignore[method-assign]
    aggregator = MetricsAggregator(communicator=communicator)
    for _ in range(2):
        for number in range(metrics):
            full = np.arange(1000.0)
            aggregator.record(f"{number}", full, "distribution", dataset="d", each=True)
        trees.clear()
        logged = aggregator.get_metrics_for_logging("t")
    return bool(trees), logged["t_d/0_stat_p50"]


def test_the_route_follows_from_how_much_there_is_to_say() -> None:
    assert run_threads(big, 2, 100)[0] == (False, 499.5)
    # 2 ranks x 300 windows of 1000 float64 are more than 4 MiB.
    merged, median = run_threads(big, 2, 300)[0]
    assert merged
    assert median == pytest.approx(499.5, rel=2e-3)
    # One rank has nobody to send anything to.
    assert run_threads(big, 1, 600)[0] == (False, 499.5)


# -- Who had what --------------------------------------------------------------------------------


def extremes(communicator: Communicator, route: str) -> tuple[Any, ...]:
    aggregator = MetricsAggregator(communicator=communicator, route=route)
    rank = communicator.rank
    aggregator.record("grad", [1.0, 7.0, 3.0, 7.0][rank], "max")
    aggregator.record("step", 10.0 * rank + 1, "max", per_rank=True)
    aggregator.record("low", [5.0, -2.0, 0.0, 1.0][rank], "min")
    aggregator.record("bad", math.nan if rank == 2 else 1.0, "max")
    aggregator.record("wait", rank + 0.5, per_rank=True)
    if rank % 2:
        aggregator.record("odd", 1.0, "sum")
    snapshot = aggregator.reduce()
    assert (snapshot.owner(None, "grad"), snapshot.tied(None, "grad")) == (1, 2)
    assert (snapshot.owner(None, "low"), snapshot.tied(None, "low")) == (1, 1)
    assert snapshot.owner(None, "step") == 3
    assert snapshot.owner(None, "bad") == 2
    assert snapshot.lacking_count(None, "odd") == 2
    assert snapshot.lacking_count(None, "grad") == 0
    assert snapshot.lacking(None, "grad") == []
    assert snapshot.lacking(None, "wait") == []
    assert snapshot.lacking(None, "odd") == [0, 2]
    if route == "tree":
        with pytest.raises(ValueError, match="Record it with per_rank=True"):
            snapshot.per_rank(None, "grad")
    else:
        assert snapshot.per_rank(None, "grad") == [1.0, 7.0, 3.0, 7.0]
    return snapshot.per_rank(None, "wait"), snapshot.per_rank(None, "step")


@BOTH
def test_owners_ties_and_absentees_are_known(route: str) -> None:
    """By two all-reduces a rank was known only where it was the only one, and absentees were counted."""
    expected = ([0.5, 1.5, 2.5, 3.5], [1.0, 11.0, 21.0, 31.0])
    assert run_threads(extremes, 4, route) == [expected] * 4


def infinite(communicator: Communicator, route: str) -> list[Any]:
    aggregator = MetricsAggregator(communicator=communicator, route=route, on_nan="skip")
    seen: list[Any] = []
    for owners in ([2], [1, 2], [], [3]):
        aggregator.record("length", 1.0)
        if communicator.rank in owners:
            aggregator.record("low", -math.inf, "max")
            aggregator.record("high", math.inf, "min")
        elif communicator.rank == 0:
            aggregator.record("low", math.nan, "max")
        snapshot = aggregator.reduce()
        seen += [(snapshot.owner(None, n), snapshot.tied(None, n)) for n in ("low", "high")]
    return [*seen, snapshot.owner(None, "low", "run"), snapshot.tied(None, "high", "run")]


@BOTH
def test_an_extremum_that_no_number_lies_beyond_has_an_owner(route: str) -> None:
    """It had none: the lane of a rank without a value holds the same infinity."""
    expected = [*[(2, 1)] * 2, *[(1, 2)] * 2, *[(None, 0)] * 2, *[(3, 1)] * 2, 2, 1]
    assert run_threads(infinite, 4, route) == [expected] * 4


def late_wish(communicator: Communicator, route: str) -> list[Any]:
    aggregator = MetricsAggregator(communicator=communicator, route=route)
    aggregator.record("time", communicator.rank)
    aggregator.reduce()
    if communicator.rank == 1:
        aggregator.record("time", 5.0, per_rank=True)
    aggregator.state_dict()
    aggregator.record("time", communicator.rank)
    return aggregator.reduce().per_rank(None, "time")


@BOTH
def test_one_rank_may_ask_for_values_per_rank_later(route: str) -> None:
    assert run_threads(late_wish, 2, route) == [[0.0, 3.0]] * 2


# -- Whatever fails ------------------------------------------------------------------------------


def told_different_routes(communicator: Communicator) -> str:
    route = "tree" if communicator.rank else "auto"
    aggregator = MetricsAggregator(communicator=communicator, route=route)
    aggregator.record("loss", 1.0)
    with pytest.raises(RuntimeError) as raised:
        aggregator.reduce()
    return str(raised.value)


def test_ranks_that_were_told_different_routes_are_told_so() -> None:
    first, *others = run_threads(told_different_routes, 3)
    assert "rank 0 with route='auto', ranks 1-2 with route='tree'" in first
    assert set(others) == {first}


def test_a_lack_of_memory_between_two_layouts_leaves_none_of_another_route(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Until now that rank went on gathering, where the others merged on the way."""
    exchange = Exchange(LocalCommunicator(), RouteChoice.TREE)
    schema = Schema([Entry(("", "x"), "sum")])

    def made(schema: Schema, world_size: int, *, joining: bool) -> Wire:
        if joining:
            raise MemoryError
        return Wire(schema, world_size, joining=joining)

    with monkeypatch.context() as short:
        short.setattr(route_module, "Wire", made)
        with pytest.raises(MemoryError):
            exchange.wire(schema)
    assert exchange.wire(schema).joining


def test_an_unknown_route_is_refused() -> None:
    with pytest.raises(ValueError, match="route='broad': use 'auto', 'gather' or 'tree'"):
        MetricsAggregator(route="broad")


def older_name(communicator: Communicator) -> Any:
    route = ("narrow", "gather")[communicator.rank]
    aggregator = MetricsAggregator(communicator=communicator, route=route)
    aggregator.record("loss", 1.0 + communicator.rank)
    return aggregator.reduce().per_rank(None, "loss")


def test_routes_go_by_their_older_names_too() -> None:
    """`narrow` was what is `gather` now, and `wide` were two all-reduces in the place of `tree`."""
    assert run_threads(older_name, 2) == [[1.0, 2.0]] * 2
    assert MetricsAggregator(route="wide").reduce().as_dict("t") == {}


# -- Checkpoints ---------------------------------------------------------------------------------


def saves(communicator: Communicator, route: str, window: int | None) -> dict[str, Any]:
    aggregator = MetricsAggregator(window, communicator=communicator, route=route)
    rng = np.random.default_rng(communicator.rank)
    for _ in range(2):
        values = rng.lognormal(5, 1, 4000).tolist()
        aggregator.update([Metric("d", "len", v, AggregationType.DISTRIBUTION) for v in values])
        aggregator.record("total", 1, "sum")
        state = aggregator.state_dict()
    aggregator.state_dict()
    return state


def resumes(communicator: Communicator, state: dict[str, Any], options: Any) -> Any:
    aggregator = MetricsAggregator(communicator=communicator, **options)
    aggregator.load_state_dict(state)
    aggregator.update([Metric("d", "len", 1.0, AggregationType.DISTRIBUTION)])
    snapshot = aggregator.reduce()
    return snapshot.as_dict("t"), snapshot.as_dict("t", "interval")


@BOTH
@pytest.mark.parametrize("window", [100, None])
@pytest.mark.parametrize("world_size", [1, 4])
def test_a_checkpoint_holds_every_value_of_the_open_interval(
    route: str, window: int | None, world_size: int
) -> None:
    state, *others = run_threads(saves, 3, route, window)
    assert all(other == state for other in others)
    pooled = np.concatenate(
        [np.random.default_rng(rank).lognormal(5, 1, 8000) for rank in range(3)]
    )
    options = {"dist_window_size": window, "route": route}
    run, interval = run_threads(resumes, world_size, state, options)[0]
    assert run["t/total"] == interval["t/total"] == 6
    count = 24_000 + world_size
    assert interval["t_d/len_stat_count"] == count
    kept = 3 * 100 + world_size if world_size > 3 else 100 * world_size
    assert run["t_d/len_stat_count"] == (count if window is None else kept)
    for view in (run, interval) if window is None else (interval,):
        median = float(np.median(pooled))
        assert view["t_d/len_stat_p50"] == pytest.approx(median, rel=5e-3)
        assert view["t_d/len_stat_mean"] == pytest.approx(pooled.mean(), rel=1e-3)


def saves_alone(communicator: Communicator) -> tuple[Any, ...]:
    aggregator = MetricsAggregator(1000, communicator=communicator, route="tree")
    values = np.random.default_rng(communicator.rank).normal(300, 5, 900).tolist()
    aggregator.update([Metric("d", "t", v, AggregationType.DISTRIBUTION) for v in values])
    snapshot = aggregator.reduce()
    state = aggregator.state_dict(sync=False)
    again = MetricsAggregator(10_000)
    again.load_state_dict(state)
    return snapshot.as_dict("t"), again.get_metrics_for_logging("t")


def test_a_state_saved_by_one_rank_stands_for_all_that_were_merged_on_the_way() -> None:
    logged, resumed = run_threads(saves_alone, 4)[0]
    assert resumed["t_d/t_stat_count"] == logged["t_d/t_stat_count"] == 3600
    for percentile in ("p05", "p50", "p95", "mean", "std"):
        key = f"t_d/t_stat_{percentile}"
        assert resumed[key] == pytest.approx(logged[key], rel=1e-2)


def test_a_state_about_recent_values_is_not_taken_for_one_about_all() -> None:
    aggregator = MetricsAggregator(None)
    aggregator.record("x", 1.0, "distribution")
    state = aggregator.state_dict()
    other = MetricsAggregator(10)
    with pytest.raises(
        ValueError, match="dist_window_size=None, but this aggregator has dist_window_size=10"
    ):
        other.load_state_dict(state)


# -- Found by others -----------------------------------------------------------------------------


def wish_in_an_open_interval(communicator: Communicator, route: str) -> Any:
    aggregator = MetricsAggregator(communicator=communicator, route=route)
    aggregator.record("x", communicator.rank)
    aggregator.state_dict()
    if communicator.rank == 1:
        aggregator.record("x", 5.0, per_rank=True)
    snapshot = aggregator.reduce()
    if route == "gather":
        return snapshot.per_rank(None, "x"), snapshot.lacking(None, "x")
    # What came in before the wish was merged on the way.
    with pytest.raises(ValueError, match="per_rank=True"):
        snapshot.per_rank(None, "x")
    assert snapshot.lacking(None, "x") == []
    aggregator.record("x", communicator.rank)
    return aggregator.reduce().per_rank(None, "x")


def test_values_per_rank_are_whole_or_refused() -> None:
    assert run_threads(wish_in_an_open_interval, 2, "gather")[0] == ([0.0, 3.0], [])
    assert run_threads(wish_in_an_open_interval, 2, "tree")[0] == [0.0, 1.0]


def counts_per_rank(communicator: Communicator) -> list[Any]:
    aggregator = MetricsAggregator(communicator=communicator, route="tree")
    for number in range(50):
        kind = f"{communicator.rank}-{number}"
        aggregator.record("kind", kind, "categorical_count", per_rank=True)
    aggregator.record("len", 1.0, "distribution", per_rank=True)
    aggregator.record("len", math.nan, "distribution", per_rank=True)
    aggregator.record("len", 2.0 + communicator.rank, "distribution", per_rank=True)
    snapshot = aggregator.reduce()
    assert snapshot._reduced.schema.per_rank.sum_width == 2 + 5
    return [snapshot.per_rank(None, "kind"), snapshot.per_rank(None, "len")]


def test_counts_and_means_are_known_per_rank_at_a_few_numbers_each() -> None:
    assert run_threads(counts_per_rank, 2)[0] == [[50.0, 50.0], [1.5, 2.0]]


def fails_to_pack_again(communicator: Communicator, route: str) -> str:
    aggregator = MetricsAggregator(communicator=communicator, route=route)
    aggregator.record("x", 1.0)
    if communicator.rank == 1:
        reducer = aggregator._held.run.reducer
        packed, calls = reducer._packed, []

        def broken(*args: Any) -> Any:
            calls.append(args)
            if len(calls) == 2:
                raise MemoryError("no room")
            return packed(*args)

        reducer._packed = broken  # type: ignore[method-assign]
    with pytest.raises(RuntimeError) as raised:
        aggregator.reduce()
    assert aggregator.get_metrics_for_logging("t") == {"t/x": 1.0}
    return str(raised.value)


@BOTH
def test_a_rank_that_fails_after_the_keys_are_agreed_on_says_so_to_all(route: str) -> None:
    first, second = run_threads(fails_to_pack_again, 2, route)
    assert first == second
    assert "rank 1 could not take part: it could not pack what it holds: MemoryError" in first


def alone_or_beside(communicator: Communicator, others: int) -> Any:
    aggregator = MetricsAggregator(communicator=communicator)
    g = np.random.default_rng(communicator.rank)
    for number, value in enumerate((g.normal(size=20) * 10.0 ** g.integers(-9, 9, 20)).tolist()):
        aggregator.record(f"s{number}", value, ("sum", "mean")[number % 2])
    for number in range(others):
        values = np.arange(1000.0) + communicator.rank
        aggregator.record(f"d{number}", values, "distribution", each=True)
    logged = aggregator.reduce().as_dict("t")
    return {key: value for key, value in logged.items() if key.startswith("t/s")}


def test_a_metric_has_the_same_bits_alone_and_beside_so_many_that_all_are_merged_on_the_way() -> (
    None
):
    """An all-reduce chooses its order by the size of the message (rocm-systems #11661, nccl #157)."""
    alone = run_threads(alone_or_beside, 5, 0)
    assert {repr(one) for one in run_threads(alone_or_beside, 5, 130)} == {repr(alone[0])}


def nan_on(communicator: Communicator, route: str, where: int, agg: str) -> Any:
    aggregator = MetricsAggregator(communicator=communicator, route=route)
    value = math.nan if communicator.rank == where else float(communicator.rank)
    aggregator.record("x", value, agg)
    snapshot = aggregator.reduce()
    return math.isnan(snapshot.as_dict("t")["t/x"]), snapshot.owner(None, "x")


@BOTH
def test_a_nan_is_seen_whichever_rank_has_it(route: str) -> None:
    """A maximum that compares drops it, or another rank's number with it (mlx #4072)."""
    for world_size in (2, 3, 5):
        for where in range(world_size):
            for agg in ("max", "min"):
                assert run_threads(nan_on, world_size, route, where, agg) == [(True, where)] * (
                    world_size
                )
