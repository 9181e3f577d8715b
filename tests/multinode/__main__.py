"""Jobs on two hosts, each with a network of its own, in some minutes: `make multinode`, as root.

    python -m multinode                      # says why, and ends well, where there can be no hosts
    python -m multinode --only restarts      # parts by name

Each part returns a section of the benchmarks' table, or raises; the check fails if one raises.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import restarted_training
from benchmarks.table import Row, Section, cost
from parallel_trainings import counted

from multinode.hosts import NAMES, Hosts, why_not

__all__ = ["PARTS", "main"]

_HERE = Path(__file__).parent
_DELAYS = (0.0, 0.001, 0.01, 0.05)
_PORT = 29_400
_MOST_SECONDS = 180


# -- Jobs ------------------------------------------------------------------------------------------


class Job:
    """One `torchrun` on each host, which meet at the first one.

    Args:
        hosts: the two.
        per_host: how many ranks each has.
        folder: of their output.
        program: what they run, and its arguments.
        restarts: how often they may begin anew.
    """

    def __init__(
        self,
        hosts: Hosts,
        per_host: int,
        folder: Path,
        program: Sequence[str],
        restarts: int = 0,
    ) -> None:
        self._hosts = hosts
        self._command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
        self._command += ["--nproc-per-node", f"{per_host}", "--max-restarts", f"{restarts}"]
        self._command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{NAMES[0]}:{_PORT}"]
        self._command += ["--rdzv-id", "job", *program]
        self._output = folder / "output"
        self._agents = [self._begin(number) for number in range(2)]

    def _begin(self, number: int) -> subprocess.Popen[str]:
        # Without the last, torch 2.13 hands the addresses of killed ranks to those started anew.
        paths = [str(_HERE.parent), str(_HERE.parent.parent), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "OMP_NUM_THREADS": "1",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }
        with self._output.open("a") as output:
            said = {"stdout": output, "stderr": subprocess.STDOUT}
            return self._hosts[number].start(self._command, env=environment, **said)

    def restart_host(self, number: int) -> None:
        """Kill all that runs there, and begin its agent anew, as a scheduler does."""
        self._hosts[number].kill_all()
        self._agents[number].wait()
        self._agents[number] = self._begin(number)

    def running(self) -> bool:
        return any(agent.poll() is None for agent in self._agents)

    def finish(self) -> None:
        """Wait until both are through.

        Raises:
            RuntimeError: one has failed, or they hang.
        """
        until = time.monotonic() + _MOST_SECONDS
        try:
            codes = [agent.wait(max(until - time.monotonic(), 0.1)) for agent in self._agents]
        except subprocess.TimeoutExpired:
            codes = [-1]
        if any(codes):
            said = self._output.read_text("utf-8", "replace")
            raise RuntimeError(f"the agents ended with {codes}:\n{said[-6000:]}")


@contextmanager
def folder_of_found() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def found_in(folder: Path, ranks: int) -> list[Any]:
    return [json.loads((folder / f"found-{rank}.json").read_text("ascii")) for rank in range(ranks)]


# -- The parts -------------------------------------------------------------------------------------


def totals() -> Section:
    """Uneven ranks come to what NumPy says, by both routes, whatever the delay; all say the same."""
    section = Section(
        "totals: two hosts, both routes", head=("ranks", "route", "delay", "right numbers")
    )
    for per_host in (2, 4):
        for delay, route in ((None, "gather"), (None, "tree"), (0.05, "gather"), (0.05, "tree")):
            with Hosts(delay) as hosts, folder_of_found() as folder:
                program = [str(_HERE / "job.py"), "totals", str(folder), route]
                Job(hosts, per_host, folder, program).finish()
                of_ranks = found_in(folder, 2 * per_host)
            if any(found != of_ranks[0] for found in of_ranks):
                raise AssertionError(f"the ranks differ: {of_ranks}")
            under_way = "0 (veth)" if delay is None else f"{delay * 1e3:g} ms"
            section.lines.append([f"2 x {per_host}", route, under_way, str(len(of_ranks[0]))])
    return section


def latency() -> Section:
    """What a log, the first log and a save cost beside bare collectives of their bytes."""
    section = Section("latency, 100 means: beside one bare collective of as many bytes")
    for per_host in (2, 4):
        for route in ("gather", "tree"):
            with Hosts(0.0) as hosts, folder_of_found() as folder:
                program = [str(_HERE / "job.py"), "latency", str(folder), route]
                job = Job(hosts, per_host, folder, program)
                _take_turns(job, hosts, folder)
                job.finish()
                found = found_in(folder, 1)[0]
            for delay, seen in found.items():
                section.rows += _rows(f"2 x {per_host}, {route}, {float(delay) * 1e3:g} ms", seen)
    section.notes.append(
        "The bare collective of a gather is an all-gather, of a tree an all-reduce. Beside the first log "
        "stands a new gloo group and its first collective. Delays are one way; a packet between ranks of one host has none."
    )
    return section


def _take_turns(job: Job, hosts: Hosts, folder: Path) -> None:
    for turn, delay in enumerate((*_DELAYS, None)):
        while not (folder / f"turn-{turn}").exists():
            if not job.running():
                return
            time.sleep(0.01)
        if delay is not None:
            hosts.delay(delay)
        unfinished = folder / "unfinished"
        unfinished.write_text("" if delay is None else f"{delay:g}", "ascii")
        unfinished.replace(folder / f"delay-{turn}")


def _rows(where: str, seen: dict[str, float]) -> list[Row]:
    bare = [seen["bare"]]
    return [
        cost(f"{where}: a log", [seen["log"]], "bare", bare),
        cost(f"{where}: a save", [seen["save"]], "bare", bare),
        cost(f"{where}: the first log", [seen["first"]], "new group", [seen["bare_first"]]),
    ]


def restarts() -> Section:
    """A worker is killed, then a whole host: from the last checkpoint on each sample counts once."""
    section = Section("restarts, 2 x 2", head=("killed", "seconds of the job", "totals"))
    for killed in ("worker", "host"):
        with Hosts() as hosts, folder_of_found() as folder:
            if killed == "host":
                (folder / "killed-from-outside").touch()
            began = time.monotonic()
            program = [restarted_training.__file__, str(folder)]
            job = Job(hosts, 2, folder, program, restarts=3)
            if killed == "host":
                while job.running() and not (folder / "killed").exists():
                    time.sleep(0.05)
                job.restart_host(1)
            job.finish()
            taken = time.monotonic() - began
            found = [json.loads((folder / f"totals-{r}.json").read_text("ascii")) for r in range(4)]
        samples = counted(range(restarted_training.STEPS))
        expected = {f"run_{name}": number for name, number in samples.items()}
        for logged in found:
            wrong = {
                name: (logged.get(name), number)
                for name, number in expected.items()
                if not math.isclose(logged.get(name, math.nan), number, rel_tol=1e-12)
            }
            if wrong:
                raise AssertionError(f"after the {killed} was killed, (logged, true): {wrong}")
        section.lines.append([f"a {killed}", f"{taken:.0f}", f"{len(expected)} right on 4 ranks"])
    return section


def faults() -> Section:
    """What the suite holds of interfaces, missing ranks and links that are cut."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "", "-rs"]
    subprocess.run(
        [*command, str(_HERE.parent / "test_multinode.py")], check=True, timeout=_MOST_SECONDS
    )
    return Section("interfaces, missing ranks, links: see above")


PARTS: dict[str, Callable[[], Section]] = {
    "totals": totals,
    "restarts": restarts,
    "faults": faults,
    "latency": latency,
}


# -- The command -----------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """Run the parts; return 1 if one has failed."""
    parser = argparse.ArgumentParser(prog="python -m multinode", description=__doc__)
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=list(PARTS))
    options = parser.parse_args(arguments)
    if reason := why_not():
        print(f"skipped: {reason}")
        return 0
    failed = []
    for part in options.only:
        try:
            print(f"\n{PARTS[part]()}", flush=True)
        except Exception:
            traceback.print_exc()
            failed.append(part)
    print(f"\nfailed: {', '.join(failed)}" if failed else "\nall right")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
