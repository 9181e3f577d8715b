"""JAX: metrics reduced over devices in the compiled step, and taken in outside of one.

All of it runs in a process of its own, which prints what it found as JSON: JAX learns the number of its
devices before it starts, and a process that holds it must not fork.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from benchmarks.table import Section, at_most, cost, seconds_of, speedup
from benchmarks.timing import interleaved
from metricfold.demo.framework import virtual_devices

_DEVICES, _SAMPLES = 4, 32
_BUDGETS = {100: at_most(1.1)}
"""Of the packed result, by number of metrics."""
_LEAVES, _DICT, _PACKED, _BARE = "lax.pmean each", "as a dict", "packed", "a bare lax.psum"
_OURS, _NNX = "ours", "an nnx Average"


def measure(*, quick: bool) -> list[Section]:
    """Return the cost of a step that does nothing but reduce its metrics, and of updates outside."""
    if not (find_spec("jax") and find_spec("flax")):
        return []
    environment = {
        **os.environ,
        **virtual_devices(_DEVICES),
        # Most of a quick run is spent in the compiler.
        "JAX_DISABLE_MOST_OPTIMIZATIONS": str(int(quick)),
    }
    command = [sys.executable, "-m", "benchmarks.on_jax", *(["--quick"] if quick else [])]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, timeout=600)
    found = json.loads(done.stdout)
    first, further = found["update"]
    outside = Section("JAX: update outside of jit, a loss of one dataset")
    outside.rows = [
        seconds_of("the first", [first], "s", at_most(1)),
        cost("another", further[_OURS], _NNX, further[_NNX], at_most(5)),
    ]
    steps = Section(f"JAX: a step that means metrics over {_DEVICES} virtual CPU devices")
    for number, times in found["steps"].items():
        what, packed, budget = f"{number} metrics", times[_PACKED], _BUDGETS.get(int(number))
        steps.rows += [
            cost(f"{what}, packed", packed, f"{_BARE} of a vector", times[_BARE], budget),
            speedup(f"{what}, packed", packed, _LEAVES, times[_LEAVES]),
            speedup(f"{what}, as a dict", times[_DICT], _LEAVES, times[_LEAVES]),
        ]
    return [outside, steps]


# -- In the process with JAX ---------------------------------------------------------------------


def _update(rounds: int) -> tuple[float, dict[str, list[float]]]:
    """Return the seconds of the first update, and of further ones until their numbers are there."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from metricfold.jax import DeviceAccumulator

    losses: Any = jnp.linspace(0.5, 1.5, _SAMPLES)
    kept = [DeviceAccumulator({"loss": "mean"})]
    average = nnx.metrics.Average("loss")

    def ours() -> None:
        kept[0] = jax.block_until_ready(kept[0].update("loss", losses))

    def theirs() -> None:
        average.update(loss=losses)
        jax.block_until_ready((average.total[...], average.count[...]))

    began = time.perf_counter()
    ours()
    first = time.perf_counter() - began
    return first, interleaved({_OURS: ours, _NNX: theirs}, rounds)


def _steps(number: int, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of a step of so many metrics, for each way to give them back."""
    import jax
    from jax import lax
    from jax.sharding import PartitionSpec as P

    from metricfold.jax import DataParallel, DeviceMeshManager, DistributedMetrics

    mesh = DeviceMeshManager().create_data_parallel_mesh()
    sharding = DataParallel().create_data_parallel_sharding(mesh)
    values = jax.device_put(jax.numpy.ones((_DEVICES, number)), sharding)
    mean = DistributedMetrics.reduce_mean_static

    def named(mine: Any) -> dict[str, Any]:
        return {f"metric_{i}": mine[i] for i in range(number)}

    def step(reduce: Callable[[Any], Any]) -> Callable[[], object]:
        """Return a step that reduces the vector of each device's values."""
        step = jax.shard_map(lambda x: reduce(x[0]), mesh=mesh, in_specs=P("data"), out_specs=P())
        compiled = jax.jit(step).lower(values).compile()
        return lambda: jax.block_until_ready(compiled(values))

    ways: dict[str, Callable[[Any], Any]] = {
        _BARE: lambda mine: lax.psum(mine, "data"),
        _PACKED: lambda mine: mean(named(mine), "data", packed=True),
        _DICT: lambda mine: mean(named(mine), "data"),
        _LEAVES: lambda mine: jax.tree.map(lambda x: lax.pmean(x, "data"), named(mine)),
    }
    return interleaved({way: step(reduce) for way, reduce in ways.items()}, rounds)


def _main(*, quick: bool) -> None:
    rounds, numbers = (3, (5,)) if quick else (25, (20, 100))
    update = _update(rounds)  # first, so that nothing is warm
    steps = {number: _steps(number, rounds) for number in numbers}
    print(json.dumps({"update": update, "steps": steps}))


if __name__ == "__main__":
    _main(quick="--quick" in sys.argv)
