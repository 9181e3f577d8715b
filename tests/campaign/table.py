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
said, *documented* is gone as docs/reliability.md says, and *not judged* is what the machine kept from
being a trial, such as a healthy rank that got no processor for seconds. All but the last two make the
program fail, and so does a `Goal` that it has not reached.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

__all__ = [
    "COLUMNS",
    "Goal",
    "Options",
    "Row",
    "Table",
    "Trial",
    "in_markdown",
    "main",
    "printed",
    "summed",
]

_NOTES = 5  # of each row; more of the same tell nothing new
COLUMNS = ("injected", "right", "wrong", "hung", "lost", "documented", "unjudged")
_HEADS = (*COLUMNS[:-1], "not judged")


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
    unjudged: int = 0
    notes: list[str] = field(default_factory=list)
    figures: str = ""
    came: dict[str, int] = field(default_factory=dict)  # what came of how many, such as "refused"

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

    def was_not_judged(self, what: str, trial: Trial | None = None) -> None:
        """Count what the machine kept from being a trial."""
        self.unjudged += 1
        self._note("not judged", what, trial)

    def became(self, what: str) -> None:
        """Count what became of one, beside whether that is right."""
        self.came[what] = self.came.get(what, 0) + 1

    def judged(self) -> int:
        """Return how many of those that were injected say something."""
        return self.injected - self.unjudged

    def well(self) -> bool:
        return not (self.wrong or self.hung or self.lost)

    def add(self, other: Row) -> None:
        """Take over what another process has counted of the same kind."""
        for column in COLUMNS:
            setattr(self, column, getattr(self, column) + getattr(other, column))
        self.notes = (self.notes + other.notes)[:_NOTES]
        self.figures = self.figures or other.figures
        self.came |= {what: self.came.get(what, 0) + count for what, count in other.came.items()}

    def _note(self, kind: str, what: str, trial: Trial | None) -> None:
        if len(self.notes) < _NOTES:
            where = "" if trial is None else f", trial {trial.number}"
            self.notes.append(f"{kind}{where}: {what}")


@dataclass(frozen=True, slots=True)
class Goal:
    """How many of something a whole campaign is to show.

    Args:
        what: of which it is to show so many.
        count: how many it has shown.
        least: how many it must.
    """

    what: str
    count: int
    least: int

    def reached(self) -> bool:
        return self.count >= self.least

    def __str__(self) -> str:
        short = "" if self.reached() else ": TOO FEW"
        return f"{self.count:,} {self.what}, of at least {self.least:,}{short}"


class Table:
    """The rows of a program, in the order in which they were asked for.

    Attributes:
        goals: what the program was to reach.
        figures: what else it found, in words.
    """

    def __init__(self) -> None:
        self._rows: dict[str, Row] = {}
        self.goals: list[Goal] = []
        self.figures: list[str] = []

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
        seconds: after which no further trial begins, once there were as many as there must be.
        started: on the monotonic clock, when the program began.
        crew: which of several processes this is, that share the trials of a row.
        crews: how many they are.
    """

    seed: int
    quick: bool
    seconds: float
    started: float = field(default_factory=time.monotonic)
    crew: int = 0
    crews: int = 1

    def pick(self, full: int, quick: int) -> int:
        """Return how many of something there are to be."""
        return quick if self.quick else full

    def trials(self, row: Row, *, full: int, quick: int, least: int = 0) -> Iterator[Trial]:
        """Yield as many trials as there are to be, and count each as injected.

        Args:
            row: counts them.
            full: how many.
            quick: how many, where seconds are to do.
            least: how many must be, however long they take; all crews together.
        """
        for number in range(self.crew, self.pick(full, quick), self.crews):
            if self.over(enough=number >= self.pick(least, 0)):
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

    def left_in_any_case(self) -> float:
        """Return after how many seconds nothing begins any more."""
        return self.left() + (_EXTENSION - 1.0) * self.seconds

    def over(self, *, enough: bool) -> bool:
        """Return whether no further trial is to begin.

        Args:
            enough: there were as many as there must be.
        """
        return self.left() <= 0 if enough else self.left_in_any_case() <= 0

    def of_crew(self, crew: int, crews: int) -> Options:
        """Return the options of one of several processes."""
        return replace(self, crew=crew, crews=crews)


_EXTENSION = 2.0
"""So many times its seconds a program goes on, as long as it has not shown what it must."""


def main(run: Callable[[Options, Table], None], about: str | None) -> None:
    """Run a program of the campaign by the command line's arguments, print its table, and exit.

    The exit status is 1 if anything went wrong, hung or was lost, a goal was missed, or nothing was
    injected.
    """
    parser = argparse.ArgumentParser(description=(about or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="decides every fault")
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--seconds", type=float, help="begin no trial after so many seconds")
    parser.add_argument("--json", type=Path, help="write what was found to this file, too")
    given = parser.parse_args()
    seconds = given.seconds or (20.0 if given.quick else 240.0)
    table = Table()
    options = Options(given.seed, given.quick, seconds)
    run(options, table)
    if given.quick:
        table.goals = []
    if given.json:
        found: dict[str, Any] = {
            "rows": [asdict(row) for row in table.rows],
            "goals": [asdict(goal) for goal in table.goals],
            "figures": table.figures,
        }
        given.json.write_text(json.dumps(found))
    print(printed([*table.rows, summed("in all", table.rows)]))
    print("\n".join([*map(str, table.goals), *table.figures]))
    print(f"{-options.left() + seconds:.0f} s")
    injected = any(row.injected for row in table.rows)
    well = all(row.well() for row in table.rows) and all(goal.reached() for goal in table.goals)
    raise SystemExit(not injected or not well)


def summed(name: str, rows: Sequence[Row]) -> Row:
    """Return one row that counts what several do."""
    total = Row(name)
    for row in rows:
        total.add(replace(row, notes=[], figures="", came={}))
    return total


def printed(rows: Sequence[Row]) -> str:
    """Return the rows as text."""
    width = max((len(row.name) for row in rows), default=0)
    lines = [f"{'':{width}}" + "".join(f"{head:>12}" for head in _HEADS)]
    for row in rows:
        numbers = "".join(f"{getattr(row, column):>12}" for column in COLUMNS)
        lines.append(f"{row.name:{width}}{numbers}")
        came = ", ".join(f"{count} {what}" for what, count in sorted(row.came.items()))
        lines += [f"    {note}" for note in (came, row.figures, *row.notes) if note]
    return "\n".join(lines)


def in_markdown(rows: Sequence[Row]) -> str:
    """Return the counts of rows as a table for docs/reliability.md."""
    heads = ["", *_HEADS]
    lines = [heads, ["---"] * len(heads)]
    lines += [[row.name, *(f"{getattr(row, column):,}" for column in COLUMNS)] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
