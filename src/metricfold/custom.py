"""Metrics whose handler keeps a state of its own, without lanes or a merge.

Such a state can be finalised but not added up, so each rank keeps two of them per key, one for the
run and one for the open interval, and a reduction carries everyone's results. States that come out
of a checkpoint, or back from a failed reduction, stand beside the rank's own and are finalised
with them: each counts once.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from metricfold.handlers import AggregationHandler
from metricfold.metric import Metric, MetricState, TypeLike, type_label
from metricfold.naming import show
from metricfold.packing import Key

__all__ = ["CustomResults", "CustomStates", "SavedState"]

SavedState = dict[str, Any]
"""A state as plain JSON types, with its key and type."""


@dataclass(slots=True)
class _States:
    """The states of one key: for each view the rank's own, and those it inherited."""

    run: MetricState | None
    interval: MetricState | None
    inherited_run: list[MetricState]
    inherited_interval: list[MetricState]

    def of(self, view: str) -> list[MetricState]:
        own, inherited = (
            (self.run, self.inherited_run)
            if view == "run"
            else (self.interval, self.inherited_interval)
        )
        return [*inherited, *([] if own is None else [own])]


class CustomStates:
    """The states of one rank."""

    def __init__(self) -> None:
        self._states: dict[Key, _States] = {}

    def __bool__(self) -> bool:
        return bool(self._states)

    def keys(self) -> Iterable[Key]:
        return self._states.keys()

    def update(
        self, work: Iterable[tuple[Key, AggregationHandler, TypeLike, Iterable[Metric]]]
    ) -> None:
        """Hand each metric to its handler; if one raises, every state is as it was before."""
        work = list(work)
        before = {key: copy.deepcopy(self._states.get(key)) for key, *_ in work}
        try:
            for key, handler, agg_type, metrics in work:
                states = self._states.setdefault(key, _States(None, None, [], []))
                if states.run is None:
                    states.run = handler.initialize_metric_state(*key, agg_type)
                if states.interval is None:
                    states.interval = handler.initialize_metric_state(*key, agg_type)
                for metric in metrics:
                    handler.update(states.run, metric)
                    handler.update(states.interval, metric)
        except BaseException:
            for key, states_before in before.items():
                if states_before is None:
                    self._states.pop(key, None)
                else:
                    self._states[key] = states_before
            raise

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

    def close_interval(self) -> dict[Key, _States]:
        """Begin a new interval; what is returned can be put back with `reopen_interval`."""
        closed = {}
        for key, states in self._states.items():
            closed[key] = replace(states, inherited_interval=states.of("interval"))
            states.interval, states.inherited_interval = None, []
        return closed

    def reopen_interval(self, closed: Mapping[Key, _States]) -> None:
        for key, states in closed.items():
            known = self._states.get(key)
            if known is not None:
                known.inherited_interval = [
                    *states.inherited_interval,
                    *known.inherited_interval,
                ]

    def drop(self, key: Key) -> None:
        self._states.pop(key, None)

    def inherit(
        self,
        saved: Mapping[str, list[SavedState]],
        handler_of: Callable[[SavedState], tuple[AggregationHandler, TypeLike]],
    ) -> None:
        """Take over states out of a checkpoint."""
        for view, states in saved.items():
            for state in states:
                key = (state["dataset"], state["name"])
                handler, agg_type = handler_of(state)
                own = self._states.setdefault(key, _States(None, None, [], []))
                target = own.inherited_run if view == "run" else own.inherited_interval
                metadata = handler.deserialize_metadata(state["metadata"])
                target.append(MetricState(*key, state["value"], agg_type, metadata))


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

    def combined(
        self, view: str, handler_of: Callable[[str], AggregationHandler]
    ) -> dict[Key, float]:
        """Return the value of each name, all ranks' results combined by the handler of its type."""
        groups: dict[tuple[Key, str], list[MetricState]] = {}
        for result in self._results[view]:
            key = (result.dataset_name, result.metric_name)
            groups.setdefault((key, str(result.agg_type)), []).append(copy.deepcopy(result))
        values: dict[Key, float] = {}
        for (key, label), results in groups.items():
            combined = results[0]
            if len(results) > 1:
                combined = handler_of(label).finalize_dist_agg(results)
            try:
                values[key] = float(combined.value)
            except (TypeError, ValueError):
                raise TypeError(
                    f"the handler of type {label!r} finalised {show(key)} to "
                    f"{combined.value!r}, which is not a number"
                ) from None
        return values


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
            f"serialize_metadata and deserialize_metadata in {type(handler).__name__}"
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
