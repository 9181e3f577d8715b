"""Metrics as one column per key: checked, and folded as far as their handlers can.

    update(list)              fold_metrics     a column for each key of the list
    record                    fold_value       one value
    record of an array        fold_each        a value for each element
    record_all                fold_together    several metrics of one step, which share a weight
    MetricsCollator           fold_metrics     in a data worker, where a batch of 64 samples shrinks
                                               to a few numbers before it crosses to the training

All of them end in `_fold_group` or `_fold_counted`. What may be given is `values`' business.
"""

from __future__ import annotations

import math
import reprlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import compress
from operator import itemgetter
from typing import Any, Protocol, TypeAlias

import numpy as np

from metricfold._core.device import arrays
from metricfold._core.fold import hints
from metricfold._core.fold.handlers import AggregationHandler, LaneHandler
from metricfold._core.fold.names import Key, show
from metricfold._core.fold.state import State
from metricfold._core.fold.values import (
    NUMBERS,
    Numbers,
    category,
    checked_weights,
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
    weights_of_each,
)
from metricfold.metric import Metric, TypeLike, check_name, is_name, quote, resolve_type, type_label

__all__ = [
    "Column",
    "HandlerOf",
    "HandlersKnown",
    "Known",
    "Pending",
    "check_same_type",
    "fold_each",
    "fold_metrics",
    "fold_read",
    "fold_together",
    "fold_value",
]

HandlerOf: TypeAlias = "Callable[[Key, TypeLike], AggregationHandler | None]"


class Known(Protocol):
    """What is known of a key."""

    agg_type: TypeLike
    handler: AggregationHandler


class HandlersKnown:
    """Says what folds values of a key: the handler that it began with, else its type's.

    Args:
        records: of keys that have begun.
        of_type: what handles each type.
    """

    def __init__(
        self, records: Mapping[Key, Known], of_type: Mapping[TypeLike, AggregationHandler]
    ) -> None:
        self._records = records
        self._of_type = of_type

    def __call__(self, key: Key, agg_type: TypeLike) -> AggregationHandler | None:
        known = self._records.get(key)
        if known is not None and known.agg_type == agg_type:
            return known.handler
        return self._of_type.get(agg_type)


"""Returns what folds a key of that type; None: nothing does, it keeps its metrics."""

_METRIC = {Metric}
_key_of = itemgetter(0, 1)


@dataclass(slots=True, eq=False)
class Pending:
    """A value (or weight) that still lies on a device, to be read at the reduction.

    Args:
        key: (dataset name, metric name).
        agg_type: the aggregation.
        value: a number or a category; or an array that is not 0-d, whose elements each count.
        weight: a number; or an array of one for each element.
    """

    key: Key
    agg_type: TypeLike
    value: Any
    weight: Any

    def renamed(self, key: Key) -> Pending:
        """Return the same of another key."""
        return Pending(key, self.agg_type, self.value, self.weight)

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
    """

    key: Key
    agg_type: TypeLike
    state: State | None
    metrics: Sequence[Metric] = ()
    pending: Sequence[Pending] = ()

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
    metrics: Sequence[Metric],
    handler_of: HandlerOf,
    *,
    in_worker: bool,
) -> list[Column]:
    """Return one column per key of `metrics`, in order of first appearance.

    Args:
        metrics: any number of metrics.
        handler_of: as its type says.
        in_worker: fold as a data worker does. Device arrays are read here, where no device is to
            be waited for, instead of being held for the reduction. A weight that its type does not
            take, and a second type of a key, are handed on, for the training process to refuse: they
            would end the worker.
    """
    columns = []
    for key, group in _by_key(metrics).items():
        _, _, values, types, weights = zip(*group, strict=True)
        _check_key(key)
        try:
            known = _types_in(key, types)
        except TypeError as error:
            raise TypeError(f"{error}{hints.for_metric(group[0])}") from None
        first, *others = known
        for other in () if in_worker else others:
            check_same_type(key, first, other)
        for agg_type in known:
            if others:
                given = [one for one in group if _resolved(key, one.agg_type) == agg_type]
                _, _, values, _, weights = zip(*given, strict=True)
            handler = handler_of(key, agg_type)
            columns.append(_fold_group(key, agg_type, values, weights, handler, in_worker))
    return columns


def fold_value(
    key: Key, agg_type: TypeLike, value: Any, weight: Any, handler_of: HandlerOf
) -> Column:
    """Return the column of a single value; device arrays are held."""
    handler = handler_of(key, agg_type)
    return _fold_group(key, agg_type, (value,), (weight,), handler, in_worker=False)


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
        own = weight
        if handler is not None and not handler.weighted and arrays.backend_of(weight) is None:
            own = counts_or_not(key, weight)
        columns.append(_fold_group(key, agg_type, (value,), (own,), handler, in_worker=False))
    return columns


def fold_each(
    key: Key, agg_type: TypeLike, values: Any, weights: Any, handler_of: HandlerOf
) -> Column:
    """Return the column of an array whose elements each count; device arrays are held.

    Args:
        key: (dataset name, metric name).
        agg_type: its aggregation.
        values: a NumPy, torch or JAX array of any shape.
        weights: an array of that shape, or one weight for all.
        handler_of: as its type says.
    """
    if isinstance(values, str | int | float | Enum) or shape_of(key, values) == ():
        return fold_value(key, agg_type, values, weights, handler_of)
    handler = handler_of(key, agg_type)
    weighted = handler is None or handler.weighted
    weighing = weights_of_each(key, agg_type, values, weights, weighted=weighted)
    elements = elements_of(key, values)
    if not arrays.counts_here(elements):
        return Column(key, agg_type, None)
    if arrays.backend_of(weighing) is None and not (elements.shape[0] and np.any(weighing)):
        return Column(key, agg_type, None)
    if arrays.backend_of(elements) is None:
        if arrays.backend_of(weighing) is None:
            counted, own = counted_elements(elements, weighing)
            if not counted.size:
                return Column(key, agg_type, None)
            return _fold_counted(key, agg_type, counted, own, handler, in_worker=False)
        # The weights are not known yet. Fold the values all the same, to refuse here what cannot be.
        _fold_counted(key, agg_type, *counted_elements(elements, 1.0), handler, in_worker=False)
    column = _fold_counted(key, agg_type, [], [], handler, in_worker=False)
    column.pending = [Pending(key, agg_type, elements, weighing)]
    return column


def fold_read(key: Key, handler: LaneHandler, values: Numbers, weights: Numbers) -> State:
    """Fold what lies on the host, whose weights have been checked and are not 0."""
    texts = handler.takes is str
    array = None if texts else floats(key, "a value", values)
    weighing = None
    if isinstance(weights, np.ndarray):
        weighing = None if (weights == 1).all() else weights
    elif weights.count(1.0) < len(weights):
        weighing = floats(key, "a weight", weights)
    try:
        if array is None:
            return handler.fold_listed([*map(str, listed(values))], None)
        return handler.fold(array, weighing)
    except ValueError as error:
        raise ValueError(f"{show(key)}: {error}") from error


# -- The metrics of a list, by key ----------------------------------------------------------------


def _by_key(metrics: Sequence[Metric]) -> dict[Key, list[Metric]]:
    if not _METRIC.issuperset(map(type, metrics)):
        _check_items(metrics)
    groups: defaultdict[Key, list[Metric]] = defaultdict(list)
    try:
        for key, metric in zip(map(_key_of, metrics), metrics, strict=True):
            groups[key].append(metric)
    except TypeError:  # a name that is no string and cannot be hashed
        for metric in metrics:
            _check_key((metric.dataset_name, metric.name))
        raise
    return groups


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


def _types_in(key: Key, types: Sequence[TypeLike]) -> list[TypeLike]:
    """Return the aggregation types that `types` name, which should be one."""
    # By class too: a text may equal a member of somebody's StrEnum, and be another type.
    if types.count(types[0]) == len(types) and len(set(map(type, types))) == 1:
        return [_resolved(key, types[0])]
    return list(dict.fromkeys(_resolved(key, one) for one in types))


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
    in_worker: bool,
) -> Column:
    """Return the column of values as they were given."""
    if not NUMBERS.issuperset(map(type, values)):
        values = [*map(arrays.unwrapped, values)]
        values, weights = _counted_here(key, values, weights)
        if not values:
            return Column(key, agg_type, None)
    # By type, not by value: comparing a device array with a number would wait for the device.
    plain = NUMBERS.issuperset(map(type, weights))
    if not plain or weights.count(1.0) < len(weights):
        weighted = handler is None or handler.weighted
        if not plain:
            weights = [
                weight_of(key, weight, weighted=weighted, in_worker=in_worker) for weight in weights
            ]
        values, weights, conflicting = _counted(key, values, weights, weighted)
        if not values:
            return Column(key, agg_type, None)
        if conflicting is not None:
            if in_worker:
                return _keep_metrics(key, agg_type, values, weights, in_worker)
            refuse_weight(key, agg_type, conflicting)
    return _fold_counted(key, agg_type, values, weights, handler, in_worker)


def _counted_here(
    key: Key, values: Sequence[Any], weights: Sequence[Any]
) -> tuple[Sequence[Any], Sequence[Any]]:
    """Return the values that no other process counts, with their weights."""
    here = [*map(arrays.counts_here, values)]
    if all(here):
        return values, weights
    for value, counts in zip(values, here, strict=True):
        if not counts:
            held(key, value)  # refused on all processes, if on one
    return [*compress(values, here)], [*compress(weights, here)]


def _counted(
    key: Key, values: Sequence[Any], weights: Sequence[Any], weighted: bool
) -> tuple[Sequence[Any], Sequence[Any], float | None]:
    """Return the values whose weight is not 0, with their weights, after a check of these.

    The third is a weight other than 0 and 1, if there is one and it means nothing here. Weights on
    a device are not looked at.
    """
    host = [weight for weight in weights if type(weight) in NUMBERS]
    checked = checked_weights(key, host)
    conflicting = None
    if checked is not None:
        if not checked.all():
            counts = [type(weight) not in NUMBERS or weight != 0 for weight in weights]
            values, weights = list(compress(values, counts)), list(compress(weights, counts))
        if not weighted:
            conflicting = next((weight for weight in host if weight not in (0, 1)), None)
    return values, weights, conflicting


def _fold_counted(
    key: Key,
    agg_type: TypeLike,
    values: Numbers,
    weights: Numbers,
    handler: AggregationHandler | None,
    in_worker: bool,
) -> Column:
    """Return the column of values that count, whose weights have been checked."""
    if handler is None or not handler.has_lanes:
        return _keep_metrics(key, agg_type, listed(values), listed(weights), in_worker)
    folding = handler.laned()
    texts = folding.takes is str
    pending: list[Pending] = []
    if texts or not isinstance(values, np.ndarray):
        values, weights = listed(values), listed(weights)
        plain = _TEXT if texts else NUMBERS
        if not (plain.issuperset(map(type, values)) and NUMBERS.issuperset(map(type, weights))):
            read = category if texts else number
            values, weights, pending = _apart(key, agg_type, values, weights, read, in_worker)
    state = fold_read(key, folding, values, weights)
    replaced = [state.replaced]
    if texts and pending:  # folded later, but refused here
        waiting = [one.value for one in pending if isinstance(one.value, str)]
        replaced.append(fold_read(key, folding, waiting, ()).replaced)
    for text in () if in_worker else replaced:
        if text is not None:
            folding.tell(key, text)
    return Column(key, agg_type, state, pending=pending)


_TEXT = {str}


def _keep_metrics(
    key: Key, agg_type: TypeLike, values: Sequence[Any], weights: Sequence[Any], in_worker: bool
) -> Column:
    """Keep the metrics of a handler without lanes; what a value may be is its business."""

    def read(key: Key, _: str, value: Any) -> Any:
        return host_scalar(key, value)

    values, weights, pending = _apart(key, agg_type, values, weights, read, in_worker)
    metrics = [
        Metric(*key, value, agg_type, weight) for value, weight in zip(values, weights, strict=True)
    ]
    return Column(key, agg_type, None, metrics, pending)


def _apart(
    key: Key,
    agg_type: TypeLike,
    values: Sequence[Any],
    weights: Sequence[Any],
    read: Callable[[Key, str, Any], Any],
    in_worker: bool,
) -> tuple[list[Any], list[Any], list[Pending]]:
    """Return values and weights that are known, and what has to wait for a device.

    Args:
        key: the metric's.
        agg_type: its type.
        values: of any kind.
        weights: numbers, or on a device.
        read: makes of a value on the host what its handler takes.
        in_worker: as in `fold_metrics`.
    """
    here: list[Any] = []
    weighing: list[Any] = []
    pending: list[Pending] = []
    for value, weight in zip(values, weights, strict=True):
        on_device = held(key, value, in_worker=in_worker)
        weight_on_device = held(key, weight, in_worker=in_worker)
        one = read(key, "value", value) if on_device is None else on_device
        # Once one value is pending the later ones queue behind it: a window is in order of arrival,
        # and a handler without lanes may mind the order, too.
        if on_device is None and weight_on_device is None and not pending:
            here.append(one)
            weighing.append(weight)
            continue
        own = weight if weight_on_device is None else weight_on_device
        pending.append(Pending(key, agg_type, one, own))
    return here, weighing, pending
