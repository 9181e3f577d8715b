"""Timing in one process: contenders take turns, so that whatever slows the machine slows all."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping

__all__ = ["interleaved"]


def interleaved(
    contenders: Mapping[str, Callable[[], object]], rounds: int, seconds: float = 0.01
) -> dict[str, list[float]]:
    """Return the seconds per call of each contender, one number a round.

    Args:
        contenders: what to call, by name.
        rounds: how often each has a turn; every round in another order.
        seconds: how long one turn lasts, about.
    """
    names = list(contenders)
    calls = {name: _calls_in(contenders[name], seconds) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in random.Random(turn).sample(names, len(names)):
            times[name].append(_time(contenders[name], calls[name]) / calls[name])
    return times


def _calls_in(function: Callable[[], object], seconds: float) -> int:
    function()
    once = max(_time(function, 1), 1e-7)
    return max(1, int(seconds / once))


def _time(function: Callable[[], object], calls: int) -> float:
    started = time.perf_counter()
    for _ in range(calls):
        function()
    return time.perf_counter() - started
