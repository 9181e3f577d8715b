"""What benchmarks print: rows with a figure, the budget next to it and a verdict, or a table of its own."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

_HEAD = ("what", "ours", "against", "figure", "quartiles", "budget", "")


@dataclass(frozen=True, slots=True)
class Budget:
    """A limit on a figure."""

    limit: float
    largest: bool

    def met(self, figure: float) -> bool:
        return figure <= self.limit if self.largest else figure >= self.limit

    def __str__(self) -> str:
        return f"{'≤' if self.largest else '≥'} {self.limit:g}"


def at_most(limit: float) -> Budget:
    return Budget(limit, largest=True)


def at_least(limit: float) -> Budget:
    return Budget(limit, largest=False)


@dataclass(frozen=True, slots=True)
class Row:
    """One line with a figure.

    Args:
        what: what was measured.
        ours: what it came to.
        against: what it is compared with, and what that came to.
        figure: the number that the budget speaks about.
        unit: of the figure; a ratio has ``x``.
        spread: quartiles of the figure over the rounds, if it has any.
        budget: what must be reached; None where the row only informs.
    """

    what: str
    ours: str
    against: str
    figure: float
    unit: str = "x"
    spread: tuple[float, float] | None = None
    budget: Budget | None = None

    @property
    def verdict(self) -> str:
        if self.budget is None:
            return ""
        return "pass" if self.budget.met(self.figure) else "MISS"

    def cells(self) -> list[str]:
        spread = "" if self.spread is None else f"{self.spread[0]:.3g} .. {self.spread[1]:.3g}"
        budget = "" if self.budget is None else f"{self.budget} {self.unit}"
        figure = f"{self.figure:.3g} {self.unit}".strip()
        return [self.what, self.ours, self.against, figure, spread, budget.strip(), self.verdict]


@dataclass(slots=True)
class Section:
    """One subject: rows with figures or lines under a head of its own, and what a reader should know.

    Its text is Markdown, which reads as plain text too and goes into a page as it is.
    """

    title: str
    rows: list[Row] = field(default_factory=list)
    head: Sequence[str] = _HEAD
    lines: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def cells(self) -> list[list[str]]:
        return [*(row.cells() for row in self.rows), *self.lines]

    def __str__(self) -> str:
        head = list(self.head)
        lines = [line + [""] * (len(head) - len(line)) for line in self.cells()]
        widths = [max(len(line[column]) for line in [head, *lines]) for column in range(len(head))]
        table = [head, ["-" * width for width in widths], *lines]
        text = [f"| {' | '.join(map(str.ljust, line, widths))} |" for line in table]
        return "\n".join([f"### {self.title}", "", *text, *(f"\n{note}" for note in self.notes)])


def cost(
    what: str, ours: list[float], against: str, theirs: list[float], budget: Budget | None = None
) -> Row:
    """Return how many times `theirs` ours costs; seconds of the same rounds, paired."""
    pairs = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    quarter = len(pairs) // 4
    mine, other = statistics.median(ours), statistics.median(theirs)
    spread = pairs[quarter], pairs[-1 - quarter]
    beside = f"{against}: {seconds(other)}"
    return Row(what, seconds(mine), beside, mine / other, "x", spread, budget)


def speedup(
    what: str, ours: list[float], against: str, theirs: list[float], budget: Budget | None = None
) -> Row:
    """Return how many times faster ours is, as `cost` does how many times it costs."""
    row = cost(what, ours, against, theirs)
    low, high = row.spread or ()
    figure, spread = 1 / row.figure, (1 / high, 1 / low)
    return replace(row, figure=figure, unit="x faster", spread=spread, budget=budget)


def amount(
    what: str, figure: float, unit: str, ours: str = "", budget: Budget | None = None
) -> Row:
    """Return a figure that needs no comparison."""
    return Row(what, ours, "", figure, unit, None, budget)


_SCALES = {"s": 1.0, "ms": 1e3, "µs": 1e6, "ns": 1e9}


def seconds_of(what: str, times: list[float], unit: str, budget: Budget | None = None) -> Row:
    """Return the median of `times`, in seconds, as a figure in `unit`."""
    figure = statistics.median(times) * _SCALES[unit]
    return amount(what, figure, unit, f"at best {seconds(min(times))}", budget)


def seconds(number: float) -> str:
    """Return a duration with its unit, three digits."""
    return _with_unit(number, ((unit, 1 / scale) for unit, scale in _SCALES.items()))


def bytes_text(number: float) -> str:
    """Return a number of bytes with its unit."""
    if number < 1e3:
        return f"{number:.0f} B"
    return _with_unit(number, (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)))


def _with_unit(number: float, units: Iterable[tuple[str, float]]) -> str:
    listed = list(units)
    unit, size = next((one for one in listed if number >= one[1]), listed[-1])
    return f"{number / size:.3g} {unit}"
