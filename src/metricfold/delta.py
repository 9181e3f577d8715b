"""What one rank has accumulated since its last reduction."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any, NoReturn

import numpy as np

from metricfold import arrays
from metricfold.data.batch import (
    Column,
    Late,
    Numbers,
    bad_weight,
    counted_elements,
    fold_numbers,
    listed,
)
from metricfold.device_lanes import Drained
from metricfold.handlers import (
    AggregationHandler,
    CategoricalCountAggHandler,
    CategoryState,
    LaneHandler,
    State,
    WindowState,
)
from metricfold.naming import show
from metricfold.schema import Key

__all__ = ["CutDelta", "Delta", "InTransit"]

# A plain running sum drifts by one rounding per addition. Folding the sums away after this many
# keeps the drift of a million updates below 1e-12 of the sum of magnitudes.
_ADDITIONS = 1024


class Delta:
    """States per key, and values that still lie on a device.

    A reduction takes the whole delta away (`cut`) and, if it fails, puts it back (`restore`). What
    has come in since the last `mark` can be dropped (`rollback`): it lies apart, and is merged with
    what was there before when the next mark is made.
    """

    def __init__(self) -> None:
        self.states: dict[Key, State] = {}
        self._marked: _Marked | None = None
        self.late: list[Late] = []
        self.drained: list[Drained] = []
        self._late_keys: set[Key] = set()
        self._settled: dict[Key, State] = {}
        self._additions = 0

    def add(
        self,
        columns: Iterable[Column],
        handlers: Mapping[Key, AggregationHandler],
        kept: Mapping[Key, frozenset[str]],
    ) -> None:
        """Take in folded columns; cannot fail.

        Args:
            columns: by key.
            handlers: of each key.
            kept: the categories that are told apart, where there have been more.
        """
        states, late_keys = self.states, self._late_keys
        for column in columns:
            key, state = column.key, column.state
            assert state is not None
            if late_keys and key in late_keys and isinstance(state, WindowState):
                # A window is in order of arrival: these queue behind what is still on the device.
                # NaN and infinities have no place in it and are merely counted.
                self.late.append(_as_late(column, state))
                count, nans, infinities, *_ = state.sums
                state = WindowState((count - state.size, nans, infinities, 0.0, 0.0))
            known = states.get(key)
            if known is None:
                known = states[key] = _empty(handlers[key])
            known.merge(state)
            if column.late:
                self.late.extend(column.late)
                late_keys.add(key)
        self._additions += 1
        if self._additions >= _ADDITIONS:
            settled = self._settled if self._marked is None else self._marked.since
            _merge_into(settled, states)
            states = settled
            self.states, self._additions = {}, 0
        if kept:
            _trim(states, kept)

    def mark(self, kept: Mapping[Key, frozenset[str]]) -> None:
        """Let `rollback` come back to here; takes the time of what has come in since the last mark.

        Args:
            kept: as in `add`.
        """
        marked = _Marked() if self._marked is None else self._marked
        _merge_into(marked.states, marked.since)
        _merge_into(marked.states, self.states)
        _trim(marked.states, kept)
        marked.additions += self._additions
        if marked.additions >= _ADDITIONS:
            _merge_into(self._settled, marked.states)
            _trim(self._settled, kept)
            marked.states, marked.additions = {}, 0
        self._marked, marked.since, self.states, self._additions = marked, {}, {}, 0
        marked.late, marked.drained = len(self.late), len(self.drained)

    def rollback(self) -> None:
        """Drop what has come in since the mark; there is one."""
        assert self._marked is not None
        self.states, self._marked.since, self._additions = {}, {}, 0
        del self.late[self._marked.late :], self.drained[self._marked.drained :]
        self._late_keys = {entry.key for entry in self.late}

    def drop(self, key: Key) -> int:
        """Forget `key`; returns how many values it had."""
        layers = [self.states, self._settled]
        if self._marked is not None:
            layers += [self._marked.states, self._marked.since]
            marked = self.late[: self._marked.late]
            self._marked.late -= sum(entry.key == key for entry in marked)
        states = [layer.pop(key, None) for layer in layers]
        late = sum(entry.count for entry in self.late if entry.key == key)
        self.late = [entry for entry in self.late if entry.key != key]
        for drained in self.drained:
            drained.drop(key)
        return late + sum(int(state.sums[0]) for state in states if state is not None)

    def cut(self) -> CutDelta:
        """Return what has accumulated, and begin anew."""
        taken = CutDelta(self._together(), self.late, self.drained)
        self.states, self._settled, self._additions = {}, {}, 0
        self.late, self._late_keys, self.drained = [], set(), []
        self._marked = None
        return taken

    def restore(self, taken: CutDelta) -> None:
        """Put back what a failed reduction took; it comes before what has come since."""
        _merge_into(taken.states, self._settled)
        if self._marked is not None:
            _merge_into(taken.states, self._marked.states)
        self._settled = taken.states
        self.drained = taken.drained + self.drained
        if self._marked is not None:
            self._marked.states = {}
            self._marked.drained += len(taken.drained)

    def _together(self) -> dict[Key, State]:
        marked = [] if self._marked is None else [self._marked.states, self._marked.since]
        layers = [layer for layer in (self._settled, *marked, self.states) if layer]
        if not layers:
            return {}
        for layer in layers[1:]:
            _merge_into(layers[0], layer)
        return layers[0]


@dataclass(slots=True)
class _Marked:
    """What there was when the mark was made.

    Args:
        states: of the values since they were last settled.
        additions: how often something was added to these.
        late: how many values lay on a device.
        drained: how many accumulators were on their way.
        since: what has come since, but for the newest.
    """

    states: dict[Key, State] = field(default_factory=dict)
    additions: int = 0
    late: int = 0
    drained: int = 0
    since: dict[Key, State] = field(default_factory=dict)


class InTransit:
    """Values and weights on their way from devices to the host."""

    def __init__(self, late: Sequence[Late]) -> None:
        self._late = late
        # Enqueued here, on the thread that computed the values; waited for where they are needed.
        try:
            self._numbers = arrays.read(
                [
                    array
                    for one in late
                    for array in (one.value, one.weight)
                    if arrays.backend_of(array) is not None
                ]
            )
        except Exception as error:  # noqa: BLE001 - the framework's; raised where they are needed
            self._numbers = partial(_raise, error)

    def arrive(self, errors: list[str]) -> Iterator[tuple[Late, Any, Any]]:
        """Wait, and yield each that counts, with its value and weight, or arrays of these.

        Args:
            errors: takes what cannot be used.
        """
        numbers = iter(self._numbers())
        for one in self._late:
            value, weight = (
                array if arrays.backend_of(array) is None else next(numbers)
                for array in (one.value, one.weight)
            )
            failed = [item for item in (value, weight) if isinstance(item, Exception)]
            bad = None if failed else bad_weight(weight)
            if failed:
                errors.append(f"{show(one.key)}: {failed[0]}")
            elif bad is not None:
                errors.append(
                    f"{show(one.key)}: the weight {bad!r} is not a finite number of 0 or more"
                )
            elif isinstance(value, np.ndarray):
                values, weights = counted_elements(value, weight)
                if values.size:
                    yield one, values, weights
            elif weight:
                yield one, value, weight


def _raise(error: Exception) -> NoReturn:
    raise error


class CutDelta:
    """A delta that no longer grows."""

    def __init__(
        self,
        states: dict[Key, State],
        late: list[Late],
        drained: list[Drained],
    ) -> None:
        self.states = states
        self.drained = drained
        self.errors: list[str] = []
        self._late = InTransit(late)

    def settle(self, handlers: Mapping[Key, AggregationHandler]) -> None:
        """Wait for values on devices and fold them.

        What cannot be read or folded is dropped and reported in `errors`: this rank still takes
        part in the reduction, so that the others do not wait for it.
        """
        by_key: dict[Key, list[tuple[Any, Any]]] = {}
        for late, value, weight in self._late.arrive(self.errors):
            by_key.setdefault(late.key, []).append((value, weight))
        self._late = InTransit(())
        for key, arrived in by_key.items():
            for values, weights in _in_runs(arrived):
                try:
                    self._fold(key, handlers[key], values, weights)
                except ValueError as error:  # which names the metric
                    self.errors.append(str(error))
                except Exception as error:  # noqa: BLE001 - the user's; raised on all ranks
                    self.errors.append(f"{show(key)}: the handler failed: {error!r}")
        while self.drained:
            try:
                states = self.drained.pop(0).arrive()
            except Exception as error:  # noqa: BLE001 - such as an error of the device
                self.errors.append(f"an accumulator could not be read from its device: {error!r}")
                continue
            for key, state in states:
                self._merge(key, handlers[key], state)

    def _fold(
        self, key: Key, handler: AggregationHandler, values: Numbers, weights: Numbers
    ) -> None:
        if isinstance(handler, CategoricalCountAggHandler):
            state: State = handler.fold_categories(map(str, listed(values)))
        else:
            assert isinstance(handler, LaneHandler)
            state = fold_numbers(key, handler, values, weights)
        self._merge(key, handler, state)

    def _merge(self, key: Key, handler: AggregationHandler, state: State) -> None:
        self.states.setdefault(key, _empty(handler)).merge(state)


def _empty(handler: AggregationHandler) -> State:
    assert isinstance(handler, LaneHandler)
    return handler.empty()


def _as_late(column: Column, state: WindowState) -> Late:
    values, weights, *_ = state.window()
    return Late(column.key, column.agg_type, values, 1.0 if weights is None else weights)


def _in_runs(arrived: Iterable[tuple[Any, Any]]) -> Iterator[tuple[Numbers, Numbers]]:
    """Yield values and weights in order: single ones that follow each other as lists."""
    for single, run in groupby(arrived, key=lambda pair: not isinstance(pair[0], np.ndarray)):
        if single:
            values, weights = zip(*run, strict=True)
            yield values, weights
        else:
            yield from run


def _trim(states: Mapping[Key, State], kept: Mapping[Key, frozenset[str]]) -> None:
    """Let go of categories that are not told apart, where they have become many."""
    for key, categories in kept.items():
        state = states.get(key)
        if isinstance(state, CategoryState) and len(state.counts) > 2 * len(categories):
            state.keep(categories)


def _merge_into(target: dict[Key, State], newer: Mapping[Key, State]) -> None:
    for key, state in newer.items():
        known = target.get(key)
        if known is None:
            target[key] = state.copy()
        else:
            known.merge(state)
