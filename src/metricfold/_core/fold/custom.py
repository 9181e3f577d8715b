"""Metrics whose handler keeps a state of its own, without lanes or a merge.

Such a state can be finalised but not added up, so each rank keeps two of them per key, one for the
run and one for the open interval, and a reduction carries everyone's results. States that come out
of a checkpoint, or back from a failed reduction, stand beside the rank's own and are finalised
with them: each counts once.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from metricfold._core.fold.contract import travelling
from metricfold._core.fold.handlers import AggregationHandler, reported
from metricfold._core.fold.names import Key, show
from metricfold._core.fold.plain import NotPlainError, pack, unpack
from metricfold._core.fold.values import number_of
from metricfold.metric import (
    Metric,
    MetricState,
    TypeLike,
    check_key,
    check_name,
    escaped,
    quote,
    resolve_type,
    type_label,
)

SavedState = dict[str, Any]
"""A state as plain JSON types, with its key and type."""


_VIEWS = ("run", "interval")

_REPLAY = 256
"""After so many values the states are copied anew, so that a failure replays no more than that."""


@dataclass(slots=True)
class _States:
    """The states of one key: for each view the rank's own, and those it inherited.

    The key's type is kept beside them, for what a handler writes into a state is its business.

    A handler may raise when it has changed its state halfway. Copying the state before every value
    would cost as much as the state is large; so there is an older copy, and the values since.
    """

    agg_type: TypeLike
    own: dict[str, MetricState] = field(default_factory=dict)
    inherited: dict[str, list[MetricState]] = field(default_factory=lambda: {v: [] for v in _VIEWS})
    older: dict[str, MetricState] = field(default_factory=dict)
    since: list[Metric] = field(default_factory=list)

    def of(self, view: str) -> list[MetricState]:
        return [*self.inherited[view], *(state for of, state in self.own.items() if of == view)]

    def take(self, handler: AggregationHandler, key: Key, metric: Metric) -> None:
        """Hand one value to the handler, for both views."""
        for view in _VIEWS:
            if view not in self.own:
                self.own[view] = _begun(handler, key, self.agg_type)
        for view in _VIEWS:
            handler.update(self.own[view], metric)
        self.since.append(metric)

    def settle(self) -> None:
        """Make the present states those that a failure goes back to."""
        self.older, self.since = copy.deepcopy(self.own), []

    def go_back(self, handler: AggregationHandler, key: Key, values: int) -> None:
        """Undo everything but the first `values` values since the states were settled."""
        kept, self.own = self.since[:values], copy.deepcopy(self.older)
        self.since = []
        for metric in kept:
            self.take(handler, key, metric)

    def rename(self, key: Key) -> None:
        self.since = [metric._replace(dataset_name=key[0], name=key[1]) for metric in self.since]
        for state in (*self.of("run"), *self.of("interval"), *self.older.values()):
            state.dataset_name, state.metric_name = key

    def closed(self) -> _States:
        """Return these states with nothing in the interval."""
        own = {view: state for view, state in self.own.items() if view == "run"}
        closed = _States(self.agg_type, own, {**self.inherited, "interval": []})
        closed.settle()
        return closed


class Begun(Protocol):
    """Takes over the states of an interval that a reduction closes."""

    closed: Mapping[Key, list[MetricState]]


class CustomStates:
    """The states of one rank."""

    def __init__(self) -> None:
        self._states: dict[Key, _States] = {}

    def __bool__(self) -> bool:
        return bool(self._states)

    def keys(self) -> Iterable[Key]:
        return self._states.keys()

    def update(
        self,
        work: Iterable[tuple[Key, AggregationHandler, Sequence[Metric]]],
        commit: Callable[[], object] = lambda: None,
    ) -> None:
        """Hand each metric to its handler; if one raises, every state is as it was before.

        The call counts once `commit` is done, which takes in what has come in the same call.
        """
        work = [one for one in work if one[2]]
        handlers = {key: handler for key, handler, _ in work}
        before = {key: len(self._states[key].since) for key in handlers if key in self._states}
        try:
            for key, handler, metrics in work:
                states = self._states.setdefault(key, _States(metrics[0].agg_type))
                for metric in metrics:
                    states.take(handler, key, metric)
            commit()
        except BaseException:
            self.go_back(before, handlers)
            raise

    # -- Undo

    def settle(self, keys: Iterable[Key]) -> None:
        """Let go of what `go_back` would need to come to an earlier place, where that is much."""
        for key in keys:
            if len(self._states[key].since) >= _REPLAY:
                self._states[key].settle()

    def values(self) -> dict[Key, int]:
        """Return the place of the newest value of each key, for `go_back`, until the next `settle`."""
        return {key: len(one.since) for key, one in self._states.items()}

    def go_back(
        self, values: Mapping[Key, int], handlers: Mapping[Key, AggregationHandler]
    ) -> None:
        """Drop what has come in since `values`, of the keys that have a handler here."""
        for key in [key for key in self._states if key in handlers]:
            if key not in values:
                del self._states[key]
            elif len(self._states[key].since) > values[key]:
                self._states[key].go_back(handlers[key], key, values[key])

    def close_interval(self, begun: Begun) -> None:
        """Begin a new interval, and hand over the old one's states, which can be inherited."""
        closed = {key: states.of("interval") for key, states in self._states.items()}
        states = {key: states.closed() for key, states in self._states.items()}
        # No signal comes in between these.
        begun.closed, self._states = closed, states

    def inherit(self, view: str, states: Mapping[Key, Sequence[MetricState]]) -> None:
        """Take over states of a checkpoint, or of a failed reduction, which are older than those here.

        Those that have been taken over already are not again.
        """
        for key, older in states.items():
            if older:
                own = self._states.setdefault(key, _States(older[0].agg_type))
                inherited = own.inherited[view]
                known = {*map(id, inherited)}
                inherited[:0] = [state for state in older if id(state) not in known]

    def rename(self, key: Key, name: Key | None) -> None:
        """Let the states of `key` go by another name; None: drop them."""
        states = self._states.pop(key, None)
        if states is None or name is None:
            return
        states.rename(name)
        if self._states.setdefault(name, states) is not states:
            for view in _VIEWS:
                self.inherit(view, {name: states.of(view)})

    def results(
        self,
        handlers: Mapping[Key, AggregationHandler],
        of_type: Mapping[str, AggregationHandler],
    ) -> bytes:
        """Return this rank's results and states as bytes; `of_type` says what handles a label."""
        sent: dict[str, Any] = {"results": {}, "saved": {}, "unsent": "", "unsaved": ""}
        for view in _VIEWS:
            results, saved = sent["results"][view], sent["saved"][view] = [], []
            for key, states in self._states.items():
                handler = handlers[key]
                for state in states.of(view):
                    finalised = _finalised(key, handler, copy.deepcopy(state))
                    try:
                        results += [_sent(key, handler, one, of_type) for one in finalised]
                    except TypeError as error:
                        sent["unsent"] = str(error)
                    try:
                        saved.append(_save(key, states.agg_type, handler, state))
                    except (TypeError, ValueError) as error:
                        sent["unsaved"] = str(error)
        return json.dumps(sent, separators=(",", ":")).encode()


@dataclass(frozen=True, slots=True)
class Result:
    """What the ranks' results of one name come to."""

    key: Key
    label: str
    origin: Key
    """The key whose handler gave it."""
    parts: list[tuple[Any, Any]]
    """Each rank's value and metadata, packed."""

    def finalised(self, handler: AggregationHandler | None, seconds: float) -> dict[str, float]:
        """Return what to report, by suffix, of a view of so many seconds of wall time.

        Raises:
            ValueError, TypeError: the type has no handler, or what the handler gives is no number;
                and whatever the handler raises.
        """
        if handler is None:
            raise ValueError(
                f"{show(self.key)} was finalised to type {self.label!r}, for which no handler is "
                "registered: call register_handler() on every rank"
            )
        agg_type = resolve_type(self.label)
        states = [
            _state(handler, self.key, agg_type, value, metadata) for value, metadata in self.parts
        ]
        result = states[0] if len(states) == 1 else handler.finalize_dist_agg(states)
        if not isinstance(result, MetricState):
            raise TypeError(
                f"{type(handler).__name__}.finalize_dist_agg returned {quote(result)} for "
                f"{show(self.key)}: return a MetricState"
            )
        try:
            return reported(handler, result, seconds)
        except TypeError:
            if _is_number(result.value):
                raise  # of a hook of the handler
            raise TypeError(
                f"the handler of type {self.label!r} finalised {show(self.key)} to "
                f"{quote(result.value)}, which is not a number"
            ) from None


class CustomResults:
    """Everyone's results, combined when asked for.

    Raises:
        TypeError: a rank has a result that cannot travel; on all ranks.
        RuntimeError: what a rank sent are no results; on all ranks.
    """

    def __init__(self, blobs: Iterable[bytes] = ()) -> None:
        self._results: dict[str, list[Any]] = {view: [] for view in _VIEWS}
        self.saved: dict[str, list[SavedState]] = {view: [] for view in _VIEWS}
        self.unsaved = ""
        for rank, blob in enumerate(blobs):
            if not blob:
                continue
            sent = _received(blob, rank)
            if sent["unsent"]:
                raise TypeError(sent["unsent"])
            for view in _VIEWS:
                self._results[view] += sent["results"][view]
                self.saved[view] += sent["saved"][view]
            self.unsaved = self.unsaved or sent["unsaved"]

    def has(self, view: str) -> bool:
        """Return whether any rank had a result."""
        return bool(self._results[view])

    def of(self, view: str) -> list[Result]:
        """Return the results of a view; first those that print their metric's own name."""
        groups: dict[str, Result] = {}
        for dataset, name, label, origin, value, metadata in self._results[view]:
            one = Result((dataset, name), label, tuple(origin), [])
            # A name may be anything here: it is checked where it would be printed.
            group = groups.setdefault(repr((one.key, label, one.origin)), one)
            group.parts.append((value, metadata))
        return sorted(groups.values(), key=lambda result: result.key != result.origin)


def _received(blob: bytes, rank: int) -> dict[str, Any]:
    """Return what `CustomStates.results` gave; raises RuntimeError if it is anything else."""
    try:
        sent = json.loads(blob)
        for view in _VIEWS:
            for _, _, label, origin, _, _ in sent["results"][view]:
                # A name may be anything here: it is checked where it would be printed.
                check_key(*origin)
                check_name("a type", label)
            check_saved_states(sent["saved"][view])
        # On one line: it is about to be raised.
        troubles = ("unsent", "unsaved")
        said = {name: escaped(sent[name]) if sent[name] else "" for name in troubles}
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise RuntimeError(
            f"rank {rank} sent what are no results of handlers without lanes "
            f"({type(error).__name__}). Nothing was reduced; install the same version of metricfold "
            "everywhere, and look after that rank's machine"
        ) from None
    return {**sent, **said}


def check_saved_states(states: object) -> None:
    """Refuse what are no states as `SavedState` has them, by ValueError, TypeError or KeyError."""
    if not isinstance(states, list):
        raise TypeError(f"states of custom handlers are {type(states).__name__}, not a list")
    for state in states:
        if not isinstance(state, dict) or state.keys() != _FIELDS:
            raise ValueError("a state of a custom handler lacks a field, or has another")
        check_key(state["dataset"], state["name"])
        check_name("a type", state["type"])


_FIELDS = {"dataset", "name", "type", "value", "metadata"}


def _is_number(value: Any) -> bool:
    try:
        number_of(value)
    except TypeError:
        return False
    return True


def _begun(handler: AggregationHandler, key: Key, agg_type: TypeLike) -> MetricState:
    # A copy: the states of the run and of the interval may share nothing.
    state = copy.deepcopy(handler.initialize_metric_state(*key, agg_type))
    if not isinstance(state, MetricState):
        raise TypeError(
            f"{type(handler).__name__}.initialize_metric_state returned {quote(state)} for {show(key)}: "
            "return a MetricState"
        )
    return state


def _finalised(key: Key, handler: AggregationHandler, state: MetricState) -> list[MetricState]:
    """Return a rank's results; raises if the handler does, or returns anything else."""
    try:
        results = handler.finalize_local_agg(state)
    except Exception as error:
        raise RuntimeError(
            f"{type(handler).__name__}.finalize_local_agg failed for {show(key)}: {error!r}"
        ) from error
    listed = list(results) if isinstance(results, Iterable) else [None]
    if not all(isinstance(result, MetricState) for result in listed):
        raise TypeError(
            f"{type(handler).__name__}.finalize_local_agg returned {quote(results)} for {show(key)}: "
            "return a list of MetricState"
        )
    return listed


def _sent(
    key: Key,
    handler: AggregationHandler,
    result: MetricState,
    of_type: Mapping[str, AggregationHandler],
) -> list[Any]:
    """Return a result of `key` as it travels; raises TypeError if it cannot."""
    try:
        label = type_label(resolve_type(result.agg_type))
        answering = of_type.get(label)
        value, metadata = travelling(answering, result)
        names = {"dataset_name": result.dataset_name, "metric_name": result.metric_name}
        packed = _packed(**names, value=value, metadata=metadata)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{type(handler).__name__} finalised {show(key)} to what cannot travel between ranks: {error}. "
            "Return plain data, or override serialize_metadata and deserialize_metadata"
        ) from None
    dataset, name, value, metadata = packed.values()
    return [dataset, name, label, key, value, metadata]


def _packed(**fields: Any) -> dict[str, Any]:
    """Return fields of a state as plain data; raises TypeError if one is none."""
    packed = {}
    for name, content in fields.items():
        try:
            packed[name] = pack(content)
        except NotPlainError as error:
            error.field = name + error.field
            raise
        except RecursionError:
            raise TypeError(f"{name} holds itself, or is nested too deeply") from None
    return packed


def restored(saved: SavedState, handler: AggregationHandler, agg_type: TypeLike) -> MetricState:
    """Return the state that was saved."""
    key = saved["dataset"], saved["name"]
    return _state(handler, key, agg_type, saved["value"], saved["metadata"])


def _state(
    handler: AggregationHandler, key: Key, agg_type: TypeLike, value: Any, metadata: Any
) -> MetricState:
    unpacked = unpack(value), handler.deserialize_metadata(unpack(metadata))
    return MetricState(*key, unpacked[0], agg_type, unpacked[1])


def _save(
    key: Key, agg_type: TypeLike, handler: AggregationHandler, state: MetricState
) -> SavedState:
    try:
        metadata = handler.serialize_metadata(copy.deepcopy(state.metadata))
        packed = _packed(value=state.value, metadata=metadata)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"the state of {show(key)} cannot be saved as JSON ({error}): override "
            f"serialize_metadata and deserialize_metadata in {type(handler).__name__}"
        ) from None
    return {"dataset": key[0], "name": key[1], "type": type_label(agg_type), **packed}
