"""`python -m benchmarks.peers.page FILE`: put what was found into docs/benchmarks.md, with plots.

FILE is what `python -m benchmarks.peers --json FILE` wrote. `make figures` does both.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.peers.points import Point
from benchmarks.peers.results import Results
from benchmarks.peers.run import Measured
from benchmarks.peers.tables import AXES, axis_table, differing_table, elsewhere
from benchmarks.plots import draw
from benchmarks.table import bytes_text, seconds

_PAGE = Path("docs/benchmarks.md")
_IMAGES = Path("docs/images")
_LEAST_MEMORY = 100_000
_BEGIN, _END = "<!-- peers: written by `make figures` -->", "<!-- peers: end -->"


def main() -> int:
    """Draw the plots and write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.page", allow_abbrev=False)
    parser.add_argument("results", type=Path, metavar="FILE")
    results = Results.load(parser.parse_args().results)
    page = _PAGE.read_text()
    if page.count(_BEGIN) != 1 or page.count(_END) != 1:
        print(f"{_PAGE} needs one line {_BEGIN!r} and, below it, one {_END!r}", file=sys.stderr)
        return 1
    before, _, rest = page.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    _PAGE.write_text(f"{before}{_BEGIN}\n\n{_section(results)}\n\n{_END}{after}")
    return 0


def _section(results: Results) -> str:
    """Return the generated part of the page."""
    window = "all" if results.window is None else f"{results.window:,}"
    versions = ", ".join(f"{name} {number}" for name, number in results.versions.items())
    parts = [f"{results.machine}; {versions}. Recent values of a distribution kept: {window}."]
    for axis, points in results.axes.items():
        parts += [f"### {AXES[axis]}", _time(results, axis, points)]
        if axis == "samples":
            parts.append(_memory(results, axis, points))
        parts.append(axis_table(results, axis))
    if results.outcomes:
        parts += ["### Ranks that differ", differing_table(results)]
    return "\n\n".join(parts)


def _time(results: Results, axis: str, points: Sequence[Point]) -> str:
    return _plot(results, axis, points, "time", "Time per log", lambda found: found.seconds)


def _memory(results: Results, axis: str, points: Sequence[Point]) -> str:
    # What is less than that is no more than what the kernel's account is off by.
    return _plot(
        results,
        axis,
        points,
        "memory",
        f"Memory per rank ({bytes_text(_LEAST_MEMORY)} if less)",
        lambda found: max(found.memory, _LEAST_MEMORY),
    )


def _plot(
    results: Results,
    axis: str,
    points: Sequence[Point],
    what: str,
    title: str,
    of: Callable[[Measured], float],
) -> str:
    """Draw one plot and return the line of the page that shows it."""
    lines = {}
    for library in results.libraries:
        rows = [results.at(library, point) for point in points]
        lines[library] = [
            (getattr(row.point, axis), of(row.measured)) for row in rows if row.measured
        ]
    path = _IMAGES / f"peers-{axis}-{what}.png"
    title = f"{title}: {elsewhere(points[0], axis)}"
    draw(path, title, AXES[axis].lower(), lines, seconds if what == "time" else bytes_text)
    return f"![{title}]({path.relative_to(_PAGE.parent)})"


if __name__ == "__main__":
    sys.exit(main())
