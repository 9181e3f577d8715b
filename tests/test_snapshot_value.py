"""`Snapshot.value`: one number of a log, and errors that name what is near."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
from handlers_of_users import LaneRMS, MyTypes, RMSHandler
from ranks import run_threads

from metricfold import AggregationType, MeanAggHandler, Metric, MetricsAggregator, MetricState

SUM, MEAN = AggregationType.SUM, AggregationType.MEAN
DISTRIBUTION, CATEGORICAL = AggregationType.DISTRIBUTION, AggregationType.CATEGORICAL_COUNT


def fed(communicator: Any = None, **options: Any) -> MetricsAggregator:
    aggregator = MetricsAggregator(communicator=communicator, **options)
    aggregator.register_handler(MyTypes.RMS, RMSHandler())
    aggregator.register_handler("lane rms", LaneRMS())
    aggregator.derive("perplexity", lambda m: math.exp(m["loss"]))
    first = communicator.rank if communicator else 0
    step = communicator.world_size if communicator else 1
    for value in (1.0, 2.0, 3.0, 6.0)[first::step]:
        aggregator.update(
            [
                Metric("alpaca", "tokens", value, SUM),
                Metric("alpaca", "loss", value, MEAN),
                Metric("orca", "loss", 2 * value, MEAN),
                Metric("alpaca", "len", value, DISTRIBUTION),
                Metric("alpaca", "kind", "even" if value % 2 == 0 else "odd", CATEGORICAL),
                Metric("alpaca", "rms", value, MyTypes.RMS),
                Metric("alpaca", "lane", value, "lane rms"),
            ]
        )
        aggregator.record("lr", value)
    return aggregator


def values(communicator: Any = None) -> list[Any]:
    snapshot = fed(communicator).reduce()
    rms = math.sqrt(50 / 4)
    return [
        (snapshot.value("alpaca", "tokens"), 12.0),
        (snapshot.value("alpaca", "loss"), 3.0),
        (snapshot.value("alpaca", "len", "p50"), 2.5),
        (snapshot.value("alpaca", "len", "mean"), 3.0),
        (snapshot.value("alpaca", "len", "count"), 4.0),
        (snapshot.value("alpaca", "len", stat="max", window="run"), 6.0),
        (snapshot.value("alpaca", "kind", "odd"), 2.0),
        (snapshot.value("alpaca", "rms"), pytest.approx(rms)),
        (snapshot.value("alpaca", "lane"), pytest.approx(rms)),
        (snapshot.value(None, "lr"), 3.0),
        (snapshot.value("", "lr"), 3.0),
        # Over both datasets, as a log shows it.
        (snapshot.value(None, "loss"), 4.5),
        (snapshot.value(None, "len", "p50"), 2.5),
        (snapshot.value("orca", "perplexity"), pytest.approx(math.exp(6))),
        (snapshot.value(None, "perplexity"), pytest.approx(math.exp(4.5))),
        # What has no value has none.
        (snapshot.value("alpaca", "kind", "never seen"), None),
        (snapshot.value("alpaca", "len", "nan_count"), None),
        (snapshot.value(None, "kind", "never seen"), None),
    ]


def test_it_is_the_number_that_a_log_shows_on_every_rank() -> None:
    for found, expected in values():
        assert found == expected
    for ranks in (2, 3):
        for said in run_threads(values, ranks):
            for found, expected in said:
                assert found == expected


def test_the_view_is_that_of_the_window() -> None:
    aggregator = fed()
    aggregator.reduce()
    aggregator.update([Metric("alpaca", "tokens", 5, SUM), Metric("alpaca", "loss", 9.0, MEAN)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        snapshot = aggregator.reduce()
        # "auto": totals over the run, everything else over the interval.
        assert snapshot.value("alpaca", "tokens") == 17.0
        assert snapshot.value("alpaca", "loss") == 9.0
        assert snapshot.value("alpaca", "tokens", window="interval") == 5.0
        assert snapshot.value("alpaca", "loss", window="run") == pytest.approx(21 / 5)
        assert snapshot.value("alpaca", "loss", window={"loss": "run"}) == pytest.approx(21 / 5)
        assert snapshot.value("alpaca", "len", "p50") is None
        assert snapshot.value("alpaca", "len", "p50", window="run") == 2.5
        assert snapshot.value("alpaca", "rms") is None
        assert snapshot.value("orca", "perplexity") is None
        empty = aggregator.reduce()
        assert empty.value("alpaca", "loss") is None
        assert empty.value(None, "loss") is None
    with pytest.raises(ValueError, match="window='latest'"):
        snapshot.value("alpaca", "loss", window="latest")


def test_what_comes_beside_a_value_has_a_name_too() -> None:
    aggregator = MetricsAggregator(on_nan="skip", percentiles=(50, 99.9))
    for value in (1.0, float("nan"), float("inf")):
        aggregator.record("loss", value, dataset="a")
        aggregator.record("len", value, "distribution", dataset="a")
    snapshot = aggregator.reduce()
    assert snapshot.value("a", "loss") == math.inf
    assert snapshot.value("a", "loss", "nan_count") == 1.0
    assert snapshot.value("a", "len", "inf_count") == 1.0
    assert snapshot.value("a", "len", "p99.9") == 1.0
    # One value has no deviation.
    assert snapshot.value("a", "len", "std") is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("alpaca", "los"),
            "there is no metric 'los' of dataset 'alpaca'; there are: metric 'loss' of dataset 'alpa",
        ),
        (("alpaca", "lr"), "there are: metric 'lr', "),
        ((None, "lrs"), "there is no metric 'lrs'; there are: metric 'lr', "),
        (("alpacca", "loss"), "there are: metric 'loss' of dataset 'alpaca', "),
        (("alpaca", "len", "p51"), "metric 'len' of dataset 'alpaca' has no 'p51'; it has: p"),
        (("alpaca", "len", "median"), "it has: mean, "),
        (("alpaca", "loss", "p50"), "has no 'p50': leave stat= out"),
        (("alpaca", "rms", "p50"), "has no 'p50': leave stat= out"),
        (("alpaca", "perplexity", "p50"), "has no 'p50': leave stat= out"),
        ((None, "len", "p51"), "metric 'len' has no 'p51'; it has: p"),
    ],
)
def test_an_unknown_name_is_a_key_error_that_names_the_nearest(
    arguments: tuple[Any, ...], message: str
) -> None:
    snapshot = fed().reduce()
    with pytest.raises(KeyError) as error:
        snapshot.value(*arguments)
    assert message in error.value.args[0]


def test_among_many_keys_only_the_nearest_are_named() -> None:
    aggregator = MetricsAggregator()
    for layer in range(300):
        aggregator.record(f"layer_{layer}/norm", 1.0)
    aggregator.record("grad_norm", 1.0)
    aggregator.record("loss", 1.0, dataset="alpaca")
    snapshot = aggregator.reduce()
    with pytest.raises(KeyError) as error:
        snapshot.value(None, "gradnorm")
    message = error.value.args[0]
    assert "there is no metric 'gradnorm'; of 302 the nearest are: metric 'grad_norm', " in message
    assert len(message) < 400
    with pytest.raises(KeyError, match="the nearest are: metric 'loss' of dataset 'alpaca', "):
        snapshot.owner("alpacas", "loss")
    with pytest.raises(KeyError, match="there are: none"):
        MetricsAggregator().reduce().value(None, "loss")


def test_a_metric_of_many_numbers_asks_which() -> None:
    snapshot = fed().reduce()
    with pytest.raises(ValueError, match=r"'len' of dataset 'alpaca' is more than one number: say"):
        snapshot.value("alpaca", "len")
    with pytest.raises(ValueError, match=r"such as stat='mean'"):
        snapshot.value(None, "len")
    with pytest.raises(ValueError, match=r"'kind' of dataset 'alpaca' is .* stat='a category'"):
        snapshot.value("alpaca", "kind")


def test_a_metric_whose_name_goes_on_like_a_statistic_is_another_metric() -> None:
    # The extremum was given as a statistic of the mean, and asked for where the mean had no value.
    class Own(MeanAggHandler):
        def update(self, local_agg_metric: MetricState, metric: Metric) -> None:
            super().update(local_agg_metric, metric)

    aggregator = MetricsAggregator()
    aggregator.register_handler("own", Own(on_nan="skip"))
    aggregator.record("own", 1.0, "own", dataset="d")
    aggregator.record("loss", 1.0, dataset="d")
    aggregator.reduce()
    aggregator.record("own_max", 9.0, "max", dataset="d")
    aggregator.record("loss_max", 9.0, "max", dataset="d")
    snapshot = aggregator.reduce()
    for dataset, name in (("d", "own"), (None, "loss")):
        assert snapshot.value(dataset, name) is None
        assert snapshot.value(dataset, name, window="run") == 1.0
    with pytest.raises(KeyError, match="has no 'max'"):
        snapshot.value(None, "loss", "max")
    assert snapshot.value("d", "own", "max") is None
    assert snapshot.value("d", "own_max") == snapshot.value(None, "loss_max") == 9.0


def test_where_all_is_nan_and_skipped_there_is_no_value_but_a_count() -> None:
    class Own(MeanAggHandler):
        def update(self, local_agg_metric: MetricState, metric: Metric) -> None:
            super().update(local_agg_metric, metric)

    aggregator = MetricsAggregator()
    aggregator.register_handler("own", Own(on_nan="skip"))
    aggregator.record("m", math.nan, "own")
    snapshot = aggregator.reduce()
    assert snapshot.value(None, "m") is None
    assert snapshot.value(None, "m", "nan_count") == 1.0
