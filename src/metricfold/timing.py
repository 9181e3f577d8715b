"""Timers: how long the parts of a step take, on the average, at most, and as a share of all time.

    with aggregator.timer("data"):
        batch = next(loader)

    for batch in aggregator.timer("data").over(loader):      # the same
        ...

A use adds to three numbers of its rank. Only when a reduction begins do they become metrics: so a
timer costs a microsecond, however often it is used. Three keys say all there is to say:

    data_seconds        MEAN    of one use
    data_seconds_max    MAX     of one use, and whose it was
    data_share          RATE    seconds per second: the share of the wall time, over ranks

The last is known per rank, on either route, and so is the slowest rank.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ContextDecorator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from metricfold.metric import AggregationType

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["Elapsed", "Timer", "TimerKeys", "Timing"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Timing:
    """What a timer took in the interval, over all ranks (`Snapshot.timing`).

    Args:
        mean: seconds of one use.
        max: seconds of the longest use.
        max_rank: the rank that the longest use was on; None if that is not known.
        share: of the interval's wall time, 0 to 1: the mean over ranks. More than 1 if several
            threads of a rank use the timer at the same time.
        slowest: the rank that spent the most time on it.
        slowest_share: its own share.
        fastest: the rank that spent the least; a rank that never used it spent none.
        fastest_share: its own share.
    """

    mean: float
    max: float
    max_rank: int | None
    share: float
    slowest: int
    slowest_share: float
    fastest: int
    fastest_share: float


@dataclass(frozen=True, slots=True)
class TimerKeys:
    """The names of the metrics that a timer gives."""

    mean: str
    max: str
    share: str

    @classmethod
    def of(cls, name: str) -> TimerKeys:
        return cls(f"{name}_seconds", f"{name}_seconds_max", f"{name}_share")

    def names(self) -> tuple[str, ...]:
        return self.mean, self.max, self.share

    def types(self) -> tuple[tuple[str, AggregationType], ...]:
        """Return each name with its aggregation."""
        return (
            (self.mean, AggregationType.MEAN),
            (self.max, AggregationType.MAX),
            (self.share, AggregationType.RATE),
        )


class Elapsed:
    """The times of one timer on one rank since the last reduction."""

    __slots__ = ("_inherited", "_lock", "longest", "total", "uses")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inherited = False
        self.uses, self.total, self.longest = 0, 0.0, 0.0

    def add(self, seconds: float) -> None:
        if self._inherited:
            raise RuntimeError(
                "this timer was inherited by a forked process, where its times would be lost: use "
                "it in the training process, around what waits for the data workers"
            )
        with self._lock:
            self.uses += 1
            self.total += seconds
            self.longest = max(self.longest, seconds)

    def take(self) -> tuple[int, float, float]:
        """Return how many uses there were, their total and the longest, and begin anew."""
        with self._lock:
            taken = (self.uses, self.total, self.longest)
            self.uses, self.total, self.longest = 0, 0.0, 0.0
            return taken

    def leave_parent_behind(self) -> None:
        """In a forked child: refuse what comes, for nobody will read it."""
        self._inherited = True


class Timer(ContextDecorator):
    """Times a block, each call of a function that it decorates, or the items of an iterable.

    One timer times one block at a time; `MetricsAggregator.timer` makes one for each use.
    """

    def __init__(self, add: Callable[[float], None]) -> None:
        self._add = add
        self._began = 0.0

    def __enter__(self) -> Timer:  # noqa: PYI034 - typing.Self needs Python 3.11
        self._began = time.perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._add(time.perf_counter() - self._began)

    def _recreate_cm(self) -> Timer:
        # Calls of a decorated function may be nested, and on several threads.
        return Timer(self._add)

    def over(self, iterable: Iterable[T]) -> Iterator[T]:
        """Yield the items, and time the wait for each; the end is not waited for an item."""
        iterator = iter(iterable)
        while True:
            began = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            self._add(time.perf_counter() - began)
            yield item
