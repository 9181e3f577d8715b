"""`MetricBatch`: the metrics of many samples as one column per key, already folded.

Both ways in go through `fold_metrics`: `MetricsAggregator.update(list)` calls it in the training
process, `MetricsCollator` in the data-loading worker, where what a batch of 64 samples has to say
about one metric shrinks to a few numbers before it crosses to the training process.
"""

from __future__ import annotations

import math
import reprlib
import sys
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from itertools import chain, compress, islice
from operator import itemgetter
from typing import Any, NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt

from metricfold._core.device import arrays
from metricfold._core.fold import hints
from metricfold._core.fold.builtin import built_in_handlers, check_on_bad_name
from metricfold._core.fold.handlers import AggregationHandler, LaneHandler
from metricfold._core.fold.names import Key, show
from metricfold._core.fold.sample import FloatArray
from metricfold._core.fold.state import State, quiet
from metricfold._core.fold.values import category_of
from metricfold._core.runtime.imported import is_of
from metricfold._core.runtime.listing import internal, shortened
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

__all__ = [
    "Column",
    "Late",
    "MetricBatch",
    "bad_weight",
    "check_same_type",
    "counted_elements",
    "fold_each",
    "fold_metrics",
    "fold_numbers",
    "fold_read",
    "fold_together",
    "fold_value",
    "folded_keys",
    "is_many",
    "listed",
    "say_replaced",
    "weights_beside",
]

Numbers: TypeAlias = "Sequence[Any] | npt.NDArray[Any]"
HandlerOf: TypeAlias = "Callable[[Key, TypeLike], AggregationHandler | None]"
_METRIC = {Metric}
_NUMBERS = {int, float, bool}
_LARGEST_INT = 2**53
"""Up to here a float64 holds every integer."""
_key_of = itemgetter(0, 1)


class Late:
    """A value (or weight) that still lies on a device, to be read at the reduction.

    Args:
        key: (dataset name, metric name).
        agg_type: the aggregation.
        value: a number or a category; or an array that is not 0-d, whose elements each count.
        weight: a number; or an array of one for each element.
    """

    __slots__ = ("agg_type", "key", "value", "weight")

    def __init__(self, key: Key, agg_type: TypeLike, value: Any, weight: Any) -> None:
        self.key = key
        self.agg_type = agg_type
        self.value = value
        self.weight = weight

    def ready(self) -> bool:
        """Return whether it can be read without a wait."""
        return arrays.ready(self.value) and arrays.ready(self.weight)

    @property
    def count(self) -> int:
        """How many values it stands for."""
        return math.prod(getattr(self.value, "shape", ()))


class Column:
    """What a batch holds of one key: a folded state, or metrics as they came in.

    Args:
        key: (dataset name, metric name).
        agg_type: the aggregation of all its values.
        state: the folded values; None for a handler without lanes.
        metrics: for a handler without lanes, its metrics in order; from a data worker also those
            that the training process has to refuse.
        late: values still on a device, in order.
    """

    __slots__ = ("agg_type", "key", "late", "metrics", "state")

    def __init__(
        self,
        key: Key,
        agg_type: TypeLike,
        state: State | None,
        metrics: Sequence[Metric] = (),
        late: Sequence[Late] = (),
    ) -> None:
        self.key = key
        self.agg_type = agg_type
        self.state = state
        self.metrics = metrics
        self.late = late

    @property
    def weightless(self) -> bool:
        """Whether nothing of it counts: all that it says is which type its key was given."""
        return self.state is None and not self.metrics and not self.late


@internal("columns", "folded", "keys", "others", "replaced", "size", "states")
class MetricBatch:
    """The metrics of one batch, one column per (dataset, name), folded where the batch was made.

    A plain object on purpose: batch movers walk into tuples, mappings and dataclasses, and leave
    anything else alone. It has what they may call: `to` and `pin_memory` return it unchanged.
    Hand it to `MetricsAggregator.update`; its metrics count then, and only then.

    What has been folded travels as few objects as can be, which pickle fast and are added up fast.

    Attributes:
        keys: of what has been folded, with its types (see `folded_keys`).
        folded: the SUM and the MAX lanes of all of these, one after the other, as bytes of float64;
            then what else the states of some of them hold.
        others: columns that the training process has to look at: those without a state.
        replaced: categories that count under another text: the training process says so, once.
        size: of how many metrics it was made.
    """

    __slots__ = ("folded", "keys", "others", "replaced", "size")

    def __init__(
        self,
        columns: Iterable[Column] = (),
        replaced: Iterable[tuple[Key, str]] = (),
        size: int = 0,
    ) -> None:
        columns = list(columns)
        folded = [one for one in columns if one.state is not None]
        self.keys = _KEY.join([_FIELD.join((*one.key, type_label(one.agg_type))) for one in folded])
        plain = [one.state.plain() for one in folded if one.state is not None]
        self.folded: tuple[Any, ...] = (
            (_bytes_of(sums for sums, _, _ in plain), _bytes_of(maxs for _, maxs, _ in plain)),
            *(part for _, _, part in plain if part is not None),
        )
        self.others = tuple(one for one in columns if one.state is None)
        self.replaced = tuple(replaced)
        self.size = size

    @property
    def columns(self) -> list[Column]:
        """One per key."""
        found = []
        lanes, *rest = self.folded
        sums, maxs = (iter(np.frombuffer(one).tolist()) for one in lanes)
        parts = iter(rest)
        for dataset, name, agg_type in folded_keys(self.keys):
            state = _empty(agg_type)
            state.sums = tuple(islice(sums, len(state.sums)))
            state.maxs = tuple(islice(maxs, len(state.maxs)))
            if state.ordered:
                state.take_plain([next(parts)])
            found.append(Column((dataset, name), agg_type, state))
        return [*found, *self.others]

    @classmethod
    def from_metrics(
        cls, metrics: Iterable[Metric], *, on_bad_name: str = "replace"
    ) -> MetricBatch:
        """Fold `metrics` with the built-in handlers; other types keep their metrics as they are.

        Args:
            metrics: of any samples.
            on_bad_name: what becomes of a category that is empty or cannot be printed:
                ``"replace"`` counts it as ``__empty__``, or with what cannot be printed spelled
                out; ``"refuse"`` raises.

        Raises:
            ValueError, TypeError: a metric is not valid; names the metric and says what to do.
        """
        metrics = list(metrics)
        handlers = _BUILT_IN[check_on_bad_name(on_bad_name)]
        with quiet():
            columns = fold_metrics(
                metrics, lambda key, agg_type: handlers.get(agg_type), in_worker=True
            )
        return cls(columns, _replaced(columns), len(metrics))

    def to(self, *args: object, **kwargs: object) -> MetricBatch:
        return self

    def pin_memory(self, device: object = None) -> MetricBatch:
        return self

    def __len__(self) -> int:
        """Return how many keys there are."""
        return len(folded_keys(self.keys)) + len(self.others)

    def __repr__(self) -> str:
        return f"MetricBatch({shortened('/'.join(column.key) for column in self.columns)})"

    def __reduce__(self) -> tuple[Any, ...]:
        others = tuple(map(_pack_column, self.others))
        return _unpack_batch, (self.keys, self.folded, self.size, others, self.replaced)


def folded_keys(keys: str) -> list[tuple[str, str, AggregationType]]:
    """Return dataset, name and type of each of the keys of a `MetricBatch`."""
    if not keys:
        return []
    found = [text.split(_FIELD) for text in keys.split(_KEY)]
    return [(dataset, name, _TYPES[label]) for dataset, name, label in found]


# No name holds these, since all are printable.
_KEY, _FIELD = "\x1e", "\x1f"


def _bytes_of(lanes: Iterable[Sequence[float]]) -> bytes:
    return array("d", chain.from_iterable(lanes)).tobytes()


# -- Folding -------------------------------------------------------------------------------------


def fold_metrics(
    metrics: Sequence[Metric],
    handler_of: HandlerOf,
    *,
    in_worker: bool,
) -> list[Column]:
    """Return one column per key of `metrics`, in order of first appearance.

    Args:
        metrics: any number of metrics.
        handler_of: what folds a key of that type; None: nothing does, it keeps its metrics.
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
    key: Key,
    agg_type: TypeLike,
    value: Any,
    weight: Any,
    handler_of: HandlerOf,
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
            own = _count_or_not(key, weight)
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
        handler_of: as in `fold_metrics`.
    """
    if isinstance(values, str | int | float | Enum) or _shape(key, values) == ():
        return fold_value(key, agg_type, values, weights, handler_of)
    handler = handler_of(key, agg_type)
    weighing = _weights_of_each(key, agg_type, values, weights, handler)
    elements = _elements(key, values)
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
    column.late = [Late(key, agg_type, elements, weighing)]
    return column


def is_many(value: Any, weight: Any) -> bool:
    """Return whether a weight for each element of an array is given.

    One element has one weight, be it in arrays or not; but some may be masked, as in larger arrays.
    """
    if type(weight) in _NUMBERS or type(value) in _NUMBERS or not _is_array(weight):
        return False
    return math.prod(weight.shape) != 1 or _masks_one(value, weight) or _masks_one(weight, value)


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


def _fold_group(
    key: Key,
    agg_type: TypeLike,
    values: Sequence[Any],
    weights: Sequence[Any],
    handler: AggregationHandler | None,
    in_worker: bool,
) -> Column:
    if not _NUMBERS.issuperset(map(type, values)):
        values = [*map(arrays.unwrapped, values)]
        values, weights = _counted_here(key, values, weights)
        if not values:
            return Column(key, agg_type, None)
    # By type, not by value: comparing a device array with a number would wait for the device.
    plain = _NUMBERS.issuperset(map(type, weights))
    if not plain or weights.count(1.0) < len(weights):
        weighted = handler is None or handler.weighted
        if not plain:
            weights = [_weight(key, weight, weighted, in_worker) for weight in weights]
        values, weights, strange = _counted(key, values, weights, weighted)
        if not values:
            return Column(key, agg_type, None)
        if strange is not None:
            if in_worker:
                return _keep_metrics(key, agg_type, values, weights, in_worker)
            _refuse_weight(key, agg_type, strange)
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
            _hold(key, value, in_worker=False)  # refused on all processes, if on one
    return [*compress(values, here)], [*compress(weights, here)]


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
    if folding.takes is str:
        return _fold_categories(key, agg_type, listed(values), listed(weights), folding, in_worker)
    late: list[Late] = []
    if not isinstance(values, np.ndarray):
        plain = _NUMBERS.issuperset(map(type, values)) and _NUMBERS.issuperset(map(type, weights))
        if not plain:
            values, weights, late = _numbers(key, agg_type, values, listed(weights), in_worker)
    return Column(key, agg_type, fold_numbers(key, folding, values, weights), late=late)


def _weight(key: Key, weight: Any, weighted: bool, in_worker: bool) -> Any:
    """Return a weight as a number; one that lies on a device is left there, but for a worker."""
    if type(weight) in _NUMBERS:
        return weight
    weight = arrays.unwrapped(weight)
    on_device = arrays.backend_of(weight) is not None
    if on_device and not in_worker:
        return weight
    # What lies on a device cannot be refused where it is given, so that only "0 or not" matters.
    if on_device and not weighted:
        return _count_or_not(key, weight)
    return _number(key, "weight", weight)


def _count_or_not(key: Key, weight: Any) -> float:
    """Return 1.0 for any weight but 0."""
    number = _number(key, "weight", weight)
    return 1.0 if 0 < number < np.inf else number


def _counted(
    key: Key, values: Sequence[Any], weights: Sequence[Any], weighted: bool
) -> tuple[Sequence[Any], Sequence[Any], float | None]:
    """Return the values whose weight is not 0, with their weights, after a check of these.

    The third is a weight other than 0 and 1, if there is one and it means nothing here. Weights on
    a device are not looked at.
    """
    host = [weight for weight in weights if type(weight) in _NUMBERS]
    checked = _checked_weights(key, host)
    strange = None
    if checked is not None:
        if not checked.all():
            counts = [type(weight) not in _NUMBERS or weight != 0 for weight in weights]
            values, weights = list(compress(values, counts)), list(compress(weights, counts))
        if not weighted:
            strange = next((weight for weight in host if weight not in (0, 1)), None)
    return values, weights, strange


def _refuse_weight(key: Key, agg_type: TypeLike, weight: float) -> NoReturn:
    built_in = isinstance(agg_type, AggregationType)
    weighing = "use 'mean' or 'distribution'" if built_in else "let its handler say weighted = True"
    raise ValueError(
        f"{show(key)}: a value of type {type_label(agg_type)!r} counts once (weight 1) or not at all "
        f"(weight 0), so the weight {weight!r} would be ignored: leave it out, or {weighing}"
    )


def fold_numbers(key: Key, handler: LaneHandler, values: Numbers, weights: Numbers) -> State:
    """Fold host numbers, whose weights have been checked and are not 0."""
    array = _floats(key, "a value", values)
    weighing = None
    if isinstance(weights, np.ndarray):
        weighing = None if (weights == 1).all() else weights
    elif weights.count(1.0) < len(weights):
        weighing = _floats(key, "a weight", weights)
    try:
        return handler.fold(array, weighing)
    except ValueError as error:
        raise ValueError(f"{show(key)}: {error}") from error


def fold_read(key: Key, handler: LaneHandler, values: Numbers, weights: Numbers) -> State:
    """Fold what has been read from a device, whose weights have been checked and are not 0."""
    if handler.takes is str:
        return handler.fold_listed([*map(str, listed(values))], None)
    return fold_numbers(key, handler, values, weights)


def _checked_weights(key: Key, weights: Sequence[float]) -> FloatArray | None:
    """Return host weights as an array, or None if all are 1.

    Raises:
        ValueError: one is negative, infinite or NaN.
    """
    if weights.count(1.0) == len(weights):
        return None
    array = _floats(key, "a weight", weights)
    if not (array.min() >= 0 and array.max() < np.inf):
        _refuse_bad(key, next(weight for weight in weights if not 0 <= weight < np.inf))
    return array


def _refuse_bad(key: Key, weight: float) -> NoReturn:
    raise ValueError(f"{show(key)}: the weight {weight!r} is not a finite number of 0 or more")


def _floats(key: Key, what: str, numbers: Numbers) -> FloatArray:
    if isinstance(numbers, np.ndarray):
        return _exact_floats(key, what, numbers)
    try:
        return np.array(numbers, dtype=np.float64)
    except OverflowError:
        raise _too_large(key, what) from None


def _too_large(key: Key, what: str) -> ValueError:
    return ValueError(f"{show(key)}: {what} is too large for a 64-bit float: scale it down")


def _fold_categories(
    key: Key,
    agg_type: TypeLike,
    values: Sequence[Any],
    weights: Sequence[Any],
    handler: LaneHandler,
    in_worker: bool,
) -> Column:
    late: list[Late] = []
    categories: list[str] = []
    for value, weight in zip(values, weights, strict=True):
        if type(value) is str and type(weight) in _NUMBERS:
            categories.append(value)
            continue
        held, held_weight = _hold(key, value, in_worker), _hold(key, weight, in_worker)
        category = _category(key, value) if held is None else held
        if held is None and held_weight is None:
            categories.append(category)
            continue
        late.append(Late(key, agg_type, category, 1.0 if held_weight is None else held_weight))
    # Those that wait for their weights are folded later, but refused here.
    waiting = [one.value for one in late if isinstance(one.value, str)]
    try:
        state = handler.fold_listed(categories, None)
        replaced = [state.replaced, handler.fold_listed(waiting, None).replaced]
    except ValueError as error:
        raise ValueError(f"{show(key)}: {error}") from None
    if not in_worker:
        for text in replaced:
            if text is not None:
                handler.tell(key, text)
    return Column(key, agg_type, state, late=late)


def _category(key: Key, value: Any) -> str:
    scalar = _host_scalar(key, value)
    if isinstance(scalar, np.ndarray) and scalar.size != 1:
        raise ValueError(f"{show(key)}: {arrays.not_one_value('NumPy array', scalar.shape)}")
    try:
        return category_of(scalar)
    except TypeError as error:
        raise TypeError(f"{show(key)}: {error}") from None


def _keep_metrics(
    key: Key, agg_type: TypeLike, values: Sequence[Any], weights: Sequence[Any], in_worker: bool
) -> Column:
    """Keep the metrics of a handler without lanes; what a value may be is its business."""
    metrics: list[Metric] = []
    late: list[Late] = []
    for value, weight in zip(values, weights, strict=True):
        held, held_weight = _hold(key, value, in_worker), _hold(key, weight, in_worker)
        # Once one value is late the later ones queue behind it: such a handler may mind the order.
        if held is not None or held_weight is not None or late:
            late.append(
                Late(
                    key,
                    agg_type,
                    value if held is None else held,
                    weight if held_weight is None else held_weight,
                )
            )
        else:
            metrics.append(Metric(*key, _host_scalar(key, value), agg_type, weight))
    return Column(key, agg_type, None, metrics, late)


def _numbers(
    key: Key, agg_type: TypeLike, values: Sequence[Any], weights: Sequence[Any], in_worker: bool
) -> tuple[list[float], list[float], list[Late]]:
    """Split values into host numbers, and what has to wait for a device."""
    host: list[float] = []
    host_weights: list[float] = []
    late: list[Late] = []
    for value, weight in zip(values, weights, strict=True):
        held, held_weight = _hold(key, value, in_worker), _hold(key, weight, in_worker)
        number = _number(key, "value", value) if held is None else held
        # Once one value is late the later ones queue behind it: a window is in order of arrival.
        if held is None and held_weight is None and not late:
            host.append(number)
            host_weights.append(weight)
            continue
        late.append(Late(key, agg_type, number, weight if held_weight is None else held_weight))
    return host, host_weights, late


def _hold(key: Key, value: Any, in_worker: bool) -> Any:
    if in_worker or type(value) in _NUMBERS:
        return None
    try:
        return arrays.hold(value)
    except Exception as error:  # noqa: BLE001 - a framework's own may be of any kind
        _refuse(key, error)


def _number(key: Key, what: str, value: Any) -> float:
    """Return `value` as a float if it is a real number or holds exactly one."""
    scalar = _host_scalar(key, value)
    if isinstance(scalar, np.ndarray) and scalar.size != 1 and what == "value":
        raise ValueError(f"{show(key)}: {arrays.not_one_value('NumPy array', scalar.shape)}")
    if not isinstance(scalar, int | float | np.floating):
        for_it = hints.for_value if what == "value" else hints.for_weight
        raise TypeError(
            f"{show(key)}: the {what} {quote(value)} is no number: give an int, a float, or an "
            f"array of one element{for_it(value)}"
        )
    try:
        return float(scalar)
    except OverflowError:
        raise _too_large(key, f"the {what}") from None


def _host_scalar(key: Key, value: Any) -> Any:
    """Return the one element of an array, and anything else as it is."""
    if isinstance(value, np.ndarray | np.generic):
        if value.size != 1 or value.dtype.kind in "mM":  # the latter's items may be mere ints
            return value
        if _is_masked(value) and np.ma.getmaskarray(value).any():
            raise ValueError(f"{show(key)}: what is masked has no value: leave the metric out")
        return value.item()
    backend = arrays.backend_of(value)
    if backend is None:
        return value
    try:
        held = backend.hold(value)
    except Exception as error:  # noqa: BLE001 - a framework's own may be of any kind
        _refuse(key, error)
    (number,) = arrays.read([held])()
    if isinstance(number, Exception):
        _refuse(key, number)
    return number


def _refuse(key: Key, error: Exception) -> NoReturn:
    """Raise `error` again, with the metric's name."""
    if isinstance(error, TypeError | ValueError):
        raise type(error)(f"{show(key)}: {error}") from None
    raise ValueError(f"{show(key)}: the array cannot be taken as a value: {error}") from error


def check_same_type(key: Key, registered: TypeLike, given: TypeLike) -> None:
    """Refuse a second aggregation type for one key."""
    if registered != given:
        raise ValueError(
            f"{show(key)} is already registered with aggregation type "
            f"{type_label(registered)}, so it cannot take a value of type {type_label(given)}: "
            "give one of them another name"
        )


# -- Arrays of which each element counts ---------------------------------------------------------


def _shape(key: Key, array: Any) -> tuple[int, ...]:
    if not _is_array(array):
        raise TypeError(
            f"{show(key)}: {quote(array)} is no array whose elements could each count: give "
            "np.asarray(...) of it"
        )
    try:
        return tuple(array.shape)
    except Exception as error:  # noqa: BLE001 - such as of a nested tensor, which has none
        _refuse(key, error)


def _weights_of_each(
    key: Key, agg_type: TypeLike, values: Any, weights: Any, handler: AggregationHandler | None
) -> Any:
    """Return the weights of an array's elements, or the one of all; on a device they are held."""
    shape = _shape(key, weights) if _is_array(weights) else ()
    many = math.prod(shape) != 1 or _masks_one(weights, values)
    if many and shape != tuple(values.shape):
        raise ValueError(
            f"{show(key)}: weights of shape {shape} do not go with values of shape "
            f"{tuple(values.shape)}: give one weight for each value, or one for all"
        )
    if arrays.backend_of(weights) is not None:
        return _hold_each(key, weights) if many else _hold(key, weights, in_worker=False)
    weighing: Any
    if many:
        given = _elements(key, weights)
        weighing = _exact_floats(key, "a weight", np.asarray(given))
        if _is_masked(given):
            weighing[np.ma.getmaskarray(given)] = 0.0
        weighing = weights_beside(values, weighing)
    else:
        weighing = _number(key, "weight", weights)
    bad = bad_weight(weighing)
    if bad is not None:
        _refuse_bad(key, bad)
    if handler is not None and not handler.weighted:
        strange = np.extract((weighing != 0) & (weighing != 1), weighing)
        if strange.size:
            _refuse_weight(key, agg_type, strange[0].item())
    return weighing


def _elements(key: Key, values: Any) -> Any:
    """Return the elements of an array, as a copy of shape (n,), perhaps masked; or held."""
    if arrays.backend_of(values) is not None:
        return _hold_each(key, values)
    elements = np.array(
        np.ma.getdata(values) if _is_masked(values) else values, subok=False
    ).ravel()
    if not _is_masked(values):
        return elements
    return np.ma.MaskedArray(elements, mask=np.ma.getmaskarray(values).ravel())


def counted_elements(values: Any, weights: Any) -> tuple[Any, Any]:
    """Return the elements that are neither masked nor of weight 0, and the weight of each.

    Args:
        values: shape (n,), perhaps masked; on the host.
        weights: of the same shape, or a number.
    """
    weighing = np.broadcast_to(np.asarray(weights, dtype=np.float64), values.shape)
    counts = weighing != 0
    if _is_masked(values):
        counts &= ~np.ma.getmaskarray(values)
    if counts.all():
        return np.asarray(values), weighing
    return np.asarray(values)[counts], weighing[counts]


def weights_beside(values: Any, weights: Any) -> Any:
    """Return host weights with 0 for values that are masked: whatever stands there means nothing."""
    if not _is_masked(values) or np.shape(weights) == ():
        return weights
    return np.where(np.ma.getmaskarray(values).reshape(np.shape(weights)), 0.0, weights)


def listed(numbers: Numbers) -> Sequence[Any]:
    """Return Python's own numbers or texts for those of an array."""
    return numbers.tolist() if isinstance(numbers, np.ndarray) else numbers


def bad_weight(weights: Any) -> float | None:
    """Return a weight that is negative, infinite or NaN, if there is one."""
    if isinstance(weights, int | float):
        return None if 0 <= weights < np.inf else weights
    given = np.asarray(weights)
    bad = given[~((given >= 0) & (given < np.inf))]
    return bad[0].item() if bad.size else None


def _exact_floats(key: Key, what: str, numbers: npt.NDArray[Any]) -> FloatArray:
    """Return the elements of an array as float64, if none of them changes by that."""
    kind = numbers.dtype.kind
    # The float and int types of ml_dtypes are of the kind of raw bytes, which are numpy.void.
    if kind not in "biuf" and (kind != "V" or issubclass(numbers.dtype.type, np.void)):
        raise TypeError(
            f"{show(key)}: an array of type {numbers.dtype} holds no real numbers: give one of floats, "
            "ints or bools"
        )
    floats = numbers.astype(np.float64)
    if kind in "iu":
        large = np.abs(floats) >= _LARGEST_INT
        if large.any() and floats[large].astype(object).tolist() != numbers[large].tolist():
            raise ValueError(
                f"{show(key)}: {what} is an integer of more than 2^53, which a 64-bit float does not "
                "hold exactly: give .astype(float) of the array if it may be rounded"
            )
    return floats


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray | np.generic) or arrays.backend_of(value) is not None


def _is_masked(value: Any) -> bool:
    return is_of(value, "numpy.ma", "MaskedArray")  # which NumPy loads when it is first used


def _masks_one(one: Any, other: Any) -> bool:
    """Return whether `one` is a masked array of one element, which that of `other` goes with."""
    return (
        _is_masked(one) and one is not np.ma.masked and one.shape == getattr(other, "shape", None)
    )


def _hold_each(key: Key, value: Any) -> Any:
    try:
        return arrays.hold_each(value)
    except Exception as error:  # noqa: BLE001 - a framework's own may be of any kind
        _refuse(key, error)


# -- Pickling ------------------------------------------------------------------------------------


def _pack_column(column: Column) -> tuple[Any, ...]:
    agg_type = column.agg_type
    label = type_label(agg_type) if isinstance(agg_type, AggregationType) else agg_type
    return column.key, label, [(metric.value, metric.weight) for metric in column.metrics]


def _unpack_batch(
    keys: str,
    folded: tuple[Any, ...],
    size: int,
    others: Iterable[tuple[Any, ...]],
    replaced: Iterable[tuple[Key, str]],
) -> MetricBatch:
    batch = MetricBatch([_unpack_column(*other) for other in others], replaced, size)
    batch.keys, batch.folded = keys, folded
    return batch


def _unpack_column(key: Key, label: TypeLike, content: Iterable[tuple[Any, Any]]) -> Column:
    agg_type = resolve_type(label)
    return Column(key, agg_type, None, [Metric(*key, value, agg_type, w) for value, w in content])


# All values of a batch are kept.
_BUILT_IN = {
    choice: built_in_handlers(sys.maxsize, on_bad_name=choice) for choice in ("replace", "refuse")
}
_TYPES = {str(agg_type.value): agg_type for agg_type in AggregationType}


def _empty(agg_type: AggregationType) -> State:
    return _BUILT_IN["replace"][agg_type].laned().empty()


def say_replaced(batch: MetricBatch, handler_of: HandlerOf) -> None:
    """Warn of the categories that a data worker has replaced, once for each key."""
    for key, text in batch.replaced:
        handler = handler_of(key, AggregationType.CATEGORICAL_COUNT)
        if handler is not None and handler.has_lanes:
            handler.laned().tell(key, text)


def _replaced(columns: Iterable[Column]) -> list[tuple[Key, str]]:
    return [
        (column.key, column.state.replaced)
        for column in columns
        if column.state is not None and column.state.replaced is not None
    ]
