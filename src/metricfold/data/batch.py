"""`MetricBatch`: the metrics of many samples as one column per key, already folded.

Both ways in go through `fold_metrics`: `MetricsAggregator.update(list)` calls it in the training
process, `MetricsCollator` in the data-loading worker, where what a batch of 64 samples has to say
about one metric shrinks to a few numbers before it crosses to the training process.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from metricfold import arrays
from metricfold.handlers import (
    AggregationHandler,
    CategoricalCountAggHandler,
    CategoryState,
    FloatArray,
    LaneHandler,
    LaneState,
    WindowState,
    built_in_handlers,
    quiet,
)
from metricfold.metric import (
    AggregationType,
    Metric,
    TypeLike,
    check_name,
    resolve_type,
    type_label,
)
from metricfold.naming import show

__all__ = [
    "Column",
    "Late",
    "MetricBatch",
    "check_same_type",
    "fold_metrics",
    "fold_numbers",
    "fold_value",
]

Self = TypeVar("Self", bound="MetricBatch")
Key = tuple[str, str]
_NUMBERS = {int, float, bool}


class Late:
    """A value (or weight) that still lies on a device, to be read at the reduction."""

    __slots__ = ("agg_type", "key", "value", "weight")

    def __init__(self, key: Key, agg_type: TypeLike, value: Any, weight: Any) -> None:
        self.key = key
        self.agg_type = agg_type
        self.value = value
        self.weight = weight


class Column:
    """What a batch holds of one key: a folded state, or metrics as they came in.

    Args:
        key: (dataset name, metric name).
        agg_type: the aggregation of all its values.
        state: the folded values; None for a handler without lanes.
        metrics: for a handler without lanes, its metrics in order.
        late: values still on a device, in order.
    """

    __slots__ = ("agg_type", "key", "late", "metrics", "state")

    def __init__(
        self,
        key: Key,
        agg_type: TypeLike,
        state: LaneState | None,
        metrics: Sequence[Metric] = (),
        late: Sequence[Late] = (),
    ) -> None:
        self.key = key
        self.agg_type = agg_type
        self.state = state
        self.metrics = metrics
        self.late = late


class MetricBatch:
    """The metrics of one batch, one column per (dataset, name), folded where the batch was made.

    A plain object on purpose: batch movers walk into tuples, mappings and dataclasses, and leave
    anything else alone. It has what they may call: `to` and `pin_memory` return it unchanged.
    Hand it to `MetricsAggregator.update`; its metrics count then, and only then.
    """

    __slots__ = ("columns",)

    def __init__(self, columns: Iterable[Column] = ()) -> None:
        self.columns = tuple(columns)

    @classmethod
    def from_metrics(cls, metrics: Iterable[Metric]) -> MetricBatch:
        """Fold `metrics` with the built-in handlers; other types keep their metrics as they are.

        Raises:
            ValueError, TypeError: a metric is not valid; names the metric and says what to do.
        """
        with quiet():
            return cls(fold_metrics(metrics, _BUILT_IN, wait=True))

    def to(self: Self, *args: object, **kwargs: object) -> Self:
        return self

    def pin_memory(self: Self, device: object = None) -> Self:
        return self

    def __len__(self) -> int:
        """Return how many keys there are."""
        return len(self.columns)

    def __repr__(self) -> str:
        keys = ", ".join("/".join(column.key) for column in self.columns)
        return f"MetricBatch({keys})"

    # Between processes: built-in states as plain numbers, which pickle far faster than objects.

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpack_batch, (tuple(_pack_column(column) for column in self.columns),)


# -- Folding -------------------------------------------------------------------------------------


def fold_metrics(
    metrics: Iterable[Metric],
    handlers: Mapping[TypeLike, AggregationHandler],
    *,
    wait: bool,
) -> list[Column]:
    """Return one column per key of `metrics`, in order of first appearance.

    Args:
        metrics: any number of metrics.
        handlers: what folds each type; a type that is absent keeps its metrics.
        wait: read device arrays here (a data worker has no device to wait for) instead of
            holding them for the reduction.
    """
    groups: dict[Key, tuple[TypeLike, list[Any], list[Any]]] = {}
    try:
        for dataset_name, name, value, agg_type, weight in metrics:
            group = groups.get((dataset_name, name))
            if group is None:
                check_name("the dataset name of a metric", dataset_name)
                check_name(f"the name of a metric of dataset {dataset_name!r}", name)
                group = groups[dataset_name, name] = (resolve_type(agg_type), [], [])
            elif group[0] is not agg_type:
                check_same_type((dataset_name, name), group[0], resolve_type(agg_type))
            group[1].append(value)
            group[2].append(weight)
    except (TypeError, ValueError) as error:
        if "to unpack" not in str(error) and "unhashable" not in str(error):
            raise
        raise TypeError(
            "update() takes Metric(dataset_name, name, value, agg_type, weight) objects or a "
            f"MetricBatch, but found something else: {error}"
        ) from None
    return [
        _fold_group(key, agg_type, values, weights, handlers.get(agg_type), wait)
        for key, (agg_type, values, weights) in groups.items()
    ]


def fold_value(
    key: Key,
    agg_type: TypeLike,
    value: Any,
    weight: Any,
    handlers: Mapping[TypeLike, AggregationHandler],
) -> Column:
    """Return the column of a single value; device arrays are held."""
    return _fold_group(key, agg_type, [value], [weight], handlers.get(agg_type), wait=False)


def _fold_group(
    key: Key,
    agg_type: TypeLike,
    values: list[Any],
    weights: list[Any],
    handler: AggregationHandler | None,
    wait: bool,
) -> Column:
    if isinstance(handler, CategoricalCountAggHandler):
        return _fold_categories(key, agg_type, values, handler, wait)
    if not isinstance(handler, LaneHandler):
        return _keep_metrics(key, agg_type, values, weights, wait)
    late: list[Late] = []
    if not _NUMBERS.issuperset(map(type, values)):
        values, weights, late = _numbers(key, agg_type, values, weights, wait)
    elif not _NUMBERS.issuperset(map(type, weights)):
        values, weights, late = _numbers(key, agg_type, values, weights, wait)
    return Column(key, agg_type, fold_numbers(key, handler, values, weights), late=late)


def fold_numbers(
    key: Key, handler: LaneHandler, values: Sequence[float], weights: Sequence[float]
) -> LaneState:
    """Fold host numbers, after a check of the weights."""
    try:
        array = np.array(values, dtype=np.float64)
    except OverflowError:
        raise ValueError(f"{show(key)}: a value is too large for a 64-bit float") from None
    return handler.fold(array, _checked_weights(key, weights))


def _checked_weights(key: Key, weights: Sequence[float]) -> FloatArray | None:
    if list(weights).count(1.0) == len(weights):
        return None
    for weight in weights:
        if not 0 <= weight < np.inf:
            raise ValueError(
                f"{show(key)}: the weight {weight!r} is not a finite number of 0 or more"
            )
    return np.array(weights, dtype=np.float64)


def _fold_categories(
    key: Key,
    agg_type: TypeLike,
    values: list[Any],
    handler: CategoricalCountAggHandler,
    wait: bool,
) -> Column:
    late: list[Late] = []
    categories: list[str] = []
    for value in values:
        if type(value) is str:
            categories.append(value)
            continue
        if value is None:
            raise TypeError(f"{show(key)}: None is no category; give a text or a number")
        held = _hold(key, value, wait)
        if held is not None:
            late.append(Late(key, agg_type, held, 1.0))
        else:
            categories.append(str(_host_scalar(key, value)))
    return Column(key, agg_type, handler.fold_categories(categories), late=late)


def _keep_metrics(
    key: Key, agg_type: TypeLike, values: list[Any], weights: list[Any], wait: bool
) -> Column:
    """Keep the metrics of a handler without lanes; what a value may be is its business."""
    metrics: list[Metric] = []
    late: list[Late] = []
    for value, weight in zip(values, weights, strict=True):
        held = _hold(key, value, wait)
        # Once one value is late the later ones queue behind it: such a handler may mind the order.
        if held is not None or late:
            late.append(Late(key, agg_type, value if held is None else held, weight))
        else:
            metrics.append(Metric(*key, _host_scalar(key, value), agg_type, weight))
    return Column(key, agg_type, None, metrics, late)


def _numbers(
    key: Key, agg_type: TypeLike, values: list[Any], weights: list[Any], wait: bool
) -> tuple[list[float], list[float], list[Late]]:
    """Sort values into host numbers, and what is still on a device."""
    host: list[float] = []
    host_weights: list[float] = []
    late: list[Late] = []
    for value, weight in zip(values, weights, strict=True):
        held, held_weight = _hold(key, value, wait), _hold(key, weight, wait)
        if held is None and held_weight is None:
            host.append(_number(key, "value", value))
            host_weights.append(_number(key, "weight", weight))
            continue
        late.append(
            Late(
                key,
                agg_type,
                _number(key, "value", value) if held is None else held,
                _number(key, "weight", weight) if held_weight is None else held_weight,
            )
        )
        if held_weight is None:
            _checked_weights(key, [late[-1].weight])
    return host, host_weights, late


def _hold(key: Key, value: Any, wait: bool) -> Any:
    if type(value) in _NUMBERS:
        return None
    try:
        return None if wait else arrays.hold(value)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{show(key)}: {error}") from None


def _number(key: Key, what: str, value: Any) -> float:
    """Return `value` as a float if it is a real number or holds exactly one."""
    scalar = _host_scalar(key, value)
    if isinstance(scalar, int | float):
        try:
            return float(scalar)
        except OverflowError:
            raise ValueError(f"{show(key)}: {value!r} is too large for a 64-bit float") from None
    raise TypeError(
        f"{show(key)}: the {what} {value!r} ({type(value).__name__}) is not a number; give an "
        "int, a float, or an array of one element"
    )


def _host_scalar(key: Key, value: Any) -> Any:
    """Return the one element of an array, and anything else as it is."""
    if isinstance(value, np.ndarray | np.generic):
        return value.item() if value.size == 1 else value
    backend = arrays.backend_of(value)
    if backend is None:
        return value
    try:
        return backend.hold(value).item()
    except (TypeError, ValueError) as error:
        raise type(error)(f"{show(key)}: {error}") from None


def check_same_type(key: Key, registered: TypeLike, given: TypeLike) -> None:
    """Refuse a second aggregation type for one key."""
    if registered != given:
        raise ValueError(
            f"{show(key)} is already registered with aggregation type "
            f"{type_label(registered)!r}, so it cannot take a value of type "
            f"{type_label(given)!r}: give one of them another name"
        )


# -- Pickling ------------------------------------------------------------------------------------


def _pack_column(column: Column) -> tuple[Any, ...]:
    agg_type = column.agg_type
    built_in = isinstance(agg_type, AggregationType)
    return (
        column.key,
        type_label(agg_type) if built_in else agg_type,
        _pack_state(column.state),
        tuple(column.metrics),
    )


def _pack_state(state: LaneState | None) -> tuple[Any, ...] | None:
    if state is None:
        return None
    sums = tuple(state.sums.tolist())
    if isinstance(state, CategoryState):
        return "c", sums, state.counts
    if isinstance(state, WindowState):
        values, weights = state.newest()
        return "w", sums, values.tobytes(), None if weights is None else weights.tobytes()
    return "l", sums, tuple(state.maxs.tolist())


def _unpack_batch(columns: Iterable[tuple[Any, ...]]) -> MetricBatch:
    return MetricBatch(
        Column(key, resolve_type(agg_type), _unpack_state(state), metrics)
        for key, agg_type, state, metrics in columns
    )


def _unpack_state(packed: tuple[Any, ...] | None) -> LaneState | None:
    if packed is None:
        return None
    kind, sums = packed[0], np.array(packed[1])
    if kind == "c":
        return CategoryState(sums, packed[2])
    if kind == "w":
        values: FloatArray = np.frombuffer(packed[2])
        weights = None if packed[3] is None else np.frombuffer(packed[3])
        return WindowState(sums, [(values, weights)])
    return LaneState(sums, np.array(packed[2]))


_BUILT_IN = built_in_handlers()
