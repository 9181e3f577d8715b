"""What one run of the comparison found, as it is written to a file and read back."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.peers.points import Point
from benchmarks.peers.run import Measured

__all__ = ["Outcome", "Results", "Row"]


@dataclass(frozen=True, slots=True)
class Row:
    """One library at one point.

    Args:
        library: its name.
        point: where.
        measured: what it took; None if it could not.
        reason: why not.
    """

    library: str
    point: Point
    measured: Measured | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a library made of ranks that differ.

    Args:
        library: its name.
        case: how they differ.
        truth: what all ranks together have to say.
        outcome: what came out.
    """

    library: str
    case: str
    truth: str
    outcome: str


@dataclass(slots=True)
class Results:
    """All of it.

    Args:
        machine: what it was measured on, in words.
        versions: of each library that was there.
        window: recent values that a distribution kept; None: all.
        axes: points by axis.
        rows: every library at every point.
        outcomes: what came out where ranks differ.
    """

    machine: str
    versions: dict[str, str]
    window: int | None
    axes: dict[str, list[Point]]
    rows: list[Row] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def libraries(self) -> list[str]:
        return list(dict.fromkeys(row.library for row in self.rows))

    def at(self, library: str, point: Point) -> Row:
        """Return what `library` did at `point`."""
        return next(row for row in self.rows if (row.library, row.point) == (library, point))

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Results:
        found: dict[str, Any] = json.loads(path.read_text())
        axes = {axis: [Point(**point) for point in found["axes"][axis]] for axis in found["axes"]}
        rows = [
            Row(
                row["library"],
                Point(**row["point"]),
                row["measured"] and Measured(**row["measured"]),
                row["reason"],
            )
            for row in found["rows"]
        ]
        outcomes = [Outcome(**outcome) for outcome in found["outcomes"]]
        return cls(found["machine"], found["versions"], found["window"], axes, rows, outcomes)
