"""Handlers called directly, as a user's own code or handler may."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
from handlers_of_users import LaneRMS, MyTypes, RMSHandler

from metricfold import (
    AggregationHandler,
    AggregationType,
    CategoricalCountAggHandler,
    DistributionAggHandler,
    LaneHandler,
    MaxAggHandler,
    MeanAggHandler,
    Metric,
    MetricsAggregator,
    MetricState,
    MinAggHandler,
    RateAggHandler,
    SumAggHandler,
)
from metricfold._core.fold.builtin import built_in_handlers
from metricfold._core.fold.state import ReducedStates
from metricfold._core.fold.statistics import percentile_name
from metricfold.communicator import Communicator
from metricfold.metric import type_label

from ranks import run_threads  # isort: skip

BUILT_IN: list[tuple[type[AggregationHandler], list[Any], Any]] = [
    (SumAggHandler, [1, 2.5, -4], -0.5),
    (MeanAggHandler, [1, 2, 6], 3.0),
    (MaxAggHandler, [1, 9, -4], 9.0),
    (MinAggHandler, [1, 9, -4], -4.0),
    (DistributionAggHandler, [1, 2, 6], 3.0),
    (CategoricalCountAggHandler, ["a", "b", "a"], 3.0),
]


def state_of(handler: AggregationHandler, values: list[Any]) -> MetricState:
    state = handler.initialize_metric_state("d", "x", AggregationType.CUSTOM)
    for value in values:
        handler.update(state, Metric("d", "x", value, AggregationType.CUSTOM))
    return state


@pytest.mark.parametrize(("kind", "values", "expected"), BUILT_IN)
def test_the_contract_works_by_hand_and_any_split_gives_the_same(
    kind: type[AggregationHandler], values: list[Any], expected: float
) -> None:
    handler = kind()
    whole = state_of(handler, values)
    assert whole.value == expected
    assert (whole.dataset_name, whole.metric_name) == ("d", "x")
    assert handler.finalize_local_agg(whole)[0].value == expected
    for cut in range(len(values) + 1):
        parts = [state_of(handler, values[:cut]), state_of(handler, values[cut:])]
        finalised = [result for part in parts for result in handler.finalize_local_agg(part)]
        merged = handler.finalize_dist_agg(finalised)
        assert merged.value == expected
        assert merged.metadata == whole.metadata
        # Merging changes no rank's own state.
        assert parts[0].value == state_of(handler, values[:cut]).value
        saved = handler.serialize_metadata(merged.metadata)
        assert handler.deserialize_metadata(saved) == merged.metadata


def test_a_distribution_by_hand_keeps_its_window_and_pools_all_of_it() -> None:
    handler = DistributionAggHandler(window_size=3, percentiles=(50,))
    first, second = state_of(handler, [1, 2, 3, 4]), state_of(handler, [10, 20, 30])
    assert first.metadata["values"] == [2, 3, 4]
    merged = handler.finalize_dist_agg([first, second])
    assert merged.metadata["values"] == [2, 3, 4, 10, 20, 30]
    assert merged.metadata["statistics"]["p50"] == 7.0
    assert merged.metadata["statistics"]["count"] == 6.0


def test_a_kind_says_what_a_state_is_made_of_and_nothing_of_settings() -> None:
    kinds = {
        type_label(agg_type): handler.kind_of(type_label(agg_type))
        for agg_type, handler in built_in_handlers().items()
    }
    assert kinds == {
        "sum": "sum",
        "mean": "mean",
        "max": "max",
        "min": "min",
        "last": "last",
        "rate": "rate",
        "distribution": "distribution/recent",
        "categorical_count": "counts",
    }
    # The window's size, percentiles and on_nan may change on resume; whether there is a bound not.
    assert DistributionAggHandler(3, (1, 2)).kind_of("distribution") == "distribution/recent"
    assert DistributionAggHandler(None).kind_of("distribution") == "distribution"
    assert MeanAggHandler(on_nan="skip").kind_of("mean") == "mean"
    # Under a type of one's own, and with lanes of one's own, the lanes are said.
    assert SumAggHandler().kind_of("tokens") == "tokens/3+0"
    assert DistributionAggHandler(3).kind_of("lengths") == "lengths/5+0/recent"
    label = type_label(MyTypes.RMS)
    assert LaneRMS().kind_of(label) == f"{label}/3+0"
    assert LaneRMS().kind_of("max") == "max/3+0"
    assert RMSHandler().kind_of(label) == f"{label}/0+0"


def test_every_type_but_custom_has_a_handler_from_the_start() -> None:
    assert set(built_in_handlers()) == set(AggregationType) - {AggregationType.CUSTOM}


class Summary(RMSHandler):
    """Finalises into several results, each routed by its own name and type."""

    def finalize_local_agg(self, local_agg_metric: MetricState) -> list[MetricState]:
        count = local_agg_metric.metadata["count"]
        dataset, name = local_agg_metric.dataset_name, local_agg_metric.metric_name
        return [
            *super().finalize_local_agg(local_agg_metric),
            MetricState(dataset, f"{name}_n", count, AggregationType.SUM),
            MetricState(dataset, f"{name}_most", count, AggregationType.MAX),
            MetricState(dataset, f"{name}_mean_n", count, AggregationType.MEAN),
            MetricState(dataset, f"{name}_min_n", count, AggregationType.MIN),
        ]


def test_each_result_of_a_custom_handler_is_combined_by_the_handler_of_its_type() -> None:
    def rank(communicator: Communicator) -> dict[str, float]:
        aggregator = MetricsAggregator(communicator=communicator)
        aggregator.register_handler("summary", Summary())
        for _ in range(communicator.rank + 1):
            aggregator.update([Metric("d", "x", 2, "summary")])
        return aggregator.get_metrics_for_logging("t")

    for logged in run_threads(rank, 3):
        assert logged == {
            "t_d/x": 2.0,
            "t_d/x_n": 6.0,
            "t_d/x_most": 3.0,
            "t_d/x_mean_n": 2.0,
            "t_d/x_min_n": 1.0,
        }


def test_finalize_dist_agg_is_not_called_for_a_single_result() -> None:
    class Alone(RMSHandler):
        def finalize_dist_agg(self, local_agg_metrics: list[MetricState]) -> MetricState:
            raise AssertionError("called for one result")

    aggregator = MetricsAggregator()
    aggregator.register_handler("rms", Alone())
    aggregator.record("x", 3, "rms")
    assert aggregator.get_metrics_for_logging("t") == {"t/x": 3.0}


def test_a_result_that_is_no_number_is_refused_by_name() -> None:
    class Wordy(RMSHandler):
        def finalize_local_agg(self, local_agg_metric: MetricState) -> list[MetricState]:
            local_agg_metric.value = "three"
            return [local_agg_metric]

    aggregator = MetricsAggregator()
    aggregator.register_handler("wordy", Wordy())
    aggregator.record("x", 3, "wordy")
    aggregator.record("fine", 1.0)
    with pytest.warns(RuntimeWarning, match="type 'wordy' finalised metric 'x' to 'three'"):
        assert aggregator.get_metrics_for_logging("t") == {"t/fine": 1.0}


@pytest.mark.filterwarnings("ignore:metric 'x' is left out:RuntimeWarning")
def test_a_custom_handler_that_fails_over_ranks_is_left_out_and_named() -> None:
    class Broken(RMSHandler):
        def finalize_dist_agg(self, local_agg_metrics: list[MetricState]) -> MetricState:
            raise OSError("no")

    def rank(communicator: Communicator) -> dict[str, float]:
        aggregator = MetricsAggregator(communicator=communicator)
        aggregator.register_handler("broken", Broken())
        aggregator.record("x", 3, "broken")
        aggregator.record("fine", 1.0)
        return aggregator.get_metrics_for_logging("t")

    assert run_threads(rank, 2) == [{"t/fine": 1.0}] * 2


def test_a_custom_result_never_overwrites_another_metric() -> None:
    class Greedy(RMSHandler):
        def finalize_local_agg(self, local_agg_metric: MetricState) -> list[MetricState]:
            return [MetricState("d", "loss", 7.0, AggregationType.MEAN)]

    aggregator = MetricsAggregator()
    aggregator.register_handler("greedy", Greedy())
    aggregator.update(
        [Metric("d", "loss", 1.0, AggregationType.MEAN), Metric("d", "x", 1, "greedy")]
    )
    with pytest.warns(RuntimeWarning, match="result 'loss' of metric 'x' of .* left out"):
        assert aggregator.get_metrics_for_logging("t") == {"t_d/loss": 1.0}


def test_custom_results_of_a_type_that_expands_are_expanded() -> None:
    class Spread(RMSHandler):
        def finalize_local_agg(self, local_agg_metric: MetricState) -> list[MetricState]:
            count = local_agg_metric.metadata["count"]
            return [
                MetricState("d", "n", count, AggregationType.DISTRIBUTION),
                MetricState("d", "parity", count % 2, AggregationType.CATEGORICAL_COUNT),
            ]

    def rank(communicator: Communicator) -> dict[str, float]:
        aggregator = MetricsAggregator(communicator=communicator)
        aggregator.register_handler("spread", Spread())
        for _ in range(communicator.rank + 1):
            aggregator.update([Metric("d", "x", 1, "spread")])
        return aggregator.get_metrics_for_logging("t")

    logged = run_threads(rank, 3)[0]
    assert logged["t_d/n_stat_mean"] == 2.0
    assert logged["t_d/n_stat_p50"] == 2.0
    assert (logged["t_d/parity_count_0"], logged["t_d/parity_count_1"]) == (1.0, 2.0)


def test_a_lane_handler_without_a_result_says_so() -> None:
    class Unfinished(LaneHandler):
        sum_lanes = ("a",)

        def sums_of(self, values: Any, weights: Any) -> tuple[float, ...]:
            return (1.0,)

    aggregator = MetricsAggregator()
    aggregator.register_handler("unfinished", Unfinished())
    aggregator.record("x", 3, "unfinished")
    with pytest.raises(TypeError, match=r"Unfinished declares lanes, but defines no result\(\)"):
        aggregator.get_metrics_for_logging("t")


def test_a_rate_by_hand_is_a_total_until_it_knows_its_seconds() -> None:
    """It was NaN until then, which nobody could add to or change."""
    state = state_of(RateAggHandler(), [10])
    assert state.value == 10.0
    state.metadata["seconds"] = 4.0
    assert RateAggHandler().report(state) == {"": 2.5}
    RateAggHandler().update(state, Metric("d", "x", 2, AggregationType.RATE))
    assert state.value == 3.0


@pytest.mark.parametrize(
    ("percentile", "name"),
    [(5, "p05"), (50, "p50"), (99.9, "p99.9"), (2.5, "p02.5"), (0, "p00"), (100, "p100")],
)
def test_names_of_percentiles(percentile: float, name: str) -> None:
    assert percentile_name(percentile) == name


@pytest.mark.parametrize("percentiles", [["a"], ["50"], [None], [[50]], [True], [1j], [5, "50"]])
def test_a_percentile_that_is_no_number_is_named(percentiles: Any) -> None:
    bad = repr(percentiles[-1])
    with pytest.raises(TypeError, match=f"percentiles=.*: {re.escape(bad)} is no number"):
        MetricsAggregator(percentiles=percentiles)


@pytest.mark.parametrize("percentiles", [50, 99.9, None, "50", "5, 50, 95", np.array(50)])
def test_percentiles_that_are_no_list_are_refused(percentiles: Any) -> None:
    with pytest.raises(TypeError, match=r"percentiles=.*: give a list of numbers in 0\.\.100"):
        MetricsAggregator(percentiles=percentiles)


@pytest.mark.parametrize(
    "percentiles", [[5.0, np.float32(50), np.int64(95)], np.array([5, 50, 95])]
)
def test_percentiles_may_be_any_numbers(percentiles: Any) -> None:
    aggregator = MetricsAggregator(percentiles=percentiles)
    aggregator.record("len", 3.0, "distribution")
    assert {"data/len_stat_p05", "data/len_stat_p50", "data/len_stat_p95"} <= (
        aggregator.get_metrics_for_logging().keys()
    )


@pytest.mark.parametrize("percentiles", [[math.nan], [-0.5], [math.inf], [10**400]])
def test_a_percentile_outside_0_to_100_is_refused(percentiles: list[float]) -> None:
    with pytest.raises(ValueError, match=r"percentiles=.*: each must lie in 0\.\.100"):
        MetricsAggregator(percentiles=percentiles)


class GeometricMean(LaneHandler):
    """As whoever adds an aggregation writes it: of one key at a time."""

    sum_lanes = ("logs",)

    def sums_of(self, values: Any, weights: Any) -> tuple[float, ...]:
        return (float(np.log(values).sum()),)

    def result(self, lanes: Any) -> float:
        return math.exp(lanes["logs"] / (lanes["count"] - lanes["nans"])) if lanes["logs"] else 1.0


def test_a_handler_that_knows_one_key_at_a_time_finalises_many() -> None:
    """It was given the lanes of all keys at once, of which `if` cannot be asked."""
    handler = GeometricMean(on_nan="skip")
    folded = [
        handler.fold(np.array(values), None)
        for values in ([2.0, 8.0], [], [math.nan], [3.0, math.nan])
    ]
    seconds = np.ones(len(folded))
    many = ReducedStates(
        np.array([state.sums for state in folded]), np.empty((len(folded), 0)), seconds
    )
    values, there = handler.finalize_all(many)
    assert there.tolist() == [[True, False], [False, False], [False, True], [True, True]]
    assert values[there].tolist() == pytest.approx([4.0, 1.0, 3.0, 1.0])
