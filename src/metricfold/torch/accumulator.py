"""`DeviceAccumulator`: metrics that accumulate on the training device, per dataset.

    acc = DeviceAccumulator({"loss": "mean", "len": "distribution"}, ("alpaca", "orca"), device="cuda")

    for batch in loader:
        loss = acc.token_loss(model(batch["tokens"]), batch["labels"], batch["dataset"])
        acc.update("len", batch["length"], dataset_ids=batch["dataset"])
        loss.backward()
    aggregator.drain(acc)                       # one transfer, which nothing waits for
    aggregator.get_metrics_for_logging()

Everything lies in three tensors that are made once. An update folds its values into them by a fixed
number of kernels, however many datasets and samples there are, and never asks the device for a
number: so the host runs ahead, and `torch.compile` takes an update into the graph of the step.

Sums are float64, which holds 2^53 additions of like numbers to 1e-13; so nothing has to be done
about rounding, as it must be on devices that have no float64.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - its name everywhere

from metricfold.arrays import whole_tensor
from metricfold.device_lanes import (
    CELLS,
    EXTREMA,
    FRACTION_BITS,
    MOMENTS,
    ZERO_CELL,
    HostArrays,
    Layout,
    M,
)
from metricfold.metric import AggregationType

__all__ = ["AccumulatorMark", "DeviceAccumulator"]


class _Lane(IntEnum):
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


_LAST_LANE = {
    AggregationType.MAX: _Lane.NANS,
    AggregationType.MIN: _Lane.NANS,
    AggregationType.SUM: _Lane.WX,
    AggregationType.MEAN: _Lane.W,
    AggregationType.DISTRIBUTION: _Lane.DOWN,
}
_EXTREMA = {
    AggregationType.MAX: slice(0, 1),
    AggregationType.MIN: slice(1, 2),
    AggregationType.DISTRIBUTION: slice(0, 2),
}
"""Which of the largest x and the largest -x each aggregation needs."""
_FINITE = _EXTREMA[AggregationType.DISTRIBUTION]
_SMALLEST = float(np.finfo(np.float32).tiny)
_SMALLEST_BUCKET = 1 << M
_MAGNITUDE = 0x7FFF_FFFF
_FRACTION = (1 << FRACTION_BITS) - 1


@dataclass(frozen=True, slots=True)
class AccumulatorMark:
    """What an accumulator held when `DeviceAccumulator.mark` was called, on its device."""

    owner: DeviceAccumulator
    tensors: tuple[Tensor, ...]
    drains: int


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a metric is.

    Args:
        row: of `sums` and `extrema`.
        last: the last of the sums that it uses.
        extrema: which of the extrema it uses, or None.
        grid: its row of `grid`, or None.
    """

    row: int
    last: int
    extrema: slice | None
    grid: int | None


class DeviceAccumulator:
    """Metrics that accumulate on a device, for each dataset, until `MetricsAggregator.drain`.

    It is changed in place, without a wait for the device, a growing allocation or a loop over
    samples or datasets; inside ``torch.compile(fullgraph=True)``, under autocast and
    ``inference_mode`` as anywhere.

    A DISTRIBUTION is a histogram with 64 buckets per octave: percentiles are right to 1.6 %, mean
    and std far better. It takes 780 kB per dataset, in each of which all float32 have their place.

    Args:
        metrics: by name, the aggregation of each: ``"mean"``, ``"sum"``, ``"max"``, ``"min"`` or
            ``"distribution"``, or the `AggregationType`.
        datasets: their names; `update` says by ``dataset_ids`` which of them a value belongs to.
            None for metrics of a step, which belong to no dataset.
        device: where it lies; default: where new tensors do. It needs float64, which mps lacks.

    Raises:
        TypeError, ValueError: an aggregation that devices do not do, a name that is none, or a
            device without float64.

    >>> from metricfold import MetricsAggregator
    >>> acc = DeviceAccumulator({"loss": "mean"}, datasets=("alpaca", "orca"))
    >>> acc.update("loss", torch.tensor([1.0, 2.0, 4.0]), dataset_ids=torch.tensor([0, 1, 1]))
    >>> aggregator = MetricsAggregator()
    >>> acc = aggregator.drain(acc)
    >>> aggregator.get_metrics_for_logging("train")
    {'train_alpaca/loss': 1.0, 'train_orca/loss': 3.0}
    """

    __slots__ = ("__weakref__", "_datasets", "_drains", "_places", "device", "layout", "tensors")

    layout: Layout
    device: torch.device
    tensors: tuple[Tensor, ...]
    """Sums (metrics, lanes, columns), extrema (metrics, 2, columns) and, of DISTRIBUTIONs, the grid
    (distributions, 3, datasets · CELLS + 1). Of the columns the first and last are of ids that are
    no dataset's, below and above; the last cell is of values that are in none."""

    def __init__(
        self,
        metrics: Mapping[str, object],
        datasets: Iterable[str] = (),
        *,
        device: torch.device | str | int | None = None,
    ) -> None:
        self.layout = layout = Layout.of(metrics, datasets)
        self._datasets = len(layout.datasets)
        self._drains = 0
        self._places = {
            name: _Place(
                row,
                _LAST_LANE[agg_type],
                _EXTREMA.get(agg_type),
                layout.distributions.index(name) if name in layout.distributions else None,
            )
            for row, (name, agg_type) in enumerate(zip(layout.names, layout.types, strict=True))
        }
        rows, columns = len(layout.names), self._datasets + 2
        shapes = [(rows, len(_Lane), columns), (rows, EXTREMA, columns)]
        if layout.distributions:
            shapes.append((len(layout.distributions), MOMENTS, self._datasets * CELLS + 1))
        try:
            # A tensor made in inference mode could not be changed outside of it.
            with torch.inference_mode(mode=False):
                self.tensors = tuple(
                    torch.empty(shape, dtype=torch.float64, device=device) for shape in shapes
                )
        except TypeError as error:
            raise TypeError(
                f"an accumulator cannot lie on {device!r}, for it adds up in float64: record() what "
                f"a step gives, or use device='cpu' ({error})"
            ) from error
        self.device = self.tensors[0].device
        self._clear()

    # -- In the step

    @torch.no_grad()
    def update(
        self, name: str, values: Any, *, weights: Any = None, dataset_ids: Tensor | None = None
    ) -> None:
        """Take in `values`, without waiting for them.

        Args:
            name: of the metric.
            values: numbers, of any shape and type, on this device; no gradient flows through.
            weights: how much each value counts in a MEAN or DISTRIBUTION. What has weight 0 is
                left out of every aggregation, also a NaN: so padding is masked. Of the shape of the
                values, or of their first dimensions: one per sample does for each token.
            dataset_ids: integers that say which of the datasets each value belongs to, by its
                place; shaped like weights. May be left out where there is only one. A value whose
                id is the place of none is left out, and the next log warns of how many there were.

        Raises:
            TypeError, ValueError: an unknown name, shapes that do not fit, types that are no
                numbers, tensors on another device, or no `dataset_ids` where there are several
                datasets. Then nothing has changed.
        """
        place = self._places.get(name)
        if place is None:
            place = self._places[self.layout.names[self.layout.place(name)]]
        x = self._numbers(f"values of metric {name!r}", values)
        columns = self._columns(name, dataset_ids, x)
        where = f"weights of metric {name!r}"
        given = None if weights is None else _spread(where, self._numbers(where, weights), x)
        if not x.numel():
            return
        if place.grid is not None:
            x = x.float()
            x = torch.where(x.abs() < _SMALLEST, 0.0, x)
        batch = _Batch.of(x, given, columns)
        sums, extrema, *grids = self.tensors
        first = _Lane.UNWEIGHABLE if batch.weights is not None else _Lane.COUNT
        batch.add(sums[place.row, first : place.last + 1], place.last)
        if place.extrema is not None:
            batch.enlarge(extrema[place.row, place.extrema], place.extrema)
        if place.grid is not None:
            batch.add_to_grid(grids[0][place.grid], x, self._datasets)

    def token_loss(
        self,
        logits: Tensor,
        labels: Tensor,
        dataset_ids: Tensor | None = None,
        *,
        ignore_index: int = -100,
        num_items: Tensor | float | None = None,
        name: str = "loss",
    ) -> Tensor:
        """Return the loss to back-propagate, and take in that of each dataset on the side.

        Both are cross entropy, weighted by token: the one is the mean over the tokens of this
        batch, the others over those of each dataset since the last drain, over all ranks.

        Args:
            logits: scores of each class, shape (..., classes); computed in float32 at least.
            labels: the right class of each, shape (...), already shifted: ``logits[..., i, :]``
                predicts ``labels[..., i]``.
            dataset_ids: as in `update`, one per token or per sample.
            ignore_index: labels of this value do not count.
            num_items: what the sum of the losses is divided by; default: the number of labels that
                count, or 1 if none does. With gradient accumulation or ranks that hold different
                numbers of tokens, give the number of all tokens that one optimiser step is about,
                divided by the number of ranks over which gradients are averaged.
            name: of the metric, a MEAN of this accumulator.

        Raises:
            TypeError, ValueError: shapes that do not fit, or no such MEAN; else as `update`.
        """
        if self.layout.types[self.layout.place(name)] is not AggregationType.MEAN:
            raise ValueError(f'metric {name!r} takes token losses, so make it a "mean"')
        if logits.shape[:-1] != labels.shape:
            raise ValueError(
                f"logits of shape {tuple(logits.shape)} do not go with labels of shape "
                f"{tuple(labels.shape)}: give logits (..., classes) and labels (...)"
            )
        scores = logits if logits.dtype == torch.float64 else logits.float()
        losses = F.cross_entropy(
            scores.flatten(0, -2), labels.flatten(), ignore_index=ignore_index, reduction="none"
        ).view(labels.shape)
        counted = labels != ignore_index
        self.update(name, losses, weights=counted, dataset_ids=dataset_ids)
        return losses.sum() / (counted.sum().clamp(min=1) if num_items is None else num_items)

    # -- Steps that are skipped

    def mark(self) -> AccumulatorMark:
        """Return a mark to come back to by `rollback`, such as where a step begins."""
        return AccumulatorMark(self, tuple(t.clone() for t in self.tensors), self._drains)

    @torch.no_grad()
    def rollback(self, mark: AccumulatorMark, where: Tensor | None = None) -> None:
        """Drop what has come in since `mark`.

        Args:
            mark: what `mark` returned; it may be used again.
            where: a flag on the device that says whether to, such as ``loss.isnan()``: so a step
                may be dropped without a wait. Default: do.

        Raises:
            ValueError: the mark is of another accumulator, or was made before a drain.
        """
        if mark.owner is not self:
            raise ValueError("this mark is of another accumulator: call mark() on this one")
        if mark.drains != self._drains:
            raise ValueError(
                "this accumulator has been drained since the mark: mark each step anew, after the "
                "log"
            )
        for tensor, before in zip(self.tensors, mark.tensors, strict=True):
            tensor.copy_(before if where is None else torch.where(where, before, tensor))

    # -- On the host

    def start_read(self) -> Callable[[], HostArrays]:
        """Begin the transfer to the host; what is returned waits for it, on any thread."""
        together = torch.cat([tensor.reshape(-1) for tensor in self.tensors])
        ready = None
        if self.device.type == "cuda":
            together = together.to("cpu", non_blocking=True)
            ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record(torch.cuda.current_stream(self.device))

        def finish() -> HostArrays:
            if ready is not None:
                ready.synchronize()
            return self._host_arrays(together.cpu().numpy())

        return finish

    def empty(self) -> DeviceAccumulator:
        """Forget everything, and return this accumulator."""
        self._drains += 1
        self._clear()
        return self

    def __repr__(self) -> str:
        metrics = {
            name: agg_type.value
            for name, agg_type in zip(self.layout.names, self.layout.types, strict=True)
        }
        datasets = tuple(filter(None, self.layout.datasets))
        return f"DeviceAccumulator({metrics}, datasets={datasets}, device={str(self.device)!r})"

    # -- Inside

    def _clear(self) -> None:
        sums, extrema, *grids = self.tensors
        for tensor in (sums, *grids):
            tensor.zero_()
        extrema.fill_(-math.inf)

    def _numbers(self, what: str, given: Any) -> Tensor:
        """Return `given` as a tensor on this device."""
        if isinstance(given, numbers.Real | np.bool_):
            return torch.full((), float(given), dtype=torch.float64, device=self.device)
        tensor = self._here(what, given)
        if tensor.is_complex():
            raise TypeError(f"{what} are complex: give their real part or their magnitude")
        return tensor

    def _here(self, what: str, given: Any) -> Tensor:
        if not isinstance(given, Tensor):
            raise TypeError(
                f"{what} are a {type(given).__name__}: give a tensor on {self.device}, or a number"
            )
        tensor: Tensor = whole_tensor(given)
        if tensor.device != self.device:
            raise ValueError(
                f"{what} are on {tensor.device}, but this accumulator is on {self.device}: move "
                "them with .to(device, non_blocking=True), or make the accumulator with device="
            )
        return tensor.detach()

    def _columns(self, name: str, dataset_ids: Any, x: Tensor) -> Tensor | None:
        """Return the column of each value, of the shape of the first dimensions of `x`."""
        where = f"dataset_ids of metric {name!r}"
        if dataset_ids is None:
            if self._datasets > 1:
                raise ValueError(
                    f"metric {name!r} is one of {self._datasets} datasets: give dataset_ids, the "
                    f"place of each value's dataset in {self.layout.datasets!r}"
                )
            return None
        if self.layout.datasets == ("",):
            raise ValueError(
                f"metric {name!r} belongs to no dataset: leave dataset_ids out, or name the "
                "datasets when the accumulator is made"
            )
        ids = self._here(where, dataset_ids)
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise TypeError(f"{where} are of type {ids.dtype}: give integers")
        _check_shape(where, ids, x)
        return ids.long().clamp(-1, self._datasets) + 1

    def _host_arrays(self, flat: np.ndarray[Any, Any]) -> HostArrays:
        parts, start = [], 0
        for tensor in self.tensors:
            parts.append(flat[start : start + tensor.numel()].reshape(tensor.shape))
            start += tensor.numel()
        sums, extrema, *grids = parts
        rows, inside = self.layout.rows, slice(1, -1)

        def of_rows(lanes: list[_Lane]) -> np.ndarray[Any, Any]:
            return sums[:, lanes, inside].swapaxes(1, 2).reshape(rows, len(lanes))

        strangers = sums[:, [_Lane.COUNT, _Lane.UNWEIGHABLE], :: self._datasets + 1]
        unweighable = sums[:, _Lane.UNWEIGHABLE, inside]
        refused = np.stack([strangers.sum((1, 2)), unweighable.sum(1)], axis=-1)
        counts = of_rows([_Lane.COUNT, _Lane.NANS, _Lane.UP, _Lane.DOWN])
        grid = None
        if grids:
            grid = grids[0][..., :-1].swapaxes(1, 2).reshape(-1, MOMENTS, 1)
        return HostArrays(
            counts.astype(np.int64),
            of_rows([_Lane.WX, _Lane.W, _Lane.W2])[..., None],
            extrema[..., inside].swapaxes(1, 2).reshape(rows, EXTREMA),
            grid,
            refused.astype(np.int64),
        )


@dataclass(frozen=True, slots=True)
class _Batch:
    """The values of one update, ready to be added up.

    Args:
        x: float64; 0 where they do not count.
        kept: which of them count, or None if all do.
        weights: finite and 0 or more, float64; None if all that count weigh 1.
        unweighable: which weights had to be replaced.
        nan: which of those that count are NaN.
        columns: of each value, of the shape of their first dimensions; None if there is one.
    """

    x: Tensor
    kept: Tensor | None
    weights: Tensor | None
    unweighable: Tensor | None
    nan: Tensor
    columns: Tensor | None

    @classmethod
    def of(cls, x: Tensor, given: Tensor | None, columns: Tensor | None) -> _Batch:
        """Return the batch of values and weights of any type, of as many dimensions."""
        kept = weights = unweighable = None
        wide = x.double()
        if given is not None:
            kept = given
            if given.dtype != torch.bool:
                given = given.double()
                weights = given.nan_to_num(nan=0.0, posinf=0.0).clamp_min(0.0)
                unweighable, kept = given != weights, weights > 0
            wide = torch.where(kept, wide, 0.0)
        return cls(wide, kept, weights, unweighable, wide.isnan(), columns)

    def add(self, lanes: Tensor, last: int) -> None:
        """Add to `lanes`, shape (n, columns), of which `last` is the last."""
        x, nan = self.x, self.nan
        terms = [] if self.unweighable is None else [self._wide(self.unweighable)]
        terms.append(torch.ones_like(x) if self.kept is None else self._wide(self.kept))
        terms.append(nan.double())
        if last >= _Lane.WX:
            infinite = [x == math.inf, x == -math.inf] if last >= _Lane.UP else []
            infinity = 0.0 if infinite else math.inf
            finite = x.nan_to_num(nan=0.0, posinf=infinity, neginf=-infinity)
            w = self.weights if last > _Lane.WX else None
            terms.append(finite if w is None else finite * w)
            if last >= _Lane.W:
                dropped = nan | infinite[0] | infinite[1] if infinite else nan
                w = torch.where(dropped, 0.0, terms[-3] if w is None else w)
                terms += [w, w * w] if last >= _Lane.W2 else [w]
            terms += [flags.double() for flags in infinite]
        stacked, columns = self._per_column(torch.stack(terms), torch.sum)
        if columns is None:
            lanes[:, 1].add_(stacked)
        else:
            lanes.scatter_add_(1, columns.expand_as(stacked), stacked)

    def enlarge(self, extrema: Tensor, which: slice) -> None:
        """Let `extrema`, shape (n, columns), be at least the `which` of x and -x."""
        excluded = self.nan if self.kept is None else self.nan | ~self.kept
        largest = torch.stack([self.x, -self.x][which])
        largest = torch.where(excluded, -math.inf, largest)
        if which == _FINITE:
            largest = torch.where(self.x.isinf(), -math.inf, largest)
        largest, columns = self._per_column(largest, torch.amax)
        if columns is None:
            extrema[:, 1].copy_(torch.maximum(extrema[:, 1], largest))
        else:
            extrema.scatter_reduce_(1, columns.expand_as(largest), largest, "amax")

    def add_to_grid(self, grid: Tensor, x: Tensor, datasets: int) -> None:
        """Add to the cells of the buckets, shape (3, datasets · CELLS + 1), the last of no bucket.

        Args:
            grid: of one DISTRIBUTION.
            x: the values as float32, of which none is subnormal.
            datasets: how many there are.
        """
        bits = x.contiguous().view(torch.int32)
        magnitude = bits & _MAGNITUDE
        bucket = ((magnitude >> FRACTION_BITS) - (_SMALLEST_BUCKET - 1)).clamp_min(0)
        cell = (ZERO_CELL + torch.where(bits < 0, -bucket, bucket)).long()
        seen = x.isfinite() if self.kept is None else x.isfinite() & self.kept
        if self.columns is not None:
            columns = _stretched(self.columns, x.ndim)
            seen = seen & (columns > 0) & (columns <= datasets)
            cell = cell + (columns - 1) * CELLS
        cell = torch.where(seen, cell, datasets * CELLS)
        u = (magnitude & _FRACTION).double() * 2.0**-FRACTION_BITS
        w = torch.ones_like(u) if self.weights is None else self.weights.expand_as(u)
        moments = torch.stack([w, w * u, w * u * u]).reshape(MOMENTS, -1)
        grid.scatter_add_(1, cell.reshape(1, -1).expand(MOMENTS, -1), moments)

    def _wide(self, flags: Tensor) -> Tensor:
        return flags.double().expand_as(self.x)

    def _per_column(
        self, terms: Tensor, reduce: Callable[[Tensor, tuple[int, ...]], Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """Return terms, shape (n, values...), with one value for each column, which become flat.

        What has one column, such as all tokens of a sample, is reduced first: so many additions to
        the same few places would wait for each other.
        """
        ndim = 0 if self.columns is None else self.columns.ndim
        extra = tuple(range(1 + ndim, terms.ndim))
        if extra:
            terms = reduce(terms, extra)
        if self.columns is None:
            return terms, None
        return terms.reshape(len(terms), -1), self.columns.reshape(1, -1)


def _check_shape(what: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.shape != x.shape[: tensor.ndim]:
        raise ValueError(
            f"{what} have the shape {tuple(tensor.shape)}, but the values {tuple(x.shape)}: give "
            "one per value, or one for each index of their first dimensions"
        )


def _spread(what: str, tensor: Tensor, x: Tensor) -> Tensor:
    """Return `tensor` with as many dimensions as `x`."""
    _check_shape(what, tensor, x)
    return _stretched(tensor, x.ndim)


def _stretched(tensor: Tensor, ndim: int) -> Tensor:
    return tensor.reshape(tensor.shape + (1,) * (ndim - tensor.ndim))
