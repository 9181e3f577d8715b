"""Timing in one process: contenders take turns, so that whatever slows the machine slows all."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType


def interleaved(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    calls_per_turn: int = 0,
    afterwards: Mapping[str, Callable[[], object]] = MappingProxyType({}),
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Return the seconds per call of each contender, one number a round.

    Args:
        contenders: what to call, by name.
        rounds: how often each has a turn; every round in another order.
        calls_per_turn: 0: as many as take 10 ms, about.
        afterwards: what to call after a contender's turn, by its name; not timed.
        clock: `time.process_time` for what is long beside the time slices of a busy machine.
    """
    names = list(contenders)
    calls = dict.fromkeys(names, calls_per_turn)
    if not calls_per_turn:
        for name, function in contenders.items():
            function()
            calls[name] = max(1, int(0.01 / max(taken(function, 1, clock), 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in random.Random(turn).sample(names, len(names)):
            times[name].append(taken(contenders[name], calls[name], clock) / calls[name])
            if name in afterwards:
                afterwards[name]()
    return times


def taken(
    function: Callable[[], object], calls: int = 1, clock: Callable[[], float] = time.process_time
) -> float:
    """Return the seconds of so many calls, of CPU time if nothing else is asked for."""
    started = clock()
    for _ in range(calls):
        function()
    return clock() - started
