"""`DeviceAccumulator`: metrics that accumulate on the training device, per dataset.

    acc = DeviceAccumulator({"loss": "mean", "len": "distribution"}, ("alpaca", "orca"), device="cuda")

    for batch in loader:
        loss = acc.token_loss(model(batch["tokens"]), batch["labels"], batch["dataset"])
        acc.update("len", batch["length"], dataset_ids=batch["dataset"])
        loss.backward()
    aggregator.drain(acc)                       # one transfer, which nothing waits for
    aggregator.get_metrics_for_logging()

Everything lies in a few tensors that are made once. An update folds its values into them by a fixed
number of kernels, 4 to 6 for a mean, however many datasets and samples there are, and never asks the device for a
number: so the host runs ahead, and `torch.compile` takes an update into the graph of the step.

Sums are float64, which holds 2^53 additions of like numbers to 1e-13; so nothing has to be done
about rounding, as it must be on devices that have no float64.
"""

from __future__ import annotations

import logging
import math
import numbers
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F  # noqa: N812 - its name everywhere

from metricfold._core.device.arrays import is_sharded, of_mesh, whole_tensor
from metricfold._core.device.rows import HostArrays, Layout, check_fits
from metricfold._core.fold.axes import Axes
from metricfold._core.runtime.copies import copied_plainly
from metricfold._core.runtime.listing import internal
from metricfold._core.runtime.processes import watch_forks
from metricfold._core.runtime.recomputation import not_given_before, recomputed, unseen
from metricfold._core.runtime.uncompiled import uncompiled
from metricfold.data.ids import DatasetIds
from metricfold.metric import AggregationType
from metricfold.torch.folding import (
    BLOCKS,
    IN_ORDER,
    WEIGHING,
    WITH_EXTREMA,
    Part,
    Rows,
    Table,
    Where,
    first_column,
    fold,
    move_over,
    padded,
    read,
    read_with_axes,
    sent,
    shapes,
    shapes_with_axes,
    take_over,
)
from metricfold.torch.fused import FOLDS, triton_for
from metricfold.torch.recomputing import asked, counts
from metricfold.torch.transfer import started

__all__ = ["AccumulatorMark", "DeviceAccumulator", "PlacedMetric"]

_logger = logging.getLogger("metricfold")

_NUMBERS = frozenset(
    getattr(torch, name, None)  # not all are of old versions
    for name in (
        *("bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64"),
        *("float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2"),
        *("float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
    )
)
"""The types of numbers that torch converts to float64."""


class _Turn:
    """Taken while values are folded: on a CPU, of two additions to one cell at once, one would be lost."""

    def __init__(self) -> None:
        self.leave_parent_behind()
        watch_forks(self)

    def leave_parent_behind(self) -> None:
        # Another thread of the parent may have held it.
        self.lock = threading.RLock()


_turn = _Turn()


@internal("fill", "owner", "tensors")
@dataclass(frozen=True, slots=True)
class AccumulatorMark:
    """What an accumulator held when `DeviceAccumulator.mark` was called, on its device.

    Args:
        owner: the accumulator.
        tensors: copies of its own.
        fill: stands for the time from one drain to the next. A number, which is what tells one from
            another, would be a constant to a compiler, and a graph would be made for each log.
    """

    owner: DeviceAccumulator
    tensors: tuple[Tensor, ...] = field(repr=False)
    fill: object = field(repr=False)


@dataclass(frozen=True, slots=True, eq=False)
class _Block:
    """Metrics that stand together: all without axes, or one with axes.

    Args:
        axes: of all of them.
        parts: which of the accumulator's tensors are its plain, weighed, extrema and grid, if any.
        column: of what is in the first of the datasets and cells, less what ids are to add; shape (1,).
        strides: by how much a column goes on with an id: of a dataset first, if there are several.
        steps: for each axis the places along it times their stride.
    """

    axes: Axes
    parts: tuple[int | None, ...]
    column: Tensor
    strides: tuple[int, ...]
    steps: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a metric is: metrics of one aggregation stand side by side."""

    row: int  # of the sums and the extrema
    agg_type: AggregationType
    grid: int  # its row of the grid, if it is a DISTRIBUTION
    block: _Block


class PlacedMetric:
    """A metric at one place along some of its axes, such as in one layer: see `DeviceAccumulator.at`."""

    __slots__ = ("_accumulator", "_at", "_found", "_name", "_places", "_said")

    def __init__(
        self, accumulator: DeviceAccumulator, name: str, places: Mapping[str, object]
    ) -> None:
        self._accumulator, self._name = accumulator, name
        self._at = frozenset(places)
        self._places = dict(places)
        self._said = ", ".join(f"{axis}={place!r}" for axis, place in places.items())
        self._found = (0, torch.empty(0))
        _ = self._column

    @property
    def _column(self) -> Tensor:
        """What ids are added to, which moves when the accumulator has grown."""
        accumulator = self._accumulator
        size = len(accumulator.layout.datasets)
        if self._found[0] != size:
            if torch.compiler.is_compiling():
                return accumulator._column(self._name, self._places)  # noqa: SLF001
            with torch.inference_mode(mode=False):
                column = accumulator._column(self._name, self._places)  # noqa: SLF001 - a part of it
            self._found = (size, column)
        return self._found[1]

    def update(
        self,
        values: Any,
        *,
        weights: Any = None,
        ids: Mapping[str, Any] | None = None,
        dataset_ids: Tensor | DatasetIds | None = None,
    ) -> None:
        """Take in values of this place, as `DeviceAccumulator.update` does; `ids` are of the other axes."""
        self._accumulator._take(  # noqa: SLF001
            {self._name: values}, weights, ids, dataset_ids, self
        )

    def __repr__(self) -> str:
        return f"DeviceAccumulator.at({self._name!r}, {self._said})"


@internal("layout", "start_read", "tensors")
class DeviceAccumulator:
    """Metrics that accumulate on a device, for each dataset, until `MetricsAggregator.drain`.

    It is changed in place, by one thread or by several, without a wait for the device, a growing
    allocation or a loop over samples or datasets; inside ``torch.compile(fullgraph=True)``, under autocast and
    ``inference_mode`` as anywhere.

    A DISTRIBUTION is a histogram with 64 buckets per octave: percentiles are right to 1.6 %, mean
    and std far better. It takes 786 kB per dataset, and once more, for all float32 have their place.

    Args:
        metrics: by name, the aggregation of each: ``"mean"``, ``"sum"``, ``"max"``, ``"min"`` or
            ``"distribution"``, or the `AggregationType`.
        datasets: their names; `update` says by ``dataset_ids`` which of them a value belongs to.
            None for metrics of a step, which belong to no dataset. A number: so many datasets have room,
            whose names come with the `DatasetIds` of batches; when there are more, it grows to twice the
            size. Ranks need not know the same ones, nor in one order.
        axes: by name, the size or the labels of each axis. A metric has those that a tuple names after its
            aggregation, as in ``("sum", "layer", "expert")``; a distribution has none.
        device: where it lies; default: where new tensors do. It needs float64, which mps lacks.
        fused: whether an update outside of `torch.compile` is one kernel, which PyTorch compiles when
            the first update of a kind comes, in a few seconds. Default: on a GPU with Triton. Where it
            cannot be, a warning says so once, and the several kernels of ``False`` are taken.

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

    __slots__ = (
        "__weakref__",
        "_as_copied",
        "_blocks",
        "_fill",
        "_fused",
        "_given",
        "_nothing",
        "_places",
        "_table",
        "device",
        "layout",
        "tensors",
    )

    layout: Layout
    device: torch.device
    tensors: tuple[Tensor, ...]
    """`Rows` of metrics without axes: plain, weighed, extrema and, if there are DISTRIBUTIONs, the grid;
    then those of each metric with axes, as far as it needs them."""

    def __init__(
        self,
        metrics: Mapping[str, object],
        datasets: Iterable[str] | int = (),
        *,
        axes: Mapping[str, int | Sequence[str]] | None = None,
        device: torch.device | str | int | None = None,
        fused: bool | None = None,
    ) -> None:
        if isinstance(datasets, int):
            if datasets < 1:
                raise ValueError(f"datasets={datasets}: give room for one at least, or names")
            self.layout = Layout.of(metrics, (), axes, room=datasets + 1)
        else:
            self.layout = Layout.of(metrics, datasets, axes)
        self._fused = fused
        try:
            self.tensors = self._new_tensors(device)
        except TypeError as error:
            raise TypeError(
                f"an accumulator cannot lie on {device!r}, for it adds up in float64: record() what "
                f"a step gives, or use device='cpu' ({error})"
            ) from error
        self.device = self.tensors[0].device
        self._begin()
        self._clear()

    # -- In the step

    def update(
        self,
        name: str,
        values: Any,
        *,
        weights: Any = None,
        ids: Mapping[str, Any] | None = None,
        dataset_ids: Tensor | DatasetIds | None = None,
    ) -> None:
        """Take in `values`, without waiting for them.

        Args:
            name: of the metric.
            values: numbers, of any shape and type, on this device; no gradient flows through.
            weights: how much each value counts in a MEAN or DISTRIBUTION. What has weight 0 is
                left out of every aggregation, also a NaN: so padding is masked. Of the shape of the
                values, or of their first dimensions: one per sample does for each token.
            ids: of axes of the metric, the cells that values belong to: one place, or integers on the
                device, shaped like weights. Axes that it does not name are the last dimensions of the
                values. What has an id that is no place is left out, and the next log warns.
            dataset_ids: integers that say which of the datasets each value belongs to, by its
                place; shaped like weights. May be left out where there is only one. A value whose
                id is the place of none is left out, and the next log warns of how many there were. Or
                the `DatasetIds` of a batch, which say it by name; inside `torch.compile` what `learn`
                returns for them.

        Raises:
            TypeError, ValueError: an unknown name, shapes that do not fit, types that are no
                numbers, tensors on another device, or no `dataset_ids` where there are several
                datasets. Then nothing has changed.
        """
        self._take({name: values}, weights, ids, dataset_ids)

    def update_all(
        self,
        values: Mapping[str, Any],
        *,
        weights: Any = None,
        ids: Mapping[str, Any] | None = None,
        dataset_ids: Tensor | DatasetIds | None = None,
    ) -> None:
        """Take in several metrics of the same samples, as `update` does each.

        Metrics that stand side by side in the accumulator and have the same aggregation and shape
        are folded together, in the time of one.

        Args:
            values: of each metric, by name.
            weights: as in `update`, the same for all.
            ids: as in `update`; each metric takes those of the axes that it has.
            dataset_ids: as in `update`, the same for all.

        Raises:
            TypeError, ValueError: as `update`.
        """
        self._take(values, weights, ids, dataset_ids)

    def learn(self, ids: DatasetIds) -> Tensor:
        """Return the places of the datasets of a batch, on the device, for a compiled step to take as `dataset_ids`.

        Nothing waits. A name that is new gets a place, if the accumulator was made with a number of datasets.

        Args:
            ids: what `MetricsCollator` has put into the batch.

        Raises:
            ValueError: a name is not among the datasets that the accumulator was made with.

        >>> from metricfold.data import DatasetIds
        >>> acc = DeviceAccumulator({"loss": "mean"}, datasets=16)
        >>> acc.learn(DatasetIds(("docs", "code"), [0, 1, 1]))
        tensor([0, 1, 1])
        >>> acc.learn(DatasetIds(("code", "web"), [0, 1]))
        tensor([1, 2])
        """
        if self.layout.learns:
            layout = self.layout.learn(ids.names)
            if layout is not self.layout:
                with _turn.lock:
                    self._grow(layout)
        return sent(torch.from_numpy(ids.places(self.layout.known)), self.device)

    def at(self, name: str, **places: int | str) -> PlacedMetric:
        """Return a metric at one place along some of its axes, such as ``at("expert_tokens", layer=3)``.

        It keeps the place as a tensor: so a compiler makes one graph for all layers, where an int in `ids`
        would be a graph for each of them.

        Args:
            name: of the metric.
            places: by axis, the number or label of a cell.

        Raises:
            ValueError: there is no such metric, axis or cell.

        >>> from metricfold import MetricsAggregator
        >>> acc = DeviceAccumulator({"tokens": ("sum", "layer", "expert")}, axes={"layer": 2, "expert": 4})
        >>> layer = acc.at("tokens", layer=1)
        >>> layer.update(torch.ones(3), ids={"expert": torch.tensor([0, 3, 3])})
        >>> aggregator = MetricsAggregator()
        >>> acc = aggregator.drain(acc)
        >>> aggregator.reduce().array(None, "tokens")[0]
        array([[0., 0., 0., 0.],
               [1., 0., 0., 2.]])
        """
        self.layout.place(name)
        return PlacedMetric(self, name, self.layout.check_ids([name], places))

    @torch.no_grad()
    def _take(
        self,
        values: Mapping[str, Any],
        weights: Any,
        ids: Mapping[str, Any] | None,
        dataset_ids: Tensor | DatasetIds | None,
        placed: PlacedMetric | None = None,
    ) -> None:
        if torch.compiler.is_compiling():
            flag = counts(self._nothing)
            self._take_counted(values, weights, ids, dataset_ids, placed, flag)
        elif recomputed():
            self._pass_over(values)
        else:
            if peek_interpreter_stack() is not None:
                raise RuntimeError(
                    f"{_named(values)} cannot be taken in inside of torch.func (vmap, grad, jvp, ...), "
                    "which changes no tensor from outside: return the values from the function, as with "
                    "has_aux=True, and update() with them where the transform has returned"
                )
            self._given.update(values)
            if not isinstance(dataset_ids, DatasetIds):
                unseen(self._take_counted, values, weights, ids, dataset_ids, placed, None)
                return
            with _turn.lock:  # as another thread may let it grow
                found = self.learn(dataset_ids)
                unseen(self._take_counted, values, weights, ids, found, placed, None)

    def _take_counted(
        self,
        values: Mapping[str, Any],
        weights: Any,
        ids: Mapping[str, Any] | None,
        dataset_ids: Tensor | DatasetIds | None,
        placed: PlacedMetric | None,
        flag: Tensor | None,
    ) -> None:
        taken = {}
        for name, given in values.items():
            self.layout.place(name)
            taken[name] = self._numbers(f"values of metric {name!r}", given)
        datasets = self._ids(taken, dataset_ids)
        cells = self._cells(taken, ids, placed)
        w = self._weights(taken, weights)
        groups: list[tuple[_Place, list[Tensor]]] = []  # those of a block one after the other
        for name, place in self._places.items():
            tensor = taken.get(name)
            if tensor is None or not tensor.numel():
                continue
            if groups and _joins(groups[-1], place, tensor):
                groups[-1][1].append(tensor)
            else:
                groups.append((place, [tensor]))
        weighs = w is not None and w.dtype != torch.bool
        folds: list[tuple[_Block, list[Part]]] = []
        for start, tensors in groups:
            if not folds or folds[-1][0] is not start.block:
                folds.append((start.block, []))
            rows = self._rows(start, len(tensors), weighs)
            folds[-1][1].append(Part(rows, start.agg_type, tensors))
        for block, parts in folds:
            where = self._where(block, datasets, cells, placed)
            if torch.compiler.is_compiling():
                fold(self._table, parts, w, where, flag)
                continue
            with _turn.lock:
                if triton_for(self.device.type) if self._fused is None else self._fused:
                    FOLDS(self._table, parts, w, where)
                else:
                    fold(self._table, parts, w, where, None)

    def token_loss(
        self,
        logits: Tensor,
        labels: Tensor,
        dataset_ids: Tensor | DatasetIds | None = None,
        *,
        ignore_index: int = -100,
        num_items: Tensor | float | None = None,
        ids: Mapping[str, Any] | None = None,
        name: str = "loss",
    ) -> Tensor:
        """Return the loss to back-propagate, and take in that of each dataset on the side.

        Both are cross entropy, weighted by token: the one is the mean over the tokens of this
        batch, the others over those of each dataset since the last drain, over all ranks.

        Args:
            logits: scores of each class, shape (..., classes); computed in float32 at least.
            labels: the right class of each, shape (...), already shifted: ``logits[..., i, :]``
                predicts ``labels[..., i]``.
            dataset_ids: as in `update`, one per token or per sample; per token shifted as the labels are,
                ``ids[:, 1:]``.
            ignore_index: labels of this value do not count.
            num_items: what the sum of the losses is divided by; default: the number of labels that
                count, or 1 if none does. With gradient accumulation or ranks that hold different
                numbers of tokens, give the number of all tokens that one optimiser step is about,
                divided by the number of ranks over which gradients are averaged.
            ids: as in `update`, one per token or per sample, such as buckets of positions.
            name: of the metric, a MEAN of this accumulator.

        Raises:
            TypeError, ValueError: shapes that do not fit, or no such MEAN; else as `update`.
        """
        if self.layout.types[self.layout.place(name)] is not AggregationType.MEAN:
            raise ValueError(f'metric {name!r} takes token losses, so make it a "mean"')
        # Scores that are sharded by class are for torch's loss_parallel, labels as they are.
        by_class = is_sharded(logits, logits.ndim - 1)
        if of_mesh(logits) and not of_mesh(labels) and not by_class:
            # Of tensor parallelism, which leaves the scores replicated and knows nothing of labels.
            try:
                logits = whole_tensor(logits)
            except ValueError as error:
                raise ValueError(f"logits of metric {name!r}: {error}") from error
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
        self.update(name, losses, weights=counted, ids=ids, dataset_ids=dataset_ids)
        return losses.sum() / (counted.sum().clamp(min=1) if num_items is None else num_items)

    # -- Steps that are skipped

    def mark(self) -> AccumulatorMark:
        """Return a mark to come back to by `rollback`, such as where a step begins."""
        return AccumulatorMark(self, tuple(t.clone() for t in self.tensors), self._fill)

    @torch.no_grad()
    def rollback(self, mark: AccumulatorMark, where: Tensor | None = None) -> None:
        """Drop what has come in since `mark`.

        Args:
            mark: what `mark` returned; it may be used again.
            where: a flag on the device that says whether to, such as ``loss.isnan()``: so a step
                may be dropped without a wait. Default: do.

        Raises:
            ValueError: the mark is of another accumulator, or was made before a drain, or before the
                accumulator has grown.
        """
        if mark.owner is not self:
            raise ValueError("this mark is of another accumulator: call mark() on this one")
        if mark.fill is not self._fill:
            raise ValueError(
                "this accumulator has been drained since the mark, or has grown for new datasets: mark "
                "each step anew, after the log, and learn() the batch's datasets before"
            )
        for tensor, before in zip(self.tensors, mark.tensors, strict=True):
            tensor.copy_(before if where is None else torch.where(where, before, tensor))

    # -- On the host

    @uncompiled
    def start_read(self) -> Callable[[], HostArrays]:
        """Begin the transfer to the host; what is returned waits for it, on any thread.

        Raises:
            ValueError: it lies on the meta device, or is a FakeTensor, and has no numbers.
        """
        if self.tensors[0].is_meta or isinstance(self.tensors[0], FakeTensor):
            kind = "on the meta device" if self.tensors[0].is_meta else "as FakeTensors"
            raise ValueError(
                f"this accumulator lies {kind}, and has no numbers: make one on a real device to drain"
            )
        with _turn.lock:
            read = started(torch.cat([tensor.reshape(-1) for tensor in self.tensors]))
            # It may have grown by the time that somebody waits.
            shapes_now = [tensor.shape for tensor in self.tensors]
            as_now = self.layout, self._blocks, self._places, shapes_now
        return lambda: _host_arrays(read(), *as_now)

    @uncompiled
    def empty(self) -> DeviceAccumulator:
        """Forget everything, and return this accumulator."""
        self._fill = object()
        self._clear()
        if self._as_copied is not None:
            self._as_copied.counted = None
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> DeviceAccumulator:
        copied = copied_plainly(self, memo)
        counted = [copied._part(block, 0)[..., 1] for block in copied._blocks]  # noqa: SLF001
        copied._as_copied = as_copied = _AsCopied([one.clone() for one in counted])  # noqa: SLF001
        weakref.finalize(copied, _warn_if_lost, copied.layout.names, counted, as_copied)
        return copied

    def __setstate__(self, state: tuple[dict[str, Any] | None, dict[str, Any]]) -> None:
        of_subclass, slots = state
        self._fused = slots.get("_fused")  # of which 0.1 knew nothing
        self.layout, self.device, self.tensors = (
            slots[name] for name in ("layout", "device", "tensors")
        )
        if of_subclass:
            vars(self).update(of_subclass)
        before, histograms = self.tensors, len(self.layout.distributions)
        if len(before) == (3 if histograms else 2) and not any(self.layout.axes):  # of 0.1
            self.tensors = self._new_tensors(self.device)
            self._begin()
            self._clear()
            take_over(before, self.tensors, histograms)
        else:
            self._begin()

    def __repr__(self) -> str:
        return f"DeviceAccumulator({self.layout}, device={str(self.device)!r})"

    # -- Inside

    def _new_tensors(self, device: torch.device | str | int | None) -> tuple[Tensor, ...]:
        sizes = [size for _, _, sizes in self._standing_together() for size in sizes if size]
        # A tensor made in inference mode could not be changed outside of it.
        with torch.inference_mode(mode=False):
            return tuple(torch.empty(size, dtype=torch.float64, device=device) for size in sizes)

    def _standing_together(self) -> Iterator[tuple[list[str], Axes, list[tuple[int, ...] | None]]]:
        """Yield for each block its metrics, in the order of their rows, their axes, and the shapes of its parts."""
        layout = self.layout
        metrics = [*zip(layout.names, layout.types, layout.axes, strict=True)]
        plain = [name for one in IN_ORDER for name, t, axes in metrics if t is one and not axes]
        if plain:
            sizes = shapes(len(plain), len(layout.distributions), len(layout.datasets))
            yield plain, (), sizes
        for name, agg_type, axes in metrics:
            if axes:
                yield [name], axes, shapes_with_axes(agg_type, padded(layout.datasets, axes))

    def _begin(self) -> None:
        self._as_copied: _AsCopied | None = None
        self._fill = object()
        self._given: set[str] = set()  # metrics that have come in, but by graphs
        self._nothing = self.tensors[0].new_empty(0)  # but where it lies
        with torch.inference_mode(mode=False):
            self.tensors = tuple(t.clone() if t.is_inference() else t for t in self.tensors)
            self._table = Table.on(self.device, len(self.layout.datasets))
            self._arrange()

    def _grow(self, layout: Layout) -> None:
        """Take another layout of the same metrics, with more names or more places."""
        before, blocks, datasets = self.tensors, self._blocks, len(self.layout.datasets)
        self.layout = layout
        if len(layout.datasets) == datasets:
            return
        self._fill = object()
        with torch.inference_mode(mode=False), torch.no_grad():
            self.tensors = self._new_tensors(self.device)
            self._table = Table.on(self.device, len(layout.datasets))
            self._arrange()
            self._clear()
            for old, new in zip(blocks, self._blocks, strict=True):
                there = [None if part is None else before[part] for part in old.parts]
                here = [None if part is None else self.tensors[part] for part in new.parts]
                move_over(there, here, datasets, new.axes)

    def _arrange(self) -> None:
        """Say where each metric is."""
        self._blocks: list[_Block] = []
        self._places: dict[str, _Place] = {}
        types = dict(zip(self.layout.names, self.layout.types, strict=True))
        tensors = iter(range(len(self.tensors)))
        for names, axes, sizes in self._standing_together():
            parts = tuple(None if size is None else next(tensors) for size in sizes)
            columns = padded(self.layout.datasets, axes)
            strides = tuple(math.prod(columns[place + 1 :]) for place in range(len(columns)))
            column = self._table.column
            if axes:
                column = sent(torch.tensor([first_column(strides)]), self.device)
            steps = tuple(
                torch.arange(axis.length, device=self.device) * stride
                for axis, stride in zip(axes, strides[len(strides) - len(axes) :], strict=True)
            )
            block = _Block(axes, parts, column, strides, steps)
            self._blocks.append(block)
            first = len(names) - (0 if sizes[3] is None else sizes[3][0])  # DISTRIBUTIONs come last
            for row, name in enumerate(names):
                self._places[name] = _Place(row, types[name], row - first, block)

    def _pass_over(self, values: Mapping[str, Any]) -> None:
        """Leave out what a repeated forward gives; what its first has not given is lost, so say so."""
        lost = [name for name in values if name not in self._given]
        if lost and self.device not in asked:  # else a graph may have been the first
            self._given.update(lost)
            _logger.warning("%s", not_given_before([_named(lost)]))

    def _clear(self) -> None:
        for tensor in self.tensors:
            tensor.zero_()
        for place in self._places.values():
            if place.block.parts[2] is None:
                continue
            extrema = self._part(place.block, 2)
            if place.block.axes:
                extrema.fill_(math.inf if place.agg_type is AggregationType.MIN else -math.inf)
            else:
                extrema[:, 0].fill_(-math.inf)
                extrema[:, 1].fill_(math.inf)

    def _part(self, block: _Block, which: int) -> Tensor:
        """Return one of a block's `Rows`, which it has."""
        part = block.parts[which]
        assert part is not None
        return self.tensors[part]

    def _rows(self, start: _Place, number: int, weighs: bool) -> Rows:
        """Return the part that belongs to a number of metrics side by side, from `start` on."""
        agg_type, alone = start.agg_type, bool(start.block.axes)

        def part(which: int, first: int) -> Tensor:
            tensor = self._part(start.block, which)
            if alone:
                return tensor
            return tensor[first] if number == 1 else tensor[first : first + number]

        return Rows(
            part(0, start.row),
            part(1, start.row) if weighs and agg_type in WEIGHING else None,
            part(2, start.row) if agg_type in WITH_EXTREMA else None,
            part(3, start.grid) if agg_type is AggregationType.DISTRIBUTION else None,
            1 if alone else BLOCKS,
        )

    def _where(
        self,
        block: _Block,
        datasets: Tensor | None,
        cells: Mapping[str, int | Tensor],
        placed: PlacedMetric | None,
    ) -> Where:
        """Return which columns values of a block's metrics are of."""
        if not block.axes:
            return Where(datasets, block.column)
        column = block.column if placed is None else placed._column  # noqa: SLF001
        along, last, further = [], [], 0
        if datasets is not None:
            along.append((datasets, len(self.layout.datasets), block.strides[0]))
        strides = block.strides[-len(block.axes) :]
        for axis, stride, steps in zip(block.axes, strides, block.steps, strict=True):
            cell = cells.get(axis.name)
            if isinstance(cell, Tensor):
                along.append((cell, axis.length, stride))
            elif cell is not None:
                further += cell * stride
            elif placed is None or axis.name not in placed._at:  # noqa: SLF001
                last.append(steps)
        return Where(None, column + further if further else column, tuple(along), tuple(last))

    def _column(self, name: str, places: Mapping[str, object]) -> Tensor:
        """Return the column to which ids are added of a metric whose place along some axes is known."""
        block, further = self._places[name].block, 0
        for axis, stride in zip(block.axes, block.strides[-len(block.axes) :], strict=True):
            if axis.name in places:
                further += self.layout.cell_on(name, axis, places[axis.name]) * stride
        return block.column + further

    def _numbers(self, what: str, given: Any) -> Tensor:
        """Return `given` as a tensor on this device."""
        if isinstance(given, (numbers.Real, np.bool_)):
            try:
                number = float(given)
            except OverflowError as error:
                raise ValueError(f"{what} are too large for a 64-bit float") from error
            return torch.full((1,), number, dtype=torch.float64, device=self.device)
        tensor = self._here(what, given)
        if tensor.is_complex():
            raise TypeError(f"{what} are complex: give their real part or their magnitude")
        return tensor

    def _weights(self, taken: Mapping[str, Tensor], given: Any) -> Tensor | None:
        if given is None:
            return None
        what = f"weights of {_named(taken)}"
        if isinstance(given, numbers.Real) and not 0 <= float(given) < math.inf:
            raise ValueError(f"{what}: {given!r} is not a finite number of 0 or more")
        w = self._numbers(what, given)
        for name, x in taken.items():
            check_fits(f"weights of metric {name!r}", w.shape, x.shape)
        return w

    def _here(self, what: str, given: Any) -> Tensor:
        if not isinstance(given, Tensor):
            raise TypeError(
                f"{what} are a {type(given).__name__}: give a tensor on {self.device}, or a number"
            )
        try:
            tensor: Tensor = whole_tensor(given)
        except ValueError as error:
            raise ValueError(f"{what}: {error}") from error
        if tensor.device != self.device:
            raise ValueError(
                f"{what} are on {tensor.device}, but this accumulator is on {self.device}: move "
                "them with .to(device, non_blocking=True), or make the accumulator with device="
            )
        if not torch.compiler.is_compiling():
            self._check_kind(what, tensor)
        return tensor

    def _check_kind(self, what: str, tensor: Tensor) -> None:
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
            raise TypeError(
                f"{what} are a tensor of layout {tensor.layout}, type {tensor.dtype}: give a plain one, "
                "such as .to_dense() of a sparse, .values() of a nested or .dequantize() of a quantized "
                "one"
            )
        if tensor.dtype not in _NUMBERS and not tensor.is_complex():
            raise TypeError(
                f"{what} are of type {tensor.dtype}, which torch cannot read as numbers"
            )
        if isinstance(tensor, FakeTensor) and not isinstance(self.tensors[0], FakeTensor):
            raise TypeError(
                f"{what} are a FakeTensor, which has no numbers: make the accumulator under the same "
                "FakeTensorMode, or leave the update out there"
            )

    def _ids(self, taken: Mapping[str, Tensor], dataset_ids: Any) -> Tensor | None:
        if not self.layout.takes_ids(_named(taken), dataset_ids):
            return None
        if isinstance(dataset_ids, DatasetIds):
            raise TypeError(
                f"dataset_ids of {_named(taken)} are the names of a batch's datasets, which a compiler cannot "
                "look up: give the compiled step accumulator.learn(batch['dataset_ids'])"
            )
        ids = self._places_in(f"dataset_ids of {_named(taken)}", dataset_ids)
        for name, x in taken.items():
            check_fits(f"dataset_ids of metric {name!r}", ids.shape, x.shape)
        return ids

    def _cells(
        self,
        taken: Mapping[str, Tensor],
        ids: Mapping[str, Any] | None,
        placed: PlacedMetric | None,
    ) -> Mapping[str, int | Tensor]:
        """Return by axis the place of all values, or that of each, checked."""
        found: dict[str, int | Tensor] = {}
        at: Iterable[str] = () if placed is None else placed._at  # noqa: SLF001
        for axis, given in self.layout.check_ids(taken, ids).items():
            if axis in at:
                raise ValueError(f"{placed!r} has its place along {axis!r}: leave that out of ids=")
            for name in taken:
                own = [one for one in self._places[name].block.axes if one.name == axis]
                if own and axis not in found:
                    what = f"ids of axis {axis!r} of metric {name!r}"
                    host = isinstance(given, (str, int, np.integer))
                    found[axis] = (
                        self.layout.cell_on(name, own[0], given)
                        if host
                        else self._places_in(what, given)
                    )
        for name, x in taken.items():
            axes = self._places[name].block.axes
            for one in axes:
                cell = found.get(one.name)
                if isinstance(cell, Tensor):
                    what = f"ids of axis {one.name!r} of metric {name!r}"
                    check_fits(what, cell.shape, x.shape)
            if axes:
                self.layout.last_axes(name, (*found, *at), x.shape)
        return found

    def _places_in(self, what: str, given: Any) -> Tensor:
        """Return integers on this device."""
        ids = self._here(what, given)
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise TypeError(f"{what} are of type {ids.dtype}: give integers")
        return ids.long()


def _host_arrays(
    flat: np.ndarray[Any, Any],
    layout: Layout,
    blocks: Sequence[_Block],
    places: Mapping[str, _Place],
    shapes_of_tensors: Sequence[torch.Size],
) -> HostArrays:
    """Return what an accumulator held, whose tensors came one after the other."""
    ends = np.cumsum([shape.numel() for shape in shapes_of_tensors])
    parts = [
        part.reshape(shape)
        for part, shape in zip(np.split(flat, ends[:-1]), shapes_of_tensors, strict=True)
    ]
    found = []
    for block in blocks:
        own = [None if part is None else parts[part] for part in block.parts]
        if block.axes:  # of one metric
            agg_type = next(one.agg_type for one in places.values() if one.block is block)
            found.append(read_with_axes(own, padded(layout.datasets, block.axes), agg_type))
        else:
            found.append(read(own))
    own_places = [places[name] for name in layout.names]
    of_each = [(found[blocks.index(place.block)], place.row) for place in own_places]
    for name, (one, row) in zip(layout.names, of_each, strict=True):
        if one.rounded[row]:
            _logger.warning(
                "%d values of metric %r are integers beyond 2^53, of which float64 holds not every "
                "one: they count, rounded to the next that it does",
                one.rounded[row],
                name,
            )
    return HostArrays(
        np.concatenate([one.counts[row] for one, row in of_each]),
        np.concatenate([one.sums[row] for one, row in of_each])[..., np.newaxis],
        np.concatenate([one.extrema[row] for one, row in of_each]),
        next((one.grid for one in found if one.grid is not None), None),
        np.stack([one.refused[row] for one, row in of_each]),
    )


@dataclass(slots=True)
class _AsCopied:
    """How many values a copy held when it was made; None: it has been emptied since."""

    counted: list[Tensor] | None


_warned_of: set[tuple[str, ...]] = set()


def _warn_if_lost(names: tuple[str, ...], counted: list[Tensor], as_copied: _AsCopied) -> None:
    """Warn, once for the same metrics, of a copy that has taken something in and is dropped with it.

    Of a module that has an accumulator, frameworks make copies, and nobody drains theirs.
    """
    if names in _warned_of:
        return
    try:
        before = as_copied.counted or [torch.zeros_like(one) for one in counted]
        lost = not all(map(torch.equal, counted, before))
    except RuntimeError:  # such as of a device that is not there any more
        return
    if lost:
        _warned_of.add(names)
        _logger.warning(
            "a copy of a DeviceAccumulator was updated, and dropped before it was drained, so what it "
            "took in of %s is lost: drain the copy as well, or keep the accumulator out of what is "
            "copied, such as a module of which weight averaging makes a second one",
            _named(names),
        )


def _joins(group: tuple[_Place, list[Tensor]], place: _Place, x: Tensor) -> bool:
    """Return whether the metric at `place` can be folded with those of a group."""
    start, tensors = group
    return (
        place.row == start.row + len(tensors)
        and place.agg_type is start.agg_type
        and x.shape == tensors[0].shape
        and x.dtype == tensors[0].dtype
    )


def _named(taken: Iterable[str]) -> str:
    names = ", ".join(map(repr, taken))
    return f"metric {names}"
