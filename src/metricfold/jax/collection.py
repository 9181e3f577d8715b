"""Values of all devices as lists on the host."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from metricfold.jax.packed import PackedMetrics
from metricfold.jax.trees import Leaf, flatten

__all__ = ["collect"]


def collect(metrics: Any) -> dict[str, Any]:
    """Return `metrics` with a list of per-device values in place of each array; one transfer."""
    if any(map(_is_packed, jax.tree.leaves(metrics, is_leaf=_is_packed))):
        raise TypeError(
            "collect_from_devices takes the values of each device, but packed metrics hold what all "
            "devices agree on: read them by unpack()"
        )
    if not isinstance(metrics, Mapping):
        kind = type(metrics).__name__
        hint = ""
        if isinstance(metrics, (tuple, list)):
            places = [i for i, item in enumerate(metrics) if isinstance(item, Mapping)]
            hint = f" Here that may be item {places[-1]} of it." if places else ""
        raise TypeError(
            "collect_from_devices takes the dict of metrics that the step returned, not a "
            f"{kind}. If the step returns more, such as (params, metrics), pass its metrics.{hint}"
        )
    leaves, structure = flatten(metrics)
    arrays = [leaf for leaf in leaves if isinstance(leaf.value, jax.Array)]
    for leaf in arrays:
        _require_readable(leaf)
    results = [leaf.value for leaf in leaves]
    on_devices = [
        i for i, value in enumerate(results) if isinstance(value, jax.Array) and value.ndim
    ]
    with jax.transfer_guard("allow"):
        hosts = jax.device_get([results[i] for i in on_devices])
    for i, host in zip(on_devices, hosts, strict=True):
        results[i] = host
    return jax.tree_util.tree_unflatten(structure, [_rows(value) for value in results])  # type: ignore[no-any-return]


def _is_packed(tree: Any) -> bool:
    return isinstance(tree, PackedMetrics)


def _rows(value: Any) -> Any:
    if not isinstance(value, np.ndarray) or not value.ndim:
        return value
    return value.tolist() if value.ndim == 1 else list(value)


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
    if not (leaf.value.is_fully_addressable or leaf.value.is_fully_replicated):
        raise ValueError(
            f"{where} lives partly on devices of other processes, from where it cannot be read "
            "here: all_gather it inside the step, or give every process all of it first, by "
            "jax.experimental.multihost_utils.process_allgather(metrics, tiled=True), which all "
            "processes must call"
        )
