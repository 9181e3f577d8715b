"""Signals at random moments, while several threads log: a process ends as without a logger.

What `log()` had returned from must be in the files, of a quick sink and of a slow one; the process must
end with the code that it has without a logger; and in a collective of the training, where Python
hears of no signal, it must die about as soon as without one.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from campaign.forks import Outcome, Say, World, after, own_store, side_by_side
from campaign.table import Goal, Options, Table, Trial, main
from metricfold import JSONLSink, MetricsAggregator, MetricsLogger, read_jsonl
from metricfold.sinks import Record

PATIENCE = 40.0  # seconds until a process that has not ended hangs
SLOW = (0.0, 0.0, 0.0, 0.001, 0.02)  # seconds of a write, drawn for each


class SlowSink(JSONLSink):
    """Takes its time for some records."""

    def __init__(self, path: Path, chance: random.Random) -> None:
        super().__init__(path)
        self._chance = chance

    def write(self, record: Record) -> None:
        time.sleep(self._chance.choice(SLOW))
        super().write(record)


def sinks(folder: Path, chance: random.Random) -> list[JSONLSink]:
    return [JSONLSink(folder / "quick.jsonl"), SlowSink(folder / "slow.jsonl", chance)]


# -- One process, whose threads log ------------------------------------------------------------------


def in_python() -> None:
    while True:
        sum(range(1000))


def asleep() -> None:
    time.sleep(100)


def in_numpy() -> None:
    numbers = np.random.default_rng(0).random(200_000)
    while True:
        np.sort(numbers)


def in_a_lock() -> None:
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def in_c() -> None:
    c, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(256)
    c.pthread_mutex_init(mutex, None)
    c.pthread_mutex_lock(mutex)
    c.pthread_mutex_lock(mutex)


WAITS: dict[str, Callable[[], None]] = {
    "logging": in_python,  # never comes to that, for it logs for ever
    "in Python": in_python,
    "asleep": asleep,
    "in NumPy": in_numpy,
    "in a lock": in_a_lock,
    "in C": in_c,
}


def threads(trial: Trial) -> Iterator[Outcome]:
    """Let threads log, send a signal, and look what has been written."""
    chance = trial.random
    waiting = chance.choice(list(WAITS))
    signals = [signal.SIGTERM, signal.SIGHUP]
    if waiting != "in C":  # a KeyboardInterrupt never reaches it, with or without us
        signals.append(signal.SIGINT)
    signum = chance.choice(signals)
    handled = waiting != "in C" and signum != signal.SIGINT and chance.random() < 0.25
    from_within = chance.random() < 0.3
    at = 0.02 + 0.5 * chance.random()
    loggers = chance.randint(1, 3)
    logged = chance.random() < 0.9

    folder = Path(tempfile.mkdtemp(prefix="campaign"))

    def body(rank: int, say: Say) -> None:
        if handled:
            signal.signal(signum, lambda *_: sys.exit(3))
        logger = MetricsLogger(sinks(folder, chance)) if logged else None

        def log(who: int) -> None:
            own = random.Random(f"{trial.number}/{who}")
            for step in itertools.count():
                if logger:
                    logger.log(step, {"x": 1.0}, prefix=f"p{who}")
                    say(prefix=f"p{who}", step=step)
                time.sleep(own.random() * 0.03)

        for who in range(loggers):
            threading.Thread(target=log, args=(who,), daemon=True).start()
        say(ready=True)
        if from_within:
            after(at, lambda: os.kill(os.getpid(), signum))
        if waiting == "logging":
            log(99)
        WAITS[waiting]()

    world = World(1, body)
    wait_until_ready(world)
    if not from_within:
        time.sleep(at)
        os.kill(world.pids[0], signum)
    hung, took = ending(world)
    row = f"{signum.name}, main thread {waiting}"
    if not logged:
        row += ", without a logger"
    end = 3 if handled else -signum
    if hung:
        yield Outcome(row, "hung", f"{world.said(0)[-1:]}")
    elif world.codes != [end]:
        yield Outcome(
            row, "wrong", f"it ended with {world.codes}, not {end}: {world.errors(0)[-300:]}"
        )
    else:
        accepted = {(line["prefix"], line["step"]) for line in world.said(0) if "step" in line}
        yield Outcome(row, *missing(folder, accepted), took)
    world.end()
    shutil.rmtree(folder)


# -- Ranks, in a collective of the training ----------------------------------------------------------


def collective(name: str, trial: Trial) -> Iterator[Outcome]:
    """End two ranks by SIGTERM, as a launcher does, while one waits for the other."""
    chance = trial.random
    logged = name == WITH
    folder = Path(tempfile.mkdtemp(prefix="campaign"))
    at = 0.05 + 0.6 * chance.random()
    port = own_store()

    def body(rank: int, say: Say) -> None:
        own = random.Random(f"{trial.number}/{rank}")
        store = dist.TCPStore("127.0.0.1", port, None, False, timedelta(seconds=30), False)
        store = dist.PrefixStore(f"{os.getppid()}/{name}/{trial.number}", store)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60)
        )
        aggregator = MetricsAggregator(timeout=30.0)
        logger = MetricsLogger(sinks(folder, own)) if logged else None
        numbers = torch.ones(1000)
        for step in itertools.count():
            if logger:
                aggregator.record("loss", 1.0)
                logger.log(step, aggregator, prefix="train")
                say(prefix="train", step=step)
                logger.log(step, {"x": 1.0}, prefix="mine")
                say(prefix="mine", step=step)
            dist.all_reduce(numbers)
            say(ready=True)
            if own.random() < 0.1:
                time.sleep(own.random() * 0.5)  # the other one waits in all_reduce

    world = World(2, body)
    wait_until_ready(world)
    time.sleep(at)
    for pid in world.pids:
        os.kill(pid, signal.SIGTERM)
    hung, took = ending(world)
    if hung:
        yield Outcome(name, "hung", f"ranks {hung}")
    elif world.codes != [-signal.SIGTERM] * 2:
        yield Outcome(name, "wrong", f"they ended with {world.codes}: {world.errors(0)[-300:]}")
    else:
        accepted = {(line["prefix"], line["step"]) for line in world.said(0) if "step" in line}
        yield Outcome(name, *missing(folder, accepted), took)
    world.end()
    shutil.rmtree(folder)


WITH, WITHOUT = "SIGTERM in a collective", "SIGTERM in a collective, without a logger"


# -- What both share ---------------------------------------------------------------------------------


def wait_until_ready(world: World) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and None in world.codes:
        if all(any("ready" in line for line in world.said(n)) for n in range(len(world.pids))):
            return
        world.wait(0.01)


def ending(world: World) -> tuple[list[int], float]:
    """Wait for the end; returns who has not come to it, and the seconds that it took."""
    sent = time.monotonic()
    return world.wait(PATIENCE), time.monotonic() - sent


def missing(folder: Path, accepted: set[tuple[str, int]]) -> tuple[str, str]:
    """Return the verdict about what was accepted and is not in the files.

    The newest reduction may be one that the other rank, which dies as well, has not joined.
    """
    gone: set[tuple[str, int]] = set()
    for name in ("quick", "slow"):
        path = folder / f"{name}.jsonl"
        there = {(one.prefix, one.step) for one in read_jsonl(path)} if path.exists() else set()
        gone |= accepted - there
    newest = max((step for prefix, step in accepted if prefix == "train"), default=-1)
    if gone - {("train", newest)}:
        return "lost", f"{sorted(gone)} of {len(accepted)}"
    return ("documented" if gone else "right"), ""


def summed_up(outcomes: list[Outcome]) -> str:
    times = sorted(outcome.figure for outcome in outcomes if outcome.figure)
    if not times:
        return ""
    return (
        f"{times[len(times) // 2]:.2f} s (median), "
        f"{times[int(0.95 * len(times))]:.2f} s (95 %), {times[-1]:.2f} s (longest)"
    )


def run(options: Options, table: Table) -> None:
    counts = {
        "threads": options.pick(full=280, quick=10),
        WITH: options.pick(full=200, quick=4),
        WITHOUT: options.pick(full=200, quick=2),
    }
    # Each kind from the first trials on, if time is short.
    trials = sorted(
        (
            (name, Trial(number, random.Random(f"{options.seed}/{name}/{number}")))
            for name, how_many in counts.items()
            for number in range(how_many)
        ),
        key=lambda one: one[1].number / counts[one[0]],
    )

    def one(name: str, trial: Trial) -> Iterator[Outcome]:
        return threads(trial) if name == "threads" else collective(name, trial)

    found = side_by_side(
        options, table, trials, one, crews=4, patience=2 * PATIENCE, least=len(trials)
    )
    for row in table.rows:
        row.figures = summed_up([outcome for outcome in found if outcome.row == row.name])
    pairs = [table.row(WITH), table.row(WITHOUT)]
    table.figures += [f"{row.name}, until both ranks are dead: {row.figures}" for row in pairs]
    table.goals.append(Goal("processes that got a signal", len(found), 400))
    table.goals += [Goal(f"pairs of ranks: {row.name}", row.judged(), 200) for row in pairs]


if __name__ == "__main__":
    main(run, __doc__)
