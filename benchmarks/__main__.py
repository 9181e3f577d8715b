"""`python -m benchmarks`: measure everything side by side and print the table.

python -m benchmarks              two or three minutes
python -m benchmarks --quick      seconds: shows that it works, not how fast it is; fails if not
python -m benchmarks --only log   sections by name
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from pathlib import Path

# Read by every library with threads of its own when it is imported: before anything else.
os.environ["OMP_NUM_THREADS"] = "1"

from benchmarks.complete import complaints
from benchmarks.machine import load, machine
from benchmarks.sizes import FULL, QUICK
from benchmarks.table import Section, draw

_SUBJECTS = {
    "import": "imports",
    "update": "update",
    "sample": "samples",
    "log": "reduction",
    "torch": "accumulation_torch",
    "devices": "devices",
    "accumulate": "accumulation",
}


def main() -> int:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, in seconds")
    parser.add_argument("--only", nargs="+", choices=_SUBJECTS, help="measure these only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE too")
    chosen = parser.parse_args()
    sizes = QUICK if chosen.quick else FULL
    began = time.monotonic()
    print(machine())
    sections: list[Section] = []
    for subject in chosen.only or _SUBJECTS:
        print(f"measuring: {subject}", file=sys.stderr, flush=True)
        sections += importlib.import_module(f"benchmarks.{_SUBJECTS[subject]}").measure(sizes)
    print(draw(sections))
    missed = [row for section in sections for row in section.rows if row.verdict == "MISS"]
    budgets = sum(row.budget is not None for section in sections for row in section.rows)
    print(
        f"\n{budgets - len(missed)} of {budgets} budgets met, in "
        f"{time.monotonic() - began:.0f} s; load of the machine now {load()}"
    )
    if chosen.json:
        found = [
            {"section": section.title, **row.as_json()}
            for section in sections
            for row in section.rows
        ]
        chosen.json.write_text(json.dumps(found, indent=1))
    wrong = [] if chosen.only else complaints(sections)
    for complaint in wrong:
        print(complaint, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
