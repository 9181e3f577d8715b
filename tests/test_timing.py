"""Timers tell how long things take, as a share of the time, and on which rank."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from typing import Any

import pytest
from handlers_of_users import RMSHandler
from ranks import run_ranks, run_threads

from metricfold import MeanAggHandler, MetricsAggregator, Snapshot
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
    with pytest.raises(ValueError, match="already registered with aggregation type sum"):
        aggregator.timer("data")
    with pytest.raises(ValueError, match="name of a timer"):
        aggregator.timer("")
    with pytest.raises(TypeError, match="name of a timer must be a string"):
        aggregator.timer(["data"])  # type: ignore[arg-type]
    with pytest.raises(KeyError, match=r"no rank has used a timer 'data': aggregator\.timer"):
        aggregator.reduce().timing("data")
    aggregator.timer("step")
    with pytest.raises(ValueError, match="already registered with aggregation type rate"):
        aggregator.record("step_share", 1.0)
    other = MetricsAggregator()
    other.register_handler("mean", RMSHandler())
    with pytest.raises(ValueError, match="needs handlers with lanes"):
        other.timer("data")
    other.record("data_seconds", 1.0, "max")  # the name is still free


def contradicted(communicator: Any) -> list[Any]:
    """Rank 0 holds what rank 1's timer gives as another type, in the first two intervals."""
    aggregator = MetricsAggregator(communicator=communicator)
    found: list[Any] = []
    for turn in range(3):
        try:
            if communicator.rank:
                with aggregator.timer("data"):
                    pass
                with aggregator.timer("step"):
                    pass
            elif turn < 2:
                aggregator.record("data_seconds", 1.0, "sum")
        except ValueError as error:
            found.append(f"alone: {error}")
        try:
            logged = aggregator.reduce().as_dict("t")
            found.append(sum(name.startswith("t/step") for name in logged))
        except ValueError as error:
            found.append(str(error))
    return found


def test_a_timer_whose_name_other_ranks_hold_otherwise_is_told_so_once_and_wedges_nothing() -> None:
    zero, one = run_threads(contradicted, 2)
    assert zero == [one[0], one[2], one[4]]  # what they say together
    assert "rank 1 held metric 'data_seconds' as 'mean'" in zero[0]
    assert zero[1:] == [3, 3]  # the other timer goes on
    assert "already registered with aggregation type sum" in one[1]
    assert one[1] == one[3]


class Unwilling(MeanAggHandler):
    """A handler with lanes that fails for one value."""

    def sums_of(self, values: Any, weights: Any) -> tuple[float, ...]:
        if values.size and values[0] > SLOW:
            raise ZeroDivisionError
        return super().sums_of(values, weights)


def failing_handler(communicator: Any) -> list[Any]:
    aggregator = MetricsAggregator(communicator=communicator)
    aggregator.register_handler("mean", Unwilling())
    aggregator.record("n", 1.0, "sum")
    for name in ("slow", "quick"):
        with aggregator.timer(name):
            time.sleep(1.5 * SLOW if (communicator.rank, name) == (1, "slow") else 0)
    with pytest.raises(RuntimeError) as caught:
        aggregator.reduce()
    logged = aggregator.reduce().as_dict("t")
    return [str(caught.value), logged["t/n"], "t/quick_share" in logged, "t/slow_share" in logged]


def test_a_handler_that_fails_on_a_time_is_told_to_all_ranks_and_nothing_else_is_lost() -> None:
    results = run_threads(failing_handler, 2)
    assert results[0] == results[1]
    assert "rank 1 could not take part: timer 'slow': the handler failed" in results[0][0]
    assert results[0][1:] == [2.0, True, True]


def test_a_timer_in_a_forked_child_says_that_its_times_would_be_lost() -> None:
    script = """
import os, warnings
warnings.simplefilter("ignore", DeprecationWarning)
from metricfold import MetricsAggregator

aggregator = MetricsAggregator()

@aggregator.timer("read")
def read():
    return 1

if child := os.fork():
    os.waitpid(child, 0)
    read()
    print(aggregator.reduce().timing("read").slowest)
else:
    for use in (read, lambda: aggregator.timer("read")):
        try:
            use()
        except RuntimeError as error:
            print(error, flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr == ""
    timer, aggregator, rank = done.stdout.splitlines()
    assert timer.startswith("this timer was inherited by a forked process")
    assert "was inherited by a forked process" in aggregator
    assert rank == "0"
