"""What was found, as Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from benchmarks.scale.answers import NARROW, WIDE, Log, cost, crossing, gathered, wide_from
from benchmarks.scale.model import FAST, TCP, Algorithm, Network, seconds
from benchmarks.scale.results import First, Results, Steady
from benchmarks.table import bytes_text
from benchmarks.table import seconds as duration

__all__ = ["tables"]

Row = TypeVar("Row", Steady, First)

_COSTED = (1024, 16_384)
_RING, _TREE = Algorithm.RING, Algorithm.TREE


def tables(results: Results, network: Network) -> dict[str, str]:
    """Return each table by its name."""
    return {
        "rank": _rank(results),
        "log": _log(results, network),
        "crossing": _crossing(results, network),
        "first": _first(results, network),
        "samples": _samples(results),
    }


def _rank(results: Results) -> str:
    head = ["ranks"]
    for route in (NARROW, WIDE):
        head += [f"{route}: received", "CPU", "dict", "memory"]
    rows: list[list[str]] = []
    for workload, steady in _by_workload(results.steady):
        sent = {row.route: sum(one.sent for one in row.collectives) for row in steady}
        rows.append(
            [f"**{workload}** (sent: {bytes_text(sent[NARROW])}, {bytes_text(sent[WIDE])})"]
        )
        found = {(row.route, row.ranks): row for row in steady}
        for ranks in sorted({row.ranks for row in steady}):
            cells = [f"{ranks:,}"]
            for route in (NARROW, WIDE):
                row = found.get((route, ranks))
                if row is None:
                    cells += [f"({bytes_text(ranks * sent[route])})", "", "", ""]
                    continue
                cells += [
                    bytes_text(sum(one.received for one in row.collectives)),
                    duration(row.reduce),
                    duration(row.report),
                    bytes_text(row.report_peak),
                ]
            rows.append(cells)
    return _table(head, rows)


def _log(results: Results, network: Network) -> str:
    head = ["ranks", "route", "CPU", "network: ring", "tree", "dict", "log: ring", "tree"]
    rows: list[list[str]] = []
    for workload, _ in _by_workload(results.steady):
        rows.append([f"**{workload}**"])
        for ranks in _COSTED:
            for route in (NARROW, WIDE):
                ring, tree = (
                    cost(results, workload, route, ranks, algorithm, network)
                    for algorithm in (_RING, _TREE)
                )
                rows.append([f"{ranks:,}", route, *_of_rank(ring, tree)])
    return _table(head, rows)


def _of_rank(ring: Log, tree: Log) -> list[str]:
    sign = "" if ring.rank.measured else "≈ "
    return [
        sign + duration(ring.rank.reduce),
        duration(ring.network),
        duration(tree.network),
        sign + duration(ring.rank.report),
        duration(ring.total),
        duration(tree.total),
    ]


def _crossing(results: Results, network: Network) -> str:
    head = [
        "workload",
        "network",
        "ring: all may go on",
        "rank 0 has its dict",
        "tree: all may go on",
        "rank 0 has its dict",
        "`auto` is wide from",
    ]
    rows: list[list[str]] = []
    for workload, _ in _by_workload(results.steady):
        size = gathered(results, workload)
        for one in {str(one): one for one in (network, TCP, FAST)}.values():
            cells = [workload, str(one)]
            for algorithm in (_RING, _TREE):
                for report in (False, True):
                    ranks = crossing(results, workload, algorithm, one, report=report)
                    cells.append(
                        "never" if ranks is None else f"{ranks:,} ({bytes_text(ranks * size)})"
                    )
            rows.append([*cells, f"{wide_from(results, workload):,}"])
    return _table(head, rows)


def _first(results: Results, network: Network) -> str:
    head = ["ranks", "different", "sent", "received", "CPU", "memory", "network: ring", "tree"]
    rows: list[list[str]] = []
    for workload, found in _by_workload(results.first):
        rows.append([f"**{workload}**"])
        worlds = [row.ranks for row in found]
        for row in found:
            if row.ranks not in (min(worlds), *_COSTED):
                continue
            rows.append(
                [
                    f"{row.ranks:,}",
                    f"{row.different}",
                    bytes_text(sum(one.sent for one in row.collectives)),
                    bytes_text(sum(one.received for one in row.collectives)),
                    duration(row.seconds),
                    bytes_text(row.peak),
                    *(
                        duration(seconds(row.collectives, row.ranks, algorithm, network))
                        for algorithm in (_RING, _TREE)
                    ),
                ]
            )
    return _table(head, rows)


def _samples(results: Results) -> str:
    head = ["route", "ranks", "values a rank", "values in all", "sent", "CPU", "dict", "memory"]
    return _table(
        head,
        [
            [
                row.route,
                f"{row.ranks:,}",
                f"{row.samples:,}",
                f"{row.counted:,}",
                bytes_text(sum(one.sent for one in row.collectives)),
                duration(row.seconds),
                duration(row.report),
                bytes_text(row.peak),
            ]
            for row in results.samples
        ],
    )


def _by_workload(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    for workload in dict.fromkeys(row.workload for row in rows):
        yield workload, [row for row in rows if row.workload == workload]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join([*row, *[""] * (len(head) - len(row))]) + " |" for row in rows]
    return "\n".join(lines)
