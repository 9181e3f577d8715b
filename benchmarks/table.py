"""The result of a benchmark: rows with a figure, the budget next to it, and a verdict."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = [
    "Row",
    "Section",
    "amount",
    "at_least",
    "at_most",
    "bytes_text",
    "cost",
    "draw",
    "markdown",
    "seconds",
    "speedup",
]


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
    """One line of the table.

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

    def as_json(self) -> dict[str, object]:
        return {
            "what": self.what,
            "ours": self.ours,
            "against": self.against,
            "figure": self.figure,
            "unit": self.unit,
            "spread": self.spread,
            "budget": None if self.budget is None else str(self.budget),
            "verdict": self.verdict,
        }


@dataclass(slots=True)
class Section:
    """Rows of one subject, and what a reader should know about them."""

    title: str
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def cost(
    what: str, ours: list[float], against: str, theirs: list[float], budget: Budget | None = None
) -> Row:
    """Return how many times `theirs` ours costs; seconds of the same rounds, paired."""
    ratio, spread = _ratio(ours, theirs)
    return Row(what, seconds(_median(ours)), _named(against, theirs), ratio, "x", spread, budget)


def speedup(
    what: str, ours: list[float], against: str, theirs: list[float], budget: Budget | None = None
) -> Row:
    """Return how many times faster ours is; seconds of the same rounds, paired."""
    ratio, spread = _ratio(theirs, ours)
    return Row(
        what, seconds(_median(ours)), _named(against, theirs), ratio, "x faster", spread, budget
    )


def amount(
    what: str, figure: float, unit: str, ours: str = "", budget: Budget | None = None
) -> Row:
    """Return a figure that needs no comparison."""
    return Row(what, ours, "", figure, unit, None, budget)


def seconds(number: float) -> str:
    """Return a duration with its unit, three digits."""
    for scale, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "µs")):
        if number * scale >= 1:
            return f"{number * scale:.3g} {unit}"
    return f"{number * 1e9:.3g} ns"


def _named(against: str, theirs: list[float]) -> str:
    return f"{against}: {seconds(_median(theirs))}"


def _ratio(one: list[float], other: list[float]) -> tuple[float, tuple[float, float]]:
    """Return the ratio of the medians, and the quartiles of the ratios round by round."""
    pairs = sorted(a / b for a, b in zip(one, other, strict=True))
    quarter = len(pairs) // 4
    return _median(one) / _median(other), (pairs[quarter], pairs[-1 - quarter])


def _median(numbers: list[float]) -> float:
    ordered = sorted(numbers)
    middle = len(ordered) // 2
    return (ordered[middle] + ordered[-1 - middle]) / 2


_HEAD = ["what", "ours", "against", "figure", "quartiles", "budget", ""]


def draw(sections: list[Section]) -> str:
    """Return all sections as plain text."""
    rows = [_HEAD, *(row.cells() for section in sections for row in section.rows)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    lines: list[str] = []
    for section in sections:
        lines += ["", section.title, rule, _line(_HEAD, widths), rule]
        lines += [_line(row.cells(), widths) for row in section.rows]
        lines += [f"  {note}" for note in section.notes]
    return "\n".join(lines)


def _line(cells: list[str], widths: list[int]) -> str:
    text = "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
    return text.rstrip()


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """Return a table in Markdown."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| "
        + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in lines
    )


def bytes_text(number: float) -> str:
    """Return a number of bytes with its unit."""
    for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= scale:
            return f"{number / scale:.3g} {unit}"
    return f"{number:.0f} B"
