"""Metrics reduced over JAX devices, inside the compiled step: how they are given back is what costs."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from benchmarks.own_process import found_in_own_process, installed, print_found
from benchmarks.sizes import Sizes
from benchmarks.table import Section, amount, at_most, cost, speedup
from benchmarks.timing import interleaved

__all__ = ["measure"]

_DEVICES = 4
_BUDGETS = {100: at_most(1.1)}
"""Of the packed result, by number of metrics."""
_LEAVES, _DICT, _PACKED, _BARE = "lax.pmean each", "dict", "packed", "a bare lax.psum"


@dataclass(frozen=True, slots=True)
class _Measured:
    """What one way to reduce some metrics costs: seconds a round, and collectives in the program."""

    run: list[float]
    read: list[float]
    compiling: list[float]
    collectives: int


def measure(sizes: Sizes) -> list[Section]:
    """Return the cost of a step that does nothing but reduce its metrics; nothing without JAX."""
    if not installed("jax", "flax"):
        return []
    measured = found_in_own_process("benchmarks.devices", sizes, _DEVICES)
    section = Section(f"JAX: a step that means metrics over {_DEVICES} virtual CPU devices")
    section.notes.append(
        "XLA joins the collectives of all leaves into one, which still costs for each array"
    )
    for number, found in measured.items():
        section.rows += _rows(int(number), {way: _Measured(**it) for way, it in found.items()})
    return [section]


def _rows(number: int, found: dict[str, _Measured]) -> list[Any]:
    bare, packed, dicts, leaves = (found[way] for way in (_BARE, _PACKED, _DICT, _LEAVES))
    what = f"{number} metrics"
    vector = f"{_BARE} of a vector"
    return [
        cost(f"{what}, packed", packed.run, vector, bare.run, _BUDGETS.get(number)),
        cost(f"{what}, packed, read on the host", packed.read, f"{vector}, read", bare.read),
        speedup(f"{what}, packed, read on the host", packed.read, f"{_LEAVES}, read", leaves.read),
        speedup(f"{what}, packed", packed.run, _LEAVES, leaves.run),
        speedup(f"{what}, as a dict", dicts.run, _LEAVES, leaves.run),
        speedup(f"{what}, packed: to compile", packed.compiling, _LEAVES, leaves.compiling),
        speedup(f"{what}, as a dict: to compile", dicts.compiling, _LEAVES, leaves.compiling),
        *(
            amount(f"{what}, {way}: collectives in the program", found[way].collectives, "")
            for way in (_PACKED, _DICT, _LEAVES)
        ),
    ]


# -- In the process with the devices -------------------------------------------------------------


def _found(sizes: Sizes) -> dict[int, dict[str, dict[str, Any]]]:
    """Return the measurements of all ways, by number of metrics."""
    return {
        number: {way: asdict(it) for way, it in _measure(number, sizes).items()}
        for number in sizes.device_metrics
    }


def _measure(number: int, sizes: Sizes) -> dict[str, _Measured]:
    import jax

    from metricfold.jax import DataParallel, DeviceMeshManager

    mesh = DeviceMeshManager().create_data_parallel_mesh()
    sharding = DataParallel().create_data_parallel_sharding(mesh)
    values = jax.device_put(jax.numpy.ones((_DEVICES, number)), sharding)
    compiling: dict[str, list[float]] = {way: [] for way in _ways()}
    steps: dict[str, Any] = {}
    for _ in range(sizes.compilations):
        for way, reduce in _ways().items():
            jax.clear_caches()
            began = time.perf_counter()
            steps[way] = _compiled(reduce, mesh, values)
            compiling[way].append(time.perf_counter() - began)

    run = {way: partial(_wait, step, values) for way, step in steps.items()}
    read = {way: partial(_read, step, values) for way, step in steps.items()}
    running, reading = interleaved(run, sizes.rounds), interleaved(read, sizes.rounds)
    return {
        way: _Measured(
            running[way],
            reading[way],
            compiling[way],
            len(re.findall(r" all-reduce(?:-start)?\(", step.as_text())),
        )
        for way, step in steps.items()
    }


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


def _read(step: Any, values: Any) -> Any:
    """Return the metrics as a training loop logs them: on the host."""
    import jax

    from metricfold.jax import PackedMetrics

    result = step(values)
    return result.unpack() if isinstance(result, PackedMetrics) else jax.device_get(result)


if __name__ == "__main__":
    print_found(_found)
