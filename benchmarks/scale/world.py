"""Many ranks in one process: a few are real, the others repeat what those send.

    world = World(16_384, real=4)
    snapshots = world.run(lambda communicator: ...)     # once for each real rank

Real ranks are threads that take turns: each runs alone until it enters a collective, and once all
have entered, each gets what it would get among `size` ranks. Rank r repeats real rank r % real, so
an all-gather really returns `size` rows. An all-reduce multiplies instead of adding the same numbers
over and over: adding is what the network does, and no part of a rank's own work.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import numpy as np

from benchmarks.scale.meter import Meter
from benchmarks.scale.model import Collective, Kind
from metricfold.communicator import Communicator
from metricfold.pool import FloatArray

__all__ = ["SimulatedCommunicator", "World"]

T = TypeVar("T")
Operation = Literal["gather", "sum", "max", "sum of real ranks"]

_PATIENCE = 600.0
"""Seconds that a rank may compute until it is given up."""


class _WorldEndedError(BaseException):
    """Ends a rank whose further part nobody asks for."""


class World:
    """Ranks connected by `communicators`.

    Args:
        size: number of ranks.
        real: how many of them exist: ranks 0..real - 1.
    """

    def __init__(self, size: int, real: int) -> None:
        if not 0 < real <= size:
            raise ValueError(f"real={real}: give a number from 1 to size={size}")
        self.size = size
        self.real = real
        self.repeats = [len(range(rank, size, real)) for rank in range(real)]
        self.communicators = [SimulatedCommunicator(self, rank) for rank in range(real)]
        self.result: FloatArray = np.empty(0)

    def run(
        self, function: Callable[[SimulatedCommunicator], T], *, first_only: bool = False
    ) -> list[T]:
        """Return what `function` returned on each real rank.

        Args:
            function: called with each rank's communicator, on a thread of its own.
            first_only: return as soon as rank 0 is done, with its result alone. The world is then
                at its end, since the others have not taken the same steps.
        """
        turns = [_Turn(communicator, function) for communicator in self.communicators]
        try:
            self._take_turns(turns, first_only=first_only)
        finally:
            for turn in turns:
                turn.end()
        return [turn.result for turn in turns[: 1 if first_only else None]]

    def _take_turns(self, turns: Sequence[_Turn], *, first_only: bool) -> None:
        while True:
            for turn in turns:
                turn.go_on()
                if first_only and turn.done:
                    return
            if all(turn.done for turn in turns):
                return
            if any(turn.done for turn in turns):
                raise AssertionError("some ranks are done while others wait in a collective")
            self._meet([turn.communicator for turn in turns])

    def _meet(self, ranks: Sequence[SimulatedCommunicator]) -> None:
        operations = {rank.operation for rank in ranks}
        sizes = {rank.vector.size for rank in ranks}
        if len(operations) > 1 or len(sizes) > 1:
            raise AssertionError(f"ranks are in {operations} with vectors of {sizes} elements")
        vectors = [rank.vector for rank in ranks]
        (operation,) = operations
        if operation == "gather":
            # Rank 0 lays the rows out, so that the memory they take is counted as a rank's own.
            self.result = np.empty(0)
        elif operation == "max":
            self.result = np.maximum.reduce(vectors)
        elif operation == "sum":
            self.result = np.sum(
                [vector * times for vector, times in zip(vectors, self.repeats, strict=True)],
                axis=0,
            )
        else:
            self.result = np.add.reduce(vectors)

    def rows(self) -> FloatArray:
        """Return everyone's vector, shape (size, n): one array, which all real ranks share."""
        if not self.result.size:
            vectors = [communicator.vector for communicator in self.communicators]
            rows = np.empty((self.size, vectors[0].size))
            for rank, vector in enumerate(vectors):
                rows[rank :: self.real] = vector
            rows.flags.writeable = False
            self.result = rows
        return self.result

    def reduced(self) -> FloatArray:
        """Return what the ranks' vectors have come to, an array of the caller's own."""
        return self.result.copy()


class SimulatedCommunicator(Communicator):
    """A real rank of a simulated world.

    Attributes:
        meter: measures what this rank does outside collectives.
        taken: the collectives that it has taken part in.
        operation, vector: the collective that it waits in.
    """

    def __init__(self, world: World, rank: int) -> None:
        self.rank = rank
        self.world_size = world.size
        self.meter = Meter()
        self.taken: list[Collective] = []
        self.operation: Operation = "gather"
        self.vector: FloatArray = np.empty(0)
        self.give_way: Callable[[], None] = lambda: None
        self._world = world
        self._from_real_ranks = False

    def all_gather_bytes(self, data: bytes, sizes: Sequence[int]) -> list[bytes]:
        if any(sizes[self._world.real :]):
            raise AssertionError("a rank that is not real cannot have bytes of its own to send")
        self._from_real_ranks = True
        try:
            return super().all_gather_bytes(data, sizes)
        finally:
            self._from_real_ranks = False

    def _all_gather(self, vector: FloatArray) -> FloatArray:
        return self._take_part("gather", vector, self._world.rows)

    def _all_reduce(self, vector: FloatArray, op: Literal["sum", "max"]) -> FloatArray:
        operation: Operation = "sum of real ranks" if self._from_real_ranks else op
        return self._take_part(operation, vector, self._world.reduced)

    def _take_part(
        self, operation: Operation, vector: FloatArray, received: Callable[[], FloatArray]
    ) -> FloatArray:
        self.meter.enter()
        self.operation, self.vector = operation, vector.copy()
        self.give_way()
        self.meter.receive()
        result = received()
        self.meter.leave()
        kind = Kind.GATHER if operation == "gather" else Kind.REDUCE
        self.taken.append(Collective(kind, vector.nbytes, result.nbytes))
        return result


class _Turn:
    """The thread of one rank, which runs only while it is let."""

    def __init__(
        self,
        communicator: SimulatedCommunicator,
        function: Callable[[SimulatedCommunicator], Any],
    ) -> None:
        self.communicator = communicator
        self.done = False
        self.result: Any = None
        self._function = function
        self._error: BaseException | None = None
        self._ended = False
        self._may_run, self._gave_way = threading.Semaphore(0), threading.Semaphore(0)
        communicator.give_way = self._give_way
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def go_on(self) -> None:
        """Let the rank run until its next collective or its end; raises what it raised."""
        self._may_run.release()
        if not self._gave_way.acquire(timeout=_PATIENCE):
            raise AssertionError(f"rank {self.communicator.rank} computes forever")
        if self._error is not None:
            raise self._error

    def end(self) -> None:
        """End the thread, wherever it waits."""
        self._ended = True
        self._may_run.release()
        self._thread.join(_PATIENCE)

    def _run(self) -> None:
        self._may_run.acquire()
        try:
            if not self._ended:
                self.result = self._function(self.communicator)
        except _WorldEndedError:
            pass
        except BaseException as error:  # noqa: BLE001 - raised again by whoever let it run
            self._error = error
        finally:
            self.done = True
            self._gave_way.release()

    def _give_way(self) -> None:
        self._gave_way.release()
        self._may_run.acquire()
        if self._ended:
            raise _WorldEndedError
