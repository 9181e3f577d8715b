"""Processes to break: forked, so that they are cheap, and ended as the processes of a training are.

    def body(rank, say):
        say(step=1, total=3.0)                # a line that the parent reads, whatever becomes of rank

    world = World(2, body)
    hung = world.wait(seconds=20)             # the ranks that have not ended
    world.codes, world.said(0), world.errors(0)
    world.end()

A rank is left by the end of `body`, by what it raises, or by `sys.exit`, and its interpreter is torn
down as that of a script; nothing here may therefore clean up on the way out but in the process that
began it. Trials that wait most of their time run side by side (`side_by_side`).
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from campaign.table import Options, Row, Table, Trial

__all__ = [
    "Outcome",
    "World",
    "after",
    "divided",
    "own_store",
    "say_starved",
    "side_by_side",
    "store_host",
]

# As in conftest.py: the store looks up who connects, and a name server's silence is no fault of ours.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")

Say = Callable[..., None]


class Outcome(NamedTuple):
    """What came of one fault.

    Args:
        row: which kind of fault it was.
        verdict: ``"right"``, ``"wrong"``, ``"hung"``, ``"lost"``, ``"documented"`` or ``"unjudged"``.
        what: what went wrong.
        figure: a number that the program makes something of, such as a time.
    """

    row: str
    verdict: str
    what: str = ""
    figure: float = 0.0


class World:
    """Ranks that `body` is run on, each a process of its own.

    Args:
        world_size: how many ranks.
        body: called as ``body(rank, say)``; what `say` is given, the parent can read.

    Attributes:
        pids: of each rank.
        codes: how each rank ended; None as long as it has not.
    """

    def __init__(self, world_size: int, body: Callable[[int, Say], None]) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="campaign"))
        self.pids: list[int] = []
        self.codes: list[int | None] = [None] * world_size
        sys.stdout.flush()
        # Else the collector of each would write to, and so copy, all that it has inherited.
        gc.freeze()
        for rank in range(world_size):
            pid = os.fork()
            if pid == 0:
                self._live(rank, body)
            self.pids.append(pid)

    def _live(self, rank: int, body: Callable[[int, Say], None]) -> None:
        os.dup2(os.open(self.folder / f"{rank}.err", os.O_CREAT | os.O_WRONLY), 2)
        out = os.open(self.folder / f"{rank}.out", os.O_CREAT | os.O_WRONLY | os.O_APPEND)

        def say(**line: Any) -> None:
            os.write(out, json.dumps(line).encode() + b"\n")

        try:
            body(rank, say)
        except Exception as error:
            traceback.print_exc()
            say(raised=type(error).__name__, text=str(error)[:300])
            sys.exit(1)
        sys.exit(0)

    def said(self, rank: int) -> list[dict[str, Any]]:
        """Return the lines that a rank has said so far."""
        try:
            text = (self.folder / f"{rank}.out").read_bytes()
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in text.split(b"\n") if line.endswith(b"}")]

    def errors(self, rank: int) -> str:
        """Return what a rank has written to its standard error."""
        return (self.folder / f"{rank}.err").read_text("utf-8", "replace")

    def wait(self, seconds: float, ranks: Iterable[int] | None = None) -> list[int]:
        """Wait for ranks to end, and return those that have not."""
        waited_for = range(len(self.pids)) if ranks is None else list(ranks)
        deadline = time.monotonic() + seconds
        while True:
            for rank, pid in enumerate(self.pids):
                if self.codes[rank] is None:
                    ended, status = os.waitpid(pid, os.WNOHANG)
                    if ended:
                        self.codes[rank] = os.waitstatus_to_exitcode(status)
            left = [rank for rank in waited_for if self.codes[rank] is None]
            if not left or time.monotonic() > deadline:
                return left
            time.sleep(0.01)

    def end(self) -> None:
        """Kill the ranks that are left, and forget what they said."""
        for rank in self.wait(0):
            os.kill(self.pids[rank], signal.SIGKILL)
        self.wait(10)
        shutil.rmtree(self.folder, ignore_errors=True)


def store_host() -> tuple[int, World]:
    """Return the port of a store, and the process that serves it.

    It is none of those that fork: a fork would wait for the store's thread, which it does not have.
    """

    def serve(rank: int, say: Say) -> None:
        import torch.distributed as dist

        # By IPv4: who connects is looked up by name, and of IPv6 no file of hosts knows the name.
        listening = socket.create_server(("127.0.0.1", 0), backlog=1024)
        port = listening.getsockname()[1]
        options = {"master_listen_fd": listening.detach()}
        store = dist.TCPStore(
            "127.0.0.1", port, None, True, timedelta(seconds=30), False, **options
        )
        say(port=store.port)
        while os.getppid() == parent:
            time.sleep(1)

    parent = os.getpid()
    world = World(1, serve)
    deadline = time.monotonic() + 60
    while not world.said(0):
        if world.codes[0] is not None or time.monotonic() > deadline:
            raise RuntimeError(f"there is no store: {world.errors(0)}")
        world.wait(0.05)
    return world.said(0)[0]["port"], world


_own: dict[int, tuple[int, World]] = {}


def own_store() -> int:
    """Return the port of a store of this process's own, so that crews do not wait for each other."""
    if os.getpid() not in _own:
        _own[os.getpid()] = store_host()
    return _own[os.getpid()][0]


def after(seconds: float, call: Callable[[], object]) -> None:
    """Call something on a thread of its own, some time from now."""

    def wait() -> None:
        time.sleep(seconds)
        call()

    threading.Thread(target=wait, daemon=True).start()


def say_starved(say: Say) -> None:
    """Say from now on for how long the machine has left this process without a processor."""

    def watch() -> None:
        longest = 0.5
        while True:
            began = time.monotonic()
            time.sleep(0.05)
            late = time.monotonic() - began - 0.05
            if late > longest:
                longest = late
                say(starved=late)

    threading.Thread(target=watch, daemon=True).start()


def side_by_side(
    options: Options,
    table: Table,
    trials: Sequence[tuple[str, Trial]],
    run: Callable[[str, Trial], Iterator[Outcome]],
    *,
    crews: int,
    patience: float,
    least: int = 0,
    counts: Callable[[Outcome], bool] = lambda outcome: True,
) -> list[Outcome]:
    """Run trials in several processes, count what came of them, and return it.

    Args:
        options: no further trial begins once its time is up, and there were as many as must be.
        table: gets every outcome, in the row that it names.
        trials: each with the name that `run` is given.
        run: yields what came of a trial.
        crews: how many processes.
        patience: seconds that a trial may take after time is up.
        least: how many outcomes there must be of those that count; not if it is to be quick.
        counts: which these are.
    """
    least = options.pick(least, 0)

    def crew(rank: int, say: Say) -> None:
        counted = 0
        for name, trial in trials[rank::crews]:
            if options.over(enough=counted * crews >= least):
                return
            for outcome in run(name, trial):
                say(**outcome._asdict(), trial=trial.number)
                counted += counts(outcome)
        say(done=True)

    world = World(crews, crew)
    hung = world.wait(max(options.left_in_any_case(), 0) + patience)
    found = []
    for rank in range(crews):
        lines = world.said(rank)
        for line in lines:
            if "verdict" in line:
                number = line.pop("trial")
                outcome = Outcome(**line)
                found.append(outcome)
                count(table.row(outcome.row), outcome, Trial(number, trials[0][1].random))
        if rank in hung or world.codes[rank]:
            row = table.row("the campaign itself")
            row.inject()
            if rank in hung:
                row.has_hung(f"a crew has not ended after {lines[-1:]}")
            else:
                row.went_wrong(
                    f"a crew ended with {world.codes[rank]}: {world.errors(rank)[-600:]}"
                )
        elif not any("done" in line for line in lines):
            table.row("the campaign itself").notes.append("time was up before all trials had begun")
    world.end()
    return found


def count(row: Row, outcome: Outcome, trial: Trial) -> None:
    row.inject()
    match outcome.verdict:
        case "right":
            row.went_right()
        case "wrong":
            row.went_wrong(outcome.what, trial)
        case "hung":
            row.has_hung(outcome.what, trial)
        case "lost":
            row.has_lost(outcome.what, trial)
        case "documented":
            row.as_documented()
        case "unjudged":
            row.was_not_judged(outcome.what, trial)


def divided(
    options: Options, table: Table, run: Callable[[Options, Table], None], *, patience: float
) -> None:
    """Run a program that needs a processor, and no other process, once on each of them.

    Args:
        options: of all; each process gets its share of the trials.
        table: gets the rows of all.
        run: fills a table.
        patience: seconds that a trial may take after time is up.
    """
    crews = os.cpu_count() or 1

    def crew(rank: int, say: Say) -> None:
        own = Table()
        run(options.of_crew(rank, crews), own)
        say(rows=[asdict(row) for row in own.rows])

    world = World(crews, crew)
    world.wait(max(options.left_in_any_case(), 0) + patience)
    for rank in range(crews):
        lines = world.said(rank)
        for line in lines[-1]["rows"] if world.codes[rank] == 0 and lines else []:
            table.row(line["name"]).add(Row(**line))
        if world.codes[rank] != 0:
            row = table.row("the campaign itself")
            row.inject()
            if world.codes[rank] is None:
                row.has_hung(f"process {rank} has not ended")
            else:
                row.went_wrong(
                    f"process {rank} ended with {world.codes[rank]}: {world.errors(rank)[-600:]}"
                )
    world.end()
