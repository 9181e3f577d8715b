"""Totals over datasets: always there, exact, and never in the place of what is somebody's own."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
from handlers_of_users import LaneRMS, RMSHandler
from ranks import run_threads

from metricfold import (
    AggregationHandler,
    AggregationType,
    Metric,
    MetricsAggregator,
    MetricsLogger,
    MetricState,
    Snapshot,
)

ROUTES = pytest.mark.parametrize("route", ["narrow", "wide"])


def lengths(*values: float, dataset: str, weight: float = 1.0) -> list[Metric]:
    return [Metric(dataset, "len", value, "distribution", weight) for value in values]


# -- Over all datasets ---------------------------------------------------------------------------


def mixture(rank: int) -> list[Metric]:
    """Return the metrics of two datasets, of which rank 1 has one."""
    metrics = [
        Metric("a", "loss", 1.0, "mean", 30 - 10 * rank),
        Metric("a", "tokens", 7, "sum"),
        Metric("a", "kind", "x", "categorical_count"),
        Metric("a", "longest", 5 + rank, "max"),
        *lengths(1, 2, 3, dataset="a"),
    ]
    if rank == 0:
        metrics += [
            Metric("b", "loss", 4.0, "mean", 10),
            Metric("b", "tokens", 1, "sum"),
            Metric("b", "kind", "y", "categorical_count"),
            Metric("b", "longest", 2, "max"),
            *lengths(100, dataset="b", weight=2),
        ]
    return metrics


def totals(communicator: Any, route: str) -> dict[str, float]:
    aggregator = MetricsAggregator(communicator=communicator, route=route)
    aggregator.update(mixture(communicator.rank))
    aggregator.register_handler("rms", LaneRMS())
    aggregator.record("norm", 3.0 + communicator.rank, "rms", dataset=("a", "b")[communicator.rank])
    snapshot = aggregator.reduce()
    plain = snapshot.as_dict("t")
    rolled = snapshot.as_dict("t", rollup=True, macro=True)
    assert {key: rolled[key] for key in plain} == plain
    return {key: value for key, value in rolled.items() if key not in plain}


@ROUTES
def test_a_total_merges_the_states_of_all_datasets(route: str) -> None:
    one, two = run_threads(totals, 2, route)
    assert one == two
    assert one["t/loss"] == (30 + 20 + 40) / 60
    assert one["t/loss_macro"] == 2.5
    assert one["t/tokens"] == 15.0
    assert one["t/longest"] == 6.0
    assert one["t/norm"] == pytest.approx(math.sqrt(12.5))
    assert (one["t/kind_count_x"], one["t/kind_count_y"]) == (2.0, 1.0)
    assert one["t/len_stat_count"] == 7.0
    assert one["t/len_stat_mean"] == pytest.approx((2 * (1 + 2 + 3) + 200) / 8)
    assert one["t/len_stat_max"] == 100.0


def logged(communicator: Any, route: str) -> list[dict[str, float]]:
    """Log three intervals: of one dataset, of two, and of one again."""
    aggregator = MetricsAggregator(communicator=communicator, route=route)
    found = []
    for datasets in (("a",), ("a", "b"), ("a",)):
        for dataset in datasets:
            aggregator.record("loss", float(ord(dataset)), dataset=dataset)
            aggregator.record("seen", 1, "sum", dataset=dataset)
        values = aggregator.reduce().as_dict("t", "auto", rollup=True, macro=True)
        found.append({key: value for key, value in values.items() if "t/" in key})
    return found


@ROUTES
def test_totals_are_there_from_the_first_log_where_they_used_to_wait_for_a_second_dataset(
    route: str,
) -> None:
    one, two = run_threads(logged, 2, route)
    assert one == two
    assert one == [
        {"t/loss": 97.0, "t/loss_macro": 97.0, "t/seen": 2.0},
        {"t/loss": 97.5, "t/loss_macro": 97.5, "t/seen": 6.0},
        {"t/loss": 97.0, "t/loss_macro": 97.0, "t/seen": 8.0},
    ]


def test_the_total_of_one_dataset_is_what_that_dataset_has_bit_for_bit() -> None:
    aggregator = MetricsAggregator(dist_window_size=None, on_nan="skip")
    rng = np.random.default_rng(0)
    aggregator.update(
        [
            *lengths(*rng.lognormal(0, 3, 3000).tolist(), dataset="a", weight=3),
            Metric("a", "loss", 0.1, "mean", 3),
            Metric("a", "loss", math.nan, "mean"),
            Metric("a", "kind", "x", "categorical_count"),
            Metric("a", "rate", 3, "rate"),
        ]
    )
    values = aggregator.reduce().as_dict("t", rollup=True)
    own = {key: value for key, value in values.items() if key.startswith("t_a/")}
    assert {key.replace("t_a/", "t/"): value for key, value in own.items()} == {
        key: value for key, value in values.items() if key.startswith("t/")
    }


def test_the_dict_of_the_aggregator_itself_has_no_totals() -> None:
    aggregator = MetricsAggregator()
    aggregator.update([Metric("a", "loss", 1.0, "mean"), Metric("b", "loss", 3.0, "mean")])
    assert aggregator.get_metrics_for_logging("t") == {"t_a/loss": 1.0, "t_b/loss": 3.0}


def test_a_name_of_two_types_has_no_total_and_that_is_said_once() -> None:
    aggregator = MetricsAggregator()
    aggregator.update([Metric("a", "n", 1, "sum"), Metric("b", "n", 1, "max")])
    snapshot = aggregator.reduce()
    with pytest.warns(
        RuntimeWarning, match=r"'n' is 'sum' in dataset 'a' and 'max' in dataset 'b'.*no total"
    ):
        assert "t/n" not in snapshot.as_dict("t", rollup=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        snapshot.as_dict("t", rollup=True)
        snapshot.as_dict("t")


@pytest.mark.parametrize("rollup", ["level", "all", None, 1, ["levels"]])
def test_a_rollup_that_is_none_is_refused(rollup: Any) -> None:
    snapshot = MetricsAggregator().reduce()
    with pytest.raises(ValueError, match=r"rollup=.*: use True .*'levels'"):
        snapshot.as_dict("t", rollup=rollup)
    with pytest.raises(ValueError, match="rollup="), MetricsLogger([]) as logger:
        logger.log(1, snapshot, prefix="t", rollup=rollup)


# -- Over levels ---------------------------------------------------------------------------------


def levels(communicator: Any, route: str) -> dict[str, float]:
    aggregator = MetricsAggregator(communicator=communicator, route=route)
    names = ("code/python/hub", "code/rust", "web")
    for place, dataset in enumerate(names):
        if place % 2 == communicator.rank:
            aggregator.record("loss", float(place), weight=place + 1, dataset=dataset)
            aggregator.update(lengths(*range(10 * place, 10 * place + 5), dataset=dataset))
    aggregator.derive("perplexity", lambda m: math.exp(m["loss"]))
    return aggregator.reduce().as_dict("t", "interval", rollup="levels")


@ROUTES
def test_levels_are_totals_of_datasets_whose_names_begin_alike(route: str) -> None:
    one, two = run_threads(levels, 2, route)
    assert one == two
    losses = {key: value for key, value in one.items() if key.endswith("/loss")}
    assert losses == {
        "t/loss": (0 * 1 + 1 * 2 + 2 * 3) / 6,
        "t_code/loss": (0 * 1 + 1 * 2) / 3,
        "t_code/python/loss": 0.0,
        "t_code/python/hub/loss": 0.0,
        "t_code/rust/loss": 1.0,
        "t_web/loss": 2.0,
    }
    assert one["t_code/perplexity"] == math.exp(2 / 3)
    pooled = [*range(5), *range(10, 15)]
    assert one["t_code/len_stat_p50"] == np.percentile(pooled, 50)
    assert one["t_code/len_stat_p95"] == np.percentile(pooled, 95)


def test_types_that_differ_elsewhere_leave_a_level_its_total() -> None:
    aggregator = MetricsAggregator()
    for dataset in ("code/a", "code/b"):
        aggregator.record("n", 2, "sum", dataset=dataset)
    aggregator.record("n", 9, "max", dataset="web")
    with pytest.warns(RuntimeWarning, match="no total over datasets"):
        values = aggregator.reduce().as_dict("t", rollup="levels")
    assert values["t_code/n"] == 4.0
    assert "t/n" not in values


def test_a_level_that_is_a_dataset_is_left_out_and_said_once() -> None:
    aggregator = MetricsAggregator()
    for dataset in ("code", "code/python", "web/a"):
        aggregator.record("loss", 2.0, dataset=dataset)
        aggregator.record("loss", 4.0, dataset=dataset)
    aggregator.record("seen", 1, "sum", dataset="code/python")
    snapshot = aggregator.reduce()
    with pytest.warns(
        RuntimeWarning, match=r"leaves out the level 'code', for there is a dataset .*'code/\.\.\.'"
    ):
        values = snapshot.as_dict("t", rollup="levels")
    assert values["t_web/loss"] == 3.0
    assert "t_code/seen" not in values
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert snapshot.as_dict("t", rollup="levels") == values


def test_slashes_at_the_ends_of_a_name_make_no_level_of_nothing() -> None:
    aggregator = MetricsAggregator()
    for dataset in ("/a", "b//c", "d/"):
        aggregator.record("loss", 2.0, dataset=dataset)
    values = aggregator.reduce().as_dict("t", rollup="levels")
    assert values.keys() == {
        "t/loss",
        "t_/a/loss",
        "t_b/loss",
        "t_b//c/loss",
        "t_d/loss",
        "t_d//loss",
    }


# -- Whose a key is ------------------------------------------------------------------------------


class Expanding(AggregationHandler):
    """Reports its values as a metric of another dataset and name."""

    def __init__(self, dataset: str, name: str) -> None:
        self.dataset, self.name = dataset, name

    def initialize_metric_state(
        self, dataset_name: str, metric_name: str, agg_type: Any
    ) -> MetricState:
        return MetricState(dataset_name, metric_name, 0.0, agg_type)

    def update(self, local_agg_metric: MetricState, metric: Metric) -> None:
        local_agg_metric.value += metric.value

    def finalize_local_agg(self, local_agg_metric: MetricState) -> list[MetricState]:
        return [
            MetricState(self.dataset, self.name, local_agg_metric.value, local_agg_metric.agg_type)
        ]

    def finalize_dist_agg(self, local_agg_metrics: list[MetricState]) -> MetricState:
        return local_agg_metrics[0]


def own(dataset: str | None, name: str, *, custom: bool) -> Snapshot:
    """Return what has the key of a total of its own: recorded, or by a custom handler."""
    aggregator = MetricsAggregator()
    aggregator.update(
        [Metric("code/a", "loss", 1.0, "mean"), Metric("code/c", "loss", 3.0, "mean")]
    )
    aggregator.update([Metric("code/b/d", "x", 3.0, "mean")])
    if custom:
        aggregator.register_handler("expanding", Expanding(dataset or "", name))
        aggregator.record("anything", 7.0, "expanding")
    else:
        aggregator.record(name, 7.0, dataset=dataset)
    return aggregator.reduce()


@pytest.mark.parametrize(
    ("dataset", "name", "custom", "printed", "whose"),
    [
        (None, "loss_macro", False, "t/loss_macro", "a metric"),
        (None, "loss_macro", True, "t/loss_macro", "a result of a custom handler"),
        ("code", "loss", True, "t_code/loss", "a result of a custom handler"),
        ("code", "b/x", True, "t_code/b/x", "a result of a custom handler"),
        ("a", "loss/loss", False, None, ""),
    ],
)
def test_what_is_recorded_under_a_name_stays_and_the_total_gives_way(
    dataset: str | None, name: str, custom: bool, printed: str | None, whose: str
) -> None:
    snapshot = own(dataset, name, custom=custom)
    if printed is None:  # nobody else has that name
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            snapshot.as_dict("t", rollup="levels", macro=True)
        return
    shown = printed.removeprefix("t")
    with pytest.warns(RuntimeWarning, match=rf"{whose} and a total .* '{{prefix}}{shown}'"):
        values = snapshot.as_dict("t", rollup="levels", macro=True)
    assert values[printed] == 7.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert snapshot.as_dict("t", rollup="levels", macro=True) == values


def test_two_totals_of_one_name_are_said_and_one_is_shown() -> None:
    aggregator = MetricsAggregator()
    aggregator.record("b/x", 1.0, dataset="code/a")  # level 'code' prints code/b/x
    aggregator.record("x", 3.0, dataset="code/b/c")  # and so does level 'code/b'
    with pytest.warns(RuntimeWarning, match="a total over datasets and a total over datasets"):
        values = aggregator.reduce().as_dict("t", rollup="levels")
    assert values["t_code/b/x"] == 1.0


def test_a_dataset_and_a_level_that_print_the_same_leave_the_datasets() -> None:
    aggregator = MetricsAggregator()
    aggregator.record("x", 3.0, dataset="code/b")
    aggregator.record("b/x", 1.0, dataset="code/a")
    with pytest.warns(RuntimeWarning, match="a metric and a total over datasets"):
        values = aggregator.reduce().as_dict("t", rollup="levels")
    assert values["t_code/b/x"] == 3.0


def test_metrics_of_handlers_without_lanes_have_no_total() -> None:
    aggregator = MetricsAggregator()
    aggregator.register_handler(AggregationType.CUSTOM, RMSHandler())
    aggregator.record("norm", 3.0, AggregationType.CUSTOM, dataset="a")
    assert aggregator.reduce().as_dict("t", rollup=True) == {"t_a/norm": 3.0}
