"""Reduced metrics as one vector, to be taken apart on the host.

A jitted step that returns a hundred metrics makes a hundred buffers, and reading them takes as many
transfers. `PackedMetrics` is one buffer of 32-bit words, read in one transfer: a fingerprint of names,
types and shapes, as an accumulator has one, that carries a checksum of the other words; and the bits of
the results, one section for each op and type.

Functions over all arrays of a tree take the words for numbers: average them over steps, add them up over
devices once more, cast them, fill them with zeros. What comes out are bits that mean something else. So
`unpack` looks at their type and at the fingerprint.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec, reshard

from metricfold._core.device.rows import checksum, with_checksum, without_checksum
from metricfold._core.runtime.staging import is_traced
from metricfold.jax.axes import Axes, bound_axes, knows_what_varies
from metricfold.jax.reduction import Reduced, Section
from metricfold.jax.trees import Leaf
from metricfold.jax.values import is_readable

__all__ = ["PackedMetrics", "pack"]

_SEAL = 2
"""Words in front: the fingerprint with the checksum, and its complement, for the larger of two or the
smaller of them would be one that fits."""

Words = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Copies:
    """The copies of one result that a mapped function may return, one from each device.

    Args:
        axes: over which it was reduced.
        sizes: how many devices each of these axes of a ``pmap`` or ``shard_map`` spans.
        stacked: whether copies get a dimension of their own, as by ``pmap``. Where JAX knows that all
            devices have the same (``shard_map`` with ``check_vma=True``), they do not.
    """

    axes: Axes
    sizes: tuple[int, ...]
    stacked: bool

    @classmethod
    def over(cls, axes: Axes) -> Copies:
        """Return those of what has just been reduced over `axes`, here."""
        bound = bound_axes()
        mapped = tuple(axis for axis in axes if axis in bound)
        if not mapped:
            return cls(axes, (), stacked=False)
        sizes = tuple(map(lax.axis_size, mapped))
        return cls(axes, sizes, stacked=not knows_what_varies(mapped))

    def one_of(self, words: Words, length: int, share: float) -> Words:
        """Return the words without the dimension, or the part of the last one, that counts copies.

        `length` is that of one result, and `share` what part of the copies is on this process.
        """
        # What is returned may be split over some of the axes.
        some = (s for n in range(len(self.sizes)) for s in combinations(self.sizes, n + 1))
        here = {round(number * share) for number in map(math.prod, some) if number > 1}
        joined, rest = divmod(words.shape[-1], length)
        if joined in here and joined > 1 and not rest:
            side_by_side = words.reshape(*words.shape[:-1], joined, length)
            return side_by_side[..., 0, :] if _alike(side_by_side, -2) else words
        copies = here or {1}  # of a single device
        if self.stacked and words.ndim > 1 and len(words) in copies and _alike(words, 0):
            words = words[0]
        return words


def _alike(words: Words, axis: int) -> bool:
    return bool((words == words.take([0], axis)).all())


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class PackedMetrics:
    """What a reduction with ``packed=True`` gives: a pytree of one array.

    Return it from the compiled step like any array, and call `unpack` on the host. Do not compute with
    it: average what `unpack` gives.
    """

    words: jax.Array
    sections: tuple[Section, ...] = field(metadata={"static": True})
    structure: Any = field(metadata={"static": True})
    copies: Copies = field(metadata={"static": True})
    fingerprint: int = field(metadata={"static": True})

    def unpack(self) -> Any:
        """Return the metrics, read in one transfer: floats, and NumPy arrays for what has a shape.

        The copies that ``pmap``, or a ``shard_map`` with the reduced axis in its ``out_specs``,
        return from each device are all alike: one of them is read. Any other dimension that came
        in front, such as the steps of a ``scan``, stays in front of every metric. Where the words lie
        does not matter: `jax.device_get` and pickles keep what they mean.

        Raises:
            TypeError: called inside a compiled function.
            ValueError: the words are not those that the reduction returned, because something was
                computed with them; or were donated; or were not reduced over all of the axes that
                `out_specs` joins end to end, or that lie on other processes.
        """
        length = self._length
        words, share = self._read()
        words = self.copies.one_of(words, length, share)
        if words.shape[-1] != length:
            many, rest = divmod(words.shape[-1], length)
            if rest or not self._fits(words):
                raise ValueError(
                    f"packed metrics of these names have {length} words, and these are "
                    f"{words.shape[-1]}: they are of other metrics, or were cut"
                )
            raise ValueError(
                f"these are {many} packed metrics end to end, which were reduced over "
                f"{self.copies.axes} alone. Give each a dimension of its own before it "
                "is returned: jax.tree.map(lambda words: words[None], packed)"
            )
        if not self._fits(words):
            if not words.any():
                raise ValueError(
                    "these packed metrics hold nothing: all words are zero, as in a carry that was "
                    "filled with zeros and never replaced. Unpack only what a reduction has returned"
                )
            raise ValueError(
                "the fingerprint of these packed metrics does not fit: they are of other metrics, or "
                f"{_COMPUTED}"
            )
        ends = np.cumsum([_SEAL, *(section.words for section in self.sections)])
        metrics: dict[int, Any] = {}
        for section, part in zip(self.sections, np.split(words, ends, -1)[1:-1], strict=True):
            metrics.update(_taken_apart(np.ascontiguousarray(part).view(section.dtype), section))
        leaves = [metrics[i] for i in range(len(metrics))]
        return jax.tree_util.tree_unflatten(self.structure, leaves)

    @property
    def _length(self) -> int:
        return _SEAL + sum(section.words for section in self.sections)

    def _read(self) -> tuple[Words, float]:
        """Return the words that are on this process, and what part of all that is."""
        words = self.words
        if is_traced(words) or isinstance(words, jax.ShapeDtypeStruct):
            raise TypeError(
                "unpack() reads values, which a traced function does not have: return the packed "
                "metrics from it, and unpack them outside"
            )
        if isinstance(words, jax.Array) and words.is_deleted():
            raise ValueError(
                "these packed metrics were donated to a compiled function, or deleted, before they "
                "were read: unpack them first, or do not donate them"
            )
        dtype = getattr(words, "dtype", type(words).__name__)
        if dtype != np.uint32:
            raise ValueError(
                f"the words of these packed metrics are {dtype}, not uint32: {_COMPUTED}"
            )
        with jax.transfer_guard("allow"):
            if is_readable(words):
                return np.asarray(words), 1.0
            return self._read_here(words)

    def _read_here(self, words: jax.Array) -> tuple[Words, float]:
        """Return the copies that lie on this process, of such as lie on several."""
        layout = words.sharding
        spec = layout.spec if isinstance(layout, NamedSharding) else (None,)
        split = [i for i, axes in enumerate(spec) if axes]
        over = spec[split[0]] if len(split) == 1 else ()
        if not over or not set((over,) if isinstance(over, str) else over) <= set(self.copies.axes):
            raise ValueError(
                "parts of these packed metrics lie on other processes, for they were not reduced over "
                f"all that {layout} splits: reduce over these axes, too, or gather them in the step"
            )
        axis = split[0]
        shards = {shard.index[axis].start or 0: shard.data for shard in words.addressable_shards}
        here = np.concatenate([np.asarray(shards[start]) for start in sorted(shards)], axis)
        return here, here.shape[axis] / words.shape[axis]

    def _fits(self, words: Words) -> bool:
        """Return whether words are those of the reduction, or of several, side by side or end to end."""
        words = words.reshape(-1, self._length)
        marks = without_checksum(words[:, 0], checksum(words[:, _SEAL:], np, _added))
        return bool(((marks == self.fingerprint) & (words[:, 0] == ~words[:, 1])).all())


_COMPUTED = (
    "something was computed with them as if they were numbers, such as a mean over steps, a second sum "
    "over devices or a cast, by a function that goes over all arrays of a tree. Do so with what "
    "unpack() gives, or before packing; to keep the packed metrics of several steps, stack them, and "
    "unpack() has the steps in front"
)


def pack(reduced: Reduced, structure: Any, leaves: list[Leaf], axes: Axes) -> PackedMetrics:
    """Pack results whose pytree has this structure and that were reduced over `axes`."""
    parts = [_as_words(joined) for joined in reduced.joined]
    results = jnp.concatenate(parts) if parts else jnp.zeros(0, jnp.uint32)
    # Odd, and the highest bit is set: twice it, or thrice, is another number, and so is its float32.
    said = repr(([leaf.path("") for leaf in leaves], reduced.sections))
    fingerprint = zlib.crc32(said.encode()) | 0x8000_0001
    seal = with_checksum(np.uint32(fingerprint), checksum(results, jnp, _added))
    return PackedMetrics(
        words=jnp.concatenate([seal ^ np.array([0, 0xFFFF_FFFF], np.uint32), results]),
        sections=reduced.sections,
        structure=structure,
        copies=Copies.over(axes),
        fingerprint=fingerprint,
    )


def _added(words: Any) -> Any:
    """Return what words of the last dimension come to."""
    if isinstance(words, np.ndarray):
        return words.sum(axis=-1, dtype=np.uint32) ^ np.bitwise_xor.reduce(words, axis=-1)
    # Of two reductions at once XLA makes one kernel on a CPU, and two of one.
    total, parity = lax.reduce(
        (words, words),
        (np.uint32(0), np.uint32(0)),
        lambda one, other: (one[0] + other[0], one[1] ^ other[1]),
        (words.ndim - 1,),
    )
    return total ^ parity


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
