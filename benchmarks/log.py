"""A log over real ranks: beside one bare all-reduce of as many bytes, and what rank 0 itself takes."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch.distributed as dist

from benchmarks.contenders import BareAllReduce, Metricfold
from benchmarks.meter import walls
from benchmarks.ranks import run_ranks
from benchmarks.table import Budget, Section, amount, at_most, cost, seconds_of
from benchmarks.timing import taken
from benchmarks.traffic import traffic_of
from benchmarks.workloads import Workload, large, small
from metricfold.communicator.tree import rounds_of

_WARM_UPS = 3
"""Logs until the schema, its capacities and windows are where they stay."""

_RATIO, _OWN, _DICT, _BOTH = "reduce()", "its own CPU", "its dict", "both"
_Budgets = Mapping[tuple[str, int], Budget]
_LARGE: _Budgets = {
    (_RATIO, 8): at_most(1.1),
    (_OWN, 8): at_most(1),
    (_DICT, 1): at_most(2.5),
    (_DICT, 2): at_most(2.5),
    (_DICT, 8): at_most(4),
}
_SMALL: _Budgets = {(_RATIO, 4): at_most(1.1), (_BOTH, 1): at_most(0.35)}
_SIGNED: _Budgets = {(_DICT, 8): at_most(9)}
"""By row and ranks; milliseconds, but for the ratio."""


@dataclass(slots=True)
class _Seen:
    """What one rank saw: when logs began and ended, CPU seconds, and what gloo started for one of ours."""

    ours: list[tuple[float, float]] = field(default_factory=list)
    bare: list[tuple[float, float]] = field(default_factory=list)
    own: list[float] = field(default_factory=list)
    dicts: list[float] = field(default_factory=list)
    issued: list[str] = field(default_factory=list)
    floats: int = 0


def measure(*, quick: bool) -> list[Section]:
    """Return a section for each workload."""
    datasets, window, means = (3, 50, 10) if quick else (50, 1000, 100)
    worlds = (1, 2) if quick else (1, 2, 4, 8)
    many, few, least = (6, 4, 2) if quick else (240, 48, 8)
    section = _section(small(means), worlds, many, _SMALL)
    for size in worlds[1:]:
        seen = run_ranks(_log, size, small(means), least, "tree", timeout=300)
        rounds = max(one.issued.count("send") for one in seen)
        budget = at_most(len(rounds_of(size)))
        section.rows.append(
            amount(f"{size} ranks, tree: rounds per log", rounds, "", budget=budget)
        )
    return [
        _section(large(datasets, window), worlds, few, _LARGE),
        _section(large(datasets, window, signed=True), worlds[-1:], least, _SIGNED),
        section,
    ]


def _section(workload: Workload, worlds: tuple[int, ...], logs: int, budgets: _Budgets) -> Section:
    section = Section(f"A log of {workload.title}")
    for size in worlds:
        seen = run_ranks(_log, size, workload, logs, "auto", timeout=300)
        ranks = f"{size} rank{'s' if size > 1 else ''}"
        first = seen[0]
        both = [sum(taken) for taken in zip(first.own, first.dicts, strict=True)]
        ours, bare = (walls([getattr(one, whose) for one in seen]) for whose in ("ours", "bare"))
        section.rows += [
            cost(f"{ranks}: reduce()", ours, "bare all_reduce", bare, budgets.get((_RATIO, size))),
            *(
                seconds_of(f"{ranks}: {what} on rank 0", taken, "ms", budgets.get((of, size)))
                for what, of, taken in (
                    ("CPU before and after the exchange", _OWN, first.own),
                    ("CPU of the dict", _DICT, first.dicts),
                    ("both", _BOTH, both),
                )
            ),
        ]
        if size > 1:
            issued = max(len(one.issued) for one in seen)
            what = f"{ranks}: collectives per log"
            section.rows.append(amount(what, issued, "", budget=at_most(1)))
        section.notes.append(f"{ranks}: {first.floats:,} float64 a rank")
    return section


def _log(rank: int, workload: Workload, rounds: int, route: str) -> _Seen:
    """Run on each rank: ours and the bare collective log in turn."""
    ours = Metricfold(workload, rank, 0, route)
    for _ in range(_WARM_UPS):
        ours.feed()
        ours.log()
    ours.own.clear()
    seen = _Seen(floats=ours.floats)
    contenders = [(ours, seen.ours), (BareAllReduce(workload, rank, ours.floats), seen.bare)]
    for turn in range(rounds):
        # Each leaves the caches as the next one finds them, so nobody always follows the same one.
        for contender, turns in random.Random(turn).sample(contenders, 2):
            contender.feed()
            dist.barrier()
            began = time.monotonic()
            contender.log()
            turns.append((began, time.monotonic()))
            if contender is ours and rank == 0:
                seen.dicts.append(taken(lambda: ours.snapshot.as_dict("train")))
    seen.own = ours.own.copy()
    ours.feed()
    dist.barrier()
    seen.issued, _ = traffic_of(ours.log)
    dist.barrier()
    return seen
