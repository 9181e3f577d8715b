"""Measures the logs of one contender on one rank: how often, how long, what was sent, what it took.

    while meter.wants_more():
        ...                    # an interval of training, which nobody times
        meter.take(log)        # a function that returns the values

The first log warms up. Then come as many timed ones as fit into the time, at least one and the same
number on all ranks, and at last one that is not timed, whose traffic is counted.
"""

from __future__ import annotations

import re
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
        memory: the most bytes that the process held up to the last timed log, beyond what it held
            when this was made.
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
        self.memory = self.collectives = self.sent = 0
        self.values: Mapping[str, float] = {}
        self._held = _memory("VmRSS")
        # The peak begins anew, at what is held now.
        Path("/proc/self/clear_refs").write_text("5")

    def wants_more(self) -> bool:
        """Return whether there is another log to measure."""
        if self._counting:
            return False
        self._logs += 1
        if self._logs == 2:
            self._warm_at = time.monotonic()
        elif self._logs > 2 and self._enough():
            self.memory = max(_memory("VmHWM") - self._held, 0)
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


def _memory(field: str) -> int:
    """Return bytes of this process by the kernel's account: Python's, torch's and all other."""
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"^{field}:\s*(\d+) kB$", status, re.MULTILINE)
    if not found:
        raise RuntimeError(f"no {field}: memory is read from the Linux kernel's account")
    return int(found[1]) * 1024
