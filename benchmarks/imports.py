"""How long `import metricfold` takes once NumPy is there."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile

from benchmarks.sizes import Sizes
from benchmarks.table import Section, amount, at_most

__all__ = ["measure"]

_TIMED = """
import sys, time
import numpy
began = time.perf_counter()
import metricfold
print(time.perf_counter() - began)
assert not {"torch", "jax", "rich", "wandb", "tensorboard"} & sys.modules.keys()
"""


def measure(sizes: Sizes) -> list[Section]:
    """Return the median over fresh interpreters."""
    with tempfile.TemporaryDirectory() as folder:
        # As installed: compiled once, by the first of them, which does not count.
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": folder}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        times = [_import(environment) for _ in range(sizes.imports + 1)][1:]
    section = Section("import metricfold, on top of NumPy")
    milliseconds = statistics.median(times) * 1e3
    section.rows.append(amount("a fresh interpreter", milliseconds, "ms", budget=at_most(100)))
    return [section]


def _import(environment: dict[str, str]) -> float:
    command = [sys.executable, "-c", _TIMED]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(done.stdout)
