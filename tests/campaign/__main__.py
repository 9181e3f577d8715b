"""Run every program of the campaign, each in a process and a time of its own, and print one table."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from campaign.table import Goal, Row, in_markdown, summed

__all__ = ["PROGRAMS", "run"]

_HERE = Path(__file__).parent
PROGRAMS = sorted(
    file.stem
    for file in _HERE.glob("*.py")
    if file.read_text("utf-8").endswith("main(run, __doc__)\n")
)
_SECONDS = {
    "checkpoints": 130.0,
    "files": 25.0,
    "jax_ranks": 60.0,
    "peer": 45.0,
    "ranks": 230.0,
    "signals": 190.0,
    "sinks": 75.0,
    "soak": 40.0,
    "steps": 60.0,
    "store": 60.0,
    "tree": 200.0,
}
"""In which a program begins trials; it goes on where it has not shown yet what it must."""
_QUICK = 8.0


class Found(NamedTuple):
    """What a program has found.

    Args:
        rows: of its table.
        goals: what it was to reach.
        figures: what else it found, in words.
        said: all that it printed.
    """

    rows: list[Row]
    goals: list[Goal]
    figures: list[str]
    said: str


def run(program: str, *, seed: int, quick: bool) -> Found:
    """Return what a program finds, in bounded time."""
    seconds = _QUICK if quick else _SECONDS[program]
    most = 2 * seconds + 100  # what it has begun must come to its end
    with tempfile.TemporaryDirectory() as folder:
        found_file, output_file = Path(folder, "found.json"), Path(folder, "output")
        command = [sys.executable, "-m", f"campaign.{program}", f"--seed={seed}"]
        command += [f"--seconds={seconds}", f"--json={found_file}", *(["--quick"] if quick else [])]
        with output_file.open("wb") as output:
            process = subprocess.Popen(
                command,
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(most)
            finally:
                ended = process.poll()
                # What it has left behind goes with it: ranks that are stopped, for one.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        said = output_file.read_text("utf-8", "replace")
        if not found_file.exists():
            row = Row("the program itself", injected=1)
            if ended is None:
                row.has_hung(f"it did not end within {most:.0f} s")
            else:
                row.went_wrong(f"it ended with {ended}")
            return Found([row], [], [], said)
        found = json.loads(found_file.read_text("utf-8"))
        rows = [Row(**row) for row in found["rows"]]
        return Found(rows, [Goal(**goal) for goal in found["goals"]], found["figures"], said)


def _environment() -> dict[str, str]:
    paths = (str(_HERE.parent), os.environ.get("PYTHONPATH", ""))
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONWARNINGS": "ignore",
        "OMP_NUM_THREADS": "1",
    }


def _main() -> int:
    parser = argparse.ArgumentParser(prog="campaign", description=__doc__)
    parser.add_argument("programs", nargs="*", metavar="program", help=f"of {', '.join(PROGRAMS)}")
    parser.add_argument("--seed", type=int, default=0, help="decides every fault")
    parser.add_argument("--quick", action="store_true", help="seconds of each instead of minutes")
    given = parser.parse_args()
    unknown = set(given.programs) - set(PROGRAMS)
    if unknown:
        parser.error(f"no program of the campaign: {', '.join(sorted(unknown))}")
    began = time.monotonic()
    sums: list[Row] = []
    goals: list[Goal] = []
    figures: list[str] = []
    for program in given.programs or PROGRAMS:
        found = run(program, seed=given.seed, quick=given.quick)
        print(f"==> {program}\n{found.said.rstrip()}\n", flush=True)
        sums.append(summed(program, found.rows))
        goals += found.goals
        figures += [f"{program}: {figure}" for figure in found.figures]
    seconds = time.monotonic() - began
    print(f"==> the campaign, seed {given.seed}, {seconds / 60:.1f} minutes")
    print(in_markdown([*sums, summed("in all", sums)]))
    print("\n".join([*map(str, goals), *figures]))
    return int(not all(row.well() for row in sums) or not all(goal.reached() for goal in goals))


if __name__ == "__main__":
    sys.exit(_main())
