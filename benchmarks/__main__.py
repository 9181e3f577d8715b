"""`python -m benchmarks`: measure side by side and print tables.

python -m benchmarks                 everything, in ten minutes
python -m benchmarks --quick         a minute: shows that it works, not how fast it is; fails if not
python -m benchmarks log peers       subjects by name; see `benchmarks/__init__.py`
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import platform
import re
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

# Read by every library with threads of its own when it is imported: before anything else.
os.environ["OMP_NUM_THREADS"] = "1"
# The profiler, which counts collectives, else says that it has begun and ended.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from benchmarks.table import Section

_JAX = ("jax", "flax")
SUBJECTS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "imports": {},
    "update": {"a handler call each": ()},
    "samples": {"3 frozen dataclasses": ()},
    "log": {"bare all_reduce": ()},
    "axes": {},
    "sketches": {},
    "waits": {},
    "watch": {},
    "on_jax": {"an nnx Average": _JAX, "a bare lax.psum": _JAX},
    "peers": {
        "bare all_reduce": (),
        "torchmetrics": ("torchmetrics",),
        "torcheval": ("torcheval",),
        "Lightning self.log": ("lightning",),
        "Accelerate": ("accelerate",),
    },
    "scale": {"gather": (), "tree": ()},
}
"""What each subject compares with, and what must be installed for that."""


def main() -> int:
    """Measure what was asked for; 1 if something that is installed was not measured."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, in a minute")
    parser.add_argument(
        "subjects", nargs="*", metavar="SUBJECT", help=f"of {', '.join(SUBJECTS)}; all if none"
    )
    chosen = parser.parse_args()
    unknown = set(chosen.subjects) - SUBJECTS.keys()
    if unknown:
        parser.error(f"no subject {min(unknown)!r}: give some of {', '.join(SUBJECTS)}")
    print(_machine(), flush=True)
    budgets = missed = 0
    wrong: list[str] = []
    for subject in chosen.subjects or SUBJECTS:
        print(f"measuring: {subject}", file=sys.stderr, flush=True)
        began = time.monotonic()
        sections = importlib.import_module(f"benchmarks.{subject}").measure(quick=chosen.quick)
        print(*(f"\n{section}" for section in sections), sep="\n")
        print(f"\n{subject}: {time.monotonic() - began:.0f} s, load {_load()}", flush=True)
        verdicts = [row.verdict for section in sections for row in section.rows if row.verdict]
        budgets, missed = budgets + len(verdicts), missed + verdicts.count("MISS")
        wrong += complaints(SUBJECTS[subject], sections)
    print(f"\n{budgets - missed} of {budgets} budgets met")
    for complaint in wrong:
        print(complaint, file=sys.stderr)
    return 1 if wrong else 0


def complaints(contenders: Mapping[str, Sequence[str]], sections: Sequence[Section]) -> list[str]:
    """Return what is wrong with the sections of a subject; empty if nothing is."""
    found = []
    for section in sections:
        for row in section.rows:
            least = 0 if row.budget and row.budget.limit == 0 else math.ulp(0)
            if not least <= row.figure < math.inf:
                found.append(f"{row.what}: the figure is {row.figure}")
        found += [f"{line[0]}: failed" for line in section.lines if "failed" in line]
    found += [f"{section.title}: no rows" for section in sections if not section.cells()]
    text = "\n".join(map(str, sections))
    for contender, packages in contenders.items():
        if all(map(find_spec, packages)) and contender not in text:
            found.append(f"{contender}: not measured")
    return found


def _machine() -> str:
    """Return what figures are measured on: the machine and what matters of its software, in words."""
    return (
        f"{platform.system()} {platform.machine()}, {_processor()}, {os.cpu_count()} cores, "
        f"load {_load()}; Python {platform.python_version()}, NumPy {_version('numpy')}, "
        f"torch {_version('torch')} (gloo, 1 thread a rank), jax {_version('jax')}"
    )


def _load() -> str:
    """Return how many processes wanted to run in the last minute."""
    return f"{os.getloadavg()[0]:.1f}"


def _version(package: str) -> str:
    # Not imported: a process that holds JAX must not fork, and ranks are about to be.
    return version(package) if find_spec(package) else "none"


def _processor() -> str:
    about = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", about.read_text() if about.exists() else "")
    return model[1] if model else platform.processor()


if __name__ == "__main__":
    sys.exit(main())
