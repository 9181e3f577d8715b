"""Time counts from the first value on that comes in, and not during a pause."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from time import perf_counter
from typing import Any

import numpy as np
import pytest
from handlers_of_users import RMSHandler
from ranks import run_threads

from metricfold import Metric, MetricsAggregator, MetricsCollator, Snapshot

SHORT = 0.02
"""Seconds. Nothing is compared with it but time that was measured beside it."""

ROUTES = pytest.mark.parametrize("route", ["narrow", "wide"])


def update_list(aggregator: MetricsAggregator) -> None:
    aggregator.update([Metric("docs", "n", 1, "sum")])


def update_batch(aggregator: MetricsAggregator) -> None:
    samples = [{"metrics": [Metric("docs", "n", 1, "sum")]}]
    aggregator.update(MetricsCollator(lambda rows: {})(samples)["metrics"])


def record(aggregator: MetricsAggregator) -> None:
    aggregator.record("tokens", 1, "rate")


def record_several(aggregator: MetricsAggregator) -> None:
    aggregator.record_all({"loss": 1.0, "norm": 2.0})


def record_array(aggregator: MetricsAggregator) -> None:
    aggregator.record("loss", np.ones(3), each=True)


def record_custom(aggregator: MetricsAggregator) -> None:
    aggregator.register_handler("rms", RMSHandler())
    aggregator.record("n", 1.0, "rms")


def drain(aggregator: MetricsAggregator) -> None:
    pytest.importorskip("torch")
    from metricfold.torch import DeviceAccumulator

    aggregator.drain(DeviceAccumulator({"loss": "mean"}, ("docs",)))


def use_timer(aggregator: MetricsAggregator) -> None:
    with aggregator.timer("data"):
        pass


@pytest.mark.parametrize(
    "take",
    [
        update_list,
        update_batch,
        record,
        record_several,
        record_array,
        record_custom,
        drain,
        use_timer,
    ],
)
def test_the_clock_starts_with_the_first_call_and_not_where_the_aggregator_is_made_as_it_used_to(
    take: Callable[[MetricsAggregator], None],
) -> None:
    aggregator = MetricsAggregator()
    aggregator.update([])  # takes nothing in
    aggregator.record("loss", 1.0, weight=0)
    aggregator.timer("data")
    with pytest.raises(ValueError, match="aggregation type"):
        aggregator.record("loss", 1.0, "unknown")
    time.sleep(SHORT)
    assert aggregator.reduce().seconds == 0.0
    began = perf_counter()
    take(aggregator)
    first = aggregator.reduce()
    assert 0 < first.seconds <= perf_counter() - began
    # From then on the time between two logs counts, whatever comes in.
    time.sleep(SHORT)
    second = aggregator.reduce()
    assert second.seconds >= SHORT
    assert second.run_seconds == pytest.approx(first.seconds + second.seconds)


def test_what_a_pause_takes_is_no_part_of_seconds_rates_and_shares() -> None:
    aggregator = MetricsAggregator()
    began = perf_counter()
    paused = 0.0
    for _ in range(2):
        aggregator.record("tokens", 100, "rate")
        with aggregator.timer("step"):
            time.sleep(SHORT)
        with aggregator.pause():
            inside = perf_counter()
            aggregator.record("tokens", 100, "rate")  # counts
            with aggregator.timer("evaluation"):
                time.sleep(3 * SHORT)
            paused += perf_counter() - inside
    snapshot = aggregator.reduce()
    counted = perf_counter() - began - paused
    assert 2 * SHORT <= snapshot.seconds <= counted
    logged = snapshot.as_dict("t", "interval")
    assert logged["t/tokens"] == pytest.approx(400 / snapshot.seconds)
    assert logged["t/step_share"] >= 2 * SHORT / counted
    # How long the evaluation took is known, but of the time that counts it has none.
    assert logged["t/evaluation_seconds"] >= 3 * SHORT
    assert logged["t/evaluation_share"] == 0.0


def test_pauses_are_nested_overlap_on_threads_and_end_with_an_exception() -> None:
    aggregator = MetricsAggregator()
    aggregator.record("tokens", 1, "rate")
    inner_is_over, outer_may_end = threading.Event(), threading.Event()

    def other() -> None:
        with aggregator.pause():
            inner_is_over.set()
            outer_may_end.wait(10)

    again = aggregator.pause()
    with again, again, pytest.raises(ZeroDivisionError), aggregator.pause():
        raise ZeroDivisionError
    thread = threading.Thread(target=other)
    with aggregator.pause():
        thread.start()
        assert inner_is_over.wait(10)
        aggregator.reduce()
    # The other thread still pauses.
    time.sleep(SHORT)
    assert aggregator.reduce().seconds == 0.0
    outer_may_end.set()
    thread.join()
    time.sleep(SHORT)
    assert aggregator.reduce().seconds >= SHORT


def across(communicator: Any, route: str) -> list[Any]:
    """Reduce, save and log inside a pause, and after it."""
    aggregator = MetricsAggregator(communicator=communicator, route=route)
    found: list[Any] = []

    def note(snapshot: Snapshot) -> None:
        found.append((snapshot.seconds, snapshot.as_dict("t", "interval")))

    with aggregator.pause():
        aggregator.record("tokens", 8, "rate", per_rank=True)
        aggregator.record("n", 1, "sum")
        time.sleep(SHORT)
        snapshot = aggregator.reduce()
        found.append(snapshot.per_rank(None, "tokens"))
        found.append(snapshot.run_seconds)
        note(snapshot)
        aggregator.record("tokens", 8, "rate")
        state = aggregator.state_dict()
        note(aggregator.reduce())
    mark = aggregator.mark()
    aggregator.record("tokens", 1000, "rate")
    time.sleep(SHORT)
    aggregator.rollback(mark)  # its time has passed all the same
    aggregator.record("n", 1, "sum")
    snapshot = aggregator.reduce()
    note(snapshot)
    assert snapshot.as_dict("t", "run")["t/tokens"] == 16 * 2 / snapshot.run_seconds
    found.append(state)
    return found


@ROUTES
def test_a_rate_over_no_time_is_not_reported_where_it_used_to_be_nan(route: str) -> None:
    one, two = run_threads(across, 2, route)
    assert one == two
    per_rank, run_seconds, first, second, third, _ = one
    assert per_rank == [None, None]
    assert run_seconds == 0.0
    assert first == (0.0, {"t/n": 2.0})
    assert second == (0.0, {})
    assert third[0] >= SHORT
    assert third[1] == {"t/n": 2.0}


@pytest.mark.parametrize("on_nan", ["propagate", "skip"])
def test_a_nan_makes_no_rate_of_no_time(on_nan: str) -> None:
    aggregator = MetricsAggregator(on_nan=on_nan)
    with aggregator.pause():
        aggregator.record("tokens", float("nan"), "rate")
        logged = aggregator.reduce().as_dict("t", "interval")
    assert logged == ({"t/tokens_nan_count": 1.0} if on_nan == "skip" else {})


def slow_and_quick(communicator: Any, route: str) -> tuple[float, float]:
    aggregator = MetricsAggregator(communicator=communicator, route=route)
    began = perf_counter()
    if communicator.rank == 1:
        aggregator.record("tokens", 6, "rate")
        time.sleep(SHORT)
    return aggregator.reduce().seconds, perf_counter() - began


@ROUTES
def test_seconds_are_those_of_the_slowest_rank_also_where_another_had_nothing(route: str) -> None:
    results = run_threads(slow_and_quick, 2, route)
    assert results[0][0] == results[1][0]
    assert SHORT <= results[1][0] <= results[1][1]


def resumed(communicator: Any, route: str) -> list[float]:
    aggregator = MetricsAggregator(communicator=communicator, route=route)
    aggregator.record("tokens", 6, "rate")
    time.sleep(SHORT)
    saved = aggregator.reduce().run_seconds
    state = aggregator.state_dict()
    more = aggregator.reduce().run_seconds
    aggregator.load_state_dict(state)
    time.sleep(2 * SHORT)  # such as loading the model
    aggregator.reduce()  # of the interval that was open when it was saved
    waited = aggregator.reduce()
    began = perf_counter()
    aggregator.record("tokens", 6, "rate")
    first = aggregator.reduce()
    measured = perf_counter() - began
    assert first.seconds <= measured
    assert first.run_seconds == waited.run_seconds + first.seconds
    aggregator.reset()
    time.sleep(SHORT)
    return [saved, more, waited.seconds, waited.run_seconds, aggregator.reduce().run_seconds]


@ROUTES
def test_seconds_of_the_run_go_on_after_a_restart_with_the_first_call(route: str) -> None:
    one, two = run_threads(resumed, 2, route)
    assert one == two
    saved, more, waited, run, after_reset = one
    assert saved <= run <= more
    assert waited == 0.0
    assert after_reset == 0.0


def test_a_state_that_is_loaded_in_a_pause_leaves_it_a_pause() -> None:
    aggregator = MetricsAggregator()
    aggregator.record("tokens", 6, "rate")
    state = aggregator.state_dict()
    with aggregator.pause():
        aggregator.load_state_dict(state)
        aggregator.record("tokens", 6, "rate")
        aggregator.reduce()  # of the interval that was open when it was saved
        aggregator.record("tokens", 6, "rate")
        time.sleep(SHORT)
        assert aggregator.reduce().seconds == 0.0
    time.sleep(SHORT)
    assert aggregator.reduce().seconds >= SHORT


def test_the_time_of_a_reduction_that_failed_is_the_next_ones() -> None:
    aggregator = MetricsAggregator()
    aggregator.record("tokens", 6, "rate")
    time.sleep(SHORT)
    with pytest.raises(RuntimeError, match="step"):
        aggregator.reduce(step=-1)
    assert aggregator.reduce().seconds >= SHORT


def test_a_pause_of_an_aggregator_that_is_closed_is_refused() -> None:
    aggregator = MetricsAggregator()
    aggregator.close()
    with pytest.raises(RuntimeError, match="is closed: make a new one"), aggregator.pause():
        pass
