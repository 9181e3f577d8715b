"""Packed metrics and accumulators in files: what `flax.serialization` and `jax.export` ask of a type."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
from flax import serialization

from metricfold._core.device.rows import Layout
from metricfold.jax.accumulator import DeviceAccumulator
from metricfold.jax.packed import Copies, PackedMetrics
from metricfold.jax.reduction import Section

__all__ = ["register"]


def register() -> None:
    """Let both know `PackedMetrics` and `DeviceAccumulator`."""
    serialization.register_serialization_state(  # type: ignore[no-untyped-call]
        PackedMetrics,
        lambda packed: {"words": packed.words},
        lambda packed, state: replace(packed, words=state["words"]),
    )
    jax.export.register_pytree_node_serialization(
        PackedMetrics,
        serialized_name="metricfold.jax.PackedMetrics",
        serialize_auxdata=_to_bytes,
        deserialize_auxdata=_from_bytes,
    )
    serialization.register_serialization_state(  # type: ignore[no-untyped-call]
        DeviceAccumulator, DeviceAccumulator.arrays, DeviceAccumulator.with_arrays
    )
    jax.export.register_pytree_node_serialization(
        DeviceAccumulator,
        serialized_name="metricfold.jax.DeviceAccumulator",
        serialize_auxdata=lambda layout: layout.as_json().encode(),
        deserialize_auxdata=lambda said: Layout.from_json(bytes(said).decode()),
    )


def _to_bytes(fields: Any) -> bytes:
    sections, structure, copies, fingerprint = fields
    said = {
        "sections": [
            (one.dtype.name, one.indices, one.shapes, [dtype.name for dtype in one.dtypes])
            for one in sections
        ],
        "tree": _described(structure),
        "copies": [copies.axes, copies.sizes, copies.stacked],
        "fingerprint": fingerprint,
    }
    return json.dumps(said).encode()


def _from_bytes(said: bytes | bytearray) -> Any:
    fields = json.loads(bytes(said))
    sections = tuple(
        Section(
            jnp.dtype(dtype),
            tuple(indices),
            tuple(map(tuple, shapes)),
            tuple(map(jnp.dtype, dtypes)),
        )
        for dtype, indices, shapes, dtypes in fields["sections"]
    )
    axes, sizes, stacked = fields["copies"]
    copies = Copies(tuple(axes), tuple(sizes), stacked)
    structure = jax.tree.structure(_tree(fields["tree"]))
    return sections, structure, copies, fields["fingerprint"]


def _described(structure: Any) -> Any:
    """Return a tree of dicts, lists and tuples as JSON has it: a kind, and what is in there."""
    data = structure.node_data()
    if data is None:
        return ["leaf"]
    kind, keys = data
    parts = [_described(child) for child in structure.children()]
    if kind is dict and all(isinstance(key, str | int) for key in keys):
        return ["dict", [list(pair) for pair in zip(keys, parts, strict=True)]]
    if kind in (list, tuple):
        return [kind.__name__, parts]
    raise TypeError(
        f"packed metrics that are a {kind.__name__} cannot be exported: let the exported function "
        "return a dict, list or tuple of metrics, nested at will, whose keys are texts or ints"
    )


def _tree(described: Any) -> Any:
    kind, *parts = described
    if kind == "leaf":
        return 0
    if kind == "dict":
        return {key: _tree(part) for key, part in parts[0]}
    return (list if kind == "list" else tuple)(map(_tree, parts[0]))
