"""What a log costs with any number of ranks: what was measured of a rank, and the network's model."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import numpy as np

from benchmarks.scale.model import Algorithm, Network, seconds
from benchmarks.scale.results import Results, Steady
from metricfold.routes import _MOST_GATHERED

__all__ = ["NARROW", "WIDE", "Log", "Rank", "cost", "crossing", "gathered", "rank_at", "wide_from"]

NARROW, WIDE = "narrow", "wide"
_MOST_RANKS = 2**20
_WORTH_IT = 1e-3
"""Seconds that a route has to save: less is lost in what CPU times scatter by."""


@dataclass(frozen=True, slots=True)
class Rank:
    """What a log takes of a rank.

    Args:
        reduce: CPU seconds of the reduction, which every rank spends at the same time.
        report: CPU seconds of the dict, on rank 0 alone.
        measured: whether a world of that size has been simulated, or a line drawn.
    """

    reduce: float
    report: float
    measured: bool


@dataclass(frozen=True, slots=True)
class Log:
    """What one log costs.

    Args:
        rank: what it takes of a rank.
        network: seconds in collectives, by the model.
    """

    rank: Rank
    network: float

    @property
    def reduce(self) -> float:
        """Seconds until every rank may go on."""
        return self.rank.reduce + self.network

    @property
    def total(self) -> float:
        """Seconds until rank 0 has something to write, too."""
        return self.reduce + self.rank.report


def rank_at(results: Results, workload: str, route: str, ranks: int) -> Rank:
    """Return what a log takes of a rank, measured where it was."""
    for row in _rows(results, workload, route):
        if row.ranks == ranks:
            return Rank(row.reduce, row.report, measured=True)
    return _on_line(results, workload, route, ranks)


def cost(
    results: Results, workload: str, route: str, ranks: int, algorithm: Algorithm, network: Network
) -> Log:
    """Return what a log costs."""
    rank = rank_at(results, workload, route, ranks)
    return Log(rank, _on_network(results, workload, route, ranks, algorithm, network))


def crossing(
    results: Results, workload: str, algorithm: Algorithm, network: Network, *, report: bool
) -> int | None:
    """Return from how many ranks on the wide route saves a millisecond; None: not with a million.

    Args:
        results: what was measured.
        workload: what is logged.
        algorithm: of the collectives.
        network: that they run on.
        report: whether a log lasts until rank 0 has its dict, or until every rank may go on.
    """

    def lasts(route: str, ranks: int) -> float:
        # On the lines alone: single measurements would let the routes cross back and forth.
        rank = _on_line(results, workload, route, ranks)
        log = Log(rank, _on_network(results, workload, route, ranks, algorithm, network))
        return log.total if report else log.reduce

    def pays(ranks: int) -> bool:
        return lasts(NARROW, ranks) - lasts(WIDE, ranks) >= _WORTH_IT

    low, high = 1, _MOST_RANKS
    if not pays(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        if pays(middle):
            high = middle
        else:
            low = middle
    return high


def gathered(results: Results, workload: str) -> int:
    """Return the bytes that each rank sends on the narrow route."""
    return _rows(results, workload, NARROW)[0].collectives[0].sent


def wide_from(results: Results, workload: str) -> int:
    """Return from how many ranks on ``route="auto"`` is the wide one."""
    return _MOST_GATHERED // gathered(results, workload) + 1


def _on_network(
    results: Results, workload: str, route: str, ranks: int, algorithm: Algorithm, network: Network
) -> float:
    # What a rank hands in does not depend on how many there are.
    collectives = _rows(results, workload, route)[0].collectives
    return seconds(collectives, ranks, algorithm, network)


def _on_line(results: Results, workload: str, route: str, ranks: int) -> Rank:
    """Return what a straight line through all measurements says."""
    rows = _rows(results, workload, route)
    worlds = [row.ranks for row in rows]
    reduce, report = (
        _line(worlds, times, ranks, flat=route == WIDE)
        for times in ([row.reduce for row in rows], [row.report for row in rows])
    )
    return Rank(reduce, report, measured=False)


def _line(worlds: list[int], times: list[float], ranks: int, *, flat: bool) -> float:
    if flat or len(times) == 1:
        return statistics.median(times)
    # Every measurement counts by its relative error, or the largest world alone would decide.
    weights = 1 / np.array(times)
    columns = np.stack((np.ones(len(worlds)), np.array(worlds, dtype=float)), axis=1)
    start, slope = np.linalg.lstsq(columns * weights[:, None], np.array(times) * weights)[0]
    if slope < 0:
        return statistics.median(times)  # nothing becomes cheaper with more ranks: that was noise
    return max(float(start), 0.0) + float(slope) * ranks


def _rows(results: Results, workload: str, route: str) -> list[Steady]:
    found = [row for row in results.steady if (row.workload, row.route) == (workload, route)]
    if not found:
        raise ValueError(f"{workload!r} was not measured on the {route} route")
    return found
