"""Statistics of each leaf of a tree, such as gradients, as rows of an accumulator.

Under `jax.jit` arrays are global: what a sum over the shards of a leaf takes XLA inserts, and replicas
count once by themselves. Inside of `jax.shard_map` a leaf is a shard: specs say how the shards of each lie, one
psum and one pmax bring those of all leaves together, and of devices that hold the same one counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from metricfold._core.device.arrays import unwrapped
from metricfold._core.device.rows import COUNTS, EXTREMA, SUMS
from metricfold._core.device.watched import HUGE, OCTAVES, SCALE, TINY, Watched, matches
from metricfold.jax.axes import Axes, AxisName, resolve_axes, varying
from metricfold.jax.collectives import combine
from metricfold.jax.exact_sums import add_pairs
from metricfold.jax.lanes import NOTHING, Lanes
from metricfold.jax.trees import Leaf, Said, flatten

__all__ = ["Laid", "check_stacked", "laid", "leaves_of", "statistics", "watched"]

Patterns: TypeAlias = "str | Sequence[str]"

_SUMS, _NUMBERS = 4, 2
"""Of a leaf: squares of tiny, usual and huge elements, and all elements; and as pairs how many are 0, how many not
finite, and how many magnitudes lie in each octave, if that is asked for."""
_LIMBS = (1 << 24, 1 << 12, 1)
"""A number travels as multiples of these, which are so small that a sum of them over devices is exact."""
_MOST_IN_FLOAT, _MOST_IN_INT = 1 << 24, (1 << 31) - 1
"""How far each counts. In float32 a number travels with the sums, where XLA brings shards together."""
_EXPONENT_AND_FRACTION = np.int32(0x7FFF_FFFF)


class Laid(NamedTuple):
    """How the shards of a tree lie, in `shard_map`.

    Args:
        axes: of the mesh, over which shards and replicas join.
        specs: of each leaf, by label, the axes over which each dimension is cut.
    """

    axes: Axes
    specs: tuple[tuple[str, tuple[Axes, ...]], ...]


# -- What is declared, and what is given -----------------------------------------------------------


def watched(trees: Mapping[str, Any], stacked: Patterns, *, octaves: bool) -> tuple[Watched, ...]:
    """Return the trees that are to be watched, given by name as arrays, or what has their shapes and types.

    Raises:
        TypeError, ValueError: they are no trees by name, a leaf has the name of another, or a pattern in
            `stacked` matches no leaf.
    """
    if not isinstance(trees, Mapping):
        raise TypeError(
            f"trees={trees!r:.80}: give pytrees by name, as in trees={{'grad': params}}"
        )
    shapes = {name: _shapes(name, tree) for name, tree in trees.items()}
    patterns = _listed(stacked)
    labels = [label for of_tree in shapes.values() for label in of_tree]
    for pattern in patterns:
        if not any(matches(label, (pattern,)) for label in labels):
            raise ValueError(
                f"stacked={pattern!r} is no leaf of {', '.join(map(repr, trees)) or 'any tree'}, such as "
                f"{labels[0] if labels else 'params'!r}: give patterns of the leaves in which layers are "
                "stacked along the first dimension"
            )
    declared = []
    for name, of_tree in shapes.items():
        layered = [one for one in of_tree if matches(one, patterns)]
        declared.append(Watched.of(name, of_tree, layered, octaves=octaves))
    return tuple(declared)


def check_stacked(tree: Watched, stacked: Patterns) -> None:
    """Raise ValueError if the leaves that patterns name are not those in which layers are stacked."""
    patterns = _listed(stacked)
    for label, layers in zip(tree.labels, tree.layers, strict=True):
        if bool(layers) != matches(label, patterns):
            raise ValueError(
                f"stacked={stacked!r} says otherwise of leaf {label!r} of the tree {tree.name!r} than the "
                "accumulator, whose arrays have a place for each layer: say it where that is made, "
                f"DeviceAccumulator(..., trees={{{tree.name!r}: ...}}, stacked={stacked!r})"
            )


def _listed(patterns: Patterns) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def _shapes(name: str, tree: Any) -> dict[str, tuple[int, ...]]:
    return {label: _shape(leaf) for label, leaf in _labelled(name, tree).items()}


def _labelled(name: str, tree: Any) -> dict[str, Leaf]:
    """Return the leaves of a tree that hold floating-point numbers, by label; a tied one under its first."""
    found: dict[str, Leaf] = {}
    variables: set[int] = set()
    for leaf in flatten(tree, whole=True)[0]:
        if hasattr(type(leaf.value), "__jax_array__"):
            if id(leaf.value) in variables:
                continue
            variables.add(id(leaf.value))
        dtype = getattr(leaf.value, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
            continue
        if not math.prod(leaf.value.shape):
            continue
        label = "/".join(map(str, leaf.keys)) or name
        if label in found:
            raise ValueError(
                f"two leaves of the tree {name!r} are called {label!r}: rename one of them"
            )
        found[label] = leaf
    return found


def _shape(leaf: Leaf) -> tuple[int, ...]:
    # A complex number is two elements.
    pair = (2,) if jnp.issubdtype(leaf.value.dtype, jnp.complexfloating) else ()
    return (*leaf.value.shape, *pair)


def leaves_of(tree: Watched, given: Any, where: Laid | None) -> dict[str, jax.Array]:
    """Return the arrays of a tree, by label, checked; those that are missing have nothing to say.

    Raises:
        ValueError: a leaf was not declared, or has another shape, or is in parts of which `where` says nothing.
    """
    shapes, laid_out = (
        dict(zip(tree.labels, tree.shapes, strict=True)),
        dict(where.specs if where else ()),
    )
    found: dict[str, jax.Array] = {}
    for label, leaf in _labelled(tree.name, given).items():
        what = f"leaf {label!r} of the tree {tree.name!r}"
        if label not in shapes:
            raise ValueError(
                f"{what} was not there when the accumulator was made, but {', '.join(tree.labels)!r:.200}: give "
                "a tree of all leaves as trees="
            )
        spec = laid_out.get(label, ())
        shape = _whole(_shape(leaf), spec)
        if shape != shapes[label]:
            raise ValueError(
                f"{what} has the shape {shape}, but {shapes[label]} when the accumulator was made. "
                + (
                    "Its parts, as its spec says that they lie, do not come to that: see specs="
                    if where
                    else "Inside of shard_map give specs= and axes=, which say of which part it is"
                )
            )
        array = jnp.asarray(unwrapped(leaf.value))
        if where:
            _check_whole_sum(array, what, where.axes, spec)
        if jnp.iscomplexobj(array):
            array = jnp.stack([array.real, array.imag], axis=-1)
        found[label] = lax.stop_gradient(array)
    return found


def _whole(shape: tuple[int, ...], spec: Sequence[Axes]) -> tuple[int, ...]:
    cut = [math.prod(lax.axis_size(axis) for axis in axes) for axes in spec]
    return tuple(
        size * parts for size, parts in zip(shape, [*cut, *[1] * len(shape)], strict=False)
    )


def _check_whole_sum(array: jax.Array, what: str, axes: Axes, spec: Sequence[Axes]) -> None:
    """Refuse what differs between devices that are said to hold the same, as parts of a sum do."""
    unsaid = [
        axis for axis in axes if axis in varying(array) and not any(axis in cut for cut in spec)
    ]
    if unsaid:
        raise ValueError(
            f"{what} differs over the axis {unsaid[0]!r}, of which its spec says nothing, as a gradient does "
            f"before its psum: no device knows its norm. Give jax.lax.psum(x, {unsaid[0]!r}), or pmean, or name "
            "the axis in its spec"
        )


def laid(tree: Watched, given: Any, specs: Any, axes: AxisName) -> Laid | None:
    """Return how shards lie; None outside of `shard_map`, where arrays are whole.

    Args:
        tree: whose leaves they are.
        given: the leaves.
        specs: a `PartitionSpec` for all, or a tree of them, as `shard_map` takes them.
        axes: over which shards and replicas join; None: all that `shard_map` binds.

    Raises:
        TypeError, ValueError: axes without specs, or a leaf of which specs say nothing, or an axis that is
            not among `axes`.
        NameError: an axis is not bound.
    """
    if specs is None:
        if axes is not None:
            raise ValueError(
                "axes= names axes over which shards join, which specs= says of each leaf: give both, or "
                "neither where arrays are whole"
            )
        return None
    over = resolve_axes(axes)
    if not over:
        raise NameError(
            "specs= say how shards lie inside of shard_map, and here no axis is bound: under plain jax.jit "
            "arrays are whole, however they are sharded; leave specs= out"
        )
    said, found = Said(specs), []
    for label, leaf in _labelled(tree.name, given).items():
        spec = said.about(leaf)
        spec = getattr(spec, "spec", getattr(spec, "value", spec))
        if spec is None:
            spec = PartitionSpec()
        if not isinstance(spec, PartitionSpec):
            raise TypeError(
                f"specs= say nothing of leaf {label!r} of the tree {tree.name!r}: give a PartitionSpec for "
                "each leaf, or for all"
            )
        cut = tuple(_axes_of(part) for part in spec)
        for axis in (axis for part in cut for axis in part):
            if axis not in over:
                raise ValueError(
                    f"the spec of leaf {label!r} of the tree {tree.name!r} names the axis {axis!r}, over which "
                    f"axes={over!r} do not join: name it there, too"
                )
        found.append((label, cut))
    return Laid(over, tuple(found))


def _axes_of(part: Any) -> Axes:
    return () if part is None else (part,) if isinstance(part, str) else tuple(part)


# -- What is computed ------------------------------------------------------------------------------


def statistics(tree: Watched, leaves: Mapping[str, jax.Array], where: Laid | None) -> Lanes:
    """Return the rows of a tree of which these leaves were collected once."""
    found = []
    specs = dict(where.specs if where else ())
    for place, (label, layers) in enumerate(zip(tree.labels, tree.layers, strict=True)):
        if label not in leaves:
            found.append(_nothing(layers or 1, tree.octaves))
            continue
        sums, largest = _of_leaf(leaves[label], bool(layers), tree.octaves)
        if where:
            sums = sums * _takes_its_turn(where.axes, specs[label], place)
            sums, largest = _among_all_layers(sums, largest, layers or 1, specs[label])
        found.append((sums, largest))
    sums, largest = map(jnp.concatenate, zip(*found, strict=True))
    there = np.repeat([label in leaves for label in tree.labels], tree.cells)
    return _rows(*(_joined(sums, largest, where.axes) if where else (sums, largest)), there)


def _nothing(cells: int, octaves: bool) -> tuple[jax.Array, jax.Array]:
    columns = _SUMS + 2 * (_NUMBERS + (OCTAVES if octaves else 0))
    return jnp.zeros((cells, columns), jnp.float32), jnp.full(cells, NOTHING)


@partial(jax.jit, static_argnums=(1, 2))
def _of_leaf(x: jax.Array, layered: bool, octaves: bool) -> tuple[jax.Array, jax.Array]:
    """Return the columns of a leaf, or of each of its layers, shape (cells, columns), and the largest magnitudes.

    Compiled apart, so that leaves of one shape are traced once.
    """
    x = x.reshape(x.shape if layered else (1, *x.shape))
    over = tuple(range(1, x.ndim))
    wide = x.astype(jnp.float32)
    finite = jnp.isfinite(wide)
    y = jnp.where(finite, wide, 0.0)
    size = jnp.abs(y)

    def squares(these: jax.Array, bounded: jax.Array, scale: float) -> jax.Array:
        # Bounded, for XLA may multiply by 0 what is not selected: it must not have become infinite.
        return jnp.where(these, jnp.square(bounded * np.float32(scale)), 0.0).sum(over)

    most_tiny, most_usual = np.float32(TINY), np.float32(HUGE)
    tiny, huge = size < most_tiny, size > most_usual
    zero = _zeros(x)
    columns = [
        squares(tiny, jnp.minimum(size, most_tiny), SCALE),
        squares(~tiny & ~huge, jnp.minimum(size, most_usual), 1.0),
        squares(huge, size, 1.0 / SCALE),
        y.sum(over),
        *_number(zero * finite, over),
        *_number(~finite, over),
    ]
    bits = lax.bitcast_convert_type(y, jnp.int32) & _EXPONENT_AND_FRACTION
    sums, largest = jnp.stack(columns, axis=-1), bits.max(over, initial=0)
    if not octaves:
        return sums, largest
    octave = jnp.clip((bits >> 23) - (127 - OCTAVES // 2), 0, OCTAVES - 1)
    octave = jnp.where(finite & (zero == 0), octave, OCTAVES)
    layer = lax.broadcasted_iota(np.int32, x.shape, 0)
    numbers = jnp.zeros((len(x), OCTAVES), _counting(x, over)).at[layer, octave].add(1, mode="drop")
    return jnp.concatenate([sums, jnp.stack(_pair(numbers), -1).reshape(len(x), -1)], 1), largest


def _zeros(x: jax.Array) -> jax.Array:
    """Return 1 where an element is 0, as integers, also where a device takes subnormal numbers for 0."""
    width = 8 * x.dtype.itemsize
    unsigned: Any = np.dtype(f"uint{width}").type
    size = lax.bitcast_convert_type(x, unsigned) & unsigned((1 << (width - 1)) - 1)
    # Not by a comparison with 0: LLVM makes one of floats of it.
    zeros: jax.Array = ((size - unsigned(1)) >> unsigned(width - 1)).astype(jnp.int32)
    return zeros


def _number(flags: jax.Array, over: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Return how many flags are set, as a pair."""
    return _pair(flags.sum(over, dtype=_counting(flags, over)))


def _counting(x: jax.Array, over: tuple[int, ...]) -> Any:
    """Return the type in which elements are counted: exactly, up to 2^31 of them, and beyond to 1e-6."""
    most = math.prod(x.shape[axis] for axis in over)
    return np.dtype(np.int32 if _MOST_IN_FLOAT < most <= _MOST_IN_INT else np.float32)


def _pair(number: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return two float32 that add up to a number."""
    high = number.astype(jnp.float32)
    whole = number.dtype == np.int32
    return high, (number - high.astype(jnp.int32)).astype(jnp.float32) if whole else high * 0


def _takes_its_turn(axes: Axes, spec: Sequence[Axes], place: int) -> jax.Array:
    """Return 1 on one of the devices that hold the same part, which is another for another leaf, else 0."""
    flag: Any = np.float32(1.0)
    for axis in axes:
        if not any(axis in cut for cut in spec):
            flag = flag * (lax.axis_index(axis) == place % lax.axis_size(axis))
    return jnp.asarray(flag)


def _among_all_layers(
    sums: jax.Array, largest: jax.Array, cells: int, spec: Sequence[Axes]
) -> tuple[jax.Array, jax.Array]:
    """Return what is known of all layers of a leaf of which there may be some here."""
    if len(sums) == cells:
        return sums, largest
    first = lax.axis_index(spec[0]) * len(sums)

    def put(part: jax.Array, whole: jax.Array) -> jax.Array:
        differing = tuple(varying(part) - varying(whole))
        whole = lax.pcast(whole, differing, to="varying") if differing else whole
        return lax.dynamic_update_slice_in_dim(whole, part, first, 0)

    nothing = jnp.zeros((cells, sums.shape[1]), jnp.float32), jnp.full(cells, NOTHING)
    return put(sums, nothing[0]), put(largest, nothing[1])


def _joined(sums: jax.Array, largest: jax.Array, axes: Axes) -> tuple[jax.Array, jax.Array]:
    """Return the columns of whole leaves from those of parts."""
    high, low = sums[:, _SUMS::2], sums[:, _SUMS + 1 :: 2]
    limbs = []
    for unit in _LIMBS:
        limbs.append(jnp.floor(high * np.float32(1 / unit)) * np.float32(unit))
        high = high - limbs[-1]
    sent = jnp.concatenate([sums[:, :_SUMS], *limbs[:-1], limbs[-1] + low], axis=1)
    added, compared = combine([("sum", sent), ("max", largest)], axes)
    pairs = jnp.zeros((*low.shape, 2), jnp.float32)
    for limb in jnp.split(added[:, _SUMS:], len(_LIMBS), axis=1):
        pairs = add_pairs(pairs, _as_pairs(limb))
    return jnp.concatenate([added[:, :_SUMS], pairs.reshape(len(sums), -1)], axis=1), compared


def _as_pairs(sums: jax.Array) -> jax.Array:
    return jnp.stack([sums, jnp.zeros_like(sums)], axis=-1)


def _rows(sums: jax.Array, largest: jax.Array, there: np.ndarray[Any, Any]) -> Lanes:
    number = len(there)
    plain, numbers = _as_pairs(sums[:, :_SUMS]), sums[:, _SUMS:].reshape(number, -1, 2)
    second = jnp.concatenate([plain[:, SUMS:], numbers[:, :_NUMBERS]], axis=1)
    octaves = numbers[:, _NUMBERS:]
    filled = jnp.pad(octaves, ((0, 0), (0, -octaves.shape[1] % SUMS), (0, 0)))
    of_rows = jnp.concatenate([plain[:, :SUMS], second, filled.reshape(-1, SUMS, 2)])
    rows = len(of_rows)
    counts = np.zeros((rows, COUNTS), np.int32)
    counts[: 2 * number, 0] = np.tile(there, 2)
    high = jnp.full((rows, EXTREMA), NOTHING).at[:number, 0].set(largest)
    return Lanes(jnp.asarray(counts), of_rows, jnp.stack([high, jnp.zeros_like(high)], axis=-1))
