"""What comes in: put down in order of arrival, folded when much of it has piled up.

    record, update        log.append((to which lists, which items))      one append, whatever comes
    every few thousand    each slot folds its items into a state         a `Layer`
    mark, rollback        `layers` tells how what has come is undone
    cut, put_back

A *slot* has lists for the items of one key: numbers, numbers with a weight, states that were folded
elsewhere, and values that still lie on a device. One log for all keys lets a call be put down as a
whole, and what came after a mark be dropped without a trace.

The fast way in is for what needs no look but at its type: an int or a float, of a key that is known
under a type spelled so and whose handler is a built-in one. Everything else is checked and folded by
`fold.columns` first and comes as columns.
"""

from __future__ import annotations

import logging
import math
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from functools import partial
from itertools import accumulate, chain, groupby
from operator import sub
from typing import Any, Protocol, TypeAlias, TypeVar

import numpy as np

from metricfold._core.device.rows import Drained
from metricfold._core.fold.batch import MetricBatch, folded_keys
from metricfold._core.fold.builtin import built_in_handlers, folds_as
from metricfold._core.fold.columns import Column, Pending
from metricfold._core.fold.custom import CustomStates
from metricfold._core.fold.handlers import AggregationHandler, LaneHandler, as_array
from metricfold._core.fold.names import Key, show
from metricfold._core.fold.sample import FloatArray
from metricfold._core.fold.state import State, quiet
from metricfold._core.fold.values import listed
from metricfold._core.intake.keys import KeyTable
from metricfold._core.intake.layers import NOTHING, Layer, Mark, Stage, arriving, trim
from metricfold._core.runtime.listing import shortened
from metricfold._core.sketch.weights import LARGEST_WEIGHT
from metricfold.metric import AggregationType, Metric, TypeLike, is_name

__all__ = ["MOST_PENDING", "Inbox"]

_log = logging.getLogger("metricfold")

_MOST = 4096
"""So many values pile up, or as many as there are keys if those are more: what a fold takes for each
key is then little for each value."""
_BATCH, _PER_ROOM = 16, 16
"""A collated batch takes the room of so many values, and of one more for each 16 that it was made of;
an array of cells that of one for each 16 of these."""
_MOST_SHAPES = 256
"""Collated batches hold the same keys over and over; of so many sets of keys it is known where they go."""

MOST_PENDING, _MOST_ELEMENTS, _MOST_DRAINED = 2**15, 2**24, 64
"""So many values, their elements, or accumulators may lie on devices; what is more is read ahead of the log."""
_HANDED_OVER = 256
"""So many values that were read go to handlers without lanes at a time."""
_PER_ROOM_ON_DEVICE = _MOST_ELEMENTS // _MOST
"""An array on a device takes the room of one more value for so many of its elements."""

_METRIC = {Metric}
_NUMBERS = {float, int}
_ONE = {1.0}
# A member of somebody's StrEnum may equal "mean", hash and all, and is yet another type.
_SPELLINGS = {str, AggregationType}
_BUILT_IN = {agg_type: type(handler) for agg_type, handler in built_in_handlers().items()}

Found = TypeVar("Found")
Items: TypeAlias = list[Any]
"""Where a fold puts items of the log; emptied, and never replaced."""
Calls: TypeAlias = Sequence[tuple[Sequence[Items], Sequence[Any]]]
"""A log, or a part of it: for each call what goes where."""


class Begun(Protocol):
    """Takes over what a reduction is about."""

    layer: Layer | None


class Inbox:
    """What one rank has taken in since its last reduction.

    Args:
        keys: knows each key.

    Attributes:
        custom: the states of handlers without lanes, which get what comes at once.
        cuts: how often it has been cut off or emptied.
    """

    def __init__(self, keys: KeyTable) -> None:
        self._keys = keys
        self._slots: dict[Key, Slot] = {}
        # By dataset, if there is one, name and type, as calls spell these: slots, and where those of
        # them that take plain numbers have these.
        self._spelled = _Remembered(partial(_spelled_so, self._slots))
        self._numbers = _Remembered(partial(_for_numbers, self._spelled))
        self._shapes: dict[str, Shape] = {}
        self._accumulators: list[Drained] = []
        self._waiting: list[Pending] = []
        self._log: list[tuple[Sequence[Items], Sequence[Any]]] = []
        self._room = _MOST
        self._warned = False
        self._piece = sys.maxsize
        self._stage = Stage()
        self.custom = CustomStates()
        # Keys of handlers without lanes, of which values may lie on a device. What comes queues behind.
        self._behind: set[Key] = set()
        self.cuts = 0

    # -- The fast way in. These return whether it was one; if not, nothing has changed.

    def record(self, name: object, value: Any, agg: object, dataset: object, weight: Any) -> bool:
        try:
            slot = self._spelled[(name, agg) if dataset is None else (dataset, name, agg)]
            if type(agg) not in _SPELLINGS:
                return False
            if type(value) is float and type(weight) is float and weight == 1.0 and slot.number:
                self._log.append((slot.number, (value,)))
            else:
                target, item = slot.placed(value, weight)
                self._log.append(((target,), (item,)))
        except (KeyError, TypeError, OverflowError):
            return False
        self._room -= 1
        if self._room < 0:
            self._fold()
        return True

    def record_all(self, metrics: object, agg: object, dataset: object, weight: Any) -> bool:
        """Take in one value of each of several metrics, all or none."""
        if type(metrics) is not dict or not metrics:
            return False
        if type(weight) not in _NUMBERS or not 0 < weight <= LARGEST_WEIGHT:
            return False
        try:
            types = [agg[name] for name in metrics] if type(agg) is dict else [agg] * len(metrics)
            if not _SPELLINGS.issuperset(map(type, types)):
                return False
            keys: Iterable[tuple[object, ...]] = zip(metrics, types, strict=True)
            if dataset is not None:
                keys = ((dataset, *key) for key in keys)
            # Where no weight counts, any but 0 is 1.
            placed = [
                slot.placed(value, weight if slot.handler.weighted else 1.0)
                for slot, value in zip(
                    map(self._spelled.__getitem__, keys), metrics.values(), strict=True
                )
            ]
        except (KeyError, TypeError, OverflowError):
            return False
        targets, items = zip(*placed, strict=True)
        self._put(targets, items, len(placed))
        self.relieve()
        return True

    def update(self, metrics: Any) -> bool:
        """Take in a list of metrics, or a collated batch, all or none."""
        kind = type(metrics)
        targets: Sequence[Items]
        items: Sequence[Any]
        try:
            if kind is MetricBatch:
                if metrics.others or metrics.replaced:
                    return False
                shape = self._shapes.get(metrics.keys) or self._shape(metrics.keys)
                targets, items = shape.targets, metrics.folded
                size = _BATCH + metrics.size // _PER_ROOM
            elif (kind is list or kind is tuple) and metrics:
                if not _METRIC.issuperset(map(type, metrics)):
                    return False
                targets, items = self._placed(*zip(*metrics, strict=True))
                size = len(items)
            else:
                return False
        except (KeyError, TypeError, ValueError, OverflowError):
            return False
        self._put(targets, items, size)
        self.relieve()
        return True

    def _placed(
        self,
        datasets: Sequence[object],
        names: Sequence[object],
        values: Sequence[Any],
        types: Sequence[object],
        weights: Sequence[Any],
    ) -> tuple[Sequence[Items], Sequence[Any]]:
        """Return how to take in metrics; raises KeyError if one is not for the fast way."""
        if not _SPELLINGS.issuperset(map(type, types)):
            raise KeyError
        keys = zip(datasets, names, types, strict=True)
        # Sets compare by hash first, so that no device is waited for.
        if _NUMBERS.issuperset(map(type, values)) and set(weights) == _ONE:
            math.fsum(values)  # fails where an int is too large to be a float
            return [*map(self._numbers.__getitem__, keys)], values
        slots = map(self._spelled.__getitem__, keys)
        targets, items = zip(*map(Slot.placed, slots, values, weights), strict=True)
        return targets, items

    def _shape(self, keys: str) -> Shape:
        """Return what collated batches of these keys go to; raises KeyError if they are not for it."""
        slots = []
        for dataset, name, agg_type in folded_keys(keys):
            slot = self._slots[dataset, name]
            if slot.agg_type is not agg_type or slot.built_in is not _BUILT_IN[agg_type]:
                raise KeyError
            slots.append(slot)
        if not slots:
            raise KeyError
        if len(self._shapes) >= _MOST_SHAPES:
            self._fold()
            self._shapes.clear()
        shape = self._shapes[keys] = Shape(slots)
        return shape

    def first(
        self,
        key: Key,
        agg_type: TypeLike,
        handler: AggregationHandler | None,
        value: Any,
        weight: Any,
        commit: Callable[[], object],
    ) -> bool:
        """Take in the first value of a key; `commit` takes that over before."""
        if handler is None or not handler.has_lanes or key in self._keys.records:
            return False
        slot = Slot(key, agg_type, handler.laned())
        try:
            target, item = slot.placed(value, weight)
        except (KeyError, OverflowError):
            return False
        commit()
        self._slots[key] = slot
        self._put((target,), (item,), 1)
        self.relieve()
        return True

    # -- What has been checked and folded elsewhere

    def take(
        self,
        columns: Iterable[Column],
        custom: Sequence[tuple[Column, AggregationHandler]],
        commit: Callable[[], object],
    ) -> None:
        """Take in columns that have been admitted, all or none.

        Args:
            columns: of handlers with lanes.
            custom: of handlers without, which may raise.
            commit: takes over the keys that are new.
        """
        work, waiting = [], []
        for column, handler in custom:
            key, agg_type = column.key, column.agg_type
            if key in self._behind:
                waiting += [Pending(key, agg_type, one.value, one.weight) for one in column.metrics]
            elif column.metrics:
                work.append((key, handler, column.metrics))
            waiting += column.pending

        def take_in() -> None:
            commit()
            self._behind.update(one.key for one in waiting)
            targets, items, size = self._columns(columns)
            targets += [self._waiting] * len(waiting)
            if targets:
                self._put(targets, [*items, *waiting], size + len(waiting))

        if work:
            self.custom.update(work, take_in)
            if self._stage.mark is None:
                self.custom.settle(key for key, *_ in work)
        else:
            take_in()
        self.relieve()

    def _columns(self, columns: Iterable[Column]) -> tuple[list[Items], list[Any], int]:
        """Return how to take in columns of handlers with lanes, and how much that is."""
        targets: list[Items] = []
        items: list[Any] = []
        size = 0
        for column in columns:
            slot = self._slots.get(column.key)
            if slot is None:
                handler = self._keys.records[column.key].handler.laned()
                slot = self._slots[column.key] = Slot(
                    column.key, column.agg_type, handler, self._keys.records[column.key].axes
                )
            assert column.state is not None
            targets += [slot.others] * (1 + len(column.pending))
            items += [column.state, *column.pending]
            elements = sum(one.count for one in column.pending)
            held = len(column.state.sums) // _PER_ROOM if column.axes else column.state.count
            size += 1 + int(held)
            size += len(column.pending) + elements // _PER_ROOM_ON_DEVICE
        return targets, items, size

    def take_drained(self, drained: Sequence[Drained]) -> None:
        number = len(drained)
        self._put((self._accumulators,) * number, drained, number * _MOST // _MOST_DRAINED)
        self.relieve()

    def _put(self, targets: Sequence[Items], items: Sequence[Any], size: int) -> None:
        log = self._log
        self._room -= size
        # All of a call, or nothing. No signal is answered between this and what the caller does next.
        log += ((targets, items),)

    def relieve(self) -> None:
        """Fold what has piled up, if that is much."""
        if self._room < 0:
            self._fold()
            self._relieve_custom()

    # -- Folding

    def _fold(self) -> None:
        """Fold all that is in the log; what came after a mark apart from the rest.

        In one piece, unless an interrupt has come before that was done: whoever comes next tries half
        of it, so that the log is folded however fast interrupts come.
        """
        rest = len(self._log)
        while rest > 0:
            piece = min(rest, self._piece)
            try:
                self._fold_first(piece)
            except BaseException:
                self._piece = max(piece // 2, 1)
                raise
            rest -= piece
        self._piece = sys.maxsize
        self._room = max(_MOST, len(self._slots))

    def _fold_first(self, count: int) -> None:
        """Fold the first calls of the log, and take them out of it."""
        log, stage, records = self._log, self._stage, self._keys.records
        mark, below, above = stage.mark, stage.below, stage.above
        count = min(count, len(log))
        before = count if mark is None else min(mark.calls, count)
        older = self._folded(log[:before], below.queued | above.queued)
        below = self._bounded(below.followed_by(older, records))
        if mark is not None:
            newer = self._folded(log[before:count], below.queued | above.queued)
            above = above.followed_by(newer, records)
            mark = replace(mark, calls=mark.calls - before)
        folded = (Stage(below, above, mark), ())
        # Until here nothing has changed, and no signal comes in between these. If a signal's handler
        # has changed the stage meanwhile, it has folded the same, too.
        if self._stage is stage:
            self._stage, log[:count] = folded

    def _bounded(self, layer: Layer) -> Layer:
        """Return what has come in with no more of it on devices than there may be."""
        many = len(layer.pending) >= MOST_PENDING or len(layer.drained) >= _MOST_DRAINED
        if not many and layer.elements < _MOST_ELEMENTS:
            return layer
        self._warn(layer.pending, len(layer.drained))
        with quiet():
            return layer.relieved(self._keys.records)

    def _relieve_custom(self) -> None:
        """The same of handlers without lanes. With a mark, what came before and after stays apart."""
        stage, layer = self._stage, self._stage.below
        # Nothing may wait here.
        if (
            stage.mark is None
            and len(layer.custom) >= MOST_PENDING
            and all(map(Pending.ready, layer.custom))
        ):
            self._warn(layer.custom)

            def keep(rest: Layer) -> None:
                self._stage = Stage(rest)

            self.hand_over(layer, keep)

    def _warn(self, pending: Sequence[Pending], accumulators: int = 0) -> None:
        """Tell, once, who lets values pile up on a device."""
        if self._warned:
            return
        self._warned = True
        named = shortened(dict.fromkeys(show(one.key) for one in pending))
        what = [f"{len(pending):,} values on a device ({named})"] if pending else []
        what += [f"{accumulators:,} drained accumulators"] if accumulators else []
        _log.warning(
            "%s wait for a log. The older ones are read now, and again whenever so many have piled "
            "up, so that memory does not grow without end: call logger.log(step, aggregator), or "
            "reduce(), more often, on every rank",
            " and ".join(what),
        )

    def hand_over(self, layer: Layer, keep: Callable[[Layer], None]) -> None:
        """Read what handlers without lanes wait for, and let them have it; waits for it.

        Args:
            layer: has it.
            keep: takes what is left of the layer, each time that something has been handed over.
        """
        if not layer.custom:
            return
        errors: list[str] = [*layer.errors]
        read = [
            Pending(one.key, one.agg_type, value, weight)
            for one, value, weight in arriving(layer.custom)(errors)
        ]
        layer = replace(layer, custom=read, errors=errors)
        keep(layer)
        most = _HANDED_OVER
        while layer.custom:
            some, rest = layer.custom[:most], replace(layer, custom=layer.custom[most:])
            try:
                self.custom.update(map(self._read, some), partial(keep, rest))
            except Exception as failure:  # noqa: BLE001 - the user's; raised on all ranks
                if len(some) > 1:  # find out which
                    most = 1
                    continue
                text = f"{show(some[0].key)}: the handler failed: {failure!r}"
                rest = replace(rest, errors=[*dict.fromkeys([*rest.errors, text])])
                keep(rest)
            layer = rest
        self._behind.clear()

    def _read(self, one: Pending) -> tuple[Key, AggregationHandler, Sequence[Metric]]:
        pairs = [(one.value, one.weight)]
        if isinstance(one.value, np.ndarray):
            pairs = list(zip(listed(one.value), listed(one.weight), strict=True))
        known = self._keys.records[one.key]
        metrics = [Metric(*one.key, each, known.agg_type, own) for each, own in pairs]
        return one.key, known.handler, metrics

    def _folded(self, calls: Calls, queued: AbstractSet[Key]) -> Layer:
        """Return what some calls in the log have brought.

        Args:
            calls: that part of the log.
            queued: keys with values, from earlier on, that still lie on a device.
        """
        if not calls:
            return NOTHING
        targets = chain.from_iterable([targets for targets, _ in calls])
        items = chain.from_iterable([items for _, items in calls])
        states: dict[Key, State] = {}
        pending: list[Pending] = []
        # Of a fold that an interrupt has ended, or that goes on around the handler of a signal.
        self._clear()
        deque(map(list.append, targets, items), maxlen=0)  # a loop that Python does not run
        for shape in self._shapes.values():
            shape.spread()
        for slot in self._slots.values():
            if slot.others or (slot.lanes and (slot.values or len(slot.lanes) > 1)):
                state, behind = slot.folded(queued)
                trim(state, self._keys.records[slot.key])
                states[slot.key] = state
                pending += behind
            elif slot.lanes:
                (states[slot.key],) = slot.lanes
            elif slot.values:
                states[slot.key] = slot.fold(slot.values, None)
        folded = Layer(states, pending, [*self._waiting], [*self._accumulators])
        self._clear()
        return folded

    def _clear(self) -> None:
        for slot in self._slots.values():
            if slot.values or slot.others or slot.lanes:
                slot.clear()
        for shape in self._shapes.values():
            shape.lanes.clear()
        self._accumulators.clear()
        self._waiting.clear()

    # -- Undo

    def _restage(self, change: Callable[[Stage], Stage]) -> None:
        """Replace the stage, also where a signal's handler does so meanwhile."""
        while True:
            before = self._stage
            after = change(before)
            if self._stage is before:
                self._stage = after
                return

    def mark(self) -> None:
        """Let `rollback` come back to here; takes the time of what has been folded since the last."""
        self.custom.settle(self.custom.keys())

        def marked(stage: Stage) -> Stage:
            layer = stage.below.followed_by(stage.above, self._keys.records)
            return Stage(layer, NOTHING, Mark(len(self._log), self.custom.values()))

        self._restage(marked)

    def rollback(self) -> None:
        """Drop what has come in since the mark; there is one."""
        while True:
            stage, mark = self._stage, self._stage.mark
            assert mark is not None
            rolled = (Stage(stage.below, NOTHING, mark), ())
            # No signal comes in between these.
            if self._stage is stage:
                self._stage, self._log[mark.calls :] = rolled
                break
        self.custom.go_back(mark.values, self._keys.by_key())

    def cut(self, columns: Iterable[Column], begun: Begun) -> None:
        """Take off all that has come in, and begin anew, without a mark.

        Args:
            columns: what comes along, of keys that have been admitted; nothing of it on a device.
            begun: takes it over.
        """
        records = self._keys.records
        along = Layer({one.key: one.state for one in columns if one.state is not None})
        while True:
            self._fold()
            stage = self._stage
            layer = stage.below.followed_by(stage.above, records).followed_by(along, records)
            taken = (layer, Stage(), self.cuts + 1)
            # No signal comes in between these, or what it holds would be lost, or counted twice.
            if self._stage is stage:
                begun.layer, self._stage, self.cuts = taken
                return

    def put_back(self, layer: Layer) -> None:
        """Lay what a failed reduction took beneath what has come since."""
        self._restage(
            lambda stage: replace(stage, below=layer.followed_by(stage.below, self._keys.records))
        )
        self._behind.update(one.key for one in layer.custom)

    def clear(self) -> None:
        """Forget all that has come in. What comes first of each key then starts the clock anew."""
        self._stage, self.custom, self._behind = Stage(), CustomStates(), set()
        for known in (self._log, self._slots, self._spelled, self._numbers, self._shapes):
            known.clear()
        self.cuts += 1

    def rename(self, key: Key, name: Key | None) -> None:
        """Let what there is of `key` go by another name; None: forget it."""
        self._fold()
        slot = self._slots.pop(key, None)
        if slot is not None:
            for spelled in slot.spellings:
                self._spelled.pop(spelled, None)
                self._numbers.pop(spelled, None)
            self._shapes.clear()
        self._restage(lambda stage: stage.renamed(key, name, self._keys.records))
        self.custom.rename(key, name)
        if key in self._behind:
            self._behind.remove(key)
            self._behind |= set() if name is None else {name}


class _Remembered(dict[tuple[Any, ...], Found]):
    """Finds what it is asked for, and knows it from then on.

    Of tens of thousands of keys most are spelled one way, so that this takes less than all ways would.
    """

    def __init__(self, find: Callable[[tuple[Any, ...]], Found]) -> None:
        super().__init__()
        self._find = find

    def __missing__(self, asked: tuple[Any, ...]) -> Found:
        found = self[asked] = self._find(asked)
        return found


def _spelled_so(slots: Mapping[Key, Slot], spelled: tuple[Any, ...]) -> Slot:
    """Return the slot that is spelled so; raises KeyError if none that takes the fast way is."""
    slot = slots[spelled[:2] if len(spelled) > 2 else ("", spelled[0])]
    if slot.takes is None or type(spelled[-1]) not in _SPELLINGS or spelled not in slot.spellings:
        raise KeyError
    return slot


def _for_numbers(slots: Mapping[tuple[Any, ...], Slot], spelled: tuple[Any, ...]) -> Items:
    slot = slots[spelled]
    if slot.number is None:
        raise KeyError
    return slot.values


# -- Slots -----------------------------------------------------------------------------------------


class Slot:
    """What has come in of one key and waits to be folded.

    Attributes:
        built_in: what its handler folds just like, if it does like a built-in one, without axes.
        takes: the type of what may come the fast way: float, str (categories), or None.
        fold: makes a state of a list of values, and of their weights or None.
        values: for what may come the fast way and has weight 1.
        others: for anything else: values with their weights, states, what is `Pending`, and what
            collated batches hold besides lanes. The same as `values` where order matters.
        lanes: those of collated batches, which may be merged last.
        number: where a plain number goes, if it may come the fast way.
    """

    __slots__ = (
        "agg_type",
        "built_in",
        "fold",
        "handler",
        "key",
        "lanes",
        "number",
        "others",
        "takes",
        "values",
    )

    def __init__(self, key: Key, agg_type: TypeLike, handler: LaneHandler, axes: str = "") -> None:
        self.key, self.agg_type, self.handler = key, agg_type, handler
        self.built_in = None if axes else folds_as(handler)
        self.takes = None if self.built_in is None else handler.takes
        self.fold: Callable[[Any, Any], State] = handler.fold_listed
        if self.built_in is None:
            self.fold = partial(LaneHandler.fold_listed, handler)
        self.values: Items = []
        ordered = handler.has_sample or handler.has_counts or handler.is_last
        self.others: Items = self.values if ordered else []
        self.lanes: tuple[State, ...] = ()
        self.number = (self.values,) if self.takes is float else None

    def placed(self, value: Any, weight: Any) -> tuple[Items, Any]:
        """Return how to take in one value; raises KeyError if it is not for the fast way."""
        kind = type(value)
        if kind is int and self.takes is float:
            value = float(value)
        elif kind is not self.takes or (kind is str and not is_name(value)):
            raise KeyError
        if type(weight) in _NUMBERS:
            if weight == 1:
                return self.values, value
            if self.handler.weighted and 0 < weight <= LARGEST_WEIGHT:
                return self.others, (value, float(weight))
        raise KeyError

    @property
    def spellings(self) -> list[tuple[object, ...]]:
        """How calls may spell the key and its type."""
        dataset, name = self.key
        where = (dataset, name) if dataset else (name,)
        types = [self.agg_type]
        if isinstance(self.agg_type, AggregationType):
            types.append(self.agg_type.value)
        return [(*where, one) for one in types]

    def clear(self) -> None:
        self.values.clear()
        self.others.clear()
        self.lanes = ()

    def folded(self, queued: AbstractSet[Key]) -> tuple[State, list[Pending]]:
        """Return the state of what is here, of which not all are plain, and what lies on a device.

        Where the most recent values matter, they queue behind those that still lie on a device.

        Args:
            queued: keys of which earlier values do.
        """
        pending: list[Pending] = []
        state = self.handler.empty()
        for kind, run in self._runs():
            queue = pending if state.recent and (pending or self.key in queued) else None
            if kind is Pending:
                pending += run
            elif kind is float or kind is str:
                self._follow(state, queue, run, None)
            elif kind is tuple:
                self._follow(state, queue, *zip(*run, strict=True))
            elif queue is None:
                (state.merge_all if kind is State else state.take_plain)(run)
            else:
                for one in run:
                    if kind is State:
                        state.merge(State(one.sums))
                    values, weights = one.kept() if kind is State else state.kept(one)
                    # Their lanes have been merged, and will be again, with the values.
                    state.sums = tuple(map(sub, state.sums, self.fold(values, weights).sums))
                    self._follow(state, queue, values, weights)
        state.merge_all(self.lanes)
        return state, pending

    def _follow(self, state: State, queue: Items | None, values: Any, weights: Any) -> None:
        """Let values follow those in `state`, or queue behind such as lie on a device."""
        if queue is None:
            state.merge(self.fold(values, weights))
        else:
            weighing = 1.0 if weights is None else as_array(weights)
            queue.append(Pending(self.key, self.agg_type, as_array(values), weighing))

    def _runs(self) -> Iterator[tuple[type, list[Any]]]:
        """Yield what is of one kind; where order matters, what came in a row."""
        ordered = self.values is self.others
        if self.values and not ordered:
            yield float, self.values
        kinds = dict.fromkeys(map(type, self.others))
        if kinds and kinds.keys() <= _NUMBERS:
            yield float, self.others
        elif len(kinds) == 1:
            yield next(iter(kinds)), self.others
        elif ordered:
            for kind, run in groupby(self.others, _kind):
                yield kind, [*run]
        else:
            for kind in kinds:
                yield kind, [one for one in self.others if type(one) is kind]


class Shape:
    """Where the columns of collated batches that hold the same keys go.

    Attributes:
        lanes: of batches, each a pair of bytes.
        targets: of these, all together, and of what else each column may hold.
    """

    __slots__ = ("_places", "lanes", "targets")

    def __init__(self, slots: Sequence[Slot]) -> None:
        widths = (
            [one.handler.sum_width for one in slots],
            [one.handler.max_width for one in slots],
        )
        self._places = [*zip(slots, *map(_stretches, widths), strict=True)]
        self.lanes: Items = []
        self.targets = (self.lanes, *(one.others for one in slots if one.others is one.values))

    def spread(self) -> None:
        """Give each slot its lanes of all batches, added up as arrays."""
        if not self.lanes:
            return
        all_sums, all_maxs = zip(*self.lanes, strict=True)
        with quiet():
            sums = tuple(_rows(all_sums).sum(axis=0, initial=0.0).tolist())
        maxs = tuple(_rows(all_maxs).max(axis=0).tolist())
        for slot, own, tops in self._places:
            slot.lanes += (State(sums[own], maxs[tops]),)


def _stretches(widths: Sequence[int]) -> list[slice]:
    ends = [*accumulate(widths, initial=0)]
    return [*map(slice, ends, ends[1:])]


def _rows(lanes: Sequence[bytes]) -> FloatArray:
    return np.frombuffer(b"".join(lanes)).reshape(len(lanes), len(lanes[0]) // 8)


def _kind(item: object) -> type:
    return float if type(item) is int else type(item)
