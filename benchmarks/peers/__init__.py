"""The same logs through other libraries, and what those make of ranks that differ.

`libraries` lists them, each with a file of its own, `run` measures one of them at one point, and
`differing` has the cases with a known answer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.peers.differing import CASES, outcome
from benchmarks.peers.libraries import BARE, LIBRARIES, OURS, Library
from benchmarks.peers.run import Measured, Point, run
from benchmarks.ranks import RankError, preload
from benchmarks.table import Section, amount, at_most, bytes_text, seconds

_AXES: dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]] = {
    "metrics": ("Number of metrics", (8,), (10, 100, 1000)),
    "ranks": ("Number of ranks", (1, 2), (1, 2, 4, 8)),
    "distributions": ("Number of distributions", (0, 2), (0, 10, 50)),
    "samples": (
        "Samples on each rank between two logs",
        (10**2,),
        (10**3, 10**4, 10**5, 10**6, 10**7),
    ),
}
"""How a heading calls each axis, and the points on it of a quick run and of another."""

_CENTRE, _QUICK = Point(metrics=100, ranks=4, samples=1000), Point(metrics=8, ranks=2, samples=100)
# Libraries that keep every value of every metric would need a machine of its own at the centre.
_MANY_SAMPLES = Point(metrics=4, ranks=2, samples=1000, distributions=1)


def measure(*, quick: bool) -> list[Section]:
    """Return a table for each axis, our memory, and a table of ranks that differ."""
    if sys.platform != "linux":
        note = "bytes and memory are read from the Linux kernel: this needs Linux"
        return [Section("Other libraries", lines=[["not run"]], notes=[note])]
    preload("benchmarks.peers.preload")
    axes = _axes(quick)
    span = (0.1, 3) if quick else (1.0, 40)
    found: dict[tuple[Library, Point], Measured | str] = {}
    for point in dict.fromkeys(point for points in axes.values() for point in points):
        floats = 0
        for library in LIBRARIES:
            one = found[library, point] = tried(library, point, floats, span)
            if library is OURS and isinstance(one, Measured):
                floats = one.floats
    sections = [
        axis_table(
            axis,
            points,
            {library.name: [found[library, point] for point in points] for library in LIBRARIES},
        )
        for axis, points in axes.items()
    ]
    return [*sections, _memory(axes["distributions"][-1], found), _differing()]


def _axes(quick: bool) -> dict[str, list[Point]]:
    """Return where libraries are measured: a centre, and one axis at a time around it."""
    centre = _QUICK if quick else _CENTRE
    return {
        axis: [
            replace(_MANY_SAMPLES if axis == "samples" else centre, **{axis: value})
            for value in (few if quick else many)
        ]
        for axis, (_, few, many) in _AXES.items()
    }


def tried(library: Library, point: Point, floats: int, span: Any) -> Measured | str:
    """Return what was measured, or why nothing was."""
    if not library.installed:
        return "not installed"
    try:
        return run(library, point, floats, span)
    except RankError as error:
        print(f"{library.name} failed at {point}: {error}", file=sys.stderr, flush=True)
        return "failed"


def axis_table(
    axis: str, points: Sequence[Point], found: Mapping[str, Sequence[Measured | str]]
) -> Section:
    """Return the time of a log at each point, and the rest from the first point to the last."""
    head = [
        ", ".join(f"{value:,} {name}" for name, value in points[0].named().items() if name != axis),
        *(f"{getattr(point, axis):,}" for point in points),
        *("collectives", "bytes sent", "memory", "off by"),
    ]
    section = Section(_AXES[axis][0], head=head)
    for library, results in found.items():
        ran = [one for one in results if isinstance(one, Measured)]
        times = [one if isinstance(one, str) else seconds(one.seconds) for one in results]
        rest = [
            _range(ran, lambda one: f"{one.collectives:,}"),
            _range(ran, lambda one: bytes_text(one.sent)),
            _range(ran, lambda one: bytes_text(one.memory)),
            _range(ran[-1:], lambda one: _percent(one.error)),
        ]
        section.lines.append([library, *times, *rest])
    return section


def _range(ran: Sequence[Measured], show: Callable[[Measured], str]) -> str:
    return " → ".join(dict.fromkeys(show(one) for one in (*ran[:1], *ran[-1:])))


def _percent(part: float | None) -> str:
    if part is None:
        return ""
    return "0" if part < 1e-6 else f"{100 * part:.2g} %"


def _memory(point: Point, found: Mapping[tuple[Library, Point], Measured | str]) -> Section:
    what = f"{point.distributions} distributions, {point.ranks} ranks"
    section = Section("Memory of a log, the neediest rank's")
    ours = found[OURS, point]
    if isinstance(ours, Measured):
        section.rows.append(amount(what, ours.memory / 1e6, "MB", budget=at_most(8)))
    return section


def _differing() -> Section:
    libraries = [library for library in LIBRARIES if library is not BARE]
    head = ["two ranks", "together", *(library.name for library in libraries)]
    section = Section("Ranks that differ", head=head)
    for case in CASES:
        outcomes = [outcome(it, case) if it.installed else "not installed" for it in libraries]
        section.lines.append([case.title, case.truth, *outcomes])
    return section
