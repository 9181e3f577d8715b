"""The examples that specify the metrics module, as they stand there but for the import line.

The bodies that an example leaves open (``...``) stay open where the example is only registered,
and are filled in where it is used.
"""

from __future__ import annotations

from typing import Any

import pytest
from ranks import run_ranks

# The examples use these names.
from metricfold import (
    AggregationHandler,
    AggregationType,
    CategoricalCountAggHandler,
    DefaultTrainingMetricTransform,
    DistributionAggHandler,
    MaxAggHandler,
    MeanAggHandler,
    Metric,
    MetricsAggregator,
    MetricState,
    MetricTransform,
    MinAggHandler,
    SumAggHandler,
)


def test_a_transform_adds_the_metrics_of_a_sample() -> None:
    transform = DefaultTrainingMetricTransform()
    transform.set_dataset_name("alpaca")

    # Applied to each sample
    sample = {"tokens": [1, 2, 3, 4, 5]}
    sample = transform(sample)
    # sample["metrics"] now contains:
    assert sample["metrics"] == [
        Metric(dataset_name="alpaca", name="samples_seen", value=1, agg_type=AggregationType.SUM),
        Metric(dataset_name="alpaca", name="tokens_seen", value=5, agg_type=AggregationType.SUM),
        Metric(
            dataset_name="alpaca", name="seq_len", value=5, agg_type=AggregationType.DISTRIBUTION
        ),
    ]


def test_an_aggregator_adds_up_batches() -> None:
    # Create aggregator
    aggregator = MetricsAggregator()

    # Sample metrics from different batches
    batch1_metrics = [
        Metric("alpaca", "tokens_seen", 100, AggregationType.SUM),
        Metric("alpaca", "avg_tokens_seen", 100, AggregationType.MEAN),
    ]

    batch2_metrics = [
        Metric("alpaca", "tokens_seen", 100, AggregationType.SUM),
        Metric("alpaca", "avg_tokens_seen", 100, AggregationType.MEAN),
    ]

    # Update with metrics
    aggregator.update(batch1_metrics)
    aggregator.update(batch2_metrics)

    # Get final results
    results = aggregator.get_metrics_for_logging(prefix="train")
    assert results == {"train_alpaca/tokens_seen": 200.0, "train_alpaca/avg_tokens_seen": 100.0}
    assert {type(value) for value in results.values()} == {float}


def test_a_custom_handler_can_be_registered() -> None:
    aggregator = MetricsAggregator()

    class CustomAggHandler(AggregationHandler):
        def initialize_metric_state(self, dataset_name, metric_name, agg_type):
            return MetricState(
                dataset_name=dataset_name,
                metric_name=metric_name,
                value=0.0,  # should change
                agg_type=agg_type,
                metadata={},  # may need to change
            )

        def update(self, local_agg_metric, metric): ...

        def finalize_local_agg(self, local_agg_metric): ...

        def finalize_dist_agg(self, local_agg_metrics): ...

    # Register with aggregator
    aggregator.register_handler(AggregationType.CUSTOM, CustomAggHandler())

    aggregator.update([Metric("alpaca", "unused", 1, AggregationType.SUM)])
    assert aggregator.get_metrics_for_logging() == {"data_alpaca/unused": 1.0}


class LastValueAndRange(AggregationHandler):
    """The example with its bodies filled in: one metric that reports two results."""

    def initialize_metric_state(self, dataset_name, metric_name, agg_type):
        return MetricState(
            dataset_name=dataset_name,
            metric_name=metric_name,
            value=0.0,
            agg_type=agg_type,
            metadata={"low": float("inf"), "high": float("-inf")},
        )

    def update(self, local_agg_metric, metric):
        metadata = local_agg_metric.metadata
        metadata["low"] = min(metadata["low"], metric.value)
        metadata["high"] = max(metadata["high"], metric.value)
        local_agg_metric.value = metadata["high"] - metadata["low"]

    def finalize_local_agg(self, local_agg_metric):
        state = local_agg_metric
        largest = MetricState(
            state.dataset_name,
            f"{state.metric_name}_largest",
            state.metadata["high"],
            AggregationType.MAX,
        )
        return [state, largest]

    def finalize_dist_agg(self, local_agg_metrics):
        low = min(state.metadata["low"] for state in local_agg_metrics)
        high = max(state.metadata["high"] for state in local_agg_metrics)
        first = local_agg_metrics[0]
        return MetricState(first.dataset_name, first.metric_name, high - low, first.agg_type)


def test_a_custom_handler_is_used_end_to_end() -> None:
    aggregator = MetricsAggregator()
    aggregator.register_handler(AggregationType.CUSTOM, LastValueAndRange())
    aggregator.update([Metric("alpaca", "len", value, AggregationType.CUSTOM) for value in (5, 2)])
    aggregator.update([Metric("alpaca", "len", 9, AggregationType.CUSTOM)])
    assert aggregator.get_metrics_for_logging(prefix="train") == {
        "train_alpaca/len": 7.0,
        "train_alpaca/len_largest": 9.0,
    }


def test_what_stands_under_aggregation_types_comes_out() -> None:
    aggregator = MetricsAggregator()
    for length, kind in ((2, "code"), (4, "prose"), (9, "code")):
        aggregator.update(
            [
                Metric("alpaca", "tokens", length, AggregationType.SUM),
                Metric("alpaca", "loss", length, AggregationType.MEAN),
                Metric("alpaca", "longest", length, AggregationType.MAX),
                Metric("alpaca", "shortest", length, AggregationType.MIN),
                Metric("alpaca", "len", length, AggregationType.DISTRIBUTION),
                Metric("alpaca", "kind", kind, AggregationType.CATEGORICAL_COUNT),
            ]
        )
    results = aggregator.get_metrics_for_logging(prefix="train")
    std = results.pop("train_alpaca/len_stat_std")
    p05, p95 = (results.pop(f"train_alpaca/len_stat_{name}") for name in ("p05", "p95"))
    assert results == {
        "train_alpaca/tokens": 15.0,
        "train_alpaca/loss": 5.0,
        "train_alpaca/longest": 9.0,
        "train_alpaca/shortest": 2.0,
        "train_alpaca/len_stat_mean": 5.0,
        "train_alpaca/len_stat_min": 2.0,
        "train_alpaca/len_stat_max": 9.0,
        "train_alpaca/len_stat_p50": 4.0,
        "train_alpaca/len_stat_count": 3.0,
        "train_alpaca/kind_count_code": 2.0,
        "train_alpaca/kind_count_prose": 1.0,
    }
    assert std == pytest.approx(13**0.5)
    assert (p05, p95) == pytest.approx((2.2, 8.5))


@pytest.mark.parametrize(
    "handler",
    [
        SumAggHandler,
        MeanAggHandler,
        MaxAggHandler,
        MinAggHandler,
        DistributionAggHandler,
        CategoricalCountAggHandler,
    ],
)
def test_every_built_in_handler_follows_the_contract(handler: type[AggregationHandler]) -> None:
    """Called by hand as a custom handler would be, it gives what the aggregator gives."""
    handle = handler()
    assert isinstance(handle, AggregationHandler)
    states = []
    for values in ((1, 2), (6,)):
        state = handle.initialize_metric_state("alpaca", "m", AggregationType.CUSTOM)
        for value in values:
            handle.update(state, Metric("alpaca", "m", value, AggregationType.CUSTOM))
        states += handle.finalize_local_agg(state)
    combined = handle.finalize_dist_agg(states)
    expected = {
        SumAggHandler: 9.0,
        MeanAggHandler: 3.0,
        MaxAggHandler: 6.0,
        MinAggHandler: 1.0,
        DistributionAggHandler: 3.0,
        CategoricalCountAggHandler: 3.0,
    }
    assert (combined.dataset_name, combined.metric_name) == ("alpaca", "m")
    assert combined.value == expected[handler]


def test_a_transform_of_ones_own_emits_what_it_likes() -> None:
    class Turns(MetricTransform):
        def _generate_metrics(self, sample: Any) -> list[Metric]:
            turns = len(sample["messages"])
            return [Metric(self.dataset_name, "turns", turns, AggregationType.MEAN)]

    transform = Turns()
    transform.set_dataset_name("chat")
    sample = transform({"messages": ["hi", "hello", "bye"]})
    assert sample["metrics"] == [Metric("chat", "turns", 3, AggregationType.MEAN)]


def _two_metrics(rank: int) -> dict[str, float]:
    aggregator = MetricsAggregator()
    aggregator.register_handler(AggregationType.CUSTOM, LastValueAndRange())
    aggregator.update(
        [
            Metric("ds1", "metric1", 1 + rank, AggregationType.SUM),
            Metric("ds1", "metric2", 10 * rank, AggregationType.MEAN),
            Metric("ds1", "spread", 3 + 5 * rank, AggregationType.CUSTOM),
        ]
    )
    return aggregator.get_metrics_for_logging(prefix="train")


def test_ranks_are_combined_by_type() -> None:
    assert run_ranks(_two_metrics, 2) == 2 * [
        {
            "train_ds1/metric1": 3.0,
            "train_ds1/metric2": 5.0,
            "train_ds1/spread": 5.0,
            "train_ds1/spread_largest": 8.0,
        }
    ]
