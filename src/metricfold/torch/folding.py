"""How the values of one update become sums, extrema and cells of a histogram, on any device.

Metrics of like shape and aggregation are folded together: the first dimension of `Batch.x` is of
metrics, the others are those of the values. Whatever there is, it takes the same few operations, none
of which asks the device for a number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from metricfold.device_lanes import CELLS, FRACTION_BITS, MOMENTS, ZERO_CELL, M
from metricfold.metric import AggregationType

__all__ = ["EXTREMA_OF", "LAST_LANE", "Batch", "Lane", "stretched", "without_subnormals"]


class Lane(IntEnum):
    """The sums of a row. Each aggregation uses the first few of them."""

    UNWEIGHABLE = 0
    """Values with a weight that cannot be; only written where there are weights."""
    COUNT = 1
    NANS = 2
    WX = 3
    W = 4
    W2 = 5
    UP = 6
    DOWN = 7


LAST_LANE = {
    AggregationType.MAX: Lane.NANS,
    AggregationType.MIN: Lane.NANS,
    AggregationType.SUM: Lane.WX,
    AggregationType.MEAN: Lane.W,
    AggregationType.DISTRIBUTION: Lane.DOWN,
}
EXTREMA_OF = {
    AggregationType.MAX: slice(0, 1),
    AggregationType.MIN: slice(1, 2),
    AggregationType.DISTRIBUTION: slice(0, 2),
}
"""Which of the largest x and the largest -x each aggregation needs."""
_FINITE = EXTREMA_OF[AggregationType.DISTRIBUTION]
_SMALLEST = float(np.finfo(np.float32).tiny)
_SMALLEST_BUCKET = 1 << M
_MAGNITUDE = 0x7FFF_FFFF
_FRACTION = (1 << FRACTION_BITS) - 1


@dataclass(frozen=True, slots=True)
class Batch:
    """The values of one update, ready to be added up.

    Args:
        x: float64, shape (metrics, values...); 0 where they do not count.
        kept: which of them count, or None if all do.
        weights: finite and 0 or more, float64; None if all that count weigh 1.
        unweighable: which weights had to be replaced.
        nan: which of those that count are NaN.
        columns: where each value belongs, of the shape of the first dimensions of values; None if
            all belong to the one dataset.
        counts: a flag that says whether any of this counts; None if it does.
    """

    x: Tensor
    kept: Tensor | None
    weights: Tensor | None
    unweighable: Tensor | None
    nan: Tensor
    columns: Tensor | None
    counts: Tensor | None

    @classmethod
    def of(
        cls, x: Tensor, given: Tensor | None, columns: Tensor | None, counts: Tensor | None
    ) -> Batch:
        """Return the batch of values, shape (metrics, values...), and weights, which broadcast."""
        kept = weights = unweighable = None
        wide = x.double()
        if given is not None:
            kept = given
            if given.dtype != torch.bool:
                given = given.double()
                weights = given.nan_to_num(nan=0.0, posinf=0.0).clamp_min(0.0)
                unweighable, kept = given != weights, weights > 0
            wide = torch.where(kept, wide, 0.0)
        return cls(wide, kept, weights, unweighable, wide.isnan(), columns, counts)

    def add(self, lanes: Tensor, last: int) -> None:
        """Add to `lanes`, shape (metrics, n, columns), of which `last` is the last."""
        x, nan = self.x, self.nan
        terms = [] if self.unweighable is None else [self._wide(self.unweighable)]
        terms.append(torch.ones_like(x) if self.kept is None else self._wide(self.kept))
        terms.append(nan.double())
        if last >= Lane.WX:
            infinite = [x == math.inf, x == -math.inf] if last >= Lane.UP else []
            infinity = 0.0 if infinite else math.inf
            finite = x.nan_to_num(nan=0.0, posinf=infinity, neginf=-infinity)
            w = self.weights if last > Lane.WX else None
            terms.append(finite if w is None else finite * w)
            if last >= Lane.W:
                dropped = nan | infinite[0] | infinite[1] if infinite else nan
                w = torch.where(dropped, 0.0, terms[-3] if w is None else w)
                terms += [w, w * w] if last >= Lane.W2 else [w]
            terms += [flags.double() for flags in infinite]
        stacked, columns = self._per_column(torch.stack(terms, dim=1), torch.sum)
        stacked = self._if_it_counts(stacked, 0.0)
        if columns is None:
            lanes[..., 1].add_(stacked)
        else:
            lanes.scatter_add_(2, columns.expand_as(stacked), stacked)

    def enlarge(self, extrema: Tensor, which: slice) -> None:
        """Let `extrema`, shape (metrics, n, columns), be at least the `which` of x and -x."""
        excluded = self.nan if self.kept is None else self.nan | ~self.kept
        if which == _FINITE:
            excluded = excluded | self.x.isinf()
        signed = [self.x, -self.x][which]
        largest = torch.stack([torch.where(excluded, -math.inf, x) for x in signed], dim=1)
        largest, columns = self._per_column(largest, torch.amax)
        largest = self._if_it_counts(largest, -math.inf)
        if columns is None:
            extrema[..., 1].copy_(torch.maximum(extrema[..., 1], largest))
        else:
            extrema.scatter_reduce_(2, columns.expand_as(largest), largest, "amax")

    def add_to_grid(self, grid: Tensor, x: Tensor, datasets: int) -> None:
        """Add to the cells of the buckets.

        Args:
            grid: shape (metrics, 3, datasets · CELLS + 1); the last cell is of no bucket.
            x: the values as float32, of which none is subnormal.
            datasets: how many there are.
        """
        bits = x.contiguous().view(torch.int32)
        magnitude = bits & _MAGNITUDE
        bucket = ((magnitude >> FRACTION_BITS) - (_SMALLEST_BUCKET - 1)).clamp_min(0)
        cell = (ZERO_CELL + torch.where(bits < 0, -bucket, bucket)).long()
        seen = x.isfinite() if self.kept is None else x.isfinite() & self.kept
        if self.columns is not None:
            columns = stretched(self.columns, x.ndim - 1)
            seen = seen & (columns > 0) & (columns <= datasets)
            cell = cell + (columns - 1) * CELLS
        cell = torch.where(seen, cell, datasets * CELLS)
        u = (magnitude & _FRACTION).double() * 2.0**-FRACTION_BITS
        w = torch.ones_like(u) if self.weights is None else self.weights.expand_as(u)
        moments = torch.stack([w, w * u, w * u * u], dim=1).reshape(len(x), MOMENTS, -1)
        moments = self._if_it_counts(moments, 0.0)
        grid.scatter_add_(2, cell.reshape(len(x), 1, -1).expand_as(moments), moments)

    def _if_it_counts(self, terms: Tensor, identity: float) -> Tensor:
        return terms if self.counts is None else torch.where(self.counts, terms, identity)

    def _wide(self, flags: Tensor) -> Tensor:
        return flags.double().expand_as(self.x)

    def _per_column(
        self, terms: Tensor, reduce: Callable[[Tensor, tuple[int, ...]], Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """Return terms, shape (metrics, n, values...), with one for each column, which become flat.

        What has one column, such as all tokens of a sample, is reduced first: so many additions to
        the same few places would wait for each other.
        """
        ndim = 0 if self.columns is None else self.columns.ndim
        extra = tuple(range(2 + ndim, terms.ndim))
        if extra:
            terms = reduce(terms, extra)
        if self.columns is None:
            return terms, None
        return terms.reshape(*terms.shape[:2], -1), self.columns.reshape(1, 1, -1)


def without_subnormals(x: Tensor) -> Tensor:
    """Return float32 values of which those that a histogram takes for 0 are 0."""
    return torch.where(x.abs() < _SMALLEST, 0.0, x)


def stretched(tensor: Tensor, ndim: int) -> Tensor:
    """Return `tensor` with `ndim` dimensions, the further ones of size 1."""
    return tensor.reshape(tensor.shape + (1,) * (ndim - tensor.ndim))
