"""Curves as text: Braille charts and sparklines that show every spike and every NaN.

A column of a chart stands for a stretch of steps, and shows the mean, the least and the greatest value
in it; so no spike is sampled away. What is not finite is a gap, with a ``!`` below it.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from metricfold.look.text import figure, padded, steps, width

__all__ = ["chart", "sparkline"]

FloatArray = npt.NDArray[np.float64]

_LEVELS = "▁▂▃▄▅▆▇█"
_LEVELS_ASCII = "_.-=+*%#"
_FEW = 3  # values of a column that are drawn as they are
_DOTS = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])
"""The bits of a Braille character, by row and column of its dots."""


def sparkline(x: Any, y: Any, room: int, *, plain: bool = False) -> str:
    """Return a curve in one line: the mean of each stretch, ``!`` where something is not finite.

    >>> sparkline([1, 2, 3, 4], [4.0, 3.0, float("nan"), 1.0], 4)
    '█▆!▁'
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if not len(x) or room < 1:
        return " " * room
    room = min(room, len(x))
    places = _places(x, room)
    finite = np.isfinite(y)
    counts = np.bincount(places[finite], minlength=room)
    sums = _added(places[finite], y[finite], room)
    bad = np.bincount(places[~finite], minlength=room) > 0
    means = np.divide(sums, counts, out=np.full(room, np.nan), where=counts > 0)
    levels = _LEVELS_ASCII if plain else _LEVELS
    known = means[np.isfinite(means)]
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 0.0)
    scale = (len(levels) - 1e-6) / (high - low) if high > low else 0.0
    shown = []
    for mean, is_bad in zip(means.tolist(), bad.tolist(), strict=True):
        if is_bad:
            shown.append("!")
        elif math.isnan(mean):
            shown.append(" ")
        else:
            shown.append(levels[int((mean - low) * scale)] if scale else levels[len(levels) // 2])
    return "".join(shown)


def chart(
    x: Any, y: Any, room: int, height: int, *, log: bool = False, plain: bool = False
) -> list[str]:
    """Return the lines of a chart with axes.

    Args:
        x: steps, ascending.
        y: values; with `log`, those that are not above 0 are gaps.
        room: columns for all of it.
        height: lines for the curve.
        log: whether the vertical axis is logarithmic.
        plain: use nothing but ASCII.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    shown = np.isfinite(y) & ((y > 0) if log else True)
    if not shown.any():
        return ["(nothing finite to draw)" if len(y) else "(no values)"]
    drawn = np.log10(y[shown]) if log else y[shown]
    if len(drawn) and drawn.max() / 4 - drawn.min() / 4 > np.finfo(np.float64).max / 8:
        return ["(values too far apart to draw)"]
    low, high = float(drawn.min()), float(drawn.max())
    middle = high - (high - low) * (height // 2 + 0.5) / height
    labels = {0: high, height // 2: middle, height - 1: low} if height > 2 else {0: high}
    if high == low:
        labels = {height // 2: low}
    texts = {row: figure(10**one if log else one, 4) for row, one in labels.items()}
    margin = max(map(width, texts.values())) + 2
    across = max(room - margin, 4)
    dots = 1 if plain else 2
    grid = _drawn(x, shown, drawn, across * dots, height * (1 if plain else 4), low, high)
    cells = _ascii(grid) if plain else _braille(grid)
    lines = [
        f"{padded(texts.get(row, ''), margin - 2, right=True)} {'┤' if row in texts else '│'}{line}"
        for row, line in enumerate(cells)
    ]
    bad = np.zeros(across, np.bool_)
    bad[_places(x, across)[~shown]] = True
    if bad.any():
        marks = "".join("!" if one else " " for one in bad.tolist())
        lines.append(f"{' ' * (margin - 1)}│{marks}".rstrip())
    lines.append(f"{' ' * (margin - 1)}└{'─' * across}")
    first, last = steps(int(x[0])), steps(int(x[-1]))
    between = " " * max(across - width(first) - width(last), 1)
    lines.append(
        f"{' ' * margin}{first}{between}{last}" if x[0] != x[-1] else f"{' ' * margin}{first}"
    )
    return [line.rstrip() for line in lines]


def _places(x: FloatArray, room: int) -> npt.NDArray[np.intp]:
    """Return which of so many columns each step falls into."""
    span = x[-1] - x[0]
    if span <= 0:
        return np.zeros(len(x), np.intp)
    found: npt.NDArray[np.intp] = np.minimum((x - x[0]) * (room / span), room - 1).astype(np.intp)
    return found


def _added(places: npt.NDArray[np.intp], values: FloatArray, room: int) -> FloatArray:
    return np.bincount(places, weights=values, minlength=room).astype(np.float64)


def _drawn(
    x: FloatArray,
    shown: npt.NDArray[np.bool_],
    drawn: FloatArray,
    across: int,
    down: int,
    low: float,
    high: float,
) -> npt.NDArray[np.bool_]:
    """Return which dots are set, shape (down, across).

    Of many values in one column these are the mean, through which the curve goes, the least and the
    greatest; of few all that lies between.
    """
    grid = np.zeros((down, across), np.bool_)
    places = _places(x, across)[shown]
    counts = np.bincount(places, minlength=across)
    means = np.divide(_added(places, drawn, across), counts, out=np.zeros(across), where=counts > 0)

    def row_of(values: FloatArray) -> npt.NDArray[np.intp]:
        if high == low:
            return np.full(len(values), down // 2, np.intp)
        return np.rint((high - values) / (high - low) * (down - 1)).astype(np.intp)

    rows, curve = row_of(drawn), row_of(means)
    top, bottom = np.full(across, down, np.intp), np.full(across, -1, np.intp)
    np.minimum.at(top, places, rows)
    np.maximum.at(bottom, places, rows)
    few = counts <= _FEW
    first, last = np.where(few, top, curve), np.where(few, bottom, curve)
    # The curve goes on to the next column, but not across a value that is not finite.
    gaps = np.flatnonzero(np.diff(np.flatnonzero(shown)) > 1)
    broken = set(zip(places[gaps].tolist(), places[gaps + 1].tolist(), strict=True))
    filled = np.flatnonzero(counts).tolist()
    for here, there in itertools.pairwise(filled):
        if (here, there) in broken:
            continue
        one, other = int(curve[here]), int(curve[there])
        for place in range(here + 1, there):
            grid[round(one + (other - one) * (place - here) / (there - here)), place] = True
        if there == here + 1:  # they meet halfway
            middle = (one + other) // 2
            for place in (here, there):
                first[place], last[place] = min(first[place], middle), max(last[place], middle)
    for place in filled:
        grid[first[place] : last[place] + 1, place] = True
        grid[[top[place], bottom[place]], place] = True
    return grid


def _braille(grid: npt.NDArray[np.bool_]) -> list[str]:
    down, across = grid.shape
    cells = grid.reshape(down // 4, 4, across // 2, 2)
    bits = (cells * _DOTS[np.newaxis, :, np.newaxis, :]).sum(axis=(1, 3))
    return ["".join(chr(0x2800 + one) if one else " " for one in row) for row in bits.tolist()]


def _ascii(grid: npt.NDArray[np.bool_]) -> list[str]:
    return ["".join("*" if one else " " for one in row) for row in grid.tolist()]
