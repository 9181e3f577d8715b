"""Few collectives for many arrays.

A collective costs its latency, whatever it carries, and time to compile. So small arrays of one kind
travel as one vector. Large ones go alone, as copying them would cost more than it saves; so do those that
are laid out over an explicit mesh axis, as a vector would have to give that layout up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from metricfold.jax.axes import Axes, bound_axes

__all__ = ["Lane", "all_gather", "axes_size", "combine", "join", "split", "travel_together"]

Lane: TypeAlias = tuple[Literal["sum", "max"], jax.Array]
"""An array, and how those of all devices combine, element by element.

What is combined by "max" holds integers: of floats, XLA drops NaN, and JAX has no derivative.
"""

SMALL = 16_384
"""Elements up to which an array joins others."""


def axes_size(axes: Axes) -> int:
    """Return over how many devices `axes` span."""
    return math.prod(lax.axis_size(axis) for axis in axes)


def combine(lanes: Sequence[Lane], axes: Axes) -> list[jax.Array]:
    """Combine each of `lanes` over all devices, by one collective per kind and dtype.

    Args:
        lanes: the same on all devices, but for their values.
        axes: bound axes; with none, every lane stays as it is.
    """
    collectives: dict[str, Any] = {"sum": lax.psum, "max": lax.pmax}
    arrays = [array for _, array in lanes]
    kinds = [(kind, array.dtype) for kind, array in lanes]
    return _sent(arrays, kinds, axes, lambda i, vector: collectives[lanes[i][0]](vector, axes))


def all_gather(arrays: Sequence[jax.Array], axes: Axes) -> list[jax.Array]:
    """Return each of `arrays` with a new first dimension: the devices, in the order of `axes`.

    With no axes, every array stays as it is.
    """
    # What all devices have gathered is the same on all. `shard_map` lets a function return it as
    # such only if told so; `vmap` knows no such distinction.
    to: Any = "invarying" if set(axes) <= set(bound_axes()) else "varying"
    kinds = [array.dtype for array in arrays]
    return _sent(arrays, kinds, axes, lambda _, vector: lax.all_gather(vector, axes, to=to))


def _sent(
    arrays: Sequence[jax.Array],
    kinds: Sequence[Hashable],
    axes: Axes,
    collective: Callable[[int, jax.Array], Any],
) -> list[jax.Array]:
    """Return what comes back of each of `arrays`; `collective` is told the first of those in a vector."""
    came_back = list(arrays)
    for indices in travel_together(arrays, kinds) if axes else ():
        vector = collective(indices[0], join([arrays[i] for i in indices]))
        for i, part in zip(indices, split(vector, [arrays[i].shape for i in indices]), strict=True):
            came_back[i] = part
    return came_back


def travel_together(arrays: Sequence[jax.Array], kinds: Sequence[Hashable]) -> list[list[int]]:
    """Return the indices of `arrays`, grouped: small ones of one kind together, others alone."""
    groups: dict[Hashable, list[int]] = {}
    for i, (array, kind) in enumerate(zip(arrays, kinds, strict=True)):
        groups.setdefault(kind if _joins(array) else ("alone", i), []).append(i)
    return list(groups.values())


def _joins(array: jax.Array) -> bool:
    layout = jax.typeof(array).sharding.spec
    return array.size <= SMALL and all(axes is None for axes in layout)


def join(arrays: Sequence[jax.Array]) -> jax.Array:
    """Return `arrays` of one dtype as one vector; a single one stays as it is."""
    if len(arrays) == 1:
        return arrays[0]
    if any(array.ndim for array in arrays):
        return jnp.concatenate([jnp.ravel(array) for array in arrays])
    chosen = [_side_by_side(arrays[i : i + _CHOSEN]) for i in range(0, len(arrays), _CHOSEN)]
    return chosen[0] if len(chosen) == 1 else jnp.concatenate(chosen)


_CHOSEN = 128
"""So many numbers are put side by side by one kernel."""


def _side_by_side(numbers: Sequence[jax.Array]) -> jax.Array:
    """Return numbers as a vector.

    To concatenate them would be a kernel for each, which takes more than the collective. One that
    chooses among them for each place takes a third of the time to compile, too.
    """
    place = lax.iota(np.int32, len(numbers))
    vectors = list(numbers)
    bit = 1
    while len(vectors) > 1:
        odd = (place & bit) != 0
        evens, odds = vectors[::2], vectors[1::2]
        pairs = [jnp.where(odd, one, other) for other, one in zip(evens, odds, strict=False)]
        vectors = pairs + evens[len(odds) :]
        bit *= 2
    return vectors[0]


def split(joined: jax.Array, shapes: Sequence[tuple[int, ...]]) -> list[jax.Array]:
    """Undo `join`, for arrays of these shapes; dimensions that came in front stay in front."""
    if len(shapes) == 1:
        return [joined]
    parts = lax.split(joined, [math.prod(shape) for shape in shapes], axis=joined.ndim - 1)
    leading = joined.shape[:-1]
    return [part.reshape(leading + shape) for part, shape in zip(parts, shapes, strict=True)]
