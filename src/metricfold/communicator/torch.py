"""Ranks of `torch.distributed`, over gloo sockets of our own.

Each aggregator has a gloo group to itself, so collectives of two aggregators cannot be mixed up by
ranks that call them in different orders, metrics never queue behind NCCL kernels, and a timeout,
which ends a gloo group, ends none of the user's. The group is built on a clone of the job's store
under our own prefix. `torch.distributed.new_group` is never
called: made lazily, it would race with groups that the training script makes.
"""

from __future__ import annotations

import concurrent.futures
import ipaddress
import json
import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from metricfold._core.fold.sample import FloatArray
from metricfold._core.runtime.processes import TaskThread, release_at_exit, start_thread
from metricfold.communicator.base import Communicator, MissingRanksError, likely_cause
from metricfold.communicator.store import PolledStore, StoreClient, StoreGoneError

__all__ = ["TorchCommunicator"]

_logger = logging.getLogger("metricfold")

_FIRST_WAIT = 10.0
"""After so many seconds a warning names who is missing."""
_BEAT = 0.5
"""A rank that waits longer than so many seconds says so in the store, and goes on saying it."""
_ANSWER = 3.0
"""For so many seconds the store is waited for where nothing else gives a deadline."""
_END = 4.5
"""A rank says so many seconds after the timeout at the latest that the store does not answer."""
_CONNECT = 1.0
"""A connection gets at least so many seconds, and up to five times as many in all."""
_LATE = 0.25
"""A rank that met broken connections within so many seconds came after the others had given up."""
_POISON = "poison"


class _Sign(NamedTuple):
    """What a rank has let the others see of itself.

    Args:
        state: ``"waits"``, ``"broke"``, ``"gave up"``, ``"done"``, ``"closed"`` or ``"ended"``.
        beat: of one that waits: how often it has said so. Else the seconds it had waited.
    """

    state: str
    beat: float


class TorchCommunicator(Communicator):
    """Ranks of a `torch.distributed` job.

    Raises:
        MissingRanksError: the job's store does not answer.
    """

    def __init__(
        self, name: str, process_group: Any, timeout: timedelta | None, generation: int
    ) -> None:
        self._default_group = c10d._get_default_group()
        given = _as_group(process_group)
        ranks = dist.get_process_group_ranks(given or self._default_group)
        self.rank = dist.get_rank(given)
        self.world_size = len(ranks)
        self._ranks = ranks
        self._name = name
        self._timeout = _timeout_of(given or self._default_group) if timeout is None else timeout
        members = "-".join(map(str, ranks)) if given is not None else "all"
        try:
            self._store = StoreClient(
                c10d._get_default_store(),
                f"metricfold/{name}/{members}/{generation}",
                seconds=self._timeout.total_seconds() + _ANSWER,
            )
        except StoreGoneError as gone:
            raise self._nobody_named(str(gone)) from None
        except RuntimeError as error:
            raise self._nobody_named(_first_line(error)) from error
        self._calls = 0
        self._passed = 0
        self._group: Any = None
        self._polled: Any = None  # the group asks it, and does not keep what is Python's of it
        self._work: Any = None
        self._released = False

    def current(self) -> bool:
        return dist.is_initialized() and c10d._get_default_group() is self._default_group

    def close(self) -> None:
        self._group = None
        with suppress(RuntimeError):
            self._leave("closed")
            if self._store.add("closed", 1, seconds=_ANSWER) >= self.world_size:
                everyone = range(self.world_size)
                keys = [f"{key}/{rank}" for key in ("met", "at", "end", "0") for rank in everyone]
                keys += ["met", "all met", "closed", "caller", _POISON]
                self._store.delete_all(keys, seconds=_ANSWER)
        self._store.close()

    def release(self) -> None:
        """At exit: end the group while gloo's thread can still let go of what it holds.

        That thread may hold the tensors of a collective for a moment after it is done. Letting go
        of them takes the interpreter, and a C++ thread that asks for it while it is torn down
        aborts the process. The group's destructor waits for the thread.
        """
        self._released = True
        if not self._store.stuck:  # each aggregator of this process would wait for it
            with suppress(RuntimeError):
                self._leave("ended")
        # It would also wait for a collective that goes on, which the exit after an error must not.
        if self._work is None or self._work.is_completed():
            self._group = None
        self._store.close()

    def waits_for(self) -> tuple[int, ...]:
        if self._passed == self._calls:
            return ()
        with suppress(RuntimeError):
            if self._group is None:
                absent = list(self._without("met"))
            else:
                absent = [rank for rank, sign in self._signs(self._calls).items() if sign is None]
            return tuple(self._ranks[rank] for rank in absent)
        return ()

    def abandon(self, why: str) -> None:
        self._close_pairs()
        if not self._released:
            with suppress(RuntimeError):
                self._given_up({self.rank: ""}, f"it left a reduction in the middle: {why}")

    # -- Collectives

    def _all_gather(self, vector: FloatArray) -> FloatArray:
        rows = np.empty((self.world_size, vector.size))
        options = _Gather()
        options.timeout = self._timeout
        self._run(
            lambda: self._group._allgather_base(
                torch.from_numpy(rows.reshape(-1)), torch.from_numpy(vector), options
            )
        )
        return rows

    def _all_reduce(self, vector: FloatArray, op: Literal["sum", "max"]) -> FloatArray:
        reduced = vector.copy()
        options = dist.AllreduceOptions()
        options.timeout = self._timeout
        options.reduceOp = dist.ReduceOp(dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX)
        self._run(lambda: self._group.allreduce([torch.from_numpy(reduced)], options))
        return reduced

    def _run(self, issue: Callable[[], Any]) -> None:
        if self._released:
            raise RuntimeError(
                f"aggregator {self._name!r} has given its connection back, for the interpreter is "
                "exiting: reduce before that, or in an exit hook registered after metricfold is "
                "imported"
            )
        self._calls += 1
        if self._group is None:
            self._group = self._connect()
        started = time.monotonic()
        try:
            self._work = issue()
            self._wait(self._work)
        except RuntimeError as error:
            raise self._diagnosed(error, time.monotonic() - started) from error
        self._work = None
        self._passed = self._calls

    def _wait(self, work: Any) -> None:
        first = min(_BEAT, self._seconds / 4)
        try:
            work.wait(timedelta(seconds=first))
        except RuntimeError:
            pass  # it is not done yet, or has failed: the wait below tells
        else:
            return
        done = threading.Event()
        with suppress(RuntimeError):  # no thread to be had: nobody hears that this rank waits
            start_thread(self._say_that_it_waits, done, self._calls, name="metricfold-waits")
        try:
            # gloo itself gives up at the timeout, and closes the connection as it does: a rank
            # that comes later can then not complete what the others have given up.
            work.wait(timedelta(seconds=self._seconds - first + 4 * _BEAT))
        finally:
            done.set()

    @property
    def _seconds(self) -> float:
        return self._timeout.total_seconds()

    @property
    def _patience(self) -> float:
        """Seconds until a warning."""
        return min(_FIRST_WAIT, self._seconds / 2)

    # -- Connecting

    def _connect(self) -> Any:
        """Build the group; all ranks meet here first, so that missing ones can be named."""
        until = time.monotonic() + self._seconds
        try:
            self._meet(until)
            release_at_exit(self)
            # gloo tries five times to connect to each.
            once = max((until - time.monotonic()) / 5, _CONNECT)
            self._polled = PolledStore(self._store, until, _ANSWER, self._raise_if_poisoned)
            group: Future[Any] = Future()
            start = partial(c10d.ProcessGroupGloo, self._polled, self.rank, self.world_size)
            TaskThread("metricfold-connects").submit(partial(start, timedelta(seconds=once)), group)
            return group.result(5 * once + 2 * _ANSWER)
        except StoreGoneError as gone:
            raise self._nobody_named(str(gone)) from None
        except MissingRanksError:
            raise
        except (RuntimeError, TimeoutError, concurrent.futures.TimeoutError) as error:
            raise self._unconnected(error) from error

    def _meet(self, until: float) -> None:
        def left() -> float:
            return max(until - time.monotonic(), 0.0) + _ANSWER

        self._store.set(f"met/{self.rank}", socket.gethostname(), seconds=left())
        self._raise_if_poisoned(left())
        # One key to look at, whatever the number of ranks: the last one to come sets it.
        if self._store.add("met", 1, seconds=left()) >= self.world_size:
            self._store.set("all met", "here", seconds=left())
        warn_at = until - self._seconds + self._patience
        pause, warned = 0.001, False
        while self._store.get("all met", seconds=left()) is None:
            now = time.monotonic()
            if now >= until or (now >= warn_at and not warned):
                self._raise_if_poisoned(left())
                absent = self._without("met")
                if absent and now >= until:
                    raise self._named(absent, self._did_not_come())
                self._warn(absent)
                warned = True
            time.sleep(pause)
            pause = min(2 * pause, 0.1)

    def _without(self, key: str, said: str = "") -> dict[int, str]:
        """Return the other ranks that have not set a key of theirs yet."""
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        absent = [r for r in others if self._store.get(f"{key}/{r}", seconds=_ANSWER) is None]
        return dict.fromkeys(absent, said)

    def _unconnected(self, error: Exception) -> MissingRanksError:
        """Return what to raise if the ranks that came cannot reach each other."""
        text = _first_line(error)
        try:
            self._raise_if_poisoned()
            if not isinstance(error, RuntimeError) and (
                absent := self._without("0", "came, and has given no sign of life since")
            ):
                return self._named(absent, self._did_not_come())
            hint = self._interface_hint(text)
            failed = f"the connection between them failed on rank {self._ranks[self.rank]}"
            return self._given_up({}, f"no rank is missing, but {failed}: {text}. {hint}")
        except MissingRanksError as known:
            return known
        except RuntimeError as gone:
            return self._nobody_named(f"{text}; {_first_line(gone)}")

    def _interface_hint(self, error: str) -> str:
        """Return which addresses the ranks listen on, and what to do if others cannot reach them."""
        everyone = range(self.world_size)
        hosts = {self._store.get(f"met/{rank}", seconds=_ANSWER) for rank in everyone} - {None}
        found = re.findall(r"\[([0-9a-fA-F.:]+)\]:\d+", error)
        for rank in everyone:
            address = _address(self._store.get(f"0/{rank}", seconds=_ANSWER) or b"")
            found += [address] * (address is not None)
        local = next((address for address in found if _is_loopback(address)), None)
        if local is not None and len(hosts) > 1:
            return (
                f"The ranks are on {len(hosts)} hosts, and {local} is a loopback address, which no "
                "other host can reach: set GLOO_SOCKET_IFNAME on every host to the network interface "
                "that leads to the others, such as eth0"
            )
        some = ", ".join(sorted(set(found))[:5]) or "addresses that are not known"
        return (
            f"They listen on {some}. Look at the network between their hosts, and whether "
            "GLOO_SOCKET_IFNAME names an interface that leads to the others"
        )

    # -- Missing ranks

    def _say_that_it_waits(self, done: threading.Event, call: int) -> None:
        """Note in the store that this rank waits, as long as it does; on a thread of its own."""
        started, beats, warned = time.monotonic(), 0, False

        def left() -> float:
            # A rank that gave up its notes while the store is away for a moment would be named.
            return max(started + self._seconds - time.monotonic(), 0.0) + _ANSWER

        with suppress(RuntimeError):  # the store is gone: who waits will hear
            while not done.wait(_BEAT / 2 if not beats else _BEAT):
                beats += 1
                note = json.dumps([call, "waits", beats])
                self._store.set(f"at/{self.rank}", note, seconds=left())
                if not warned and time.monotonic() - started >= self._patience - _BEAT:
                    warned = True
                    signs = self._signs(call, left())
                    absent = [rank for rank, sign in signs.items() if sign is None]
                    if not done.wait(_BEAT):
                        self._warn({r: "" for r in absent if self._sign(r, call, left()) is None})
            if beats and self._passed >= call:
                self._sign_off("done", call)

    def _sign_off(
        self, state: str, call: int, waited: float = 0.0, seconds: float = _ANSWER
    ) -> None:
        """Let the others see how this rank's call has ended."""
        self._store.set(f"end/{self.rank}", json.dumps([call, state, waited]), seconds=seconds)

    def _leave(self, state: str) -> None:
        """Let the others see that this rank takes part in nothing any more."""
        if self._calls and self.world_size > 1:
            self._sign_off(state, self._calls)

    def _sign(self, rank: int, call: int, seconds: float = _ANSWER) -> _Sign | None:
        """Return what `rank` has let see of itself in `call`, since, or in one that holds it up.

        None: it was not there. Of a gather some ranks may be through, and in the next call, while
        others still wait for one that has stopped.
        """
        done = -1
        for key in ("end", "at"):
            if (text := self._store.get(f"{key}/{rank}", seconds=seconds)) is None:
                continue
            its_call, state, beat = json.loads(text)
            if its_call >= call or (state != "done" and its_call > done):
                return _Sign(state, beat)
            done = its_call
        return None

    def _signs(self, call: int, seconds: float = _ANSWER) -> dict[int, _Sign | None]:
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        return {rank: self._sign(rank, call, seconds) for rank in others}

    def _roll_call(self, *, timed_out: bool) -> dict[int, str]:
        """Return who is missing from this call, and what they have said of themselves.

        Nobody is named after one look: a rank may have come just now, or beat slowly.
        """

        def missing(before: _Sign | None, now: _Sign | None) -> bool:
            if now is None or now.state in ("closed", "ended"):
                return True
            if now.state == "waits":
                return now == before
            return timed_out and before is None and now.state == "broke" and now.beat < _LATE

        first = self._signs(self._calls)
        time.sleep(2 * _BEAT)
        found = {r: s for r in first if missing(first[r], s := self._sign(r, self._calls))}
        if any(sign is not None and sign.state == "waits" for sign in found.values()):
            time.sleep(3 * _BEAT)
            found = {r: s for r, b in found.items() if missing(b, s := self._sign(r, self._calls))}
        return {rank: _SAID.get(sign.state, "") if sign else "" for rank, sign in found.items()}

    def _diagnosed(self, error: RuntimeError, waited: float) -> MissingRanksError:
        """Find out which ranks are missing after a collective has failed."""
        self.failed = True
        timed_out = waited >= self._seconds - _LATE / 5
        text = _first_line(error)
        how = self._did_not_come() if timed_out else f"the connection to them broke ({text})"
        broken = set() if timed_out else self._broken_pairs()
        try:
            # First, for who meets connections that are closed looks here for the reason.
            left = min(max(self._seconds + _END - waited, 1.0), _ANSWER)
            self._sign_off("gave up" if timed_out else "broke", self._calls, waited, left)
            self._close_pairs()
            if (known := self._verdict_of_another()) is not None:
                return known
            missing = self._roll_call(timed_out=timed_out)
            if not timed_out:
                # A rank whose connection is whole is only slow to come.
                missing = {r: said for r, said in missing.items() if r in broken or said}
            if missing:
                return self._named(missing, how)
            return self._unconnected(error)
        except StoreGoneError as gone:
            return self._nobody_named(f"{how}; {gone}")
        except RuntimeError as gone:
            # With the store went the rank that served it.
            return self._nobody_named(f"{how}; {self._store.where} is gone ({_first_line(gone)})")
        finally:
            self._close_pairs()

    def _broken_pairs(self) -> set[int]:
        """Return the ranks to which nothing can be sent any more."""
        broken = set()
        for rank in range(self.world_size):
            if rank != self.rank:
                try:
                    self._group.send([torch.zeros(1)], rank, _NO_TAG)
                except RuntimeError:
                    broken.add(rank)
        return broken

    def _close_pairs(self) -> None:
        """Close all connections, so that whoever waits for this rank hears at once.

        Neither `abort` nor letting go of the group does. A wait that expires does: gloo gives up the
        whole context then.
        """
        group, self._group = self._group, None
        if group is not None and self.world_size > 1:
            with suppress(RuntimeError):
                receiving = group.recv_anysource([torch.zeros(1)], _NO_TAG)
                receiving.wait(timedelta(milliseconds=1))
        self._work = None

    def _verdict_of_another(self) -> MissingRanksError | None:
        """Let one rank call the roll for all; returns its verdict, or None if this rank is the one."""
        if (said := self._store.get(_POISON, seconds=_ANSWER)) is not None:
            return self._from_verdict(said)
        caller = self._store.set_first("caller", str(self.rank), seconds=_ANSWER)
        if int(caller) == self.rank:
            return None
        until = time.monotonic() + 7 * _BEAT
        while time.monotonic() < until:
            if (said := self._store.get(_POISON, seconds=_ANSWER)) is not None:
                return self._from_verdict(said)
            time.sleep(_BEAT / 5)
        return None

    def _named(self, missing: Mapping[int, str], how: str) -> MissingRanksError:
        """Give those up that are missing by all that the store says."""
        if self._store.slow_at < time.monotonic() - 2 * _ANSWER:
            return self._given_up(missing, how)
        # They may have given the store up, and what they had to say with it.
        return self._given_up({}, self._untold(f"{how}; {self._store.where} has answered late"))

    def _given_up(self, missing: Mapping[int, str], how: str) -> MissingRanksError:
        """Record the verdict, the first rank's for all, and return it as an error."""
        verdict = json.dumps({"missing": list(missing.items()), "how": how})
        return self._from_verdict(self._store.set_first(_POISON, verdict, seconds=_ANSWER))

    def _raise_if_poisoned(self, seconds: float = _ANSWER) -> None:
        if (said := self._store.get(_POISON, seconds=seconds)) is not None:
            raise self._from_verdict(said)

    def _did_not_come(self) -> str:
        return f"they did not come within {self._seconds:g} s"

    def _from_verdict(self, verdict: bytes) -> MissingRanksError:
        content = json.loads(verdict)
        missing, how = dict(content["missing"]), content["how"]
        if not missing:
            return MissingRanksError(f"aggregator {self._name!r}: {how}. {_RECOVERY}")
        who = ", ".join(str(self._ranks[rank]) for rank in missing)
        for rank, said in missing.items():
            how += f"; rank {self._ranks[rank]} {said}" if said else ""
        return MissingRanksError(
            f"aggregator {self._name!r}: missing from a collective call: rank(s) {who} of "
            f"{self.world_size}; {how}. {likely_cause(how, 'rank', 'if rank == 0:')}. {_RECOVERY}",
            [self._ranks[rank] for rank in missing],
        )

    def _nobody_named(self, how: str) -> MissingRanksError:
        return MissingRanksError(f"aggregator {self._name!r}: {self._untold(how)}. {_RECOVERY}")

    @staticmethod
    def _untold(how: str) -> str:
        return (
            f"a collective call failed, and who is missing cannot be told: {how}. Most likely the "
            "process or host that serves the store has stopped or ended, or has too much to do"
        )

    def _warn(self, missing: Mapping[int, str]) -> None:
        if missing:
            _logger.warning(
                "aggregator %r: rank %d has waited %.0f s in a collective call for rank(s) %s; "
                "giving up after %.0f s",
                self._name,
                self._ranks[self.rank],
                self._patience,
                ", ".join(str(self._ranks[rank]) for rank in missing),
                self._seconds,
            )


_Gather: Any = vars(c10d)["AllgatherOptions"]  # which torch.distributed itself lacks
_NO_TAG = 2**31 - 1  # of a message that nobody waits for
_SAID = {
    "closed": "had closed its aggregator",
    "ended": "has ended",
    "waits": "has stopped: it was in the call, and has given no sign of life since",
}
_RECOVERY = (
    "This aggregator cannot talk to other ranks any more: make a new one on all ranks and load the "
    "last state"
)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:300]


def _address(published: bytes) -> str | None:
    """Return the IP address in what gloo has published of a rank.

    That is a host's name after its length, and a sockaddr after its length.
    """
    place = 16 + int.from_bytes(published[:8], "little")
    family = int.from_bytes(published[place : place + 2], "little")
    content = published[place:]
    with suppress(ValueError):
        if family == socket.AF_INET:
            return str(ipaddress.IPv4Address(content[4:8]))
        if family == socket.AF_INET6:
            return str(ipaddress.IPv6Address(content[8:24]))
    return None


def _is_loopback(address: str) -> bool:
    with suppress(ValueError):
        found = ipaddress.ip_address(address)
        return (getattr(found, "ipv4_mapped", None) or found).is_loopback
    return False


def _as_group(process_group: Any) -> Any:
    """Return the group behind `process_group`, which may be one dimension of a `DeviceMesh`."""
    if process_group is None:
        return None
    if hasattr(process_group, "get_group") and hasattr(process_group, "ndim"):
        if process_group.ndim != 1:
            raise ValueError(
                f"process_group is a DeviceMesh of {process_group.ndim} dimensions: pass one of "
                f"them, such as mesh[{(process_group.mesh_dim_names or ('data',))[0]!r}]"
            )
        return process_group.get_group()
    if process_group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(
            f"rank {dist.get_rank()} is not in the process_group: make the aggregator on the ranks "
            "of the group only"
        )
    if not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            f"process_group={process_group!r}: pass a torch.distributed group, or one dimension "
            "of a DeviceMesh"
        )
    return process_group


def _timeout_of(group: Any) -> timedelta:
    """Return how long the training group itself waits."""
    for device in ("cuda", "cpu"):
        try:
            options = group._get_backend(torch.device(device)).options
        except RuntimeError:
            continue
        found = getattr(options, "_timeout", None)
        if isinstance(found, timedelta):
            return found
    return c10d.default_pg_timeout
