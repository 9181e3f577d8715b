"""Timing in one process: contenders take turns, so that whatever slows the machine slows all."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType

__all__ = ["interleaved"]


def interleaved(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    calls_per_turn: int = 0,
    afterwards: Mapping[str, Callable[[], object]] = MappingProxyType({}),
) -> dict[str, list[float]]:
    """Return the seconds per call of each contender, one number a round.

    Args:
        contenders: what to call, by name.
        rounds: how often each has a turn; every round in another order.
        calls_per_turn: 0: as many as take 10 ms, about.
        afterwards: what to call after a contender's turn, by its name; not timed.
    """
    names = list(contenders)
    calls = {name: calls_per_turn or _calls_in(contenders[name], 0.01) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in random.Random(turn).sample(names, len(names)):
            times[name].append(_time(contenders[name], calls[name]) / calls[name])
            if name in afterwards:
                afterwards[name]()
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
