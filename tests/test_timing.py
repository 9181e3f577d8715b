"""Timers tell how long things take, as a share of the time, and on which rank."""

from __future__ import annotations

import asyncio
import contextvars
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
from handlers_of_users import RMSHandler
from ranks import run_ranks, run_threads

from metricfold import MeanAggHandler, MetricsAggregator, Snapshot
from metricfold._core.view.timing import Timing

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
    assert aggregator._held.timers._elapsed["thread"].taken.uses == 800
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
    assert aggregator._held.timers._elapsed["data"].taken.uses == 3
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


def spanning(communicator: Any, route: str) -> list[Any]:
    """A block that spans three logs, and ends in the fourth interval."""
    aggregator = MetricsAggregator(communicator=communicator, route=route)
    found: list[Any] = []
    with aggregator.timer("epoch"):
        for _ in range(3):
            time.sleep(SLOW / 4)
            snapshot = aggregator.reduce()
            timing = snapshot.timing("epoch")
            found.append((snapshot.as_dict("t", "interval").keys(), timing.mean, timing.max_rank))
            assert 0 < timing.share <= 1
    time.sleep(SLOW)
    last = aggregator.reduce()
    timing = last.timing("epoch")
    assert timing.mean is not None
    assert timing.max is not None
    assert 3 * SLOW / 4 <= timing.mean <= timing.max
    assert timing.share < 1
    assert last.as_dict("t", "run")["t/epoch_share"] < 1
    return found


@pytest.mark.parametrize("route", ["narrow", "wide"])
def test_the_share_is_cut_at_a_log_where_a_block_used_to_count_for_the_interval_it_ended_in(
    route: str,
) -> None:
    one, two = run_threads(spanning, 2, route)
    assert one == two == [({"t/epoch_share": 0}.keys(), None, None)] * 3


def test_a_block_that_goes_on_has_all_of_each_interval() -> None:
    aggregator = MetricsAggregator()
    with aggregator.timer("epoch"):
        for _ in range(2):
            assert aggregator.reduce().timing("epoch").share == pytest.approx(1.0, abs=1e-6)


def share_and_uses(aggregator: MetricsAggregator, name: str) -> tuple[float, int, float]:
    """Return the share of an interval that is all one timer, its uses, and the longest."""
    uses = aggregator._held.timers._elapsed[name].taken.uses
    timing = aggregator.reduce().timing(name)
    assert timing.max is not None
    return timing.share, uses, timing.max


def test_a_timer_nested_in_itself_counts_once_for_each_thread() -> None:
    aggregator = MetricsAggregator()
    with aggregator.timer("step"), aggregator.timer("other"), aggregator.timer("step"):
        time.sleep(SLOW)
    share, uses, longest = share_and_uses(aggregator, "step")
    assert uses == 1
    assert share <= 1
    assert longest >= SLOW
    again = aggregator.timer("step")
    with again, again:
        time.sleep(SLOW / 4)
    share, uses, _ = share_and_uses(aggregator, "step")
    assert (uses, share <= 1) == (1, True)

    def work() -> None:
        with aggregator.timer("step"):
            time.sleep(SLOW)

    with aggregator.timer("step"):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    share, uses, _ = share_and_uses(aggregator, "step")
    assert uses == 2
    assert share > 1


def test_tasks_of_one_thread_have_uses_of_their_own() -> None:
    aggregator = MetricsAggregator()

    async def fetch(seconds: float) -> None:
        with aggregator.timer("fetch"):
            await asyncio.sleep(seconds)

    @aggregator.timer("call")
    async def call() -> str:
        await asyncio.sleep(SLOW)
        return "result"

    async def main() -> str:
        await asyncio.gather(fetch(SLOW), fetch(2 * SLOW))
        return await call()

    assert asyncio.run(main()) == "result"
    assert aggregator._held.timers._elapsed["fetch"].taken.uses == 2
    assert aggregator._held.timers._elapsed["fetch"].taken.total >= 3 * SLOW
    # Calling a coroutine function takes no time; awaiting it does.
    assert aggregator._held.timers._elapsed["call"].taken.total >= SLOW


def test_a_use_may_end_elsewhere_as_that_of_a_generator_does() -> None:
    aggregator = MetricsAggregator()

    def items() -> Any:
        with aggregator.timer("items"):
            yield 1
            yield 2

    left = items()
    next(left)
    with aggregator.timer("step"):
        pass
    contextvars.copy_context().run(left.close)
    assert (
        aggregator._held.timers._elapsed["items"].taken.uses,
        aggregator._held.timers._elapsed["step"].taken.uses,
    ) == (
        1,
        1,
    )
    # Nothing of the generator's stays around what comes later.
    with aggregator.timer("items"):
        pass
    assert aggregator._held.timers._elapsed["items"].taken.uses == 2
    with pytest.raises(TypeError, match=r"a timer cannot decorate .*items'.*over"):
        aggregator.timer("items")(items)


def test_items_that_are_not_taken_are_not_timed_and_a_loader_that_fails_is() -> None:
    aggregator = MetricsAggregator()

    def loader() -> Any:
        yield 1
        yield 2
        raise ZeroDivisionError

    for _ in aggregator.timer("data").over(loader()):
        break
    assert aggregator._held.timers._elapsed["data"].taken.uses == 1
    with pytest.raises(ZeroDivisionError):
        list(aggregator.timer("data").over(loader()))
    assert aggregator._held.timers._elapsed["data"].taken.uses == 4
    for _ in aggregator.timer("data").over([]):
        pass
    assert aggregator._held.timers._elapsed["data"].taken.uses == 4
    assert not aggregator._held.timers._elapsed["data"].running


def test_a_pause_is_left_out_of_the_share_of_a_timer_that_goes_on() -> None:
    aggregator = MetricsAggregator()
    with aggregator.timer("epoch"):
        time.sleep(SLOW / 4)
        with aggregator.pause():
            time.sleep(SLOW)
            snapshot = aggregator.reduce()
            assert snapshot.timing("epoch").share == pytest.approx(1.0, abs=1e-6)
            with aggregator.timer("save"):
                pass
            timing = aggregator.reduce().timing("save")
            assert (timing.share, timing.slowest_share) == (0.0, 0.0)  # of an interval without time
        time.sleep(SLOW / 4)
    snapshot = aggregator.reduce()
    assert snapshot.timing("epoch").share <= 1
    mean = snapshot.timing("epoch").mean
    assert mean is not None
    assert mean >= 1.5 * SLOW  # how long it took is another thing


def test_a_checkpoint_in_the_midst_of_a_block_has_the_part_that_has_gone_by() -> None:
    aggregator = MetricsAggregator()
    with aggregator.timer("epoch"):
        time.sleep(SLOW / 4)
        state = aggregator.state_dict()
        resumed = MetricsAggregator()
        resumed.load_state_dict(state)
        timing = resumed.reduce().timing("epoch")
        assert (timing.mean, timing.max, timing.max_rank) == (None, None, None)
        assert timing.share == pytest.approx(1.0, abs=1e-6)
    timing = aggregator.reduce().timing("epoch")  # the interval stayed open
    assert timing.mean is not None
    assert timing.mean >= SLOW / 4
    assert 0.5 < timing.share <= 1


def test_a_block_in_which_a_state_is_loaded_counts_when_it_ends() -> None:
    aggregator = MetricsAggregator()
    state = aggregator.state_dict()
    with aggregator.timer("set_up"):
        time.sleep(SLOW / 4)
        aggregator.load_state_dict(state)
        time.sleep(SLOW / 4)
    timing = aggregator.reduce().timing("set_up")
    assert timing.mean is not None
    assert timing.mean >= SLOW / 2
    assert timing.share == 0  # time counts from the first value on that comes in after a load
