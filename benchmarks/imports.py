"""How long `import metricfold` takes once NumPy is there."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

from benchmarks.table import Section, at_most, seconds_of

_TIMED = """
import sys, time
import numpy
began = time.perf_counter()
import metricfold
print(time.perf_counter() - began)
assert not {"torch", "jax", "rich", "wandb", "tensorboard"} & sys.modules.keys()
"""


def measure(*, quick: bool) -> list[Section]:
    """Return the median over new interpreters."""
    with tempfile.TemporaryDirectory() as folder:
        # As installed: compiled once, by the first of them, which does not count.
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": folder}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        times = [_import(environment) for _ in range(2 if quick else 12)][1:]
    row = seconds_of("a new interpreter", times, "ms", at_most(100))
    return [Section("import metricfold, on top of NumPy", [row])]


def _import(environment: dict[str, str]) -> float:
    command = [sys.executable, "-c", _TIMED]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(done.stdout)
