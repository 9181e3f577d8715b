"""Metrics reduced over JAX devices, inside the compiled step: how they are given back is what costs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

from benchmarks.own_process import found_in_own_process, print_found
from benchmarks.table import Section, at_most, cost, speedup
from benchmarks.timing import interleaved

_DEVICES = 4
_BUDGETS = {100: at_most(1.1)}
"""Of the packed result, by number of metrics."""
_LEAVES, _DICT, _PACKED, _BARE = "lax.pmean each", "as a dict", "packed", "a bare lax.psum"


def measure(*, quick: bool) -> list[Section]:
    """Return the cost of a step that does nothing but reduce its metrics; nothing without JAX."""
    if not (find_spec("jax") and find_spec("flax")):
        return []
    measured = found_in_own_process("benchmarks.mesh_jax", quick=quick, devices=_DEVICES)
    section = Section(f"JAX: a step that means metrics over {_DEVICES} virtual CPU devices")
    for number, times in measured.items():
        what, packed, budget = f"{number} metrics", times[_PACKED], _BUDGETS.get(int(number))
        section.rows += [
            cost(f"{what}, packed", packed, f"{_BARE} of a vector", times[_BARE], budget),
            speedup(f"{what}, packed", packed, _LEAVES, times[_LEAVES]),
            speedup(f"{what}, as a dict", times[_DICT], _LEAVES, times[_LEAVES]),
        ]
    return [section]


# -- In the process with the devices -------------------------------------------------------------


def _found(quick: bool) -> dict[int, dict[str, list[float]]]:
    """Return the seconds of all ways, round by round, by number of metrics."""
    return {number: _run(number, 3 if quick else 25) for number in ((5,) if quick else (20, 100))}


def _run(number: int, rounds: int) -> dict[str, list[float]]:
    import jax

    from metricfold.jax import DataParallel, DeviceMeshManager

    mesh = DeviceMeshManager().create_data_parallel_mesh()
    sharding = DataParallel().create_data_parallel_sharding(mesh)
    values = jax.device_put(jax.numpy.ones((_DEVICES, number)), sharding)
    steps = {way: _compiled(reduce, mesh, values) for way, reduce in _ways().items()}
    return interleaved({way: partial(_wait, step, values) for way, step in steps.items()}, rounds)


def _ways() -> dict[str, Callable[[Any], Any]]:
    """Return what each way makes, on each device, of the vector of its values."""
    import jax
    from jax import lax

    from metricfold.jax import DistributedMetrics

    mean = DistributedMetrics.reduce_mean_static

    def named(values: Any) -> dict[str, Any]:
        return {f"metric_{i}": values[i] for i in range(len(values))}

    return {
        _BARE: lambda values: lax.psum(values, "data"),
        _PACKED: lambda values: mean(named(values), "data", packed=True),
        _DICT: lambda values: mean(named(values), "data"),
        _LEAVES: lambda values: jax.tree.map(lambda x: lax.pmean(x, "data"), named(values)),
    }


def _compiled(reduce: Callable[[Any], Any], mesh: Any, values: Any) -> Any:
    import jax
    from jax.sharding import PartitionSpec as P

    step = jax.shard_map(lambda mine: reduce(mine[0]), mesh=mesh, in_specs=P("data"), out_specs=P())
    return jax.jit(step).lower(values).compile()


def _wait(step: Any, values: Any) -> None:
    import jax

    jax.block_until_ready(step(values))


if __name__ == "__main__":
    print_found(_found)
