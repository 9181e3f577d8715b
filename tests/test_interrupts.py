"""Interrupts in the middle of a reduction: nothing is lost, counted twice, or sent out of step."""

from __future__ import annotations

import itertools
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from handlers_of_users import RMSHandler
from ranks import run_ranks, run_threads
from work import interrupted, lines_run, with_signal

from metricfold import Metric, MetricsAggregator, MissingRanksError
from metricfold._core.exchange import link
from metricfold._core.fold import custom
from metricfold._core.fold import names as naming
from metricfold._core.intake import aggregator, clock, held, inbox, keys, layers, reduction
from metricfold._core.intake import timers as timing
from metricfold._core.reduce.totals import Totals
from metricfold.communicator import Communicator


def attempt(call: Callable[[], object]) -> str:
    """Return what `call` raises, as text, or "ok"."""
    try:
        call()
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "ok"


def once(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, error: BaseException) -> None:
    """Let the next call of a method raise `error`."""
    real = getattr(owner, name)

    def raising(*args: Any, **options: Any) -> Any:
        monkeypatch.setattr(owner, name, real)
        raise error

    monkeypatch.setattr(owner, name, raising)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("can't start new thread")])
def test_what_was_cut_off_is_put_back_if_its_reduction_cannot_begin(
    monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    aggregator = MetricsAggregator()
    aggregator.record("n", 5, "sum")
    once(monkeypatch, threading.Thread, "start", error)
    with pytest.raises(type(error)):
        aggregator.reduce_async()
    # Until now it was lost.
    assert aggregator.get_metrics_for_logging("t") == {"t/n": 5.0}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), ValueError("a bug")])
@pytest.mark.parametrize("background", [False, True])
def test_a_reduction_of_one_rank_that_is_interrupted_is_as_if_it_had_not_begun(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, *, background: bool
) -> None:
    aggregator = MetricsAggregator()
    aggregator.record("n", 5, "sum")
    aggregator.reduce()
    aggregator.record("n", 7, "sum")
    aggregator.record("new", 1, "max")
    once(monkeypatch, Totals, "plus", error)
    with pytest.raises(type(error)):
        aggregator.reduce_async().result() if background else aggregator.reduce()
    aggregator.record("n", 1, "sum")
    snapshot = aggregator.reduce()
    assert snapshot.as_dict("t", "interval") == {"t/n": 8.0, "t/new": 1.0}
    assert snapshot.as_dict("t") == {"t/n": 13.0, "t/new": 1.0}


# -- At any line ---------------------------------------------------------------------------------

# Modules in which something is moved that an interrupt must not lose, or leave in two places.
TAKING = (aggregator, custom, held, inbox, keys, layers, naming)
CUTTING = (aggregator, clock, custom, held, inbox, layers, link, reduction, timing)


def begun() -> MetricsAggregator:
    """Return an aggregator of whose open interval each kind of metric has a value."""
    metrics = MetricsAggregator(5)
    metrics.register_handler("state", RMSHandler())
    for _ in range(2):
        metrics.record("n", 1, "sum")
        metrics.record("length", 1.0, "distribution")
        metrics.record("own", 3.0, "state")
        with metrics.timer("data"):
            pass
    return metrics


def found(metrics: MetricsAggregator) -> tuple[Any, ...]:
    """Return what an aggregator has come to, but for how long that took."""
    snapshot = metrics.reduce()
    report = snapshot._report
    (plan, _), lanes = report._planned, report._lanes("run")
    uses = plan.state(plan.places["", "data_seconds"], lanes).sums[-1]
    logged = snapshot.as_dict("t")
    return uses, {key: value for key, value in logged.items() if "/data_" not in key}


@pytest.mark.parametrize(
    "reduce",
    [
        MetricsAggregator.reduce,
        lambda metrics: metrics.reduce_async().result(),
    ],
    ids=["reduce", "reduce_async"],
)
def test_a_reduction_may_be_interrupted_at_any_line(reduce: Any) -> None:
    """A timer's uses were lost, and all that had been cut off a line before it was put down."""
    whole = found(begun())
    for line in range(lines_run(partial(reduce, begun()), *CUTTING)):
        metrics = begun()
        assert interrupted(partial(reduce, metrics), line, *CUTTING), line
        assert found(metrics) == whole, line


def mixed() -> list[Metric]:
    return [
        Metric("d", "sum", 1, "sum"),
        Metric("d", "new", 1.0, "mean"),
        Metric("e", "own", 2.0, "state"),
    ]


@pytest.mark.parametrize(
    "take",
    [
        lambda metrics: metrics.record("new", 1.0, "max"),
        lambda metrics: metrics.record_all({"n": 1, "new": 1.0}, "sum"),
        lambda metrics: metrics.update(mixed()),
    ],
    ids=["record", "record_all", "list"],
)
def test_of_a_call_that_is_interrupted_at_any_line_all_counts_or_nothing(take: Any) -> None:
    """Values of handlers without lanes counted without the others, of keys that nobody knew."""

    def new() -> MetricsAggregator:
        metrics = MetricsAggregator()
        metrics.register_handler("state", RMSHandler())
        metrics.record("n", 1, "sum")
        return metrics

    nothing, once, twice = new(), new(), new()
    for metrics in (once, twice, twice):
        take(metrics)
    nothing, once, twice = (m.get_metrics_for_logging("t") for m in (nothing, once, twice))
    for line in range(lines_run(partial(take, new()), *TAKING)):
        metrics, again = new(), new()
        for one in (metrics, again):
            assert interrupted(partial(take, one), line, *TAKING), line
        take(again)
        counted = metrics.get_metrics_for_logging("t")
        assert counted in (nothing, once), line
        assert again.get_metrics_for_logging("t") == (once if counted == nothing else twice), line


@pytest.mark.parametrize(
    "call",
    [
        MetricsAggregator.mark,
        MetricsAggregator.reduce,
        lambda metrics: attempt(lambda: metrics.reduce(step=-1)),
    ],
    ids=["mark", "reduce", "reduce that fails"],
)
def test_what_a_signals_handler_takes_in_in_the_midst_of_a_call_counts(
    monkeypatch: pytest.MonkeyPatch, call: Callable[[MetricsAggregator], object]
) -> None:
    """It was lost where the handler folded what had come, and the call went on from before that."""
    monkeypatch.setattr(inbox, "_MOST", 5)
    modules = (held, inbox, layers, reduction)

    def new() -> MetricsAggregator:
        metrics = MetricsAggregator()
        metrics.mark()
        for _ in range(8):
            metrics.record("n", 1, "sum")
        return metrics

    for place in itertools.count():
        metrics = new()

        def handle(metrics: MetricsAggregator = metrics) -> None:
            for _ in range(12):
                metrics.record("n", 1, "sum")

        if not with_signal(partial(call, metrics), place, handle, *modules):
            break
        assert metrics.reduce().value(None, "n", window="run") == 20.0, place
    assert place > 5


# -- In the middle of an exchange ----------------------------------------------------------------


def leaving(rank: int, route: str, *, new_key: bool) -> list[str]:
    aggregator = MetricsAggregator(timeout=4, route=route)
    aggregator.record("x", 1.0)
    aggregator.reduce()
    aggregator.record("x", 2.0)
    if new_key:
        aggregator.record("new", 1.0)
    if rank == 0:
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 0.2)
    else:
        time.sleep(0.6)
    return [
        attempt(aggregator.reduce),
        attempt(aggregator.state_dict),
        attempt(lambda: aggregator.state_dict(sync=False)),
    ]


@pytest.mark.parametrize("route", ["narrow", "wide"])
def test_a_rank_that_leaves_an_exchange_in_the_middle_aborts_no_other(route: str) -> None:
    # It went on out of step, which made gloo abort a process (SIGABRT).
    interrupted_rank, other = run_ranks(_interrupted_with_a_new_key, 2, route)
    assert interrupted_rank[0].startswith("KeyboardInterrupt")
    assert "this rank left a reduction in the middle (KeyboardInterrupt)" in interrupted_rank[1]
    assert "rank(s) 0 of 2; it left a reduction in the middle: KeyboardInterrupt" in other[0]
    assert other[1] == other[0]
    assert interrupted_rank[2] == other[2] == "ok"


def _interrupted_with_a_new_key(rank: int, route: str) -> list[str]:
    return leaving(rank, route, new_key=True)


def interrupted_while_waiting(rank: int) -> list[Any]:
    aggregator = MetricsAggregator(timeout=20)
    aggregator.record("x", 1, "sum")
    if rank == 1:
        time.sleep(1.0)
    future = aggregator.reduce_async()
    seen = []
    if rank == 0:
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        seen.append(attempt(future.result))
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        # This one waits for the one before.
        seen.append(attempt(aggregator.reduce))
    aggregator.record("x", 10, "sum")
    return [seen, aggregator.get_metrics_for_logging("t")]


def left_between(communicator: Communicator, route: str) -> Any:
    aggregator = MetricsAggregator(communicator=communicator, route=route)
    aggregator.record("x", 1.0, "sum")
    aggregator.reduce()
    saved = aggregator.state_dict(sync=False)
    aggregator.record(f"new of {communicator.rank}", 1.0)
    if communicator.rank == 1:

        def leave(*args: Any) -> Any:
            raise KeyboardInterrupt

        aggregator._held.run.reducer._packed_again = leave  # type: ignore[method-assign]
    with pytest.raises((MissingRanksError, KeyboardInterrupt)):
        aggregator.reduce()
    with pytest.raises(MissingRanksError):
        aggregator.reduce()
    assert aggregator.state_dict(sync=False) == saved
    again = MetricsAggregator()
    again.load_state_dict(saved)
    return again.get_metrics_for_logging("t")


@pytest.mark.parametrize("route", ["gather", "tree"])
def test_a_rank_that_leaves_once_new_keys_are_exchanged_leaves_no_trace_of_them(route: str) -> None:
    assert run_threads(left_between, 3, route, timeout=3) == [{"t/x": 3.0}] * 3


def test_an_interrupt_of_a_caller_that_merely_waits_costs_nothing() -> None:
    first, second = run_ranks(interrupted_while_waiting, 2)
    assert first == [["KeyboardInterrupt: ", "KeyboardInterrupt: "], {"t/x": 22.0}]
    assert second == [[], {"t/x": 22.0}]


def test_the_ranks_of_a_dry_run_on_the_fake_backend_are_not_waited_for() -> None:
    for store in ("FakeStore", "HashStore"):
        # It raised, or waited for ranks that do not exist.
        assert run_ranks(dry_run, 1, store) == [[{"t/loss": 1.0}, {"t/loss": 2.0}, 2]]


def dry_run(rank: int, kind: str) -> list[Any]:
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.destroy_process_group()
    store = FakeStore() if kind == "FakeStore" else dist.HashStore()
    dist.init_process_group("fake", rank=3, world_size=8, store=store)
    aggregator = MetricsAggregator(timeout=4)
    aggregator.record("loss", 1.0)
    first = aggregator.get_metrics_for_logging("t")
    aggregator.record("loss", 3.0)
    snapshot = aggregator.reduce_async().result()
    group = MetricsAggregator(process_group=dist.new_group([3, 4]))
    group.record("loss", 2.0)
    return [first, group.get_metrics_for_logging("t"), int(snapshot.as_dict("t")["t/loss"])]


def test_an_error_that_all_ranks_raise_alike_still_puts_no_rank_out_of_use() -> None:
    for seen in run_ranks(failing_alike, 2):
        assert seen == ["RuntimeError", {"t/x": 2.0}]


def failing_alike(rank: int) -> list[Any]:
    aggregator = MetricsAggregator(timeout=10)
    aggregator.record("x", 1, "sum")
    try:
        aggregator.reduce(step=rank)
    except MissingRanksError:
        return ["out of use"]
    except RuntimeError as error:
        return [type(error).__name__, aggregator.get_metrics_for_logging("t")]
    return ["no error"]
