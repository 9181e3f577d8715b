"""Metrics reduced over JAX devices, inside the compiled step: how they are given back is what costs."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

from benchmarks.own_process import found_in_own_process, print_found
from benchmarks.table import Row, Section, amount, at_most, cost, speedup
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
    section.notes.append(
        "XLA joins the collectives of all leaves into one, which still costs for each array"
    )
    for number, found in measured.items():
        section.rows += _rows(int(number), **found)
    return [section]


_Times = dict[str, list[float]]


def _rows(
    number: int, run: _Times, read: _Times, compiling: _Times, collectives: dict[str, int]
) -> list[Row]:
    what = f"{number} metrics"
    packed, vector = f"{what}, {_PACKED}", f"{_BARE} of a vector"
    return [
        cost(packed, run[_PACKED], vector, run[_BARE], _BUDGETS.get(number)),
        cost(f"{packed}, read on the host", read[_PACKED], f"{vector}, read", read[_BARE]),
        speedup(f"{packed}, read on the host", read[_PACKED], f"{_LEAVES}, read", read[_LEAVES]),
        *(
            speedup(f"{what}, {way}{of}", times[way], _LEAVES, times[_LEAVES])
            for of, times in (("", run), (": to compile", compiling))
            for way in (_PACKED, _DICT)
        ),
        *(
            amount(f"{what}, {way}: collectives in the program", collectives[way], "")
            for way in (_PACKED, _DICT, _LEAVES)
        ),
    ]


# -- In the process with the devices -------------------------------------------------------------


def _found(quick: bool) -> dict[int, dict[str, Any]]:
    """Return the seconds of all ways, round by round, by number of metrics."""
    return {number: _measure(number, quick) for number in ((5,) if quick else (20, 100))}


def _measure(number: int, quick: bool) -> dict[str, Any]:
    import jax

    from metricfold.jax import DataParallel, DeviceMeshManager

    mesh = DeviceMeshManager().create_data_parallel_mesh()
    sharding = DataParallel().create_data_parallel_sharding(mesh)
    values = jax.device_put(jax.numpy.ones((_DEVICES, number)), sharding)
    compiling: dict[str, list[float]] = {way: [] for way in _ways()}
    steps: dict[str, Any] = {}
    for _ in range(1 if quick else 5):
        for way, reduce in _ways().items():
            jax.clear_caches()
            began = time.perf_counter()
            steps[way] = _compiled(reduce, mesh, values)
            compiling[way].append(time.perf_counter() - began)
    rounds = 3 if quick else 25
    return {
        "run": interleaved({way: partial(_wait, it, values) for way, it in steps.items()}, rounds),
        "read": interleaved({way: partial(_read, it, values) for way, it in steps.items()}, rounds),
        "compiling": compiling,
        "collectives": {
            way: len(re.findall(r" all-reduce(?:-start)?\(", step.as_text()))
            for way, step in steps.items()
        },
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
