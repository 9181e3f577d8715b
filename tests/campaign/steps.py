"""An interrupt, or a lack of memory, at every step of a call.

Signals strike by luck. Here a call is made once to see all the moments at which Python may raise
KeyboardInterrupt in it (a function begins, or one that was called returns), and then again and again,
each time with an error at one of them. What was recorded must count once, on all ranks, when the call
is made again; or all must hear that the rank is out of step, and what is left to save is whole. Ranks
are threads here; `campaign.ranks` interrupts processes.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

from handlers_of_users import MyTypes, RMSHandler

import metricfold
from campaign.forks import divided
from campaign.table import Options, Row, Table, Trial, main
from metricfold import JSONLSink, Metric, MetricsAggregator, MetricsLogger, read_jsonl
from metricfold.communicator import Communicator, LocalCommunicator, MissingRanksError
from metricfold.communicator.threads import thread_world

TIMEOUT = 2.0
PATIENCE = 20.0  # seconds until a call that has not ended hangs
ERRORS: dict[str, type[BaseException]] = {
    "interrupted": KeyboardInterrupt,
    "out of memory": MemoryError,
}

Moment = tuple[str, str, int, str]  # file, function, instruction, and what happens there
_OURS = str(Path(metricfold.__file__).parent)
_NOT_ASKED = ("__del__", "_finish_there")
"""What nobody hears of an error in, and with what a thread begins, where no signal is answered."""


class Struck:
    """Raises an error at one moment of a call; without one, finds all moments.

    Args:
        moment: when.
        error: what to raise.

    Attributes:
        moments: all that have been seen, in order, each once.
        there: whether it has come to `moment`.
    """

    def __init__(
        self, moment: Moment | None = None, error: type[BaseException] = Exception
    ) -> None:
        self.moments: dict[Moment, None] = {}
        self.there = False
        self._moment, self._error = moment, error

    def __call__(self, frame: FrameType, event: str, arg: Any) -> None:
        code = frame.f_code
        if event in {"c_call", "c_exception"} or code.co_name in _NOT_ASKED:
            return
        at = frame
        if not code.co_filename.startswith(_OURS):
            if frame.f_back is None or not frame.f_back.f_code.co_filename.startswith(_OURS):
                return
            at = frame.f_back  # what it has called from elsewhere
        moment = (at.f_code.co_filename[len(_OURS) :], at.f_code.co_name, at.f_lasti, event)
        if self._moment is None:
            self.moments[moment] = None
        elif moment == self._moment:
            sys.setprofile(None)
            self.there = True
            raise self._error

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        sys.setprofile(self)
        try:
            yield
        finally:
            sys.setprofile(None)


# -- Reductions ----------------------------------------------------------------------------------


def value_of(rank: int, step: int) -> int:
    return 1 + 5 * rank + 3 * step


def record(aggregator: MetricsAggregator, rank: int, step: int) -> None:
    value = value_of(rank, step)
    aggregator.record("n", value, "sum")
    aggregator.record("loss", value, weight=rank + 1)
    aggregator.record("len", value, "distribution")
    aggregator.record("kind", "ab"[value % 2], "categorical_count")
    aggregator.record(f"new {step}", value, "sum")  # which the ranks must agree on first
    aggregator.update([Metric("d", "rms", value, MyTypes.RMS)])


def expected(world_size: int, steps: int, since: int = 0) -> dict[str, float]:
    """Return what so many ranks come to in the steps from `since` on, without `steps` itself."""
    if since == steps:
        return {}
    values = [value_of(rank, step) for rank in range(world_size) for step in range(since, steps)]
    weights = [rank + 1 for rank in range(world_size) for step in range(since, steps)]
    return {
        "t/n": float(sum(values)),
        "t/loss": sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights),
        "t/len_stat_count": float(len(values)),
        "t/len_stat_mean": sum(values) / len(values),
        "t_d/rms": (sum(v * v for v in values) / len(values)) ** 0.5,
        **{
            f"t/new {step}": float(sum(value_of(rank, step) for rank in range(world_size)))
            for step in range(since, steps)
        },
    }


def differing(got: dict[str, float], wanted: dict[str, float]) -> str:
    for key, value in wanted.items():
        if abs(got.get(key, float("inf")) - value) > 1e-9 * abs(value):
            return f"{key} is {got.get(key)}, not {value}"
    return ""


def new_aggregator(communicator: Communicator, route: str) -> MetricsAggregator:
    aggregator = MetricsAggregator(communicator=communicator, route=route)
    aggregator.register_handler(MyTypes.RMS, RMSHandler())
    return aggregator


WAYS: dict[str, Callable[[MetricsAggregator, int], Any]] = {
    "reduce()": lambda aggregator, step: aggregator.reduce(step),
    "reduce_async()": lambda aggregator, step: aggregator.reduce_async(step).result(),
    "state_dict()": lambda aggregator, step: aggregator.state_dict(),
}
MOST = 400  # moments of a call that are tried
STEPS = 3
STRUCK = 1  # in which step


def life(
    communicator: Communicator, route: str, way: str, struck: Struck | None, *, in_worker: bool
) -> str:
    """Reduce in each step, again as long as an error says that nothing was; returns what is wrong."""
    rank, world_size = communicator.rank, communicator.world_size
    aggregator = new_aggregator(communicator, route)
    hurt = False
    for step in range(STEPS):
        record(aggregator, rank, step)
        call = functools.partial(WAYS[way if step == STRUCK else "reduce()"], aggregator, step)
        for attempt in itertools.count():
            strikes = struck is not None and step == STRUCK and not attempt
            try:
                if strikes and in_worker:
                    result = _with_worker(aggregator, struck, call)
                else:
                    with struck.watching() if strikes else contextlib.nullcontext():
                        result = call()
            except MissingRanksError:
                return _after_the_end(aggregator, step, world_size)
            except (RuntimeError, KeyboardInterrupt, MemoryError) as error:
                if attempt > 3:
                    return f"rank {rank} cannot go on in step {step}: {error!r}"
                if hurt and "different" in str(error):
                    break  # the call had come to its end
                hurt = hurt or (strikes and not isinstance(error, RuntimeError))
                continue
            else:
                wrong = "" if hurt else misjudged(result, world_size, step, way)
                if wrong or step == STEPS - 1:
                    return wrong
            break
    return f"rank {rank} has never come to the end"


def misjudged(result: Any, world_size: int, step: int, way: str) -> str:
    """Return what is wrong with what a call returned."""
    if isinstance(result, dict):
        return ""
    # A save leaves the interval open.
    since = STRUCK if way == "state_dict()" and step > STRUCK else step
    interval = result.as_dict("t", "interval")
    return differing(result.as_dict("t", "run"), expected(world_size, step + 1)) or differing(
        interval, expected(world_size, step + 1, since)
    )


def _with_worker(aggregator: MetricsAggregator, struck: Struck, call: Callable[[], Any]) -> Any:
    """Let `struck` watch the aggregator's own thread, from when it takes up the next task."""
    link = aggregator._link
    real = link._finish_there

    def finish_there(*task: Any) -> Any:
        with struck.watching():
            return real(*task)

    link._finish_there = finish_there  # type: ignore[method-assign]
    try:
        return call()
    finally:
        link._finish_there = real  # type: ignore[method-assign]


def _after_the_end(aggregator: MetricsAggregator, step: int, world_size: int) -> str:
    """What is left to save is the state as of a whole reduction; whom threads name means nothing."""
    alone = new_aggregator(LocalCommunicator(), "narrow")
    alone.load_state_dict(aggregator.state_dict(sync=False))
    got = alone.reduce().as_dict("t", "run")
    wrongs = [differing(got, expected(world_size, steps)) for steps in (step, step + 1)]
    return "" if not all(wrongs) else f"a state after step {step} of {wrongs}"


def ranks(
    world_size: int, route: str, way: str, struck: Struck | None, *, in_worker: bool = False
) -> str:
    """Live with so many ranks, the last of which is struck."""
    communicators: list[Communicator] = [*thread_world(world_size, TIMEOUT)]
    if world_size == 1:
        communicators = [LocalCommunicator()]
    with ThreadPoolExecutor(world_size) as pool:
        futures = [
            pool.submit(
                life,
                communicator,
                route,
                way,
                struck if communicator.rank == world_size - 1 else None,
                in_worker=in_worker,
            )
            for communicator in communicators
        ]
        return "; ".join(filter(None, (future.result(PATIENCE) for future in futures)))


# -- What one rank does alone --------------------------------------------------------------------


def recording(struck: Struck) -> str:
    """Interrupt a record, and an update: each value counts once, or not at all."""
    aggregator = new_aggregator(LocalCommunicator(), "narrow")
    record(aggregator, 0, 0)
    with struck.watching(), contextlib.suppress(KeyboardInterrupt, MemoryError):
        record(aggregator, 0, 1)
    record(aggregator, 0, 2)
    got = aggregator.reduce().as_dict("t", "run")
    first, middle, last = (value_of(0, step) for step in range(3))
    if got["t/n"] not in (first + last, first + middle + last):
        return f"n is {got['t/n']}"
    if got["t/len_stat_count"] not in (2.0, 3.0):
        return f"{got['t/len_stat_count']} values"
    if got["t/new 2"] != last or got.get("t/new 1") not in (None, 0.0, float(middle)):
        return f"{got}"
    counts = sum(got.get(f"t/kind_count_{kind}", 0.0) for kind in "ab")
    squares = 3 * got["t_d/rms"] ** 2, 2 * got["t_d/rms"] ** 2
    wanted = first**2 + middle**2 + last**2, first**2 + last**2
    if counts not in (2.0, 3.0):
        return f"{counts} categories"
    if not any(abs(one - other) < 1e-6 for one, other in zip(squares, wanted, strict=True)):
        return f"rms is {got['t_d/rms']}"
    return ""


def loading(struck: Struck) -> str:
    """Interrupt the loading of a state: it has been loaded, or nothing has changed."""
    saved = new_aggregator(LocalCommunicator(), "narrow")
    record(saved, 0, 0)
    record(saved, 0, 1)
    state = saved.state_dict()
    aggregator = new_aggregator(LocalCommunicator(), "narrow")
    record(aggregator, 0, 0)
    aggregator.reduce()
    # A handler that has no memory to finalise in cannot say more than that it failed: ValueError.
    with struck.watching(), contextlib.suppress(KeyboardInterrupt, MemoryError, ValueError):
        aggregator.load_state_dict(state)
    wrongs = [""]
    try:
        got = aggregator.reduce().as_dict("t", "run")
    except RuntimeError as error:
        if "holds parts of two states" not in str(error):
            raise
    else:
        wrongs = [differing(got, expected(1, steps)) for steps in (1, 2)]
    aggregator.load_state_dict(state)
    wrong = differing(aggregator.reduce().as_dict("t", "run"), expected(1, 2))
    return wrong or ("" if not all(wrongs) else f"{wrongs}")


def logging_to_a_file(struck: Struck, call: str) -> str:
    """Interrupt log(), flush(), rewind() or close(): what was accepted is in the file, once."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.jsonl")
        aggregator = new_aggregator(LocalCommunicator(), "narrow")
        logger = MetricsLogger([JSONLSink(path)])
        accepted, maybe = [], []
        for step in range(4):
            record(aggregator, 0, step)
            watching = step == 2 and call == "log()"
            try:
                with struck.watching() if watching else contextlib.nullcontext():
                    logger.log(step, aggregator, prefix="t")
            except (KeyboardInterrupt, MemoryError, RuntimeError):
                maybe += [
                    step,
                    step - 1,
                ]  # a log raises what the reduction of the one before has raised
            else:
                accepted.append(step)
        calls = {"flush()": logger.flush, "close()": logger.close}
        calls["rewind()"] = lambda: logger.rewind(3)
        if call in calls:
            with struck.watching(), contextlib.suppress(KeyboardInterrupt, MemoryError):
                calls[call]()
        began = time.monotonic()
        # Again, or at last; it raises what the newest reduction has raised, which was told.
        with contextlib.suppress(RuntimeError):
            logger.close()
        if time.monotonic() - began > PATIENCE:
            raise TimeoutError("close() has waited")
        steps = [one.step for one in read_jsonl(path)] if path.exists() else []
        if sorted({*steps} | {*maybe}) != sorted({*accepted} | {*maybe}):
            return f"steps {steps}, of {accepted}, and perhaps {maybe}"
        return "" if len(set(steps)) == len(steps) else f"twice: {steps}"


CALLS: dict[str, Callable[[Struck], str]] = {
    "reduce() of one rank": lambda struck: ranks(1, "narrow", "reduce()", struck),
    "reduce()": lambda struck: ranks(2, "narrow", "reduce()", struck),
    "reduce() of three, wide": lambda struck: ranks(3, "wide", "reduce()", struck),
    "state_dict()": lambda struck: ranks(2, "narrow", "state_dict()", struck),
    "state_dict(), wide": lambda struck: ranks(2, "wide", "state_dict()", struck),
    "reduce_async(), in the caller": lambda struck: ranks(2, "narrow", "reduce_async()", struck),
    "reduce_async(), in its thread": lambda struck: ranks(
        2, "narrow", "reduce_async()", struck, in_worker=True
    ),
    "record() and update()": recording,
    "load_state_dict()": loading,
    **{
        f"logger.{call}": lambda struck, call=call: logging_to_a_file(struck, call)
        for call in ("log()", "flush()", "rewind()", "close()")
    },
}


def strike(row: Row, trial: Trial, call: Callable[[Struck], str], struck: Struck) -> None:
    """Make a call that is struck, and count what comes of it."""
    try:
        wrong = call(struck)
    except TimeoutError as error:
        row.has_hung(f"{struck._moment}: {error!r}", trial)
    except BaseException as error:
        row.went_wrong(f"{struck._moment}: {type(error).__name__}: {error}"[:400], trial)
    else:
        if wrong:
            row.went_wrong(f"{struck._moment}: {wrong}"[:400], trial)
        elif not struck.there:
            row.was_not_judged(f"{struck._moment} has not come again", trial)
        else:
            row.went_right()


def attacked(options: Options, table: Table) -> None:
    """Try this process's share."""
    for name, call in CALLS.items():
        found = Struck()
        if (wrong := call(found)) != "":
            raise AssertionError(f"{name}, with no fault: {wrong}")
        moments = list(found.moments)
        for which, error in ERRORS.items():
            row = table.row(f"{name}, {which}")
            count = min(len(moments), options.pick(MOST, 4))
            for trial in options.trials(row, full=count, quick=count, least=count):
                # Evenly over all of them, and others with another seed.
                place = (trial.number * len(moments) // count + options.seed) % len(moments)
                strike(row, trial, call, Struck(moments[place], error))
            row.figures = f"of {len(moments)} moments"


def run(options: Options, table: Table) -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("metricfold").setLevel(logging.CRITICAL)
    logging.disable()
    divided(options, table, attacked, patience=60.0)


if __name__ == "__main__":
    main(run, __doc__)
