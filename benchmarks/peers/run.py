"""One library at one point: ranks of its own, so that its memory is told apart from the others'."""

from __future__ import annotations

import gc
import logging
import os
import statistics
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch.distributed as dist

from benchmarks.baselines import percentiles
from benchmarks.meter import Meter, walls
from benchmarks.peers.libraries import Library
from benchmarks.ranks import run_ranks
from benchmarks.workloads import INTERVALS, Workload, mixed

_WINDOW = 1000
"""Recent values that a distribution keeps where a library lets one choose."""


@dataclass(frozen=True, slots=True)
class Point:
    """One place at which every library is measured.

    Args:
        metrics: sums, means, maxima and minima, in equal parts.
        ranks: processes.
        samples: values of each metric on each rank between two logs.
        distributions: metrics whose percentiles are asked for, besides.
    """

    metrics: int
    ranks: int
    samples: int
    distributions: int = 0

    def named(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Measured:
    """What a library took at a point.

    Args:
        seconds: one log, from the first rank's beginning to the last rank's end: the median.
        collectives: that one rank issued in a log.
        sent: bytes that the busiest rank sent in a log.
        memory: bytes that the neediest rank came to hold for its metrics and the logs, at most.
        error: the worst relative error of a percentile, or without any of another number.
        floats: size of the vector, if it is ours.
    """

    seconds: float
    collectives: int
    sent: int
    memory: int
    error: float | None
    floats: int = 0


def run(library: Library, point: Point, floats: int, span: tuple[float, int]) -> Measured:
    """Return what a log takes; raises RankError with the reason if the library fails.

    `floats` is the size of our own vector at this point, and `span` what its `Meter` gets.
    """
    workload = mixed(point.metrics, point.distributions, point.samples, _WINDOW)
    tiny = mixed(4, min(point.distributions, 1), 10, _WINDOW)
    seen = run_ranks(
        _logged, point.ranks, library, workload, tiny, floats, span, timeout=240, group_timeout=240
    )
    meters = [meter for meter, _, _ in seen]
    first, number, ours = seen[0]
    return Measured(
        seconds=statistics.median(walls([meter.turns for meter in meters])),
        collectives=first.collectives,
        sent=max(meter.sent for meter in meters),
        memory=max(meter.memory for meter in meters),
        error=_worst(first.values, _truth(workload, point.ranks, number)),
        floats=ours,
    )


def _logged(
    rank: int, library: Library, workload: Workload, tiny: Workload, floats: int, span: Any
) -> tuple[Meter, int, int]:
    """Run on each rank: return what was measured, the last interval and our floats."""
    as_launched(rank)
    logging.disable(logging.WARNING)
    make = library.load()
    # Code that has never run is not in memory yet.
    make(tiny, rank, floats).run(Meter(0, 1))
    contender = make(workload, rank, floats)
    # It has the values that it will be fed with, and nothing of them in its metrics yet.
    gc.collect()
    meter = Meter(*span)
    contender.run(meter)
    dist.barrier()
    number = (contender.fed - 1) % INTERVALS
    return meter, number, contender.floats


def as_launched(rank: int) -> None:
    """Let this rank find itself as `torchrun` leaves it, and libraries keep their thoughts."""
    world_size = str(dist.get_world_size())
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": world_size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",  # the group is there already
        "TORCHELASTIC_RUN_ID": "benchmarks",
    }
    # What a library thinks about its own calls is printed for each rank and each log.
    warnings.simplefilter("ignore")


# -- What should have come out -------------------------------------------------------------------

_FOLDS: dict[str, Any] = {"sum": np.sum, "mean": np.mean, "max": np.max, "min": np.min}


def _truth(workload: Workload, ranks: int, number: int) -> dict[str, float]:
    """Return the percentiles over the pooled samples of an interval, or the scalars if there are none."""
    columns: dict[tuple[str, str], list[Any]] = {}
    for rank in range(ranks):
        for batch in workload.interval(rank, number):
            for column in batch:
                columns.setdefault((column.key, column.aggregation), []).append(column.values)
    scalars: dict[str, float] = {}
    of_distributions: dict[str, float] = {}
    for (key, aggregation), parts in columns.items():
        values = np.concatenate(parts)
        if aggregation == "distribution":
            of_distributions |= percentiles(key, np.tile(values, workload.repeats))
        else:
            repeats = workload.repeats if aggregation == "sum" else 1
            scalars[key] = float(_FOLDS[aggregation](values)) * repeats
    return of_distributions or scalars


def _worst(logged: Mapping[str, float], wanted: Mapping[str, float]) -> float | None:
    """Return the largest relative error; None where there was nothing to get wrong."""
    if not logged or not wanted:
        return None
    return max(abs(logged[key] - value) / abs(value) for key, value in wanted.items())
