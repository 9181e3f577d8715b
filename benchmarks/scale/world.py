"""Many ranks in one process: a few are threads, the others repeat what those send.

Threads take turns: each runs alone until it enters an exchange, and gets what it would get among `size`
ranks. Rank r repeats real rank r % real, so an all-gather really returns `size` rows, and what partners
in a tree hold is the same in whole blocks of ranks: each is merged once, and only a rank's own merges
count as its work.

How long an exchange takes on a network is modelled: rounds one after the other, each of which costs a
message, of n bytes `LATENCY + n / BANDWIDTH`, whoever sends it and whatever else is under way. With p
ranks, each of which hands in n bytes:

    gather    p - 1 rounds of n bytes, around a ring as gloo's is: everybody's reach everybody
    tree      about log2 p rounds of n bytes (`communicator.tree` says how many)
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from threading import Lock

import numpy as np

from benchmarks.contenders import Metricfold, Watched
from benchmarks.workloads import Workload
from metricfold._core.fold.sample import FloatArray
from metricfold.communicator import Communicator
from metricfold.communicator.tree import Merge, rounds_of

LATENCY, BANDWIDTH = 30e-6, 25e9 / 8
"""Seconds of a message however short, and bytes a second: TCP between nodes."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """One exchange, as a rank sees it: rounds, bytes of each message, and bytes got back in all."""

    rounds: int
    size: int
    received: int

    @property
    def seconds(self) -> float:
        return self.rounds * (LATENCY + self.size / BANDWIDTH)


@dataclass(frozen=True, slots=True)
class Log:
    """What one log took of a rank.

    Args:
        exchanges: what it took part in.
        cpu: CPU seconds of the reduction, without what the network does.
        dict: CPU seconds of the dict.
        schema_rounds: how often the ranks had agreed on keys by then.
    """

    exchanges: list[Exchange]
    cpu: float
    dict: float
    schema_rounds: int

    @property
    def exchange(self) -> Exchange:
        """The one exchange of the steady state; ValueError if there were others."""
        (one,) = self.exchanges
        return one

    @property
    def seconds(self) -> float:
        """Until there is something to write."""
        return self.cpu + sum(one.seconds for one in self.exchanges) + self.dict


def logs_of(
    inner: Communicator, workload: Workload, route: str, ranks: int, number: int, turn: Lock
) -> list[Log]:
    """Return so many logs of one real rank; `inner` joins those."""
    with turn:
        world = SimulatedCommunicator(inner, ranks, turn)
        contender = Metricfold(workload, inner.rank, route=route, wire=world)
        logs = []
        for _ in range(number):
            contender.feed()
            contender.log()
            began = time.process_time()
            if inner.rank == 0:
                contender.snapshot.as_dict("train", "auto")
            took, rounds = time.process_time() - began, contender.aggregator.schema_rounds
            logs.append(Log(world.taken, contender.own[-1], took, rounds))
        return logs


class SimulatedCommunicator(Watched):
    """A real rank of a simulated world of `size`; `inner` connects these, and who runs holds `turn`.

    Attributes:
        taken: the exchanges that it has taken part in since `begin`.
    """

    def __init__(self, inner: Communicator, size: int, turn: Lock) -> None:
        super().__init__(inner)
        self.world_size = size
        self._turn = turn
        self._whose = np.arange(size) % inner.world_size
        self._among_real = False

    def begin(self) -> None:
        super().begin()
        self.taken: list[Exchange] = []

    def all_gather_bytes(self, data: bytes, sizes: Sequence[int]) -> list[bytes]:
        if any(sizes[self._inner.world_size :]):
            raise AssertionError("a rank that is not real cannot have bytes of its own to send")
        self._among_real = True
        try:
            return super().all_gather_bytes(data, sizes)
        finally:
            self._among_real = False

    def _all_gather(self, vector: FloatArray) -> FloatArray:
        rows = self._timed(vector, lambda: self._met(vector)[self._whose])
        self.taken.append(Exchange(self.world_size - 1, vector.nbytes, rows.nbytes))
        return rows

    def _tree(self, vector: FloatArray, merge: Merge) -> FloatArray:
        rounds = rounds_of(self.world_size)
        if 0 in rounds:
            raise AssertionError("a simulated tree has a power of two of ranks")
        self.taken.append(Exchange(len(rounds), vector.nbytes, len(rounds) * vector.nbytes))
        rows = self._timed(vector, lambda: self._met(vector))
        if self._among_real:  # of the others there is nothing
            return reduce(merge, rows)
        # By the real rank that the first of a block repeats, which says what the block holds.
        blocks, mine = dict(enumerate(rows)), self.rank
        for depth in rounds:
            mine = (self.rank >> depth << depth) % len(rows)
            merged = {}
            for first in {(place << depth) % len(rows) for place in range(len(rows))}:
                began = time.process_time()
                merged[first] = merge(blocks[first], blocks[(first + (1 << depth - 1)) % len(rows)])
                if first != mine:  # the work of others
                    self.seconds += time.process_time() - began
            blocks = merged
        return blocks[mine]

    def _met(self, vector: FloatArray) -> FloatArray:
        """Return what the real ranks hand in."""
        self._turn.release()
        try:
            return self._inner.all_gather(vector)
        finally:
            self._turn.acquire()
