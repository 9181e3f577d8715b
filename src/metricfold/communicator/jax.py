"""Processes of `jax.distributed`: JAX's own collectives between them, and JAX's own coordinator.

What JAX does with its devices must be begun in the same order on all processes, so collectives are
issued on the caller's thread, like a training step. One that some process does not join hangs without a
word: so before each exchange all processes meet at the coordinator, and one that does not come is named.
Numbers travel as the bits of float64, whatever ``jax_enable_x64`` says, and are merged on the host.

JAX itself is not imported: only a training script that has initialised it comes here.
"""

from __future__ import annotations

import math
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
from metricfold.communicator.base import Communicator, MissingRanksError, jax_job
from metricfold.communicator.roll_call import ANSWER, RollCall, Words, first_line
from metricfold.communicator.tree import Merge, senders, steps

__all__ = ["JaxCommunicator"]

_TIMEOUT = timedelta(minutes=10)
_GRACE = 0.25
"""Seconds that processes which came at about the same time get to record themselves."""
_SMALLEST = 256
"""Vectors are filled up to at least so many numbers: shorter ones cost as much."""
_OF_THE_NETWORK = re.compile(
    "gloo|nccl|rccl|connect|peer|socket|network|barrier|coordinat|unavailable|deadline|aborted|task",
    re.IGNORECASE,
)
"""In what is raised for the sake of another process; anything else is this one's own fault."""


_UNKNOWN = -1.0
_WORDS = Words(
    "process",
    "if jax.process_index() == 0:",
    "This aggregator cannot talk to other processes any more, but JAX can: make a new aggregator on "
    "all processes and load the last state",
)


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
        seconds = (_TIMEOUT if timeout is None else timeout).total_seconds()
        self._prefix = f"metricfold/{name}/{generation}"
        self._roll = RollCall(name, self.rank, range(self.world_size), seconds, _WORDS)
        self._roll.board = _Coordinator(self._client, self._prefix)
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
            self._roll.abandon(why)

    # -- Exchanges

    def _all_gather(self, vector: FloatArray) -> FloatArray:
        return self._run(lambda: self._gathered(vector))

    def _tree(self, vector: FloatArray, merge: Merge) -> FloatArray:
        return self._run(lambda: self._merged(vector, merge))

    def _run(self, exchange: Callable[[], FloatArray]) -> FloatArray:
        self._roll.begin()
        try:
            self._meet()
            if self._mesh is None:
                self._mesh = self._connect()
            jax = sys.modules["jax"]
            # A user who steps through a program uncompiled would get no collective here, nor one
            # who has set a mesh of his own.
            with jax.disable_jit(False), jax.set_mesh(self._mesh):
                result = exchange()
        except MissingRanksError:
            raise
        # A process that is killed after the meeting lets JAX raise a bare ValueError here, for one.
        except Exception as error:
            raise self._broken(error) from error
        self._roll.finish()
        return result

    def _gathered(self, vector: FloatArray) -> FloatArray:
        gather = _gathering(self._mesh)
        rows = self._read(gather(self._spread(_filled(vector))))
        return rows.reshape(self.world_size, -1)[:, : vector.size].copy()

    def _merged(self, vector: FloatArray, merge: Merge) -> FloatArray:
        """Go through the rounds of a tree, all of them on all processes, as device programs must.

        So one that cannot merge, or whose partner is gone, goes on, and so do those who hear that
        from it: behind each vector stands 1 + the rank that failed, or -1 where that is not known.
        """
        failed, size = 0.0, vector.size
        broke: Exception | None = None
        mine = {step.round: step for step in steps(self.rank, self.world_size)}
        for number, pairs in senders(self.world_size).items():
            sent = _filled(np.append(vector, failed))
            step = mine.get(number)
            self._roll.at = None if step is None else (step.partner, number)
            try:
                got = self._read(_swap(self._mesh, pairs)(self._spread(sent))).reshape(-1)
            except Exception as error:  # noqa: BLE001 - raised below
                failed, broke = failed or _UNKNOWN, broke or error
                continue
            if step is None or not step.receives or failed:
                continue
            try:
                failed = float(got[size])
                vector = vector if failed else step.after(vector, got[:size], merge)
            except Exception as error:  # noqa: BLE001 - the others must be told before it is raised
                failed = 1.0 + self.rank
                self.abandon(f"{type(error).__name__}: {first_line(error)}")
        if failed > 0:
            raise self._roll.given_up({int(failed) - 1: ""}, "it left a reduction in the middle")
        if failed:
            raise broke or RuntimeError("the connection of another process broke")
        return vector

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
        self._roll.note_place("", ANSWER)
        self._client.key_value_set(f"{self._prefix}/device/{self.rank}", str(mine.id))
        self._meet()
        entries = self._client.key_value_dir_get(f"{self._prefix}/device/")
        ids = {int(key.rpartition("/")[2]): int(value) for key, value in entries}
        devices = {device.id: device for device in jax.devices()}
        return jax.sharding.Mesh(np.array([devices[ids[rank]] for rank in sorted(ids)]), ("ranks",))

    # -- Missing processes

    def _meet(self) -> None:
        """Wait until all processes are here.

        The coordinator tells all the same: a process that comes to a meeting too late hears at once
        that it was given up. So all go on to the second meeting alike, or none.
        """
        started = time.monotonic()
        if self._all_came("first", self._roll.patience):
            return
        self._roll.raise_if_poisoned()
        # Who waits for a process that may never come must not have to wait until the timeout.
        self._interrupt.deliver()
        self._roll.note_here()
        if time.monotonic() - started >= self._roll.patience / 2:
            time.sleep(_GRACE)
            self._roll.warn(dict.fromkeys(self._roll.absent()))
        if not self._all_came("second", self._roll.seconds - self._roll.patience):
            self._roll.raise_if_poisoned()
            absent = dict.fromkeys(self._roll.absent(), "")
            raise self._roll.given_up(absent, self._roll.did_not_come())

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

    def _broken(self, error: Exception) -> MissingRanksError:
        """Find out which processes are missing after a collective has failed."""
        what = f"{type(error).__name__}: {first_line(error)}"
        how = f"the connection to them broke ({what})"

        def find() -> MissingRanksError:
            self._roll.raise_if_poisoned()
            if not _OF_THE_NETWORK.search(what):
                reason = f"it left a reduction in the middle: {what}"
                return self._roll.given_up({self.rank: ""}, reason)
            known = self._roll.verdict(how, timed_out=False)
            return known or self._roll.given_up({}, f"no process is missing, but {how}")

        return self._roll.judged(how, find)


class _Coordinator:
    """JAX's coordinator, as a place to leave notes; it gives no deadlines."""

    where = "JAX's coordinator"
    slow_at = -math.inf

    def __init__(self, client: Any, prefix: str) -> None:
        self._client, self._prefix = client, prefix

    def set(self, key: str, value: str, *, seconds: float) -> None:
        self._client.key_value_set(f"{self._prefix}/{key}", value, allow_overwrite=True)

    def get(self, key: str, *, seconds: float) -> bytes | None:
        try:
            found: str = self._client.key_value_try_get(f"{self._prefix}/{key}")
        except RuntimeError as error:
            if "NOT_FOUND" not in str(error):
                raise
            return None
        return found.encode()

    def set_first(self, key: str, value: str, *, seconds: float) -> bytes:
        try:
            self._client.key_value_set(f"{self._prefix}/{key}", value)
        except RuntimeError as error:
            if "ALREADY_EXISTS" not in str(error):
                raise
            return self.get(key, seconds=seconds) or value.encode()
        return value.encode()


@cache
def _gathering(mesh: Any) -> Callable[[Any], Any]:
    """Return an all-gather of what `_spread` returns, for all of one mesh."""
    jax = sys.modules["jax"]

    def metricfold_gather(array: Any) -> Any:
        return array

    return jax.jit(metricfold_gather, out_shardings=jax.NamedSharding(mesh, jax.P()))  # type: ignore[no-any-return]


@cache
def _swap(mesh: Any, pairs: tuple[tuple[int, int], ...]) -> Callable[[Any], Any]:
    """Return a program that sends what `_spread` returns from the first of each pair to the second."""
    jax = sys.modules["jax"]

    def metricfold_swap(array: Any) -> Any:
        return jax.lax.ppermute(array, "ranks", pairs)

    ranks = jax.P("ranks")
    swap = jax.shard_map(metricfold_swap, mesh=mesh, in_specs=ranks, out_specs=ranks)
    return jax.jit(swap)  # type: ignore[no-any-return]


def _filled(vector: FloatArray) -> FloatArray:
    """Return `vector` with zeros behind it, so that its size grows by at most an eighth.

    JAX compiles a program for each size, in tenths of a second; so few sizes serve all.
    """
    step = 1 << max((max(vector.size, 1) - 1).bit_length() - 4, 0)
    room = max(-(-vector.size // step) * step, _SMALLEST)
    return np.pad(vector, (0, room - vector.size))
