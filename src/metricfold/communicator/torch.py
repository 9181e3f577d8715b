"""Ranks of `torch.distributed`, over gloo sockets of our own.

Each aggregator has a gloo group to itself: collectives of two aggregators cannot be mixed up, metrics
never queue behind NCCL kernels, and a timeout, which ends a gloo group, ends none of the user's.
README.md says how it is built.
"""

from __future__ import annotations

import concurrent.futures
import ipaddress
import os
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import wait
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from metricfold._core.fold.sample import FloatArray
from metricfold._core.runtime.processes import TaskThread, release_at_exit
from metricfold.communicator.base import Communicator, MissingRanksError
from metricfold.communicator.roll_call import (
    ANSWER,
    BEAT,
    EVERYWHERE,
    LATE,
    Place,
    RollCall,
    Words,
    first_line,
)
from metricfold.communicator.store import PolledStore, StoreClient, StoreGoneError, polled
from metricfold.communicator.tree import Merge, Step, steps

__all__ = ["TorchCommunicator"]

_CONNECT = 1.0
"""A connection gets at least so many seconds, and up to five times as many in all."""
_Gather: Any = vars(c10d)["AllgatherOptions"]  # which torch.distributed itself lacks
_NO_TAG = 2**31 - 1
"""Of a message that nobody waits for."""
_ROUNDS = 64
"""More than any exchange has."""
_WORDS = Words(
    "rank",
    "if rank == 0:",
    "This aggregator cannot talk to other ranks any more: make a new one on all ranks and load the "
    "last state",
)


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
        waits = _timeout_of(given or self._default_group) if timeout is None else timeout
        self._roll = RollCall(name, self.rank, ranks, waits.total_seconds(), _WORDS)
        members = "-".join(map(str, ranks)) if given is not None else "all"
        try:
            self._roll.board = self._store = StoreClient(
                c10d._get_default_store(),
                f"metricfold/{name}/{members}/{generation}",
                seconds=self._roll.seconds + ANSWER,
            )
        except RuntimeError as error:  # also a StoreGoneError
            raise self._roll.nobody_named(first_line(error)) from error
        self._group: Any = None
        self._polled: Any = None  # the group asks it, and does not keep what is Python's of it
        self._works: list[Any] = []
        self._until = 0.0
        self._released = False

    def current(self) -> bool:
        return dist.is_initialized() and c10d._get_default_group() is self._default_group

    def close(self) -> None:
        self._group = None
        with suppress(RuntimeError):
            self._roll.leave("closed")
            if self._store.add("closed", 1, seconds=ANSWER) >= self.world_size:
                everyone = range(self.world_size)
                keys = [f"{key}/{rank}" for key in ("met", "at", "end", "0") for rank in everyone]
                keys += ["met", "all met", "closed", "caller", "poison"]
                self._store.delete_all(keys, seconds=ANSWER)
        self._store.close()

    def release(self) -> None:
        """At exit: end the group while gloo's thread can still let go of what it holds."""
        self._released = True
        if not self._store.stuck:  # each aggregator of this process would wait for it
            with suppress(RuntimeError):
                self._roll.leave("ended")
        # It would also wait for an exchange that goes on, which the exit after an error must not.
        if self._roll.passed == self._roll.call:
            self._group = None
        self._store.close()

    def waits_for(self) -> tuple[int, ...]:
        if self._roll.passed == self._roll.call:
            return ()
        with suppress(RuntimeError):
            absent = list(self._without("met")) if self._group is None else self._roll.absent()
            return tuple(self._roll.ranks[rank] for rank in absent)
        return ()

    def abandon(self, why: str) -> None:
        self._close_pairs()
        if not self._released:
            with suppress(RuntimeError):
                self._roll.abandon(why)

    # -- Exchanges

    def _all_gather(self, vector: FloatArray) -> FloatArray:
        rows = np.empty((self.world_size, vector.size))
        options = _Gather()
        options.timeout = timedelta(seconds=self._roll.seconds)
        self._begin()
        with self._waiting(EVERYWHERE, 2.0):  # gloo itself gives up at the timeout
            flat = torch.from_numpy(rows.reshape(-1))
            self._works.append(self._group._allgather_base(flat, torch.from_numpy(vector), options))
        self._roll.finish()
        return rows

    def _tree(self, vector: FloatArray, merge: Merge) -> FloatArray:
        self._begin()
        for step in steps(self.rank, self.world_size):
            got = np.empty(vector.size)
            self._swap(step, vector, got)
            if step.receives:
                vector = step.after(vector, got, merge)
        self._roll.finish()
        return vector

    def _begin(self) -> None:
        if self._released:
            raise RuntimeError(
                f"aggregator {self._roll.name!r} has given its connection back, for the interpreter is "
                "exiting: reduce before that, or in an exit hook registered after metricfold is "
                "imported"
            )
        self._roll.begin()
        if self._group is None:
            self._group = self._connect()
        self._until = time.monotonic() + self._roll.seconds
        self._roll.watch()

    def _swap(self, step: Step, sent: FloatArray, got: FloatArray) -> None:
        """Send and receive, as `step` says."""
        # With the number of the exchange, what was cut off in one can match nothing in another.
        tag = (self._roll.call * _ROUNDS + step.round) % 2**31
        with self._waiting((step.partner, step.round)):
            if step.receives:
                self._works.append(self._group.recv([torch.from_numpy(got)], step.partner, tag))
            if step.sends:
                self._works.append(self._group.send([torch.from_numpy(sent)], step.partner, tag))

    @contextmanager
    def _waiting(self, at: tuple[int, int], longer: float = 0.0) -> Iterator[None]:
        """Wait for all that the block begins, for each once, until the deadline or so much longer.

        A wait that expires closes the connections to all ranks: one that comes later can then not
        complete what the others have given up.
        """
        self._roll.at = at
        try:
            yield
            while self._works:
                left = max(self._until + longer - time.monotonic(), 0.001)
                self._works[0].wait(timedelta(seconds=left))
                del self._works[0]
        except RuntimeError as error:
            raise self._diagnosed(error) from error
        self._roll.at = None  # who is long in merging must not seem to wait

    # -- Connecting

    def _connect(self) -> Any:
        """Build the group, after a meeting of all ranks, so that missing ones can be named."""
        until = time.monotonic() + self._roll.seconds
        try:
            self._meet(until)
            release_at_exit(self)
            # gloo tries five times to connect to each.
            once = max((until - time.monotonic()) / 5, _CONNECT)
            self._polled = PolledStore(self._store, until, ANSWER, self._roll.raise_if_poisoned)
            thread = TaskThread("metricfold-connects")
            group = thread.submit(partial(self._start, timedelta(seconds=once)))
            until = time.monotonic() + 5 * once + 2 * ANSWER
            # gloo waits for a rank that has failed as long as for any.
            while not wait([group], BEAT).done and time.monotonic() < until:
                self._roll.raise_if_poisoned(until - time.monotonic())
            return group.result(0.001)
        except StoreGoneError as gone:
            raise self._roll.nobody_named(str(gone)) from None
        except MissingRanksError:
            raise
        except (RuntimeError, TimeoutError, concurrent.futures.TimeoutError) as error:
            known = self._unconnected(error)
            # The others look as they wait, and the store may end with this rank.
            time.sleep(2 * BEAT)
            raise known from error

    def _start(self, once: timedelta) -> Any:
        """Let gloo connect all pairs."""
        options: Any = once
        if address := self._address_for_others():
            options = vars(c10d.ProcessGroupGloo)["_Options"]()
            options._devices = [c10d.ProcessGroupGloo.create_device(hostname=address)]
            options._timeout = once
        return c10d.ProcessGroupGloo(self._polled, self.rank, self.world_size, options)

    def _address_for_others(self) -> str:
        """Return where to listen; "" where that is gloo's to choose.

        It listens on the interface that its variable names, else where this host's name leads: many
        a system lets that be a loopback address, which is right where all ranks have one host alone.
        """
        if os.environ.get("GLOO_SOCKET_IFNAME") or not _is_loopback_by_name():
            return ""
        if _leads_elsewhere(mine := self._store.address):
            return mine
        # The store is on this host. Ranks of one host follow each other, so if there is another
        # host, it has the first or the last.
        here = self._roll.place(self.rank)
        for rank in {0, self.world_size - 1} - {self.rank}:
            place = self._roll.place(rank)
            if place is not None and place != here:
                return _facing(place.address) if _leads_elsewhere(place.address) else ""
        return ""

    def _meet(self, until: float) -> None:
        warn_at = until - self._roll.seconds + self._roll.patience

        def left() -> float:
            return max(until - time.monotonic(), 0.0) + ANSWER

        def look() -> None:
            nonlocal warn_at
            if (now := time.monotonic()) < min(warn_at, until):
                return
            self._roll.raise_if_poisoned(left())
            absent = self._without("met")
            if absent and now >= until:
                raise self._roll.named(absent, self._roll.did_not_come())
            self._roll.warn(absent)
            warn_at = until

        self._roll.raise_if_poisoned(left())
        # One key to look at, whatever the number of ranks: the last one to come sets it.
        if self._store.add("met", 1, seconds=left()) >= self.world_size:
            self._store.set("all met", "here", seconds=left())
        # Last, so that whoever stops in between is seen not to have come.
        self._roll.note_place(self._store.address, left())
        polled(lambda: self._store.get("all met", seconds=left()), until + ANSWER, look)

    def _without(self, key: str, said: str = "") -> dict[int, str]:
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        absent = [r for r in others if self._store.get(f"{key}/{r}", seconds=ANSWER) is None]
        return dict.fromkeys(absent, said)

    def _unconnected(self, error: Exception) -> MissingRanksError:
        """Return what to raise if the ranks that came cannot reach each other."""
        text = first_line(error)

        def find() -> MissingRanksError:
            self._roll.raise_if_poisoned()
            if not isinstance(error, RuntimeError) and (
                absent := self._without("0", "came, and has given no sign of life since")
            ):
                return self._roll.named(absent, self._roll.did_not_come())
            hint = self._interface_hint(text)
            failed = f"the connection between them failed on rank {self._roll.ranks[self.rank]}"
            return self._roll.given_up({}, f"no rank is missing, but {failed}: {text}. {hint}")

        return self._roll.judged(text, find)

    def _interface_hint(self, error: str) -> str:
        """Return which addresses the ranks listen on, and what to do if others cannot reach them."""
        named = os.environ.get("GLOO_SOCKET_IFNAME")
        if named and "Unable to find address for" in error:
            return (
                f"GLOO_SOCKET_IFNAME={named!r} must name network interfaces of {socket.gethostname()}, as "
                "they are, with commas between several: there is no exclusion by ^, as in NCCL's variable, "
                "and no part of a name"
            )
        found: dict[_Address, set[Place]] = {}  # and the hosts of those who listen there
        hosts = set()
        for rank in range(self.world_size):
            place = self._roll.place(rank)
            address = _address(self._store.get(f"0/{rank}", seconds=ANSWER) or b"")
            if place is not None:
                hosts.add(place)
                if address is not None:
                    found.setdefault(address, set()).add(place)
        for text in re.findall(r"\[([0-9a-fA-F.:]+)\]:\d+", error):
            with suppress(ValueError):
                found.setdefault(_plain(ipaddress.ip_address(text)), set())
        mine = self._store.address
        set_it = (
            "set GLOO_SOCKET_IFNAME on every host to the network interface that leads to the others, such "
            f"as the one that has {mine} on {socket.gethostname()}, by which that reaches the store"
            if _leads_elsewhere(mine)
            else "set GLOO_SOCKET_IFNAME on every host to the network interface that leads to the others, "
            "such as eth0"
        )
        if len(hosts) > 1:
            if (local := next((one for one in found if one.is_loopback), None)) is not None:
                return (
                    f"The ranks are on {len(hosts)} hosts, and {local} is a loopback address, which no "
                    f"other host can reach: {set_it}"
                )
            if (same := next((one for one in found if len(found[one]) > 1), None)) is not None:
                names = " and of ".join(sorted(place.host for place in found[same])[:5])
                return (
                    f"{same} is an address of {names}, each of which means itself by it, as by that of a "
                    f"bridge between containers: {set_it}"
                )
        some = ", ".join(sorted(map(str, found))[:5]) or "addresses that are not known"
        return (
            f"They listen on {some}. Look at the network between their hosts, which may let through the "
            "store's port alone, and whether GLOO_SOCKET_IFNAME names an interface that leads to the others"
        )

    # -- Missing ranks

    def _diagnosed(self, error: RuntimeError) -> MissingRanksError:
        """Find out which ranks are missing after an exchange has failed."""
        self.failed = True
        timed_out = time.monotonic() >= self._until - LATE / 5
        text = first_line(error)
        how = self._roll.did_not_come() if timed_out else f"the connection to them broke ({text})"
        broken = set() if timed_out else self._broken_pairs()
        self._close_pairs()
        verdict = partial(self._roll.verdict, how, timed_out=timed_out, broken=broken)
        return self._roll.judged(how, lambda: verdict() or self._unconnected(error))

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
        self._works.clear()  # they would keep the group


_Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address


def _address(published: bytes) -> _Address | None:
    """Return the IP address in what gloo has published of a rank.

    That is a host's name after its length, and a sockaddr after its length.
    """
    content = published[16 + int.from_bytes(published[:8], "little") :]
    family = int.from_bytes(content[:2], "little")
    with suppress(ValueError):
        one = ipaddress.ip_address(content[4:8] if family == socket.AF_INET else content[8:24])
        return _plain(one)
    return None


def _plain(address: _Address) -> _Address:
    return getattr(address, "ipv4_mapped", None) or address


def _is_loopback_by_name() -> bool:
    """Return whether gloo, left to itself, listens where no other host can reach it.

    It takes the first address of this host's name on which it can listen, and else a loopback address.
    """
    with suppress(OSError):
        known = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
        for family, _, _, _, where in known:
            with suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.bind(where)
                return not _leads_elsewhere(str(where[0]))
    return True


def _leads_elsewhere(address: str) -> bool:
    return bool(address) and not ipaddress.ip_address(address).is_loopback


def _facing(address: str) -> str:
    """Return the address of this host from which it would send to that one."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))  # sends nothing
        return str(probe.getsockname()[0])
    return ""


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
