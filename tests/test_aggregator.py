"""The aggregator alone: windows, names, NaN, derived metrics, handlers."""

from __future__ import annotations

import logging
import math
import time
import warnings
from datetime import timedelta
from enum import Enum
from typing import Any

import numpy as np
import pytest
from handlers_of_users import LaneRMS, MyTypes, RMSHandler

from metricfold import (
    AggregationType,
    LaneHandler,
    Metric,
    MetricBatch,
    MetricsAggregator,
    SumAggHandler,
)

SUM, MEAN, MAX, MIN = (
    AggregationType.SUM,
    AggregationType.MEAN,
    AggregationType.MAX,
    AggregationType.MIN,
)
DISTRIBUTION, CATEGORICAL = AggregationType.DISTRIBUTION, AggregationType.CATEGORICAL_COUNT


def lengths(*values: float, dataset: str = "d", weight: float = 1.0) -> list[Metric]:
    return [Metric(dataset, "len", value, DISTRIBUTION, weight) for value in values]


# -- Views ---------------------------------------------------------------------------------------


def test_run_names_every_key_and_interval_only_those_that_received_something() -> None:
    aggregator = MetricsAggregator()
    aggregator.update([Metric("d", "tokens", 5, SUM), Metric("d", "loss", 2.0, MEAN)])
    aggregator.reduce()
    aggregator.update([Metric("d", "tokens", 7, SUM)])
    snapshot = aggregator.reduce()
    assert snapshot.as_dict("t", "run") == {"t_d/loss": 2.0, "t_d/tokens": 12.0}
    assert snapshot.as_dict("t", "interval") == {"t_d/tokens": 7.0}
    assert snapshot.as_dict("t", "auto") == {"t_d/tokens": 12.0}


def test_auto_gives_totals_over_the_run_and_everything_else_over_the_interval() -> None:
    aggregator = MetricsAggregator()
    for value in (1, 9):
        aggregator.update(
            [
                Metric("d", "sum", value, SUM),
                Metric("d", "kind", "a", CATEGORICAL),
                Metric("d", "mean", value, MEAN),
                Metric("d", "max", -value, MAX),
                Metric("d", "min", value, MIN),
                *lengths(value),
            ]
        )
        snapshot = aggregator.reduce()
    logged = snapshot.as_dict("t", "auto")
    assert logged["t_d/sum"] == 10.0
    assert logged["t_d/kind_count_a"] == 2.0
    assert (logged["t_d/mean"], logged["t_d/max"], logged["t_d/min"]) == (9.0, -9.0, 9.0)
    assert (logged["t_d/len_stat_mean"], logged["t_d/len_stat_count"]) == (9.0, 1.0)


def test_a_dict_chooses_the_window_per_name() -> None:
    aggregator = MetricsAggregator()
    for value in (2.0, 4.0):
        aggregator.record("loss", value)
        aggregator.record("norm", value, "max")
        snapshot = aggregator.reduce()
    assert snapshot.as_dict("t", {"loss": "run"}) == {"t/loss": 3.0, "t/norm": 4.0}
    assert snapshot.as_dict("t", {"loss": "interval"}) == {"t/loss": 4.0, "t/norm": 4.0}


def test_an_empty_interval_after_another_reduction_warns_once_and_says_so() -> None:
    aggregator = MetricsAggregator()
    aggregator.record("loss", 1.0)
    aggregator.get_metrics_for_logging("t", "run")
    with pytest.warns(RuntimeWarning, match="take both from one snapshot"):
        assert aggregator.get_metrics_for_logging("t", "interval") == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert aggregator.get_metrics_for_logging("t", "interval") == {}


def test_the_run_view_of_a_distribution_is_the_window_and_the_interval_what_came_in() -> None:
    aggregator = MetricsAggregator(dist_window_size=5)
    aggregator.update(lengths(1, 2, 3, 4))
    aggregator.reduce()
    aggregator.update(lengths(50, 60))
    snapshot = aggregator.reduce()
    run, interval = snapshot.as_dict("t", "run"), snapshot.as_dict("t", "interval")
    assert run["t_d/len_stat_count"] == 5.0
    assert run["t_d/len_stat_mean"] == np.mean([2, 3, 4, 50, 60])
    assert interval["t_d/len_stat_count"] == 2.0
    assert interval["t_d/len_stat_p50"] == 55.0


def test_a_snapshot_does_not_change_when_the_aggregator_goes_on() -> None:
    aggregator = MetricsAggregator()
    aggregator.update([Metric("d", "tokens", 5, SUM), *lengths(1, 2)])
    snapshot = aggregator.reduce()
    before = snapshot.as_dict("t"), snapshot.as_dict("t", "interval")
    aggregator.update([Metric("d", "tokens", 5, SUM), *lengths(100)])
    aggregator.reduce()
    aggregator.reset()
    assert (snapshot.as_dict("t"), snapshot.as_dict("t", "interval")) == before


def test_reset_forgets_every_value_and_keeps_the_types() -> None:
    aggregator = MetricsAggregator()
    aggregator.update([Metric("d", "tokens", 5, SUM), *lengths(1, 2)])
    aggregator.reduce()
    aggregator.update([Metric("d", "tokens", 5, SUM)])
    aggregator.reset()
    assert aggregator.get_metrics_for_logging("t") == {}
    with pytest.raises(ValueError, match="is already registered with aggregation type sum"):
        aggregator.update([Metric("d", "tokens", 5, MAX)])


# -- Statistics ----------------------------------------------------------------------------------


def test_the_median_of_1_to_10_is_5_5() -> None:
    aggregator = MetricsAggregator()
    aggregator.update(lengths(*range(1, 11)))
    assert aggregator.get_metrics_for_logging("t")["t_d/len_stat_p50"] == 5.5


def test_std_is_the_sample_deviation_absent_for_one_value_and_0_for_equal_ones() -> None:
    aggregator = MetricsAggregator()
    aggregator.update([Metric("d", "one", 3, DISTRIBUTION)])
    aggregator.update([Metric("d", "equal", 0.1, DISTRIBUTION)] * 3)
    aggregator.update([Metric("d", "two", value, DISTRIBUTION) for value in (1, 3)])
    logged = aggregator.get_metrics_for_logging("t")
    assert "t_d/one_stat_std" not in logged
    assert logged["t_d/equal_stat_std"] == 0.0
    assert logged["t_d/equal_stat_mean"] == 0.1
    assert logged["t_d/two_stat_std"] == pytest.approx(math.sqrt(2))


def test_percentiles_are_named_after_their_number() -> None:
    aggregator = MetricsAggregator(1001, percentiles=(1, 50, 99, 99.9))
    aggregator.update(lengths(*range(1001)))
    logged = aggregator.get_metrics_for_logging("t")
    assert {key for key in logged if "_stat_p" in key} == {
        "t_d/len_stat_p01",
        "t_d/len_stat_p50",
        "t_d/len_stat_p99",
        "t_d/len_stat_p99.9",
    }
    assert logged["t_d/len_stat_p99.9"] == pytest.approx(999.0)


def test_weights_count_in_means_and_distributions() -> None:
    aggregator = MetricsAggregator()
    aggregator.update([Metric("d", "loss", 1.0, MEAN, 3), Metric("d", "loss", 5.0, MEAN, 1)])
    aggregator.update([*lengths(10, weight=98), *lengths(20, weight=1), *lengths(30, weight=1)])
    logged = aggregator.get_metrics_for_logging("t")
    assert logged["t_d/loss"] == 2.0
    assert logged["t_d/len_stat_mean"] == pytest.approx(10.3)
    assert logged["t_d/len_stat_p50"] < 11
    assert logged["t_d/len_stat_count"] == 3.0


@pytest.mark.parametrize("agg_type", [SUM, MEAN, MAX, MIN])
def test_a_nan_is_seen_or_skipped_and_counted(agg_type: AggregationType) -> None:
    values = [1.0, float("nan"), 3.0]
    for on_nan in ("propagate", "skip"):
        aggregator = MetricsAggregator(on_nan=on_nan)
        aggregator.update([Metric("d", "x", value, agg_type) for value in values])
        logged = aggregator.get_metrics_for_logging("t")
        if on_nan == "propagate":
            assert math.isnan(logged["t_d/x"])
            assert len(logged) == 1
        else:
            expected = {SUM: 4.0, MEAN: 2.0, MAX: 3.0, MIN: 1.0}[agg_type]
            assert logged == {"t_d/x": expected, "t_d/x_nan_count": 1.0}


def test_distributions_leave_nan_and_infinities_out_and_count_them() -> None:
    aggregator = MetricsAggregator()
    aggregator.update(lengths(1, float("nan"), float("inf"), 3, float("-inf")))
    logged = aggregator.get_metrics_for_logging("t")
    assert logged["t_d/len_stat_mean"] == 2.0
    assert logged["t_d/len_stat_count"] == 2.0
    assert logged["t_d/len_stat_nan_count"] == 1.0
    assert logged["t_d/len_stat_inf_count"] == 2.0


def test_infinities_in_sums_stay_infinite() -> None:
    aggregator = MetricsAggregator()
    for value in (float("inf"), 1.0, 1e308, 1e308):
        aggregator.record("a", value, "sum")
        aggregator.record("b", -value, "max")
        aggregator.reduce()
    logged = aggregator.get_metrics_for_logging("t")
    assert logged == {"t/a": float("inf"), "t/b": -1.0}


@pytest.mark.parametrize("way", ["list", "batch", "record"])
def test_values_that_come_in_together_add_up_with_one_rounding_where_they_were_added_in_order(
    way: str,
) -> None:
    values = [1e16, 1.0, -1e16]
    assert float(np.sum(values)) == 0.0  # as they were added before
    aggregator = MetricsAggregator()
    metrics = [
        Metric("web", name, value, agg_type)
        for value in values
        for name, agg_type in (("sum", AggregationType.SUM), ("mean", AggregationType.MEAN))
    ]
    if way == "record":
        for one in metrics:
            aggregator.record(one.name, one.value, one.agg_type, dataset="web")
    else:
        aggregator.update(metrics if way == "list" else MetricBatch.from_metrics(metrics))
    found = aggregator.reduce().as_dict("t")
    assert found == {"t_web/sum": 1.0, "t_web/mean": 1 / 3}


def test_categories_are_compared_as_text() -> None:
    torch = pytest.importorskip("torch")

    class Kind(Enum):
        A = 1

    aggregator = MetricsAggregator()
    for value in ("3", 3, np.int64(3), torch.tensor(3), True, Kind.A):
        aggregator.update([Metric("d", "kind", value, CATEGORICAL)])
    assert aggregator.get_metrics_for_logging("t") == {
        "t_d/kind_count_3": 4.0,
        "t_d/kind_count_Kind.A": 1.0,
        "t_d/kind_count_True": 1.0,
    }


def test_a_rate_is_the_sum_per_second_of_the_view() -> None:
    aggregator = MetricsAggregator()
    aggregator.record("tokens", 100, "rate")
    time.sleep(0.1)
    first = aggregator.reduce()
    aggregator.record("tokens", 300, "rate")
    time.sleep(0.1)
    second = aggregator.reduce()
    assert second.as_dict("t", "interval")["t/tokens"] == pytest.approx(300 / second.seconds)
    total = first.seconds + second.seconds
    assert second.run_seconds == pytest.approx(total)
    assert second.as_dict("t", "run")["t/tokens"] == pytest.approx(400 / total)
    assert 0.2 <= total < 10


def test_values_on_a_device_keep_their_place_in_the_window() -> None:
    torch = pytest.importorskip("torch")
    aggregator = MetricsAggregator(dist_window_size=3)
    for value in (1, torch.tensor(2), 3, torch.tensor(4.0), 5):
        aggregator.update(lengths(value))
    logged = aggregator.get_metrics_for_logging("t")
    assert logged["t_d/len_stat_min"] == 3.0
    assert logged["t_d/len_stat_mean"] == 4.0


# -- Derived metrics ------------------------------------------------------------------


def test_a_record_without_dataset_under_a_rolled_up_name_is_refused_either_way() -> None:
    aggregator = MetricsAggregator()
    aggregator.update([Metric("a", "loss", 1.0, MEAN)])
    with pytest.raises(ValueError, match="'loss'") as caught:
        aggregator.record("loss", 1.0)
    assert str(caught.value) == (
        "metric 'loss' without a dataset would print '/loss', which the total over all datasets of "
        "metric 'loss' of dataset 'a' prints already: give one of them another name, or a dataset to both"
    )
    aggregator.record("norm", 1.0)
    with pytest.raises(ValueError, match="'norm'") as caught:
        aggregator.update([Metric("a", "new", 1.0, MEAN), Metric("a", "norm", 1.0, MEAN)])
    assert str(caught.value) == (
        "the total over all datasets of metric 'norm' of dataset 'a' would print '/norm', which "
        "metric 'norm' without a dataset prints already: give one of them another name, or a dataset "
        "to both"
    )
    aggregator.update([Metric("a", "len", 1.0, AggregationType.DISTRIBUTION)])
    with pytest.raises(
        ValueError,
        match=r"'len_stat_max' without a dataset .* of metric 'len' of dataset 'a' prints",
    ):
        aggregator.record("len_stat_max", 1.0)
    aggregator.update([Metric("a", "kind", "x", AggregationType.CATEGORICAL_COUNT)])
    with pytest.raises(
        ValueError, match=r"of metric 'kind' of dataset 'a' prints already \(as '/kind_count_\*'\)"
    ):
        aggregator.record("kind_count_y", 1.0)
    assert aggregator.reduce().as_dict("t").keys() >= {"t_a/loss", "t/norm", "t_a/kind_count_x"}


def test_derived_metrics_are_computed_per_dataset_and_for_the_rollup() -> None:
    aggregator = MetricsAggregator()
    aggregator.derive("perplexity", lambda m: math.exp(m["loss"]))
    aggregator.derive("spread", lambda m: m["len_stat_p95"] - m["len_stat_p05"])
    aggregator.update([Metric("a", "loss", 1.0, MEAN, 1), Metric("b", "loss", 3.0, MEAN, 1)])
    aggregator.update(lengths(1, 101, dataset="a"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logged = aggregator.reduce().as_dict("t", rollup=True)
    assert logged["t_a/perplexity"] == pytest.approx(math.e)
    assert logged["t_b/perplexity"] == pytest.approx(math.e**3)
    assert logged["t/perplexity"] == pytest.approx(math.e**2)
    assert logged["t_a/spread"] == pytest.approx(90)
    assert "t_b/spread" not in logged


def test_an_error_in_one_derived_metric_is_isolated_and_named_once() -> None:
    aggregator = MetricsAggregator()
    aggregator.derive("broken", lambda m: 1 / (m["loss"] - 1.0))
    aggregator.derive("fine", lambda m: m["loss"] * 2)
    aggregator.record("loss", 1.0, dataset="a")
    with pytest.warns(RuntimeWarning, match=r"'broken' failed for dataset 'a'.*ZeroDivisionError"):
        logged = aggregator.get_metrics_for_logging("t")
    assert logged == {"t_a/loss": 1.0, "t_a/fine": 2.0}
    aggregator.get_metrics_for_logging("t")


def test_a_derived_metric_that_names_a_missing_one_says_which_there_are() -> None:
    aggregator = MetricsAggregator()
    aggregator.derive("perplexity", lambda m: math.exp(m["los"]))
    aggregator.record("loss", 1.0)
    with pytest.warns(RuntimeWarning, match=r"'perplexity' needs 'los', which no.*there are: loss"):
        aggregator.get_metrics_for_logging("t")


# -- Names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "complaint"),
    [
        (Metric("d", "len", 1, DISTRIBUTION), Metric("d", "len_stat_p50", 1, SUM), "len_stat_p50"),
        (Metric("d", "len_stat_std", 1, SUM), Metric("d", "len", 1, DISTRIBUTION), "len_stat_std"),
        (Metric("d", "kind", "a", CATEGORICAL), Metric("d", "kind_count_b", 1, SUM), "kind_count"),
        (Metric("d", "kind_count_b", 1, SUM), Metric("d", "kind", "a", CATEGORICAL), "kind_count"),
        (Metric("a/b", "c", 1, SUM), Metric("a", "b/c", 1, SUM), "'a/b/c'"),
    ],
)
def test_names_that_would_print_the_same_are_found_at_update(
    first: Metric, second: Metric, complaint: str
) -> None:
    aggregator = MetricsAggregator()
    aggregator.update([first])
    before = aggregator.reduce().as_dict("t")
    with pytest.raises(ValueError, match=complaint):
        aggregator.update([Metric("other", "fine", 1, SUM), second])
    with pytest.raises(ValueError, match=complaint):
        MetricsAggregator().update([first, second])
    assert aggregator.reduce().as_dict("t") == before


def test_a_derived_name_clashes_with_a_metric_either_way() -> None:
    aggregator = MetricsAggregator()
    aggregator.update(lengths(1))
    with pytest.raises(ValueError, match="cannot be called 'len_stat_p50'"):
        aggregator.derive("len_stat_p50", lambda m: 1.0)
    aggregator.derive("perplexity", lambda m: 1.0)
    with pytest.raises(ValueError, match="the name of the derived metric 'perplexity'"):
        aggregator.record("perplexity", 1.0)
    with pytest.raises(ValueError, match="defined already"):
        aggregator.derive("perplexity", lambda m: 2.0)
    aggregator.update(lengths(3))
    aggregator.reduce()


@pytest.mark.parametrize(
    ("dataset", "metric", "agg_type", "derived"),
    [
        ("d", "k", CATEGORICAL, "k_count_z"),
        (None, "k", CATEGORICAL, "k_count_"),
        ("d", "a/k", CATEGORICAL, "a/k_count_z"),
        ("d/a", "k", CATEGORICAL, "a/k_count_z"),
        ("d/a", "k", SUM, "a/k"),
        ("d/a", "k", DISTRIBUTION, "a/k_stat_p50"),
        ("d", "k", SUM, "k"),
    ],
)
def test_a_derived_metric_never_prints_what_a_metric_may_print_whichever_comes_first(
    dataset: str | None, metric: str, agg_type: AggregationType, derived: str
) -> None:
    first = MetricsAggregator()
    first.record(metric, 1, agg_type, dataset=dataset)
    with pytest.raises(ValueError, match=f"cannot be called '{derived}': metric '{metric}'"):
        first.derive(derived, lambda m: 1.0)

    second = MetricsAggregator()
    second.derive(derived, lambda m: 1.0)
    with pytest.raises(ValueError, match=f"the name of the derived metric '{derived}'"):
        second.record(metric, 1, agg_type, dataset=dataset)


@pytest.mark.parametrize("derived", ["k_count", "k_countz", "ak_count_z", "count_z", "z/k_count_z"])
def test_a_derived_metric_may_resemble_a_category(derived: str) -> None:
    aggregator = MetricsAggregator()
    aggregator.record("k", "z", CATEGORICAL, dataset="d")
    aggregator.derive(derived, lambda m: m["k_count_z"] + 1)
    assert aggregator.get_metrics_for_logging("t") == {
        "t_d/k_count_z": 1.0,
        f"t_d/{derived}": 2.0,
    }


def test_names_may_hold_slashes() -> None:
    aggregator = MetricsAggregator()
    aggregator.record("optimizer/lr", 0.1, "max")
    aggregator.update([Metric("web/en", "len/words", 3, SUM)])
    assert aggregator.get_metrics_for_logging("t") == {
        "t/optimizer/lr": 0.1,
        "t_web/en/len/words": 3.0,
    }


def test_names_may_hold_stars() -> None:
    aggregator = MetricsAggregator()
    for name in ("a*", "ab", "a*b", "*"):
        aggregator.update([Metric("*", name, 1, SUM), Metric("d", name, 2, SUM)])
    aggregator.derive("abc", lambda m: m["ab"] + 1)
    logged = aggregator.reduce().as_dict("t", rollup=True)
    assert logged["t_*/a*"] == 1.0
    assert logged["t/a*"] == 3.0
    assert logged["t_d/abc"] == 3.0


def test_one_name_with_two_types_in_one_dataset_is_refused() -> None:
    aggregator = MetricsAggregator()
    aggregator.update([Metric("d", "x", 1, SUM), Metric("other", "x", 1, MAX)])
    for bad in ([Metric("d", "x", 1, MEAN)], MetricBatch.from_metrics([Metric("d", "x", 1, MEAN)])):
        with pytest.raises(ValueError, match="is already registered with aggregation type sum"):
            aggregator.update(bad)
    with pytest.raises(ValueError, match="is already registered with aggregation type"):
        aggregator.update([Metric("new", "y", 1, SUM), Metric("new", "y", 1, MAX)])
    assert aggregator.get_metrics_for_logging("t") == {"t_d/x": 1.0, "t_other/x": 1.0}


# -- Handlers ------------------------------------------------------------------------------------


def test_replacing_a_handler_in_use_warns_and_its_metrics_keep_the_old_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Doubled(SumAggHandler):
        def result(self, lanes: Any) -> float:
            return 2 * lanes["sum"]

    aggregator = MetricsAggregator()
    aggregator.register_handler(SUM, SumAggHandler())
    aggregator.update([Metric("d", "old", 5, SUM)])
    with caplog.at_level(logging.WARNING, "metricfold"):
        aggregator.register_handler(SUM, Doubled())
    assert "Replacing handler for AggregationType.SUM" in caplog.text
    assert "metric 'old' of dataset 'd'" in caplog.text
    assert len(caplog.records) == 1
    aggregator.update([Metric("d", "old", 1, SUM), Metric("d", "new", 1, SUM)])
    assert aggregator.get_metrics_for_logging("t") == {"t_d/old": 6.0, "t_d/new": 2.0}


def test_values_are_folded_by_the_handler_that_their_metric_began_with() -> None:
    class Squares(LaneHandler):
        sum_lanes = ("sum", "squares")

        def sums_of(self, values: Any, weights: Any) -> tuple[float, ...]:
            return values.sum(), values @ values

        def result(self, lanes: Any) -> float:
            return lanes["squares"]

    aggregator = MetricsAggregator()
    aggregator.update([Metric("d", "old", 3, SUM)])
    aggregator.register_handler(SUM, Squares())
    aggregator.update([Metric("d", "old", 4, SUM), Metric("d", "new", 4, SUM)])
    aggregator.update(MetricBatch.from_metrics([Metric("d", "old", 5, SUM)]))
    aggregator.record("old", 6, "sum", dataset="d")
    assert aggregator.get_metrics_for_logging("t") == {"t_d/old": 18.0, "t_d/new": 16.0}


def test_a_handler_that_returns_other_lanes_than_it_declares_is_refused() -> None:
    class Loose(LaneHandler):
        sum_lanes = ("sum",)

        def sums_of(self, values: Any, weights: Any) -> tuple[float, ...]:
            return values.sum(), 1.0

    aggregator = MetricsAggregator()
    aggregator.register_handler("loose", Loose())
    with pytest.raises(ValueError, match=r"Loose declares 1 SUM and 0 MAX lanes, .* 2 and 0"):
        aggregator.record("x", 1, "loose")


def test_what_is_no_handler_is_refused() -> None:
    with pytest.raises(TypeError, match="subclass AggregationHandler and pass an instance"):
        MetricsAggregator().register_handler(AggregationType.CUSTOM, SumAggHandler)  # type: ignore[arg-type]


@pytest.mark.parametrize("agg_type", [AggregationType.CUSTOM, MyTypes.RMS, "rms", "my.rms/type"])
def test_any_enum_member_or_string_is_a_type(agg_type: Any) -> None:
    torch = pytest.importorskip("torch")
    for handler in (RMSHandler(), LaneRMS()):
        aggregator = MetricsAggregator()
        aggregator.register_handler(agg_type, handler)
        aggregator.update([Metric("d", "x", 3, agg_type)])
        aggregator.update(MetricBatch.from_metrics([Metric("d", "x", 4, agg_type)]))
        aggregator.record("y", torch.tensor(2), agg_type)
        logged = aggregator.get_metrics_for_logging("t")
        assert logged == {"t_d/x": pytest.approx(math.sqrt(12.5)), "t/y": 2.0}


def test_a_custom_handler_that_raises_halfway_changes_nothing() -> None:
    aggregator = MetricsAggregator()
    aggregator.register_handler(MyTypes.RMS, RMSHandler())
    aggregator.update([Metric("d", "x", 3, MyTypes.RMS)])
    bad = [
        Metric("d", "tokens", 1, SUM),
        Metric("d", "x", 100, MyTypes.RMS),
        Metric("d", "new", 5, MyTypes.RMS),
        Metric("d", "x", "bad", MyTypes.RMS),
    ]
    with pytest.raises(ValueError, match="found halfway"):
        aggregator.update(bad)
    assert aggregator.get_metrics_for_logging("t") == {"t_d/x": 3.0}


def test_a_custom_handler_that_fails_to_finalise_loses_nothing() -> None:
    class Moody(RMSHandler):
        broken = True

        def finalize_local_agg(self, local_agg_metric: Any) -> Any:
            if self.broken:
                raise OSError("not today")
            return super().finalize_local_agg(local_agg_metric)

    aggregator = MetricsAggregator()
    handler = Moody()
    aggregator.register_handler(MyTypes.RMS, handler)
    aggregator.update([Metric("d", "x", 3, MyTypes.RMS), Metric("d", "tokens", 4, SUM)])
    with pytest.raises(RuntimeError, match="not today"):
        aggregator.reduce()
    handler.broken = False
    aggregator.update([Metric("d", "x", 4, MyTypes.RMS), Metric("d", "tokens", 5, SUM)])
    snapshot = aggregator.reduce()
    # Both halves of the interval, which the failed reduction had split, count once.
    for view in ("run", "interval"):
        logged = snapshot.as_dict("t", view)
        assert logged == {"t_d/x": pytest.approx(math.sqrt(12.5)), "t_d/tokens": 9.0}


# -- Bad arguments -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"dist_window_size": 0}, "the window size is 0"),
        ({"dist_window_size": -3}, "the window size is -3"),
        ({"dist_window_size": 2.5}, "the window size is 2.5"),
        ({"percentiles": (50, 5)}, "ascending"),
        ({"percentiles": (50, 50)}, "each once"),
        ({"percentiles": (101,)}, "must lie in 0..100"),
        ({"on_nan": "ignore"}, "use 'propagate' or 'skip'"),
        ({"timeout": 0}, "a number of seconds above 0"),
        ({"timeout": float("inf")}, "a number of seconds above 0"),
        ({"timeout": timedelta(0)}, "a number of seconds above 0"),
        ({"name": ""}, "name is empty"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        MetricsAggregator(**arguments)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"prefix": ""}, "the prefix is empty"),
        ({"prefix": "a\nb"}, "line break"),
        ({"window": "epoch"}, "use 'run', 'interval', 'auto'"),
        ({"window": {"loss": "epoch"}}, "use 'run', 'interval', 'auto'"),
        ({"window": None}, "window=None: use 'run'"),
        ({"window": 5}, "window=5: use 'run'"),
    ],
)
def test_bad_arguments_of_a_log_do_not_close_the_interval(
    arguments: dict[str, Any], complaint: str
) -> None:
    aggregator = MetricsAggregator()
    aggregator.record("x", 1, "sum")
    with pytest.raises(ValueError, match=complaint):
        aggregator.get_metrics_for_logging(**arguments)
    assert aggregator.reduce().as_dict("t", "interval") == {"t/x": 1.0}


def test_a_step_that_is_no_int_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"step=1\.5: give the training step as an int"):
        MetricsAggregator().reduce(step=1.5)  # type: ignore[arg-type]


def test_a_process_group_without_torch_distributed_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"torch\.distributed is not initialised"):
        MetricsAggregator(process_group=object()).reduce()
