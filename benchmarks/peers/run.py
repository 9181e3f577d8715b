"""One library at one point: ranks of its own, so that its memory is told apart from the others'."""

from __future__ import annotations

import gc
import logging
import statistics
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.contenders import INTERVALS
from benchmarks.memory import forget_peak, held
from benchmarks.meter import Meter
from benchmarks.peers.libraries import Library
from benchmarks.peers.peer import PERCENTILES
from benchmarks.peers.points import Plan, Point
from benchmarks.ranks import run_ranks
from benchmarks.workloads import Workload

__all__ = ["PRELOAD", "Measured", "measure"]

PRELOAD = "benchmarks.peers.preload"
_TIMEOUT = 240.0


@dataclass(frozen=True, slots=True)
class Measured:
    """What a library took at a point.

    Args:
        seconds: one log, from the first rank's beginning to the last rank's end: the median.
        lower: quartile of the same.
        upper: quartile of the same.
        logs: how many that is the median of.
        collectives: that one rank issued in a log.
        sent: bytes that the busiest rank sent in a log.
        memory: bytes that the neediest rank came to hold for its metrics and the logs, at most.
        scalar_error: the worst relative error of a sum, mean, maximum or minimum.
        percentile_error: the worst relative error of a percentile.
        floats: size of the vector, if it is ours.
    """

    seconds: float
    lower: float
    upper: float
    logs: int
    collectives: int
    sent: int
    memory: int
    scalar_error: float | None
    percentile_error: float | None
    floats: int


@dataclass(frozen=True, slots=True)
class _Seen:
    """What one rank saw."""

    turns: list[tuple[float, float]]
    collectives: int
    sent: int
    memory: int
    values: Mapping[str, float]
    interval: int
    facts: dict[str, float]


def measure(
    library: Library, point: Point, window: int | None, floats: int, plan: Plan
) -> Measured:
    """Return what a log takes; raises RuntimeError with the reason if the library fails.

    Args:
        library: whose contender logs.
        point: what it has to log.
        window: recent values of a distribution that are kept; None: all.
        floats: size of our own vector at this point.
        plan: how long to measure.
    """
    workload = point.workload(window)
    seen: list[_Seen] = run_ranks(
        _measure,
        point.ranks,
        library,
        workload,
        point.tiny(window),
        floats,
        plan,
        timeout=_TIMEOUT,
        preload=PRELOAD,
    )
    times = [
        max(ended for _, ended in turn) - min(began for began, _ in turn)
        for turn in zip(*(rank.turns for rank in seen), strict=True)
    ]
    first = seen[0]
    wanted = _truth(workload, point.ranks, first.interval)
    return Measured(
        seconds=statistics.median(times),
        lower=float(np.quantile(times, 0.25)),
        upper=float(np.quantile(times, 0.75)),
        logs=len(times),
        collectives=first.collectives,
        sent=max(rank.sent for rank in seen),
        memory=max(rank.memory for rank in seen),
        scalar_error=_worst(first.values, wanted.scalars),
        percentile_error=_worst(first.values, wanted.percentiles),
        floats=int(first.facts.get("floats", 0)),
    )


def _measure(
    rank: int, library: Library, workload: Workload, tiny: Workload, floats: int, plan: Plan
) -> _Seen:
    """Run on each rank."""
    # What a library thinks about its own calls is printed for each rank and each log.
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    make = library.load()
    # Code that has never run is not in memory yet.
    make(tiny, rank, floats).run(Meter(0, 1))
    contender = make(workload, rank, floats)
    # It has the values that it will be fed with, and nothing of them in its metrics yet.
    gc.collect()
    before = held()
    forget_peak()
    meter = Meter(plan.seconds, plan.logs)
    contender.run(meter)
    return _Seen(
        meter.turns,
        meter.collectives,
        meter.sent,
        max(meter.peak - before, 0),
        meter.values,
        (contender.fed - 1) % INTERVALS,
        contender.facts(),
    )


# -- What should have come out -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Truth:
    scalars: dict[str, float]
    percentiles: dict[str, float]


_FOLDS: dict[str, Any] = {"sum": np.sum, "mean": np.mean, "max": np.max, "min": np.min}


def _truth(workload: Workload, ranks: int, number: int) -> _Truth:
    """Return the values over the pooled samples of an interval."""
    columns: dict[str, list[Any]] = {}
    aggregations: dict[str, str] = {}
    for rank in range(ranks):
        for batch in workload.interval(rank, number):
            for column in batch:
                columns.setdefault(column.key, []).append(column.values)
                aggregations[column.key] = column.aggregation
    truth = _Truth({}, {})
    for key, parts in columns.items():
        values = np.concatenate(parts)
        if aggregations[key] == "distribution":
            exact = np.percentile(np.tile(values, workload.repeats), PERCENTILES).tolist()
            for percent, value in zip(PERCENTILES, exact, strict=True):
                truth.percentiles[f"{key}_stat_p{percent:02d}"] = value
        else:
            repeats = workload.repeats if aggregations[key] == "sum" else 1
            truth.scalars[key] = float(_FOLDS[aggregations[key]](values)) * repeats
    return truth


def _worst(logged: Mapping[str, float], wanted: Mapping[str, float]) -> float | None:
    """Return the largest relative error; None where there was nothing to get wrong."""
    if not logged or not wanted:
        return None
    return max(abs(logged[key] - value) / abs(value) for key, value in wanted.items())
