"""Text for a terminal: figures, cells of names in any script, colour where there is any."""

from __future__ import annotations

import math
import os
import re
import shutil
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TextIO

from metricfold.sinks.drawing import clock

__all__ = ["Terminal", "ago", "columns", "cut", "figure", "moment", "padded", "steps", "width"]

_STYLES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "alarm": "1;31", "cyan": "36"}
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_NARROWEST = 40
_PIPED = 100  # columns where nobody says how many there are


@dataclass(frozen=True, slots=True)
class Terminal:
    """What text is written for.

    Args:
        width: in columns.
        colour: whether to colour it.
        ascii: whether it can show nothing but ASCII.
    """

    width: int = _PIPED
    colour: bool = False
    ascii: bool = False

    @classmethod
    def of(cls, stream: TextIO) -> Terminal:
        """Return what a stream ends in; ``COLUMNS``, ``NO_COLOR`` and its encoding are heeded."""
        try:
            shown = stream.isatty()
        except ValueError:  # it is closed
            shown = False
        found = shutil.get_terminal_size((_PIPED, 24)).columns
        if not shown and "COLUMNS" not in os.environ:
            found = _PIPED
        colour = shown and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
        try:
            "⣿█─▼–…".encode(stream.encoding or "ascii")
        except (LookupError, UnicodeEncodeError):
            return cls(max(found, _NARROWEST), colour, ascii=True)
        return cls(max(found, _NARROWEST), colour)

    def paint(self, text: str, style: str) -> str:
        """Return `text` in a style, such as ``"bold"``; nothing changes without colour."""
        if not self.colour or not style or not text:
            return text
        return f"\x1b[{_STYLES[style]}m{text}\x1b[0m"

    def written(self, text: str) -> str:
        """Return `text` as it can be shown: in ASCII if need be, with names spelled out."""
        if not self.ascii:
            return text
        for fine, plain in _IN_ASCII.items():
            text = text.replace(fine, plain)
        return text.encode("ascii", "backslashreplace").decode()


_IN_ASCII = {
    "± ": "+-",
    "–": "-",
    "…": "~",
    "·": "|",
    "─": "-",
    "│": "|",
    "┤": "+",
    "└": "+",
    "→": ">",
    "−": "-",
}
"""As wide as what they stand for."""


def width(text: str) -> int:
    r"""Return how many columns `text` takes in a terminal.

    >>> width("loss"), width("損失"), width("e\u0301"), width("\x1b[1mloss\x1b[0m")
    (4, 4, 1, 4)
    """
    if "\x1b" in text:
        text = _COLOUR.sub("", text)
    if text.isascii():
        return len(text)
    return sum(map(_cells, text))


def _cells(character: str) -> int:
    if unicodedata.combining(character) or unicodedata.category(character) in ("Cf", "Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def cut(text: str, room: int) -> str:
    """Return `text`, or its beginning and an ellipsis in so many columns.

    >>> cut("tokens_per_second", 8)
    'tokens_…'
    """
    if width(text) <= room:
        return text
    shown, left = "", room - 1
    for character in text:
        left -= _cells(character)
        if left < 0:
            break
        shown += character
    return f"{shown}…" if room > 0 else ""


def padded(text: str, room: int, *, right: bool = False) -> str:
    """Return `text` in so many columns, cut if it is longer."""
    text = cut(text, room) if "\x1b" not in text else text
    space = " " * max(room - width(text), 0)
    return space + text if right else text + space


def columns(
    rows: Sequence[Sequence[str]], *, left: Sequence[int] = (0,), gap: str = "  "
) -> list[str]:
    """Return the lines of a table, aligned: to the right but for the columns in `left`."""
    widths = [max(map(width, cells)) for cells in zip(*rows, strict=True)]
    return [
        gap.join(
            padded(cell, room, right=place not in left)
            for place, (cell, room) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def figure(value: float | None, digits: int = 5) -> str:
    """Return a number in so many significant digits; whole ones up to ten million in full.

    >>> [figure(one) for one in (2.31457812, 120000.0, 3e-4, 1.5e9, float("nan"), None)]
    ['2.3146', '120,000', '0.0003', '1.500 B', 'NaN', '–']
    """
    if value is None:
        return "–"
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    size = abs(value)
    if value == int(value) and size < 1e7:
        return f"{int(value):,}"
    for large, name in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if large <= size < 1000 * large and size >= 1e7:
            return f"{value / large:#.{digits - 1}g} {name}"
    if size < 1e-4 or size >= 1e7:
        text = f"{value:.{digits - 2}e}"
        mantissa, _, exponent = text.partition("e")
        return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{exponent}"
    if size < 0.1 and len(repr(value)) <= digits + 2:  # as it was given, such as a learning rate
        return repr(value)
    if size < 1e-2:
        return f"{value:.{digits - 1}g}"
    if size < 10**digits:
        return f"{value:#.{digits}g}".rstrip(".")
    return f"{value:,.0f}"


def steps(step: int | None) -> str:
    """Return a step with its thousands apart."""
    return "–" if step is None else f"{step:,}"


def moment(wall_time: float) -> str:
    """Return the local date and time."""
    return clock(wall_time, "%Y-%m-%d %H:%M:%S") or "at an unknown time"


def ago(seconds: float) -> str:
    """Return a time span in words of its size.

    >>> ago(5), ago(125), ago(7300), ago(200_000)
    ('5 s', '2 min', '2 h', '2 days')
    """
    seconds = max(seconds, 0.0)
    for size, name in ((172_800, "days"), (7200, "h"), (120, "min")):
        if seconds >= size:
            unit = {"days": 86_400, "h": 3600, "min": 60}[name]
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds:.0f} s"
