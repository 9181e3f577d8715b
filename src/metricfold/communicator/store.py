"""Questions to the job's store, each with a deadline of our own.

What a `TCPStore` calls its timeout does not hold while the store's host is stopped: a question then
waits for ever, and holds a lock for which every later one waits. So questions are asked on a thread
of their own, of a clone of the store, whose connection no one else uses:

    client = StoreClient(job_store, "metricfold/0", seconds=30)
    client.set("key", "value", seconds=3)

README.md says why a process connects once, whatever the number of its aggregators, why no question
waits for a key, and what an exit does with a question that is open.
"""

from __future__ import annotations

import concurrent.futures
import math
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from torch.distributed import distributed_c10d as c10d

from metricfold._core.runtime.processes import TaskThread, release_at_exit, watch_forks

__all__ = ["PolledStore", "StoreClient", "StoreGoneError", "polled"]


_SLOW = 2.0
"""Seconds after which an answer was long in coming."""
_ENDING = 5.0
"""Seconds that a thread has to come back once it is cut off: under load it takes its time."""


class StoreGoneError(RuntimeError):
    """The store has not answered in time; it is not asked again until it has."""


class StoreClient:
    """Asks the store of a job, any of `torch.distributed`, under a prefix of all keys.

    Raises:
        StoreGoneError: it has not let itself be connected to within so many `seconds`.
    """

    def __init__(self, job_store: Any, prefix: str, seconds: float) -> None:
        self.where = _name_of(job_store)  # in messages
        self._prefix = prefix
        self._unanswered: Future[Any] | None = None
        try:
            self._connection: _Connection | None = _connections.to(job_store, seconds)
        except TimeoutError:
            raise self._gives_up() from None

    def ask(self, question: Callable[..., Any], *args: Any, seconds: float) -> Any:
        """Return ``question(store, *args)``, which must not wait for a key.

        Raises:
            StoreGoneError: this question was not answered in time, or an earlier one still is not.
            Exception: what the question raises.
        """
        before, connection = self._unanswered, self._connection
        if connection is None or (before is not None and not before.done()):
            raise self._gives_up()
        answer = connection.ask(question, self._prefix, *args)
        began = time.monotonic()
        try:
            return answer.result(max(seconds, 0.001))
        except concurrent.futures.TimeoutError:
            if answer.done():
                return answer.result()
            self._unanswered = connection.unanswered = answer
            raise self._gives_up() from None
        finally:
            if time.monotonic() - began > _SLOW:
                connection.slow_at = time.monotonic()

    @property
    def address(self) -> str:
        """The address of this host by which the store's is reached; "" of a store without a host."""
        return "" if self._connection is None else self._connection.address

    @property
    def stuck(self) -> bool:
        """Whether somebody in this process has waited in vain, and would still."""
        asked = None if self._connection is None else self._connection.unanswered
        return asked is not None and not asked.done()

    @property
    def slow_at(self) -> float:
        """When, on the monotonic clock, somebody in this process last waited long for an answer."""
        return -math.inf if self._connection is None else self._connection.slow_at

    def _gives_up(self) -> StoreGoneError:
        return StoreGoneError(f"{self.where} does not answer")

    def set(self, key: str, value: str | bytes, *, seconds: float) -> None:
        self.ask(c10d.Store.set, key, value, seconds=seconds)

    def get(self, key: str, *, seconds: float) -> bytes | None:
        """Return what `key` holds, or None where it was never set."""
        found: bytes | None = self.ask(_found, key, seconds=seconds)
        return found

    def add(self, key: str, number: int, *, seconds: float) -> int:
        return int(self.ask(c10d.Store.add, key, number, seconds=seconds))

    def set_first(self, key: str, value: str, *, seconds: float) -> bytes:
        """Set `key` unless it is set already, and return what it holds."""
        held = self.ask(c10d.Store.compare_set, key, "", value, seconds=seconds)
        return held or value.encode()

    def delete_all(self, keys: list[str], *, seconds: float) -> None:
        """Delete `keys`, or all that is under the prefix where the store can tell."""
        self.ask(_delete_all, keys, seconds=seconds)

    def close(self) -> None:
        self._connection = None


def polled(ask: Callable[[], bytes | None], until: float, look: Callable[[], object]) -> bytes:
    """Return what `ask` does once it returns something; between two questions comes a `look`.

    Raises:
        TimeoutError: there was nothing until that moment of the monotonic clock.
    """
    pause = 0.001
    while (found := ask()) is None:
        look()
        if time.monotonic() > until:
            raise TimeoutError("nobody has set what is waited for")
        time.sleep(pause)
        pause = min(2 * pause, 0.1)
    return found


class PolledStore(c10d.Store):
    """What gloo takes for a store: one that waits for keys by asking for them again and again.

    It waits `until` then for a key that another rank sets, and `seconds` longer for an answer; where
    pairs are connected at first use, also for a key. `look` raises what makes waiting vain.
    """

    def __init__(
        self, client: StoreClient, until: float, seconds: float, look: Callable[[], None]
    ) -> None:
        super().__init__()
        self._client = client
        self._until = until
        self._seconds = seconds
        self._look = look
        self._found: dict[str, bytes] = {}

    def set(self, key: str, value: Any) -> None:
        self._client.set(key, value, seconds=self._until - time.monotonic() + self._seconds)

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self._found.pop(key)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        until = max(self._until, time.monotonic() + self._seconds)
        for key in keys:
            if key not in self._found:
                self._found[key] = polled(partial(self._ask, key, until), until, self._look)

    def _ask(self, key: str, until: float) -> bytes | None:
        return self._client.get(key, seconds=until - time.monotonic() + self._seconds)

    def has_extended_api(self) -> bool:
        return False


# -- The connection that all clients of a process share ------------------------------------------


class _Connection:
    """A clone of the job's store, which one thread alone asks."""

    def __init__(self, job_store: Any, seconds: float) -> None:
        until = time.monotonic() + seconds
        bottom = _bottom_of(job_store)
        port = getattr(bottom, "port", None)
        before = _sockets_to(port)
        for handle in before.values():
            handle.close()
        opened = partial(_sockets_to, port, before.keys())
        self.slow_at = -math.inf
        self.unanswered: Future[Any] | None = None  # for what somebody last waited in vain
        self._sockets: list[socket.socket] = []
        self._end = weakref.finalize(self, _cut_off, self._sockets)
        self._thread = TaskThread("metricfold-store")
        release_at_exit(self)
        watch_forks(self)
        try:
            if port is not None:
                # A clone that is cut off tries again for as long as the job's store is told to,
                # which is minutes; a client of our own ends. So this one sees that the host lives.
                self._thread.submit(partial(_knock, bottom, until)).result(seconds)
            self._clone = self._thread.submit(job_store.clone).result(_seconds_to(until))
        except concurrent.futures.TimeoutError:
            self._give_up(opened)
            raise TimeoutError from None
        self._sockets += opened().values()

    @property
    def address(self) -> str:
        with suppress(OSError):  # its host has closed it
            for one in self._sockets:
                return str(one.getsockname()[0]).removeprefix("::ffff:")  # of IPv4 over IPv6
        return ""

    def ask(self, question: Callable[..., Any], prefix: str, *args: Any) -> Future[Any]:
        def answer() -> Any:
            # Where the host has ended, as it may before the other ranks do, torch would print a stack.
            if any(map(_is_hung_up, self._sockets)):
                raise RuntimeError("its host has closed the connection")
            return question(c10d.PrefixStore(prefix, self._clone), *args)

        return self._thread.submit(answer)

    def release(self) -> None:
        """At exit: leave no thread in C++."""
        if not self._thread.finish(0.2):
            self._end()
            self._thread.end(_ENDING)

    def leave_parent_behind(self) -> None:
        # The connection itself is the parent's, too.
        self._end.detach()

    def _give_up(self, opened: Callable[[], dict[Any, socket.socket]]) -> None:
        """Cut off what the thread has `opened`, again and again: it may connect only now, or anew."""
        self._end.detach()
        until = time.monotonic() + _ENDING
        while not self._thread.end(0.02) and time.monotonic() < until:
            _cut_off(opened().values())


class _Connections:
    """One connection to each store that this process knows: in effect one."""

    def __init__(self) -> None:
        self.leave_parent_behind()
        watch_forks(self)

    def leave_parent_behind(self) -> None:
        # One at a time, so that each can tell its sockets from another's, too.
        self._connecting = threading.Lock()
        self._to: weakref.WeakKeyDictionary[Any, _Connection] = weakref.WeakKeyDictionary()

    def to(self, job_store: Any, seconds: float) -> _Connection:
        until = time.monotonic() + seconds
        if not self._connecting.acquire(timeout=seconds):
            raise TimeoutError
        try:
            if (known := self._to.get(job_store)) is None:
                known = self._to[job_store] = _Connection(job_store, _seconds_to(until))
            return known
        finally:
            self._connecting.release()


_connections = _Connections()


def _knock(store: Any, until: float) -> None:
    """See that the store answers; over by `until`, or once its connection is cut off after that."""
    # Where nobody listens, torch's client would go on trying, with nothing to cut off.
    try:
        address = store.host, store.port
        socket.create_connection(address, timeout=_seconds_to(until)).close()
    except OSError as error:
        raise StoreGoneError(f"{_name_of(store)} does not answer ({error})") from None
    # It tries again only until its own timeout, which should have passed when it is cut off.
    timeout = timedelta(seconds=0.9 * _seconds_to(until))
    type(store)(store.host, store.port, None, False, timeout, False)


def _seconds_to(until: float) -> float:
    return max(until - time.monotonic(), 0.001)


def _is_hung_up(connected: socket.socket) -> bool:
    """Return whether the other side has closed; it owes no answer."""
    try:
        return not connected.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True


def _bottom_of(store: Any) -> Any:
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    return store


def _name_of(store: Any) -> str:
    bottom = _bottom_of(store)
    port = getattr(bottom, "port", None)
    return "the store" if port is None else f"the store at {bottom.host}:{port}"


def _cut_off(sockets: Iterable[socket.socket]) -> None:
    for handle in sockets:
        with suppress(OSError):
            handle.shutdown(socket.SHUT_RDWR)
        handle.close()


def _found(store: Any, key: str) -> bytes | None:
    return store.get(key) if store.check([key]) else None


def _delete_all(store: Any, keys: list[str]) -> None:
    with suppress(AttributeError, RuntimeError):  # from torch 2.9 on, and not of every store
        keys = store.list_keys()
    for key in keys:
        store.delete_key(key)


def _sockets_to(port: int | None, but: Collection[Any] = ()) -> dict[Any, socket.socket]:
    """Return handles of this process's connections to `port`, by their own addresses."""
    found: dict[Any, socket.socket] = {}
    folder = Path("/dev/fd")
    for path in folder.iterdir() if port is not None and folder.is_dir() else ():
        with suppress(OSError, IndexError):  # closed meanwhile, not connected, or of another family
            if path.is_socket():
                # A copy, so that the number cannot become another's.
                with socket.socket(fileno=os.dup(int(path.name))) as one:
                    if one.getpeername()[1] == port and one.getsockname() not in but:
                        found[one.getsockname()] = one.dup()
    return found
