"""`DeviceAccumulator`: metrics that accumulate inside the compiled step, per dataset.

acc = DeviceAccumulator({"loss": "mean", "len": "distribution"}, datasets=("alpaca", "orca"))

@jax.jit
def step(params, acc, batch):
    losses = per_sample_loss(params, batch)
    acc = acc.update("loss", losses, weights=batch["tokens"], dataset_ids=batch["dataset"])
    return acc.update("len", batch["tokens"], dataset_ids=batch["dataset"])

for batch in loader:
    acc = step(params, acc, batch)
acc = aggregator.drain(acc)                 # one transfer, which nothing waits for
aggregator.get_metrics_for_logging()
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, auto_axes

from metricfold._core.device.arrays import counts_here
from metricfold._core.device.rows import (
    COUNTS,
    EXTREMA,
    FRACTION_BITS,
    MOMENTS,
    SUMS,
    HostArrays,
    Layout,
    check_fits,
    checksum,
    fits,
    with_checksum,
    without_checksum,
)
from metricfold._core.runtime.listing import internal
from metricfold._core.runtime.staging import is_traced
from metricfold.data.ids import DatasetIds
from metricfold.jax.axes import DEFAULT_AXIS, AxisName, resolve_axes
from metricfold.jax.collectives import Lane, axes_size, combine
from metricfold.jax.exact_sums import MOST_TERMS, Limbs, add_pairs, exponents, magnitudes
from metricfold.jax.folding import CELL_SUMS, REFUSED, Batch, Numbers
from metricfold.jax.lanes import LANES, LOWEST, Lanes, floats, nothing, of_host, on_host, words
from metricfold.jax.mesh import only_mesh
from metricfold.jax.trees import Leaf, flatten, weights_of
from metricfold.jax.values import Parts, as_array, as_parts, is_readable, put, refuse_masked
from metricfold.jax.watching import Laid, check_stacked, laid, leaves_of, statistics, watched
from metricfold.metric import AggregationType

__all__ = ["DeviceAccumulator"]

_NAMES = ("fingerprint", "lanes", "refused", "grid")
"""The arrays: int32, whatever their bits stand for, but for the fingerprint, which is uint32."""
_KEYS = tuple(map(jax.tree_util.GetAttrKey, _NAMES))
_OF_0_1 = (
    "this accumulator was saved by metricfold 0.1, which tied its arrays to no names: convert it by "
    "DeviceAccumulator.from_0_1({})"
)
_PATIENCE = 0.02
"""Seconds that `drain` waits for the fingerprint, which tells it at once what a reduction would say."""


@jax.tree_util.register_pytree_with_keys_class
@internal(
    *_NAMES,
    *("arrays", "layout", "start_read", "with_arrays"),
    *("tree_flatten", "tree_flatten_with_keys", "tree_unflatten"),
)
class DeviceAccumulator:
    """Metrics that accumulate on the device, for each dataset, until `MetricsAggregator.drain`.

    It is a pytree of a few arrays, never changed in place: pass it to a compiled step and take the
    new one back. It may be donated, be the carry of a ``scan``, live in an ``nnx`` module, and be
    saved by Orbax.

    A DISTRIBUTION is a histogram with 64 buckets per octave: percentiles are right to 1.6 %, mean
    and std far better. It takes 1.04 MB per dataset, in each of which all float32 have their place.

    Sums are right to 1e-6 or better however many updates there are, and counts to 2^31 values
    between two drains.

    Args:
        metrics: by name, the aggregation of each: ``"mean"``, ``"sum"``, ``"max"``, ``"min"`` or
            ``"distribution"``, or the `AggregationType`; or, of a metric with a cell for each index of
            some axes, a tuple of it and their names: ``("sum", "layer", "expert")``.
        datasets: their names; `update` says by ``dataset_ids`` which of them a value belongs to.
            None for metrics of a step, which belong to no dataset.
        axes: the size of each axis that a metric names, or a list of labels.
        trees: by name, such as ``"grad"``, a pytree of what `watch_tree` is to be given: arrays, or what has
            their shapes and types.
        stacked: patterns of the leaves of trees in which layers are stacked along the first dimension,
            such as ``"layers/*"``, as of a ``scan`` over layers: of those each layer counts apart.
        octaves: whether the magnitudes in trees are counted by power of two, too, which takes 2.4 kB for
            each leaf or layer.
        mesh: of the step that it is for. What a step on a mesh returns is on that, and what it is first
            given, if it is elsewhere, is compiled for apart. By default that of ``jax.set_mesh``; else, in
            a program of one process, the one mesh of all devices that `DeviceMeshManager` has made, if it
            has made no other; else JAX's default device.

    Raises:
        TypeError, ValueError: an aggregation that devices do not do, axes that are none, or a name
            that is none.

    >>> from metricfold import MetricsAggregator
    >>> acc = DeviceAccumulator({"loss": "mean"}, datasets=("alpaca", "orca"))
    >>> acc = acc.update("loss", jnp.array([1.0, 2.0, 4.0]), dataset_ids=jnp.array([0, 1, 1]))
    >>> aggregator = MetricsAggregator()
    >>> acc = aggregator.drain(acc)
    >>> aggregator.get_metrics_for_logging("train")
    {'train_alpaca/loss': 1.0, 'train_orca/loss': 3.0}
    """

    __slots__ = ("__weakref__", "fingerprint", "grid", "lanes", "layout", "refused")

    fingerprint: Any
    lanes: Any
    refused: Any
    grid: Any
    layout: Layout

    def __init__(
        self,
        metrics: Mapping[str, object],
        datasets: Iterable[str] = (),
        *,
        axes: Mapping[str, int | Sequence[str]] | None = None,
        trees: Mapping[str, Any] | None = None,
        stacked: str | Sequence[str] = (),
        octaves: bool = False,
        mesh: Mesh | None = None,
    ) -> None:
        layout = Layout.of(metrics, datasets, axes, watched(trees or {}, stacked, octaves=octaves))
        place = _usual_place() if mesh is None else NamedSharding(mesh, PartitionSpec())
        self._set(layout, _nothing(layout, (), [place] * len(_NAMES)))

    @classmethod
    def from_0_1(
        cls, saved: Any, metrics: Mapping[str, object] | None = None, datasets: Iterable[str] = ()
    ) -> DeviceAccumulator:
        """Return the accumulator that metricfold 0.1 saved, which had no fingerprint.

        What was in the arrays cannot be checked: be sure that nothing but `update`, `merge` and `reduce`
        has changed them, and that `metrics` and `datasets` are those, in the order, with which it was made.

        Args:
            saved: an unpickled accumulator, or what Orbax restores without a template: a dict of the
                arrays ``counts``, ``sums``, ``extrema``, ``refused`` and, of DISTRIBUTIONs, ``grid``.
            metrics: as at construction; not needed for what was pickled, which brings its own.
            datasets: likewise.

        Raises:
            TypeError, ValueError: arrays that are missing or of other shapes or types than these
                metrics and datasets come to.
        """
        arrays = saved
        if isinstance(saved, DeviceAccumulator):
            if saved.fingerprint is not None:
                raise ValueError("this accumulator has a fingerprint: it needs no conversion")
            arrays, layout = saved.lanes, saved.layout
        elif metrics is None:
            raise TypeError(
                "metrics: give those with which the accumulator was made, and its datasets"
            )
        else:
            layout = Layout.of(metrics, datasets)
        if not isinstance(arrays, Mapping) or not _are_of_0_1(arrays):
            raise TypeError(
                f"saved: give a dict of the arrays {', '.join(HostArrays._fields)}, not "
                f"{type(saved).__name__}"
            )
        lanes, refused, grid = map(jnp.asarray, _of_0_1(arrays, layout))
        rest = [lanes, refused, grid if layout.cells else None]
        return _sealed(layout, jnp.uint32(layout.fingerprint), lanes[:, :COUNTS], rest)

    def _set(self, layout: Layout, arrays: Iterable[Any]) -> None:
        self.layout = layout
        self.fingerprint, self.lanes, self.refused, self.grid = arrays

    def _arrays(self) -> list[Any]:
        return [self.fingerprint, self.lanes, self.refused, self.grid]

    # As a pytree
    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], Layout]:
        return list(zip(_KEYS, self._arrays(), strict=True)), self.layout

    def tree_flatten(self) -> tuple[list[Any], Layout]:
        return self._arrays(), self.layout

    @classmethod
    def tree_unflatten(cls, layout: Layout, arrays: Iterable[Any]) -> DeviceAccumulator:
        accumulator = object.__new__(cls)
        accumulator._set(layout, arrays)
        return accumulator

    def __setstate__(self, state: tuple[Any, dict[str, Any]]) -> None:
        slots = state[1]
        if "fingerprint" in slots:
            self._set(slots["layout"], [slots[name] for name in _NAMES])
        else:  # of 0.1: kept as it is, for `from_0_1`
            arrays = {name: slots[name] for name in HostArrays._fields}
            self._set(slots["layout"], [None, arrays, None, None])

    def arrays(self) -> dict[str, Any]:
        """Return the arrays by name, for `with_arrays`."""
        named = zip(_NAMES, self._arrays(), strict=True)
        return {name: array for name, array in named if array is not None}

    def with_arrays(self, arrays: Mapping[str, Any]) -> DeviceAccumulator:
        """Return an accumulator of the same metrics with arrays that were saved, which are checked."""
        if _are_of_0_1(arrays):
            raise ValueError(_OF_0_1.format("arrays, metrics, datasets"))
        # Orbax, without a template, restores what was not there as None.
        arrays = {name: array for name, array in arrays.items() if array is not None}
        if arrays.keys() != self.arrays().keys():
            raise ValueError(
                f"{sorted(arrays)} are no arrays of an accumulator of {self!r}, which are "
                f"{sorted(self.arrays())}"
            )
        restored = self.tree_unflatten(self.layout, [arrays.get(name) for name in _NAMES])
        restored._copies()  # noqa: SLF001 - of this class
        restored._check_if_there()  # noqa: SLF001
        return restored

    # -- Inside the step

    def update(
        self,
        name: str,
        values: Any,
        *,
        weights: Any = None,
        dataset_ids: Any = None,
        ids: Mapping[str, Any] | None = None,
    ) -> DeviceAccumulator:
        """Return an accumulator that has also seen `values`.

        Inside of a compiled step it is part of that; outside it is one compiled program, which is
        made once for each set of shapes.

        Args:
            name: of the metric.
            values: numbers, of any shape and type; no gradient flows through.
            weights: how much each value counts in a MEAN or DISTRIBUTION. What has weight 0 is
                left out of every aggregation, also a NaN: so padding is masked. Of the shape of the
                values or of their first dimensions, so that one per sample does for each token; else
                as NumPy broadcasts them: ``(tokens,)`` and ``(samples, 1)`` do, too.
            dataset_ids: integers that say which of the datasets each value belongs to, by its
                place; shaped like weights. May be left out where there is only one. A value whose
                id is the place of none is left out, and `drain` warns of it.
            ids: by axis, which cell each value is of: integers like `dataset_ids`, or one number or label
                for all. Axes of the metric that are not named are the last dimensions of the values.

        Raises:
            TypeError, ValueError: when the step is traced: an unknown name or axis, shapes that do not
                fit, types that are no numbers, no `dataset_ids` where there are several datasets, an
                integer of the host that 48 bits do not hold, a cell known on the host that there is not,
                or an accumulator that is several or was cast.

        >>> acc = DeviceAccumulator({"tokens": ("sum", "layer", "expert")}, axes={"layer": 2, "expert": 3})
        >>> acc = acc.update("tokens", jnp.ones(4), ids={"layer": 1, "expert": jnp.array([0, 2, 2, 2])})
        """
        return self.update_all({name: values}, weights=weights, dataset_ids=dataset_ids, ids=ids)

    def at(self, name: str, /, **cells: Any) -> PlacedMetric:
        """Return those of a metric's cells that are `cells` along the axes named here.

        ``acc = acc.at("expert_tokens", layer=3).update(ones, ids={"expert": top})`` is for code that is
        handed its place, as a layer is; a number may be traced, as in a ``scan`` over layers.

        Raises:
            TypeError, ValueError: there is no such metric, axis or cell.
        """
        _cells(self.layout, [name], cells)
        return PlacedMetric(self, name, cells)

    def update_all(
        self,
        values: Any,
        *,
        weights: Any = None,
        dataset_ids: Any = None,
        ids: Mapping[str, Any] | None = None,
    ) -> DeviceAccumulator:
        """Return an accumulator that has also seen these `values` of several metrics, by name.

        Metrics whose values have one shape are folded together, which costs a compiler little more
        than one of them.

        Args:
            values: by name: a dict, or any pytree with such fields, as a NamedTuple or a dataclass.
            weights: as in `update`, the same for all, or a tree with those of each metric.
            dataset_ids: as in `update`, the same for all.
            ids: as in `update`; each metric takes those of the axes that it has.

        Raises:
            TypeError, ValueError: as `update`.
        """
        self._check_whole()
        groups = _groups(self.layout, values, weights, dataset_ids, ids)
        if not groups:
            return self
        laid_out = _over_explicit_axes(groups)
        fold = _updated if laid_out is None else _over(laid_out, _fold)
        updated: DeviceAccumulator = fold(_beside(self, groups), groups)
        return updated

    def watch_tree(
        self,
        name: str,
        tree: Any,
        *,
        stacked: str | Sequence[str] | None = None,
        specs: Any = None,
        axes: AxisName = None,
    ) -> DeviceAccumulator:
        """Return an accumulator that has also collected statistics of each leaf of `tree`.

        Of ``"grad"`` they are ``grad/norm``, ``grad/mean``, ``grad/abs_max``, ``grad/zeros`` (the share of
        zeros) and ``grad/nonfinite`` (how many elements are NaN or infinite), metrics with the axis
        ``parameter``, and ``layer`` where layers are stacked; and ``grad/octaves``, if those are asked for.
        So ``grad/norm`` is the norm over all
        leaves, and ``by={"grad/norm": "parameter"}`` prints that of each. Norm, mean and maximum are NaN where
        an element is not finite, or with ``on_nan="skip"`` those of the others. Of several collections between
        two drains it is the mean (root of the mean of squares, for a norm).

        Under `jax.jit` arrays are whole, however they are sharded, and replicas count once. Inside of
        `jax.shard_map`, where they are parts, `specs` say how these lie; that takes one psum and one pmax for
        all leaves. Call it under a condition that is known when the step is traced: steps that do not
        collect then have nothing of it.

        Args:
            name: of the tree, as in ``trees=``.
            tree: with leaves that were there; those that are missing are left out, as are those that hold
                no floating-point numbers.
            stacked: if given, the patterns that the accumulator was made with.
            specs: inside of ``shard_map``, a `PartitionSpec` for each leaf, as in its ``in_specs``.
            axes: of the mesh over which parts and replicas join. By default all that are bound.

        Raises:
            TypeError, ValueError: there is no such tree, a leaf is unknown or has another shape, or is not
                reduced yet over an axis of which its spec says nothing.
            NameError: an axis is not bound.

        >>> params = {"w": jnp.array([[3.0, 0.0], [0.0, 4.0]]), "b": jnp.array([12.0])}
        >>> acc = DeviceAccumulator({"loss": "mean"}, trees={"grad": params})
        >>> acc = acc.watch_tree("grad", params)
        >>> from metricfold import MetricsAggregator
        >>> aggregator = MetricsAggregator()
        >>> acc = aggregator.drain(acc)
        >>> snapshot = aggregator.reduce()
        >>> snapshot.value(None, "grad/norm"), snapshot.array(None, "grad/norm")
        (13.0, (array([12.,  5.]), (('b', 'w'),)))
        """
        self._check_whole()
        place = self.layout.tree(name)
        declared = self.layout.trees[place]
        if stacked is not None:
            check_stacked(declared, stacked)
        where = laid(declared, tree, specs, axes)
        leaves = leaves_of(declared, tree, where)
        if not leaves:
            return self
        here, laid_out = _beside(self, leaves), _over_explicit_axes(leaves)
        collected: DeviceAccumulator = (
            _watched(here, leaves, place, where)
            if laid_out is None
            else _over(laid_out, _watch, place)(here, leaves)
        )
        return collected

    def merge(self, other: DeviceAccumulator) -> DeviceAccumulator:
        """Return an accumulator that has seen what both have.

        Several in one, as of a ``pmap``, merge one by one.

        Raises:
            TypeError, ValueError: `other` holds other metrics or datasets, or either has been added
                up, averaged, cast or zeroed. Of arrays that are not there yet, `drain` says so.
        """
        if not isinstance(other, DeviceAccumulator) or other.layout != self.layout:
            raise ValueError(f"only accumulators of the same metrics merge: {self!r}, {other!r}")
        if self._copies() != other._copies():
            raise ValueError(
                f"an accumulator that holds {_many(self._copies())} does not merge with one that holds "
                f"{_many(other._copies())}"
            )
        for each in (self, other):
            each._check_if_there()  # noqa: SLF001 - of this class
        merged = _merged
        for _ in self._copies():
            merged = jax.vmap(merged)
        both: DeviceAccumulator = merged(self, _beside(other, self))
        return both

    def reduce(self, axis_name: AxisName = DEFAULT_AXIS) -> DeviceAccumulator:
        """Return, on every device, an accumulator that has seen what those of all devices have.

        For ``pmap``, ``shard_map`` and ``vmap``, where each device accumulates what it sees. It
        takes two collectives, one more where there is a MAX or MIN, and two more for DISTRIBUTIONs.
        Under plain ``jit`` with sharded inputs there is one accumulator for all, and nothing to reduce.

        Args:
            axis_name: as in `DistributedMetrics`.

        Raises:
            NameError: the axis is not bound.
        """
        self._check_whole()
        axes = resolve_axes(axis_name)
        if not axes:
            return self
        lanes = Lanes.of(self.lanes)
        assert lanes.extrema is not None
        pairs = [lanes.sums] if self.grid is None else [lanes.sums, floats(self.grid)]
        limbs = Limbs(2 * axes_size(axes), 50)
        mark = words(_unsealed(self))
        largest: list[Lane] = [("max", magnitudes(p[..., 0])) for p in pairs]
        marks: list[Lane] = [("max", mark), ("max", ~mark)]
        high, most, least, *most_of = combine(
            [("max", lanes.extrema[..., 0]), *marks, *largest], axes
        )
        exponent = [exponents(bits) for bits in most_of]
        sent: list[Lane] = [
            ("sum", limbs.of(p[..., 0], e) + limbs.of(p[..., 1], e))
            for p, e in zip(pairs, exponent, strict=True)
        ]
        counted: list[Lane] = [("sum", lanes.counts), ("sum", self.refused)]
        counts, refused, *added = combine([*counted, *sent], axes)
        totals = [limbs.pairs(total, e) for total, e in zip(added, exponent, strict=True)]
        low = jnp.zeros_like(high)
        if any(t in self.layout.types for t in (AggregationType.MAX, AggregationType.MIN)):
            own = jnp.where(lanes.extrema[..., 0] == high, lanes.extrema[..., 1], LOWEST)
            (low,) = combine([("max", own)], axes)
        # Of devices that do not agree, one has arrays of something else.
        agreed = jnp.where(most == ~least, most, 0)
        together = Lanes(counts, totals[0], jnp.stack([high, low], axis=-1)).words()
        grid = None if self.grid is None else words(totals[1])
        mark = lax.bitcast_convert_type(agreed, jnp.uint32)
        return _sealed(self.layout, mark, counts, [together, refused, grid])

    # -- On the host

    def empty(self) -> DeviceAccumulator:
        """Return an accumulator of the same metrics, in the same place, that has seen nothing.

        Several in one, as of a ``pmap`` or ``vmap``, become as many empty ones.
        """
        return self.tree_unflatten(
            self.layout, _nothing(self.layout, self._copies(), map(_place, self._arrays()))
        )

    def start_read(self) -> Callable[[], HostArrays | None]:
        """Begin the transfer to the host; what is returned waits for it.

        Of arrays that cannot be read or are not those of these metrics it raises TypeError or ValueError;
        where this shows only later, because the step still runs, what is returned does.
        """
        arrays = [array for array in self._arrays() if array is not None]
        if any(is_traced(array) for array in arrays):
            raise TypeError(
                "drain() reads an accumulator, which a traced function does not have yet: return it "
                "from the compiled step, and drain it outside"
            )
        self._check_whole()
        if any(isinstance(array, jax.ShapeDtypeStruct) for array in arrays):
            raise TypeError(
                "this accumulator has shapes and no numbers, as from eval_shape or as a template for Orbax: "
                "drain the one that was computed or restored"
            )
        on_device = [array for array in arrays if isinstance(array, jax.Array)]
        if any(array.is_deleted() for array in on_device):
            raise ValueError(
                "this accumulator was donated to a compiled step: drain the one that the step returned"
            )
        if not all(map(is_readable, on_device)):
            raise ValueError(
                "this accumulator lies in parts on several processes: reduce() it in the step, and "
                "return it with out_specs=P()"
            )
        with jax.transfer_guard_device_to_host("allow"):
            for array in on_device:
                array.copy_to_host_async()
        checked = self._check_if_there(_PATIENCE)
        contributes = counts_here(self.fingerprint)

        def finish() -> HostArrays | None:
            if any(array.is_deleted() for array in on_device):
                raise ValueError(
                    "this accumulator was donated to a compiled step after drain() and before it was "
                    "read: go on with the empty one that drain() returns, acc = aggregator.drain(acc)"
                )
            if not checked:
                self._check_fingerprint()
            return on_host(*map(_on_host, self._arrays()[1:])) if contributes else None

        return finish

    def _check_if_there(self, patience: float = 0.0) -> bool:
        """Check the fingerprint if it can be read within so many seconds; returns whether it could."""
        deadline = time.monotonic() + patience
        while not (_is_there(self.fingerprint) and _is_there(self.lanes)):
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.0005)
        self._check_fingerprint()
        return True

    def _check_fingerprint(self) -> None:
        """Check that the arrays are of this layout and were folded, as far as they can be read here."""
        if not (is_readable(self.fingerprint) and is_readable(self.lanes)):
            return
        counts = np.ascontiguousarray(_on_host(self.lanes)[..., :COUNTS]).view(np.uint32)
        marks = without_checksum(_on_host(self.fingerprint), checksum(counts))
        for mark in np.ravel(marks).tolist():
            self.layout.check_fingerprint(mark)

    def _copies(self) -> tuple[int, ...]:
        """Return the leading dimensions of an accumulator that is several; raises if it is none."""
        if self.fingerprint is None:
            raise ValueError(_OF_0_1.format("accumulator"))
        found: set[tuple[int, ...]] = set()
        for name, shape in _shapes(self.layout).items():
            array = getattr(self, name)
            dtype = np.dtype(np.uint32 if name == "fingerprint" else np.int32)
            found_in = getattr(array, "dtype", type(array).__name__)
            if found_in != dtype:
                raise TypeError(
                    f"the {name!r} of this accumulator is of type {found_in}, not {dtype}: it was cast, "
                    "averaged or scaled like parameters, and says nothing any more. Accumulators are "
                    "brought together by merge() and reduce(); keep them out of what casts or averages a "
                    "training state"
                )
            leading = array.ndim - len(shape)
            if leading < 0 or array.shape[leading:] != shape:
                raise ValueError(
                    f"this is no accumulator of {self!r}: its {name} have the shape {array.shape}, which "
                    f"does not end in {shape}"
                )
            found.add(array.shape[:leading])
        if len(found) > 1:
            raise ValueError(
                f"the arrays of this accumulator hold {' and '.join(map(_many, found))}"
            )
        return found.pop()

    def _check_whole(self) -> None:
        """Check that this is one accumulator, as far as types and shapes tell."""
        copies = self._copies()
        if copies:
            raise ValueError(
                f"this is not one accumulator, but {_many(copies)}, such as one for each device of a "
                "pmap, or each seed of a vmap. Update them in there. To drain those of a pmap, reduce() "
                "them in there and drain one of the copies, jax.tree.map(lambda x: x[0], acc); those of "
                "seeds one by one. acc.empty() begins all of them anew"
            )

    def __repr__(self) -> str:
        return f"DeviceAccumulator({self.layout})"


class PlacedMetric:
    """Some of the cells of a metric of an accumulator, as `DeviceAccumulator.at` returns them."""

    def __init__(self, accumulator: DeviceAccumulator, name: str, cells: Mapping[str, Any]) -> None:
        self._accumulator, self._name, self._cells = accumulator, name, cells

    def update(
        self,
        values: Any,
        *,
        weights: Any = None,
        dataset_ids: Any = None,
        ids: Mapping[str, Any] | None = None,
    ) -> DeviceAccumulator:
        """Return an accumulator that has also seen `values`; arguments as of `DeviceAccumulator.update`.

        Raises:
            TypeError, ValueError: as that; also for `ids` of an axis that `at` has named.
        """
        twice = [axis for axis in ids or {} if axis in self._cells]
        if twice:
            raise ValueError(
                f"ids= names the axis {twice[0]!r}, which at() has named: leave it out"
            )
        return self._accumulator.update(
            self._name,
            values,
            weights=weights,
            dataset_ids=dataset_ids,
            ids={**self._cells, **(ids or {})},
        )


# -- Folding, as compiled programs -----------------------------------------------------------------

Group: TypeAlias = tuple[dict[str, Parts], Parts | None, jax.Array | None, dict[str, jax.Array]]
"""Values that are folded together: of each metric by name, their weights, their datasets, and their cells by axis."""


def _fold(accumulator: DeviceAccumulator, groups: Sequence[Group]) -> DeviceAccumulator:
    layout, lanes = accumulator.layout, accumulator.lanes
    mark, refused, grid = _unsealed(accumulator), accumulator.refused, accumulator.grid
    for given, weights, ids, cells in groups:
        shape = next(iter(given.values()))[0].shape
        batch = Batch(
            layout,
            {name: Numbers.of(given[name]) for name in sorted(given, key=layout.place)},
            None if weights is None else Numbers.of([_spread(w, shape) for w in weights]),
            _indices(layout, next(iter(given)), ids, cells, shape),
        )
        first, last = batch.places[0], batch.places[-1]  # they ascend
        adjoining = last - first == len(batch.places) - 1
        places = slice(first, last + 1) if adjoining else np.asarray(batch.places)
        rows = layout.rows_of(batch.places)
        new: Lanes = jax.tree.map(_by_metric, batch.fold())
        lanes = lanes.at[rows].set(Lanes.of(lanes[rows]).merged(new).words())
        refused = refused.at[places].add(batch.refused())
        grid = batch.into_grid(grid)
    return _sealed(layout, mark, lanes[:, :COUNTS], [lanes, refused, grid])


def _by_metric(part: jax.Array) -> jax.Array:
    """Return the rows of all metrics, metric by metric, from shape (rows of each, metrics, ...)."""
    return part.swapaxes(0, 1).reshape(-1, *part.shape[2:])


def _indices(
    layout: Layout,
    name: str,
    dataset_ids: jax.Array | None,
    cells: Mapping[str, jax.Array],
    shape: tuple[int, ...],
) -> list[tuple[jax.Array, int]]:
    """Return where each value goes: its dataset, if it comes with one, and its place along each axis."""
    found = []
    if dataset_ids is not None:
        found.append((_spread(dataset_ids, shape), len(layout.datasets)))
    last = layout.last_axes(name, cells, shape)
    for axis in layout.axes[layout.place(name)]:
        if axis.name in cells:
            index = _spread(cells[axis.name], shape)
        else:
            dimension = len(shape) - len(last) + last.index(axis)
            index = lax.broadcasted_iota(np.int32, shape, dimension).reshape(-1)
        found.append((index, axis.length))
    return found


def _watch(
    accumulator: DeviceAccumulator,
    leaves: Mapping[str, jax.Array],
    place: int,
    where: Laid | None = None,
) -> DeviceAccumulator:
    layout, lanes, mark = accumulator.layout, accumulator.lanes, _unsealed(accumulator)
    rows = layout.rows_of_trees[place]
    new = statistics(layout.trees[place], leaves, where)
    lanes = lanes.at[rows].set(Lanes.of(lanes[rows]).merged(new).words())
    rest = [lanes, accumulator.refused, accumulator.grid]
    return _sealed(layout, mark, lanes[:, :COUNTS], rest)


def _merge(one: DeviceAccumulator, other: DeviceAccumulator) -> DeviceAccumulator:
    lanes = Lanes.of(one.lanes).merged(Lanes.of(other.lanes))
    mark = _unsealed(one)
    agreed = jnp.where(mark == _unsealed(other), mark, jnp.uint32(0))
    grid = one.grid
    if grid is not None:
        grid = words(add_pairs(floats(grid), floats(other.grid)))
    rest = [lanes.words(), one.refused + other.refused, grid]
    return _sealed(one.layout, agreed, lanes.counts, rest)


def _unsealed(accumulator: DeviceAccumulator) -> jax.Array:
    """Return the fingerprint without its checksum."""
    total = _checksum(accumulator.lanes[:, :COUNTS])
    mark: jax.Array = without_checksum(accumulator.fingerprint, total)
    return mark


def _sealed(
    layout: Layout, mark: jax.Array, counts: jax.Array, rest: Sequence[jax.Array | None]
) -> DeviceAccumulator:
    """Return an accumulator of these arrays, the first of which is to carry the checksum of counts."""
    arrays = [with_checksum(mark, _checksum(counts)), *rest]
    return DeviceAccumulator.tree_unflatten(layout, arrays)


def _checksum(counts: jax.Array) -> jax.Array:
    total: jax.Array = checksum(lax.bitcast_convert_type(counts, jnp.uint32))
    return total


_updated: Any = jax.jit(_fold)
_watched: Any = jax.jit(_watch, static_argnums=(2, 3))
_merged: Any = jax.jit(_merge)


@cache
def _over(laid_out: AbstractMesh, fold: Callable[..., DeviceAccumulator], *static: Any) -> Any:
    """Return what folds arrays that are laid out over explicit axes, compiled.

    There JAX asks for the layout of each step on the way; XLA needs none.
    """
    replicated = NamedSharding(laid_out, PartitionSpec())

    def folded(accumulator: DeviceAccumulator, given: Any) -> DeviceAccumulator:
        return fold(accumulator, given, *static)

    return jax.jit(auto_axes(folded, axes=laid_out.explicit_axes, out_sharding=replicated))


def _spread(array: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Return one element per value, shape (n,)."""
    aligned = fits(array.shape, shape)
    assert aligned is not None  # checked where it was given
    return jnp.broadcast_to(array.reshape(aligned), shape).reshape(math.prod(shape))


# -- What is given ---------------------------------------------------------------------------------


def _groups(layout: Layout, values: Any, weights: Any, dataset_ids: Any, ids: Any) -> list[Group]:
    """Return what is to be folded, checked, with what has one shape, weight and axes together."""
    leaves = _by_name(layout, values)
    names = [leaf.keys[0] for leaf in leaves]
    cells = _cells(layout, names, ids)
    if not leaves:
        return []
    named = ", ".join(map(repr, names))
    weights_for: list[Parts | None] = [None] * len(leaves)
    if weights is not None:
        weights_for = weights_of(
            weights,
            leaves,
            lambda leaf: f"metric {leaf.keys[0]!r}",
            lambda given, where: as_parts(given, f"{where} of metric {named}"),
        )
    datasets = None
    if layout.takes_ids(f"metric {named}", dataset_ids):
        where = f"dataset_ids of metric {named}"
        if isinstance(dataset_ids, DatasetIds):
            raise TypeError(
                f"{where} are the names of a batch's datasets, which no compiled step can look up: give it "
                "batch['dataset_ids'].places(datasets), with the datasets that the accumulator was made with"
            )
        datasets = _integers(dataset_ids, where, len(layout.datasets))
    groups: dict[Any, Group] = {}
    for leaf, w in zip(leaves, weights_for, strict=True):
        name = leaf.keys[0]
        numbers = as_parts(leaf.value, f"values of metric {name!r}")
        shape, size, axes = numbers[0].shape, numbers[0].size, layout.axes[layout.place(name)]
        if size > MOST_TERMS:
            raise ValueError(
                f"metric {name!r} was given {size} values at once: give {MOST_TERMS} at most"
            )
        own = {axis.name: cells[axis.name] for axis in axes if axis.name in cells}
        beside = {"weights": None if w is None else w[0], "dataset_ids": datasets}
        for what, array in (beside | {f"ids[{axis!r}]": own[axis] for axis in own}).items():
            if array is not None:
                check_fits(f"{what} of metric {name!r}", array.shape, shape)
        layout.last_axes(name, own, shape)
        if size:
            groups.setdefault((shape, id(w), axes), ({}, w, datasets, own))[0][name] = numbers
    return list(groups.values())


def _cells(layout: Layout, names: Sequence[str], ids: Any) -> dict[str, jax.Array]:
    """Return the cells that values of these metrics are of, by axis, checked."""
    found: dict[str, jax.Array] = {}
    for named, given in layout.check_ids(names, ids).items():
        having = [
            (name, axis)
            for name in names
            for axis in layout.axes[layout.place(name)]
            if axis.name == named
        ]
        name, axis = having[0]
        if isinstance(given, (str, int, np.integer)) and not isinstance(given, bool):
            found[named] = put(np.asarray(layout.cell_on(name, axis, given), np.int32))
        else:
            found[named] = _integers(given, f"ids[{named!r}] of metric {name!r}", axis.length)
    return found


def _by_name(layout: Layout, values: Any) -> list[Leaf]:
    """Return the values of each metric, from a dict or any other pytree that names them."""
    leaves = (
        [Leaf(value, (name,)) for name, value in values.items()]
        if isinstance(values, Mapping)
        else flatten(values, whole=True)[0]
    )
    for leaf in leaves:
        if len(leaf.keys) != 1:
            raise TypeError(
                f"{leaf.path('values')} is not the values of one metric: give them by name, as in "
                '{"loss": values}'
            )
        layout.place(leaf.keys[0])
    return leaves


def _integers(given: Any, where: str, number: int) -> jax.Array:
    """Return ids, of so many datasets or cells, as integers."""
    refuse_masked(given, where)
    if isinstance(given, (list, tuple, range)):
        given = np.asarray(given)
    if isinstance(given, (int, np.generic, np.ndarray)) and not isinstance(given, bool):
        host = np.asarray(given)
        if jnp.issubdtype(host.dtype, jnp.integer) or host.dtype == object:
            # What would wrap around is of none, and must not become that of one.
            return put(np.clip(host, -1, number).astype(np.int32))
    ids = as_array(given, where)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"{where} are of type {ids.dtype}: give integers")
    return ids


# -- Arrays ----------------------------------------------------------------------------------------


def _shapes(layout: Layout) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the arrays of one accumulator."""
    shapes: dict[str, tuple[int, ...]] = {
        "fingerprint": (),
        "lanes": (layout.rows, LANES),
        "refused": (len(layout.names), REFUSED),
    }
    if layout.cells:
        shapes["grid"] = (layout.cells, CELL_SUMS, 2)
    return shapes


def _nothing(layout: Layout, copies: tuple[int, ...], places: Iterable[Any]) -> list[Any]:
    """Return the arrays of accumulators that have seen nothing, each at its place."""
    shapes = {name: (*copies, *shape) for name, shape in _shapes(layout).items()}
    values = (
        np.full(copies, layout.fingerprint, np.uint32),
        nothing((*copies, layout.rows)),
        np.zeros(shapes["refused"], np.int32),
    )
    *of_rows, at = places
    arrays: list[Any] = [
        put(host)
        if place is None
        else jax.make_array_from_callback(host.shape, place, host.__getitem__)
        for host, place in zip(values, of_rows, strict=True)
    ]
    if "grid" not in shapes:
        return [*arrays, None]
    with jax.transfer_guard("allow"):
        # Made on the device: too large to be a constant of a program.
        return [*arrays, jnp.zeros(shapes["grid"], jnp.int32, device=at)]


def _are_of_0_1(arrays: Mapping[str, Any]) -> bool:
    return arrays.keys() >= {*HostArrays._fields} - {"grid"}


def _of_0_1(
    arrays: Mapping[str, Any], layout: Layout
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return the lanes, what was refused and the cells of what 0.1 saved; raises ValueError."""
    shapes = (
        (layout.rows, COUNTS),
        (layout.rows, SUMS, 2),
        (layout.rows, EXTREMA),
        (layout.cells, MOMENTS, 2),
        (len(layout.names), 2),
    )
    found = []
    for name, shape in zip(HostArrays._fields, shapes, strict=True):
        array = arrays.get(name)
        dtype = np.dtype(np.int32 if name in ("counts", "refused") else np.float32)
        absent = name == "grid" and not layout.cells and array is None
        host = np.zeros(shape, dtype) if absent else np.asarray(array)
        if host.shape != shape or host.dtype != dtype:
            raise ValueError(
                f"saved: its {name} are {host.dtype} of shape {host.shape}, not {dtype} of shape {shape}: "
                "they are of an accumulator with other metrics or datasets, or not of 0.1"
            )
        found.append(host)
    counts, sums, extrema, cells, refused = found
    w, wu, wuu = np.moveaxis(cells, 1, 0)
    scale = np.float32(1 << FRACTION_BITS)
    grid = np.stack([w, wu * scale, wuu * scale, np.zeros_like(w)], axis=1).view(np.int32)
    return of_host(counts, sums, extrema), np.pad(refused, ((0, 0), (0, 1))), grid


def _many(copies: tuple[int, ...]) -> str:
    """Return how many accumulators have these leading dimensions."""
    return f"{' x '.join(map(str, copies))} of them" if copies else "one"


def _usual_place() -> Any:
    """Return where an accumulator is to be if nobody says; None for where JAX likes."""
    try:
        set_one = jax.sharding.get_mesh()
    except ValueError:  # inside of a mapped or compiled function, which decides
        return None
    mesh = only_mesh() if set_one.empty else set_one
    return None if mesh is None else NamedSharding(mesh, PartitionSpec())


def _place(array: Any) -> Any:
    """Return where an array has been put; None where JAX likes."""
    if is_traced(array) or not isinstance(array, jax.Array):
        return None
    return array.sharding if array.committed else None


def _beside(accumulator: DeviceAccumulator, given: Any) -> DeviceAccumulator:
    """Return the accumulator on the devices where what it meets has been put, if it is elsewhere."""
    here = _place(accumulator.lanes)
    there = here and next(filter(None, map(_place, jax.tree.leaves(given))), None)
    if there is None or there.device_set == here.device_set:
        return accumulator
    if isinstance(there, NamedSharding):
        there = NamedSharding(there.mesh, PartitionSpec())
    moved: DeviceAccumulator = jax.device_put(accumulator, there)
    return moved


def _over_explicit_axes(given: Any) -> AbstractMesh | None:
    """Return the mesh over whose explicit axes any array in `given` is laid out."""
    layouts: Any = (jax.typeof(array).sharding for array in jax.tree.leaves(given))
    return next((layout.mesh for layout in layouts if any(layout.spec)), None)


def _is_there(array: Any) -> bool:
    """Return whether an array can be read without a wait."""
    if is_traced(array):
        return False
    return not isinstance(array, jax.Array) or (not array.is_deleted() and array.is_ready())  # type: ignore[attr-defined]


def _on_host(array: Any) -> Any:
    with jax.transfer_guard_device_to_host("allow"):  # asked for by drain()
        return None if array is None else np.asarray(array)
