"""Timers: how long the parts of a step take, on the average, at most, and as a share of all time.

    with aggregator.timer("data"):
        batch = next(loader)

    for batch in aggregator.timer("data").over(loader):      # the same
        ...

A use adds to a few numbers of its rank. Only when a reduction begins do they become metrics: so a
timer costs a microsecond or two, however often it is used. Three keys say all there is to say:

    data_seconds        MEAN    of one use
    data_seconds_max    MAX     of one use, and whose it was
    data_share          RATE    seconds per second: the share of the time that counts, over ranks

The last is known per rank, on either route, and so is the slowest rank. It is cut where a reduction
cuts: each interval has the part of a use that fell into it. The other two are of the uses that have
ended in the interval.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ContextDecorator
from contextvars import ContextVar
from threading import get_ident
from time import perf_counter
from typing import Any, NamedTuple, NoReturn, TypeVar

from metricfold._core.fold.columns import Column, fold_value
from metricfold._core.fold.names import Key
from metricfold._core.intake.clock import Clock
from metricfold._core.intake.keys import INSTEAD, KeyTable
from metricfold._core.runtime.listing import internal
from metricfold._core.runtime.staging import refuse_while_traced
from metricfold._core.view.timing import TimerKeys
from metricfold.metric import AggregationType

__all__ = ["Timer", "Timers"]

T = TypeVar("T")
Function = TypeVar("Function", bound=Callable[..., Any])


class Taken(NamedTuple):
    """What a timer took on one rank since the last reduction.

    Args:
        uses: how many have ended.
        total: the seconds that these took.
        longest: the seconds of the longest.
        counted: the seconds that fell into the interval, also of uses that still go on.
    """

    uses: int = 0
    total: float = 0.0
    longest: float = 0.0
    counted: float = 0.0

    def plus(self, uses: int, total: float, longest: float, counted: float) -> Taken:
        so_often, so_long, at_most, so_far = self
        longest = max(at_most, longest)
        return Taken(so_often + uses, so_long + total, longest, so_far + counted)


class Elapsed:
    """The times of one timer on one rank since the last reduction."""

    __slots__ = ("_before", "_cut", "clock", "inherited", "lock", "running", "taken")

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        # Reentrant: a signal handler, or the end of a generator, may come in between.
        self.lock = threading.RLock()
        self.inherited = False
        self.running: dict[Timer, None] = {}
        self.taken, self._before, self._cut = Taken(), Taken(), -1

    def take(self, shown: float, cut: int) -> Taken:
        """Return what has been taken so far, and begin anew.

        Args:
            shown: what the clock showed where the interval ends.
            cut: the number of the cut that it is for. What has been taken for the same cut before is
                there again: an interrupt came, and nothing has been cut off.
        """
        with self.lock:
            for timer in list(self.running):
                timer.count(shown)
            taken = self.taken.plus(*self._before) if cut == self._cut else self.taken
            self._before, self._cut, self.taken = taken, cut, Taken()
            return taken

    def leave_parent_behind(self) -> None:
        """In a forked child: refuse what comes, for nobody will read it."""
        self.inherited = True
        self.lock = threading.RLock()


class Timers:
    """The timers of one rank, by name.

    Args:
        keys: knows how their metrics are folded.
        clock: says which of their time counts.
    """

    def __init__(self, keys: KeyTable, clock: Clock) -> None:
        self._keys = keys
        self._clock = clock
        self._elapsed: dict[str, Elapsed] = {}

    def known(self, name: object) -> Timer | None:
        elapsed = self._elapsed.get(name) if isinstance(name, str) else None
        return None if elapsed is None else Timer(elapsed)

    def add(self, name: str) -> Timer:
        """Return the timer of a new name; raises ValueError if another metric has one of its names."""
        names = TimerKeys.of(name)
        types = [(("", key), agg_type) for key, agg_type in names.types()]
        admission = self._keys.admit_keys((*one, "") for one in types)
        handlers = [self._keys.handler_of(*one) for one in types]
        if not all(handler is not None and handler.has_lanes for handler in handlers):
            raise ValueError(
                f"timer {name!r} needs handlers with lanes for 'mean', 'max' and 'rate', but "
                f"another one is registered here: {INSTEAD}"
            )
        self._keys.commit(admission)
        self._keys.records["", names.share].per_rank = True
        return Timer(self._elapsed.setdefault(name, Elapsed(self._clock)))

    def take(self, world_size: int, shown: float, cut: int) -> tuple[list[Column], str]:
        """Return metrics of the times that have been taken, and an error, for all ranks.

        Args:
            world_size: the number of ranks.
            shown: what the clock shows where the interval ends.
            cut: as `Elapsed.take` has it.
        """
        columns: list[Column] = []
        errors = []
        for name, elapsed in self._elapsed.items():
            uses, total, longest, counted = elapsed.take(shown, cut)
            # Added up over ranks and divided by the time, the last is the mean of the ranks' shares.
            values = (total / (uses or 1), longest, counted / world_size)
            table = zip(
                TimerKeys.of(name).types(),
                values,
                (float(uses), 1.0, 1.0),  # the weights
                (uses, uses, uses or counted),  # whether there is anything to say
                strict=True,
            )
            try:
                columns += [
                    self._column(("", key), agg_type, value, weight)
                    for (key, agg_type), value, weight, there in table
                    if there
                ]
            except Exception as failure:  # noqa: BLE001 - the user's; raised on all ranks
                errors.append(f"timer {name!r}: the handler failed: {failure!r}")
        return columns, "; ".join(errors)

    def _column(self, key: Key, agg_type: AggregationType, value: float, weight: float) -> Column:
        handler = self._keys.handler_of(key, agg_type)
        weight = weight if handler is None or handler.weighted else 1.0
        return fold_value(key, agg_type, value, weight, self._keys.handler_of)

    def begin_anew(self) -> None:
        for elapsed in self._elapsed.values():
            elapsed.take(self._clock.now(), -1)

    def drop(self, key: Key) -> None:
        """Forget a timer that has `key`: whoever uses it again is told, as anyone who records such."""
        self._elapsed = {
            name: elapsed
            for name, elapsed in self._elapsed.items()
            if key[0] or key[1] not in TimerKeys.of(name).names()
        }

    def leave_parent_behind(self) -> None:
        """In a forked child: forget all, and refuse what comes to those that somebody holds."""
        for elapsed in self._elapsed.values():
            elapsed.leave_parent_behind()
        self._elapsed = {}


@internal("count", "has", "outer", "running")
class Timer(ContextDecorator):
    """Times a block, each call of a function that it decorates, or the items of an iterable.

    Nested in itself, on one thread, it counts once: the outermost use has all of the time.

    Attributes:
        running: whether a use goes on, and counts.
        outer: the use, of any timer, that this one is nested in.
    """

    # All that a use does is written out here, for it may be one of a million.

    def __init__(self, elapsed: Elapsed) -> None:
        self._elapsed = elapsed
        self.running = False
        self.outer: Timer | None = None
        self._again: list[Timer] = []  # uses that began while this one was going on

    def __enter__(self) -> Timer:  # noqa: PYI034 - typing.Self needs Python 3.11
        refuse_while_traced("timer")
        elapsed = self._elapsed
        if elapsed.inherited:
            raise RuntimeError(
                "this timer was inherited by a forked process, where its times would be lost: use "
                "it in the training process, around what waits for the data workers"
            )
        if self.running:
            self._again.append(Timer(elapsed).__enter__())
            return self
        outer, thread = _innermost.get(), get_ident()
        if outer is not None:
            while outer is not None and not outer.running:  # of a generator that has been left
                outer = outer.outer
            if outer is not None and outer.has(elapsed, thread):
                return self
        self.outer, self._thread = outer, thread
        self._began = began = perf_counter()
        running, place = elapsed.clock.hand
        if not running:
            elapsed.clock.start(began)
            running, place = elapsed.clock.hand
        self._counted = began - place if running else place
        self.running = True
        elapsed.running[self] = None
        _innermost.set(self)
        return self

    def __exit__(self, *raised: object) -> None:
        if self._again:
            self._again.pop().__exit__(*raised)
        elif self.running:
            ended = perf_counter()
            elapsed = self._elapsed
            running, place = elapsed.clock.hand
            if not running:
                elapsed.clock.start(ended)  # a checkpoint may have been loaded in the block
            seconds = ended - self._began
            with elapsed.lock:
                shown = ended - place if running else place
                counted = shown - self._counted if shown > self._counted else 0.0
                # Before these or after them, but not in between, an interrupt may come.
                after = (elapsed.taken.plus(1, seconds, seconds, counted), False)
                elapsed.taken, self.running = after
                self._stop()

    def _stop(self) -> None:
        self.running = False
        self._elapsed.running.pop(self, None)
        if _innermost.get() is self:  # else it ends elsewhere, as a generator may
            _innermost.set(self.outer)

    def count(self, shown: float) -> None:
        """Let what has gone by until the clock showed `shown` count for the interval."""
        if shown > self._counted and self.running:
            taken = self._elapsed.taken.plus(0, 0.0, 0.0, shown - self._counted)
            self._elapsed.taken, self._counted = taken, shown

    def has(self, elapsed: Elapsed, thread: int) -> bool:
        """Return whether this use, or one that it is nested in, is of that timer and thread."""
        one: Timer | None = self
        while one is not None:
            if one._elapsed is elapsed and one.running and one._thread == thread:  # noqa: SLF001
                return True
            one = one.outer
        return False

    def __call__(self, func: Function) -> Function:
        if inspect.iscoroutinefunction(func):

            @functools.wraps(func)
            async def timed(*args: Any, **kwargs: Any) -> Any:
                with self._recreate_cm():
                    return await func(*args, **kwargs)

            return timed  # type: ignore[return-value]
        if inspect.isgeneratorfunction(func) or inspect.isasyncgenfunction(func):
            raise TypeError(
                f"a timer cannot decorate {func.__qualname__!r}: calling a generator function takes "
                "no time, for it runs when its items are asked for. Time the wait for each item, "
                "'for item in aggregator.timer(...).over(items)', or a block inside it"
            )
        return super().__call__(func)

    def _recreate_cm(self, memo: object = None) -> Timer:
        # Calls of a decorated function may be nested, and on several threads.
        return Timer(self._elapsed)

    # Of the same timer, for the same time goes by.
    __copy__ = __deepcopy__ = _recreate_cm

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a timer cannot be pickled: it belongs to its aggregator, which is bound to its process. "
            "Call timer() of an aggregator there"
        )

    def over(self, iterable: Iterable[T]) -> Iterator[T]:
        """Yield the items, and time the wait for each; the end is not waited for an item."""
        iterator = iter(iterable)
        use = self._recreate_cm()
        while True:
            use.__enter__()
            try:
                item = next(iterator)
            except StopIteration:
                use._stop()  # noqa: SLF001
                return
            except BaseException:
                use.__exit__()
                raise
            use.__exit__()
            yield item


_innermost: ContextVar[Timer | None] = ContextVar("metricfold timer", default=None)
"""The use that what runs here is nested in. A task has its own, and begins with its maker's."""
