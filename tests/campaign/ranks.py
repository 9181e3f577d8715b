"""Ranks that are killed, stopped, slow, absent, that raise or are interrupted, wherever they are.

Each trial is a training of several lives over gloo: each life but the last has a fault on one rank,
and the next one goes on, on another number of ranks, from the last checkpoint. After a fault, every
other rank must go on with the right numbers, or get an error that names nobody but the faulty rank,
within the timeout and 5 s; and in the end every total must be what plain Python makes of it: each
value counted once.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from handlers_of_users import FailingRMS, MyTypes, RMSHandler

from campaign.forks import Outcome, Say, World, after, own_store, say_starved, side_by_side
from campaign.table import Goal, Options, Table, Trial, main
from metricfold import (
    JSONLSink,
    Metric,
    MetricsAggregator,
    MetricsLogger,
    MissingRanksError,
    read_jsonl,
)
from metricfold.communicator import Communicator
from metricfold.communicator.store import StoreClient

TIMEOUT = 3.0
PROMISED = TIMEOUT + 5.0
ENDING = 40.0  # seconds that a process may take to end after that

MOMENTS = {
    "killed": ("before", "between", "in", "save", "close"),
    "stopped": ("before", "between", "in", "save", "close"),
    "absent": ("before", "between", "save"),
    "leaving": ("before", "save"),
    "slow": ("before", "between", "save"),
    "raising": ("between", "save"),
    "interrupted and ending": ("any",),
    "interrupted and going on": ("any",),
}
"""What happens to a rank, and when: before its call, between two collectives of it, in one, in
state_dict(), in close(), at any moment of the call."""
MORTAL = ("killed", "stopped", "absent", "leaving", "interrupted and ending")
ERRORS = ("in a handler", "in a value on a device", "in derive")  # on one rank, told to all


# -- The training, and what plain Python makes of it -------------------------------------------------


@dataclass(frozen=True, slots=True)
class Life:
    """One life of a training: the same ranks from its first step to its last.

    Args:
        number: counts the lives of a training.
        world_size: how many ranks.
        first: its first step.
        last: the step after its last one.
    """

    number: int
    world_size: int
    first: int
    last: int


def value_of(life: int, rank: int, step: int) -> int:
    return 1 + (31 * life + 17 * rank + 7 * step) % 13


def expected(lives: list[Life], until: int | None = None) -> dict[str, float]:
    """Return the totals of some lives, up to and without the step `until` of the last."""
    totals: Counter[str] = Counter()
    highest, weighted, weights, squares = 0.0, 0.0, 0.0, 0.0
    count = 0
    for life in lives:
        last = life.last if until is None or life is not lives[-1] else until
        for step in range(life.first, last):
            for rank in range(life.world_size):
                value = value_of(life.number, rank, step)
                totals["t/n"] += value
                totals[f"t_d{rank % 2}/of"] += value
                totals[f"t/kind_count_{value % 3}"] += 1
                if (rank + step) % 2 == 0:
                    totals[f"t/new_{step}_{rank}"] += value
                highest = max(highest, value)
                weighted += value * (rank + 1)
                weights += rank + 1
                squares += value**2
                count += 1
    if not count:
        return {}
    return {
        **totals,
        "t/top": highest,
        "t/loss": weighted / weights,
        "t/len_stat_count": float(count),
    }


def record(aggregator: MetricsAggregator, life: Life, rank: int, step: int) -> None:
    value = value_of(life.number, rank, step)
    aggregator.record("n", value, "sum")
    aggregator.update([Metric(f"d{rank % 2}", "of", value, "sum")])
    aggregator.record("kind", str(value % 3), "categorical_count")
    if (rank + step) % 2 == 0:  # of which the ranks must agree first, in nearly every step
        aggregator.record(f"new_{step}_{rank}", value, "sum")
    aggregator.record("top", torch.tensor(float(value)), "max")
    aggregator.record("loss", value, weight=rank + 1)
    aggregator.record("len", value, "distribution")
    aggregator.update([Metric("d", "rms", value, MyTypes.RMS)])


def differing(got: dict[str, float], wanted: dict[str, float]) -> str:
    """Return what is wrong in `got`, or nothing."""
    for key, value in wanted.items():
        found = got.get(key)
        if found is None or abs(found - value) > 1e-9 * abs(value):
            return f"{key} is {found}, not {value}"
    return ""


# -- Faults --------------------------------------------------------------------------------------


@dataclass(slots=True)
class Fault:
    """What happens to one rank.

    Args:
        what: a key of `MOMENTS`.
        moment: one of its moments.
        rank: to whom.
        step: in which step.
        at: which collective of the call, where it is between or in them.
        delay: seconds after that.
    """

    what: str
    moment: str
    rank: int
    step: int
    at: int
    delay: float
    armed: bool = False
    seen: int = 0  # collectives of the call so far

    @property
    def row(self) -> str:
        where = {
            "before": "before its call",
            "between": "between collectives",
            "in": "in a collective",
            "save": "in state_dict()",
            "close": "at close()",
            "any": "at any moment of a call",
        }[self.moment]
        return f"rank {self.what}, {where}"

    def strike(self, say: Say) -> None:
        """Let it happen, here and now."""
        if not self.armed:
            return
        self.armed = False
        say(fault=self.what, at=time.time())
        match self.what:
            case "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "absent":
                time.sleep(TIMEOUT + 2.0)
            case "slow":
                time.sleep(0.3 * TIMEOUT * self.delay / _LONGEST)
            case "raising":
                raise MemoryError("no room to pack in")
            case "leaving":
                sys.exit(9)

    def strike_later(self, say: Say) -> None:
        if self.armed:
            after(self.delay, lambda: self.strike(say))


_LONGEST = 0.004


def chosen(chance: random.Random, kinds: list[tuple[str, str]], life: Life) -> Fault:
    what, moment = chance.choice(kinds)
    last = life.last - 1 if what in MORTAL else life.last - 2  # who goes on needs a step to show it
    step = chance.randint(life.first, max(life.first, last))
    if moment == "close":
        step = life.last
    elif moment == "save":
        step = max(life.first, step - step % 2)
    return Fault(
        what,
        moment,
        chance.randrange(life.world_size),
        step,
        chance.randrange(4),
        chance.random() * (0.05 if moment == "any" else _LONGEST),
    )


# -- One rank ------------------------------------------------------------------------------------


@dataclass(slots=True)
class Plan:
    """What all ranks of a life know."""

    life: Life
    before: list[Life]
    route: str
    port: int
    key: str
    folder: Path
    log: bool  # by a logger, or by reduce() and reduce_async()
    fault: Fault | None = None
    errors: dict[int, tuple[str, int]] = field(default_factory=dict)  # by step: which, and whose


class OneRank:
    """A rank's life."""

    def __init__(self, plan: Plan, rank: int, say: Say) -> None:
        self.plan, self.rank, self.say = plan, rank, say
        self.fault = plan.fault if plan.fault and plan.fault.rank == rank else None
        store = dist.PrefixStore(
            plan.key,
            dist.TCPStore("127.0.0.1", plan.port, None, False, timedelta(seconds=30), False),
        )
        dist.init_process_group(
            "gloo",
            store=store,
            rank=rank,
            world_size=plan.life.world_size,
            timeout=timedelta(seconds=60),
        )
        self.interruptible = False
        signal.signal(signal.SIGINT, self.interrupt)
        self.handler = FailingRMS()
        self.aggregator = MetricsAggregator(timeout=TIMEOUT, route=plan.route)
        self.aggregator.register_handler(MyTypes.RMS, self.handler)
        self.aggregator.derive("derived", self.derived)
        self.derive_fails = False
        self.logger = MetricsLogger([JSONLSink(plan.folder / "run.jsonl")]) if plan.log else None
        self.watch_collectives()
        self.say_how_long_connecting_takes()
        say_starved(say)

    def say_how_long_connecting_takes(self) -> None:
        """Say how long torch, and the name server that it asks, take to connect to the store."""
        real = StoreClient.__init__

        def timed(client: StoreClient, *args: Any, **options: Any) -> None:
            began = time.monotonic()
            real(client, *args, **options)
            self.say(connected=time.monotonic() - began)

        StoreClient.__init__ = timed  # type: ignore[method-assign]

    def derived(self, metrics: Any) -> float:
        if self.derive_fails:
            raise KeyError("the function's own")
        return float(metrics["n"])

    def interrupt(self, *_: Any) -> None:
        if self.interruptible:
            self.interruptible = False
            self.say(fault="interrupt", at=time.time())
            raise KeyboardInterrupt

    def watch_collectives(self) -> None:
        """Let the fault strike before, or in, a collective of the call."""
        fault, say = self.fault, self.say
        if fault is None:
            return

        def watched(original: Callable[..., Any]) -> Callable[..., Any]:
            def collective(*args: Any) -> Any:
                if fault.moment in ("between", "save") and fault.seen == fault.at:
                    fault.strike(say)
                if fault.moment == "in" and fault.seen == fault.at:
                    fault.strike_later(say)
                fault.seen += 1
                return original(*args)

            return collective

        Communicator.all_gather = watched(Communicator.all_gather)  # type: ignore[method-assign]
        Communicator.tree = watched(Communicator.tree)  # type: ignore[method-assign]

    def live(self) -> None:
        plan, life = self.plan, self.plan.life
        checkpoint = plan.folder / "checkpoint.json"
        if checkpoint.exists():
            self.aggregator.load_state_dict(json.loads(checkpoint.read_text())["state"])
        if self.logger:
            self.logger.rewind(life.first - 1)
        for step in range(life.first, life.last):
            if self.fault and self.fault.step == step:
                self.fault.armed, self.fault.seen = True, 0
                if self.fault.moment == "before":
                    self.fault.strike(self.say)
            record(self.aggregator, life, self.rank, step)
            self.one_step(step)
            if self.fault and self.fault.what in MORTAL:
                self.fault.strike(self.say)  # the call had fewer collectives
        if self.fault and self.fault.moment == "close":
            self.fault.armed = True
            after(self.fault.delay, lambda: self.fault.strike(self.say))
        if self.logger:
            self.call(life.last, "close the logger", self.logger.close)
        self.call(life.last, "close", self.aggregator.close)
        self.say(finished=True)

    def one_step(self, step: int) -> None:
        """Reduce one step, again as long as an error says that nothing was reduced."""
        told = self.plan.errors.get(step)
        if told and told[1] == self.rank:
            self.begin_error(told[0])
        for _ in range(4):
            try:
                self.reduce(step)
            except (KeyboardInterrupt, MemoryError):
                if self.fault and self.fault.what == "interrupted and ending":
                    raise SystemExit(130) from None
                continue
            except (RuntimeError, ValueError) as error:
                if isinstance(error, MissingRanksError):
                    raise
                self.say(told=str(error)[:400], step=step)
                self.handler.fails = False
                mine = self.fault is not None and step == self.fault.step
                if mine and self.fault.what not in MORTAL and "different" in str(error):
                    return  # the call that was interrupted had come to its end
            else:
                break
        self.derive_fails = False
        if step % 2 == 0:
            for _ in range(4):
                try:
                    self.save(step)
                except (KeyboardInterrupt, MemoryError):
                    if self.fault and self.fault.what == "interrupted and ending":
                        raise SystemExit(130) from None
                except RuntimeError as error:
                    if isinstance(error, MissingRanksError):
                        raise
                    self.say(told=str(error)[:400], step=step)
                    if self.fault and step == self.fault.step:
                        return
                else:
                    return

    def begin_error(self, which: str) -> None:
        if which == "in a handler":
            self.handler.fails = True
        elif which == "in derive":
            self.derive_fails = True
        else:
            self.aggregator.record("loss", torch.tensor(1.0), weight=torch.tensor(-1.0))

    def reduce(self, step: int) -> None:
        if self.logger:
            self.call(step, "log", lambda: self.logged(step))
            return
        way = self.aggregator.reduce
        if step % 3 == 1:
            way = lambda step: self.aggregator.reduce_async(step).result()  # noqa: E731
        snapshot = self.call(step, "reduce", lambda: way(step))
        until = step + 1
        self.check(step, "reduce", snapshot.as_dict("t", "run"), until)

    def logged(self, step: int) -> None:
        assert self.logger is not None
        self.logger.log(step, self.aggregator, prefix="t", window="run")
        self.logger.flush()
        # What a reduction in the background has raised is raised by the next log.
        self.logger._raise_error_of(self.aggregator)

    def save(self, step: int) -> None:
        if self.fault and self.fault.moment == "save" and self.fault.step == step:
            self.fault.seen = 0
        state = self.call(step, "state_dict", self.aggregator.state_dict)
        self.check_state(step, state, [step + 1])
        if self.rank == 0:
            beside = self.plan.folder / "beside.json"
            beside.write_text(json.dumps({"step": step, "state": state}))
            beside.replace(self.plan.folder / "checkpoint.json")

    def call(self, step: int, what: str, call: Callable[[], Any]) -> Any:
        """Make one call, at any moment of which the fault may come, and say how it went."""
        began = time.monotonic()
        fault = self.fault
        if fault and fault.moment == "any" and fault.step == step and fault.armed:
            fault.armed = False
            after(fault.delay, lambda: os.kill(os.getpid(), signal.SIGINT))
        try:
            self.interruptible = True
            try:
                result = call()
            finally:
                self.interruptible = False
        except MissingRanksError as error:
            self.say(
                step=step,
                call=what,
                began=began,
                seconds=time.monotonic() - began,
                missing=list(error.missing),
                text=str(error)[:300],
            )
            self.after_the_end(step)
            raise SystemExit(5) from None
        self.say(step=step, call=what, began=began, seconds=time.monotonic() - began)
        return result

    def after_the_end(self, step: int) -> None:
        """What is left to save is the state as of a reduction that was whole."""
        if self.plan.log:
            with contextlib.suppress(Exception):
                self.logger.close()
        state = self.aggregator.state_dict(sync=False)
        self.check_state(step, state, [step, step + 1])
        self.aggregator.close()

    def check(self, step: int, what: str, got: dict[str, float], until: int) -> None:
        wrong = differing(got, expected([*self.plan.before, self.plan.life], until))
        if wrong:
            self.say(bad=f"{what} of step {step}: {wrong}", step=step)

    def check_state(self, step: int, state: Any, untils: list[int]) -> None:
        alone = MetricsAggregator(communicator=_alone())
        alone.register_handler(MyTypes.RMS, RMSHandler())
        alone.load_state_dict(state)
        got = alone.reduce().as_dict("t", "run")
        lives = [*self.plan.before, self.plan.life]
        wrongs = [differing(got, expected(lives, until)) for until in untils]
        if all(wrongs):
            self.say(bad=f"state after step {step}: {wrongs}", step=step)


def _alone() -> Communicator:
    from metricfold.communicator import LocalCommunicator

    return LocalCommunicator()


# -- One training --------------------------------------------------------------------------------


def training(faults: int) -> Callable[[str, Trial], Iterator[Outcome]]:
    """Return what runs one training: lives with faults, and a last one without."""

    def run(name: str, trial: Trial) -> Iterator[Outcome]:
        chance = trial.random
        folder = Path(tempfile.mkdtemp(prefix="campaign"))
        kinds = [(what, moment) for what, moments in MOMENTS.items() for moment in moments]
        before: list[Life] = []
        log = chance.random() < 0.3
        for number in range(faults + 1):
            first = before[-1].last if before else 0
            life = Life(number, chance.randint(2, 4), first, first + chance.randint(8, 14))
            plan = Plan(
                life,
                list(before),
                chance.choice(["gather", "tree"]),
                own_store(),
                f"{os.getpid()}/{trial.number}/{number}",
                folder,
                log,
            )
            if number < faults:
                plan.fault = chosen(chance, kinds, life)
            if not log:
                struck = -1 if plan.fault is None else plan.fault.step
                plan.errors = {
                    step: (chance.choice(ERRORS), chance.randrange(life.world_size))
                    for step in range(life.first, life.last)
                    if step != struck and chance.random() < 0.9
                }
            yield from lived(plan)
            saved = folder / "checkpoint.json"
            if number < faults:
                kept = json.loads(saved.read_text())["step"] + 1 if saved.exists() else first
                if kept > first:
                    before.append(replace(life, last=kept))
        if log:
            yield from read_back(folder, [*before, life])
        shutil.rmtree(folder, ignore_errors=True)

    return run


def lived(plan: Plan) -> Iterator[Outcome]:
    """Live one life, and judge it."""
    life, fault = plan.life, plan.fault
    world = World(life.world_size, lambda rank, say: OneRank(plan, rank, say).live())
    others = [rank for rank in range(life.world_size) if fault is None or rank != fault.rank]
    hung = world.wait(life.last - life.first + 2 * PROMISED + ENDING, others)
    if fault and world.codes[fault.rank] is None and fault.what == "stopped":
        os.kill(world.pids[fault.rank], signal.SIGCONT)  # now it wakes up, late
    hung += world.wait(PROMISED + ENDING, [fault.rank] if fault else [])
    struck = fault is not None and any("fault" in line for line in world.said(fault.rank))
    row = fault.row if fault is not None and struck else "no fault"
    wrong = list(judged(plan, world))
    figure = longest(world, others)
    spoken = [line for rank in others for line in world.said(rank)]
    starved = max((line["starved"] for line in spoken if "starved" in line), default=0.0)
    busy = f"healthy ranks got no processor for {starved:.1f} s" if starved > 1.0 else ""
    asking = max((one["connected"] for one in spoken if "connected" in one), default=0.0)
    if asking > 0.5 * TIMEOUT:
        busy = f"a healthy rank was connected to the store after {asking:.1f} s"
    busy = busy or ("a healthy rank was late" if really_late(world) else "")
    if busy and (hung or wrong):
        yield Outcome(row, "unjudged", busy, figure)
    elif hung:
        about = [(rank, world.said(rank)[-2:]) for rank in hung]
        yield Outcome(row, "hung", f"{plan_of(plan)}: {about}", figure)
    elif wrong:
        yield Outcome(row, "wrong", f"{plan_of(plan)}: {'; '.join(wrong)[:700]}", figure)
    else:
        yield Outcome(row, "right", "", figure)
    reached = min((len(world.said(rank)) for rank in others), default=0)
    for step, (which, rank) in plan.errors.items():
        told = [
            [
                line["told"]
                for line in world.said(other)
                if line.get("step") == step and "told" in line
            ]
            for other in range(life.world_size)
        ]
        passed = all(
            any(
                line.get("step") == step and "call" in line and "missing" not in line
                for line in world.said(other)
            )
            for other in range(life.world_size)
        )
        astray = fault is not None and fault.what == "interrupted and going on"
        if not reached or not passed or (astray and fault.step < step):
            continue  # the life had ended before, or the ranks find together again in this step
        if which == "in derive":
            fine = not any(told)
        else:
            fine = all(len(texts) == 1 and f"rank {rank}" in texts[0] for texts in told)
            fine = fine and len({texts[0] for texts in told}) == 1
        verdict = "right" if fine else "wrong"
        yield Outcome(f"rank raising {which}", verdict, f"{plan_of(plan)}, step {step}: {told}")
    world.end()


def judged(plan: Plan, world: World) -> Iterator[str]:
    """Yield what is not as it should be, but for ranks that hang."""
    fault, life = plan.fault, plan.life
    faulty = set() if fault is None else {fault.rank}
    may_end = fault is not None and fault.what != "slow"
    for rank in range(life.world_size):
        said, code = world.said(rank), world.codes[rank]
        for line in said:
            if "bad" in line:
                yield f"rank {rank}: {line['bad']}"
            if "raised" in line:
                yield f"rank {rank} raised {line['raised']}: {line['text']}"
            if "missing" in line:
                if not set(line["missing"]) <= faulty or not may_end:
                    yield f"rank {rank} names {line['missing']}: {line['text']}"
                if rank not in faulty and line["seconds"] > PROMISED:
                    yield f"rank {rank} heard of it after {line['seconds']:.1f} s"
        if "terminate called" in world.errors(rank) or code in (
            -signal.SIGABRT,
            -signal.SIGSEGV,
        ):
            yield f"rank {rank} ended with {code}: {world.errors(rank)[-300:]}"
        finished = any("finished" in line for line in said)
        if not finished and code not in (None, 5) and rank not in faulty:
            yield f"rank {rank} ended with {code}: {world.errors(rank)[-300:]}"


def really_late(world: World) -> bool:
    """Whether a rank that was named came to its call when the others had waited for long."""
    calls = [
        (line["step"], line["call"], rank, line["began"], line.get("missing", ()))
        for rank in range(len(world.pids))
        for line in world.said(rank)
        if "began" in line
    ]
    for step, call, _, began, missing in calls:
        for other_step, other_call, other, came, _ in calls:
            together = (step, call) == (other_step, other_call)
            if together and other in missing and came > began + 0.8 * TIMEOUT:
                return True
    return False


def longest(world: World, ranks: list[int]) -> float:
    seconds = [line["seconds"] for rank in ranks for line in world.said(rank) if "missing" in line]
    return max(seconds, default=0.0)


def read_back(folder: Path, lives: list[Life]) -> Iterator[Outcome]:
    """Look whether the file has every step once, with its total."""
    records = read_jsonl(folder / "run.jsonl")
    steps = [record.step for record in records]
    row = "a log over all restarts"
    if steps != list(range(lives[-1].last)):
        yield Outcome(row, "lost", f"steps {steps}, not 0 to {lives[-1].last - 1}")
        return
    for entry in records:
        until = [life for life in lives if life.first <= entry.step]
        wrong = differing(entry.metrics, expected(until, entry.step + 1))
        if wrong:
            yield Outcome(row, "wrong", f"step {entry.step}: {wrong}")
            return
    yield Outcome(row, "right")


def plan_of(plan: Plan) -> str:
    fault = plan.fault
    where = (
        ""
        if fault is None
        else (
            f", rank {fault.rank} {fault.what} ({fault.moment}) in step {fault.step} at {fault.at}"
        )
    )
    way = "log" if plan.log else "reduce"
    return f"{plan.life.world_size} ranks, steps {plan.life.first}-{plan.life.last - 1}, {plan.route}, {way}{where}"


FAULTS = 1_000


def is_a_fault(outcome: Outcome) -> bool:
    return outcome.row.startswith("rank ") and outcome.verdict != "unjudged"


def run(options: Options, table: Table) -> None:
    trials = [
        ("training", Trial(number, random.Random(f"{options.seed}/training/{number}")))
        for number in range(options.pick(full=900, quick=6))
    ]
    found = side_by_side(
        options,
        table,
        trials,
        training(options.pick(full=3, quick=1)),
        crews=options.pick(full=4, quick=3),
        patience=90.0,
        least=FAULTS,
        counts=is_a_fault,
    )
    table.goals.append(Goal("rank faults", sum(map(is_a_fault, found)), FAULTS))
    times = sorted(outcome.figure for outcome in found if outcome.figure)
    if times:
        table.figures.append(
            f"others heard of a fault within {times[len(times) // 2]:.2f} s (median), "
            f"{times[-1]:.2f} s (longest); the timeout is {TIMEOUT:g} s"
        )


if __name__ == "__main__":
    main(run, __doc__)
