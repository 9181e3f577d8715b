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

`device_lanes` says what it holds, and `exact_sums` how float32 sums stay right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec, auto_axes

from metricfold.device_lanes import (
    CELLS,
    FRACTION_BITS,
    ZERO_CELL,
    HostArrays,
    Layout,
    M,
)
from metricfold.jax.axes import DEFAULT_AXIS, AxisName, resolve_axes
from metricfold.jax.collectives import Lane, axes_size, combine
from metricfold.jax.exact_sums import (
    MOST_TERMS,
    Limbs,
    add_pairs,
    exact_product,
    exponents,
    segment_sums,
)
from metricfold.jax.ordering import from_sortable, to_sortable
from metricfold.jax.values import as_array
from metricfold.listing import internal
from metricfold.metric import AggregationType

__all__ = ["DeviceAccumulator"]

_NAMES = HostArrays._fields
_SMALLEST = np.float32(np.finfo(np.float32).tiny)
_MAGNITUDE = np.int32(0x7FFF_FFFF)
_FRACTION = np.int32((1 << FRACTION_BITS) - 1)


@jax.tree_util.register_pytree_with_keys_class
@internal(*_NAMES, "layout", "start_read", "tree_flatten_with_keys", "tree_unflatten")
class DeviceAccumulator:
    """Metrics that accumulate on the device, for each dataset, until `MetricsAggregator.drain`.

    It is a pytree of a few arrays, never changed in place: pass it to a compiled step and take the
    new one back. It may be donated, be the carry of a ``scan``, live in an ``nnx`` module, and be
    saved by Orbax.

    A DISTRIBUTION is a histogram with 64 buckets per octave: percentiles are right to 1.6 %, mean
    and std far better. It takes 780 kB per dataset, in each of which all float32 have their place.

    Sums are right to 1e-6 or better however many updates there are, and counts to 2^31 values
    between two drains.

    Args:
        metrics: by name, the aggregation of each: ``"mean"``, ``"sum"``, ``"max"``, ``"min"`` or
            ``"distribution"``, or the `AggregationType`.
        datasets: their names; `update` says by ``dataset_ids`` which of them a value belongs to.
            None for metrics of a step, which belong to no dataset.

    Raises:
        TypeError, ValueError: an aggregation that devices do not do, or a name that is none.

    >>> from metricfold import MetricsAggregator
    >>> acc = DeviceAccumulator({"loss": "mean"}, datasets=("alpaca", "orca"))
    >>> acc = acc.update("loss", jnp.array([1.0, 2.0, 4.0]), dataset_ids=jnp.array([0, 1, 1]))
    >>> aggregator = MetricsAggregator()
    >>> acc = aggregator.drain(acc)
    >>> aggregator.get_metrics_for_logging("train")
    {'train_alpaca/loss': 1.0, 'train_orca/loss': 3.0}
    """

    __slots__ = ("__weakref__", "counts", "extrema", "grid", "layout", "refused", "sums")

    counts: Any
    sums: Any
    extrema: Any
    grid: Any
    refused: Any
    layout: Layout

    def __init__(self, metrics: Mapping[str, object], datasets: Iterable[str] = ()) -> None:
        layout = Layout.of(metrics, datasets)
        self._set(layout, [_nothing(name, layout) for name in _NAMES])

    def _set(self, layout: Layout, arrays: Iterable[Any]) -> None:
        self.layout = layout
        self.counts, self.sums, self.extrema, self.grid, self.refused = arrays

    @classmethod
    def _of(cls, layout: Layout, arrays: Iterable[Any]) -> DeviceAccumulator:
        accumulator = object.__new__(cls)
        accumulator._set(layout, arrays)
        return accumulator

    def _arrays(self) -> list[Any]:
        return [self.counts, self.sums, self.extrema, self.grid, self.refused]

    # -- As a pytree

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], Layout]:
        keys = map(jax.tree_util.GetAttrKey, _NAMES)
        return list(zip(keys, self._arrays(), strict=True)), self.layout

    @classmethod
    def tree_unflatten(cls, layout: Layout, arrays: Iterable[Any]) -> DeviceAccumulator:
        return cls._of(layout, arrays)

    # -- Inside the step

    def update(
        self, name: str, values: Any, *, weights: Any = None, dataset_ids: Any = None
    ) -> DeviceAccumulator:
        """Return an accumulator that has also seen `values`.

        Args:
            name: of the metric.
            values: numbers, of any shape and type; no gradient flows through.
            weights: how much each value counts in a MEAN or DISTRIBUTION. What has weight 0 is
                left out of every aggregation, also a NaN: so padding is masked. Of the shape of the
                values, or of their first dimensions: one per sample does for each token.
            dataset_ids: integers that say which of the datasets each value belongs to, by its
                place; shaped like weights. May be left out where there is only one. A value whose
                id is the place of none is left out, and `drain` warns of it.

        Raises:
            TypeError, ValueError: when the step is traced: an unknown name, shapes that do not fit,
                types that are no numbers, or no `dataset_ids` where there are several datasets.
        """
        laid_out = _over_explicit_axes(values, weights, dataset_ids)
        if laid_out is None:
            return self._updated(values, weights, dataset_ids, name)
        # Where axes are explicit, JAX asks for the layout of each step on the way; XLA needs none.
        update = auto_axes(
            partial(DeviceAccumulator._updated, name=name),
            axes=laid_out.explicit_axes,
            out_sharding=NamedSharding(laid_out, PartitionSpec()),
        )
        updated: DeviceAccumulator = jax.jit(update)(self, values, weights, dataset_ids)
        return updated

    def _updated(self, values: Any, weights: Any, dataset_ids: Any, name: str) -> DeviceAccumulator:
        place = self.layout.place(name)
        batch = _Batch.of(name, values, weights, dataset_ids, self.layout.datasets)
        if not batch.values.size:
            return self
        agg_type = self.layout.types[place]
        number = len(self.layout.datasets)
        rows = slice(place * number, (place + 1) * number)
        counts = self.counts.at[rows].add(batch.counts())
        refused = self.refused.at[place].add(batch.refused)
        sums, extrema, grid = self.sums, self.extrema, self.grid
        if agg_type is AggregationType.DISTRIBUTION:
            batch = batch.finite()
            start = self.layout.distributions.index(name) * number * CELLS
            grid = batch.into_grid(grid, start)
        if agg_type in _SUM_LANES:
            lanes = _SUM_LANES[agg_type]
            sums = sums.at[rows, :lanes].set(
                add_pairs(sums[rows, :lanes], batch.sums(lanes)), unique_indices=True
            )
        if agg_type in _WITH_EXTREMA:
            extrema = extrema.at[rows].max(batch.extrema())
        return self._of(self.layout, [counts, sums, extrema, grid, refused])

    def update_all(
        self, values: Mapping[str, Any], *, weights: Any = None, dataset_ids: Any = None
    ) -> DeviceAccumulator:
        """Return an accumulator that has also seen these `values` of several metrics, by name.

        Raises:
            TypeError, ValueError: as `update`.
        """
        accumulator = self
        for name, one in values.items():
            accumulator = accumulator.update(name, one, weights=weights, dataset_ids=dataset_ids)
        return accumulator

    def merge(self, other: DeviceAccumulator) -> DeviceAccumulator:
        """Return an accumulator that has seen what both have.

        Raises:
            ValueError: `other` holds other metrics or datasets.
        """
        if not isinstance(other, DeviceAccumulator) or other.layout != self.layout:
            raise ValueError(f"only accumulators of the same metrics merge: {self!r}, {other!r}")
        return self._of(
            self.layout,
            [
                self.counts + other.counts,
                add_pairs(self.sums, other.sums),
                jnp.maximum(self.extrema, other.extrema),
                None if self.grid is None else add_pairs(self.grid, other.grid),
                self.refused + other.refused,
            ],
        )

    def reduce(self, axis_name: AxisName = DEFAULT_AXIS) -> DeviceAccumulator:
        """Return, on every device, an accumulator that has seen what those of all devices have.

        For ``pmap``, ``shard_map`` and ``vmap``, where each device accumulates what it sees. It
        takes two collectives, and two more for DISTRIBUTIONs. Under plain ``jit`` with sharded
        inputs there is one accumulator for all, and nothing to reduce.

        Args:
            axis_name: as in `DistributedMetrics`.

        Raises:
            NameError: the axis is not bound.
        """
        axes = resolve_axes(axis_name)
        if not axes:
            return self
        pairs = [self.sums] if self.grid is None else [self.sums, self.grid]
        limbs = Limbs(2 * axes_size(axes), 50)
        largest: list[Lane] = [("max", jnp.abs(p[..., 0]).view(jnp.int32)) for p in pairs]
        most = combine([("max", to_sortable(self.extrema)), *largest], axes)
        exponent = [exponents(lax.bitcast_convert_type(bits, jnp.float32)) for bits in most[1:]]
        sent: list[Lane] = [
            ("sum", limbs.of(p[..., 0], e) + limbs.of(p[..., 1], e))
            for p, e in zip(pairs, exponent, strict=True)
        ]
        counted: list[Lane] = [("sum", self.counts), ("sum", self.refused)]
        counts, refused, *added = combine([*counted, *sent], axes)
        totals = [limbs.pairs(total, e) for total, e in zip(added, exponent, strict=True)]
        return self._of(
            self.layout,
            [
                counts,
                totals[0],
                from_sortable(most[0], np.float32),
                None if self.grid is None else totals[1],
                refused,
            ],
        )

    # -- On the host

    def empty(self) -> DeviceAccumulator:
        """Return an accumulator of the same metrics, in the same place, that has seen nothing."""
        return self._of(
            self.layout,
            [
                None if array is None else _nothing(name, self.layout, _place(array))
                for name, array in zip(_NAMES, self._arrays(), strict=True)
            ],
        )

    def start_read(self) -> Callable[[], HostArrays | None]:
        """Begin the transfer to the host; what is returned waits for it.

        Raises:
            TypeError: called inside a compiled function.
            ValueError: the arrays have been donated, hold several accumulators, or are not the
                same on all processes.
        """
        arrays = [array for array in self._arrays() if array is not None]
        if any(isinstance(array, jax.core.Tracer) for array in arrays):
            raise TypeError(
                "drain() reads an accumulator, which a traced function does not have yet: return it "
                "from the compiled step, and drain it outside"
            )
        for name, array, shape in zip(_NAMES, self._arrays(), self.layout.shapes, strict=True):
            if array is not None:
                _check_readable(name, array, shape)
        if not _contributes_here(arrays):
            return lambda: None
        for array in arrays:
            if isinstance(array, jax.Array):
                array.copy_to_host_async()

        def finish() -> HostArrays:
            return HostArrays(*(None if a is None else np.asarray(a) for a in self._arrays()))  # type: ignore[arg-type]

        return finish

    def __repr__(self) -> str:
        metrics = {
            name: agg_type.value
            for name, agg_type in zip(self.layout.names, self.layout.types, strict=True)
        }
        return f"DeviceAccumulator({metrics}, datasets={tuple(filter(None, self.layout.datasets))})"


_SUM_LANES = {
    AggregationType.SUM: 1,
    AggregationType.MEAN: 2,
    AggregationType.DISTRIBUTION: 3,
}
"""How many of the SUM lanes each aggregation uses."""
_WITH_EXTREMA = (AggregationType.MAX, AggregationType.MIN, AggregationType.DISTRIBUTION)


# -- Arrays ----------------------------------------------------------------------------------------


def _nothing(name: str, layout: Layout, place: Any = None) -> jax.Array | None:
    """Return the array `name` of an accumulator that has seen nothing."""
    shape = layout.shapes[_NAMES.index(name)]
    if name == "grid" and not layout.cells:
        return None
    if name == "extrema":
        return jnp.full(shape, -np.inf, jnp.float32, device=place)
    dtype = jnp.int32 if name in ("counts", "refused") else jnp.float32
    return jnp.zeros(shape, dtype, device=place)


def _place(array: Any) -> Any:
    """Return where a new array is to be like this one; None for where JAX likes."""
    if isinstance(array, jax.core.Tracer) or not isinstance(array, jax.Array):
        return None
    return array.sharding if array.committed else None


def _over_explicit_axes(*given: Any) -> AbstractMesh | None:
    """Return the mesh over whose explicit axes any of `given` is laid out."""
    for array in given:
        if isinstance(array, jax.Array):
            layout: Any = jax.typeof(array).sharding
            if any(layout.spec):
                mesh: AbstractMesh = layout.mesh
                return mesh
    return None


def _check_readable(name: str, array: Any, shape: tuple[int, ...]) -> None:
    if isinstance(array, jax.Array) and array.is_deleted():
        raise ValueError(
            "this accumulator was donated to a compiled step: drain the one that the step returned"
        )
    if array.shape != shape:
        raise ValueError(
            f"this is not one accumulator: its {name} have the shape {array.shape}, not {shape}. If "
            "each device has its own, reduce() them in the step, and drain one of the copies: "
            "jax.tree.map(lambda x: x[0], acc)"
        )
    if isinstance(array, jax.Array) and not (
        array.is_fully_addressable or array.is_fully_replicated
    ):
        raise ValueError(
            "this accumulator lies in parts on several processes: reduce() it in the step, and "
            "return it with out_specs=P()"
        )


def _contributes_here(arrays: Sequence[Any]) -> bool:
    """Return whether this process is the one to count an accumulator that several may hold."""
    first = arrays[0]
    if not isinstance(first, jax.Array) or first.is_fully_addressable:
        return True
    devices: Any = first.sharding.device_set
    return bool(jax.process_index() == min(device.process_index for device in devices))


# -- One batch -------------------------------------------------------------------------------------


class _Batch:
    """The values of one update, in one row each.

    Args:
        parts: float32 that add up to the values, shape (n,) each: more than one where a value has
            more bits than a float32.
        weights: shape (n,), or None if all are 1.
        segments: the place of each value's dataset, or `number` to leave it out.
        number: of datasets.
        refused: how many had a dataset, and how many a weight, that cannot be.
    """

    def __init__(
        self,
        parts: list[jax.Array],
        weights: jax.Array | None,
        segments: jax.Array,
        number: int,
        refused: jax.Array,
    ) -> None:
        self.parts = parts
        self.values = parts[0] if len(parts) == 1 else parts[0] + parts[1]
        self.weights = weights
        self.segments = segments
        self.number = number
        self.refused = refused

    @classmethod
    def of(
        cls, name: str, values: Any, weights: Any, dataset_ids: Any, datasets: tuple[str, ...]
    ) -> _Batch:
        array = lax.stop_gradient(as_array(values, f"values of metric {name!r}"))
        if jnp.issubdtype(array.dtype, jnp.complexfloating):
            raise TypeError(
                f"values of metric {name!r} are complex: give their real part or their magnitude"
            )
        if array.size > MOST_TERMS:
            raise ValueError(
                f"metric {name!r} was given {array.size} values at once: give {MOST_TERMS} at most"
            )
        shape, size, number = array.shape, array.size, len(datasets)
        kept = jnp.ones(size, bool)
        ids = jnp.zeros(size, jnp.int32)
        unweighable = jnp.int32(0)
        if dataset_ids is not None:
            ids = _ids(name, dataset_ids, shape, datasets)
            kept = (ids >= 0) & (ids < number)
        elif number > 1:
            raise ValueError(
                f"metric {name!r} is one of {number} datasets: give dataset_ids, the place of each "
                f"value's dataset in {datasets!r}"
            )
        strange, weighing = ~kept, None
        if weights is not None:
            where = f"weights of metric {name!r}"
            given = lax.stop_gradient(as_array(weights, where))
            if jnp.issubdtype(given.dtype, jnp.complexfloating):
                raise TypeError(f"{where} are complex")
            weighing = _spread(where, given, shape).astype(jnp.float32)
            strange &= weighing != 0  # padding may have any id
            valid = (weighing >= 0) & (weighing < np.inf)
            unweighable = _count(kept & ~valid)
            kept &= valid & (weighing > 0)
        return cls(
            _parts(array.reshape(-1)),
            weighing,
            jnp.where(kept, ids, number),
            number,
            jnp.stack([_count(strange), unweighable]),
        )

    def finite(self) -> _Batch:
        """Return the batch without NaN and infinities, as one float32 each; subnormals become 0."""
        values = self.values
        values = jnp.where(jnp.abs(values) < _SMALLEST, np.float32(0), values)
        segments = jnp.where(jnp.isfinite(values), self.segments, self.number)
        return _Batch([values], self.weights, segments, self.number, self.refused)

    def counts(self) -> jax.Array:
        """Return how many values, NaN, +inf and -inf there are, shape (number, 4)."""
        x = self.values
        kinds = [jnp.ones_like(x, bool), jnp.isnan(x), x == np.inf, x == -np.inf]
        columns = jnp.stack(kinds, axis=-1).astype(jnp.int32)
        return jax.ops.segment_sum(columns, self.segments, self.number, mode="drop")

    def sums(self, lanes: int) -> jax.Array:
        """Return sums of w·x, w and w² over what is no NaN, as pairs, shape (number, lanes, 2).

        Infinities are left out of the first, and in the others.
        """
        x = self.values
        seen = (self.segments < self.number) & ~jnp.isnan(x)
        finite = seen & jnp.isfinite(x)
        w, parts = jnp.float32(1), self.parts
        if self.weights is not None and lanes > 1:
            w = self.weights
            parts = [half for part in parts for half in exact_product(w, part)]
        terms = [jnp.where(finite, part, 0) for part in parts]
        terms += [jnp.where(seen, factor, 0) for factor in (w, w * w)[: lanes - 1]]
        pairs = segment_sums(jnp.stack(terms, axis=-1), self.segments, self.number)
        total = reduce(add_pairs, [pairs[:, i] for i in range(len(parts))])
        return jnp.concatenate([total[:, None], pairs[:, len(parts) :]], axis=1)

    def extrema(self) -> jax.Array:
        """Return the largest x and the largest -x, NaN apart, shape (number, 2)."""
        x = jnp.stack([self.values, -self.values], axis=-1)
        x = jnp.where(jnp.isnan(x), -np.inf, x)
        return jax.ops.segment_max(x, self.segments, self.number, mode="drop")

    def into_grid(self, grid: jax.Array, start: int) -> jax.Array:
        """Return the grid with these values, all finite or left out, in it.

        Only the cells that a batch falls into are touched, so that an update costs what the batch
        is, not what the grid is.

        Args:
            grid: cells of all DISTRIBUTIONs.
            start: the first cell of this one.
        """
        nowhere = grid.shape[0]
        bits = lax.bitcast_convert_type(self.values, jnp.int32)
        magnitude = bits & _MAGNITUDE
        zero = magnitude < (1 << 23)
        bucket = (magnitude >> FRACTION_BITS) - (1 << M)
        cell = jnp.where(bits < 0, ZERO_CELL - 1 - bucket, ZERO_CELL + 1 + bucket)
        cell = jnp.where(zero, ZERO_CELL, cell)
        kept = self.segments < self.number
        cell = jnp.where(kept, start + self.segments * CELLS + cell, nowhere)
        u = (magnitude & _FRACTION).astype(jnp.float32) * np.float32(2.0**-FRACTION_BITS)
        u = jnp.where(zero, 0, u)
        w = jnp.ones_like(u) if self.weights is None else self.weights
        w = jnp.where(kept, w, 0)
        # Values of one cell side by side: each cell is then read and written once.
        cell, u, w = lax.sort((cell, u, w), num_keys=1)
        size = len(cell)
        begins = jnp.concatenate([jnp.zeros(min(size, 1), bool), cell[1:] != cell[:-1]])
        segments = jnp.cumsum(begins, dtype=jnp.int32)
        terms = jnp.stack([w, w * u, w * u * u], axis=-1)
        new = segment_sums(terms, segments, size, ascending=True)
        cells = jnp.full(size, nowhere, jnp.int32)
        cells = cells.at[segments].min(cell, indices_are_sorted=True)
        old = grid.at[cells].get(mode="fill", fill_value=0)
        return grid.at[cells].set(add_pairs(old, new), mode="drop")


def _parts(values: jax.Array) -> list[jax.Array]:
    """Return float32 that add up to the values, as far as two of them can."""
    if jnp.issubdtype(values.dtype, jnp.integer) and values.dtype.itemsize >= 4:
        high = values >> 16
        low = values - (high << 16)
        return [high.astype(jnp.float32) * np.float32(1 << 16), low.astype(jnp.float32)]
    first = values.astype(jnp.float32)
    if values.dtype != jnp.float64:
        return [first]
    rest = (values - first.astype(values.dtype)).astype(jnp.float32)
    return [first, jnp.where(jnp.isfinite(first), rest, 0)]


def _count(flags: jax.Array) -> jax.Array:
    return flags.sum(dtype=jnp.int32)


def _ids(
    name: str, dataset_ids: Any, shape: tuple[int, ...], datasets: tuple[str, ...]
) -> jax.Array:
    where = f"dataset_ids of metric {name!r}"
    ids = as_array(dataset_ids, where)
    if datasets == ("",):
        raise ValueError(
            f"metric {name!r} belongs to no dataset: leave dataset_ids out, or name the datasets "
            "when the accumulator is made"
        )
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"{where} are of type {ids.dtype}: give integers")
    if ids.dtype.itemsize > 4 or jnp.issubdtype(ids.dtype, jnp.unsignedinteger):
        # What would wrap around is a stranger before, and must not become a dataset.
        ids = jnp.where((ids >= 0) & (ids < len(datasets)), ids, len(datasets))
    return _spread(where, ids.astype(jnp.int32), shape)


def _spread(where: str, array: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Return one element per value, shape (n,)."""
    if array.shape != shape[: array.ndim]:
        raise ValueError(
            f"{where} have the shape {array.shape}, but the values {shape}: give one per value, or "
            "one for each index of their first dimensions"
        )
    wide = array.reshape(array.shape + (1,) * (len(shape) - array.ndim))
    return jnp.broadcast_to(wide, shape).reshape(math.prod(shape))
