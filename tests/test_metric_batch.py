"""`MetricBatch`: folded where it was made, small to send, and worth what its list is worth."""

from __future__ import annotations

import copy
import importlib
import math
import pickle
import random
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from enum import Enum
from importlib.util import find_spec
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import pytest
from handlers_of_users import MyTypes, aggregator_of_users
from ways_in import CATEGORICAL, DISTRIBUTION, MAX, MEAN, MIN, RATE, SUM

from metricfold import (
    AggregationType,
    DefaultTrainingMetricTransform,
    MaxAggHandler,
    Metric,
    MetricBatch,
    MetricsAggregator,
    MetricsCollator,
)

NAN, INF = math.nan, math.inf

# Arrays of torch are values like others, where it is installed.
tensor: Any = importlib.import_module("torch").tensor if find_spec("torch") else np.array


class Kind(str, Enum):
    CODE = "code"
    PROSE = "prose"


def sent(batch: MetricBatch) -> MetricBatch:
    """Return what arrives in the training process, in the way data workers send it."""
    arrived = pickle.loads(bytes(ForkingPickler.dumps(batch)))
    assert type(arrived) is MetricBatch
    return arrived


def shuffled(*metrics: Metric) -> list[Metric]:
    return random.Random(3).sample(metrics, len(metrics))


def metrics(
    agg_type: Any, values: Sequence[Any], weights: Sequence[float] = (1.0,)
) -> list[Metric]:
    return [
        Metric(("alpaca", "orca")[i % 3 == 0], "m", value, agg_type, weights[i % len(weights)])
        for i, value in enumerate(values)
    ]


NUMBERS = [3, 1.5, -2, True, 1e300, 0.0, -0.0, 7, 2**53 - 1, NAN, INF, -INF, NAN, 4.0]
WEIGHTS = (1.0, 0.0, 2, 0.5, 0)
COUNTS_OR_NOT = (1.0, 0.0, 1, True, False)


def taken_by(agg_type: AggregationType, weights: tuple[float, ...]) -> tuple[float, ...]:
    """Return `weights`, or such as go with a type in which a value counts or does not."""
    return weights if agg_type in (MEAN, DISTRIBUTION) or weights == (0.0,) else COUNTS_OR_NOT


CASES = {
    **{
        f"{agg_type.name} of {name}": metrics(agg_type, values, taken_by(agg_type, weights))
        for agg_type in (SUM, MEAN, MAX, MIN, DISTRIBUTION)
        for name, values, weights in [
            ("numbers with weights", NUMBERS, WEIGHTS),
            ("nan of weight 0", [NAN, 2.0, NAN], (0.0,)),
            ("arrays", [tensor(2), np.float32(3), np.array([4.5]), tensor([[1.0]])], (2,)),
        ]
    },
    **{
        f"categories {name}": metrics(CATEGORICAL, values)
        for name, values in [
            ("as text", ["code", "prose", "code", " ", "with space"]),
            ("as ints", [1, 2, 1, "1", 10**30]),
            ("as bools", [True, False, True, "True"]),
            ("as floats", [1.0, NAN, INF]),
            ("as Enum members", [Kind.CODE, Kind.PROSE, Kind.CODE, MyTypes.RMS]),
            ("as arrays", [tensor(3), np.int8(3), np.str_("x"), tensor(True)]),
        ]
    },
    "lanes of a user": metrics("lane rms", NUMBERS[:4], COUNTS_OR_NOT),
    "a user's own states": metrics(MyTypes.RMS, [3, 4, tensor(5), np.float64(6)]),
    "a user's own factors": metrics(MyTypes.PRODUCT, [2, 3, 2, 5]),
    "nothing": [],
}
EMPTY = {"nothing", *(name for name in CASES if name.endswith("nan of weight 0"))}
CASES["everything at once"] = shuffled(
    *[metric._replace(name=name) for name, listed in CASES.items() for metric in listed]
)


def as_text(results: Mapping[str, float]) -> list[str]:
    """Return results that can be compared although they may hold NaN."""
    return [f"{key}={value!r}" for key, value in results.items()]


@pytest.mark.parametrize("on_nan", ["propagate", "skip"])
@pytest.mark.parametrize("name", CASES)
def test_a_batch_gives_what_its_list_gives(name: str, on_nan: str) -> None:
    listed, folded = aggregator_of_users(on_nan=on_nan), aggregator_of_users(on_nan=on_nan)
    for _ in range(2):
        listed.update(CASES[name])
        folded.update(sent(MetricBatch.from_metrics(CASES[name])))
    expected, found = listed.reduce(), folded.reduce()
    for window in ("run", "interval"):
        assert as_text(found.as_dict(window=window)) == as_text(expected.as_dict(window=window))
    assert (found.as_dict() == {}) == (name in EMPTY)


def test_a_rate_counts_what_a_batch_brings() -> None:
    aggregator = MetricsAggregator()
    aggregator.update(sent(MetricBatch.from_metrics(metrics(RATE, [1, 2, 3]))))
    results = aggregator.get_metrics_for_logging()
    assert results["data_alpaca/m"] > results["data_orca/m"] * 4.9 > 0


def test_a_window_smaller_than_the_batch_keeps_the_newest_values() -> None:
    listed, folded = MetricsAggregator(5), MetricsAggregator(5)
    for start in (0, 100):
        values = [Metric("d", "m", value, DISTRIBUTION) for value in range(start, start + 50)]
        listed.update(values)
        folded.update(sent(MetricBatch.from_metrics(values)))
    results = folded.get_metrics_for_logging()
    assert results == listed.get_metrics_for_logging()
    assert (results["data_d/m_stat_min"], results["data_d/m_stat_count"]) == (145.0, 5.0)


def test_batches_lists_and_records_add_up() -> None:
    aggregator = MetricsAggregator()
    values = [Metric("d", "m", value, MEAN) for value in (1, 2, 6)]
    aggregator.update(values)
    aggregator.update(sent(MetricBatch.from_metrics(values)))
    aggregator.record("m", tensor(11.0), dataset="d")
    assert aggregator.get_metrics_for_logging() == {"data_d/m": pytest.approx(29 / 7)}


def test_an_aggregator_does_not_change_a_batch() -> None:
    batch = MetricBatch.from_metrics(CASES["everything at once"])
    before = repr(batch.__reduce__())
    aggregator = aggregator_of_users()
    aggregator.update(batch)
    once = aggregator.get_metrics_for_logging()
    aggregator.update(batch)
    assert aggregator.get_metrics_for_logging()["data_orca/SUM of arrays"] == 6.0
    assert once["data_orca/SUM of arrays"] == 3.0
    assert repr(batch.__reduce__()) == before


# -- Pickling ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_what_arrives_is_what_was_sent(name: str) -> None:
    batch = MetricBatch.from_metrics(CASES[name])
    arrived = sent(batch)
    assert repr(arrived.__reduce__()) == repr(batch.__reduce__())
    assert repr(copy.deepcopy(batch).__reduce__()) == repr(batch.__reduce__())
    assert repr(arrived) == repr(batch)
    assert sorted(column.key for column in arrived.columns) == sorted(
        {(metric.dataset_name, metric.name) for metric in CASES[name]}
    )
    assert all(type(column.agg_type) is not str for column in arrived.columns if column.state)


def test_a_batch_is_small_to_send() -> None:
    transform = DefaultTrainingMetricTransform()
    transform.set_dataset_name("alpaca")
    samples = [transform({"tokens": [0] * length}) for length in range(64)]
    listed = [metric for sample in samples for metric in sample["metrics"]]
    batch = MetricsCollator(lambda bare: {})(samples)["metrics"]
    size = len(pickle.dumps(batch, -1))
    # 64 lengths of 8 bytes, which a distribution needs, and little else.
    assert size < 64 * 8 + 400
    assert size < len(pickle.dumps(listed, -1)) / 2
    # Sums alone do not grow with the batch.
    counts = [MetricBatch.from_metrics(metrics(SUM, range(count))) for count in (10, 10_000)]
    sizes = [len(pickle.dumps(batch, -1)) for batch in counts]
    assert sizes[1] - sizes[0] < 32


# -- Types of the user's own ---------------------------------------------------------------------


def test_raw_metrics_of_other_types_arrive_in_order() -> None:
    values = [3, 2.5, "text", (1, 2), {"a": 1}, None]
    batch = sent(MetricBatch.from_metrics([Metric("d", "m", v, MyTypes.RMS, 2) for v in values]))
    (column,) = batch.columns
    assert column.state is None
    assert column.metrics == [Metric("d", "m", v, MyTypes.RMS, 2) for v in values]


def test_a_type_that_is_not_registered_is_an_error_when_the_batch_is_consumed() -> None:
    batch = sent(MetricBatch.from_metrics([*metrics(SUM, [1]), Metric("d", "own", 1, "median")]))
    aggregator = MetricsAggregator()
    with pytest.raises(
        ValueError, match=r"'own' of dataset 'd' has .* 'median', for which no handler"
    ):
        aggregator.update(batch)
    assert aggregator.get_metrics_for_logging() == {}


def test_a_bad_value_for_a_users_lanes_is_found_when_the_batch_is_consumed() -> None:
    batch = sent(
        MetricBatch.from_metrics([*metrics(SUM, [1]), Metric("d", "own", "high", "lane rms")])
    )
    aggregator = aggregator_of_users()
    with pytest.raises(TypeError, match="'own' of dataset 'd': the value 'high'"):
        aggregator.update(batch)
    assert aggregator.get_metrics_for_logging() == {}


def test_a_batch_that_the_built_in_handler_folded_is_refused_where_another_replaced_it() -> None:
    class Largest(MaxAggHandler):
        def maxs_of(self, values: Any) -> tuple[float, ...]:
            return (float(np.abs(values).max()),)

    aggregator = MetricsAggregator()
    aggregator.register_handler(MAX, Largest())
    batch = sent(MetricBatch.from_metrics([*metrics(SUM, [1]), Metric("d", "top", -3, MAX)]))
    with pytest.raises(
        ValueError, match=r"'top' of dataset 'd' was folded by MetricsCollator.*own"
    ):
        aggregator.update(batch)
    assert aggregator.get_metrics_for_logging() == {}
    aggregator.update([Metric("d", "top", -3, MAX)])
    assert aggregator.get_metrics_for_logging() == {"data_d/top": 3.0}


# -- Errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("earlier", ["list", "batch"])
def test_a_batch_whose_type_conflicts_changes_nothing(earlier: str) -> None:
    aggregator = MetricsAggregator()
    aggregator.update(
        metrics(SUM, [1])
        if earlier == "list"
        else sent(MetricBatch.from_metrics(metrics(SUM, [1])))
    )
    conflicting = [Metric("alpaca", "new", 1, SUM), Metric("orca", "m", 1, MEAN)]
    for conflict in (conflicting, sent(MetricBatch.from_metrics(conflicting))):
        with pytest.raises(
            ValueError,
            match="'m' of dataset 'orca' is already registered with aggregation type sum",
        ):
            aggregator.update(conflict)
    assert aggregator.get_metrics_for_logging() == {"data_orca/m": 1.0}


@pytest.mark.parametrize(
    "types", [("sum", "max"), ("max", "sum"), ("sum", "state mean"), ("state mean", "sum")]
)
def test_a_batch_with_two_types_of_a_new_metric_is_refused_whole(types: Any) -> None:
    """It was refused where the batch is made, which ends a data worker."""
    aggregator = aggregator_of_users()
    batch = MetricBatch.from_metrics(
        [Metric("d", "other", 1, "sum"), *(Metric("d", "n", 1, agg) for agg in types)]
    )
    with pytest.raises(ValueError, match="metric 'n' of dataset 'd' is already registered"):
        aggregator.update(batch)
    assert aggregator.get_metrics_for_logging("t") == {}


# -- What it is ----------------------------------------------------------------------------------


def test_it_is_a_plain_object_that_movers_leave_alone() -> None:
    batch = MetricBatch.from_metrics(metrics(SUM, [1, 2]))
    assert not isinstance(batch, tuple | list | Mapping | Sequence)
    assert not is_dataclass(batch)
    assert not hasattr(batch, "__dict__")
    assert not hasattr(batch, "__iter__")
    assert not hasattr(batch, "__getitem__")
    assert batch.to("cuda:0", non_blocking=True) is batch
    assert batch.pin_memory() is batch
    assert repr(batch) == "MetricBatch(orca/m, alpaca/m)"
    assert len(batch) == 2
    assert len(MetricBatch()) == 0


def test_it_can_be_made_of_any_iterable() -> None:
    aggregator = MetricsAggregator()
    aggregator.update(MetricBatch.from_metrics(metric for metric in metrics(SUM, [1, 2])))
    assert aggregator.get_metrics_for_logging() == {"data_orca/m": 1.0, "data_alpaca/m": 2.0}
