"""What one rank takes: CPU time of its own thread, and memory, without what collectives take."""

from __future__ import annotations

import gc
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

__all__ = ["Cost", "Meter", "traced", "undisturbed"]


@dataclass(slots=True)
class Cost:
    """What one call took.

    Args:
        phases: CPU seconds before the first collective, between collectives, and after the last.
        peak: bytes held at most beyond what was held before, with what collectives returned; 0 if
            that was not traced.
        kept: bytes still held afterwards.
    """

    phases: list[float] = field(default_factory=list)
    peak: int = 0
    kept: int = 0

    @property
    def seconds(self) -> float:
        return sum(self.phases)


class Meter:
    """Measures from `begin` to `end`, except between `enter` and `leave`.

    Memory is what `tracemalloc` traces, which slows everything down several times: measure time and
    memory in calls of their own. From `enter` to `receive` other ranks run, in the same process.
    """

    def __init__(self) -> None:
        self._cost: Cost | None = None
        self._began = 0.0
        self._base = 0

    def begin(self) -> None:
        self._cost = Cost()
        self._resume_memory()
        self._began = time.thread_time()

    def end(self) -> Cost:
        self.enter()
        cost, self._cost = self._cost, None
        assert cost is not None
        return cost

    def enter(self) -> None:
        """The rank enters a collective."""
        now = time.thread_time()
        cost = self._cost
        if cost is None:
            return
        cost.phases.append(now - self._began)
        if tracemalloc.is_tracing():
            held, highest = tracemalloc.get_traced_memory()
            cost.peak = max(cost.peak, cost.kept + highest - self._base)
            cost.kept += held - self._base

    def receive(self) -> None:
        """The rank goes on, and takes what the collective returns."""
        self._resume_memory()

    def leave(self) -> None:
        """The rank leaves the collective."""
        self._began = time.thread_time()

    def _resume_memory(self) -> None:
        if self._cost is not None and tracemalloc.is_tracing():
            tracemalloc.reset_peak()
            self._base, _ = tracemalloc.get_traced_memory()


@contextmanager
def undisturbed() -> Iterator[None]:
    """Keep the garbage collector from what other worlds have left, which no real rank has."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def traced() -> Iterator[None]:
    """Trace memory, for a `Meter` to read."""
    gc.collect()
    tracemalloc.start()
    try:
        yield
    finally:
        tracemalloc.stop()
