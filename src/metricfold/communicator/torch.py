"""Ranks of `torch.distributed`, over gloo sockets of our own.

Each aggregator has a gloo group to itself, so collectives of two aggregators cannot be mixed up by
ranks that call them in different orders, metrics never queue behind NCCL kernels, and a timeout,
which ends a gloo group, ends none of the user's. The group is built on a clone of the job's store
under our own prefix. `torch.distributed.new_group` is never
called: made lazily, it would race with groups that the training script makes.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from metricfold.communicator.base import Communicator, MissingRanksError, likely_cause
from metricfold.pool import FloatArray
from metricfold.processes import release_at_exit

__all__ = ["TorchCommunicator"]

_logger = logging.getLogger("metricfold")

_FIRST_WAIT = 10.0
"""After so many seconds a warning names who is missing."""
_GRACE = 0.5
"""How long ranks that came at about the same time get to record themselves."""
_POISON = "poison"


class TorchCommunicator(Communicator):
    """Ranks of a `torch.distributed` job."""

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
        # A clone has a connection of its own: one that waits does not hold up the job's.
        job_store: Any = c10d._get_default_store()
        self._store = c10d.PrefixStore(
            f"metricfold/{name}/{members}/{generation}", job_store.clone()
        )
        self._calls = 0
        self._group: Any = None
        self._work: Any = None
        self._released = False

    def current(self) -> bool:
        return dist.is_initialized() and c10d._get_default_group() is self._default_group

    def close(self) -> None:
        self._group = None

    def release(self) -> None:
        """At exit: end the group while gloo's thread can still let go of what it holds.

        That thread may hold the tensors of a collective for a moment after it is done. Letting go
        of them takes the interpreter, and a C++ thread that asks for it while it is torn down
        aborts the process. The group's destructor waits for the thread.
        """
        self._released = True
        # It would also wait for a collective that goes on, which the exit after an error must not.
        if self._work is None or self._work.is_completed():
            self._group = None

    # -- Collectives

    def _all_gather(self, vector: FloatArray) -> FloatArray:
        rows = np.empty((self.world_size, vector.size))
        self._run(
            lambda: self._group._allgather_base(
                torch.from_numpy(rows.reshape(-1)), torch.from_numpy(vector)
            )
        )
        return rows

    def _all_reduce(self, vector: FloatArray, op: Literal["sum", "max"]) -> FloatArray:
        reduced = vector.copy()
        options = dist.AllreduceOptions()
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
        started = time.monotonic()
        try:
            if self._group is None:
                self._group = self._connect()
            self._work = issue()
        except MissingRanksError:
            raise
        except RuntimeError as error:
            raise self._diagnosed(error, started) from error
        self._wait(self._work)
        self._work = None

    # -- Missing ranks

    def _connect(self) -> Any:
        """Build the group; all ranks meet here first, so that missing ones can be named."""
        self._record("met")
        # One key to look at, whatever the number of ranks: the last one to come sets it.
        if self._store.add("met", 1) >= self.world_size:
            self._store.set("all met", "")
        started = time.monotonic()
        first, rest = self._waits()
        pause, warned = 0.001, False
        while not self._store.check(["all met"]):
            waited = time.monotonic() - started
            if waited >= first + rest:
                raise self._given_up(self._absent("met"))
            if waited >= first and not warned:
                self._raise_if_poisoned()
                self._warn(self._absent("met"))
                warned = True
            time.sleep(pause)
            pause = min(2 * pause, 0.1)
        release_at_exit(self)
        return c10d.ProcessGroupGloo(self._store, self.rank, self.world_size, self._timeout)

    def _wait(self, work: Any) -> None:
        started = time.monotonic()
        first, rest = self._waits()
        try:
            work.wait(timedelta(seconds=first))
        except RuntimeError as error:
            if work.is_completed():
                raise self._diagnosed(error, started) from error
        else:
            return
        self._record(self._call)
        # Let ranks that came at about the same time record themselves too.
        time.sleep(_GRACE / 2)
        if not work.is_completed():
            self._warn(self._absent(self._call))
        try:
            # gloo itself gives up at the timeout, and closes the connection as it does: a rank
            # that comes later can then not complete what the others have given up.
            work.wait(timedelta(seconds=rest + 4 * _GRACE))
        except RuntimeError as error:
            raise self._diagnosed(error, started) from error

    @property
    def _call(self) -> str:
        return f"call-{self._calls}"

    def _waits(self) -> tuple[float, float]:
        """Return the seconds until a warning, and from there until giving up."""
        total = self._timeout.total_seconds()
        first = min(_FIRST_WAIT, total / 2)
        return first, total - first

    def _record(self, call: str) -> None:
        """Let the others see that this rank waits in `call`."""
        self._store.set(f"{call}/{self.rank}", "here")

    def _absent(self, call: str) -> list[int]:
        """Return the ranks that have not recorded themselves in `call`."""
        return [
            rank
            for rank in range(self.world_size)
            if rank != self.rank and not self._store.check([f"{call}/{rank}"])
        ]

    def _diagnosed(self, error: RuntimeError, started: float) -> RuntimeError:
        """Find out which ranks are missing after a collective has failed."""
        try:
            if time.monotonic() - started >= self._timeout.total_seconds():
                # Who waited that long has recorded itself long ago.
                return self._given_up(self._absent(self._call))
            # The others may have given up because this rank is late: then they say so by now.
            time.sleep(_GRACE)
            self._raise_if_poisoned()
            self._record(self._call)
            time.sleep(_GRACE)
            missing = self._absent(self._call)
            return self._given_up(missing, f"the connection to them broke ({error})")
        except MissingRanksError as known:
            return known
        except RuntimeError:
            # The store is gone too, and with it the rank that served it.
            return self._missing([], f"the connection to the other ranks broke ({error})")

    def _given_up(self, missing: list[int], how: str = "") -> MissingRanksError:
        """Record the verdict, the first rank's for all, and return it as an error."""
        how = how or f"they did not come within {self._timeout.total_seconds():g} s"
        verdict = json.dumps({"missing": missing, "how": how})
        agreed = self._store.compare_set(_POISON, "", verdict)
        return self._from_verdict(agreed or verdict.encode())

    def _raise_if_poisoned(self) -> None:
        if self._store.check([_POISON]):
            raise self._from_verdict(self._store.get(_POISON))

    def _from_verdict(self, verdict: bytes) -> MissingRanksError:
        content = json.loads(verdict)
        return self._missing(content["missing"], content["how"])

    def _missing(self, missing: list[int], how: str) -> MissingRanksError:
        who = ", ".join(str(self._ranks[rank]) for rank in missing) or "unknown"
        return MissingRanksError(
            f"aggregator {self._name!r}: missing from a collective call: rank(s) {who} of "
            f"{self.world_size}; {how}. {likely_cause(how, 'rank', 'if rank == 0:')}. This aggregator "
            "cannot talk to other ranks any more: make a new one on all ranks and load the last state",
            [self._ranks[rank] for rank in missing],
        )

    def _warn(self, missing: list[int]) -> None:
        if missing:
            _logger.warning(
                "aggregator %r: rank %d has waited %.0f s in a collective call for rank(s) %s; "
                "giving up after %.0f s",
                self._name,
                self._ranks[self.rank],
                self._waits()[0],
                ", ".join(str(self._ranks[rank]) for rank in missing),
                self._timeout.total_seconds(),
            )


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
