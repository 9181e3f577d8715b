"""What figures were measured on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path


def machine() -> str:
    """Return the machine and what matters of its software, in words."""
    import numpy as np
    import torch

    return (
        f"{platform.system()} {platform.machine()}, {_processor()}, {os.cpu_count()} cores, "
        f"load {load()}; Python {platform.python_version()}, NumPy {np.__version__}, "
        f"torch {torch.__version__} (gloo, 1 thread a rank), jax {_version('jax')}"
    )


def load() -> str:
    """Return how many processes wanted to run in the last minute."""
    return f"{os.getloadavg()[0]:.1f}"


def _version(package: str) -> str:
    # Not imported: a process that holds JAX must not fork, and ranks are about to be.
    return version(package) if find_spec(package) else "none"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
