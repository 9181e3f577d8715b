"""Run tests on several JAX devices: in a process of its own, killed if it hangs.

    @on_devices(4, 8)
    def test_a_sum_over_devices() -> None:
        import jax
        ...

The body runs where JAX has as many (virtual CPU) devices as asked for; once for each number. JAX
must know that number before it starts, and a process that holds JAX cannot fork without a warning,
so none of this happens in the process of pytest. Starting JAX takes seconds: one process per number
of devices serves all tests.

Test modules import JAX inside of functions, for pytest imports the modules. Where JAX or Flax is not
installed, the tests are skipped.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
from jax_processes import World, run_in

from metricfold.demo.framework import virtual_devices

QUICKLY = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
}
"""Options of XLA: code that runs once need not be fast; to compile it is what takes the time."""
FAST = {
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
    "xla_cpu_use_fusion_emitters": True,
    "xla_cpu_parallel_codegen_split_count": 32,
}
"""What they are for users: give it as ``compiler_options`` where a promise rests on the code."""


def compile_quickly() -> None:
    """Have all processes that start from here on compile quickly, unless the user says how."""
    flags = (f"--{name}={str(value).lower()}" for name, value in QUICKLY.items())
    os.environ.setdefault("XLA_FLAGS", " ".join(flags))


def _of_devices(devices: int) -> World:
    return World(1, _begin, devices)


def _begin(rank: int, devices: int) -> tuple[()]:
    os.environ |= virtual_devices(devices)
    return ()


def run_devices(
    function: Callable[..., Any], devices: int, /, *args: Any, timeout: float = 150.0, **kwargs: Any
) -> Any:
    """Return what ``function(*args, **kwargs)`` returned where JAX has so many devices.

    Args:
        function: importable, so defined at the top of a test module.
        devices: how many.
        args, kwargs: passed on; they and the result travel as pickles.
        timeout: seconds until the process is killed.
    """
    if not all(map(find_spec, ("jax", "flax"))):
        pytest.skip("needs JAX and Flax")
    return run_in(_of_devices, devices, function, *args, timeout=timeout, **kwargs)[0]


def on_devices(*counts: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make the body of a test run on so many devices; it may take ``devices`` as an argument."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        takes = inspect.signature(test).parameters

        @functools.wraps(test)
        def outside(devices: int, **kwargs: Any) -> None:
            if "devices" in takes:
                kwargs["devices"] = devices
            run_devices(test, devices, **kwargs)

        others = [parameter for name, parameter in takes.items() if name != "devices"]
        own = inspect.Parameter("devices", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        outside.__signature__ = inspect.Signature([own, *others])  # type: ignore[attr-defined]
        return pytest.mark.parametrize("devices", counts)(outside)

    return decorate
