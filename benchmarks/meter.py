"""Measures the logs of one contender on one rank: how often, how long, what was sent, what it took.

    while meter.wants_more():
        ...                    # an interval of training, which nobody times
        meter.take(log)        # a function that returns the values

The first log warms up. Then come as many timed ones as fit into the time, at least one and the same
number on all ranks, and at last one that is not timed, whose traffic is counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.traffic import traffic_of


def walls(turns: list[list[tuple[float, float]]]) -> list[float]:
    """Return, by turn, the time from the first rank's beginning to the last rank's end.

    Args:
        turns: of each rank, when each began and ended by the machine's clock.
    """
    return [
        max(ended for _, ended in turn) - min(began for began, _ in turn)
        for turn in zip(*turns, strict=True)
    ]


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
        self._seconds, self._most = seconds, most
        self._logs = 0
        self._warm_at = 0.0
        self._counting = False
        self.turns: list[tuple[float, float]] = []
        self.peak = self.collectives = self.sent = 0
        self.values: Mapping[str, float] = {}

    def wants_more(self) -> bool:
        """Return whether there is another log to measure."""
        if self._counting:
            return False
        self._logs += 1
        if self._logs == 2:
            self._warm_at = time.monotonic()
        elif self._logs > 2 and self._enough():
            self.peak = peak()
            self._counting = True
        return True

    def _enough(self) -> bool:
        """Return whether any rank has timed for long enough, the same on all of them."""
        enough = torch.tensor(
            len(self.turns) >= self._most or time.monotonic() - self._warm_at >= self._seconds
        ).float()
        dist.all_reduce(enough, dist.ReduceOp.MAX)
        return bool(enough)

    def take(self, log: Callable[[], Mapping[str, float]]) -> None:
        """Log; all ranks begin together."""
        dist.barrier()
        if self._counting:
            kinds, self.sent = traffic_of(lambda: self._logged(log))
            self.collectives = len(kinds)
            return
        began = time.monotonic()
        self._logged(log)
        if self._logs > 1:
            self.turns.append((began, time.monotonic()))

    def _logged(self, log: Callable[[], Mapping[str, float]]) -> None:
        self.values = log()


# -- Memory of this process, by the kernel's account: Python's, torch's and all other -------------

_STATUS = Path("/proc/self/status")


def held() -> int:
    """Return the bytes that the process holds now."""
    return _read("VmRSS")


def peak() -> int:
    """Return the most bytes that the process has ever held, or has since `forget_peak`."""
    return _read("VmHWM")


def forget_peak() -> None:
    """Let the peak begin anew, at what is held now."""
    Path("/proc/self/clear_refs").write_text("5")


def _read(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{_STATUS} has no {field}: memory is read from the Linux kernel's account")
