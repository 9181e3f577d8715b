"""Ranks as threads of one process: the real protocol, where processes would be too slow to start.

    worlds = thread_world(4)      # four communicators; use each from a thread of its own

A collective that some thread does not join breaks for all after the timeout.
"""

from __future__ import annotations

import threading

import numpy as np

from metricfold._core.fold.sample import FloatArray
from metricfold.communicator.base import Communicator, MissingRanksError
from metricfold.communicator.tree import Merge, rounds_of, steps

__all__ = ["ThreadCommunicator", "thread_world"]


class _Meeting:
    """Where the threads of one world lay down their vectors and pick up everyone's."""

    def __init__(self, world_size: int, timeout: float) -> None:
        self.barrier = threading.Barrier(world_size, timeout=timeout)
        self.vectors: list[FloatArray | None] = [None] * world_size

    def gather(self, rank: int, vector: FloatArray) -> list[FloatArray]:
        self.vectors[rank] = vector.copy()
        try:
            self.barrier.wait()
            gathered = [vector for vector in self.vectors if vector is not None]
            self.barrier.wait()
        except threading.BrokenBarrierError:
            missing = [r for r, vector in enumerate(self.vectors) if vector is None]
            raise MissingRanksError(f"ranks {missing} did not come", missing) from None
        self.vectors[rank] = None
        if len({vector.size for vector in gathered}) > 1:
            raise AssertionError(f"ranks sent vectors of {[v.size for v in gathered]} elements")
        return gathered


class ThreadCommunicator(Communicator):
    """One rank of a world of threads."""

    def __init__(self, rank: int, world_size: int, meeting: _Meeting) -> None:
        self.rank = rank
        self.world_size = world_size
        self._meeting = meeting

    def abandon(self, why: str) -> None:
        self._meeting.barrier.abort()

    def _all_gather(self, vector: FloatArray) -> FloatArray:
        return np.stack(self._meeting.gather(self.rank, vector))

    def _tree(self, vector: FloatArray, merge: Merge) -> FloatArray:
        mine = {step.round: step for step in steps(self.rank, self.world_size)}
        for number in rounds_of(self.world_size):
            held = self._meeting.gather(self.rank, vector)
            if (step := mine.get(number)) is not None and step.receives:
                vector = step.after(vector, held[step.partner], merge)
        return vector


def thread_world(world_size: int, timeout: float = 30.0) -> list[ThreadCommunicator]:
    """Return `world_size` connected communicators; `timeout` is in seconds."""
    meeting = _Meeting(world_size, timeout)
    return [ThreadCommunicator(rank, world_size, meeting) for rank in range(world_size)]
