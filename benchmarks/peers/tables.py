"""The results as Markdown tables, which read as plain text too."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.peers.points import Point
from benchmarks.peers.results import Results, Row
from benchmarks.peers.run import Measured
from benchmarks.table import bytes_text, markdown, seconds

__all__ = ["AXES", "axis_table", "differing_table", "elsewhere", "tables"]

AXES = {
    "metrics": "Number of metrics",
    "ranks": "Number of ranks",
    "distributions": "Number of distributions",
    "samples": "Samples on each rank between two logs",
}
"""How a heading calls each axis."""


def tables(results: Results) -> str:
    """Return all of them."""
    parts = [f"{AXES[axis]}\n\n{axis_table(results, axis)}" for axis in results.axes]
    if results.outcomes:
        parts.append(f"Ranks that differ\n\n{differing_table(results)}")
    return "\n\n".join(parts)


def axis_table(results: Results, axis: str) -> str:
    """Return a table of time per log at each point, and of the rest from the first to the last."""
    points = results.axes[axis]
    with_percentiles = any(point.distributions for point in points)
    head = [
        elsewhere(points[0], axis),
        *(f"{getattr(point, axis):,}" for point in points),
        "collectives",
        "bytes sent",
        "memory",
        *(["percentiles off by"] if with_percentiles else []),
    ]
    lines = []
    for library in results.libraries:
        rows = [results.at(library, point) for point in points]
        line = [library, *(_time(row) for row in rows)]
        line += [
            _range(rows, lambda found: f"{found.collectives:,}"),
            _range(rows, lambda found: bytes_text(found.sent)),
            _range(rows, lambda found: bytes_text(found.memory)),
        ]
        if with_percentiles:
            ran = [row for row in rows if row.measured]
            line.append(_range(ran[-1:], lambda found: _error(found.percentile_error)))
        lines.append(line)
    return markdown(head, lines)


def elsewhere(point: Point, axis: str) -> str:
    """Say what is the same along the whole axis."""
    words = {
        "metrics": f"{point.metrics:,} metrics",
        "ranks": f"{point.ranks} ranks",
        "samples": f"{point.samples:,} samples",
        "distributions": f"{point.distributions} distribution"
        + ("s" if point.distributions != 1 else ""),
    }
    return ", ".join(text for name, text in words.items() if name != axis)


def _time(row: Row) -> str:
    return seconds(row.measured.seconds) if row.measured else row.reason


def _range(rows: Sequence[Row], show: Callable[[Measured], str]) -> str:
    shown = [show(row.measured) for row in rows if row.measured]
    if not shown:
        return ""
    return shown[0] if shown[0] == shown[-1] else f"{shown[0]} → {shown[-1]}"


def _error(part: float | None) -> str:
    if part is None:
        return ""
    return "0" if part < 1e-6 else f"{100 * part:.2g} %"


def differing_table(results: Results) -> str:
    """Return what each library makes of ranks that differ."""
    truths = {outcome.case: outcome.truth for outcome in results.outcomes}
    libraries = list(dict.fromkeys(outcome.library for outcome in results.outcomes))
    found = {(outcome.case, outcome.library): outcome.outcome for outcome in results.outcomes}
    lines = [
        [case, truth, *(found[case, library] for library in libraries)]
        for case, truth in truths.items()
    ]
    return markdown(["two ranks", "together", *libraries], lines)
