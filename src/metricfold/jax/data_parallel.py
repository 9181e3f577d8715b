"""`DataParallel`: batches split over devices, and gradients brought together."""

from __future__ import annotations

import math
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from metricfold.jax.axes import DEFAULT_AXIS, AxisName, bound_axes, is_bound, resolve_axes
from metricfold.jax.reduction import reduce_arrays, require_op
from metricfold.jax.trees import Leaf, flatten
from metricfold.jax.values import as_array

__all__ = ["DataParallel"]


class DataParallel:
    """Splits batches over a mesh, and averages or adds up gradients over an axis."""

    def create_data_parallel_sharding(self, mesh: Mesh, data_axis: str = "data") -> NamedSharding:
        """Return the sharding that splits the first dimension over `data_axis` of `mesh`.

        Raises:
            ValueError: the mesh has no such axis.
        """
        if data_axis not in mesh.axis_names:
            raise ValueError(
                f"the mesh has no axis {data_axis!r}: it has {', '.join(map(repr, mesh.axis_names))}"
            )
        return NamedSharding(mesh, PartitionSpec(data_axis))

    def shard_batch(self, batch: Any, sharding: NamedSharding) -> Any:
        """Return `batch` with its arrays split over the devices of `sharding`.

        Args:
            batch: a pytree of arrays and numbers, such as a dict. Numbers go to all devices.
            sharding: such as `create_data_parallel_sharding` returns. If it spans several
                processes, each of them gives its own part of the batch.

        Raises:
            ValueError: an array does not divide evenly; nothing has been moved then.
            TypeError: something in the batch is no array of numbers.
        """
        leaves, structure = flatten(batch)
        arrays = [_batch_array(leaf) for leaf in leaves]
        if sharding.is_fully_addressable:  # else JAX compares what the processes give
            for leaf, array in zip(leaves, arrays, strict=True):
                _require_even(leaf, array.shape, sharding)
        everywhere = NamedSharding(sharding.mesh, PartitionSpec())
        with jax.transfer_guard("allow"):  # which is what the call is for
            placed = [_place(array, sharding if array.ndim else everywhere) for array in arrays]
        return jax.tree_util.tree_unflatten(structure, placed)

    def all_reduce_gradients(
        self,
        gradients: Any,
        reduce_type: Literal["mean", "sum"] = "mean",
        axis_name: AxisName = DEFAULT_AXIS,
    ) -> Any:
        """Return the mean, or the sum, of gradients over devices, each in its own type.

        For use where each device has gradients of its own part of the batch: inside ``pmap``, or
        ``shard_map`` with ``check_vma=False``. Under plain ``jit`` no axis is bound, gradients are
        already those of the whole batch, and they come back as they are. In a ``shard_map`` that
        checks (``check_vma=True``), JAX adds up the gradients of parameters that are the same on
        all devices by itself: average the loss there (``jax.lax.pmean``), and nothing more is
        needed.

        Args:
            gradients: a pytree of arrays.
            reduce_type: ``"mean"`` or ``"sum"``.
            axis_name: see `DistributedMetrics`; the default and ``None`` leave gradients as they
                are where no axis is bound.

        Raises:
            NameError: an axis that is named is not bound.
            ValueError: `reduce_type` is neither of the two.
        """
        require_op(reduce_type, "reduce_type", ("mean", "sum"))
        if axis_name == DEFAULT_AXIS and not is_bound(DEFAULT_AXIS) and not bound_axes():
            return gradients
        axes = resolve_axes(axis_name)
        if not axes:
            return gradients
        leaves, structure = flatten(gradients)
        results = [leaf.value for leaf in leaves]
        # Integer parameters have gradients of a type without values; None stands for none at all.
        real = [
            i for i, x in enumerate(results) if x is not None and _dtype(x) != jax.dtypes.float0
        ]
        arrays = [as_array(results[i], leaves[i].path("gradients")) for i in real]
        with jax.transfer_guard("allow"):  # of constants, where nothing is compiled
            reduced = reduce_arrays(arrays, [reduce_type] * len(arrays), axes).arrays()
        for i, array, given in zip(real, reduced, arrays, strict=True):
            results[i] = array.astype(given.dtype)
        return jax.tree_util.tree_unflatten(structure, results)


def _dtype(value: Any) -> Any:
    return getattr(value, "dtype", None)


def _batch_array(leaf: Leaf) -> Any:
    """Return a batch's item as an array, on the host if it is there: it is split before it moves."""
    if isinstance(leaf.value, jax.Array):
        return leaf.value
    array = np.asarray(leaf.value)
    if not any(jax.numpy.issubdtype(array.dtype, kind) for kind in (np.number, np.bool_)):
        raise TypeError(
            f"{leaf.path('batch')} is of type {type(leaf.value).__name__}, which no device holds: "
            "take it out of the batch first"
        )
    return array


def _place(array: Any, sharding: NamedSharding) -> Any:
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    return jax.make_array_from_process_local_data(sharding, np.asarray(array))


def _require_even(leaf: Leaf, shape: tuple[int, ...], sharding: NamedSharding) -> None:
    for dimension, axes in zip(range(len(shape)), sharding.spec, strict=False):
        names = (axes,) if isinstance(axes, str) else tuple(axes or ())
        parts = math.prod(sharding.mesh.shape[name] for name in names)
        if shape[dimension] % parts:
            size = shape[dimension]
            raise ValueError(
                f"{leaf.path('batch')} has {size} rows (dimension {dimension} of shape {shape}), "
                f"which {parts} devices of the axis {', '.join(map(repr, names))} cannot share "
                f"evenly: {size} = {parts} * {size // parts} + {size % parts}. Leave the last batch "
                f"out (drop_last=True), or pad it to {size + -size % parts} rows of which the added "
                "ones have weight 0"
            )
