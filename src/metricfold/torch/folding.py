"""How the values of one update become sums, extrema and cells of a histogram, on any device.

What a value is decides *where* it is added, not what is added: the place of its dataset, its region
(a number, NaN, …) and its block (what its weight is) make the index of one cell. So nothing has to be
masked, a NaN spoils only cells that nobody adds up, and an update is a handful of operations, none of
which asks the device for a number:

    cell = column + columns · (region + 4 · block)

    columns   0 what does not count, then one for each dataset, with one more on either side: ids below
              and above
    regions   of an aggregation: 0 integers too small for float64, 1 numbers, 2 NaN, 3 too large
              of a DISTRIBUTION: 0 -inf, 1 numbers, 2 +inf, 3 NaN
    blocks    weights that are 0 negative, 1 zero, 2 right (or none is given), 3 infinite or NaN

A metric with axes has many columns, so it has but one block, and its own place in memory, of which nothing
else is part: a compiler would copy all of it to change a part. There

    columns   0 what does not count, 1 weights that are wrong, then one for each dataset and cell, in C
              order, the datasets and each axis with one more on either side, as above; datasets that
              nobody gives an id of have no dimension

So a column is a constant plus the sum of stride · id, where an id that is the place of nothing is -1 or the
size. Metrics without axes that have like shape, type and aggregation are folded together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from metricfold._core.device.rows import (
    CELLS,
    COUNTS,
    EXTREMA,
    FRACTION_BITS,
    MOMENTS,
    SUMS,
    ZERO_CELL,
    M,
    fits,
)
from metricfold._core.fold.axes import Axes
from metricfold.metric import AggregationType

__all__ = [
    "BLOCKS",
    "IN_ORDER",
    "WEIGHING",
    "WITH_EXTREMA",
    "Part",
    "Rows",
    "Table",
    "Where",
    "first_column",
    "fold",
    "move_over",
    "padded",
    "read",
    "read_with_axes",
    "sent",
    "shapes",
    "shapes_with_axes",
    "take_over",
]

PLAIN, WEIGHED = 2, 4
"""Lanes of a cell: sums of x and of 1 over values without weights; and of w·x, w, 1 and w²."""
_REGIONS, BLOCKS = 4, 4
_NUMBERS, _ZERO, _RIGHT = 1, 1, 2
"""The region of numbers, and the blocks of what is left out, and of what is as it should be."""
_UNWEIGHABLE, _FIRST = 1, 2
"""Of metrics with axes, the column of weights that are wrong, and the first of the others."""
_TOO_SMALL, _NAN, _TOO_LARGE = 0, 2, 3
_DOWN, _UP, _NAN_OF_DISTRIBUTION = 0, 2, 3
_EXACT = 2**53
"""Beyond which float64 does not hold every integer."""
_LARGEST = float(np.finfo(np.float64).max)
_LARGEST32 = float(np.finfo(np.float32).max)
_SMALLEST32 = float(np.finfo(np.float32).tiny)
_FRACTION = (1 << FRACTION_BITS) - 1
_HALF = 1 << (31 - FRACTION_BITS)
"""Raw cells of one sign: the bits of a float32 but those of the fraction."""
_ONLY_CONVERTED = (torch.uint16, torch.uint32, torch.uint64)

MAX, MIN, SUM, MEAN, DISTRIBUTION = IN_ORDER = (
    AggregationType.MAX,
    AggregationType.MIN,
    AggregationType.SUM,
    AggregationType.MEAN,
    AggregationType.DISTRIBUTION,
)
"""The aggregations, in the order of their rows."""
WEIGHING = (MEAN, DISTRIBUTION)
WITH_EXTREMA = (MAX, MIN, DISTRIBUTION)


class Rows(NamedTuple):
    """The part of an accumulator that belongs to some metrics, side by side; None: not needed.

    Of one metric they lack the first dimension: each view that is not made saves the host some time.
    The grid holds sums of w, w·u and w·u². The raw cell of a float32 is its bits but for those of the
    fraction u, as a number with a sign, from the middle of the part of its dataset on; the first part
    is of what is in none. A metric with axes has only those of its extrema that it needs, shape
    (columns,).
    """

    plain: Tensor  # shape (metrics, cells, PLAIN)
    weighed: Tensor | None  # shape (metrics, cells, WEIGHED)
    extrema: Tensor | None  # shape (metrics, EXTREMA, columns): the largest and the smallest x
    grid: Tensor | None  # shape (metrics, raw cells, MOMENTS)
    blocks: int


def padded(datasets: Sequence[str], axes: Axes) -> tuple[int, ...]:
    """Return the sizes of what columns are of: the datasets and each axis, with one more on either side.

    Cells of metrics without a dataset have no dimension of datasets, for nobody may give an id there.
    """
    sizes = (len(datasets), *(axis.length for axis in axes))
    return tuple(size + 2 for size in (sizes[1:] if axes and datasets == ("",) else sizes))


def shapes(rows: int, distributions: int, datasets: int) -> list[tuple[int, ...] | None]:
    """Return the shapes of `Rows` of all metrics without axes; None: they need none."""
    columns = datasets + 3
    cells = _REGIONS * BLOCKS * columns
    grid = (distributions, (datasets + 1) * 2 * _HALF, MOMENTS) if distributions else None
    return [(rows, cells, PLAIN), (rows, cells, WEIGHED), (rows, EXTREMA, columns), grid]


def shapes_with_axes(
    agg_type: AggregationType, sizes: tuple[int, ...]
) -> list[tuple[int, ...] | None]:
    """Return the shapes of `Rows` of a metric with axes, by `padded` sizes; None: it needs none."""
    columns = _FIRST + math.prod(sizes)
    weighed = (_REGIONS * columns, WEIGHED) if agg_type in WEIGHING else None
    extrema = (columns,) if agg_type in WITH_EXTREMA else None
    return [(_REGIONS * columns, PLAIN), weighed, extrema, None]


def first_column(strides: Sequence[int]) -> int:
    """Return the column of a metric with axes to which each id is added, times its stride."""
    return _FIRST + sum(strides)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Return what lies on the host on a device, without a wait for what the device has to do first."""
    return tensor.to(device, non_blocking=device.type == "cuda")


class Table(NamedTuple):
    """Constants of an accumulator, on its device, so that no update has to make them.

    Of more than no dimension: torch loses what is done to a captured 0-d tensor, and takes the type of
    one for less than that of other tensors.
    """

    ids: Tensor  # bounds between columns, shape (datasets + 2,)
    column: Tensor  # of values without ids, shape (1,)
    bases: Tensor  # where the raw cell 0 is in the grid, shape (columns,)
    weights: Tensor
    integers: Tensor
    float32s: Tensor
    one_beside: Tensor  # 1j: a number plus this is the two lanes of PLAIN
    one: Tensor
    largest: Tensor
    smallest: Tensor
    to_fraction: Tensor

    @classmethod
    def on(cls, device: torch.device, datasets: int) -> Table:
        def of(values: list[float], dtype: torch.dtype = torch.float64) -> Tensor:
            return sent(torch.tensor(values, dtype=dtype), device)

        inside = [(place + 1) * 2 * _HALF + _HALF for place in range(datasets)]
        return cls(
            ids=of([-(2**63), *range(datasets + 1)], torch.int64),
            column=of([2], torch.int64),
            bases=of([_HALF, _HALF, *inside, _HALF], torch.int64),
            weights=of([-math.ulp(0.0), 0.0, _LARGEST]),
            integers=of([-_EXACT - 1, _EXACT, _EXACT], torch.int64),
            float32s=of([-math.inf, _LARGEST32, math.inf], torch.float32),
            one_beside=sent(torch.tensor([1j], dtype=torch.complex128), device),
            one=of([1.0]),
            largest=of([math.inf]),
            smallest=of([-math.inf]),
            to_fraction=of([2.0**-FRACTION_BITS]),
        )


# -- In the step -----------------------------------------------------------------------------------


class Where(NamedTuple):
    """Of which columns the values of an update are: those of metrics with the same axes.

    Args:
        datasets: ids of datasets, of metrics without axes; None: there is one.
        column: shape (1,), what ids are added to.
        along: ids, with the size and the stride of what they are places of.
        last: the strides times the places along axes that are the values' last dimensions.
    """

    datasets: Tensor | None
    column: Tensor
    along: tuple[tuple[Tensor, int, int], ...] = ()
    last: tuple[Tensor, ...] = ()

    def columns(self, shape: torch.Size) -> Tensor:
        """Return the columns of values of this shape, with as many dimensions."""
        columns, rest = self.column, len(self.last)
        for offsets in self.last:
            rest -= 1
            before = len(shape) - 1 - rest
            columns = columns + offsets.view((1,) * before + (-1,) + (1,) * rest)
        for ids, size, stride in self.along:
            places = _aligned(ids, shape).clamp(-1, size)
            columns = torch.add(columns, places, alpha=stride)
        return columns


class Part(NamedTuple):
    """Metrics that stand side by side, and are folded together."""

    rows: Rows
    agg_type: AggregationType
    values: list[Tensor]  # of each, of one shape and type


def fold(
    table: Table,
    parts: list[Part],
    weights: Tensor | None,
    where: Where,
    counts: Tensor | None,
) -> None:
    """Fold what one update brings of metrics that have the same axes.

    Args:
        table: of the accumulator.
        parts: the metrics.
        weights: of the values, of such shapes as `fits` takes; None if all weigh 1.
        where: which columns they are of; ids likewise.
        counts: a flag that says whether any of this counts; None if it does.
    """
    ids = where.datasets
    shared = None
    if not (where.along or where.last):
        column = where.column
        # The same as adding them to the column, in one operation.
        shared = column if ids is None else torch.bucketize(ids.contiguous(), table.ids, right=True)
        shared = shared if counts is None else torch.where(counts, shared, 0)
    block = None
    if weights is not None and weights.dtype != torch.bool:
        weights = weights.double()
        block = torch.bucketize(weights.contiguous(), table.weights)
    for rows, agg_type, values in parts:
        shape = values[0].shape
        if shared is None:
            columns = where.columns(shape)
            columns = columns if counts is None else torch.where(counts, columns, 0)
        else:
            columns = _aligned(shared, shape) if ids is not None or len(shape) > 1 else shared
        batch = _Batch(
            table,
            agg_type,
            values,
            None if weights is None else _aligned(weights, shape),
            None if block is None else _aligned(block, shape),
            columns,
            rows,
        )
        if rows.weighed is None:
            batch.add_plain(rows.plain, sums=agg_type not in (MAX, MIN))
        else:
            batch.add_weighed(rows.weighed, squares=agg_type is DISTRIBUTION)
        if rows.extrema is not None:
            batch.enlarge(rows.extrema)
        if rows.grid is not None:
            batch.add_to_grid(rows.grid)


def _aligned(tensor: Tensor, values: torch.Size) -> Tensor:
    """Return `tensor` with all dimensions of the values."""
    if tensor.ndim == len(values):
        return tensor
    shape = fits(tensor.shape, values)
    assert shape is not None
    return tensor.reshape(shape)


class _Batch:
    """The values of some metrics, and where each of them belongs.

    `x` and `places` have the shape (metrics, values...), or (values...) of one metric; `columns`,
    `inside`, `weights` and `kept` broadcast with (values...).
    """

    def __init__(
        self,
        table: Table,
        agg_type: AggregationType,
        values: list[Tensor],
        weights: Tensor | None,
        block: Tensor | None,
        columns: Tensor,
        rows: Rows,
    ) -> None:
        self.table, self.agg_type, self.metrics = table, agg_type, len(values)
        self.dim = 0 if self.metrics == 1 else 1
        x = values[0] if len(values) == 1 else torch.stack(values)
        if values[0].ndim == 0 and (x.ndim or block is not None or agg_type in WITH_EXTREMA):
            x = x.unsqueeze(-1)
        given = x.dtype
        if given in _ONLY_CONVERTED or (x.is_floating_point() and given.itemsize == 1):
            x = x.double()
        # Of what is stored as its negative, such as the imaginary part of a conjugate, no bits are seen.
        self.x = x = x.float().resolve_neg() if agg_type is DISTRIBUTION else x
        self.weights = None if block is None else weights
        self.kept: Tensor | None = None if block is not None else weights
        self._inside: Tensor | None = None
        # Here, since PyTorch 2.8 compiles no property of a named tuple.
        width, self.first = rows.plain.shape[-2] // (_REGIONS * rows.blocks), 0
        if rows.blocks == 1:
            if block is not None:  # which is told by the column
                columns = torch.where(block == _RIGHT, columns, block != _ZERO)
        elif block is None:
            self.first = width * _REGIONS * _RIGHT
        elif agg_type in WITH_EXTREMA:
            self.kept = block == _RIGHT
        self.columns = columns
        places = self.inside if block is None else columns
        if agg_type is DISTRIBUTION:
            region = torch.bucketize(x.contiguous(), table.float32s)
            places = torch.add(places, region, alpha=width)
        elif given == torch.int64:
            region = torch.bucketize(x.contiguous(), table.integers)
            places = torch.add(places, region, alpha=width)
        else:
            self.first += width * _NUMBERS
            if given == torch.uint64:
                places = torch.add(places, x >= _EXACT, alpha=width * (_TOO_LARGE - _NUMBERS))
            elif x.is_floating_point():
                places = torch.add(places, x.isnan(), alpha=width)
        if block is not None and rows.blocks > 1:
            places = torch.add(places, block, alpha=width * _REGIONS)
        self.places = self._flat(places, x.shape)

    @property
    def inside(self) -> Tensor:
        """The columns of what counts; 0 for the rest."""
        if self._inside is None:
            kept = self.kept
            self._inside = self.columns if kept is None else torch.where(kept, self.columns, 0)
        return self._inside

    def add_plain(self, plain: Tensor, sums: bool) -> None:
        """Add the values and their number, or their number alone."""
        one = self.table.one.expand_as(self.places)
        if not sums:
            self._add(plain, [one], self.places, self.first, 1)
        elif torch.compiler.is_compiling():  # compilers know no complex numbers
            self._add(plain, [self._flat(self.x).double(), one], self.places, self.first)
        else:
            cells = torch.view_as_complex(self._from(self.first, plain))
            both = self._flat(self.x + self.table.one_beside)
            cells.scatter_add_(self.dim, self.places, both)

    def add_weighed(self, weighed: Tensor, squares: bool) -> None:
        """Add w·x, w and 1, and w²."""
        assert self.weights is not None
        product = self.x * self.weights
        w = self.weights.expand_as(product)
        terms = [product, w, self.table.one.expand_as(product), *([w * w] if squares else [])]
        self._add(weighed, [self._flat(term) for term in terms], self.places, self.first)

    def enlarge(self, extrema: Tensor) -> None:
        """Let the first of `extrema` be at least, and the second at most, what comes in."""
        table, x, inf = self.table, self.x, math.inf
        alone = extrema.ndim == 1
        if self.agg_type is MAX:
            lane = extrema if alone else extrema[..., 0, :]
            self._enlarge(lane, torch.fmax(x, table.smallest), "amax")
        elif self.agg_type is MIN:
            lane = extrema if alone else extrema[..., 1, :]
            self._enlarge(lane, torch.fmin(x, table.largest), "amin")
        else:
            above = x.nan_to_num(nan=-inf, posinf=-inf, neginf=-inf).double()
            self._enlarge(extrema[..., 0, :], above, "amax")
            below = x.nan_to_num(nan=inf, posinf=inf, neginf=inf).double()
            self._enlarge(extrema[..., 1, :], below, "amin")

    def add_to_grid(self, grid: Tensor) -> None:
        """Add to the cells of the buckets, of what is no number to such as nobody reads."""
        table = self.table
        bits = self.x.view(torch.int32)
        cell = torch.take(table.bases, self.inside) + (bits >> FRACTION_BITS)
        u = (bits & _FRACTION) * table.to_fraction
        w = (table.one if self.weights is None else self.weights).expand_as(u)
        first = u if self.weights is None else w * u
        terms = [self._flat(term) for term in (w, first, first * u)]
        self._add(grid, terms, self._flat(cell, self.x.shape))

    def _flat(self, tensor: Tensor, shape: torch.Size | None = None) -> Tensor:
        """Return it with one dimension of values, of which all have the `shape` that is given."""
        if shape is not None and tensor.shape != shape:
            tensor = tensor.broadcast_to(shape or (1,))
        if self.dim:
            return tensor.reshape(self.metrics, -1)
        return tensor if tensor.ndim == 1 else tensor.reshape(-1)

    def _from(self, first: int, cells: Tensor) -> Tensor:
        return cells.narrow(self.dim, first, cells.shape[self.dim] - first) if first else cells

    def _add(
        self, cells: Tensor, terms: list[Tensor], places: Tensor, first: int = 0, lane: int = 0
    ) -> None:
        """Add terms, one for each lane from `lane` on, at places that count from the cell `first` on."""
        if torch.compiler.is_compiling():
            _add_as_one(cells, terms, places + first, lane)
            return
        cells = self._from(first, cells)
        if len(terms) == 1:
            cells[..., lane].scatter_add_(self.dim, places, terms[0])
            return
        stacked = torch.stack(terms, dim=-1)
        lanes = cells if len(terms) == cells.shape[-1] else cells[..., lane : lane + len(terms)]
        lanes.scatter_add_(self.dim, places[..., None].expand(stacked.shape), stacked)

    def _enlarge(self, lane: Tensor, x: Tensor, how: str) -> None:
        """Let a lane, shape (metrics, columns), be `how` of itself and x.

        What has one column, such as all tokens of a sample, is reduced first: so many comparisons
        with one place would wait for each other.
        """
        further = 0
        while further < self.columns.ndim and self.columns.shape[-1 - further] == 1:
            further += 1
        dims = tuple(range(-further, 0))
        if any(x.shape[dim] != 1 for dim in dims):
            if self.kept is not None:
                identity = self.table.smallest if how == "amax" else self.table.largest
                x = torch.where(self.kept, x, identity)
            x = (torch.amax if how == "amax" else torch.amin)(x, dims)
            columns = self.columns.reshape(self.columns.shape[: self.columns.ndim - further])
        else:
            columns = self.inside
        lane.scatter_reduce_(self.dim, self._flat(columns, x.shape), self._flat(x), how)


def _add_as_one(cells: Tensor, terms: list[Tensor], places: Tensor, lane: int) -> None:
    """Add terms such that a compiler makes one kernel of it and of all that they come from.

    It would copy all cells to slice or scatter_add_ them, and write down what is stacked.
    """
    lanes = torch.arange(len(terms), device=cells.device)
    wide = terms[-1][..., None]
    for place in reversed(range(len(terms) - 1)):
        wide = torch.where(lanes == place, terms[place][..., None], wide)
    where = [places[..., None], lanes + lane]
    if places.ndim > 1:
        where.insert(0, torch.arange(len(places), device=cells.device)[:, None, None])
    cells.index_put_(tuple(where), wide.expand(*places.shape, len(terms)), accumulate=True)


def take_over(old: Sequence[Tensor], new: Sequence[Tensor], distributions: int) -> None:
    """Put into `new` tensors, which hold nothing, what the `old` ones of 0.1 say.

    Those were sums, shape (metrics, lanes, datasets + 2), of unweighable values, values, NaN, w·x, w,
    w², +inf and -inf; the largest x and -x, likewise; and the grid, shape (distributions, 3, cells).
    """
    sums, extrema, *grids = (tensor.double() for tensor in old)
    weighed = new[1].view(len(sums), BLOCKS, _REGIONS, -1, WEIGHED)[..., 1:, :]
    unweighable, count, nans, wx, w, w2, up, down = sums.unbind(1)
    weighed[:, 0, _NUMBERS, :, 2] = unweighable
    right, first = weighed[:, _RIGHT], len(sums) - distributions
    right[:, _NUMBERS] = torch.stack([wx, w, count - nans - up - down, w2], dim=-1)
    right[:first, _NAN, :, 2] = nans[:first]
    for region, numbers in ((_DOWN, down), (_UP, up), (_NAN_OF_DISTRIBUTION, nans)):
        right[first:, region, :, 2] = numbers[first:]
    new[2][..., 1:] = extrema * torch.tensor([[1.0], [-1.0]]).to(extrema)
    for grid in grids:
        cells = grid[..., :-1].view(distributions, MOMENTS, -1, CELLS).permute(0, 2, 3, 1)
        raw = new[3].view(distributions, -1, 2, _HALF, MOMENTS)[:, 1:]
        normal = slice(1 << M, (1 << M) + ZERO_CELL)
        raw[:, :, 0, normal] = cells[:, :, :ZERO_CELL].flip(2)
        raw[:, :, 1, normal] = cells[:, :, ZERO_CELL + 1 :]
        raw[:, :, 1, 0] = cells[:, :, ZERO_CELL]


def move_over(
    old: Sequence[Tensor | None], new: Sequence[Tensor | None], datasets: int, axes: Axes
) -> None:
    """Put into `new` parts, which hold nothing, what `old` ones for fewer datasets hold.

    Args:
        old: plain, weighed, extrema and grid of a block; None: it has none.
        new: those for more datasets.
        datasets: of the old ones.
        axes: of the block.
    """
    first, rest = (_FIRST, math.prod(axis.length + 2 for axis in axes)) if axes else (1, 1)
    kept = first + (datasets + 1) * rest
    for which, (before, after) in enumerate(zip(old, new, strict=True)):
        if before is None or after is None:
            continue
        if which == 3:  # the first of all parts of a grid is of no dataset
            after[:, : before.shape[1]] = before
            continue
        lanes = 1 if which == 2 else before.shape[-1]
        blocks = 1 if which == 2 else _REGIONS * (1 if axes else BLOCKS)
        columns = before.shape[-1] if which == 2 else before.shape[-2] // blocks
        a, b = (
            before.view(-1, columns, lanes),
            after.view(len(before.view(-1, columns, lanes)), -1, lanes),
        )
        b[:, :kept] = a[:, :kept]
        b[:, -rest:] = a[:, -rest:]


# -- On the host -----------------------------------------------------------------------------------

Array = np.ndarray[Any, Any]


class Found(NamedTuple):
    """What `Rows` of metrics that stand together say, in the words of `HostArrays`, by metric."""

    counts: Array  # shape (metrics, datasets x cells, COUNTS)
    sums: Array  # shape (metrics, datasets x cells, SUMS)
    extrema: Array  # shape (metrics, datasets x cells, EXTREMA)
    grid: Array | None
    refused: Array  # shape (metrics, 2)
    rounded: Array  # shape (metrics,), how many integers were


def read(parts: Sequence[Array | None]) -> Found:
    """Return what `Rows` of all metrics without axes say."""
    plain, weighed, extrema, grid = parts
    assert plain is not None
    assert weighed is not None
    assert extrema is not None
    number = len(plain)
    # The last rows are those of DISTRIBUTIONs.
    first = number - (0 if grid is None else len(grid))
    # Shape (metrics, blocks, regions, columns, lanes).
    cells = (number, BLOCKS, _REGIONS, -1)
    plain, weighed = plain.reshape(*cells, PLAIN), weighed.reshape(*cells, WEIGHED)
    taken = plain[..., 1] + weighed[..., 2]
    outside, inside = [1, -1], slice(2, -1)
    strangers = taken[:, [0, _RIGHT, 3]][..., outside].sum((1, 2, 3))
    unweighable = taken[:, [0, 3], :, inside].sum((1, 2, 3))
    right, plain = taken[:, _RIGHT, :, inside], plain[:, _RIGHT, :, inside]
    sums, counts = _numbers(right, plain, weighed[:, _RIGHT, :, inside], first)

    # The largest x and the largest -x; subnormals of a histogram are zeros.
    tops = extrema[..., inside].swapaxes(1, 2) * [1.0, -1.0]
    tops[first:][np.abs(tops[first:]) < _SMALLEST32] = 0.0
    found = None if grid is None else _read_grid(grid).reshape(-1, MOMENTS, 1)
    refused = np.stack([strangers, unweighable], axis=-1).astype(np.int64)
    return Found(counts, sums, tops, found, refused, _rounded(right, first))


def read_with_axes(
    parts: Sequence[Array | None], sizes: tuple[int, ...], agg_type: AggregationType
) -> Found:
    """Return what `Rows` of a metric with axes say, whose columns are of `padded` sizes."""
    plain, weighed, extrema, _ = parts
    assert plain is not None
    # Shape (regions, columns, lanes).
    plain = plain.reshape(_REGIONS, -1, PLAIN)
    taken = plain[..., 1]
    columns = np.arange(_FIRST, _FIRST + math.prod(sizes)).reshape(sizes)
    inside = columns[(slice(1, -1),) * len(sizes)].reshape(-1)
    if weighed is not None:
        weighed = weighed.reshape(_REGIONS, -1, WEIGHED)
        taken = taken + weighed[..., 2]
        weighed = weighed[np.newaxis, :, inside]
    right = taken[np.newaxis, :, inside]
    sums, counts = _numbers(right, plain[np.newaxis, :, inside], weighed, 1)
    tops = np.full((1, len(inside), EXTREMA), -np.inf)
    if extrema is not None:
        sign, lane = (1.0, 0) if agg_type is MAX else (-1.0, 1)
        tops[0, :, lane] = sign * extrema[inside]
    strangers = taken[:, _FIRST:].sum() - right.sum()
    refused = np.array([[strangers, taken[:, _UNWEIGHABLE].sum()]], np.int64)
    return Found(counts, sums, tops, None, refused, _rounded(right, 1))


def _numbers(right: Array, plain: Array, weighed: Array | None, first: int) -> tuple[Array, Array]:
    """Return sums and counts of what counts: the lanes, and the number of values, of each region.

    These have the shape (metrics, regions, columns, ...). From `first` on, metrics are DISTRIBUTIONs.
    """
    sums = np.zeros((len(right), right.shape[-1], SUMS))
    counts = np.zeros((len(right), right.shape[-1], COUNTS), np.int64)
    counts[..., 0] = right.sum(1)
    for rows, numbers, kinds in (
        (slice(0, first), [_TOO_SMALL, _NUMBERS, _TOO_LARGE], [_NAN]),
        (slice(first, None), [_NUMBERS], [_NAN_OF_DISTRIBUTION, _UP, _DOWN]),
    ):
        counts[rows, :, 1 : 1 + len(kinds)] = right[rows, kinds].swapaxes(1, 2)
        sums[rows] = plain[rows, numbers].sum(1)[..., [0, 1, 1]]
        if weighed is not None:
            sums[rows] += weighed[rows, numbers].sum(1)[..., [0, 1, 3]]
    return sums, counts


def _rounded(right: Array, first: int) -> Array:
    """Return how many integers float64 does not hold."""
    rounded: Array = right[:, [_TOO_SMALL, _TOO_LARGE]].sum((1, 2))
    rounded[first:] = 0
    return rounded


def _read_grid(grid: Array) -> Array:
    """Return the cells of `HostArrays.grid` for each dataset; subnormals are zeros."""
    raw = grid.reshape(len(grid), -1, 2, _HALF, MOMENTS)[:, 1:]
    normal = slice(1 << M, (1 << M) + ZERO_CELL)
    cells = np.zeros((*raw.shape[:2], CELLS, MOMENTS))
    cells[:, :, :ZERO_CELL] = raw[:, :, 0, normal][:, :, ::-1]
    cells[:, :, ZERO_CELL + 1 :] = raw[:, :, 1, normal]
    cells[:, :, ZERO_CELL, 0] = raw[:, :, :, : 1 << M, 0].sum((2, 3))
    return cells
