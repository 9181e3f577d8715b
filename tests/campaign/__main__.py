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
from pathlib import Path

from campaign.table import Row, printed

__all__ = ["PROGRAMS", "run"]

_HERE = Path(__file__).parent
PROGRAMS = sorted(
    file.stem
    for file in _HERE.glob("*.py")
    if file.read_text("utf-8").endswith("main(run, __doc__)\n")
)
_SECONDS = {"ranks": 240.0, "signals": 200.0}
_OTHERS = 90.0  # seconds in which any other program begins trials
_QUICK = 8.0


def run(program: str, *, seed: int, quick: bool) -> tuple[list[Row], str]:
    """Return the rows of a program, and what it printed besides, in bounded time."""
    seconds = _QUICK if quick else _SECONDS.get(program, _OTHERS)
    most = 2 * seconds + 60  # what it has begun must come to its end
    with tempfile.TemporaryDirectory() as folder:
        rows_file, output_file = Path(folder, "rows.json"), Path(folder, "output")
        command = [sys.executable, "-m", f"campaign.{program}", f"--seed={seed}"]
        command += [f"--seconds={seconds}", f"--json={rows_file}", *(["--quick"] if quick else [])]
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
        if not rows_file.exists():
            row = Row("the program itself", injected=1)
            if ended is None:
                row.has_hung(f"it did not end within {most:.0f} s")
            else:
                row.went_wrong(f"it ended with {ended}")
            return [row], said
        return [Row(**row) for row in json.loads(rows_file.read_text("utf-8"))], said


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
    rows: list[Row] = []
    for program in given.programs or PROGRAMS:
        found, said = run(program, seed=given.seed, quick=given.quick)
        print(f"==> {program}\n{said.rstrip()}\n", flush=True)
        for row in found:
            row.name, row.figures, row.notes = f"{program}: {row.name}", "", []
        rows += found
    print(f"==> the whole campaign, seed {given.seed}\n{printed(rows)}")
    return int(not all(row.well() for row in rows))


if __name__ == "__main__":
    sys.exit(_main())
