"""Measures the logs of one contender on one rank: how often, how long, what was sent, what it took.

    while meter.wants_more():
        ...                    # an interval of training, which nobody times
        meter.begin()
        values = ...           # the log
        meter.end(values)

The first log warms up. Then come as many timed ones as fit into the time, at least one and the same
number on all ranks, and at last one that is not timed, whose traffic is counted.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
import torch.distributed as dist

from benchmarks.memory import peak
from benchmarks.traffic import Traffic

__all__ = ["Meter"]


class Meter:
    """Measures one contender.

    Args:
        seconds: how long intervals and logs together should take.
        most: logs that are timed at most.

    Attributes:
        turns: when each timed log began and ended on this rank; the clock is the machine's, so that
            ranks can be compared.
        peak: the most memory that the process ever held up to the last timed log, in bytes.
        collectives: issued by this rank during the last log.
        sent: bytes that this rank sent during the last log.
        values: what the last log returned.
    """

    def __init__(self, seconds: float, most: int) -> None:
        self._seconds = seconds
        self._most = most
        self._logs = -1
        self._planned = 0
        self._traffic: Traffic | None = None
        self._began = self._turn_began = 0.0
        self.turns: list[tuple[float, float]] = []
        self.peak = 0
        self.collectives = 0
        self.sent = 0
        self.values: Mapping[str, float] = {}

    def wants_more(self) -> bool:
        """Return whether there is another log to measure."""
        if self._logs == 0:
            self._plan(time.monotonic() - self._turn_began)
        self._logs += 1
        self._turn_began = time.monotonic()
        if self._logs == self._planned + 1:
            self.peak = peak()
            self._traffic = Traffic()
        return self._logs <= self._planned + 1

    def begin(self) -> None:
        """Call right before the log; all ranks begin together."""
        dist.barrier()
        if self._traffic is not None:
            self._traffic.begin()
        self._began = time.monotonic()

    def end(self, values: Mapping[str, float]) -> None:
        """Call right after the log, with what it returned."""
        ended = time.monotonic()
        self.values = values
        if self._traffic is not None:
            self._traffic.end()
            self.collectives, self.sent = self._traffic.collectives, self._traffic.sent
        elif self._logs > 0:
            self.turns.append((self._began, ended))

    def _plan(self, turn: float) -> None:
        """Agree on how many logs to time: the slowest rank counts."""
        slowest = torch.tensor(turn, dtype=torch.float64)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        self._planned = min(max(int(self._seconds / slowest.item()), 1), self._most)
