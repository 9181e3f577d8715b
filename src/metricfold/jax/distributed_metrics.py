"""`DistributedMetrics`: metrics reduced over devices, inside the compiled step.

    dm = DistributedMetrics()

    @jax.pmap
    def eval_step(params, batch):
        metrics = {"loss": loss(params, batch), "samples": len(batch["x"])}
        return dm.reduce_custom(metrics, {"samples": "sum"})

There is no state and there are no options: an instance is as good as the class. Each method has a second
name, which ends in ``_static``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from metricfold.jax.axes import DEFAULT_AXIS, AxisName, resolve_axes
from metricfold.jax.collectives import all_gather, axes_size
from metricfold.jax.packed import PackedMetrics, pack
from metricfold.jax.reduction import reduce_arrays, require_op
from metricfold.jax.trees import ABSENT, PARTS, Leaf, Said, flatten, weights_of
from metricfold.jax.values import as_array, is_readable

__all__ = ["DistributedMetrics"]


class DistributedMetrics(nnx.Module):
    """Gathers and reduces metrics over the devices of a ``pmap``, ``shard_map`` or ``vmap``.

    All methods but `collect_from_devices` are called inside the mapped function. They take:

    * ``metrics``: a dict of numbers and arrays of numbers, nested at will, or any other pytree, such as
      a list or a dataclass. Python and NumPy numbers count once per device, as in `jax.lax.psum`.
    * ``axis_name``: the axis, or a tuple of axes, to reduce over. The default, ``"batch"``, also
      stands for the one axis that is bound under another name, or under none, as in a bare
      ``@jax.pmap``. ``None`` stands for all axes of ``pmap`` and ``shard_map``; under plain
      ``jit``, where values are already those of the whole batch, these are none and values stay.
    * ``packed``: return a `PackedMetrics`, which is one array, in place of a dict.

    The reductions propagate NaN. Means and sums are computed, and given back, in at least 32 bits:
    float16, bfloat16 and small integers would overflow. A mean of integers is a float; a maximum
    or minimum keeps its type. Small metrics travel together: one collective for all sums and means
    of a type, one for all extrema.

    Raises:
        NameError: the axis is not bound.
        TypeError: a value is no number.
        ValueError: an integer is too large for its JAX type, or what the methods say.
    """

    def __init__(self) -> None:
        super().__init__()

    @staticmethod
    def all_gather(metrics: dict[str, Any], axis_name: AxisName = DEFAULT_AXIS) -> dict[str, Any]:
        """Return the values of all devices on each: arrays with a new first dimension.

        Over several axes there is still one new dimension, whose last axis varies fastest.
        """
        leaves, structure = flatten(metrics)
        arrays = [as_array(leaf.value, leaf.path("metrics")) for leaf in leaves]
        with jax.transfer_guard("allow"):  # of constants, where nothing is compiled
            gathered = all_gather(arrays, resolve_axes(axis_name))
        return jax.tree_util.tree_unflatten(structure, gathered)  # type: ignore[no-any-return]

    all_gather_static = all_gather

    @staticmethod
    def reduce_mean(
        metrics: dict[str, Any],
        axis_name: AxisName = DEFAULT_AXIS,
        *,
        weights: Any = None,
        packed: bool = False,
    ) -> Any:
        """Return the mean over devices, of each element of each metric.

        Args:
            metrics: see `DistributedMetrics`.
            axis_name: see `DistributedMetrics`.
            weights: how much each device counts, such as its number of samples that are not
                padding: the result is Σwx / Σw. A number for all metrics, an array for metrics of
                its shape, or a tree like that of the metrics. What has weight 0 contributes
                nothing, not even a NaN; where all weights are 0, the result is NaN.
            packed: see `DistributedMetrics`.

        Raises:
            ValueError: a weight has another shape than its metric, or a metric has none.
        """
        return _reduce(metrics, "mean", axis_name, weights=weights, packed=packed)

    reduce_mean_static = reduce_mean

    @staticmethod
    def reduce_sum(
        metrics: dict[str, Any], axis_name: AxisName = DEFAULT_AXIS, *, packed: bool = False
    ) -> Any:
        """Return the sum over devices, of each element of each metric."""
        return _reduce(metrics, "sum", axis_name, packed=packed)

    reduce_sum_static = reduce_sum

    @staticmethod
    def reduce_max(
        metrics: dict[str, Any], axis_name: AxisName = DEFAULT_AXIS, *, packed: bool = False
    ) -> Any:
        """Return the largest value over devices, of each element of each metric.

        It has no derivative: a gradient through it is zero.
        """
        return _reduce(metrics, "max", axis_name, packed=packed)

    reduce_max_static = reduce_max

    @staticmethod
    def reduce_min(
        metrics: dict[str, Any], axis_name: AxisName = DEFAULT_AXIS, *, packed: bool = False
    ) -> Any:
        """Return the smallest value over devices, of each element of each metric.

        It has no derivative: a gradient through it is zero.
        """
        return _reduce(metrics, "min", axis_name, packed=packed)

    reduce_min_static = reduce_min

    @staticmethod
    def reduce_custom(
        metrics: dict[str, Any],
        reduce_fn: Any = None,
        axis_name: AxisName = DEFAULT_AXIS,
        *,
        packed: bool = False,
    ) -> Any:
        """Return each metric reduced by an op of its own.

        Args:
            metrics: see `DistributedMetrics`.
            reduce_fn: for each name ``"mean"``, ``"sum"``, ``"max"``, ``"min"``, or ``None`` to
                leave the value as it is, whatever it is. It may be nested like the metrics, and an op
                for a dict holds for all in it. Names that it lacks take the mean; names that the metrics
                lack are ignored.
            axis_name: see `DistributedMetrics`.
            packed: see `DistributedMetrics`; then no op can be ``None``.

        Raises:
            ValueError: an op is unknown.
        """
        return _reduce(metrics, _ops(reduce_fn), axis_name, packed=packed)

    reduce_custom_static = reduce_custom

    @staticmethod
    def collect_from_devices(metrics: dict[str, Any]) -> dict[str, Any]:
        """Return, outside the mapped function, lists of the values of all devices.

        Args:
            metrics: what the mapped function returned, the first dimension of each array being
                that of the devices. Read in one transfer. Values without dimensions, and what is
                no array, stay as they are.

        Returns:
            The same dict with a list for each array, of Python numbers, or of NumPy arrays for
            metrics with a shape.

        Raises:
            TypeError: `metrics` is no dict, such as ``(params, metrics)``, or is traced.
            ValueError: an array lives partly on devices of other processes.
            RuntimeError: an array was donated or deleted.
        """
        return _collect(metrics)

    collect_from_devices_static = collect_from_devices


def _reduce(
    metrics: Any, ops: str | Said, axis_name: AxisName, *, weights: Any = None, packed: bool = False
) -> Any:
    """Reduce a tree of metrics, all by one op or each by that which a second tree has for it."""
    # Packed metrics are read on the host, where no variable stands for a number.
    leaves, structure = flatten(metrics, whole=packed)
    results = [leaf.value for leaf in leaves]
    chosen = [ops if isinstance(ops, str) else _op(ops, leaf) for leaf in leaves]
    if packed and None in chosen:
        raise ValueError(
            f"{leaves[chosen.index(None)].path('metrics')} is to stay as it is on each device, but packed "
            "metrics hold what all devices agree on: take it out, or give it an op"
        )
    axes = resolve_axes(axis_name)
    devices = axes_size(axes)
    reducible = [i for i, op in enumerate(chosen) if op is not None]
    arrays = [_number(leaves[i], chosen[i], devices) for i in reducible]
    weighing = None
    if weights is not None:
        weighing = _weights(weights, [leaves[i] for i in reducible], arrays)
    with jax.transfer_guard("allow"):  # of constants, where nothing is compiled
        reduced = reduce_arrays(arrays, [chosen[i] for i in reducible], axes, weighing)
        if packed:
            return pack(reduced, structure, leaves, axes)
        for i, result in zip(reducible, reduced.arrays(), strict=True):
            results[i] = result
    return jax.tree_util.tree_unflatten(structure, results)


def _ops(reduce_fn: Any) -> Said:
    """Return the ops that `reduce_fn` gives, each of them a known one."""
    said = Said({} if reduce_fn is None else reduce_fn)
    if said.one:
        raise TypeError(
            f"reduce_fn is {reduce_fn!r}, but must be a dict that gives an op for each name, or a tree "
            "like that of the metrics"
        )
    for leaf in said.leaves:
        if leaf.value is not None:
            require_op(leaf.value, leaf.path("reduce_fn"))
    return said


def _op(ops: Said, leaf: Leaf) -> Any:
    op = ops.about(leaf)
    if op is PARTS:
        raise ValueError(
            f"{leaf.path('reduce_fn')} is a dict of ops, but {leaf.path('metrics')} is a single value"
        )
    return "mean" if op is ABSENT else op


def _number(leaf: Leaf, op: str, devices: int) -> jax.Array:
    where = leaf.path("metrics")
    array = as_array(leaf.value, where, copies=devices if op == "sum" else 1)
    if op in ("max", "min") and jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise TypeError(f"{where} is complex, and complex numbers have no {op}: take the magnitude")
    return array


def _weights(weights: Any, leaves: Sequence[Leaf], arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """Return one weight per leaf."""
    found = weights_of(weights, leaves, lambda leaf: leaf.path("metrics"), _weight)
    for (where, weight), leaf, array in zip(found, leaves, arrays, strict=True):
        if weight.ndim and weight.shape != array.shape:
            raise ValueError(
                f"{where} has shape {weight.shape}, but {leaf.path('metrics')} has shape {array.shape}: "
                "give one number per device, or one for each element of the metric"
            )
    return [weight for _, weight in found]


def _weight(weight: Any, where: str) -> tuple[str, jax.Array]:
    array = as_array(weight, where)
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise TypeError(f"{where} is complex: a weight is a real number")
    return where, array


def _collect(metrics: Any) -> dict[str, Any]:
    if any(map(_is_packed, jax.tree.leaves(metrics, is_leaf=_is_packed))):
        raise TypeError(
            "collect_from_devices takes the values of each device, but packed metrics hold what all "
            "devices agree on: read them by unpack()"
        )
    if not isinstance(metrics, Mapping):
        items = enumerate(metrics) if isinstance(metrics, (tuple, list)) else ()
        places = [i for i, item in items if isinstance(item, Mapping)]
        hint = f" Here that may be item {places[-1]} of it." if places else ""
        raise TypeError(
            "collect_from_devices takes the dict of metrics that the step returned, not a "
            f"{type(metrics).__name__}. If the step returns more, such as (params, metrics), pass its "
            f"metrics.{hint}"
        )
    leaves, structure = flatten(metrics)
    for leaf in leaves:
        if isinstance(leaf.value, jax.Array):
            _require_readable(leaf)
    results = [leaf.value for leaf in leaves]
    with jax.transfer_guard("allow"):
        hosts = jax.device_get(
            [x if isinstance(x, jax.Array) and x.ndim else None for x in results]
        )
    for i, host in enumerate(hosts):
        found = results[i] if host is None else host
        if isinstance(found, np.ndarray) and found.ndim:
            results[i] = found.tolist() if found.ndim == 1 else list(found)
    return jax.tree_util.tree_unflatten(structure, results)  # type: ignore[no-any-return]


def _is_packed(tree: Any) -> bool:
    return isinstance(tree, PackedMetrics)


def _require_readable(leaf: Leaf) -> None:
    where = leaf.path("metrics")
    if isinstance(leaf.value, jax.core.Tracer):
        raise TypeError(
            f"{where} is a traced value, which is not on any device yet: call collect_from_devices "
            "outside the compiled function, on what it returned. Inside, use all_gather."
        )
    if leaf.value.is_deleted():
        raise RuntimeError(
            f"{where} was donated or deleted before it was read: collect it first, or do not donate "
            "it"
        )
    if not is_readable(leaf.value):
        raise ValueError(
            f"{where} lives partly on devices of other processes, from where it cannot be read "
            "here: all_gather it inside the step, or give every process all of it first, by "
            "jax.experimental.multihost_utils.process_allgather(metrics, tiled=True), which all "
            "processes must call"
        )
