"""Measurements of JAX in a process of their own, which prints what it found as JSON.

JAX learns the number of its devices before it starts, and a process that holds it must not fork.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from benchmarks.sizes import FULL, QUICK, Sizes
from metricfold.demo.virtual import virtual_devices

__all__ = ["found_in_own_process", "installed", "print_found"]


def installed(*packages: str) -> bool:
    """Tell whether all of `packages` are there."""
    return all(map(find_spec, packages))


def found_in_own_process(module: str, sizes: Sizes, devices: int = 1) -> Any:
    """Return what `module`, run on so many virtual CPU devices, hands to `print_found`."""
    quick = sizes is QUICK
    done = subprocess.run(
        [sys.executable, "-m", module, *(["--quick"] if quick else [])],
        env={
            **os.environ,
            **virtual_devices(devices),
            # Most of a quick run is spent in the compiler.
            "JAX_DISABLE_MOST_OPTIMIZATIONS": str(int(quick)),
        },
        stdout=subprocess.PIPE,
        check=True,
        timeout=600,
    )
    return json.loads(done.stdout)


def print_found(measured: Callable[[Sizes], Any]) -> None:
    """Print what `measured` finds, in the sizes that this process was asked for."""
    print(json.dumps(measured(QUICK if "--quick" in sys.argv else FULL)))
