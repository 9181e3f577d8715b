"""What has come in and been folded: layers that never change, the oldest at the bottom.

    calls as they came          the log of the inbox, on top
    the layer above
    ----------------------      a mark: rollback drops what lies above it
    the layer below             a cut takes all, joined; if its reduction fails, it goes back beneath
                                what has come since

So there is one way to undo: to leave a layer out, or to lay one back. A layer holds what some calls
brought: a state of each key, and what still lies on devices, in order of arrival. That settles when it
is read, which gives another layer. Joining two is associative, and changes neither.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby, takewhile
from typing import Any, NoReturn, TypeAlias

import numpy as np

from metricfold._core.device import arrays
from metricfold._core.device.rows import Drained
from metricfold._core.fold.columns import Pending, fold_cells, fold_read
from metricfold._core.fold.names import Key, show
from metricfold._core.fold.state import State
from metricfold._core.fold.values import Numbers, bad_weight, counted_elements, weights_beside
from metricfold._core.intake.keys import KeyRecord
from metricfold._core.runtime.listing import shortened

__all__ = ["NOTHING", "Arriving", "Layer", "Mark", "Stage", "arriving", "trim"]

Records: TypeAlias = Mapping[Key, KeyRecord]

_MOST_NAMED = 20


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """What some calls have brought.

    Args:
        states: what is folded, by key.
        pending: values on a device, in order of arrival.
        custom: such values of handlers without lanes, and those on the host that came behind them.
        drained: accumulators on their way from a device.
        errors: what could not be read when it was read ahead of a reduction, for all ranks to hear.
    """

    states: Mapping[Key, State] = field(default_factory=dict)
    pending: Sequence[Pending] = ()
    custom: Sequence[Pending] = ()
    drained: Sequence[Drained] = ()
    errors: Sequence[str] = ()

    def followed_by(self, newer: Layer, records: Records) -> Layer:
        """Return both as one, with no more categories than are told apart, where these are many."""
        if self is NOTHING or newer is NOTHING:
            return newer if self is NOTHING else self
        states = {**self.states, **newer.states}
        for key in self.states.keys() & newer.states.keys():
            states[key] = both = self.states[key].copy()
            both.merge(newer.states[key])
            trim(both, records[key])
        return Layer(
            states,
            [*self.pending, *newer.pending],
            [*self.custom, *newer.custom],
            [*self.drained, *newer.drained],
            [*dict.fromkeys([*self.errors, *newer.errors])],
        )

    @property
    def elements(self) -> int:
        """How many numbers lie on devices."""
        return sum(one.count for one in self.pending)

    @property
    def queued(self) -> set[Key]:
        """The keys of handlers with lanes that have values on devices."""
        return {one.key for one in self.pending}

    def settled(self, records: Records, pending: Arriving) -> Layer:
        """Return the same with all read and folded that lay on devices; waits for it.

        What cannot be read or folded is dropped and stands in `errors`: this rank still takes part
        in the reduction, so that the others do not wait for it.

        Args:
            records: of the keys.
            pending: on its way from the devices.
        """
        errors = [*self.errors]
        by_key: dict[Key, list[tuple[Any, Any]]] = {}
        found: dict[Key, list[State]] = {}

        def keep(key: Key, folded: Callable[[], State]) -> None:
            try:
                state = folded()
                found.setdefault(key, []).append(state)
            except ValueError as error:  # which names the metric
                errors.append(str(error))
            except Exception as error:  # noqa: BLE001 - the user's; raised on all ranks
                errors.append(f"{show(key)}: the handler failed: {error!r}")

        for one, value, weight in pending(errors):
            if one.block is None:
                by_key.setdefault(one.key, []).append((value, weight))
                continue
            handler = records[one.key].handler.laned()
            keep(one.key, partial(fold_cells, one.key, handler, one.block, value, weight))
        for key, arrived in by_key.items():
            for values, weights in _in_runs(arrived):
                keep(key, partial(fold_read, key, records[key].handler.laned(), values, weights))
        for drained in self.drained:
            try:
                for key, state in drained.arrive():
                    fitted = records[key].handler.laned().fitted(state)
                    found.setdefault(key, []).append(fitted)
            except Exception as error:  # noqa: BLE001 - such as an error of the device
                errors.append(f"an accumulator could not be read from its device: {error!r}")
        states = {**self.states}
        for key, arrived_states in found.items():
            known = states.get(key)
            states[key] = records[key].handler.laned().empty() if known is None else known.copy()
            states[key].merge_all(arrived_states)
        return Layer(states, custom=self.custom, errors=errors)

    def relieved(self, records: Records) -> Layer:
        """Return the same with the older half of what lies on devices read and folded.

        It has been computed long since, or is left for later: nothing may wait here, for what a device
        works on may call back and wait for this.
        """
        half, accumulators = (len(self.pending) + 1) // 2, (len(self.drained) + 1) // 2
        half = sum(1 for _ in takewhile(Pending.ready, self.pending[:half]))
        older = replace(self, pending=self.pending[:half], drained=self.drained[:accumulators])
        return replace(
            older.settled(records, arriving(older.pending)),
            pending=self.pending[half:],
            drained=self.drained[accumulators:],
        )

    def renamed(self, key: Key, name: Key | None, records: Records) -> Layer:
        """Return the same with what there is of `key` under another name; None: without it."""
        for drained in self.drained:
            drained.rename(key, name)

        def moved(pending: Sequence[Pending]) -> list[Pending]:
            rest = [one for one in pending if one.key != key]
            if name is not None:
                rest += [one.renamed(name) for one in pending if one.key == key]
            return rest

        states = {known: state for known, state in self.states.items() if known != key}
        rest = replace(self, states=states, pending=moved(self.pending), custom=moved(self.custom))
        if name is None or key not in self.states:
            return rest
        return rest.followed_by(Layer({name: self.states[key]}), records)


NOTHING = Layer()


def trim(state: State, known: KeyRecord) -> None:
    """Let go of categories that are not told apart, where they have become many."""
    if known.admitted is not None:
        state.trim(known.admitted)


@dataclass(frozen=True, slots=True)
class Mark:
    """A place to come back to.

    Args:
        calls: so many of those in the log came before it.
        values: so many values had each handler without lanes.
    """

    calls: int
    values: Mapping[Key, int]


@dataclass(frozen=True, slots=True, eq=False)
class Stage:
    """What is folded, and the mark. It is replaced as one: an interrupt leaves nothing half done.

    Args:
        below: what a rollback leaves.
        above: what it drops; nothing, where there is no mark.
        mark: the newest, if it is still good.
    """

    below: Layer = NOTHING
    above: Layer = NOTHING
    mark: Mark | None = None

    def renamed(self, key: Key, name: Key | None, records: Records) -> Stage:
        """Return the stage with what there is of `key` under another name; None: without it."""
        below, above = (one.renamed(key, name, records) for one in (self.below, self.above))
        mark = self.mark
        if mark is not None and key in mark.values:
            values = {known: n for known, n in mark.values.items() if known != key}
            if name is not None:
                values[name] = mark.values[key]
            mark = replace(mark, values=values)
        return Stage(below, above, mark)


# -- From devices to the host ----------------------------------------------------------------------

Arriving: TypeAlias = Callable[[list[str]], Iterator[tuple[Pending, Any, Any]]]
"""Waits, and yields each value that counts, with its number and weight, or arrays of these; given a
list that takes what cannot be used."""


def arriving(pending: Sequence[Pending]) -> Arriving:
    """Let values and weights set out from their devices, on the thread that computed them."""
    try:
        numbers = arrays.read(
            [
                array
                for one in pending
                for array in (one.value, one.weight)
                if arrays.backend_of(array) is not None
            ]
        )
    except Exception as error:  # noqa: BLE001 - the framework's; raised where they are needed
        numbers = partial(_raise, error)
    return partial(_arrived, pending, numbers)


def _arrived(
    pending: Sequence[Pending], read: Callable[[], Iterable[Any]], errors: list[str]
) -> Iterator[tuple[Pending, Any, Any]]:
    numbers = iter(read())
    failed: dict[str, Counter[Key]] = {}
    for one in pending:
        value, weight = (
            array if arrays.backend_of(array) is None else next(numbers)
            for array in (one.value, one.weight)
        )
        why = [str(item) for item in (value, weight) if isinstance(item, Exception)]
        if not why:
            weight = weights_beside(value, weight)
            bad = bad_weight(weight)
            if bad is not None:
                why = [f"the weight {bad!r} is not a finite number of 0 or more"]
        if why:
            failed.setdefault(why[0], Counter())[one.key] += 1
        elif one.block is not None:
            yield one, np.ravel(value), np.ravel(weight) if np.ndim(weight) else weight
        elif isinstance(value, np.ndarray):
            values, weights = counted_elements(value, weight)
            if values.size:
                yield one, values, weights
        elif weight:
            yield one, value, weight
    for reason, keys in failed.items():
        named = (
            f"{show(key)} ({number:,} times)" if number > 1 else show(key)
            for key, number in keys.items()
        )
        errors.append(f"{shortened(named, _MOST_NAMED)}: {reason}")


def _raise(error: Exception) -> NoReturn:
    raise error


def _in_runs(arrived: Iterable[tuple[Any, Any]]) -> Iterator[tuple[Numbers, Numbers]]:
    """Yield values and weights in order: single ones that follow each other as lists."""
    for single, run in groupby(arrived, key=lambda pair: not isinstance(pair[0], np.ndarray)):
        if single:
            values, weights = zip(*run, strict=True)
            yield values, weights
        else:
            yield from run
