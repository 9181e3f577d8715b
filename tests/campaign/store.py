"""The process that serves the job's store is stopped or killed, alone or while a rank is away.

As long as all ranks come, nobody needs the store, and reductions go on. Otherwise every rank must get
an error within the timeout and 5 s that names no healthy rank, and its process must end: with an
interpreter that is torn down while a question may still be open.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist

from campaign.forks import Outcome, Say, World, side_by_side, store_host
from campaign.table import Options, Table, Trial, main
from metricfold import MetricsAggregator, MissingRanksError

TIMEOUT = 3.0
PROMISED = TIMEOUT + 5.0
ENDING = 40.0  # seconds that a process may take to end after that
STEPS = 6

WAYS = {
    f"the store {what}, {beside}": (what, beside)
    for what in ("stopped", "killed", "stopped and going on")
    for beside in (
        "before the first call",
        "in the steady state",
        "and a rank killed",
        "and a rank stopped",
        "and a rank absent",
    )
}


def total(world_size: int, step: int) -> float:
    return float(sum((rank + 1) * (step + 1) for rank in range(world_size)))


def fault(name: str, trial: Trial) -> Iterator[Outcome]:
    """Let ranks reduce, and take the store away from them."""
    what, beside = WAYS[name]
    chance = trial.random
    world_size = chance.randint(2, 4)
    faulty = chance.randrange(world_size) if "a rank" in beside else None
    at = 0 if beside == "before the first call" else chance.randrange(1, STEPS - 1)
    back_after = chance.random() * 1.0
    route = chance.choice(["gather", "tree"])
    port, host = store_host()

    def take_away() -> None:
        os.kill(host.pids[0], signal.SIGKILL if what == "killed" else signal.SIGSTOP)

    def body(rank: int, say: Say) -> None:
        store = dist.TCPStore("127.0.0.1", port, None, False, timedelta(seconds=30), False)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
        )
        aggregator = MetricsAggregator(timeout=TIMEOUT, route=route)
        for step in range(STEPS):
            if step == at:
                say(ready=True)
                time.sleep(0.5)  # in which the store goes
            if step == at and rank == faulty:
                if "killed" in beside:
                    os.kill(os.getpid(), signal.SIGKILL)
                if "stopped" in beside:
                    os.kill(os.getpid(), signal.SIGSTOP)
                time.sleep(TIMEOUT + 2.0)
            aggregator.record("n", rank + 1, "sum")
            began = time.monotonic()
            try:
                got = aggregator.reduce(step).as_dict("t", "run")["t/n"]
            except RuntimeError as error:
                missing = list(error.missing) if isinstance(error, MissingRanksError) else None
                seconds = time.monotonic() - began
                say(seconds=seconds, missing=missing, text=str(error)[:300])
                break
            if got != total(world_size, step):
                say(bad=f"{got} in step {step}, not {total(world_size, step)}")
        began = time.monotonic()
        aggregator.close()
        say(closed=time.monotonic() - began)

    world = World(world_size, body)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not all(
        any("ready" in line for line in world.said(rank)) or world.codes[rank] is not None
        for rank in range(world_size)
    ):
        world.wait(0.01)
    take_away()
    if what == "stopped and going on":
        time.sleep(back_after)
        os.kill(host.pids[0], signal.SIGCONT)
    others = [rank for rank in range(world_size) if rank != faulty]
    hung = world.wait(PROMISED + ENDING, others)
    yield from judged(name, world, others, faulty, hung)
    world.end()
    if what == "stopped":
        os.kill(host.pids[0], signal.SIGCONT)
    host.end()


def judged(
    name: str, world: World, others: list[int], faulty: int | None, hung: list[int]
) -> Iterator[Outcome]:
    what, beside = WAYS[name]
    goes_on = faulty is None and (at_ease(beside) or what == "stopped and going on")
    wrong: list[str] = []
    times = [0.0]
    for rank in others:
        lines = world.said(rank)
        wrong += [line["bad"] for line in lines if "bad" in line]
        wrong += [f"{line['raised']}: {line['text']}" for line in lines if "raised" in line]
        for line in lines:
            if "seconds" not in line:
                continue
            times.append(line["seconds"])
            named = line["missing"]
            if goes_on:
                wrong.append(f"rank {rank}: {line['text']}")
            elif named is None or not set(named) <= {faulty}:
                wrong.append(f"rank {rank} names {named}: {line['text']}")
            elif line["seconds"] > PROMISED:
                wrong.append(f"rank {rank} heard of it after {line['seconds']:.1f} s")
        if rank not in hung and world.codes[rank] != 0:
            wrong.append(f"rank {rank} ended with {world.codes[rank]}: {world.errors(rank)[-300:]}")
    if hung:
        lines = [world.said(rank)[-1:] for rank in hung]
        yield Outcome(name, "hung", f"ranks {hung} of {len(world.pids)}: {lines}", max(times))
    else:
        yield Outcome(name, "wrong" if wrong else "right", "; ".join(wrong)[:600], max(times))


def at_ease(beside: str) -> bool:
    """Whether nobody asks the store anything any more."""
    return beside == "in the steady state"


def run(options: Options, table: Table) -> None:
    trials = [
        (name, Trial(number, random.Random(f"{options.seed}/{name}/{number}")))
        for number in range(options.pick(full=8, quick=1))
        for name in WAYS
    ]
    if options.quick:
        trials = trials[options.seed % 2 :: 3]
    found = side_by_side(
        options, table, trials, fault, crews=options.pick(full=6, quick=5), patience=60.0
    )
    times = sorted(outcome.figure for outcome in found if outcome.figure)
    if times:
        table.rows[0].figures = (
            f"ranks heard of a fault within {times[len(times) // 2]:.2f} s (median), "
            f"{times[-1]:.2f} s (longest); the timeout is {TIMEOUT:g} s"
        )


if __name__ == "__main__":
    main(run, __doc__)
