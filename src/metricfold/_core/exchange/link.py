"""What binds an aggregator to its counterparts on the other ranks.

One connection, one thread, one call at a time. What a call cuts off when it begins is put back if it
fails, unless other ranks may have merged it. Then the link is dead, since what this rank sent next
would be of another size than what the others expect.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol, TypeVar

from metricfold._core.exchange.reducer import Outcome
from metricfold._core.runtime.processes import Worker
from metricfold.communicator import (
    Communicator,
    LocalCommunicator,
    MissingRanksError,
    connect,
)

__all__ = ["Link", "Task"]

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

_order_of_creation = itertools.count()
_namesakes: dict[str, itertools.count[int]] = {}

_leaked: list[Communicator] = []
"""What forked children have inherited. A group's destructor would wait for threads that only the
parent has, so it must not run there."""


class Task(Protocol[T_co]):
    """One call that all ranks make."""

    @property
    def outcome(self) -> Outcome: ...

    def begin(self, communicator: Communicator) -> None:
        """Cut off what has accumulated, on the caller's thread."""

    def finish(self) -> T_co:
        """Take part, on whatever thread."""

    def put_back(self) -> None:
        """Put back what has been cut off."""


class Link:
    """Connects the aggregators of one name.

    Args:
        name: theirs; None: by the order of creation.
        process_group: the ranks, as `MetricsAggregator` takes it.
        timeout: how long to wait for missing ranks.
        communicator: in the place of a connection of its own.

    Attributes:
        dead: why no call can be made any more.
        communicator: of the last call.
    """

    def __init__(
        self,
        name: str | None,
        process_group: Any,
        timeout: timedelta | None,
        communicator: Communicator | None,
    ) -> None:
        self.name = f"{next(_order_of_creation)}" if name is None else name
        # A second aggregator of one name pairs with the second ones on the other ranks.
        self._namesake = next(_namesakes.setdefault(self.name, itertools.count()))
        self._process_group = process_group
        self._timeout = timeout
        self._is_own = communicator is None
        self.communicator = communicator
        self.dead: Exception | None = None
        self._generation = 0
        self._past_collectives = 0
        self._worker: Worker | None = None
        self._in_flight: Future[Any] | None = None
        self._calls = threading.RLock()
        self._process = os.getpid()

    @property
    def collectives(self) -> int:
        """How many have been issued so far."""
        return self._past_collectives + getattr(self.communicator, "collectives", 0)

    # -- Whether anything can come

    def check(self) -> None:
        """Raise if nothing may come in any more, or not in this process."""
        if self._process != os.getpid():
            raise RuntimeError(
                f"aggregator {self.name!r} was inherited by a forked process, where its values "
                "would be lost: in data workers emit metrics with a MetricTransform and "
                "MetricsCollator, and update in the training process"
            )
        if self.dead is not None and not isinstance(self.dead, MissingRanksError):
            raise self.dead.with_traceback(None)

    def check_whole(self) -> None:
        """Raise if one state has not quite taken the place of another."""
        if isinstance(self.dead, _HalfwayError):
            raise self.dead.with_traceback(None)

    def check_replaceable(self) -> None:
        """Raise if no other state may take the place of this one."""
        if not isinstance(self.dead, _HalfwayError):
            self.check()

    @contextmanager
    def replacing(self) -> Iterator[None]:
        """Refuse everything else, should an interrupt come until the block has replaced all state."""
        if not isinstance(self.dead, _HalfwayError):
            self.dead = _HalfwayError(self.name, self.dead)
        halfway = self.dead
        yield
        self.dead = halfway.before

    # -- Calls

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Wait for a call under way, and let no other begin; what it raises is its future's to tell."""
        with self._calls:
            if self._in_flight is not None:
                self._in_flight.exception()
                self._in_flight = None
            yield

    def run(self, task: Task[T]) -> T:
        """Make a call on this thread."""
        with self.alone():
            try:
                task.begin(self._connect())
                return task.finish()
            except BaseException as error:
                self._undo(task, error)
                raise

    def start(self, task: Task[T]) -> Future[T]:
        """Begin a call on this thread, and finish it in the background."""
        claim = threading.Lock()
        with self.alone():
            try:
                communicator = self._connect()
                task.begin(communicator)
                if not communicator.any_thread:
                    return _done(lambda: self._finish_there(task, claim))
                if self._worker is None:
                    self._worker = Worker(f"metricfold-{self.name}")
                future: Future[T] = Future()
                self._in_flight = future
                self._worker.submit(lambda: self._finish_there(task, claim), future)
            except BaseException as error:
                # The worker may have it already, and then goes on with it.
                if claim.acquire(blocking=False):
                    self._in_flight = None
                    self._undo(task, error)
                raise
            return future

    def _finish_there(self, task: Task[T], claim: threading.Lock) -> T:
        """Finish a call on the worker's thread, unless its beginner has claimed it back."""
        if not claim.acquire(blocking=False):
            raise RuntimeError("what was cut off for this reduction has been put back")
        try:
            return task.finish()
        except BaseException as error:
            self._undo(task, error)
            raise

    def _undo(self, task: Task[Any], error: BaseException) -> None:
        """Put back what a call has cut off, unless other ranks may have merged it."""
        if task.outcome is Outcome.MERGED:
            return
        if task.outcome is not Outcome.OPEN:
            task.put_back()
        elif isinstance(error, MissingRanksError):
            self.dead = error
        else:
            why = f"{type(error).__name__}: {error}".rstrip(": ")
            self.dead = MissingRanksError(
                f"aggregator {self.name!r}: this rank left a reduction in the middle ({why}), and the "
                "others may have finished it. This aggregator cannot talk to other ranks any more: "
                "make a new one on all ranks and load the last state"
            )
            assert self.communicator is not None
            self.communicator.abandon(why)

    # -- The connection

    def _connect(self) -> Communicator:
        """Return what connects the ranks now; a replaced process group is bound anew."""
        self.check()
        if self.dead is not None:
            raise self.dead.with_traceback(None)
        before = self.communicator
        if before is not None and (not self._is_own or before.current()):
            return before
        generation = 0 if before is None else self._generation + 1
        name = f"{self.name}/{self._namesake}" if self._namesake else self.name
        now = connect(name, self._process_group, self._timeout, generation)
        if before is not None:
            if before.world_size > 1 and isinstance(now, LocalCommunicator):
                raise RuntimeError(
                    f"the process group of aggregator {self.name!r} is gone, and with it the "
                    "other ranks' share: reduce before destroy_process_group() or "
                    "jax.distributed.shutdown(). "
                    "state_dict(sync=False) has the state as of the last reduction"
                )
            self._past_collectives += before.collectives
            before.close()
        self.communicator, self._generation = now, generation
        return now

    def waits_for(self) -> tuple[int, ...]:
        """Return the ranks of the whole job that a call under way waits for, as far as can be told."""
        return () if self.communicator is None else self.communicator.waits_for()

    def has_failed(self) -> bool:
        """Return whether the call under way has failed, and only looks for who was missing."""
        return self.communicator is not None and self.communicator.failed

    def close(self) -> None:
        """Finish what is under way and give the connection back."""
        with self.alone():
            self._worker = None
            if self.communicator is not None and self._is_own:
                self.communicator.close()
            self.dead = self.dead or RuntimeError(
                f"aggregator {self.name!r} is closed: make a new one"
            )

    def leave_parent_behind(self) -> None:
        """In a forked child: a new lock, for ours may be held by a thread that is not here."""
        self._calls = threading.RLock()
        self._in_flight = self._worker = None
        if self.communicator is not None:
            _leaked.append(self.communicator)


class _HalfwayError(RuntimeError):
    """One state has not quite taken the place of another.

    Args:
        name: of the aggregator.
        before: what made it unusable before that.
    """

    def __init__(self, name: str, before: Exception | None) -> None:
        super().__init__(
            f"aggregator {name!r} holds parts of two states, for load_state_dict() or reset() was "
            "interrupted: call it again"
        )
        self.before = before


def _done(task: Callable[[], T]) -> Future[T]:
    """Return the finished future of `task`, run here and now."""
    future: Future[T] = Future()
    try:
        future.set_result(task())
    except Exception as error:  # noqa: BLE001 - the future's reader gets it
        future.set_exception(error)
    return future
