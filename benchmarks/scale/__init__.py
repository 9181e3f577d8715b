"""What a log costs on more ranks than a machine has: measured of one rank, and modelled of the network.

`world` simulates the ranks, of which a few are real, and says how long exchanges take.
"""

from __future__ import annotations

from dataclasses import replace
from statistics import median
from threading import Lock

from benchmarks.ranks import run_threads
from benchmarks.scale.world import BANDWIDTH, LATENCY, Log, logs_of
from benchmarks.table import Section, amount, at_most, bytes_text, seconds
from benchmarks.workloads import Workload, large, small
from metricfold.communicator.tree import rounds_of

_REAL = 2
"""So many ranks of each world have values of their own."""
_MOST_GATHERED = 256
"""In larger worlds no all-gather is carried out: it would bring gigabytes."""
_WARM_UPS = 2
"""Logs that bring the schema, its rooms and the windows to where they stay."""


def measure(*, quick: bool) -> list[Section]:
    """Return what logs in the steady state take in worlds of several sizes."""
    workloads = (small(10), large(3, 50)) if quick else (small(100), large(50, 1000))
    worlds = (16, 64) if quick else (16, 256, 1024, 16_384)
    most = worlds[-1]
    head = ("ranks", "route", "rounds", "vector", "received", "CPU", "dict", "network", "log")
    network = f"{LATENCY * 1e6:g} µs, {BANDWIDTH * 8 / 1e9:g} Gbit/s"
    table = Section(f"A log of rank 0; network: {network}", head=head)
    budget = Section(f"A log on {most:,} ranks until rank 0 has its dict, modelled")
    for workload in workloads:
        table.lines.append([f"**{workload.title}**"])
        for ranks in worlds:
            for route in ("gather", "tree") if ranks <= _MOST_GATHERED else ("tree",):
                log = in_steady_state(workload, route, ranks, 1 if quick else 5)
                one = log.exchange
                sizes = bytes_text(one.size), bytes_text(one.received)
                times = map(seconds, (log.cpu, log.dict, one.seconds, log.seconds))
                table.lines.append([f"{ranks:,}", route, f"{one.rounds:,}", *sizes, *times])
        rounds, fewest = log.exchange.rounds, at_most(len(rounds_of(most)))
        budget.rows += [
            amount(workload.title, log.seconds * 1e3, "ms", budget=at_most(100)),
            amount("the same, rounds of the tree", rounds, "", budget=fewest),
        ]
    budget.rows.append(amount("connections that each rank makes before, once", most - 1, ""))
    budget.notes.append("Making them is not part of the log: gloo connects every pair of ranks.")
    return [budget, table]


def in_steady_state(workload: Workload, route: str, ranks: int, logs: int) -> Log:
    """Return a log of rank 0: the medians of `logs` of them, after those that warm up."""
    found: list[Log] = run_threads(
        logs_of, _REAL, workload, route, ranks, _WARM_UPS + logs, Lock(), timeout=600
    )[0]
    steady = found[_WARM_UPS:]
    if any(log.schema_rounds != steady[-1].schema_rounds for log in steady):
        raise AssertionError("the keys still change: this is not the steady state")
    medians = {what: median(getattr(log, what) for log in steady) for what in ("cpu", "dict")}
    return replace(steady[-1], **medians)
