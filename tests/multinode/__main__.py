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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import restarted_training
from benchmarks.table import Section, seconds
from parallel_trainings import counted

from multinode.hosts import NAMES, Hosts, why_not

__all__ = ["PARTS", "main"]

_HERE = Path(__file__).parent
_DELAYS = (0.0, 0.001, 0.01, 0.05)
_HEAD = (
    "ranks",
    "delay",
    "route",
    "right",
    "bare",
    "a log",
    "a save",
    "new group",
    "the first log",
)
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


# -- The parts -------------------------------------------------------------------------------------


def figures() -> Section:
    """Totals of uneven ranks are NumPy's; and what logs cost beside bare collectives of their bytes."""
    section = Section("100 means, two hosts", head=_HEAD)
    for per_host in (2, 4):
        with Hosts(0.0) as hosts, tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            job = Job(hosts, per_host, folder, [str(_HERE / "job.py"), name])
            _take_turns(job, hosts, folder)
            job.finish()
            for seen in json.loads((folder / "found.json").read_text("ascii")):
                section.lines.append(_line(f"2 x {per_host}", seen))
    section.notes.append(
        "Beside a gather stands an all-gather, beside a tree an all-reduce; beside the first log a new gloo group "
        "and its first collective. Delays are one way, between the hosts. *right*: totals of uneven ranks as NumPy "
        "has them, the same on all."
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


def _line(ranks: str, seen: dict[str, Any]) -> list[str]:
    def beside(ours: str, bare: str) -> str:
        return f"{seconds(seen[ours])} ({seen[ours] / seen[bare]:.2g}x)"

    delay = f"{1e3 * float(seen['delay']):g} ms"
    costs = [beside("log", "bare"), beside("save", "bare")]
    first = [seconds(seen["bare_first"]), beside("first", "bare_first")]
    return [ranks, delay, seen["route"], str(seen["right"]), seconds(seen["bare"]), *costs, *first]


def restarts() -> Section:
    """A worker is killed, then a whole host: from the last checkpoint on each sample counts once."""
    section = Section("restarts, 2 x 2", head=("killed", "seconds of the job", "totals"))
    for killed in ("worker", "host"):
        with Hosts() as hosts, tempfile.TemporaryDirectory() as name:
            folder = Path(name)
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
    lines = [
        [what, "as promised"] for what in ("interfaces", "missing ranks", "a link that is cut")
    ]
    return Section("faults, by tests/test_multinode.py", head=("what", "ends"), lines=lines)


PARTS: dict[str, Callable[[], Section]] = {
    "figures": figures,
    "restarts": restarts,
    "faults": faults,
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
