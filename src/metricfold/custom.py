"""Metrics whose handler keeps a state of its own, without lanes or a merge.

Such a state can be finalised but not added up, so each rank keeps two of them per key, one for the
run and one for the open interval, and a reduction carries everyone's results. States that come out
of a checkpoint, or back from a failed reduction, stand beside the rank's own and are finalised
with them: each counts once.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from metricfold.handlers import AggregationHandler, name_of, number_of, reported
from metricfold.metric import Metric, MetricState, TypeLike, quote, type_label
from metricfold.naming import show
from metricfold.schema import Key

__all__ = ["CustomResults", "CustomStates", "SavedState", "combined", "restored"]

SavedState = dict[str, Any]
"""A state as plain JSON types, with its key and type."""


_REPLAY = 256
"""After so many values the states are copied anew, so that a failure replays no more than that."""


@dataclass(slots=True)
class _States:
    """The states of one key: for each view the rank's own, and those it inherited.

    A handler may raise when it has changed its state halfway. Copying the state before every value
    would cost as much as the state is large; so there is an older copy, and the values since.
    """

    run: MetricState | None = None
    interval: MetricState | None = None
    inherited_run: list[MetricState] = field(default_factory=list)
    inherited_interval: list[MetricState] = field(default_factory=list)
    older: tuple[MetricState | None, MetricState | None] = (None, None)
    since: list[Metric] = field(default_factory=list)

    def of(self, view: str) -> list[MetricState]:
        own, inherited = (
            (self.run, self.inherited_run)
            if view == "run"
            else (self.interval, self.inherited_interval)
        )
        return [*inherited, *([] if own is None else [own])]

    def take(self, handler: AggregationHandler, key: Key, metric: Metric) -> None:
        """Hand one value to the handler, for both views."""
        if self.run is None:
            self.run = handler.initialize_metric_state(*key, metric.agg_type)
        if self.interval is None:
            self.interval = handler.initialize_metric_state(*key, metric.agg_type)
        handler.update(self.run, metric)
        handler.update(self.interval, metric)
        self.since.append(metric)

    def settle(self) -> None:
        """Make the present states those that a failure goes back to."""
        self.older, self.since = copy.deepcopy((self.run, self.interval)), []

    def go_back(self, handler: AggregationHandler, key: Key, values: int) -> None:
        """Undo everything but the first `values` values since the states were settled."""
        kept, (self.run, self.interval) = self.since[:values], copy.deepcopy(self.older)
        self.since = []
        for metric in kept:
            self.take(handler, key, metric)


class CustomStates:
    """The states of one rank."""

    def __init__(self) -> None:
        self._states: dict[Key, _States] = {}
        self._marked: dict[Key, int] | None = None

    def __bool__(self) -> bool:
        return bool(self._states)

    def keys(self) -> Iterable[Key]:
        return self._states.keys()

    def update(self, work: Iterable[tuple[Key, AggregationHandler, Iterable[Metric]]]) -> None:
        """Hand each metric to its handler; if one raises, every state is as it was before."""
        work = list(work)
        new = [key for key, *_ in work if key not in self._states]
        states = {key: self._states.setdefault(key, _States()) for key, *_ in work}
        before = {key: len(one.since) for key, one in states.items()}
        try:
            for key, handler, metrics in work:
                for metric in metrics:
                    states[key].take(handler, key, metric)
        except BaseException:
            for key, handler, _ in work:
                states[key].go_back(handler, key, before[key])
            for key in new:
                self._states.pop(key, None)
            raise
        if self._marked is None:
            self._settle(states)

    @staticmethod
    def _settle(states: Mapping[Key, _States]) -> None:
        for one in states.values():
            if len(one.since) >= _REPLAY:
                one.settle()

    def mark(self) -> None:
        """Let `rollback` come back to here."""
        self._settle(self._states)
        self._marked = {key: len(one.since) for key, one in self._states.items()}

    def rollback(self, handlers: Mapping[Key, AggregationHandler]) -> None:
        """Drop what has come in since the mark; there is one."""
        assert self._marked is not None
        for key in list(self._states):
            if key not in self._marked:
                del self._states[key]
            elif len(self._states[key].since) > self._marked[key]:
                self._states[key].go_back(handlers[key], key, self._marked[key])

    def unmark(self) -> None:
        """Let go of the mark."""
        self._marked = None

    def results(self, handlers: Mapping[Key, AggregationHandler]) -> bytes:
        """Return this rank's results and states as bytes, for all ranks."""
        results: dict[str, list[MetricState]] = {"run": [], "interval": []}
        saved: dict[str, list[SavedState]] = {"run": [], "interval": []}
        unsaved = ""
        for key, states in self._states.items():
            for view, found in results.items():
                for state in states.of(view):
                    found += [
                        replace(result, agg_type=type_label(result.agg_type))
                        for result in handlers[key].finalize_local_agg(copy.deepcopy(state))
                    ]
                    try:
                        saved[view].append(_save(key, handlers[key], state))
                    except (TypeError, ValueError) as error:
                        unsaved = str(error)
        return pickle.dumps((results, saved, unsaved))

    def close_interval(self) -> dict[Key, list[MetricState]]:
        """Begin a new interval; what is returned can be put back with `reopen_interval`."""
        closed = {}
        for key, states in self._states.items():
            closed[key] = states.of("interval")
            states.interval, states.inherited_interval = None, []
            states.settle()
        return closed

    def reopen_interval(self, closed: Mapping[Key, list[MetricState]]) -> None:
        for key, states in closed.items():
            known = self._states.get(key)
            if known is not None:
                known.inherited_interval = [*states, *known.inherited_interval]

    def drop(self, key: Key) -> None:
        self._states.pop(key, None)
        if self._marked is not None:
            self._marked.pop(key, None)

    def inherit(self, view: str, states: Iterable[MetricState]) -> None:
        """Take over states out of a checkpoint."""
        for state in states:
            key = (state.dataset_name, state.metric_name)
            own = self._states.setdefault(key, _States())
            (own.inherited_run if view == "run" else own.inherited_interval).append(state)


class CustomResults:
    """Everyone's results, combined when asked for."""

    def __init__(self, blobs: Iterable[bytes] = ()) -> None:
        self._results: dict[str, list[MetricState]] = {"run": [], "interval": []}
        self.saved: dict[str, list[SavedState]] = {"run": [], "interval": []}
        self.unsaved = ""
        for blob in blobs:
            if not blob:
                continue
            results, saved, unsaved = pickle.loads(blob)  # noqa: S301 - our own ranks sent it
            for view in self._results:
                self._results[view] += results[view]
                self.saved[view] += saved[view]
            self.unsaved = self.unsaved or unsaved

    def has(self, view: str) -> bool:
        """Return whether any rank had a result."""
        return bool(self._results[view])

    def names(self, view: str) -> Iterator[tuple[Key, str, list[MetricState]]]:
        """Yield each name with the label of its type and all ranks' results."""
        groups: dict[tuple[Key, str], list[MetricState]] = {}
        for result in self._results[view]:
            key = (result.dataset_name, result.metric_name)
            groups.setdefault((key, str(result.agg_type)), []).append(result)
        for (key, label), results in groups.items():
            yield key, label, copy.deepcopy(results)


def combined(
    key: Key,
    label: str,
    results: list[MetricState],
    handler: AggregationHandler | None,
    seconds: float,
) -> dict[str, float]:
    """Return what the results of one name come to, by the suffix that the name takes."""
    if handler is None:
        raise ValueError(
            f"{show(key)} was finalised to type {label!r}, for which no handler is registered: "
            "call register_handler() on every rank"
        )
    result = results[0] if len(results) == 1 else handler.finalize_dist_agg(results)
    try:
        return reported(handler, result, seconds)
    except TypeError:
        if _is_number(result.value):
            raise  # of a hook of the handler
        raise TypeError(
            f"the handler of type {label!r} finalised {show(key)} to {quote(result.value)}, which "
            "is not a number"
        ) from None


def _is_number(value: Any) -> bool:
    try:
        number_of(value)
    except TypeError:
        return False
    return True


def restored(saved: SavedState, handler: AggregationHandler, agg_type: TypeLike) -> MetricState:
    """Return the state that was saved."""
    metadata = handler.deserialize_metadata(copy.deepcopy(saved["metadata"]))
    return MetricState(saved["dataset"], saved["name"], saved["value"], agg_type, metadata)


def _save(key: Key, handler: AggregationHandler, state: MetricState) -> SavedState:
    try:
        content = {
            "value": state.value,
            "metadata": handler.serialize_metadata(copy.deepcopy(state.metadata)),
        }
        plain = _plain(content)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"the state of {show(key)} cannot be saved as JSON ({error}): override "
            f"serialize_metadata and deserialize_metadata in {name_of(handler)}"
        ) from None
    return {"dataset": key[0], "name": key[1], "type": type_label(state.agg_type), **plain}


def _plain(value: Any) -> Any:
    """Return `value` in JSON types; raises TypeError where JSON would change what it says."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        wrong = next((key for key in value if not isinstance(key, str)), None)
        if wrong is not None:
            raise TypeError(f"the dict key {wrong!r} is no text")
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{type(value).__name__} is no JSON type")
