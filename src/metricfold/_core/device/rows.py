"""What an accumulator on a device holds, and what it says to an aggregator; of no framework.

A *row* is one metric of one dataset, or one of its cells, if the metric has axes: those of a metric stand
together, dataset by dataset, cells in C order. Every row has the same few lanes, so that an accumulator is
a handful of arrays however many metrics there are:

    counts   (rows, 4)            values, NaN, +inf, -inf
    sums     (rows, 3, parts)     sum of w·x, of w, of w²
    extrema  (rows, 2)            largest x, largest -x
    grid     (rows · CELLS, 3, parts) of DISTRIBUTIONs: sums of w, w·u and w·u² in each bucket
    refused  (metrics, 2)         values with a dataset, a cell or a weight that cannot be

Behind those of metrics stand the rows of trees (`watched`), which use the same lanes for sums over elements.

A sum is what its parts come to: one float64, or two float32, of which the second holds what the first
has rounded away.

Where the arrays are open to a program that knows nothing of them, as in JAX, a *fingerprint* ties them to the
names of metrics and datasets: a word that says which layout they are of and, by a checksum, that they have
come about by folding. Whatever else is done to them leaves a word that is of no layout.

The buckets are those of `bucket_index` at m = 6, which a device finds by shifting a float32's bits; u is the
position inside. CELLS is one cell for each of them, negative ones first, and one for zero in the middle.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Reversible, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, chain, pairwise, starmap
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
import numpy.typing as npt

from metricfold._core.device.watched import Watched
from metricfold._core.fold import hints
from metricfold._core.fold.axes import Axes, Axis, axes_of, cells, described, moved, place_on
from metricfold._core.fold.names import Key
from metricfold._core.fold.state import Sample, State
from metricfold._core.sketch import BUCKETS
from metricfold.metric import AggregationType, TypeLike, check_name, resolve_type, type_label

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "CELLS",
    "COUNTS",
    "EXTREMA",
    "FRACTION_BITS",
    "MOMENTS",
    "SUMS",
    "ZERO_CELL",
    "Accumulator",
    "Drained",
    "HostArrays",
    "Layout",
    "M",
    "check_fits",
    "checksum",
    "fits",
    "with_checksum",
    "without_checksum",
]

_logger = logging.getLogger("metricfold")

COUNTS, SUMS, EXTREMA, MOMENTS = 4, 3, 2, 3
"""Lanes of a row, and of a cell."""

M = 6
"""Mantissa bits of a bucket index."""
FRACTION_BITS = 23 - M
"""Bits of a float32's mantissa that say where in its bucket a value is."""
_PER_SIGN = 254 << M
"""Buckets of the normal float32 of one sign; devices take subnormals for zero."""
ZERO_CELL = _PER_SIGN
CELLS = 2 * _PER_SIGN + 1
_FIRST_INDEX = ((1023 - 126) << M) + 1
"""What `bucket_index` says of the least normal float32."""

_MOST_SQUARES = 1e300
"""What stands for a sum of squares of weights that has overflowed, which only says how few values weigh."""

_BELOW_FIRST = (1 << 31) - 1

_SPARE = "\0{}"
"""Stands for a dataset whose name is to be learnt; no name is like this, since all are printable."""

_UNNAMED = (
    "came with dataset_ids of places that have no dataset yet, and were left out: give the DatasetIds of the "
    "batch, or what learn() returns for them"
)

_AGGREGATIONS = (
    AggregationType.MEAN,
    AggregationType.SUM,
    AggregationType.MAX,
    AggregationType.MIN,
    AggregationType.DISTRIBUTION,
)

Array = npt.NDArray[Any]


class HostArrays(NamedTuple):
    """The arrays of an accumulator, on the host."""

    counts: Array
    sums: Array
    extrema: Array
    grid: Array | None
    refused: Array


@dataclass(frozen=True)
class Layout:
    """Which metrics and datasets an accumulator holds, and in which rows."""

    names: tuple[str, ...]
    types: tuple[AggregationType, ...]
    datasets: tuple[str, ...]
    """One empty name stands for metrics without a dataset; a place whose dataset is to be learnt has none."""
    axes: tuple[Axes, ...] = ()
    """Of each metric; labels in the order in which they were given, which device ids count."""
    trees: tuple[Watched, ...] = ()
    """Whose leaves are watched; their rows follow on those of the metrics."""

    @classmethod
    def of(
        cls,
        metrics: Mapping[str, object],
        datasets: Iterable[str],
        axes: Mapping[str, int | Sequence[str]] | None = None,
        trees: Sequence[Watched] = (),
        room: int = 0,
    ) -> Layout:
        """Return the layout of `metrics`, by name, in each of `datasets`.

        Args:
            metrics: the aggregation of each, or a tuple of it and the names of the metric's axes.
            datasets: their names.
            axes: the size of each axis, or its labels.
            trees: whose leaves are watched.
            room: for how many datasets there is room, whose names are to be learnt.

        Raises:
            TypeError, ValueError: there is no metric and no tree, one has an aggregation that accumulators
                do not know, or axes that are none, or a name is no name.

        >>> layout = Layout.of({"loss": "mean", "tokens": ("sum", "expert")}, ("web", "code"), {"expert": 4})
        >>> layout.widths
        (2, 8)
        """
        if not isinstance(metrics, Mapping) or not (metrics or trees):
            raise TypeError(
                f'metrics={metrics!r}: give each metric\'s aggregation by name, as in {{"loss": '
                '"mean"}'
            )
        if isinstance(datasets, str):
            raise TypeError(f"datasets={datasets!r}: give a list of names, as in ({datasets!r},)")
        if not isinstance(datasets, Iterable):
            raise TypeError(
                f"datasets={datasets!r}: give a list of names; a metricfold.torch.DeviceAccumulator alone "
                "takes a number of them, and learns the names"
            )
        if isinstance(datasets, AbstractSet) and not isinstance(datasets, Reversible):
            raise TypeError(
                f"datasets={datasets!r}: a set has another order in each process, and a value's "
                "dataset id is the place of its dataset: give a list, such as sorted(datasets)"
            )
        given = tuple(datasets)
        for name in metrics:
            check_name("the name of a metric", name)
        for dataset in given:
            check_name("the name of a dataset", dataset)
        if len(set(given)) < len(given):
            raise ValueError(f"datasets={given!r}: give each name once")
        declared = _declared(axes)
        types, own = [], []
        for name, spec in metrics.items():
            # Configurations out of files have lists of their own, such as OmegaConf's.
            is_one = isinstance(spec, str) or not spec
            agg, *over = spec if isinstance(spec, Sequence) and not is_one else (spec,)
            types.append(_checked_type(name, agg))
            own.append(_axes_of(name, types[-1], over, declared))
        unused = [
            axis for axis in declared if not any(axis in {one.name for one in a} for a in own)
        ]
        if unused:
            raise ValueError(
                f"axes= declares {unused[0]!r}, which no metric has: name it with the aggregation of "
                f'those that do, as in {{"expert_tokens": ("sum", {unused[0]!r})}}'
            )
        for (_, name), *_ in chain.from_iterable(map(Watched.keys, trees)):
            if name in metrics:
                raise ValueError(
                    f"metric {name!r} is what a watched tree reports, too: rename one of them"
                )
        given += tuple(map(_SPARE.format, range(len(given), room)))
        return cls(tuple(metrics), tuple(types), given or ("",), tuple(own), tuple(trees))

    @cached_property
    def known(self) -> tuple[str, ...]:
        """The datasets that have names."""
        return tuple(name for name in self.datasets if not name.startswith(_SPARE[0]))

    @property
    def learns(self) -> bool:
        """Whether there are places whose dataset is to be learnt."""
        return self.datasets[-1].startswith(_SPARE[0])

    def learn(self, names: Iterable[str]) -> Layout:
        """Return this layout with `names` as well, and twice as many places as often as it takes.

        One place at least stays to be learnt: that is what tells it from a layout of given names.
        """
        new = [name for name in dict.fromkeys(names) if name not in self.known]
        if not new:
            return self
        for name in new:
            check_name("the name of a dataset", name)
        known = (*self.known, *new)
        room = len(self.datasets)
        while room <= len(known):
            room *= 2
        spare = map(_SPARE.format, range(len(known), room))
        return replace(self, datasets=(*known, *spare))

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Pickles of versions without axes or trees say nothing of them.
        vars(self).update({"axes": ((),) * len(state["names"]), "trees": ()} | state)

    def __hash__(self) -> int:
        # Asked for at each call of a compiled step.
        return self.fingerprint

    def as_json(self) -> str:
        types = [agg_type.value for agg_type in self.types]
        said = {"names": self.names, "types": types, "datasets": self.datasets}
        # Without axes as before there were any: what has been saved carries a fingerprint of it.
        later = {"axes": self.axes if any(self.axes) else (), "trees": self.trees}
        return json.dumps(said | {what: said for what, said in later.items() if said})

    @classmethod
    def from_json(cls, text: str) -> Layout:
        said = json.loads(text)
        names, types = tuple(said["names"]), tuple(map(AggregationType, said["types"]))
        axes = tuple(
            tuple(Axis(name, size, tuple(labels)) for name, size, labels in own)
            for own in said.get("axes", [()] * len(names))
        )
        trees = tuple(
            Watched(name, tuple(labels), tuple(map(tuple, shapes)), tuple(layers), octaves)
            for name, labels, shapes, layers, octaves in said.get("trees", ())
        )
        return cls(names, types, tuple(said["datasets"]), axes, trees)

    @cached_property
    def fingerprint(self) -> int:
        """What arrays of this layout that have seen nothing carry, in 32 bits.

        The first and the last bit are set, so that neither twice nor half of it is it, and no float32
        holds it. Ten bits say that the others are a fingerprint, of whichever layout.
        """
        digest = hashlib.blake2s(self.as_json().encode()).digest()
        return _marked(int.from_bytes(digest[:4], "little") & 0xFFFFF)

    def check_fingerprint(self, found: int) -> None:
        """Raise ValueError if a fingerprint, less the checksum that it carries, is not of this layout."""
        if found == self.fingerprint:
            return
        holds = ", ".join(
            f"{name}: {one.value}{f' over {described(own)}' if own else ''}"
            for name, one, own in zip(self.names, self.types, self.axes, strict=True)
        )
        holds += f"; datasets {self.datasets!r:.300}" if self.datasets != ("",) else ""
        holds += "".join(f"; tree {t.name!r} of {len(t.labels)} leaves" for t in self.trees)
        if found == _marked(found >> 11 & 0xFFFFF):
            raise ValueError(
                f"the arrays in this accumulator ({holds}) are of one with other metrics, aggregations, "
                "axes, datasets or trees, or with the same in another order: such as from a checkpoint that was "
                "saved before they were changed. Restore it into an accumulator that is made as that "
                "was, drain it, and go on with a new one"
            )
        raise ValueError(
            f"the arrays in this accumulator ({holds}) have been added up, averaged, scaled, cut or filled "
            "with zeros, as by psum, tree.map(jnp.add, ...) or zeros_like, and say nothing any more. "
            "Accumulators are brought together by merge() and reduce(), begun anew by empty(), and kept "
            "out of what averages a training state"
        )

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """How many rows each metric has."""
        return tuple(len(self.datasets) * cells(own) for own in self.axes)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The first row of each metric."""
        return tuple(accumulate(self.widths, initial=0))[:-1]

    @property
    def rows(self) -> int:
        return sum(self.widths) + sum(tree.rows for tree in self.trees)

    def rows_of(self, places: Sequence[int]) -> slice | npt.NDArray[np.intp]:
        """Return the rows of metrics, given by their places, which ascend."""
        first, end = self.starts[places[0]], self.starts[places[-1]] + self.widths[places[-1]]
        if places[-1] - places[0] == len(places) - 1:
            return slice(first, end)
        each = [self.starts[place] + np.arange(self.widths[place]) for place in places]
        return np.concatenate(each)

    @cached_property
    def rows_of_trees(self) -> tuple[slice, ...]:
        """The rows of each tree."""
        ends = accumulate((tree.rows for tree in self.trees), initial=sum(self.widths))
        return tuple(starmap(slice, pairwise(ends)))

    def tree(self, name: str) -> int:
        """Return which of the trees `name` is; raises ValueError if it is none."""
        names = [tree.name for tree in self.trees]
        if name not in names:
            known = ", ".join(map(repr, names)) or "none"
            raise ValueError(
                f"this accumulator watches no tree {name!r}, but {known}: name them all when it is made, as "
                f"in trees={{{name!r}: params}}"
            )
        return names.index(name)

    @cached_property
    def distributions(self) -> tuple[str, ...]:
        """The names of the DISTRIBUTIONs, in the order of their cells."""
        types = zip(self.names, self.types, strict=True)
        return tuple(name for name, one in types if one is AggregationType.DISTRIBUTION)

    @property
    def cells(self) -> int:
        return len(self.distributions) * len(self.datasets) * CELLS

    def place(self, name: str) -> int:
        """Return which of the metrics `name` is; raises ValueError if it is none."""
        if name not in self.names:
            known = ", ".join(map(repr, self.names))
            raise ValueError(
                f"this accumulator has no metric {name!r}, but {known}: name them all when it is made"
            )
        return self.names.index(name)

    def takes_ids(self, named: str, dataset_ids: object) -> bool:
        """Return whether `dataset_ids` come with values, called `named`; ValueError if they must or must not."""
        if dataset_ids is None and self.learns:
            raise ValueError(
                f"{named} is of a dataset whose name is to be learnt: give dataset_ids, the DatasetIds "
                "that MetricsCollator(..., dataset_ids=True) puts into a batch"
            )
        if dataset_ids is None and len(self.datasets) > 1:
            raise ValueError(
                f"{named} is of one of {len(self.datasets)} datasets: give dataset_ids, the place of "
                f"each value's dataset in {self.datasets!r:.300}"
            )
        if dataset_ids is not None and self.datasets == ("",):
            raise ValueError(
                f"{named} belongs to no dataset: leave dataset_ids out, or name the datasets when the "
                "accumulator is made"
            )
        return dataset_ids is not None

    def check_ids(self, names: Iterable[str], ids: object) -> Mapping[str, Any]:
        """Return `ids`, of values of some metrics; ValueError if none of these has such an axis."""
        if ids is None:
            return {}
        if not isinstance(ids, Mapping):
            raise TypeError(
                f"ids={ids!r:.80}: say by axis which cells values are of, as in {{'expert': top}}"
            )
        there = {name: [axis.name for axis in self.axes[self.place(name)]] for name in names}
        for axis in ids:
            if not any(axis in own for own in there.values()):
                have = ", ".join(
                    f"metric {name!r} has {f'the axes {own}' if own else 'none'}"
                    for name, own in there.items()
                )
                raise ValueError(
                    f"ids= names the axis {axis!r}, but {have or 'there is no metric'}"
                )
        return ids

    def cell_on(self, name: str, axis: Axis, given: object) -> int:
        """Return the place of a cell that is known on the host; raises if there is none."""
        try:
            return place_on(axis, given)
        except (TypeError, ValueError) as error:
            raise type(error)(f"metric {name!r}: {error}") from None

    def last_axes(self, name: str, given: Iterable[str], values: tuple[int, ...]) -> Axes:
        """Return the axes that values of this shape have as their last dimensions: those not `given`.

        Raises:
            ValueError: the values have not these dimensions.
        """
        given = set(given)
        last = tuple(axis for axis in self.axes[self.place(name)] if axis.name not in given)
        sizes = tuple(axis.length for axis in last)
        # One by one, since Dynamo finds no tuple equal that holds sizes which it leaves open.
        there = len(values) >= len(sizes) and all(
            one == size for one, size in zip(values[len(values) - len(sizes) :], sizes, strict=True)
        )
        if not there:
            named = ", ".join(repr(axis.name) for axis in last)
            raise ValueError(
                f"metric {name!r} got values of shape {tuple(values)}, and no ids= for {named}: give them, "
                f"or values whose last dimensions are {sizes}"
            )
        return last

    def __str__(self) -> str:
        types = {
            name: (one.value, *(axis.name for axis in own)) if own else one.value
            for name, one, own in zip(self.names, self.types, self.axes, strict=True)
        }
        axes = {axis.name: axis.size or axis.labels for own in self.axes for axis in own}
        said = f"{types}, datasets={tuple(filter(None, self.known))}" + (
            f", axes={axes!r:.300}" if axes else ""
        )
        if self.trees:
            said += f", trees={ {tree.name: len(tree.labels) for tree in self.trees} }"
        return said

    def keys(self) -> Iterator[tuple[Key, TypeLike, str]]:
        """Yield the key of each metric in each dataset, in order, its aggregation and its axes."""
        for name, agg_type, axes in zip(self.names, self.types, self.axes, strict=True):
            described_axes = described(axes)
            for dataset in self.known:
                yield (dataset, name), agg_type, described_axes
        for tree in self.trees:
            yield from tree.keys()

    def states(self, arrays: HostArrays) -> Iterator[tuple[Key, State]]:
        """Yield what `arrays` say of each key that has received anything."""
        sums = arrays.sums.astype(np.float64).sum(axis=-1)
        # Where the first overflowed, the second is meaningless.
        sums = np.where(np.isfinite(arrays.sums[..., 0]), sums, arrays.sums[..., 0])
        extrema = arrays.extrema.astype(np.float64)
        grids = iter(() if arrays.grid is None else np.split(arrays.grid, self.cells // CELLS))
        for name, agg_type, axes, start in zip(
            self.names, self.types, self.axes, self.starts, strict=True
        ):
            size = cells(axes)
            rows = slice(start, start + size * len(self.datasets))
            counts = arrays.counts[rows]
            own_sums, own_maxs = _lanes(agg_type, counts, sums[rows], extrema[rows])
            # As lists once: a thousand metrics without axes are read in half of the time.
            lists = [] if axes else [*zip(own_sums.tolist(), own_maxs.tolist(), strict=True)]
            received = counts[:, 0].reshape(-1, size).sum(axis=1).tolist()
            for place, dataset in enumerate(self.datasets):
                grid = next(grids) if agg_type is AggregationType.DISTRIBUTION else None
                if not received[place]:
                    continue
                if place >= len(self.known):
                    _logger.warning("%d values of metric %r %s", received[place], name, _UNNAMED)
                    continue
                if grid is not None:
                    row = start + place
                    state = _window_state(arrays.counts[row], sums[row], extrema[row], grid)
                elif axes:
                    own = slice(place * size, (place + 1) * size)
                    state = _cells_state(own_sums[own], own_maxs[own], axes)
                else:
                    row_sums, row_maxs = lists[place]
                    state = State(tuple(row_sums), tuple(row_maxs))
                yield (dataset, name), state
        for tree, rows in zip(self.trees, self.rows_of_trees, strict=True):
            yield from tree.states(arrays.counts[rows], sums[rows], extrema[rows])

    def complaints(self, refused: Array) -> Iterator[str]:
        """Yield what to tell the user about values that were left out."""
        bad_weights = (
            "came with weights that are negative, infinite or NaN, or, of JAX, beyond 2^63 or integers "
            "that no float32 is, and were left out"
        )
        wide = "are integers of more than 48 bits, which is what an accumulator holds, and were left out"
        for name, axes, counts in zip(self.names, self.axes, refused.tolist(), strict=True):
            unknown, unweighable, *unheld = counts
            reasons = (self._outside(axes), bad_weights, wide)
            for number, why in zip((unknown, unweighable, sum(unheld)), reasons, strict=True):
                if number:
                    yield f"{number} values of metric {name!r} {why}"

    def _outside(self, axes: Axes) -> str:
        """Say of values that their ids are the place of no dataset or of no cell."""
        ranges = [f"0..{axis.length - 1} of {axis.name!r}" for axis in axes]
        name = f"a name in datasets={self.known!r:.300}"
        if not axes:
            last = len(self.datasets) - 1
            return f"came with dataset_ids outside of 0..{last} and were left out: each must be the place of {name}"
        if self.datasets == ("",):
            what, name = "ids", ""
        else:
            ranges.append(f"0..{len(self.datasets) - 1} of the datasets")
            what, name = "ids or dataset_ids", f", or of {name}"
        return (
            f"came with {what} outside of {', '.join(ranges)} and were left out: each must be the place of a "
            f"cell along its axis{name}"
        )


Layout.__module__ = "metricfold.device_lanes"  # where pickles find it, wherever it lies


def fits(shape: tuple[int, ...], values: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the shape with all dimensions of the values, or None if they do not go together.

    Each dimension is that of the values or 1. The first one is theirs, as of one weight per sample; if
    that does not fit, the last one is, as NumPy broadcasts.
    """
    if len(shape) > len(values):
        return None
    missing = (1,) * (len(values) - len(shape))
    for full in (shape + missing, missing + shape):
        # Not `in`, by which Dynamo does not find a number equal to a size that it leaves open.
        if all(one == 1 or one == whole for one, whole in zip(full, values, strict=True)):  # noqa: PLR1714
            return full
    return None


def check_fits(what: str, shape: tuple[int, ...], values: tuple[int, ...]) -> None:
    """Raise ValueError if what is given beside values does not go together with them."""
    if fits(shape, values) is None:
        raise ValueError(
            f"{what} have the shape {tuple(shape)}, but the values {tuple(values)}: give one per value, "
            "one for each index of their first dimensions, or what NumPy broadcasts to them"
        )


def _marked(identity: int) -> int:
    """Return the fingerprint in which 20 bits say the layout, and ten that it is one."""
    return 1 << 31 | identity << 11 | ((identity ^ identity >> 10) & 0x3FF) << 1 | 1


def checksum(words: Any, numpy: Any = np, add: Callable[[Any], Any] | None = None) -> Any:
    """Return a number that the sum, the mean or the maximum of two arrays of words does not have.

    Words are uint32, of `numpy`, which may be JAX's; those of the last two dimensions come to one number,
    or those that `add` adds up, of the last one. It is even and below 2^31, as the first and the last bit of
    a fingerprint are its own; that of zeros is 0.
    """
    shape = words.shape[-2:] if add is None else words.shape[-1:]
    place = numpy.arange(math.prod(shape), dtype=np.uint32).reshape(shape)
    mixed = words * (place * np.uint32(0x9E3779B2) + np.uint32(0x85EBCA6B))
    mixed = (mixed ^ (mixed >> np.uint32(15))) * np.uint32(0xC2B2AE35)
    mixed = mixed ^ (mixed >> np.uint32(13))
    total = mixed.sum(axis=(-2, -1), dtype=np.uint32) if add is None else add(mixed)
    return (total << np.uint32(1)) & np.uint32(_BELOW_FIRST)


def with_checksum(fingerprint: Any, checksum: Any) -> Any:
    """Return a fingerprint that carries `checksum`, both uint32."""
    return ((fingerprint + checksum) & np.uint32(_BELOW_FIRST)) | (fingerprint & np.uint32(1 << 31))


def without_checksum(fingerprint: Any, checksum: Any) -> Any:
    """Undo `with_checksum`."""
    return ((fingerprint - checksum) & np.uint32(_BELOW_FIRST)) | (fingerprint & np.uint32(1 << 31))


def _checked_type(name: str, agg: object) -> AggregationType:
    agg_type = resolve_type(agg)
    if agg_type not in _AGGREGATIONS:
        known = ", ".join(repr(known.value) for known in _AGGREGATIONS)
        raise ValueError(
            f"metric {name!r} has the aggregation {type_label(agg_type)!r}, which no accumulator on "
            f"a device can do: use one of {known}, or record() it"
            f"{hints.for_label(type_label(agg_type))}"
        )
    assert isinstance(agg_type, AggregationType)
    return agg_type


def _declared(axes: Mapping[str, int | Sequence[str]] | None) -> dict[str, Axis]:
    """Return the axes by name, labels in the order in which they are given."""
    return {
        axis.name: axis if axis.size else axis._replace(labels=tuple(map(str, axes[axis.name])))  # type: ignore[index, arg-type]
        for axis in axes_of(axes or {})
    }


def _axes_of(
    name: str, agg_type: AggregationType, over: Sequence[object], declared: Mapping[str, Axis]
) -> Axes:
    """Return the axes that a metric names."""
    names = [axis for axis in over if isinstance(axis, str) and axis in declared]
    if len(names) < len(over):
        unknown = next(axis for axis in over if axis not in names)
        known = ", ".join(map(repr, declared)) or "none"
        raise ValueError(
            f"metric {name!r} has the axis {unknown!r}, but axes= declares {known}: give its size or labels "
            f"there, as in axes={{{unknown!r}: 64}}"
        )
    if len(set(names)) < len(names):
        raise ValueError(f"metric {name!r} has the axes {tuple(over)!r}: name each once")
    if names and agg_type is AggregationType.DISTRIBUTION:
        raise ValueError(
            f"metric {name!r} is a distribution, which cannot have axes, for each of its cells would be a "
            "histogram: use 'sum', 'mean', 'max' or 'min', or a metric for each cell"
        )
    axes = tuple(declared[axis] for axis in names)
    axes_of({axis.name: axis.size or axis.labels for axis in axes})  # not too many cells
    return axes


def _lanes(
    agg_type: AggregationType, counts: Array, sums: Array, extrema: Array
) -> tuple[Array, Array]:
    """Return the SUM and MAX lanes of rows, shapes (rows, n) and (rows, m)."""
    counts = counts.astype(np.float64)
    count, nans, up, down = counts.T
    if agg_type in (AggregationType.MAX, AggregationType.MIN):
        largest = extrema[:, :1] if agg_type is AggregationType.MAX else extrema[:, 1:]
        return counts[:, :2], np.where(count[:, np.newaxis] > 0, largest, -np.inf)
    total, weight = sums[:, 0], sums[:, 1]
    # Infinities have not been added up: what they come to is known without.
    total = np.where(
        up > 0, np.where(down > 0, math.nan, math.inf), np.where(down > 0, -math.inf, total)
    )
    own = [count, nans, total, *([] if agg_type is AggregationType.SUM else [weight])]
    return np.stack(own, axis=1), np.zeros((len(counts), 0))


def _cells_state(sums: Array, maxs: Array, axes: Axes) -> State:
    """Return the state of these cells, labels sorted."""
    whole = tuple(axis._replace(labels=tuple(sorted(axis.labels))) for axis in axes)
    places = moved(axes, whole)
    if places is not None:
        # Each cell to its place: the inverse of what picks them.
        order = np.argsort(places)
        sums, maxs = sums[order], maxs[order]
    return State.of_cells(np.ascontiguousarray(sums), np.ascontiguousarray(maxs), whole)


def _moments(sums: Array) -> Array:
    """Return sums of w, w·u and w·u² from those of a cell.

    A device without float64 adds up w·k and w·k² of integers k = u · 2^FRACTION_BITS, the latter in two
    parts, which float64 brings together without a rounding that matters.
    """
    if len(sums) == MOMENTS:
        return sums
    w, wk, whole, rest = sums
    unit = 2.0**-FRACTION_BITS
    return np.stack([w, wk * unit, whole * unit + rest * unit**2])


def _window_state(counts: Array, sums: Array, extrema: Array, cells: Array) -> State:
    from metricfold._core.sketch import LogLinearHistogram  # noqa: PLC0415 - loaded when first needed

    count, nans, up, down = counts.tolist()
    occupied = np.flatnonzero(cells[:, 0, 0])
    moments = _moments(cells[occupied].astype(np.float64).sum(axis=-1).T)
    zero = occupied == ZERO_CELL
    index = np.where(
        occupied < ZERO_CELL,
        occupied - (ZERO_CELL - 1) - _FIRST_INDEX,
        occupied - (ZERO_CELL + 1) + _FIRST_INDEX,
    )
    finite = count - nans - up - down
    histogram = LogLinearHistogram.from_buckets(
        index[~zero],
        moments[:, ~zero],
        M,
        count=finite,
        squares=min(float(sums[2]), _MOST_SQUARES),
        minimum=-float(extrema[1]),
        maximum=float(extrema[0]),
        zeros=float(moments[0, zero].sum()),
        nan_count=nans,
        posinf_count=up,
        neginf_count=down,
        max_buckets=BUCKETS,
    )
    lanes = (float(count), float(nans), float(up + down), float(sums[0]), float(sums[1]))
    return State(lanes, sample=Sample(older=histogram if finite else None))


# -- On the way to the aggregator ------------------------------------------------------------------


class Keys(Protocol):
    """What an accumulator says of itself: its metrics, and what its arrays say of them."""

    def keys(self) -> Iterable[tuple[Key, TypeLike, str]]:
        """Return each metric that it may bring, its aggregation and its axes, as `described` says."""

    def states(self, arrays: Any) -> Iterable[tuple[Key, State]]:
        """Return the state of each metric that has received anything."""

    def complaints(self, refused: Any) -> Iterable[str]:
        """Return what to tell the user about values that were left out."""


class ArraysRead(Protocol):
    """What has been read from a device; `states` knows what else it is."""

    @property
    def refused(self) -> Any:
        """What `complaints` takes."""


@runtime_checkable
class Accumulator(Protocol):
    """What `MetricsAggregator.drain` takes, of whichever framework."""

    @property
    def layout(self) -> Keys:
        """Its metrics."""

    def start_read(self) -> Callable[[], ArraysRead | None]:
        """Begin the one transfer; what is returned waits for it, on any thread.

        It returns None where there is nothing, or another process contributes the same arrays.
        """

    def empty(self) -> Self:
        """Return one of the same layout and placement that holds nothing."""


AnyAccumulator = TypeVar("AnyAccumulator", bound=Accumulator)


class Drained:
    """An accumulator on its way from the device to the aggregator."""

    def __init__(self, accumulator: Accumulator) -> None:
        self._layout = accumulator.layout
        self._read = accumulator.start_read()
        self._names: dict[Key, Key | None] = {}

    def rename(self, key: Key, name: Key | None) -> None:
        """Let what it holds of `key` go by another name; None: leave it out."""
        self._names[key] = name

    def arrive(self) -> list[tuple[Key, State]]:
        """Wait, and return the state of each key; warns of values that were left out."""
        arrays = self._read()
        if arrays is None:
            return []
        for complaint in self._layout.complaints(arrays.refused):
            _logger.warning("%s", complaint)
        named = ((self._names.get(key, key), state) for key, state in self._layout.states(arrays))
        return [(key, state) for key, state in named if key is not None]
