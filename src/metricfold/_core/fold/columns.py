"""Metrics as one column per key: checked, and folded as far as their handlers can.

    update(list)              fold_metrics     a column for each key of the list
    record                    fold_value       one value
    record of an array        fold_each        a value for each element
    record with axes          fold_block       a value for each cell
    record_all                fold_together    several metrics of one step, which share a weight
    MetricsCollator           fold_metrics     in a data worker, where a batch of 64 samples shrinks
                                               to a few numbers before it crosses to the training

What may be given is `values`' business.
"""

from __future__ import annotations

import math
import reprlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from itertools import compress
from typing import Any, TypeAlias

import numpy as np

from metricfold._core.device import arrays
from metricfold._core.fold import hints
from metricfold._core.fold.axes import Block, described
from metricfold._core.fold.builtin import folds_as
from metricfold._core.fold.handlers import AggregationHandler, LaneHandler
from metricfold._core.fold.names import Key, show
from metricfold._core.fold.state import State, quiet
from metricfold._core.fold.values import (
    NUMBERS,
    Numbers,
    category,
    check_weights,
    counted_elements,
    counts_or_not,
    elements_of,
    floats,
    held,
    host_scalar,
    listed,
    number,
    refuse_weight,
    shape_of,
    weight_of,
    weights_beside,
    weights_of_each,
)
from metricfold.metric import (
    AggregationType,
    Metric,
    TypeLike,
    check_name,
    is_name,
    quote,
    resolve_type,
    type_label,
)

HandlerOf: TypeAlias = "Callable[[Key, TypeLike], AggregationHandler | None]"
"""Returns what folds a key of that type; None: nothing does, it keeps its metrics."""


@dataclass(slots=True, eq=False)
class Pending:
    """A value (or weight) that still lies on a device, to be read at the reduction.

    Args:
        key: (dataset name, metric name).
        agg_type: the aggregation.
        value: a number or a category; or an array that is not 0-d, whose elements each count.
        weight: a number; or an array of one for each element.
        block: the cells that its elements are of, if the metric has axes.
    """

    key: Key
    agg_type: TypeLike
    value: Any
    weight: Any
    block: Block | None = None

    def renamed(self, key: Key) -> Pending:
        return replace(self, key=key)

    def ready(self) -> bool:
        """Return whether it can be read without a wait."""
        return arrays.ready(self.value) and arrays.ready(self.weight)

    @property
    def count(self) -> int:
        """How many values it stands for."""
        return math.prod(getattr(self.value, "shape", ()))


@dataclass(slots=True, eq=False)
class Column:
    """What a batch holds of one key: a folded state, or metrics as they came in.

    Args:
        key: (dataset name, metric name).
        agg_type: the aggregation of all its values.
        state: the folded values; None for a handler without lanes.
        metrics: for a handler without lanes, its metrics in order; from a data worker also those
            that the training process has to refuse.
        pending: values still on a device, in order.
        axes: along which it has cells, as `axes.described` says.
    """

    key: Key
    agg_type: TypeLike
    state: State | None
    metrics: Sequence[Metric] = ()
    pending: Sequence[Pending] = ()
    axes: str = ""

    @property
    def weightless(self) -> bool:
        """Whether nothing of it counts: all that it says is which type its key was given."""
        return self.state is None and not self.metrics and not self.pending


def check_same_type(key: Key, registered: TypeLike, given: TypeLike) -> None:
    """Refuse a second aggregation type for one key."""
    if registered != given:
        raise ValueError(
            f"{show(key)} is already registered with aggregation type "
            f"{type_label(registered)}, so it cannot take a value of type {type_label(given)}: "
            "give one of them another name"
        )


def fold_metrics(
    metrics: Sequence[Metric], handler_of: HandlerOf, *, in_worker: bool
) -> list[Column]:
    """Return one column per key of `metrics`, in order of first appearance.

    In a data worker device arrays are read here, where no device is to be waited for, instead of being
    held for the reduction. A weight that its type does not take, and a second type of a key, are handed
    on, for the training process to refuse: they would end the worker.
    """
    columns = []
    for key, values, types, weights in _by_key(metrics):
        _check_key(key)
        try:
            resolved = _resolved_all(key, types)
        except TypeError as error:
            first = Metric(*key, values[0], types[0])
            raise TypeError(f"{error}{hints.for_metric(first)}") from None
        known = dict.fromkeys(resolved)
        for agg_type in known:
            if not in_worker:
                check_same_type(key, resolved[0], agg_type)
            given = values, weights
            if len(known) > 1:
                mine = [one == agg_type for one in resolved]
                given = tuple(compress(values, mine)), tuple(compress(weights, mine))
            handler = handler_of(key, agg_type)
            columns.append(_fold_group(key, agg_type, *given, handler, in_worker))
    return columns


def fold_value(
    key: Key, agg_type: TypeLike, value: Any, weight: Any, handler_of: HandlerOf
) -> Column:
    """Return the column of a single value; device arrays are held."""
    return _fold_group(key, agg_type, (value,), (weight,), handler_of(key, agg_type))


def fold_together(
    values: Mapping[Key, tuple[TypeLike, Any]], weight: Any, handler_of: HandlerOf
) -> list[Column]:
    """Return the columns of single values, each with its aggregation, that share one weight.

    It counts where weights do; other types ask whether it is 0.
    """
    columns = []
    for key, (agg, value) in values.items():
        agg_type = _resolved(key, agg)
        handler = handler_of(key, agg_type)
        asks = handler is not None and not handler.weighted and arrays.backend_of(weight) is None
        own = counts_or_not(key, weight) if asks else weight
        columns.append(_fold_group(key, agg_type, (value,), (own,), handler))
    return columns


def fold_each(
    key: Key, agg_type: TypeLike, values: Any, weights: Any, handler_of: HandlerOf
) -> Column:
    """Return the column of an array of any shape whose elements each count, or weigh as one weight.

    Device arrays are held.
    """
    if isinstance(values, str | int | float | Enum) or shape_of(key, values) == ():
        return fold_value(key, agg_type, values, weights, handler_of)
    handler = handler_of(key, agg_type)
    weighted = handler is None or handler.weighted
    weighing = weights_of_each(key, agg_type, values, weights, weighted=weighted)
    elements = elements_of(key, values)
    nothing = Column(key, agg_type, None)
    if not arrays.counts_here(elements):
        return nothing
    known = arrays.backend_of(weighing) is None
    if known and not (elements.shape[0] and np.any(weighing)):
        return nothing
    if arrays.backend_of(elements) is None:
        # Weights on a device are not known yet. Fold all the same, to refuse here what cannot be.
        counted, own = counted_elements(elements, weighing if known else 1.0)
        if known and not counted.size:
            return nothing
        column = _fold_counted(key, agg_type, counted, own, handler)
        if known:
            return column
    column = _fold_counted(key, agg_type, [], [], handler)
    column.pending = [Pending(key, agg_type, elements, weighing)]
    return column


def fold_block(
    key: Key,
    agg_type: TypeLike,
    values: Any,
    weights: Any,
    block: Block,
    handler_of: HandlerOf,
) -> Column:
    """Return the column of an array that holds cells of a metric with axes; device arrays are held.

    Args:
        key: (dataset name, metric name).
        agg_type: its aggregation.
        values: a number, or a NumPy, torch or JAX array, of the block's shape.
        weights: an array of that shape, or one weight for all.
        block: which cells it holds.
        handler_of: as its type says.
    """
    handler = handler_of(key, agg_type)
    if handler is not None and not (handler.has_lanes and handler.laned().may_have_axes):
        raise ValueError(
            f"{show(key)}: a metric of type {type_label(agg_type)!r} cannot have axes, for its states are "
            "not a few lanes each: use 'sum', 'mean', 'max', 'min' or a handler with lanes"
        )
    if isinstance(values, int | float) or (isinstance(values, np.ndarray) and not values.ndim):
        values = np.array(number(key, values))
    shape = shape_of(key, values)
    if shape != block.shape:
        raise ValueError(
            f"{show(key)}: the values have the shape {shape}, but the cells that axes= and ids= name have "
            f"{block.shape}"
        )
    weighted = handler is None or handler.weighted
    weighing = weights_of_each(key, agg_type, values, weights, weighted=weighted)
    elements = elements_of(key, values)
    column = Column(key, agg_type, None, axes=described(block.axes))
    if not (arrays.counts_here(elements) and 0 not in shape):
        return column
    if arrays.backend_of(elements) is not None or arrays.backend_of(weighing) is not None:
        column.pending = [Pending(key, agg_type, elements, weighing, block)]
        # Until then no cell has a value.
        elements, weighing, block = np.empty(0), 0.0, block._replace(places=_NO_PLACES)
    elif not np.any(weights_beside(elements, np.broadcast_to(weighing, elements.shape))):
        return column
    if handler is not None:
        column.state = fold_cells(key, handler.laned(), block, elements, weighing)
    return column


_NO_PLACES = np.empty(0, dtype=np.intp)


def fold_cells(key: Key, handler: LaneHandler, block: Block, values: Any, weights: Any) -> State:
    """Fold values of cells that lie on the host, shape (n,), perhaps masked."""
    weighing = np.broadcast_to(np.asarray(weights, dtype=np.float64), values.shape)
    weighing = weights_beside(values, weighing)
    given = np.ma.getdata(values)
    if given.dtype.kind in "iu" and not weighing.all():
        given = np.where(weighing != 0, given, 0)  # what does not count may be too large
    numbers = floats(key, "a value", given)
    try:
        with quiet():
            sums, maxs = handler.fold_cells(numbers, weighing)
    except ValueError as error:
        raise ValueError(f"{show(key)}: {error}") from error
    return State.of_cells(sums, maxs, block.axes, block.places)


def fold_read(key: Key, handler: LaneHandler, values: Numbers, weights: Numbers) -> State:
    """Fold what lies on the host, whose weights have been checked and are not 0."""
    ones = bool((weights == 1).all()) if isinstance(weights, np.ndarray) else _all_one(weights)
    weighing: Any = None if ones else weights
    texts = handler.takes is str
    given: Any = [*map(str, listed(values))] if texts else values
    # Python's own numbers are folded sooner than they are an array, if that means the same.
    fold: Callable[[Any, Any], State] = handler.fold_listed
    if not texts and folds_as(handler) is None:
        fold = partial(LaneHandler.fold_listed, handler)
    if isinstance(given, np.ndarray):
        fold, given = handler.fold, floats(key, "a value", given)
        weighing = None if ones else floats(key, "a weight", weights)
    try:
        return fold(given, weighing)
    except ValueError as error:
        raise ValueError(f"{show(key)}: {error}") from error


# -- The metrics of a list, by key ----------------------------------------------------------------


def _by_key(metrics: Sequence[Metric]) -> Iterator[tuple[Key, Any, Any, Any]]:
    """Yield the values, types and weights of each key, in order."""
    if not _METRIC.issuperset(map(type, metrics)):
        _check_items(metrics)
    if not metrics:
        return
    datasets, names, values, types, weights = zip(*metrics, strict=True)
    try:
        texts = {*datasets, *names}
    except TypeError:  # a name that is no string and cannot be hashed
        for metric in metrics:
            _check_key(metric[:2])
        raise
    # Samples mostly bring the same metrics in the same order.
    step = len(names) // names.count(names[0]) if _TEXT.issuperset(map(type, texts)) else 0
    keys = [*zip(datasets[:step], names[:step], strict=True)]
    samples = len(names) // max(step, 1)
    recurring = (datasets[:step] * samples, names[:step] * samples)
    if len({*keys}) == step > 0 and (datasets, names) == recurring:
        for place, key in enumerate(keys):
            yield key, values[place::step], types[place::step], weights[place::step]
        return
    groups: defaultdict[Key, list[Metric]] = defaultdict(list)
    for key, metric in zip(zip(datasets, names, strict=True), metrics, strict=True):
        groups[key].append(metric)
    for key, group in groups.items():
        _, _, values, types, weights = zip(*group, strict=True)
        yield key, values, types, weights


def _alike(items: Sequence[Any]) -> bool:
    return items.count(items[0]) == len(items)


def _all_one(weights: Sequence[float]) -> bool:
    # Mostly the very same object, which is soon seen.
    return not weights or (weights[0] == 1.0 and _alike(weights))


_METRIC = {Metric}


def _check_items(metrics: Sequence[object]) -> None:
    for position, item in enumerate(metrics):
        if not isinstance(item, Metric):
            raise TypeError(
                f"item {position} of the metrics is {quote(item)}, which is no Metric: give "
                f"Metric(dataset_name, name, value, agg_type) objects{hints.for_metrics(metrics)}"
            )


def _check_key(key: Key) -> None:
    dataset_name, name = key
    if is_name(dataset_name) and is_name(name):
        return
    if not isinstance(name, str):
        raise TypeError(
            f"the name of a metric of dataset {reprlib.repr(dataset_name)} must be a string, but is "
            f"{reprlib.repr(name)}{hints.for_stacked(name)}"
        )
    check_name(f"the name of a metric of dataset {dataset_name!r}", name)
    if dataset_name is None:
        raise TypeError(
            f"the dataset name of metric {name!r} is None: call set_dataset_name() on its "
            "transform, or use record() for a metric that belongs to no dataset"
        )
    check_name(f"the dataset name of metric {name!r}", dataset_name)


def _resolved_all(key: Key, types: Sequence[TypeLike]) -> list[TypeLike]:
    # By class too: a text may equal a member of somebody's StrEnum, and be another type.
    own = isinstance(types[0], AggregationType)
    if _alike(types) and (own or len({*map(type, types)}) == 1):
        return [_resolved(key, types[0])]
    return [_resolved(key, one) for one in types]


def _resolved(key: Key, agg_type: TypeLike) -> TypeLike:
    try:
        return resolve_type(agg_type)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{show(key)}: {error}") from None


# -- The values of a key ---------------------------------------------------------------------------


def _fold_group(
    key: Key,
    agg_type: TypeLike,
    values: Sequence[Any],
    weights: Sequence[Any],
    handler: AggregationHandler | None,
    in_worker: bool = False,
) -> Column:
    """Return the column of values as they were given."""
    # By type, not by value: comparing a device array with a number would wait for the device.
    plain = NUMBERS.issuperset(map(type, values))
    weighing = NUMBERS.issuperset(map(type, weights))
    if not plain:
        values = [*map(arrays.unwrapped, values)]
        here = [*map(arrays.counts_here, values)]
        for value, counts in zip(values, here, strict=True):
            if not counts:
                held(key, value)  # refused on all processes, if on one
        values, weights = [*compress(values, here)], [*compress(weights, here)]
    conflicting = None
    if not weighing or not _all_one(weights):
        weighted = handler is None or handler.weighted
        weights = [weight_of(key, one, weighted=weighted, in_worker=in_worker) for one in weights]
        host = [weight for weight in weights if type(weight) in NUMBERS]
        check_weights(key, host)
        # What lies on a device is not looked at.
        some = [type(weight) not in NUMBERS or weight != 0 for weight in weights]
        values, weights = [*compress(values, some)], [*compress(weights, some)]
        if not weighted:
            conflicting = next((weight for weight in host if weight not in (0, 1)), None)
    if not values:
        return Column(key, agg_type, None)
    if conflicting is not None and not in_worker:
        refuse_weight(key, agg_type, conflicting)
    folding = handler if conflicting is None else None
    known = plain and weighing
    return _fold_counted(key, agg_type, values, weights, folding, in_worker, known)


def _fold_counted(
    key: Key,
    agg_type: TypeLike,
    values: Numbers,
    weights: Numbers,
    handler: AggregationHandler | None,
    in_worker: bool = False,
    known: bool = False,
) -> Column:
    """Return the column of values that count, whose weights have been checked.

    Values and weights that are `known` to be Python's own numbers need no look.
    """
    folding = handler.laned() if handler is not None and handler.has_lanes else None
    texts = folding is not None and folding.takes is str
    pending: list[Pending] = []
    if not known and (folding is None or texts or not isinstance(values, np.ndarray)):
        values, weights = listed(values), listed(weights)
        plain = _TEXT if texts else NUMBERS
        if not (plain.issuperset(map(type, values)) and NUMBERS.issuperset(map(type, weights))):
            # What a value may be is the business of a handler without lanes.
            read = host_scalar if folding is None else category if texts else number
            values, weights, pending = _apart(key, agg_type, values, weights, read, in_worker)
    if folding is None:
        pairs = zip(values, weights, strict=True)
        metrics = [Metric(*key, value, agg_type, weight) for value, weight in pairs]
        return Column(key, agg_type, None, metrics, pending)
    state = fold_read(key, folding, values, weights)
    if not in_worker:
        replaced = [state.replaced]
        if texts and pending:  # folded later, but refused here
            waiting = [one.value for one in pending if isinstance(one.value, str)]
            replaced.append(fold_read(key, folding, waiting, ()).replaced)
        for text in replaced:
            if text is not None:
                folding.tell(key, text)
    return Column(key, agg_type, state, pending=pending)


_TEXT = {str}


def _apart(
    key: Key,
    agg_type: TypeLike,
    values: Sequence[Any],
    weights: Sequence[Any],
    read: Callable[[Key, Any], Any],
    in_worker: bool,
) -> tuple[list[Any], list[Any], list[Pending]]:
    """Return values and weights that are known, as `read` takes them, and what waits for a device."""
    here: list[Any] = []
    weighing: list[Any] = []
    pending: list[Pending] = []
    for value, weight in zip(values, weights, strict=True):
        on_device = held(key, value, in_worker=in_worker)
        weight_on_device = held(key, weight, in_worker=in_worker)
        one = read(key, value) if on_device is None else on_device
        # Once one value is pending the later ones queue behind it: a window is in order of arrival,
        # and a handler without lanes may mind the order, too.
        if on_device is None and weight_on_device is None and not pending:
            here.append(one)
            weighing.append(weight)
            continue
        own = weight if weight_on_device is None else weight_on_device
        pending.append(Pending(key, agg_type, one, own))
    return here, weighing, pending
