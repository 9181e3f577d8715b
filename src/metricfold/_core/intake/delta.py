"""What one rank has accumulated since its last reduction."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from functools import partial
from itertools import groupby, takewhile
from typing import Any, NoReturn

import numpy as np

from metricfold._core.device import arrays
from metricfold._core.device.rows import Drained
from metricfold._core.fold.batch import (
    Late,
    Numbers,
    bad_weight,
    counted_elements,
    fold_read,
    weights_beside,
)
from metricfold._core.fold.handlers import AggregationHandler
from metricfold._core.fold.names import show
from metricfold._core.fold.state import State
from metricfold._core.reduce.schema import Key
from metricfold._core.runtime.listing import shortened

__all__ = ["CutDelta", "Delta", "InTransit"]


class Delta:
    """States per key, and what still lies on a device.

    Attributes:
        states: by key.
        late: values on a device, in order of arrival.
        elements: how many numbers these are.
        drained: accumulators on their way from a device.
        queued: keys with values on a device.
        errors: what could not be read when it was read ahead of a reduction, for all ranks to hear.
    """

    def __init__(self) -> None:
        self.states: dict[Key, State] = {}
        self.late: list[Late] = []
        self.elements = 0
        self.errors: list[str] = []
        self.drained: list[Drained] = []
        self.queued: set[Key] = set()

    def add(self, key: Key, state: State, late: Sequence[Late]) -> None:
        """Add what has come in of a key that is not here yet."""
        self.states[key] = state
        if late:
            self.late += late
            self.elements += sum(one.count for one in late)
            self.queued.add(key)

    def holds_any(self) -> bool:
        return bool(self.states or self.drained)

    def followed_by(self, newer: Delta) -> Delta:
        """Return both as one. Neither changes, so that an interrupt leaves nothing half done."""
        both = Delta()
        both.states = {**self.states, **newer.states}
        for key in self.states.keys() & newer.states.keys():
            both.states[key] = self.states[key].copy()
            both.states[key].merge(newer.states[key])
        both.late = self.late + newer.late
        both.elements = self.elements + newer.elements
        both.errors = [*dict.fromkeys(self.errors + newer.errors)]
        both.drained = self.drained + newer.drained
        both.queued = self.queued | newer.queued
        return both

    def relieved(self, handlers: Mapping[Key, AggregationHandler]) -> Delta:
        """Return the same with the older half of what lies on devices read and folded.

        It has been computed long since, or is left for later: nothing may wait here, for what a device
        works on may call back and wait for this. Nothing here changes.
        """
        older, here = Delta(), Delta()
        half, accumulators = (len(self.late) + 1) // 2, (len(self.drained) + 1) // 2
        half = sum(1 for _ in takewhile(Late.ready, self.late[:half]))
        older.late, older.drained = self.late[:half], self.drained[:accumulators]
        taken = CutDelta(older)
        taken.settle(handlers)
        here.states, here.errors = self.states, self.errors + taken.errors
        relieved = here.followed_by(taken.given_back())
        relieved.late, relieved.drained = self.late[half:], self.drained[accumulators:]
        relieved.elements = sum(one.count for one in relieved.late)
        relieved.queued = {one.key for one in relieved.late}
        return relieved

    def trim(self, kept: Mapping[Key, AbstractSet[str]]) -> None:
        """Let go of categories that are not told apart, where they have become many."""
        for key, categories in kept.items():
            state = self.states.get(key)
            if state is not None:
                state.trim(categories)

    def drop(self, key: Key) -> int:
        """Forget `key`; returns how many values it had."""
        state = self.states.pop(key, None)
        late = sum(entry.count for entry in self.late if entry.key == key)
        if late:
            self.late = [entry for entry in self.late if entry.key != key]
            self.elements -= late
        self.queued.discard(key)
        for drained in self.drained:
            drained.drop(key)
        return late + (0 if state is None else int(state.sums[0]))


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
        failed: dict[str, Counter[Key]] = {}
        for one in self._late:
            value, weight = (
                array if arrays.backend_of(array) is None else next(numbers)
                for array in (one.value, one.weight)
            )
            broken = [item for item in (value, weight) if isinstance(item, Exception)]
            if not broken:
                weight = weights_beside(value, weight)
            bad = None if broken else bad_weight(weight)
            if broken:
                failed.setdefault(str(broken[0]), Counter())[one.key] += 1
            elif bad is not None:
                why = f"the weight {bad!r} is not a finite number of 0 or more"
                failed.setdefault(why, Counter())[one.key] += 1
            elif isinstance(value, np.ndarray):
                values, weights = counted_elements(value, weight)
                if values.size:
                    yield one, values, weights
            elif weight:
                yield one, value, weight
        errors += [f"{_counted(keys)}: {why}" for why, keys in failed.items()]


def _counted(keys: Counter[Key]) -> str:
    """Return which metrics these are, and how many values of each."""
    return shortened(
        (
            f"{show(key)} ({number:,} times)" if number > 1 else show(key)
            for key, number in keys.items()
        ),
        _MOST_NAMED,
    )


_MOST_NAMED = 20


def _raise(error: Exception) -> NoReturn:
    raise error


class CutDelta:
    """A delta that no longer grows; what lies on a device is on its way."""

    def __init__(self, delta: Delta) -> None:
        self.states = delta.states
        self.errors: list[str] = []
        self._delta = delta
        self._late = InTransit(delta.late)

    def given_back(self) -> Delta:
        """Return the delta, with all that has arrived."""
        return self._delta

    def settle(self, handlers: Mapping[Key, AggregationHandler]) -> None:
        """Wait for values on devices and fold them.

        What cannot be read or folded is dropped and reported in `errors`: this rank still takes
        part in the reduction, so that the others do not wait for it.
        """
        delta = self._delta
        self.errors += delta.errors
        by_key: dict[Key, list[tuple[Any, Any]]] = {}
        for late, value, weight in self._late.arrive(self.errors):
            by_key.setdefault(late.key, []).append((value, weight))
        states = []
        for key, arrived in by_key.items():
            for values, weights in _in_runs(arrived):
                try:
                    states.append((key, fold_read(key, handlers[key].laned(), values, weights)))
                except ValueError as error:  # which names the metric
                    self.errors.append(str(error))
                except Exception as error:  # noqa: BLE001 - the user's; raised on all ranks
                    self.errors.append(f"{show(key)}: the handler failed: {error!r}")
        while delta.drained:
            try:
                states += delta.drained[0].arrive()
            except Exception as error:  # noqa: BLE001 - such as an error of the device
                self.errors.append(f"an accumulator could not be read from its device: {error!r}")
            del delta.drained[0]
        delta.late, delta.queued, delta.elements, delta.errors = [], set(), 0, []
        for key, state in states:
            self.states.setdefault(key, handlers[key].laned().empty()).merge(state)


def _in_runs(arrived: Iterable[tuple[Any, Any]]) -> Iterator[tuple[Numbers, Numbers]]:
    """Yield values and weights in order: single ones that follow each other as lists."""
    for single, run in groupby(arrived, key=lambda pair: not isinstance(pair[0], np.ndarray)):
        if single:
            values, weights = zip(*run, strict=True)
            yield values, weights
        else:
            yield from run
