"""Ranks that hold one key in different ways: nothing is dropped, and it is said once, on all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from handlers_of_users import LaneRMS, RMSHandler
from ranks import run_threads

from metricfold import Metric, MetricBatch, MetricsAggregator
from metricfold.communicator import Communicator
from metricfold.torch import DeviceAccumulator


class Wider(LaneRMS):
    """A lane more than other ranks have."""

    sum_lanes = (*LaneRMS.sum_lanes, "more")

    def sums_of(self, values: Any, weights: Any) -> tuple[float, ...]:
        return (*super().sums_of(values, weights), 0.0)


def error_of(call: Callable[[], object]) -> str:
    try:
        call()
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "ok"


def new(communicator: Communicator) -> MetricsAggregator:
    aggregator = MetricsAggregator(4, communicator=communicator)
    aggregator.register_handler("state", RMSHandler())
    return aggregator


def disagree(communicator: Communicator) -> list[Any]:
    aggregator = new(communicator)
    agg = "sum" if communicator.rank == 0 else "max"
    for value in (3.0, 5.0):
        aggregator.record("x", value, agg)
    aggregator.record("n", 1, "sum")
    said = [error_of(aggregator.reduce) for _ in range(2)]
    run = aggregator.get_metrics_for_logging("t")
    own = error_of(lambda: aggregator.record("x", 7.0, agg))
    aggregator.record("x", 1.0, "sum")
    return [said, run, own, aggregator.reduce().as_dict("t", "interval")]


def test_of_two_types_the_first_rank_has_the_name_and_the_other_prints_beside_it() -> None:
    """What the other rank held was dropped."""
    first, second = run_threads(disagree, 2)
    (error, after), run, own, interval = first
    assert error.startswith(
        "ValueError: rank 1 held metric 'x' as 'max', but it is already registered"
    )
    assert "aggregation type sum on the other ranks" in error
    assert "goes on as 'x[max]'" in error
    assert second[0] == [error, "ok"]
    assert after == "ok"
    assert run == second[1] == {"t/n": 2.0, "t/x": 8.0, "t/x[max]": 5.0}
    # Where it lost, the type is refused from now on; the other rank goes on.
    assert own == "ok"
    assert second[2].startswith(
        "ValueError: metric 'x' is already registered with aggregation type sum"
    )
    # It is empty after that.
    assert interval == second[3] == {"t/x": 7.0 + 2.0}


VALUES: dict[str, tuple[str, Any, dict[str, float]]] = {
    "mean": ("mean", 4.0, {"t/x[mean]": 4.0}),
    "distribution": ("distribution", 4.0, {"t/x[distribution/recent]_stat_max": 4.0}),
    "categorical_count": ("categorical_count", "a", {"t/x[counts]_count_a": 1.0}),
    "without lanes": ("state", 4.0, {"t/x[state/0+0]": 4.0}),
    "on a device": ("mean", torch.tensor(4.0), {"t/x[mean]": 4.0}),
    "on a device, without lanes": ("state", torch.tensor(4.0), {"t/x[state/0+0]": 4.0}),
}


@pytest.mark.parametrize("name", VALUES)
def test_whatever_the_other_type_is_it_keeps_what_it_holds(name: str) -> None:
    agg, value, expected = VALUES[name]

    def both(communicator: Communicator) -> dict[str, float]:
        aggregator = new(communicator)
        if communicator.rank == 0:
            aggregator.record("x", 1.0, "sum")
        else:
            aggregator.record("x", value, agg)
            mark = aggregator.mark()
            aggregator.record("x", value, agg)
            aggregator.rollback(mark)
        assert "goes on as" in error_of(aggregator.reduce)
        return aggregator.get_metrics_for_logging("t")

    first, second = run_threads(both, 2)
    assert first == second
    assert first["t/x"] == 1.0
    assert expected.items() <= first.items()


def test_what_an_accumulator_held_goes_on_under_that_name() -> None:
    def drained(communicator: Communicator) -> dict[str, float]:
        aggregator = new(communicator)
        if communicator.rank == 0:
            aggregator.record("x", 1.0, "sum")
        else:
            accumulator = DeviceAccumulator({"x": "mean", "y": "sum"})
            accumulator.update_all({"x": torch.tensor(4.0), "y": torch.tensor(1.0)})
            aggregator.drain(accumulator)
        assert "goes on as 'x[mean]'" in error_of(aggregator.reduce)
        return aggregator.get_metrics_for_logging("t")

    assert run_threads(drained, 2)[0] == {"t/x": 1.0, "t/x[mean]": 4.0, "t/y": 1.0}


def test_what_a_mark_lies_above_can_still_be_rolled_back_under_the_other_name() -> None:
    def marked(communicator: Communicator) -> dict[str, float]:
        aggregator = new(communicator)
        for agg, name in (("max", "x"), ("state", "y")):
            aggregator.record(name, 1.0, agg if communicator.rank else "sum")
        future = aggregator.reduce_async()
        mark = aggregator.mark()
        # Whether this comes before or after the ranks have agreed: it is refused, or it goes along.
        for agg, name in (("max", "x"), ("state", "y")):
            error_of(
                lambda name=name, agg=agg: aggregator.record(
                    name, 9.0, agg if communicator.rank else "sum"
                )
            )
        future.exception()
        aggregator.rollback(mark)
        return aggregator.get_metrics_for_logging("t")

    assert run_threads(marked, 2)[0] == {
        "t/x": 1.0,
        "t/x[max]": 1.0,
        "t/y": 1.0,
        "t/y[state/0+0]": 1.0,
    }


def test_three_types_of_one_key_are_three_entries() -> None:
    def three(communicator: Communicator) -> list[Any]:
        aggregator = new(communicator)
        aggregator.record("x", 2.0, ("sum", "max", "mean", "max")[communicator.rank])
        return [error_of(aggregator.reduce), aggregator.get_metrics_for_logging("t")]

    (error, logged), *others = run_threads(three, 4)
    assert all(other == [error, logged] for other in others)
    assert "ranks 1, 3 held metric 'x' as 'max'" in error
    assert "rank 2 held metric 'x' as 'mean'" in error
    assert logged == {"t/x": 2.0, "t/x[max]": 2.0, "t/x[mean]": 2.0}


def test_the_order_in_which_they_were_agreed_on_is_in_the_checkpoint() -> None:
    def save(communicator: Communicator) -> Any:
        aggregator = new(communicator)
        aggregator.record("x", 2.0, "max" if communicator.rank == 0 else "sum")
        error_of(aggregator.reduce)
        return aggregator.state_dict()

    state, other = run_threads(save, 2)
    assert state == other

    def go_on(communicator: Communicator) -> list[Any]:
        aggregator = new(communicator)
        aggregator.load_state_dict(state)
        said = error_of(lambda: aggregator.record("x", 5.0, "sum"))
        aggregator.record("x", 5.0, "max")
        return [said, aggregator.get_metrics_for_logging("t")]

    for ranks in (1, 2):
        for said, logged in run_threads(go_on, ranks):
            assert "already registered with aggregation type max" in said
            assert logged == {"t/x": 5.0, "t/x[sum]": 2.0}


def test_names_that_clash_between_ranks_are_both_kept() -> None:
    def clash(communicator: Communicator) -> list[Any]:
        aggregator = new(communicator)
        if communicator.rank == 0:
            aggregator.record("len", 4.0, "distribution")
        else:
            aggregator.update(MetricBatch.from_metrics([Metric("d", "y", 1.0, "sum")]))
            aggregator.record("len_stat_p50", 3.0, "sum")
        return [error_of(aggregator.reduce), aggregator.get_metrics_for_logging("t")]

    (error, logged), other = run_threads(clash, 2)
    assert other == [error, logged]
    assert "rank 1 held metric 'len_stat_p50' as 'sum'" in error
    assert (logged["t/len_stat_p50"], logged["t/len_stat_p50[sum]"], logged["t_d/y"]) == (
        4.0,
        3.0,
        1.0,
    )


@pytest.mark.parametrize("host_first", [True, False])
@pytest.mark.parametrize("together", [True, False])
def test_a_distribution_of_a_device_joins_that_of_the_host(
    host_first: bool, together: bool
) -> None:
    """Whichever came first; it was refused on one rank, and dropped between two."""

    def both(communicator: Communicator) -> list[Any]:
        aggregator = new(communicator)
        on_host = (communicator.rank == 0) == host_first
        for rank in (0,) if together else (0, 1):  # whose turn it is
            if (together or communicator.rank == rank) and on_host:
                aggregator.record("len", 3.0, "distribution")
            elif together or communicator.rank == rank:
                accumulator = DeviceAccumulator({"len": "distribution"})
                for value in (1.0, 2.0):
                    accumulator.update("len", torch.tensor(value))
                aggregator.drain(accumulator)
            aggregator.state_dict()
        snapshot = aggregator.reduce()
        logged = snapshot.as_dict("t", "interval")
        # And each goes on as it began.
        aggregator.record("len", 4.0, "distribution")
        run = aggregator.reduce().as_dict("t", "run")
        return [logged["t/len_stat_count"], logged["t/len_stat_min"], run["t/len_stat_count"]]

    first, second = run_threads(both, 2)
    assert first == second
    assert first[:2] == [3.0, 1.0]
    # Recent values alone, or all.
    assert first[2] == (1.0 + 2.0 if host_first else 3.0 + 2.0)


def test_one_type_with_other_settings_is_a_mistake_that_is_said_and_drops_what_it_held() -> None:
    def windows(communicator: Communicator) -> list[Any]:
        window = 4 if communicator.rank == 0 else None
        aggregator = MetricsAggregator(window, communicator=communicator)
        aggregator.register_handler("mine", LaneRMS() if communicator.rank == 0 else Wider())
        aggregator.record("x", 2.0 + communicator.rank, "distribution")
        aggregator.record("y", 2.0, "mine")
        error = error_of(aggregator.reduce)
        return [error, aggregator.reduce().value(None, "x", "min"), aggregator.state_dict()]

    (error, value, state), other = run_threads(windows, 2)
    assert other == [error, value, state]
    assert "rank 1 held metric 'x' with dist_window_size=None" in error
    assert (
        "register the same handler for type mine on every rank; what they held of it is dropped"
        in error
    )
    assert value == 2.0
    # No other than one of the ranks has to be able to load it.
    resumed = MetricsAggregator(4)
    resumed.register_handler("mine", LaneRMS())
    resumed.load_state_dict(state)
    assert resumed.get_metrics_for_logging("t")["t/y"] == 2.0
