"""`python -m benchmarks.scale`: simulate worlds of ranks, and print what a log costs in them.

python -m benchmarks.scale                          some minutes
python -m benchmarks.scale --quick                  seconds: shows that it works
python -m benchmarks.scale --json FILE              keep what was measured
python -m benchmarks.scale --from FILE --latency 5 --bandwidth 200     another network, at once
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

# Read by every library with threads of its own when it is imported: before anything else.
os.environ["OMP_NUM_THREADS"] = "1"

from benchmarks.machine import load, machine
from benchmarks.scale.measure import measure
from benchmarks.scale.model import TCP, Network
from benchmarks.scale.results import Results
from benchmarks.scale.sizes import FULL, QUICK
from benchmarks.scale.tables import tables


def main() -> int:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, in seconds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured to FILE")
    parser.add_argument("--from", type=Path, metavar="FILE", dest="file", help="measure nothing")
    parser.add_argument(
        "--latency", type=float, default=TCP.latency * 1e6, metavar="µs", help="of a message"
    )
    parser.add_argument(
        "--bandwidth", type=float, default=TCP.bandwidth * 8e-9, metavar="Gbit/s", help="of a rank"
    )
    chosen = parser.parse_args()
    if chosen.latency < 0 or chosen.bandwidth <= 0:
        parser.error("give a latency of 0 or more and a bandwidth above 0")
    network = Network(chosen.latency * 1e-6, chosen.bandwidth * 1e9 / 8)
    began = time.monotonic()
    if chosen.file:
        results = Results.load(chosen.file)
    else:
        here, _, _ = machine().partition(", torch")  # which takes no part here
        results = measure(QUICK if chosen.quick else FULL, here, _say)
    for title, table in tables(results, network).items():
        print(f"\n{title}\n\n{table}")
    if not chosen.file:
        print(f"\nin {time.monotonic() - began:.0f} s; load of the machine now {load()}")
    if chosen.json:
        results.save(chosen.json)
    return 0


def _say(text: str) -> None:
    print(f"measuring: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
