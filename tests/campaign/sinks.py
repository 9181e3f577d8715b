"""Sinks that fail in every way, beside ones that do not: nothing accepted is lost, or it is counted.

Each trial gives a logger a sink that fails as the trial says, and a good one beside it. What the
failing one was given at last, in order and once, and what `close()` says is missing, must add up to
what was logged; the good one must have all.
"""

from __future__ import annotations

import os
import random
import re
import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from campaign.forks import Outcome, Say, World, side_by_side
from campaign.table import Goal, Options, Table, Trial, main
from metricfold import JSONLSink, MetricsLogger, read_jsonl
from metricfold.sinks import Record, RecordRefused

PATIENCE = 60.0


class Unknown(Exception):
    """What a package of its own raises, of which nobody knows what it means."""


class Sink:
    """Holds the steps that it was given; `fails` says what to raise for one, and when."""

    def __init__(self, fails: Callable[[int, float], BaseException | None]) -> None:
        self.steps: list[int] = []
        self._fails = fails
        self._began = time.monotonic()

    def write(self, record: Record) -> None:
        error = self._fails(record.step, time.monotonic() - self._began)
        if error is not None:
            raise error
        self.steps.append(record.step)

    def flush(self) -> None: ...

    def close(self) -> None: ...

    def rewind(self, step: int) -> None: ...

    def __repr__(self) -> str:
        return "Sink()"


Fails = Callable[[int, float], BaseException | None]


def away(error: BaseException, chance: random.Random) -> Fails:
    """Fail for a while."""
    begin = 0.3 * chance.random()
    end = begin + 0.1 + 1.2 * chance.random()
    return lambda step, now: error if begin <= now < end else None


def refusing(error: BaseException, chance: random.Random) -> Fails:
    """Fail for some records, for ever."""
    bad = {chance.randrange(200) for _ in range(chance.randint(1, 12))}
    return lambda step, now: error if step in bad else None


def once(error: BaseException, chance: random.Random) -> Fails:
    """Fail for some records, once each."""
    bad = {chance.randrange(200) for _ in range(chance.randint(1, 12))}

    def fails(step: int, now: float) -> BaseException | None:
        if step in bad:
            bad.discard(step)
            return error
        return None

    return fails


WAYS: dict[
    str, tuple[Callable[[BaseException, random.Random], Fails], Callable[[], BaseException], bool]
] = {
    "away, OSError": (away, lambda: ConnectionError("away"), True),
    "away, an unknown error": (away, lambda: Unknown("away"), True),
    "away, KeyboardInterrupt": (away, KeyboardInterrupt, True),
    "away, MemoryError": (away, MemoryError, True),
    "once, OSError": (once, lambda: TimeoutError("once"), True),
    "once, SystemExit": (once, lambda: SystemExit(1), True),
    "refusing, RecordRefused": (refusing, lambda: RecordRefused("no"), False),
    "refusing, ValueError": (refusing, lambda: ValueError("no"), False),
    "refusing, an unknown error": (refusing, lambda: Unknown("no"), False),
    "refusing, KeyError": (refusing, lambda: KeyError("no"), False),
}
"""How it fails, with what, and whether all must have been written in the end."""


def failing(name: str, trial: Trial) -> Iterator[Outcome]:
    """Log to a sink that fails, and one that does not, in a process of its own."""
    way, error, whole = WAYS[name]
    chance = trial.random
    count = 200
    pause = 0.004 * chance.random()

    def body(rank: int, say: Say) -> None:
        bad, good = Sink(way(error(), chance)), Sink(lambda step, now: None)
        logger = MetricsLogger([bad, good])
        for step in range(count):
            logger.log(step, {"x": 1.0})
            time.sleep(pause)
        logger.close()
        say(bad=bad.steps, good=good.steps)

    yield from judged(name, World(1, body), count, whole=whole)


def ended_badly(name: str, world: World, patience: float) -> Outcome | None:
    """Return what to say of a process that hung, failed or said nothing; None if it is to be judged."""
    hung = world.wait(patience)
    errors = world.errors(0)
    if hung:
        return Outcome(name, "hung", errors[-300:])
    if world.codes != [0] or not world.said(0):
        return Outcome(name, "wrong", f"it ended with {world.codes}: {errors[-400:]}")
    return None


def judged(
    name: str, world: World, count: int, *, whole: bool, patience: float = PATIENCE
) -> Iterator[Outcome]:
    failed = ended_badly(name, world, patience)
    if failed is not None:
        yield failed
    else:
        said, errors = world.said(0), world.errors(0)
        steps = said[-1]["bad"]
        told = said_missing(errors)
        if said[-1]["good"] != list(range(count)):
            yield Outcome(name, "lost", "the sink beside it has not got everything")
        elif len(steps) != len(set(steps)):
            yield Outcome(name, "wrong", f"written twice: {steps}")
        elif len(steps) + told != count:
            verdict = "lost" if len(steps) + told < count else "wrong"
            yield Outcome(name, verdict, f"{len(steps)} written, {told} said to be missing")
        elif whole and told:
            yield Outcome(name, "lost", f"{told} missing, though it came back")
        else:
            yield Outcome(name, "right")
    world.end()


def said_missing(errors: str) -> int:
    """Return how many records the tables say to be skipped or lost."""
    found = re.findall(r" written, (\d+) skipped, (\d+) lost", errors)
    return sum(int(skipped) + int(lost) for skipped, lost in found)


# -- Hangs, and full disks ---------------------------------------------------------------------------


def hanging(name: str, trial: Trial) -> Iterator[Outcome]:
    """A sink that never comes back: the others get everything, and the process ends."""
    chance = trial.random
    at, forever = chance.randrange(50), 1000.0

    def body(rank: int, say: Say) -> None:
        def hang(step: int, now: float) -> None:
            if step == at:
                time.sleep(forever)

        good = Sink(lambda step, now: None)
        logger = MetricsLogger([Sink(hang), good])
        for step in range(200):
            logger.log(step, {"x": 1.0})
        say(good=good.steps)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    world = World(1, body)
    hung = world.wait(PATIENCE)
    said = world.said(0)
    if hung:
        yield Outcome(name, "hung", world.errors(0)[-300:])
    elif world.codes != [-signal.SIGTERM] or not said:
        yield Outcome(name, "wrong", f"it ended with {world.codes}: {world.errors(0)[-300:]}")
    elif "has not answered" not in world.errors(0):
        yield Outcome(name, "wrong", f"nothing said: {world.errors(0)[-300:]}")
    else:
        yield Outcome(name, "right")
    world.end()


def full_disk(name: str, trial: Trial) -> Iterator[Outcome]:
    """A file that may not grow beyond a bound, for a while: whole lines only, and all in the end."""
    chance = trial.random
    bound = chance.randint(2000, 20000)
    comes_back = chance.random() < 0.7
    folder = Path(tempfile.mkdtemp(prefix="campaign"))
    count = 300

    def body(rank: int, say: Say) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (bound, most))
        logger = MetricsLogger([JSONLSink(folder / "x.jsonl")])
        for step in range(count):
            logger.log(step, {f"metric {n}": 1.0 for n in range(5)})
        time.sleep(0.3 * chance.random())
        if comes_back:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        logger.close()
        say(bad=[one.step for one in read_jsonl(folder / "x.jsonl")], good=list(range(count)))

    # What does not come back is lost, and counted.
    world = World(1, body)
    failed = ended_badly(name, world, PATIENCE)
    if failed is not None:
        yield failed
    else:
        said, errors = world.said(0), world.errors(0)
        steps = said[-1]["bad"]
        lost = said_missing(errors)
        if steps != list(range(len(steps))) or len(steps) + lost != count:
            yield Outcome(name, "wrong", f"{len(steps)} lines, {lost} said to be lost, of {count}")
        elif comes_back and lost:
            yield Outcome(name, "lost", f"{lost}, though there was room again")
        else:
            yield Outcome(name, "right" if comes_back else "documented")
    world.end()
    shutil.rmtree(folder)


def long_away(name: str, trial: Trial) -> Iterator[Outcome]:
    """Ten thousand logs beside a sink that is away for a minute."""
    count, seconds = (10_000, 60.0) if "60 s" in name else (1_000, 3.0)

    def body(rank: int, say: Say) -> None:
        began = time.monotonic()
        bad = Sink(lambda step, now: ConnectionError("away") if 0.5 < now < 0.5 + seconds else None)
        good = Sink(lambda step, now: None)
        logger = MetricsLogger([bad, good], queue_size=count)
        longest = 0.0
        for step in range(count):
            called = time.monotonic()
            logger.log(step, {"x": 1.0})
            longest = max(longest, time.monotonic() - called)
            time.sleep(max(0.0, began + (step + 1) * seconds / count - time.monotonic()))
        while time.monotonic() < began + seconds + 1.0:
            time.sleep(0.05)
        logger.close()
        say(longest=longest)
        say(bad=bad.steps, good=good.steps)

    yield from judged(name, World(1, body), count, whole=True, patience=seconds + PATIENCE)


def run(options: Options, table: Table) -> None:
    kinds: dict[str, tuple[Callable[[str, Trial], Iterator[Outcome]], int]] = {}
    if not options.quick:
        kinds["10,000 logs beside a sink that is away for 60 s"] = (long_away, 1)
    else:
        kinds["1,000 logs beside a sink that is away for 3 s"] = (long_away, 1)
    kinds |= {name: (failing, options.pick(12, 1)) for name in WAYS}
    kinds["hanging for ever"] = (hanging, options.pick(6, 1))
    kinds["a full disk"] = (full_disk, options.pick(20, 2))
    trials = [
        (name, Trial(number, random.Random(f"{options.seed}/{name}/{number}")))
        for name, (_, how_many) in kinds.items()
        for number in range(how_many)
    ]

    def one(name: str, trial: Trial) -> Iterator[Outcome]:
        return kinds[name][0](name, trial)

    side_by_side(options, table, trials, one, crews=4, patience=2 * PATIENCE)
    away = table.row(next(iter(kinds)))
    table.goals.append(Goal(f"runs of {away.name}, of which nothing was lost", away.right, 1))


if __name__ == "__main__":
    main(run, __doc__)
