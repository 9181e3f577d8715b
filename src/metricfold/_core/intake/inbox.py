"""What comes in: put down in order of arrival, folded when much of it has piled up.

    record, update        log.append((to which lists, which items))      one append, whatever comes
    every few thousand    each slot folds its items into a state         a `Delta`
    mark                  remembers a place in the log
    rollback              cuts the log off there
    cut, restore          hand the delta to a reduction; take it back if that fails

A *slot* has lists for the items of one key: numbers, numbers with a weight, states that were folded
elsewhere, and values that still lie on a device. One log for all keys lets a call be put down as a
whole, and what came after a mark be dropped without a trace.

The fast way in is for what needs no look but at its type: an int or a float, of a key that is known
under a type spelled so and whose handler is a built-in one. Everything else is checked and folded by
`data.batch` first and comes as columns; so does what comes first of each key.
"""

from __future__ import annotations

import logging
import math
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from itertools import chain, groupby
from operator import sub
from typing import Any, Protocol, TypeAlias

import numpy as np

from metricfold._core.device.rows import Drained
from metricfold._core.fold.batch import Column, Late, MetricBatch, folded_keys
from metricfold._core.fold.builtin import (
    built_in_handlers,
    folds_as,
)
from metricfold._core.fold.handlers import AggregationHandler, LaneHandler
from metricfold._core.fold.names import Key, show
from metricfold._core.fold.sample import FloatArray
from metricfold._core.fold.state import COUNT, Sample, State, quiet
from metricfold._core.intake.delta import CutDelta, Delta
from metricfold._core.runtime.listing import shortened
from metricfold._core.sketch.weights import LARGEST_WEIGHT
from metricfold.metric import AggregationType, Metric, TypeLike, is_name

__all__ = ["MOST_LATE", "Inbox", "Keys", "never_read"]

_log = logging.getLogger("metricfold")

_MOST = 4096
"""So many values pile up, or as many as there are keys if those are more: what a fold takes for each
key is then little for each value."""
_BATCH, _PER_ROOM = 16, 16
"""A collated batch takes the room of so many values, and of one more for each 16 that it was made of."""
_MOST_SHAPES = 256
"""Collated batches hold the same keys over and over; of so many sets of keys it is known where they go."""

MOST_LATE, _MOST_ELEMENTS, _MOST_DRAINED = 2**15, 2**24, 64
"""So many values, their elements, or accumulators may lie on devices; what is more is read ahead of the log."""
_PER_ROOM_ON_DEVICE = _MOST_ELEMENTS // _MOST
"""An array on a device takes the room of one more value for so many of its elements."""

_METRIC = {Metric}
_NUMBERS = {float, int}
_ONE = {1.0}
# A member of somebody's StrEnum may equal "mean", hash and all, and is yet another type.
_SPELLINGS = {str, AggregationType}
_BUILT_IN = {agg_type: type(handler) for agg_type, handler in built_in_handlers().items()}

Items: TypeAlias = list[Any]
"""Where a fold puts items of the log; emptied, and never replaced."""
Calls: TypeAlias = Sequence[tuple[Sequence[Items], Sequence[Any]]]
"""A log, or a part of it: for each call what goes where."""


class Keys(Protocol):
    """What the inbox asks about keys: their handlers, and the categories that are told apart."""

    of_key: dict[Key, AggregationHandler]
    kept: dict[Key, frozenset[str]]


class Begun(Protocol):
    """Takes over what a reduction is about."""

    cut: CutDelta | None


class Inbox:
    """What one rank has taken in since its last reduction.

    Args:
        keys: knows the handler of each key.

    Attributes:
        cuts: how often it has been cut.
    """

    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        self._slots: dict[Key, Slot] = {}
        self._spelled = _Spelled(self._slots)
        self._numbers = _Numbers(self._spelled)
        self._shapes: dict[str, Shape] = {}
        self._kinds: dict[type, type[Slot]] = {}
        self._accumulators: list[Drained] = []
        self._log: list[tuple[Sequence[Items], Sequence[Any]]] = []
        self._room = _MOST
        self._warned = False
        self._folds = self._folding = 0
        self._piece = sys.maxsize
        self.cuts = 0
        self._delta = Delta()
        # With a mark: its place in the log, and what of that which came after it has been folded.
        self._mark: int | None = None
        self._since = Delta()

    # -- The fast way in. These return whether it was one; if not, nothing has changed.

    def record(self, name: object, value: Any, agg: object, dataset: object, weight: Any) -> bool:
        """Take in one value."""
        try:
            slot = self._spelled[(name, agg) if dataset is None else (dataset, name, agg)]
            if type(agg) not in _SPELLINGS:
                return False
            if type(value) is float and type(weight) is float and weight == 1.0 and slot.number:
                placed: tuple[tuple[Items], tuple[Any]] = slot.number, (value,)
            else:
                placed = slot.placed(value, weight)
        except (KeyError, TypeError, OverflowError):
            return False
        self._log.append(placed)
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
        targets: list[Items] = []
        items: list[Any] = []
        try:
            for name, value in metrics.items():
                own = agg[name] if type(agg) is dict else agg
                if type(own) not in _SPELLINGS:
                    return False
                slot = self._spelled[(name, own) if dataset is None else (dataset, name, own)]
                # Where no weight counts, any but 0 is 1.
                (target,), (item,) = slot.placed(value, weight if slot.handler.weighted else 1.0)
                targets.append(target)
                items.append(item)
        except (KeyError, TypeError, OverflowError):
            return False
        self._put(targets, items, len(items))
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
        placed = [
            self._spelled[key].placed(value, weight)
            for key, value, weight in zip(keys, values, weights, strict=True)
        ]
        return [target for (target,), _ in placed], [item for _, (item,) in placed]

    def _shape(self, keys: str) -> Shape:
        """Return what collated batches of these keys go to; raises KeyError if they are not for it."""
        slots = [self._collated(*one) for one in folded_keys(keys)]
        if not slots:
            raise KeyError
        if len(self._shapes) >= _MOST_SHAPES:
            self._fold()
            self._shapes.clear()
        shape = self._shapes[keys] = Shape(slots)
        return shape

    def _collated(self, dataset: str, name: str, agg_type: TypeLike) -> Slot:
        """Return where what workers have folded of a key goes; raises KeyError if not this way."""
        slot = self._slots[dataset, name]
        if slot.agg_type is not agg_type or slot.built_in is not _BUILT_IN[agg_type]:
            raise KeyError
        return slot

    def first(
        self,
        key: Key,
        agg_type: TypeLike,
        handler: AggregationHandler | None,
        value: Any,
        weight: Any,
    ) -> Callable[[], None] | None:
        """Return what takes in the first value of a key, once that is admitted; None: not this way."""
        if handler is None or not handler.has_lanes or key in self._keys.of_key:
            return None
        slot = self._slot(key, agg_type, handler.laned())
        try:
            targets, items = slot.placed(value, weight)
        except (KeyError, OverflowError):
            return None

        def take_in() -> None:
            self._slots[key] = slot
            self._put(targets, items, 1)
            self.relieve()

        return take_in

    # -- What has been checked and folded elsewhere

    def take(self, columns: Iterable[Column]) -> None:
        """Take in columns of keys that have been admitted; `relieve` comes after it."""
        targets: list[Items] = []
        items: list[Any] = []
        size = 0
        for column in columns:
            slot = self._slots.get(column.key) or self._open(column.key, column.agg_type)
            assert column.state is not None
            targets.append(slot.others)
            items.append(column.state)
            size += int(column.state.sums[COUNT]) or 1
            if column.late:
                targets += [slot.others] * len(column.late)
                items += column.late
                elements = sum(one.count for one in column.late)
                size += len(column.late) + elements // _PER_ROOM_ON_DEVICE
        if targets:
            self._put(targets, items, size)

    def take_accumulator(self, drained: Drained) -> None:
        """Take in an accumulator that is on its way from its device."""
        self._put((self._accumulators,), (drained,), _MOST // _MOST_DRAINED)
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

    def _open(self, key: Key, agg_type: TypeLike) -> Slot:
        slot = self._slots[key] = self._slot(key, agg_type, self._keys.of_key[key].laned())
        return slot

    def _slot(self, key: Key, agg_type: TypeLike, handler: LaneHandler) -> Slot:
        kind = self._kinds.get(type(handler))
        if kind is None:
            kind = OrderedSlot if handler.empty().ordered else Slot
            self._kinds[type(handler)] = kind
        return kind(key, agg_type, handler)

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
        log, mark, folds = self._log, self._mark, self._folds
        count = min(count, len(log))
        before = count if mark is None else min(mark, count)
        since = self._since
        queued = self._delta.queued | since.queued
        delta = self._delta.followed_by(self._folded(log[:before], queued))
        delta.trim(self._keys.kept)
        delta = self._bounded(delta)
        if mark is not None:
            since = since.followed_by(self._folded(log[before:count], queued | delta.queued))
            since.trim(self._keys.kept)
            mark -= before
        # Until here nothing has changed, and no signal comes in between these. If the handler of an
        # earlier one has folded the same meanwhile, that was it.
        if self._folds == folds:
            folded = (delta, since, mark, folds + 1, ())
            self._delta, self._since, self._mark, self._folds, log[:count] = folded

    def _bounded(self, delta: Delta) -> Delta:
        """Return what has come in with no more of it on devices than there may be."""
        many = len(delta.late) >= MOST_LATE or len(delta.drained) >= _MOST_DRAINED
        if not many and delta.elements < _MOST_ELEMENTS:
            return delta
        if not self._warned:
            self._warned = True
            _log.warning("%s", never_read(delta.late, len(delta.drained)))
        with quiet():
            return delta.relieved(self._keys.of_key)

    def _folded(self, calls: Calls, queued: AbstractSet[Key]) -> Delta:
        """Return what some calls in the log have brought.

        Args:
            calls: that part of the log.
            queued: keys with values, from earlier on, that still lie on a device.
        """
        targets = chain.from_iterable([targets for targets, _ in calls])
        items = chain.from_iterable([items for _, items in calls])
        folded = Delta()
        if self._folding:  # a signal's handler does this while a fold of the same is under way
            self._clear()
        self._folding += 1
        try:
            for key in queued:
                self._slots[key].wait()
            deque(map(list.append, targets, items), maxlen=0)  # a loop that Python does not run
            for shape in self._shapes.values():
                shape.spread()
            for slot in self._slots.values():
                if slot.filled():
                    folded.add(slot.key, *slot.folded())
                    slot.clear()
            folded.drained += self._accumulators
            self._accumulators.clear()
        except BaseException:
            self._clear()
            raise
        finally:
            self._folding -= 1
        return folded

    def _clear(self) -> None:
        for slot in self._slots.values():
            slot.clear()
        for shape in self._shapes.values():
            shape.clear()
        self._accumulators.clear()

    # -- Marks

    def mark(self) -> None:
        """Let `rollback` come back to here; takes the time of what has been folded since."""
        if self._since.holds_any():
            self._delta, self._since = self._delta.followed_by(self._since), Delta()
        self._mark = len(self._log)

    def rollback(self) -> None:
        """Drop what has come in since the mark; there is one."""
        self._since = Delta()
        del self._log[self._mark :]

    # -- Reductions

    def cut(self, columns: Iterable[Column], begun: Begun) -> CutDelta:
        """Return all that has come in, and begin anew, without a mark.

        Args:
            columns: what comes along, of keys that have been admitted.
            begun: takes over what is returned.
        """
        self._fold()
        more = Delta()
        for column in columns:
            assert column.state is not None
            more.add(column.key, column.state, column.late)
        taken = CutDelta(self._delta.followed_by(self._since).followed_by(more))
        delta, since, cuts = Delta(), Delta(), self.cuts + 1
        # No signal comes in between these, or what it holds would be lost, or counted twice.
        begun.cut, self._delta, self._since, self._mark, self.cuts = taken, delta, since, None, cuts
        return taken

    def restore(self, taken: CutDelta) -> None:
        """Put back what a failed reduction took; it comes before what has come since."""
        self._delta = taken.given_back().followed_by(self._delta)

    def drop(self, key: Key) -> int:
        """Forget `key`; returns how many values it had."""
        self._fold()
        slot = self._slots.pop(key, None)
        if slot is not None:
            for spelled in slot.spellings():
                self._spelled.pop(spelled, None)
                self._numbers.pop(spelled, None)
            self._shapes.clear()
        return self._delta.drop(key) + self._since.drop(key)


def never_read(late: Sequence[Late], accumulators: int = 0) -> str:
    """Return what to tell who lets values pile up on a device."""
    named = shortened(dict.fromkeys(show(one.key) for one in late))
    what = [f"{len(late):,} values on a device ({named})"] if late else []
    what += [f"{accumulators:,} drained accumulators"] if accumulators else []
    return (
        f"{' and '.join(what)} wait for a log. The older ones are read now, and again whenever so many "
        "have piled up, so that memory does not grow without end: call logger.log(step, aggregator), or "
        "reduce(), more often, on every rank"
    )


class _Spelled(dict[tuple[object, ...], "Slot"]):
    """Slots by dataset, if there is one, name and type, as calls spell these.

    Each is put down when it is first asked for: of tens of thousands of keys most are spelled one way.
    """

    def __init__(self, slots: Mapping[Key, Slot]) -> None:
        super().__init__()
        self._slots = slots

    def __missing__(self, spelled: tuple[Any, ...]) -> Slot:
        key = spelled[:2] if len(spelled) > 2 else ("", spelled[0])
        slot = self._slots[key]
        if slot.takes is None or type(spelled[-1]) not in _SPELLINGS:
            raise KeyError
        for known in slot.spellings():
            if known == spelled:
                self[known] = slot
                return slot
        raise KeyError


class _Numbers(dict[tuple[object, ...], Items]):
    """The same of plain numbers: where they go."""

    def __init__(self, spelled: _Spelled) -> None:
        super().__init__()
        self._spelled = spelled

    def __missing__(self, spelled: tuple[Any, ...]) -> Items:
        slot = self._spelled[spelled]
        if slot.takes is not float:
            raise KeyError
        self[spelled] = slot.values
        return slot.values


# -- Slots -----------------------------------------------------------------------------------------


class Slot:
    """What has come in of one key and waits to be folded, where order does not matter.

    Attributes:
        built_in: what its handler folds just like, if it does like a built-in one.
        takes: the type of what may come the fast way: float, str (categories), or None.
        values: for what may come the fast way and has weight 1.
        others: for anything else: values with their weights, states, and what is `Late`.
        number: where a plain number goes, if it may come the fast way.
    """

    __slots__ = (
        "_others",
        "agg_type",
        "built_in",
        "handler",
        "key",
        "number",
        "takes",
        "values",
    )

    def __init__(self, key: Key, agg_type: TypeLike, handler: LaneHandler) -> None:
        self.key, self.agg_type, self.handler = key, agg_type, handler
        self.built_in = folds_as(handler)
        self.takes = None if self.built_in is None else handler.takes
        self.values: Items = []
        self._others: Items | None = None
        self.number = (self.values,) if self.takes is float else None

    @property
    def others(self) -> Items:
        found = self._others
        if found is None:  # most keys never need it
            found = self._others = []
        return found

    def placed(self, value: Any, weight: Any) -> tuple[tuple[Items], tuple[Any]]:
        """Return how to take in one value; raises KeyError if it is not for the fast way."""
        kind = type(value)
        if kind is int and self.takes is float:
            value = float(value)
        elif kind is not self.takes or (kind is str and not is_name(value)):
            raise KeyError
        if type(weight) in _NUMBERS:
            if weight == 1:
                return (self.values,), (value,)
            if self.handler.weighted and 0 < weight <= LARGEST_WEIGHT:
                return (self.others,), ((value, float(weight)),)
        raise KeyError

    def spellings(self) -> Iterator[tuple[object, ...]]:
        """Yield how calls may spell the key and its type."""
        dataset, name = self.key
        where = (dataset, name) if dataset else (name,)
        yield (*where, self.agg_type)
        if isinstance(self.agg_type, AggregationType):
            yield (*where, self.agg_type.value)

    def wait(self) -> None:
        """Let what comes know that values which came before still lie on a device."""

    def filled(self) -> bool:
        """Return whether there is anything to fold."""
        return bool(self.values or self._others)

    def clear(self) -> None:
        self.values.clear()
        if self._others is not None:
            self._others.clear()

    def folded(self) -> tuple[State, list[Late]]:
        """Return the state of what is here, and what lies on a device."""
        late: list[Late] = []
        if not self._others:
            return self._of_values(self.values, None), late
        state = self.handler.empty()
        if self.values:
            state.merge(self._of_values(self.values, None))
        by_kind: dict[type, list[Any]] = {}
        for item in self._others:
            by_kind.setdefault(type(item), []).append(item)
        for kind, items in by_kind.items():
            if kind is tuple:
                state.merge(self._of_values(*zip(*items, strict=True)))
            elif kind is Late:
                late = items
            else:
                state.merge_all(items)
        return state, late

    def add_lanes(self, lanes: State) -> None:
        """Add the lanes of several states; what else these held has been put down apart."""
        self.others.append(lanes)

    def _of_values(self, values: Any, weights: Any) -> State:
        if self.built_in is None:
            return LaneHandler.fold_listed(self.handler, values, weights)
        return self.handler.fold_listed(values, weights)


class OrderedSlot(Slot):
    """The same where order matters.

    Where the most recent values do, they queue behind those that still lie on a device.
    """

    __slots__ = ("_lanes", "_queued")

    def __init__(self, key: Key, agg_type: TypeLike, handler: LaneHandler) -> None:
        super().__init__(key, agg_type, handler)
        self._lanes: list[State] = []
        self._queued = False

    @property
    def others(self) -> Items:
        return self.values

    def wait(self) -> None:
        self._queued = True

    def clear(self) -> None:
        super().clear()
        self._lanes.clear()
        self._queued = False

    def add_lanes(self, lanes: State) -> None:
        self._lanes.append(lanes)

    def filled(self) -> bool:
        return bool(self.values or self._lanes or self._queued)

    def folded(self) -> tuple[State, list[Late]]:
        state = self.handler.empty()
        late: list[Late] = []
        for kind, run in self._runs():
            queue = late if state.sample is not None and (late or self._queued) else None
            if kind is Late:
                late += run
            elif kind is float or kind is str:
                self._follow(state, queue, run, None)
            elif kind is tuple:
                self._follow(state, queue, *zip(*run, strict=True))
            elif kind is list or kind is dict:
                self._take_parts(state, queue, run)
            elif queue is None:
                state.merge_all(run)
            else:
                for one in run:
                    sums, values, weights = one.sample.apart(one.sums)
                    state.merge(State(sums))
                    self._follow(state, queue, values, weights)
        for lanes in self._lanes:
            state.merge(lanes)
        return state, late

    def _take_parts(self, state: State, queue: list[Late] | None, parts: list[Any]) -> None:
        """Take in what collated batches hold besides lanes, which are merged apart."""
        if queue is None:
            state.take_plain(parts)
            return
        for part in parts:
            values, weights, *_ = Sample.of([part]).window()
            # What queues is folded later, lanes and all.
            state.sums = tuple(map(sub, state.sums, self._of_values(values, weights).sums))
            self._follow(state, queue, values, weights)

    def _follow(self, state: State, queue: list[Late] | None, values: Any, weights: Any) -> None:
        """Let values follow those in `state`, or queue behind such as lie on a device."""
        if queue is None:
            state.merge(self._of_values(values, weights))
        else:
            weighing = 1.0 if weights is None else _array(weights)
            queue.append(Late(self.key, self.agg_type, _array(values), weighing))

    def _runs(self) -> Iterator[tuple[type, list[Any]]]:
        """Yield what came in a row and is of one kind; nearly always that is everything."""
        kinds = set(map(type, self.values))
        if kinds <= _NUMBERS:
            yield float, self.values
        elif len(kinds) == 1:
            yield kinds.pop(), self.values
        else:
            for kind, run in groupby(self.values, _kind):
                yield kind, [*run]


class Shape:
    """Where the columns of collated batches that hold the same keys go.

    Attributes:
        targets: of their lanes, all together, and of what else each column may hold.
    """

    __slots__ = ("_lanes", "_slots", "targets")

    def __init__(self, slots: Sequence[Slot]) -> None:
        self._slots = slots
        self._lanes: list[tuple[bytes, bytes]] = []
        ordered = [slot.others for slot in slots if type(slot) is OrderedSlot]
        self.targets = (self._lanes, *ordered)

    def clear(self) -> None:
        self._lanes.clear()

    def spread(self) -> None:
        """Give each slot its lanes of all batches, added up as arrays."""
        if not self._lanes:
            return
        all_sums, all_maxs = zip(*self._lanes, strict=True)
        with quiet():
            sums = _rows(all_sums).sum(axis=0).tolist()
        maxs = _rows(all_maxs).max(axis=0).tolist()
        for slot in self._slots:
            width, height = slot.handler.sum_width, slot.handler.max_width
            slot.add_lanes(State(tuple(sums[:width]), tuple(maxs[:height])))
            del sums[:width], maxs[:height]
        self.clear()


def _rows(lanes: Sequence[bytes]) -> FloatArray:
    return np.frombuffer(b"".join(lanes)).reshape(len(lanes), len(lanes[0]) // 8)


def _array(numbers: Any) -> FloatArray:
    # Of a copy: a signal's handler that folds would empty the list, which NumPy does not survive.
    copied = tuple(numbers)
    return np.fromiter(copied, dtype=np.float64, count=len(copied))


def _kind(item: object) -> type:
    return float if type(item) is int else type(item)
