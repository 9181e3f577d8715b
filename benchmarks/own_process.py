"""Measurements of JAX in a process of their own, which prints what it found as JSON.

JAX learns the number of its devices before it starts, and a process that holds it must not fork.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from metricfold.demo.virtual import virtual_devices

__all__ = ["found_in_own_process", "print_found"]


def found_in_own_process(module: str, *, quick: bool, devices: int = 1) -> Any:
    """Return what `module`, run on so many virtual CPU devices, hands to `print_found`."""
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


def print_found(measured: Callable[[bool], Any]) -> None:
    """Print what `measured`, told whether to be quick, finds."""
    print(json.dumps(measured("--quick" in sys.argv)))
