"""What a log costs on more ranks than a machine has: measured of one rank, and modelled of the network.

`world` simulates the ranks, of which a few are real; `network` says how long collectives take.
"""

from __future__ import annotations

import statistics
from threading import Lock

from benchmarks.ranks import run_threads
from benchmarks.scale.network import TCP, Algorithm, seconds
from benchmarks.scale.world import Log, logs_of
from benchmarks.table import Section, amount, at_most, bytes_text
from benchmarks.table import seconds as duration
from benchmarks.workloads import Workload, large, small

_REAL = 2
"""So many ranks of each world have values of their own."""
_MOST_GATHERED = 2**28
"""Beyond so many bytes no all-gather is carried out: what it would bring stands in brackets."""
_WARM_UPS = 2
"""Logs that bring the schema, its capacities and the windows to where they stay."""


def measure(*, quick: bool) -> list[Section]:
    """Return what logs take in worlds of several sizes, the first and the later ones."""
    workloads = (small(10), large(3, 50)) if quick else (small(100), large(50, 1000))
    worlds = (16, 64) if quick else (16, 256, 1024, 16_384)
    later = Section(
        f"A log of rank 0; network: {TCP}",
        head=[
            *("ranks", "route", "sent", "received", "CPU", "dict", "memory"),
            *("network: ring", "tree", "log: ring", "tree"),
        ],
    )
    first = Section("The first log, where the ranks agree on the keys", head=later.head)
    budget = Section(f"A log on {worlds[-1]:,} ranks until rank 0 has its dict, modelled")
    for workload in workloads:
        for section in (later, first):
            section.lines.append([f"**{workload.title}**"])
        for ranks in worlds:
            for route in ("gather", "tree"):
                logs = simulated(workload, route, ranks, 1 if quick else 5)
                if isinstance(logs, int):
                    later.lines.append([f"{ranks:,}", route, "", f"({bytes_text(logs)})"])
                    continue
                steady = in_steady_state(logs)
                later.lines.append(_line(ranks, route, steady))
                first.lines.append(_line(ranks, route, logs[0]))
        for algorithm, limit in ((Algorithm.RING, at_most(100)), (Algorithm.TREE, None)):
            took = lasts(steady, ranks, algorithm) * 1e3
            what = f"{workload.title}, over a {algorithm.value}"
            budget.rows.append(amount(what, took, "ms", budget=limit))
    budget.notes.append("Connecting every pair of ranks, once, is not part of it.")
    return [budget, later, first]


def simulated(workload: Workload, route: str, ranks: int, logs: int) -> list[Log] | int:
    """Return rank 0's logs: the first, more warm-ups, `logs` timed ones and one whose memory is traced.

    Where they would gather too much it is the bytes that each would bring.
    """
    if route == "gather" and ranks > 16:
        few = simulated(workload, route, 16, 0)
        assert isinstance(few, list)
        received = few[-1].received * ranks // 16
        if received > _MOST_GATHERED:
            return received
    number = _WARM_UPS + logs + 1
    found: list[Log] = run_threads(
        logs_of, _REAL, workload, route, ranks, number, Lock(), timeout=600
    )[0]
    if found[-1].schema_rounds != found[_WARM_UPS - 1].schema_rounds:
        raise AssertionError("the keys still change: this is not the steady state")
    return found


def in_steady_state(logs: list[Log]) -> Log:
    """Return the medians of the timed logs, and all else of the last one."""
    *timed, last = logs[_WARM_UPS:]
    cpu, report = (
        statistics.median(getattr(log, what) for log in timed or [last]) for what in ("cpu", "dict")
    )
    return Log(last.collectives, cpu, report, last.memory, last.schema_rounds)


def lasts(log: Log, ranks: int, algorithm: Algorithm) -> float:
    """Return the seconds until rank 0 has something to write."""
    return log.cpu + seconds(log.collectives, ranks, algorithm, TCP) + log.dict


def _line(ranks: int, route: str, log: Log) -> list[str]:
    network = [seconds(log.collectives, ranks, algorithm, TCP) for algorithm in Algorithm]
    return [
        *(f"{ranks:,}", route, bytes_text(log.sent), bytes_text(log.received)),
        *(duration(log.cpu), duration(log.dict), bytes_text(log.memory) if log.memory else ""),
        *map(duration, network),
        *(duration(lasts(log, ranks, algorithm)) for algorithm in Algorithm),
    ]
