"""The ways in which JAX runs one function on many devices, for use inside of `on_devices` tests.

    for way, run in ways().items():
        results = run(lambda x: dm.reduce_mean({"x": x}), inputs)

`inputs` is a pytree of arrays whose first dimension counts the devices; the function sees one
device's part of it, without that dimension. It must return the same on all devices, which is
checked, and is returned once, as NumPy arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

Way = Callable[[Callable[[Any], Any], Any], Any]


def mesh_of(axis_type: AxisType = AxisType.Auto, **shape: int) -> jax.sharding.Mesh:
    return jax.make_mesh(tuple(shape.values()), tuple(shape), axis_types=(axis_type,) * len(shape))


def ways(axis: str = "batch") -> dict[str, Way]:
    """Return all ways, in each of which the axis is called `axis`, or, in a bare pmap, nothing."""
    found: dict[str, Way] = {
        "bare pmap": partial(_pmap, jax.pmap),
        "pmap": partial(_pmap, partial(jax.pmap, axis_name=axis)),
        "nnx.pmap": partial(_pmap, partial(nnx.pmap, axis_name=axis)),
        "vmap": partial(_pmap, lambda f: jax.jit(jax.vmap(f, axis_name=axis))),
    }
    for axis_type in (AxisType.Auto, AxisType.Explicit):
        for check_vma in (True, False):
            name = f"shard_map, {axis_type.name}, check_vma={check_vma}"
            found[name] = partial(_shard_map, axis, axis_type, check_vma)
    return found


def _pmap(pmap: Any, function: Callable[[Any], Any], inputs: Any) -> Any:
    return jax.tree.map(one_of_equals, pmap(function)(inputs))


def _shard_map(
    axis: str, axis_type: AxisType, check_vma: bool, function: Callable[[Any], Any], inputs: Any
) -> Any:
    mesh = mesh_of(axis_type, **{axis: jax.device_count()})
    with jax.set_mesh(mesh):
        placed = jax.device_put(inputs, NamedSharding(mesh, P(axis)))
        # What a function returns for P() is the same on all devices, or `check_vma` says it is not.
        step = jax.shard_map(
            lambda part: function(jax.tree.map(lambda x: x[0], part)),
            mesh=mesh,
            in_specs=P(axis),
            out_specs=P(),
            check_vma=check_vma,
        )
        return jax.tree.map(_replicated, jax.jit(step)(placed))


def _replicated(array: jax.Array) -> Any:
    return one_of_equals(np.stack([np.asarray(shard.data) for shard in array.addressable_shards]))


def one_of_equals(rows: Any) -> Any:
    """Return one of `rows`, having seen that they are the same bit for bit."""
    rows = np.asarray(rows)
    first = rows[0]
    assert all(row.tobytes() == first.tobytes() for row in rows), rows
    return first
