"""Processes of `jax.distributed`: JAX's own collectives between them, and JAX's own coordinator.

What JAX does with its devices must be begun in the same order on all processes. So collectives are
issued on the caller's thread, in the order of the program, like a training step; from a thread of
our own they would meet another process's training step.

A device collective that some process does not join hangs without a word. So before each, all
processes meet at the coordinator, which takes a millisecond; one that does not come is named, and
JAX goes on working. Numbers travel as the bits of float64, whatever ``jax_enable_x64`` says, and
are added on the host in the order of ranks: the same bits everywhere.

JAX itself is not imported: only a training script that has initialised it comes here.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import cache
from typing import Any

import numpy as np

from metricfold._core.fold.sample import FloatArray
from metricfold._core.runtime.processes import DeferredInterrupt
from metricfold.communicator.base import Communicator, MissingRanksError, jax_job, likely_cause

__all__ = ["JaxCommunicator"]

_logger = logging.getLogger("metricfold")

_TIMEOUT = timedelta(minutes=10)
_FIRST_WAIT = 10.0
"""After so many seconds a warning names who is missing."""
_GRACE = 0.25
"""How long processes that came at about the same time get to record themselves."""
_SMALLEST = 256
"""Vectors are filled up to at least so many numbers: shorter ones cost as much."""
_ONE_STEP = 1 << 20
"""Up to so many bytes in all, an all-reduce is one all-gather."""


_OF_THE_NETWORK = re.compile(
    "gloo|nccl|rccl|connect|peer|socket|network|barrier|coordinat|unavailable|deadline|aborted|task",
    re.IGNORECASE,
)
"""In what is raised for the sake of another process; anything else is this one's own fault."""


class JaxCommunicator(Communicator):
    """All processes of a JAX job, one rank each.

    Args:
        name: pairs this communicator with those of the other processes.
        timeout: how long to wait for missing processes; None: ten minutes.
        generation: tells several of one name apart.

    Raises:
        RuntimeError: `jax.distributed.initialize` has not been called.
    """

    any_thread = False

    def __init__(self, name: str, timeout: timedelta | None = None, generation: int = 0) -> None:
        job = jax_job()
        if job is None:
            raise RuntimeError(
                "JAX knows of no other processes: call jax.distributed.initialize() first"
            )
        self.rank = int(job.process_id)
        self.world_size = int(job.num_processes)
        self._client: Any = job.client
        self._name = name
        self._timeout = _TIMEOUT if timeout is None else timeout
        self._prefix = f"metricfold/{name}/{generation}"
        self._calls = 0
        self._mesh: Any = None
        self._interrupt = DeferredInterrupt()

    def current(self) -> bool:
        job = jax_job()
        return job is not None and job.client is self._client

    def close(self) -> None:
        self._mesh = None

    def interrupts_deferred(self) -> DeferredInterrupt:
        # A process that left between two collectives would keep the others from training on.
        return self._interrupt

    def abandon(self, why: str) -> None:
        with suppress(Exception):  # the coordinator is gone: nobody can be told
            self._given_up([self.rank], f"it left a reduction in the middle: {why}")

    # -- Collectives

    def _all_gather(self, vector: FloatArray) -> FloatArray:
        return self._run(lambda: self._gathered(vector))

    def _run(self, collective: Callable[[], FloatArray]) -> FloatArray:
        self._calls += 1
        try:
            self._meet()
            if self._mesh is None:
                self._mesh = self._connect()
            # A user who steps through a program uncompiled would get no collective here.
            with sys.modules["jax"].disable_jit(False):
                return collective()
        except MissingRanksError:
            raise
        # A process that is killed after the meeting lets JAX raise a bare ValueError here, for one.
        except Exception as error:
            raise self._broken(error) from error

    def _gathered(self, vector: FloatArray) -> FloatArray:
        """Return everyone's vector, shape (n,), as rows of shape (world_size, n)."""
        gather = _gathering(self._mesh)
        rows = self._read(gather(self._spread(_filled(vector, _room(vector.size)))))
        return rows.reshape(self.world_size, -1)[:, : vector.size].copy()

    def _spread(self, mine: FloatArray) -> Any:
        """Return an array whose first axis is the processes, of which each brings `mine`."""
        jax = sys.modules["jax"]
        bits = mine.view(np.uint32)[np.newaxis]
        sharding = jax.NamedSharding(self._mesh, jax.P("ranks"))
        local = jax.device_put(bits, self._mesh.devices[self.rank])
        return jax.make_array_from_single_device_arrays(
            (self.world_size, *bits.shape[1:]), sharding, [local]
        )

    @staticmethod
    def _read(array: Any) -> FloatArray:
        bits = np.ascontiguousarray(sys.modules["jax"].device_get(array.addressable_data(0)))
        return bits.view(np.float64)

    def _connect(self) -> Any:
        """Build a mesh of one device of each process, in the order of ranks."""
        jax = sys.modules["jax"]
        # Each says which is its own: the backend may count the processes in another order.
        mine = jax.local_devices()[0]
        self._client.key_value_set(f"{self._prefix}/device/{self.rank}", str(mine.id))
        self._meet()
        ids = self._read_all("device")
        devices = {device.id: device for device in jax.devices()}
        ranked = [devices[int(ids[rank])] for rank in range(self.world_size)]
        return jax.sharding.Mesh(np.array(ranked), ("ranks",))

    # -- Missing processes

    def _meet(self) -> None:
        """Wait until all processes are here.

        The coordinator tells all the same: a process that comes to a meeting too late hears at once
        that it was given up. So all go on to the second meeting alike, or none.
        """
        total = self._timeout.total_seconds()
        first = min(_FIRST_WAIT, total / 2)
        started = time.monotonic()
        if self._all_came("first", first):
            return
        self._raise_if_poisoned()
        # Who waits for a process that may never come must not have to wait until the timeout.
        self._interrupt.deliver()
        self._record()
        waited = time.monotonic() - started
        if waited >= first / 2:
            time.sleep(_GRACE)
            self._warn(waited)
        if not self._all_came("second", total - first):
            self._raise_if_poisoned()
            raise self._given_up(self._absent(), f"they did not come within {total:g} s")

    def _all_came(self, meeting: str, seconds: float) -> bool:
        # The coordinator numbers the meetings of one name: a new name each time would pile up there.
        milliseconds = max(int(seconds * 1000), 1)
        try:
            self._client.wait_at_barrier(f"{self._prefix}/{meeting}", milliseconds)
        except RuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            return False
        return True

    @property
    def _call(self) -> str:
        return f"call-{self._calls}"

    def _record(self) -> None:
        """Let the others see that this process waits in this call."""
        self._client.key_value_set(
            f"{self._prefix}/{self._call}/{self.rank}", "here", allow_overwrite=True
        )

    def _absent(self) -> list[int]:
        """Return the processes that have not recorded themselves in this call."""
        here = self._read_all(self._call)
        return [rank for rank in range(self.world_size) if rank not in here]

    def _read_all(self, folder: str) -> dict[int, str]:
        entries = self._client.key_value_dir_get(f"{self._prefix}/{folder}/")
        return {int(key.rpartition("/")[2]): value for key, value in entries}

    def _broken(self, error: Exception) -> MissingRanksError:
        """Find out which processes are missing after a collective has failed."""
        text = (str(error) or "no message").splitlines()[0][:300]
        what = f"{type(error).__name__}: {text}"
        how = f"the connection to them broke ({what})"
        try:
            self._raise_if_poisoned()
            if not _OF_THE_NETWORK.search(text):
                return self._given_up([self.rank], f"it left a reduction in the middle: {what}")
            self._record()
            # Those to whom the same has happened record themselves: nobody is named after one look.
            time.sleep(4 * _GRACE)
            if self._absent():
                time.sleep(4 * _GRACE)
            self._raise_if_poisoned()
            return self._given_up(self._absent(), how)
        except MissingRanksError as known:
            return known
        except Exception as gone:  # noqa: BLE001 - the coordinator is gone too
            first = (str(gone) or type(gone).__name__).splitlines()[0][:200]
            return self._missing([], f"{how}; JAX's coordinator does not answer ({first})")

    def _given_up(self, missing: list[int], how: str) -> MissingRanksError:
        """Record the verdict, the first process's for all, and return it as an error."""
        verdict = json.dumps({"missing": missing, "how": how})
        try:
            self._client.key_value_set(f"{self._prefix}/poison", verdict)
        except RuntimeError as error:
            if "ALREADY_EXISTS" not in str(error):
                raise
            self._raise_if_poisoned()
        return self._from_verdict(verdict)

    def _raise_if_poisoned(self) -> None:
        try:
            verdict = self._client.key_value_try_get(f"{self._prefix}/poison")
        except RuntimeError as error:
            if "NOT_FOUND" not in str(error):
                raise
            return
        raise self._from_verdict(verdict)

    def _from_verdict(self, verdict: str) -> MissingRanksError:
        content = json.loads(verdict)
        return self._missing(content["missing"], content["how"])

    def _missing(self, missing: list[int], how: str) -> MissingRanksError:
        who = ", ".join(map(str, missing)) or "unknown"
        return MissingRanksError(
            f"aggregator {self._name!r}: missing from a collective call: process(es) {who} of "
            f"{self.world_size}; {how}. "
            f"{likely_cause(how, 'process', 'if jax.process_index() == 0:')}. This aggregator cannot talk to other processes any more, but JAX can: "
            "make a new aggregator on all processes and load the last state",
            missing,
        )

    def _warn(self, waited: float) -> None:
        missing = self._absent()
        if missing:
            _logger.warning(
                "aggregator %r: process %d has waited %.0f s in a collective call for process(es) "
                "%s; giving up after %.0f s",
                self._name,
                self.rank,
                waited,
                ", ".join(map(str, missing)),
                self._timeout.total_seconds(),
            )


@cache
def _gathering(mesh: Any) -> Callable[[Any], Any]:
    """Return an all-gather of what `_spread` returns, for all of one mesh."""
    jax = sys.modules["jax"]

    def metricfold_gather(array: Any) -> Any:
        return array

    return jax.jit(metricfold_gather, out_shardings=jax.NamedSharding(mesh, jax.P()))  # type: ignore[no-any-return]


def _room(size: int) -> int:
    """Return `size`, rounded up by at most an eighth.

    JAX compiles a program for each size, in tenths of a second; so few sizes serve all.
    """
    step = 1 << max((max(size, 1) - 1).bit_length() - 4, 0)
    return max(-(-size // step) * step, _SMALLEST)


def _filled(vector: FloatArray, size: int) -> FloatArray:
    filled = np.zeros(size)
    filled[: vector.size] = vector
    return filled
