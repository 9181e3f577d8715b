"""Reduced metrics as one vector, to be taken apart on the host.

A jitted step that returns a hundred metrics makes a hundred buffers, and reading them takes as many
transfers. `PackedMetrics` is one buffer of 32-bit words, read in one transfer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec, reshard

from metricfold.jax.axes import Axes
from metricfold.jax.reduction import Group, Reduced

__all__ = ["PackedMetrics", "pack"]


@dataclass(frozen=True, slots=True)
class Section:
    """The place of one group's results among the words."""

    dtype: np.dtype[Any]
    indices: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[np.dtype[Any], ...]
    size: int
    """Elements of all of them."""

    @property
    def words(self) -> int:
        return self.size * self.dtype.itemsize // 4


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class PackedMetrics:
    """What a reduction with ``packed=True`` gives: a pytree of one array.

    Return it from the compiled step like any array, and call `unpack` on the host.
    """

    words: jax.Array
    sections: tuple[Section, ...] = field(metadata={"static": True})
    structure: Any = field(metadata={"static": True})
    axes: Axes = field(metadata={"static": True})

    def unpack(self) -> Any:
        """Return the metrics, read in one transfer: floats, and NumPy arrays for what has a shape.

        The copies that ``pmap``, or a ``shard_map`` with the reduced axis in its ``out_specs``,
        return from each device are all alike: one of them is read. Any other dimension that came
        in front, such as the steps of a ``scan``, stays in front of every metric.

        Raises:
            TypeError: called inside a compiled function.
            ValueError: what devices disagree on, for it was reduced over another axis, was joined
                end to end by ``out_specs``.
        """
        if isinstance(self.words, jax.core.Tracer):
            raise TypeError(
                "unpack() reads values, which a traced function does not have: return the packed "
                "metrics from it, and unpack them outside"
            )
        words = np.asarray(self._one_copy())
        expected = sum(section.words for section in self.sections)
        if words.shape[-1] != expected:
            raise ValueError(
                f"these are {words.shape[-1] // max(expected, 1)} packed metrics end to end, which "
                f"were reduced over {self.axes} alone. Give each a dimension of its own before it "
                "is returned: jax.tree.map(lambda words: words[None], packed)"
            )
        metrics: dict[int, Any] = {}
        start = 0
        for section in self.sections:
            part = words[..., start : start + section.words]
            start += section.words
            metrics.update(_taken_apart(np.ascontiguousarray(part).view(section.dtype), section))
        leaves = [metrics[i] for i in range(len(metrics))]
        return jax.tree_util.tree_unflatten(self.structure, leaves)

    def _one_copy(self) -> Any:
        """Return the words without the dimension, or the part of one, that counts the devices."""
        words = self.words
        if not isinstance(words, jax.Array) or not isinstance(words.sharding, NamedSharding):
            return words
        split = words.sharding.spec[0] if words.sharding.spec else None
        over = (split,) if isinstance(split, str) else tuple(split or ())
        if not over or not set(over) <= set(self.axes):
            return words
        copy = words.addressable_shards[0].data
        return copy if copy.ndim == 1 else copy[0]


def pack(reduced: Reduced, structure: Any, axes: Axes) -> PackedMetrics:
    """Pack results whose pytree has this structure and that were reduced over `axes`."""
    parts = [_as_words(group.joined) for group in reduced.groups]
    return PackedMetrics(
        words=jnp.concatenate(parts) if parts else jnp.zeros(0, jnp.uint32),
        sections=tuple(_section(group) for group in reduced.groups),
        structure=structure,
        axes=axes,
    )


def _section(group: Group) -> Section:
    joined = group.joined
    return Section(
        np.dtype(joined.dtype), group.indices, group.shapes, group.dtypes, size=joined.size
    )


def _as_words(values: jax.Array) -> jax.Array:
    if jnp.issubdtype(values.dtype, jnp.complexfloating):
        values = jnp.stack([values.real, values.imag], axis=-1)
    layout = jax.typeof(values).sharding
    if any(layout.spec):  # over an explicit mesh: one vector has one layout
        values = reshard(values, NamedSharding(layout.mesh, PartitionSpec()))
    return lax.bitcast_convert_type(values, jnp.uint32).reshape(-1)


def _taken_apart(values: np.ndarray[Any, Any], section: Section) -> dict[int, Any]:
    leading = values.shape[:-1]
    if not leading and not any(section.shapes):
        # Numbers only, as most metrics are: one by one they would take ten times as long.
        plain = values if values.dtype.kind == "c" else values.astype(np.float64)
        return dict(zip(section.indices, plain.tolist(), strict=True))
    found: dict[int, Any] = {}
    start = 0
    for i, shape, dtype in zip(section.indices, section.shapes, section.dtypes, strict=True):
        size = math.prod(shape)
        metric = values[..., start : start + size].reshape(leading + shape)
        start += size
        if metric.ndim:
            found[i] = metric.astype(dtype)
        else:
            found[i] = complex(metric) if metric.dtype.kind == "c" else float(metric)
    return found
