"""`MetricBatch`: the metrics of many samples as one column per key, already folded.

It is what `MetricsCollator` makes in a data worker, and what crosses to the training process: as few
objects as can be, which pickle fast and are added up fast.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Sequence
from itertools import chain, islice
from typing import Any

import numpy as np

from metricfold._core.fold.builtin import built_in_handlers, check_on_bad_name
from metricfold._core.fold.columns import Column, HandlerOf, fold_metrics
from metricfold._core.fold.names import Key
from metricfold._core.fold.state import State, quiet
from metricfold._core.runtime.listing import internal, shortened
from metricfold.metric import AggregationType, Metric, TypeLike, resolve_type, type_label


@internal("columns", "folded", "keys", "others", "replaced", "size", "states")
class MetricBatch:
    """The metrics of one batch, one column per (dataset, name), folded where the batch was made.

    A plain object on purpose: batch movers walk into tuples, mappings and dataclasses, and leave
    anything else alone. It has what they may call: `to` and `pin_memory` return it unchanged.
    Hand it to `MetricsAggregator.update`; its metrics count then, and only then.

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
        folded = [(one, one.state) for one in columns if one.state is not None]
        names = [(*one.key, type_label(one.agg_type)) for one, _ in folded]
        self.keys = _KEY.join(map(_FIELD.join, names))
        plain = [state.plain() for _, state in folded]
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
                metrics, lambda _, agg_type: handlers.get(agg_type), in_worker=True
            )
        replaced = [(one.key, one.state.replaced) for one in columns if one.state is not None]
        return cls(
            columns, [(key, text) for key, text in replaced if text is not None], len(metrics)
        )

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


_unpack_batch.__module__ = "metricfold.data.batch"  # where pickles find it, wherever it lies


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
