"""A log over real ranks, against a bare collective and against gathering pickled states."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch.distributed as dist

from benchmarks.contenders import (
    BARE,
    CONTENDERS,
    DICT,
    GATHER,
    PICKLED,
    REDUCE,
    Contender,
    Metricfold,
)
from benchmarks.ranks import run_ranks
from benchmarks.sizes import Sizes
from benchmarks.table import Budget, Row, Section, amount, at_least, at_most, cost, speedup
from benchmarks.workloads import Workload, large, small

__all__ = ["measure"]


@dataclass(frozen=True, slots=True)
class Logged:
    """What one rank saw.

    Args:
        turns: for each contender, by round, when its log began and ended on this rank; the clock
            is the machine's, so that ranks can be compared.
        facts: what each contender says of itself.
        floats: size of metricfold's vector.
    """

    turns: dict[str, dict[int, tuple[float, float]]]
    facts: dict[str, dict[str, float]]
    floats: int


def measure(sizes: Sizes) -> list[Section]:
    """Return one section per workload."""
    big, means = large(sizes.datasets, sizes.window), small(sizes.means)
    return [
        _section(big, sizes.world_sizes, sizes.logs, sizes.slow_every, {8: _BUDGETS_LARGE}),
        _section(means, sizes.world_sizes, sizes.small_logs, sizes.slow_every, {4: _BUDGETS_SMALL}),
    ]


_BUDGETS_LARGE = {
    (REDUCE, BARE): at_most(1.2),
    (DICT, BARE): at_most(2),
    (REDUCE, PICKLED): at_least(15),
}
_BUDGETS_SMALL = {(REDUCE, BARE): at_most(1.2)}


def _section(
    workload: Workload,
    world_sizes: Sequence[int],
    logs: int,
    slow_every: int,
    budgets: Mapping[int, Mapping[tuple[str, str], Budget]],
) -> Section:
    section = Section(f"A log of {workload.title}, by ranks")
    for world_size in world_sizes:
        seen = run_ranks(_log, world_size, workload, logs, slow_every)
        section.rows += _rows(world_size, seen, budgets.get(world_size, {}))
        facts = seen[0].facts[REDUCE]
        phases = ", ".join(f"{facts[phase] * 1e6:.0f} µs {phase}" for phase in _PHASES)
        section.notes.append(
            f"{_ranks(world_size)}: {seen[0].floats} float64 a rank; on rank 0 {phases}"
        )
    return section


_PHASES = ("pack", "gather", "merge")


def _rows(
    world_size: int, seen: list[Logged], budgets: Mapping[tuple[str, str], Budget]
) -> list[Row]:
    walls = {name: _walls(seen, name) for name in seen[0].turns}
    rows = []
    for listed in CONTENDERS:
        for own in listed.beside:
            ours, theirs = walls[own], walls[listed.name]
            turns = sorted(ours.keys() & theirs.keys())
            compare = cost if listed.name in (BARE, GATHER) else speedup
            rows.append(
                compare(
                    f"{_ranks(world_size)}: {own}",
                    [ours[turn] for turn in turns],
                    listed.name,
                    [theirs[turn] for turn in turns],
                    budgets.get((own, listed.name)),
                )
            )
    collectives = max(logged.facts[REDUCE]["collectives"] for logged in seen)
    what = f"{_ranks(world_size)}: collectives per log"
    return [*rows, amount(what, collectives, "", budget=at_most(1))]


def _ranks(world_size: int) -> str:
    return f"{world_size} rank{'s' if world_size > 1 else ''}"


def _walls(seen: list[Logged], name: str) -> dict[int, float]:
    """Return, by round, the time from the first rank's beginning to the last rank's end."""
    return {
        turn: max(logged.turns[name][turn][1] for logged in seen)
        - min(logged.turns[name][turn][0] for logged in seen)
        for turn in seen[0].turns[name]
    }


def _log(rank: int, workload: Workload, rounds: int, slow_every: int) -> Logged:
    """Run on each rank: let the contenders log in turn."""
    contenders: dict[str, Contender] = {}
    floats = 0
    for listed in CONTENDERS:
        contender = contenders[listed.name] = listed.make(workload, rank, floats)
        if isinstance(contender, Metricfold):
            floats = contender.floats
    slow = {listed.name for listed in CONTENDERS if listed.slow}
    names = list(contenders)
    turns: dict[str, dict[int, tuple[float, float]]] = {name: {} for name in names}
    for turn in range(-1, rounds):
        # Each leaves the caches as the next one finds them, so nobody always follows the same one.
        for name in random.Random(turn).sample(names, len(names)):
            if name in slow and turn > 0 and turn % slow_every:
                continue
            contender = contenders[name]
            contender.feed()
            dist.barrier()
            began = time.monotonic()
            contender.log()
            # The first round warms up.
            if turn >= 0:
                turns[name][turn] = (began, time.monotonic())
    facts = {name: contender.facts() for name, contender in contenders.items()}
    return Logged(turns, facts, floats)
