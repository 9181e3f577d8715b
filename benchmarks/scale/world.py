"""Many ranks in one process: a few are threads, the others repeat what those send.

Threads take turns: each runs alone until it enters a collective, and gets what it would get among
`size` ranks. Rank r repeats real rank r % real, so an all-gather really returns `size` rows, and a
tree really merges so many vectors, though not on this rank's clock.
"""

from __future__ import annotations

import gc
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock

import numpy as np

from benchmarks.scale.network import Collective
from benchmarks.workloads import Workload, batches
from metricfold import MetricsAggregator
from metricfold._core.fold.sample import FloatArray
from metricfold.communicator import Communicator
from metricfold.communicator.tree import Merge

__all__ = ["Log", "SimulatedCommunicator", "logs_of"]


@dataclass(frozen=True, slots=True)
class Log:
    """What one log took of a rank.

    Args:
        collectives: what it took part in.
        cpu: CPU seconds of the reduction, without collectives.
        dict: CPU seconds of the dict.
        memory: bytes held at most beyond what was held before, with what collectives returned; 0 if
            that was not traced.
        schema_rounds: how often the ranks had agreed on keys by then.
    """

    collectives: list[Collective]
    cpu: float
    dict: float
    memory: int
    schema_rounds: int

    @property
    def sent(self) -> int:
        return sum(one.sent for one in self.collectives)

    @property
    def received(self) -> int:
        return sum(one.received for one in self.collectives)


def logs_of(
    inner: Communicator, workload: Workload, route: str, ranks: int, number: int, turn: Lock
) -> list[Log]:
    """Return so many logs of one real rank, the last one with its memory; `inner` joins those."""
    with turn:
        world = SimulatedCommunicator(inner, ranks, turn)
        aggregator = MetricsAggregator(workload.window, communicator=world, route=route)
        logs = []
        for log in range(number):
            for batch in batches(workload, inner.rank, log):
                aggregator.update(batch)
            # Tracing slows everything down several times: time and memory have logs of their own.
            traced = log == number - 1 and inner.rank == 0
            if traced:
                gc.collect()
                tracemalloc.start()
            world.begin()
            snapshot = aggregator.reduce()
            cpu = world.pause()
            world.go_on()
            if inner.rank == 0:
                snapshot.as_dict("train", "auto")
            both = world.pause()
            if traced:
                tracemalloc.stop()
            collectives = list(world.taken)
            logs.append(Log(collectives, cpu, both - cpu, world.peak, aggregator.schema_rounds))
        return logs


class SimulatedCommunicator(Communicator):
    """A real rank of a simulated world, and what it does outside of collectives.

    Args:
        inner: connects the real ranks.
        size: of the world.
        turn: held by the rank that runs.

    Attributes:
        taken: the collectives that it has taken part in since `begin`.
        peak: bytes held at most since then, if `tracemalloc` traces.
    """

    def __init__(self, inner: Communicator, size: int, turn: Lock) -> None:
        self.rank, self.world_size = inner.rank, size
        self._inner, self._turn = inner, turn
        self._whose = np.arange(size) % inner.world_size
        self._among_real = False
        self.begin()

    def begin(self) -> None:
        """Begin to measure."""
        self.taken: list[Collective] = []
        self.peak = self._kept = 0
        self._seconds = 0.0
        self.go_on()

    def go_on(self) -> None:
        if tracemalloc.is_tracing():
            tracemalloc.reset_peak()
            self._base, _ = tracemalloc.get_traced_memory()
        self._since = time.thread_time()

    def pause(self) -> float:
        """Return the CPU seconds since `begin`, less those between a pause and `go_on`."""
        self._seconds += time.thread_time() - self._since
        if tracemalloc.is_tracing():
            held, highest = tracemalloc.get_traced_memory()
            self.peak = max(self.peak, self._kept + highest - self._base)
            self._kept += held - self._base
        return self._seconds

    def all_gather_bytes(self, data: bytes, sizes: Sequence[int]) -> list[bytes]:
        if any(sizes[self._inner.world_size :]):
            raise AssertionError("a rank that is not real cannot have bytes of its own to send")
        self._among_real = True
        try:
            return super().all_gather_bytes(data, sizes)
        finally:
            self._among_real = False

    def _all_gather(self, vector: FloatArray) -> FloatArray:
        return self._take_part(vector, lambda rows: rows[self._whose], gathers=True)

    def _tree(self, vector: FloatArray, merge: Merge) -> FloatArray:
        def whole(rows: FloatArray) -> FloatArray:
            blocks = list(rows if self._among_real else rows[self._whose])
            extra = len(blocks) - (1 << (len(blocks).bit_length() - 1))
            while len(blocks) > 1:
                # Where there is no power of two, neighbours among the first make one.
                joined = 2 * extra or len(blocks)
                pairs = zip(blocks[0:joined:2], blocks[1:joined:2], strict=True)
                blocks = [merge(*pair) for pair in pairs] + blocks[joined:]
                extra = 0
            return blocks[0]

        return self._take_part(vector, whole, gathers=False)

    def _take_part(
        self, vector: FloatArray, whole: Callable[[FloatArray], FloatArray], *, gathers: bool
    ) -> FloatArray:
        self.pause()
        self._turn.release()
        try:
            rows = self._inner.all_gather(vector)
        finally:
            self._turn.acquire()
        self.go_on()
        result = whole(rows)
        # Laying out the rows, and merging them, is the network's work.
        self._since = time.thread_time()
        if tracemalloc.is_tracing():
            tracemalloc.reset_peak()
        self.taken.append(Collective(gathers, vector.nbytes, result.nbytes))
        return result
