"""Questions to the job's store, each with a deadline of our own.

What a `TCPStore` calls its timeout does not hold while the store's host is stopped: a question then
waits for ever, and holds a lock for which every later one waits. So questions are asked on a thread
of their own, of a clone of the store, whose connection no one else uses:

    client = StoreClient(job_store, "metricfold/0", seconds=30)
    client.set("key", "value", seconds=3)

A thread that comes back from C++ while the interpreter is torn down aborts the process. So none is
left behind: at its deadline the clone's socket is shut down, and the question returns with an error.
"""

from __future__ import annotations

import os
import queue
import socket
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from torch.distributed import distributed_c10d as c10d

from metricfold.processes import start_thread

__all__ = ["StoreClient", "StoreGoneError"]

_cloning = threading.Lock()  # so that two that are cloned at once can tell their sockets apart


class StoreGoneError(RuntimeError):
    """The store has not answered in time; it is not asked again."""


class StoreClient:
    """Asks a clone of `job_store`, under a prefix.

    Args:
        job_store: any store of `torch.distributed`.
        prefix: of all keys.
        seconds: until when the store must have let itself be cloned.

    Raises:
        StoreGoneError: it has not.

    Attributes:
        where: what a message calls the store, with host and port where it has these.
    """

    def __init__(self, job_store: Any, prefix: str, seconds: float) -> None:
        bottom = job_store
        while hasattr(bottom, "underlying_store"):
            bottom = bottom.underlying_store
        port = getattr(bottom, "port", None)
        self.where = "the store" if port is None else f"the store at {bottom.host}:{port}"
        self._gone = False
        self._sockets: list[socket.socket] = []
        self._questions: queue.SimpleQueue[Any] = queue.SimpleQueue()
        # It holds the queue alone, so that it keeps nobody alive who asks.
        self._thread = start_thread(_answer, self._questions, name="metricfold-store")
        self._end = weakref.finalize(self, self._questions.put, None)
        self._end.atexit = False
        until = time.monotonic() + seconds
        if not _cloning.acquire(timeout=seconds):
            raise self._gives_up()
        try:
            before = _open_files()

            def ask(question: Callable[[], Any]) -> Any:
                left = max(until - time.monotonic(), 0.0)
                return self.ask(question, seconds=left, sockets=lambda: _new_sockets(before, port))

            if port is not None:
                # A clone that is cut off tries again for as long as the job's store is told to,
                # which is minutes; a client of our own ends. So this one sees that the host lives.
                ask(partial(_knock, bottom, seconds))
            clone = ask(job_store.clone)
            self._sockets = _new_sockets(before, port)
        finally:
            _cloning.release()
        self.store = c10d.PrefixStore(prefix, clone)

    def ask(
        self,
        question: Callable[..., Any],
        *args: Any,
        seconds: float,
        sockets: Callable[[], list[socket.socket]] | None = None,
    ) -> Any:
        """Return ``question(*args)``, which is called on the thread that asks.

        Args:
            question: such as a method of `store`.
            args: for the question.
            seconds: to wait for its answer.
            sockets: finds what to shut down if there is none; default: the clone's.

        Raises:
            StoreGoneError: this question, or an earlier one, was not answered in time.
            Exception: what the question raises.
        """
        if self._gone:
            raise self._gives_up()
        answer: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._questions.put((question, args, answer))
        try:
            value, error = answer.get(timeout=max(seconds, 0.001))
        except queue.Empty:
            self._gone = True
            if sockets is not None:
                self._sockets = sockets()
            self.close()
            raise self._gives_up() from None
        if error is not None:
            raise error
        return value

    def set(self, key: str, value: str, *, seconds: float) -> None:
        self.ask(self.store.set, key, value, seconds=seconds)

    def get(self, key: str, *, seconds: float) -> bytes | None:
        """Return what `key` holds, or None where it was never set."""
        found: bytes | None = self.ask(_found, self.store, key, seconds=seconds)
        return found

    def add(self, key: str, number: int, *, seconds: float) -> int:
        return int(self.ask(self.store.add, key, number, seconds=seconds))

    def set_first(self, key: str, value: str, *, seconds: float) -> bytes:
        """Set `key` unless it is set already, and return what it holds."""
        held = self.ask(self.store.compare_set, key, "", value, seconds=seconds)
        return held or value.encode()

    def delete_all(self, keys: list[str], *, seconds: float) -> None:
        """Delete `keys`, and what else is under the prefix where the store can tell."""
        self.ask(_delete_all, self.store, keys, seconds=seconds)

    def close(self) -> None:
        """Give the thread back: it is idle, or its connection is cut off here."""
        for handle in self._sockets if self._gone else ():
            with suppress(OSError):
                handle.shutdown(socket.SHUT_RDWR)
        self._gone = True
        self._end()
        self._thread.join(2.0)
        for handle in self._sockets:
            handle.close()
        self._sockets = []

    def _gives_up(self) -> StoreGoneError:
        return StoreGoneError(f"{self.where} does not answer")


def _answer(questions: queue.SimpleQueue[Any]) -> None:
    while (item := questions.get()) is not None:
        question, args, answer = item
        try:
            answer.put((question(*args), None))
        except BaseException as error:  # noqa: BLE001 - it is raised where it was asked
            answer.put((None, error))
        del item, question, args, answer


def _knock(store: Any, seconds: float) -> None:
    """See that the store answers; over in `seconds`, or once its connection is cut off after these."""
    # Where nobody listens, torch's client would go on trying, with nothing to cut off.
    try:
        socket.create_connection((store.host, store.port), timeout=seconds).close()
    except OSError as error:
        raise StoreGoneError(
            f"the store at {store.host}:{store.port} does not answer ({error})"
        ) from None
    # It tries again only until its own timeout, which must have passed when it is cut off.
    timeout = timedelta(seconds=max(0.75 * seconds, 1.0))
    type(store)(store.host, store.port, None, False, timeout, False)


def _found(store: Any, key: str) -> bytes | None:
    return store.get(key) if store.check([key]) else None


def _delete_all(store: Any, keys: list[str]) -> None:
    with suppress(AttributeError, RuntimeError):  # from torch 2.9 on, and not of every store
        keys = store.list_keys()
    for key in keys:
        store.delete_key(key)


def _open_files() -> set[tuple[int, int]]:
    """Return number and inode of each: numbers are used again, also that of listing the folder."""
    found = set()
    folder = Path("/dev/fd")
    for name in (path.name for path in folder.iterdir()) if folder.is_dir() else ():
        with suppress(OSError, ValueError):
            found.add((int(name), os.fstat(int(name)).st_ino))
    return found


def _new_sockets(before: set[tuple[int, int]], port: int | None) -> list[socket.socket]:
    """Return handles of the connections to `port` that are open now and were not `before`."""
    found = []
    for number, _ in _open_files() - before if port is not None else ():
        try:
            # A copy, so that the number cannot become another's.
            handle = socket.socket(fileno=os.dup(number))
        except OSError:  # no socket, or closed meanwhile
            continue
        with suppress(OSError, IndexError):  # not connected, or of another family
            if handle.getpeername()[1] == port:
                found.append(handle)
                continue
        handle.close()
    return found
