"""The one table of a campaign: what was injected, and what came of it.

A program of the campaign counts in rows, one for each kind of fault:

    def run(options: Options, table: Table) -> None:
        row = table.row("rank killed in the exchange")
        for trial in options.trials(row, full=400, quick=6):
            ... inject the fault that `trial.random` says, and look ...
            row.went_right()                   # or row.went_wrong("rank 1 named rank 2", trial)

    if __name__ == "__main__":
        main(run, __doc__)

What is neither right nor wrong: *hung* did not end in its time, *lost* is gone without having been
said, *documented* is gone as docs/reliability.md says. All but the last make the program fail.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

__all__ = ["Options", "Row", "Table", "Trial", "main", "printed"]

_NOTES = 5  # of each row; more of the same tell nothing new
_COLUMNS = ("injected", "right", "wrong", "hung", "lost", "documented")


@dataclass(frozen=True, slots=True)
class Trial:
    """One fault to inject.

    Args:
        number: from 0 on.
        random: its own source of chance, which the seed of the campaign, the row and the number
            decide, so that one trial can be run again by itself.
    """

    number: int
    random: random.Random


@dataclass(slots=True)
class Row:
    """What came of one kind of fault."""

    name: str
    injected: int = 0
    right: int = 0
    wrong: int = 0
    hung: int = 0
    lost: int = 0
    documented: int = 0
    notes: list[str] = field(default_factory=list)
    figures: str = ""

    def inject(self, count: int = 1) -> None:
        """Count faults that `Options.trials` does not: several in one trial."""
        self.injected += count

    def went_right(self, count: int = 1) -> None:
        self.right += count

    def went_wrong(self, what: str, trial: Trial | None = None, count: int = 1) -> None:
        self.wrong += count
        self._note("wrong", what, trial)

    def has_hung(self, what: str, trial: Trial | None = None) -> None:
        self.hung += 1
        self._note("hung", what, trial)

    def has_lost(self, what: str, trial: Trial | None = None, count: int = 1) -> None:
        self.lost += count
        self._note("lost", what, trial)

    def as_documented(self, count: int = 1) -> None:
        """Count what is gone in a way that docs/reliability.md names."""
        self.documented += count

    def well(self) -> bool:
        return not (self.wrong or self.hung or self.lost)

    def _note(self, kind: str, what: str, trial: Trial | None) -> None:
        if len(self.notes) < _NOTES:
            where = "" if trial is None else f", trial {trial.number}"
            self.notes.append(f"{kind}{where}: {what}")


class Table:
    """The rows of a program, in the order in which they were asked for."""

    def __init__(self) -> None:
        self._rows: dict[str, Row] = {}

    def row(self, name: str) -> Row:
        """Return the row of that name, an empty one at first."""
        return self._rows.setdefault(name, Row(name))

    @property
    def rows(self) -> list[Row]:
        return list(self._rows.values())


@dataclass(frozen=True, slots=True)
class Options:
    """How a program is to run.

    Args:
        seed: decides every fault.
        quick: a few seconds, not minutes.
        seconds: after which no further trial begins.
        started: on the monotonic clock, when the program began.
    """

    seed: int
    quick: bool
    seconds: float
    started: float = field(default_factory=time.monotonic)

    def pick(self, full: int, quick: int) -> int:
        """Return how many of something there are to be."""
        return quick if self.quick else full

    def trials(self, row: Row, *, full: int, quick: int) -> Iterator[Trial]:
        """Yield as many trials as there are to be, and count each as injected."""
        for number in range(self.pick(full, quick)):
            if self.left() <= 0:
                row.notes.append(f"time was up after {number} trials")
                return
            row.inject()
            yield self.trial(row, number)

    def trial(self, row: Row, number: int) -> Trial:
        """Return one trial of a row."""
        return Trial(number, random.Random(f"{self.seed}/{row.name}/{number}"))

    def left(self) -> float:
        """Return how many seconds this program still has."""
        return self.started + self.seconds - time.monotonic()


def main(run: Callable[[Options, Table], None], about: str | None) -> None:
    """Run a program of the campaign by the command line's arguments, print its table, and exit.

    The exit status is 1 if anything went wrong, hung or was lost, or nothing was injected.
    """
    parser = argparse.ArgumentParser(description=(about or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="decides every fault")
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--seconds", type=float, help="begin no trial after so many seconds")
    parser.add_argument("--json", type=Path, help="write the rows to this file, too")
    given = parser.parse_args()
    seconds = given.seconds or (20.0 if given.quick else 240.0)
    table = Table()
    run(Options(given.seed, given.quick, seconds), table)
    if given.json:
        given.json.write_text(json.dumps([asdict(row) for row in table.rows]))
    print(printed(table.rows))
    injected = any(row.injected for row in table.rows)
    raise SystemExit(not injected or not all(row.well() for row in table.rows))


def printed(rows: Sequence[Row]) -> str:
    """Return the rows as text, with their sum."""
    width = max((len(row.name) for row in rows), default=0)
    total = Row("in all")
    for column in _COLUMNS:
        setattr(total, column, sum(getattr(row, column) for row in rows))
    lines = [f"{'':{width}}" + "".join(f"{column:>12}" for column in _COLUMNS)]
    for row in (*rows, total):
        numbers = "".join(f"{getattr(row, column):>12}" for column in _COLUMNS)
        lines.append(f"{row.name:{width}}{numbers}")
        lines += [f"    {note}" for note in (row.figures, *row.notes) if note]
    return "\n".join(lines)
