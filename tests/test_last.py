"""LAST: the value recorded last, by the lowest rank that recorded one, in the newest interval that has any."""

from __future__ import annotations

import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_threads

from metricfold import LastAggHandler, Metric, MetricBatch, MetricsAggregator, merge_state_dicts
from metricfold.communicator import Communicator
from metricfold.torch import DeviceAccumulator


@pytest.mark.parametrize("route", ["gather", "tree"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_it_is_of_the_lowest_rank_that_recorded_one_in_the_newest_interval_that_has_any(
    route: Any, world_size: int
) -> None:
    def rank(communicator: Communicator) -> list[Any]:
        aggregator = MetricsAggregator(communicator=communicator, route=route)
        seen = []
        for by in ({0, 1}, set(range(1, world_size)), set(), {world_size - 1}):
            if communicator.rank in by:
                for value in (7.0, -10.0 * len(seen) - communicator.rank):
                    aggregator.record("lr", value, "last")
            snapshot = aggregator.reduce()
            run = snapshot.as_dict("t", "run").get("t/lr")
            shown = snapshot.as_dict("t", "interval").get("t/lr")
            seen.append((run, shown, snapshot.owner(None, "lr")))
        return seen

    first = (0.0, 0.0, 0)
    second = (-11.0, -11.0, 1) if world_size > 1 else (0.0, None, None)
    third = (second[0], None, None)
    last = -30.0 - (world_size - 1)
    expected = [first, second, third, (last, last, world_size - 1)]
    assert run_threads(rank, world_size) == [expected] * world_size


def test_every_way_in_keeps_the_order_in_which_values_came() -> None:
    def of(*values: float) -> list[Metric]:
        return [Metric("d", "x", value, "last") for value in values]

    calls: list[tuple[Any, float]] = [
        (lambda agg: agg.record("x", 1, "last", dataset="d"), 1.0),
        (lambda agg: agg.update(of(2.0, 3.0)), 3.0),
        (
            lambda agg: agg.update(pickle.loads(pickle.dumps(MetricBatch.from_metrics(of(9, 4))))),
            4.0,
        ),
        (lambda agg: agg.record("x", torch.tensor(5.0), "last", dataset="d"), 5.0),
        (lambda agg: agg.update(MetricBatch.from_metrics(of(6.0))), 6.0),
        (lambda agg: agg.record("x", 7.0, "last", dataset="d", weight=1), 7.0),
        (lambda agg: agg.record("x", 8.0, "last", dataset="d", weight=0), 7.0),
        (lambda agg: agg.record("x", np.array([3.0, 9.0]), "last", dataset="d", each=True), 9.0),
        (lambda agg: agg.record_all({"x": 10.0}, "last", dataset="d"), 10.0),
        (lambda agg: agg.update(of(float("-inf"))), float("-inf")),
    ]
    for end in range(1, len(calls) + 1):
        aggregator = MetricsAggregator()
        for call, _ in calls[:end]:
            call(aggregator)
        snapshot = aggregator.reduce()
        assert snapshot.as_dict("t") == {"t_d/x": calls[end - 1][1]}, end
    assert snapshot.per_rank("d", "x") == [float("-inf")]
    assert snapshot.owner("d", "x") == 0


def test_a_mark_takes_it_back() -> None:
    aggregator = MetricsAggregator()
    aggregator.record("x", 1.0, "last")
    mark = aggregator.mark()
    aggregator.record("x", 2.0, "last")
    aggregator.rollback(mark)
    assert aggregator.get_metrics_for_logging("t") == {"t/x": 1.0}


@pytest.mark.parametrize("on_nan", ["propagate", "skip"])
def test_nan_is_a_value_like_any_other_unless_it_is_skipped(on_nan: str) -> None:
    aggregator = MetricsAggregator(on_nan=on_nan)
    aggregator.record("gone", math.nan, "last")
    aggregator.record("gone", 1.0, "last")
    aggregator.record("here", 2.0, "last")
    aggregator.record("here", math.nan, "last")
    found = aggregator.get_metrics_for_logging("t")
    if on_nan == "skip":
        assert found == {"t/gone": 1.0, "t/gone_nan_count": 1, "t/here": 2.0, "t/here_nan_count": 1}
    else:
        assert found.pop("t/gone") == 1.0
        assert math.isnan(found.pop("t/here"))
        assert not found


@pytest.mark.parametrize("sizes", [(2, 3), (3, 1)])
def test_a_checkpoint_keeps_it_at_any_world_size_and_jobs_put_together_have_that_of_the_later(
    sizes: tuple[int, int],
) -> None:
    def first(communicator: Communicator) -> Any:
        aggregator = MetricsAggregator(communicator=communicator)
        aggregator.record("x", 5.0 - communicator.rank, "last")
        aggregator.reduce()
        if communicator.rank:
            aggregator.record("y", 1.0 * communicator.rank, "last")
        return aggregator.state_dict()

    (state, *others) = run_threads(first, sizes[0])
    assert all(other == state for other in others)

    def second(communicator: Communicator) -> Any:
        aggregator = MetricsAggregator(communicator=communicator)
        aggregator.load_state_dict(state)
        before = aggregator.reduce()
        if communicator.rank == communicator.world_size - 1:
            aggregator.record("x", 2.0, "last")
        after = aggregator.reduce()
        return (
            before.as_dict("t", "run"),
            before.as_dict("t", "interval"),
            after.as_dict("t", "run"),
        )

    assert (
        run_threads(second, sizes[1])
        == [({"t/x": 5.0, "t/y": 1.0}, {"t/y": 1.0}, {"t/x": 2.0, "t/y": 1.0})] * sizes[1]
    )

    other = MetricsAggregator()
    other.record("x", -1.0, "last")
    later = MetricsAggregator()
    later.load_state_dict(merge_state_dicts([state, other.state_dict()], parallel=False))
    assert later.reduce().as_dict("t", "run") == {"t/x": -1.0, "t/y": 1.0}


def test_there_is_none_over_datasets() -> None:
    aggregator = MetricsAggregator()
    for dataset in ("a", "b"):
        aggregator.record("x", 1.0, "last", dataset=dataset)
        aggregator.record("n", 1.0, "sum", dataset=dataset)
    found = aggregator.reduce().as_dict("t", rollup=True)
    assert found == {"t_a/x": 1.0, "t_b/x": 1.0, "t_a/n": 1.0, "t_b/n": 1.0, "t/n": 2.0}


def test_it_has_no_form_on_a_device() -> None:
    with pytest.raises(
        ValueError, match=r"'lr' has the aggregation 'last', which no accumulator .*record"
    ):
        DeviceAccumulator({"lr": "last"})


def test_the_contract_keeps_it_too_and_over_ranks_the_lowest_counts() -> None:
    handler = LastAggHandler()
    states = []
    for values in ([], [3.0, 1.0], [2.0]):
        state = handler.initialize_metric_state("d", "x", "last")
        for value in values:
            handler.update(state, Metric("d", "x", value, "last"))
        states += handler.finalize_local_agg(state)
    assert [state.value for state in states[1:]] == [1.0, 2.0]
    result = handler.finalize_dist_agg(states)
    assert result.value == 1.0
    assert handler.report(result) == {"": 1.0}
    assert handler.kind_of("last") == "last"


def test_ranks_of_which_one_holds_that_name_otherwise_are_told_so() -> None:
    def rank(communicator: Communicator) -> str:
        aggregator = MetricsAggregator(communicator=communicator)
        aggregator.record("x", 1.0, "last" if communicator.rank else "max")
        with pytest.raises(ValueError, match=r"x") as told:
            aggregator.reduce()
        return str(told.value)

    one, other = run_threads(rank, 2)
    assert one == other
    assert "'last'" in one
    assert "max" in one
