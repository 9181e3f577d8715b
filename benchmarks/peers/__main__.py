"""`python -m benchmarks.peers`: the same logs through other libraries, and the tables.

python -m benchmarks.peers              some minutes
python -m benchmarks.peers --quick      seconds: shows that it works, not how fast it is
python -m benchmarks.peers --axes ranks --only metricfold torchmetrics

The libraries come with `pip install -c constraints.txt --group bench`, which `make bench` does.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

# Read by every library with threads of its own when it is imported: before anything else.
os.environ["OMP_NUM_THREADS"] = "1"
# The profiler, which counts collectives, else says that it has begun and ended.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from benchmarks.machine import load, machine
from benchmarks.peers.libraries import BARE, LIBRARIES, OURS, Library
from benchmarks.peers.points import FULL, QUICK, WINDOW, Plan, Point
from benchmarks.peers.results import Outcome, Results, Row
from benchmarks.peers.run import measure
from benchmarks.peers.tables import AXES, tables
from benchmarks.peers.truth import CASES, outcome


def main() -> int:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", allow_abbrev=False)
    names = [library.name for library in LIBRARIES]
    parser.add_argument("--quick", action="store_true", help="tiny sizes, in seconds")
    parser.add_argument("--axes", nargs="*", choices=AXES, help="measure along these only")
    parser.add_argument("--only", nargs="+", choices=names, help="measure these only")
    parser.add_argument(
        "--window",
        type=lambda text: None if text == "none" else int(text),
        default=WINDOW,
        metavar="N",
        help="recent values that a distribution keeps where one can choose; none: all",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found to FILE")
    chosen = parser.parse_args()
    if sys.platform != "linux":
        print("benchmarks.peers reads bytes and memory from the Linux kernel: it needs Linux")
        return 0
    began = time.monotonic()
    plan = QUICK if chosen.quick else FULL
    libraries = [lib for lib in LIBRARIES if not chosen.only or lib.name in chosen.only]
    axes = {
        axis: list(plan.axes[axis]) for axis in (plan.axes if chosen.axes is None else chosen.axes)
    }
    versions = {
        lib.package: lib.version for lib in libraries if lib.installed and lib.package != "torch"
    }
    results = Results(machine(), versions, chosen.window, axes)
    print(results.machine)
    print(", ".join(f"{name} {number}" for name, number in versions.items()), "\n", flush=True)
    for point in dict.fromkeys(point for points in axes.values() for point in points):
        _say(f"measuring: {point}")
        results.rows += _rows(libraries, point, chosen.window, plan)
    if chosen.axes is None:
        _say("measuring: ranks that differ")
        results.outcomes = _outcomes([lib for lib in libraries if lib is not BARE])
    print(tables(results))
    print(f"\nin {time.monotonic() - began:.0f} s; load of the machine now {load()}")
    if chosen.json:
        results.save(chosen.json)
    return 0


def _rows(libraries: list[Library], point: Point, window: int | None, plan: Plan) -> list[Row]:
    rows = []
    floats = 0
    for library in libraries:
        row = _row(library, point, window, floats, plan)
        if library is OURS and row.measured:
            floats = row.measured.floats
        rows.append(row)
    return rows


def _row(library: Library, point: Point, window: int | None, floats: int, plan: Plan) -> Row:
    if not library.installed:
        return Row(library.name, point, reason="not installed")
    if point.samples > library.most_samples:
        return Row(library.name, point, reason="not run")
    if library is BARE and not floats:
        return Row(library.name, point, reason=f"needs {OURS.name}")
    try:
        return Row(library.name, point, measure(library, point, window, floats, plan))
    except RuntimeError as error:
        _say(f"{library.name} failed at {point}: {error}")
        return Row(library.name, point, reason="failed")


def _outcomes(libraries: list[Library]) -> list[Outcome]:
    return [
        Outcome(
            library.name,
            case.title,
            case.truth,
            outcome(library, case) if library.installed else "not installed",
        )
        for case in CASES
        for library in libraries
    ]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
