"""Timers tell how long things take, as a share of the time, and on which rank."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from handlers_of_users import RMSHandler
from ranks import run_ranks, run_threads

from metricfold import MetricsAggregator, Snapshot
from metricfold.timing import Timing

SLOW = 0.04
"""Seconds; what else a test does takes far less."""


def spend(aggregator: MetricsAggregator, rank: int) -> Snapshot:
    """Use a timer twice: rank 1 is slow, rank 2 has none."""
    if rank != 2:
        for _ in range(2):
            with aggregator.timer("data"):
                time.sleep(SLOW if rank == 1 else 0)
    return aggregator.reduce()


def timed(communicator: Any, route: str) -> tuple[Timing, dict[str, float], list[float | None]]:
    aggregator = MetricsAggregator(communicator=communicator, route=route)
    for _ in range(2):
        snapshot = spend(aggregator, communicator.rank)
    return (
        snapshot.timing("data"),
        snapshot.as_dict("t", "interval"),
        snapshot.per_rank(None, "data_share"),
    )


@pytest.mark.parametrize("route", ["narrow", "wide"])
def test_the_slowest_and_the_fastest_rank_are_named_on_either_route(route: str) -> None:
    results = run_threads(timed, 3, route)
    timing, logged, per_rank = results[0]
    assert all(result == results[0] for result in results)
    assert (timing.slowest, timing.fastest, timing.max_rank) == (1, 2, 1)
    assert timing.fastest_share == 0
    assert timing.slowest_share > 0.5 * SLOW
    assert logged == {
        "t/data_seconds": timing.mean,
        "t/data_seconds_max": timing.max,
        "t/data_share": timing.share,
    }
    assert SLOW / 2 <= timing.mean <= timing.max  # two of four uses are slow
    assert timing.max >= SLOW
    # The share of all ranks is the mean of theirs.
    assert sum(share or 0 for share in per_rank) == pytest.approx(timing.share)
    assert timing.slowest_share <= 3 * timing.share


def on_rank(rank: int) -> tuple[int, int | None]:
    timing = spend(MetricsAggregator(), rank).timing("data")
    return timing.slowest, timing.max_rank


def test_real_ranks_name_the_straggler() -> None:
    assert run_ranks(on_rank, 2) == [(1, 1), (1, 1)]


def test_a_block_that_fills_the_interval_has_all_of_it() -> None:
    aggregator = MetricsAggregator()
    aggregator.reduce()
    with aggregator.timer("step"):
        time.sleep(SLOW)
    timing = aggregator.reduce().timing("step")
    assert SLOW <= timing.mean == timing.max
    assert 0 < timing.share <= 1


def test_nested_timers_threads_functions_and_errors_all_count() -> None:
    aggregator = MetricsAggregator()

    @aggregator.timer("call")
    def fall(depth: int) -> int:
        time.sleep(SLOW)
        return depth if depth == 0 else fall(depth - 1)

    assert fall(1) == 0  # the outer call takes the inner one's time too

    def fail() -> None:
        with aggregator.timer("outer"), aggregator.timer("inner"):
            time.sleep(SLOW)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()

    def work() -> None:
        for _ in range(200):
            with aggregator.timer("thread"):
                pass

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert aggregator._timers["thread"].uses == 800
    snapshot = aggregator.reduce()
    assert snapshot.timing("call").max >= 2 * SLOW
    assert snapshot.timing("call").mean >= 1.5 * SLOW
    assert snapshot.timing("outer").max >= snapshot.timing("inner").max >= SLOW


def test_the_wait_for_each_item_is_timed_and_not_what_is_done_with_it() -> None:
    aggregator = MetricsAggregator()

    def loader() -> Any:
        for number in range(3):
            time.sleep(SLOW)
            yield number

    items = []
    for item in aggregator.timer("data").over(loader()):
        with aggregator.timer("step"):
            time.sleep(3 * SLOW)
        items.append(item)
    assert items == [0, 1, 2]
    assert aggregator._timers["data"].uses == 3
    snapshot = aggregator.reduce()
    assert SLOW <= snapshot.timing("data").mean < snapshot.timing("step").mean
    assert snapshot.timing("data").share < snapshot.timing("step").share


def test_times_count_once_over_failures_marks_and_restarts() -> None:
    aggregator = MetricsAggregator()
    mark = aggregator.mark()
    with aggregator.timer("data"):
        time.sleep(SLOW)
    aggregator.rollback(mark)  # the time has passed all the same
    with pytest.raises(RuntimeError, match="step"):
        aggregator.reduce(step=-1)
    state = aggregator.state_dict()
    snapshot = aggregator.reduce()
    assert snapshot.timing("data").max >= SLOW
    resumed = MetricsAggregator()
    with resumed.timer("data"):
        time.sleep(3 * SLOW)
    resumed.load_state_dict(state)  # discards what has not been reduced
    run = resumed.reduce().as_dict("t", "run")
    assert run["t/data_seconds_max"] == snapshot.timing("data").max
    with pytest.raises(KeyError, match="no rank has used the timer 'data' in the interval"):
        resumed.reduce().timing("data")


def test_names_that_clash_and_timers_that_are_none_are_refused() -> None:
    aggregator = MetricsAggregator()
    aggregator.record("data_seconds", 1.0, "sum")
    with pytest.raises(ValueError, match="already registered with aggregation type 'sum'"):
        aggregator.timer("data")
    with pytest.raises(ValueError, match="name of a timer"):
        aggregator.timer("")
    with pytest.raises(KeyError, match=r"no rank has used a timer 'data': aggregator\.timer"):
        aggregator.reduce().timing("data")
    aggregator.timer("step")
    with pytest.raises(ValueError, match="already registered with aggregation type 'rate'"):
        aggregator.record("step_share", 1.0)
    other = MetricsAggregator()
    other.register_handler("mean", RMSHandler())
    with pytest.raises(ValueError, match="needs handlers with lanes"):
        other.timer("data")
    other.record("data_seconds", 1.0, "max")  # the name is still free
