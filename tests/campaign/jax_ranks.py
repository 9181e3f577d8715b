"""Processes of JAX that are killed, stopped, raise, or are interrupted, while they reduce.

Each life begins with new processes, connected by JAX's coordinator, and ends for one of them as the
trial says. Every other one must go on with the right numbers, or get an error that names nobody but
that one; the first process serves the coordinator and is spared.
"""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ports import free_port

from campaign.forks import Outcome, after, side_by_side
from campaign.table import Options, Table, Trial, main

TIMEOUT = 4.0
BEGINNING = 60.0  # seconds that JAX may take to begin, on a busy machine
ENDING = 40.0
STEPS = 4

WAYS = (
    "process killed, before its call",
    "process killed, in a call",
    "process stopped, before its call",
    "process raising, in a handler",
    "process absent, before its call",
    "process interrupted and going on, in a call",
    "process without a fault",
)


def expected(world_size: int, steps: int) -> float:
    return float(
        sum((rank + 1) * (step + 1) for rank in range(world_size) for step in range(steps))
    )


def live(
    rank: int, world_size: int, port: int, route: str, what: str, faulty: int, at: int, delay: float
) -> None:
    """Live as one process; what it says goes to standard output, line by line."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    from handlers_of_users import FailingRMS, MyTypes

    from metricfold import Metric, MetricsAggregator, MissingRanksError

    def say(**line: Any) -> None:
        print(json.dumps(line), flush=True)

    jax.distributed.initialize(f"127.0.0.1:{port}", world_size, rank)
    handler = FailingRMS()
    aggregator = MetricsAggregator(timeout=TIMEOUT, route=route)
    aggregator.register_handler(MyTypes.RMS, handler)
    say(ready=True)
    for step in range(STEPS):
        aggregator.record("n", (rank + 1) * (step + 1), "sum")
        aggregator.update([Metric("d", "rms", 1, MyTypes.RMS)])
        if rank == faulty and step == at:
            say(fault=what)
            if "before" in what and "killed" in what:
                os.kill(os.getpid(), signal.SIGKILL)
            elif "killed" in what or "interrupted" in what:
                number = signal.SIGKILL if "killed" in what else signal.SIGINT
                after(delay, functools.partial(os.kill, os.getpid(), number))
            elif "stopped" in what:
                os.kill(os.getpid(), signal.SIGSTOP)
            elif "absent" in what:
                time.sleep(TIMEOUT + 2.0)
            elif "raising" in what:
                handler.fails = True
        for _ in range(4):
            began = time.monotonic()
            try:
                got = aggregator.reduce(step).as_dict("t", "run")["t/n"]
            except MissingRanksError as error:
                say(
                    seconds=time.monotonic() - began,
                    missing=list(error.missing),
                    text=str(error)[:400],
                )
                # A goodbye to JAX would wait for those who are gone.
                os._exit(5)
            except KeyboardInterrupt:
                continue
            except RuntimeError as error:
                say(told=str(error)[:400], step=step)
                handler.fails = False
                if rank == faulty and "interrupted" in what and "different" in str(error):
                    break  # the call that was interrupted had come to its end
            else:
                if abs(got - expected(world_size, step + 1)) > 1e-9:
                    say(bad=f"{got} in step {step}, not {expected(world_size, step + 1)}")
                break
    say(finished=True)
    # Until the others have come to their end, too: the coordinator goes with the first process.
    time.sleep(1.0)
    os._exit(0)


def life(name: str, trial: Trial) -> Iterator[Outcome]:
    """Let processes begin, live and end."""
    chance = trial.random
    world_size = chance.choice([2, 2, 3])
    what = name.removeprefix("process ")
    faulty = chance.randrange(1, world_size) if "without" not in what else -1
    port = free_port()
    route = chance.choice(["gather", "tree"])
    fault = [route, what, faulty, chance.randrange(1, STEPS - 1), 0.02 * chance.random()]
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, str(rank)) for rank in range(world_size)]
        processes = []
        for rank, file in enumerate(files):
            told = json.dumps([rank, world_size, port, *fault])
            command = [sys.executable, "-m", "campaign.jax_ranks", "--life", told]
            with file.open("wb") as out, file.with_suffix(".err").open("wb") as err:
                processes.append(subprocess.Popen(command, stdout=out, stderr=err))
        others = [rank for rank in range(world_size) if rank != faulty]
        try:
            deadline = time.monotonic() + BEGINNING
            while time.monotonic() < deadline and not all(said(file) for file in files):
                time.sleep(0.05)
            began = all(said(file) for file in files)
            deadline = time.monotonic() + STEPS + 2 * TIMEOUT + ENDING
            while time.monotonic() < deadline and any(
                processes[rank].poll() is None for rank in others
            ):
                time.sleep(0.05)
            codes = [process.poll() for process in processes]
        finally:
            for process in processes:  # JAX catches SIGTERM
                process.kill()
                process.wait()
        if not began:
            yield Outcome(name, "unjudged", "JAX had not begun in time")
            return
        lines = [said(file) for file in files]
        hung = [rank for rank in others if codes[rank] is None]
        wrong = "; ".join(judged(what, faulty, rank, lines[rank], codes[rank]) for rank in others)
        wrong = wrong.strip("; ")
        errors = [
            Path(folder, f"{rank}.err").read_text("utf-8", "replace")[-300:] for rank in others
        ]
        if hung:
            yield Outcome(name, "hung", f"processes {hung} of {world_size}, {fault}: {lines}")
        elif wrong:
            yield Outcome(name, "wrong", f"{world_size} processes, {fault}: {wrong} {errors}"[:900])
        else:
            yield Outcome(name, "right")


def said(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_bytes().split(b"\n") if line.startswith(b"{")]


def judged(what: str, faulty: int, rank: int, lines: list[dict[str, Any]], code: int | None) -> str:
    """Return what is wrong with a healthy process."""
    wrong = [line["bad"] for line in lines if "bad" in line]
    mortal = any(word in what for word in ("killed", "stopped", "absent", "interrupted"))
    for line in lines:
        if "missing" in line and not (mortal and set(line["missing"]) <= {faulty}):
            wrong.append(f"process {rank} names {line['missing']}: {line['text']}")
        if "told" in line and mortal and "different" not in line["told"]:
            wrong.append(f"process {rank} was told {line['told']}")
    if "raising" in what:
        told = [line["told"] for line in lines if "told" in line]
        if len(told) != 1 or "the handler's own" not in told[0]:
            wrong.append(f"process {rank} was told {told}")
    ended = any("finished" in line or "missing" in line for line in lines)
    if not ended and code is not None and not (mortal and code == -signal.SIGABRT):
        # JAX itself aborts those that are left when its coordinator notices the loss.
        wrong.append(f"process {rank} ended with {code}: {lines[-1:]}")
    return "; ".join(wrong)


def run(options: Options, table: Table) -> None:
    if not find_spec("jax"):
        table.figures.append("JAX is not installed: nothing was tried")
        return
    names = WAYS if not options.quick else WAYS[options.seed % 2 :: 4]
    trials = [
        (name, Trial(number, random.Random(f"{options.seed}/{name}/{number}")))
        for number in range(options.pick(full=6, quick=1))
        for name in names
    ]
    side_by_side(
        options, table, trials, life, crews=3, patience=BEGINNING + ENDING, least=len(WAYS)
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--life"]:
        live(*json.loads(sys.argv[2]))
    main(run, __doc__)
