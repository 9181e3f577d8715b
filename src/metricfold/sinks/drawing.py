"""Draws boards for a terminal: lines of text with styles, no wider than it and no taller.

train step 22,150 / 50,000  44 %   1.21 s/step   ETA 9 h 22 min   12:03:11
 !  math/loss was NaN once, 150 steps ago (step 22,000); finite since

loss     now   change    best  at step  so far
all   1.6759  ▼ 0.005  1.6731   21,910  █▆▄▄▄▃▃▂▃▂▂▂
math  3.0412  ▼ 0.016  3.0318   22,140  █▆▄▄▃▃▂!▂▂▂▂

grad_norm 0.61   lr 1.4e-4
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from metricfold.sinks.board import Board, Track
from metricfold.sinks.record import Meaning

if TYPE_CHECKING:
    from rich.text import Text

__all__ = ["ALARMING", "clock", "drawn", "in_ascii", "line", "number"]

ALARMING = "bold white on red"
_WARNING = "bold black on yellow"
_BARS = "▁▂▃▄▅▆▇█"
_GAP = "   "
_MISSING = "-"
_ALL = "all"
_MOST_SAID = 3  # lines about what was not finite, and alerts

_ASCII = str.maketrans(
    {
        **dict(zip(_BARS, ".:-=+*%#", strict=True)),
        "▼": "v",
        "▲": "^",
        "…": "~",
        "±": "~",
        "·": "|",
    }
)


def in_ascii(text: str, encoding: str) -> str:
    """Return `text` as a terminal of that encoding can show it, no longer than it is."""
    try:
        text.encode(encoding)
    except (UnicodeError, LookupError):
        plain = text.translate(_ASCII)
        return plain.encode("ascii", "replace").decode()
    return text


# -- Numbers and times -----------------------------------------------------------------------------


def number(value: float) -> str:
    """Return four significant digits, whole numbers in full, and what is not finite loudly."""
    if math.isnan(value):
        return "!NaN"
    if math.isinf(value):
        return "!INF" if value > 0 else "!-INF"
    magnitude = abs(value)
    if value == int(value) and magnitude < 1e15:
        return f"{int(value):,}"
    if magnitude < 0.01:
        return f"{value:.3g}"
    if magnitude < 1000:
        return f"{value:#.4g}"
    return f"{value:,.1f}" if magnitude < 1e9 else f"{value:.3e}"


def _leading(value: float) -> str:
    """Return a value of the leading metric, of which small differences matter."""
    return f"{value:.4f}" if 0.01 <= abs(value) < 1000 else number(value)


def _large(value: float) -> str:
    """Return a count in three or four digits."""
    for unit, letter in ((1e12, " T"), (1e9, " G"), (1e6, " M")):
        if abs(value) >= unit:
            digits = 2 if abs(value) < 10 * unit else 1
            return f"{value / unit:,.{digits}f}{letter}"
    return number(value)


def _duration(seconds: float) -> str:
    minutes, hours, days = seconds / 60, seconds / 3600, seconds / 86400
    if minutes < 1:
        return f"{seconds:.0f} s"
    if hours < 1:
        return f"{minutes:.0f} min"
    if days < 1:
        return f"{int(hours)} h {int(minutes % 60)} min"
    return f"{int(days)} d {int(hours % 24)} h"


def clock(wall_time: float, form: str = "%H:%M:%S") -> str:
    """Return a time as a clock here shows it; empty if it is none that a calendar has."""
    try:
        return time.strftime(form, time.localtime(wall_time))
    except (OverflowError, OSError, ValueError):
        return ""


def _step_time(seconds: float) -> str:
    return f"{seconds:.3g} s/step" if seconds >= 0.1 else f"{seconds * 1e3:.3g} ms/step"


# -- What is said above and below the table --------------------------------------------------------


class _Part(NamedTuple):
    """A piece of a line.

    Args:
        text: the piece.
        style: of rich.
        need: pieces of the largest go first where there is no room.
        before: what separates it from the piece before.
    """

    text: str
    style: str = ""
    need: int = 0
    before: str = _GAP


def _header(board: Board, *, timed: bool) -> list[_Part]:
    """Return the line above a table; `timed`: with how long training takes, of which one board knows."""
    total = board.total_steps if timed else None
    seconds = board.seconds_per_step() if timed else None
    parts = [
        _Part(f"{board.prefix or 'metrics'} ", "bold cyan"),
        _Part(f"step {board.step:,}", "bold", before=""),
    ]
    if total is not None:
        share = 100 * board.step / total
        parts.append(_Part(f"/ {total:,}  {share:.0f} %", need=1, before=" "))
    if seconds is not None:
        parts.append(_Part(_step_time(seconds), need=2))
    parts += [_Part(text, need=4) for _, text in _throughput(board)]
    if seconds is not None and total is not None and total > board.step:
        parts.append(_Part(f"ETA {_duration((total - board.step) * seconds)}", need=2))
    return [*parts, _Part(clock(board.wall_time), "dim", need=3)]


def _throughput(board: Board) -> list[tuple[str, str]]:
    """Return names of metrics that say how fast the training is, and how to say it."""
    found = []
    for name in board.names:
        value = board.of(name)
        if value is None or not math.isfinite(value):
            continue
        short = name.rpartition("/")[2]
        if short.endswith("_per_second"):
            what = short.removesuffix("_per_second")
            found.append((name, f"{_thousands(value)} {what}/s"))
        elif short.lower() == "mfu":
            found.append((name, f"MFU {value * 100 if value <= 1.5 else value:.1f} %"))
    return found


def _thousands(value: float) -> str:
    return f"{value / 1e3:.3g}k" if 1e4 <= abs(value) < 1e6 else _large(value)


def _warnings(board: Board) -> list[tuple[str, str]]:
    """Return what has been bad, the newest first, each with how it is marked."""
    found: list[tuple[int, str, str]] = []
    of_datasets = {name for dataset, name in board.bad if dataset}
    for (dataset, name), bad in board.bad.items():
        if not dataset and name in of_datasets:
            continue  # a total that is made of them
        what = "/".join(filter(None, (dataset, name)))
        last, kind = bad.steps[-1], number(bad.value).strip("!")
        if last == board.step:
            text = f"{what} is {kind}"
            text += f", {bad.times:,} times since step {bad.steps[0]:,}" if bad.times > 1 else ""
        else:
            times = "once," if bad.times == 1 else f"{bad.times:,} times, last"
            ago = f"at step {last:,}"  # which may be ahead of one that was gone back to
            if last < board.step:
                ago = f"{board.step - last:,} steps ago (step {last:,})"
            text = f"{what} was {kind} {times} {ago}; finite since"
        found.append((last, text, ALARMING))
    for alert in board.alerts.values():
        of = (str(alert.get("dataset", "")), str(alert.get("name", "")))
        if of in board.bad:
            continue
        style = ALARMING if alert["severity"] == "severe" else _WARNING
        message = " ".join(str(alert["message"]).split())
        ago = board.step - alert["step"]
        when = f" ({ago:,} steps ago)" if ago > 0 else ""
        found.append((alert["step"], f"{message}{when}", style))
    found.sort(key=lambda one: -one[0])
    more = len(found) - _MOST_SAID
    said = [(text, style) for _, text, style in found[:_MOST_SAID]]
    if more > 0:
        said[-1] = (f"{said[-1][0]}; and {more} more", said[-1][1])
    return said


def _others(board: Board, shown: set[str]) -> list[_Part]:
    """Return what is neither in the table nor above it, metric by metric."""
    found = []
    hidden = 0
    throughput = {name for name, _ in _throughput(board)}
    alone = next(iter(board.datasets)) if len(board.datasets) == 1 else ""
    current: dict[str, dict[str, dict[str, float]]] = {}  # name -> dataset -> statistic -> value
    for one, value in board.current.items():
        current.setdefault(one.name, {}).setdefault(one.dataset, {})[one.statistic] = value
    for name, meaning in board.names.items():
        if name == board.leading or name in throughput or name in shown:
            continue
        of_name = current.get(name, {})
        values = of_name.get("") or of_name.get(alone, {})
        text = _told(name, meaning, values)
        if text:
            loud = "!" in text and any(not math.isfinite(one) for one in values.values())
            found.append(_Part(text, ALARMING if loud else "", need=0 if loud else 1))
        elif of_name:
            hidden += 1
    if hidden:
        found.append(_Part(f"… {hidden} more of single datasets", "dim", need=2))
    return found


def _told(name: str, meaning: Meaning, values: Mapping[str, float]) -> str:
    """Return a metric in a few words; empty if it has no number."""
    if not values:
        return ""
    if meaning.aggregation == "categorical_count":
        total = sum(values.values()) or 1.0
        most = sorted(values.items(), key=lambda one: -one[1])
        parts = [f"{category} {100 * count / total:.0f} %" for category, count in most[:4]]
        more = f" (+{len(most) - 4})" if len(most) > 4 else ""
        return f"{name} {'  '.join(parts)}{more}"
    text = _large(values[""]) if "" in values else ""
    if "mean" in values:
        text = number(values["mean"]) + (f" ± {number(values['std'])}" if "std" in values else "")
    elif "stderr" in values:
        text += f" ± {number(values['stderr'])}"
    percentiles = [one for one in values if re.fullmatch(r"p[\d.]+", one)]
    if percentiles:
        told = " · ".join(f"{one} {number(values[one])}" for one in percentiles)
        text += f" ({told})" if text else told
    if not text:
        text = "  ".join(f"{one} {number(value)}" for one, value in [*values.items()][:2])
    return f"{name} {text}"


# -- The table -------------------------------------------------------------------------------------


class _Column(NamedTuple):
    """A column of the table of the leading metric.

    Args:
        title: its title.
        cell: what it shows of a dataset, and the style; empty: all together.
        left: whether it is aligned left.
        metric: which one it shows the number of; empty: the leading one.
    """

    title: str
    cell: Callable[[str], tuple[str, str]]
    left: bool = False
    metric: str = ""


def _rows(board: Board) -> list[str]:
    """Return the datasets of the table's rows; empty: all together."""
    datasets = [one for one in board.datasets if one in board.tracks]
    total = board.tracks.get("")
    if len(datasets) == 1 and total is not None and _same(total, board.tracks[datasets[0]]):
        return datasets
    # Where all there is of the leading metric is the total, what there is of the datasets stands beside it.
    datasets = datasets or [*board.datasets]
    return [*([""] if total is not None else []), *datasets]


def _same(one: Track, other: Track) -> bool:
    pair = {(track.step, str(track.value)) for track in (one, other)}
    return len(pair) == 1


def _chosen(board: Board, rows: list[str], most: int, way: str | None) -> tuple[list[str], str]:
    """Return as many rows as there is room for, and what to say of the others."""
    if len(rows) <= most:
        return rows, ""
    weights = _weights(board)
    sign = -1.0 if way == "higher" else 1.0

    def order(dataset: str) -> tuple[Any, ...]:
        track = board.tracks.get(dataset)
        bad = (dataset, board.leading) in board.bad
        worse = 0.0 if track is None or math.isnan(track.change) else sign * track.change
        return dataset != "", not bad, -worse, -weights.get(dataset, 0.0)

    ordered = sorted(rows, key=order)
    shown, hidden = ordered[: max(most - 1, 1)], ordered[max(most - 1, 1) :]
    changes = [abs(board.tracks[one].change) for one in hidden if one in board.tracks]
    known = [one for one in changes if not math.isnan(one)]
    within = f", all within {_ceiled(max(known))} of the log before" if known else ""
    text = f"… {len(hidden)} more datasets{within}"
    return shown, f"{text} (sorted: not finite, worst change{', most tokens' if weights else ''})"


def _ceiled(value: float) -> str:
    """Return a number that is no smaller, in one or two digits."""
    if value <= 0:
        return "0"
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    if unit == 0:  # the smallest floats have fewer digits
        return f"{value:.2g}"
    return f"{math.ceil(value / unit - 1e-9) * unit:.2g}"


def _weights(board: Board) -> dict[str, float]:
    """Return how much of each dataset there has been: tokens, if they are counted."""
    name = _amount(board)
    if name is None:
        return {}
    found = {one: board.of(name, dataset=one) for one in board.datasets}
    return {one: value for one, value in found.items() if value is not None}


def _amount(board: Board) -> str | None:
    """Return the total that says how much of each dataset there has been."""
    totals = [
        one.name
        for one in board.names.values()
        if one.aggregation in ("sum", None)
        and not one.statistic
        and re.search(r"token|sample|example|row", one.name)
        and any(board.of(one.name, dataset=dataset) is not None for dataset in board.datasets)
    ]
    return min(totals, key=lambda name: "token" not in name) if totals else None


def _columns(board: Board, way: str | None, width: int) -> list[_Column]:
    tracks = board.tracks

    def name(dataset: str) -> tuple[str, str]:
        text = dataset or (_ALL if board.datasets else board.prefix or _ALL)
        bad = (dataset, board.leading or "") in board.bad
        return text, "bold red" if bad else "bold" if not dataset else ""

    def now(dataset: str) -> tuple[str, str]:
        track = tracks.get(dataset)
        if track is None or track.step != board.step:
            return _MISSING, "dim"
        return _leading(track.value), "" if math.isfinite(track.value) else ALARMING

    def change(dataset: str) -> tuple[str, str]:
        track = tracks.get(dataset)
        if track is None or track.step != board.step or math.isnan(track.change):
            return "", ""
        found, size = track.change, abs(track.value)
        digits = 3 if size >= 0.1 or not size else min(3 - math.floor(math.log10(size)), 9)
        text = f"{abs(found):.{digits}f}" if size < 1e5 else number(abs(found))
        if float(text.replace(",", "")) == 0:
            return f"= {text}", "dim"
        worse = way is not None and (found > 0) == (way == "lower")
        style = "" if way is None else "yellow" if worse else "green"
        return f"{'▼' if found < 0 else '▲'} {text}", style

    def best(dataset: str) -> tuple[str, str]:
        found = tracks[dataset].best(way or "") if dataset in tracks else None
        return (_MISSING, "dim") if found is None else (_leading(found[0]), "")

    def at(dataset: str) -> tuple[str, str]:
        found = tracks[dataset].best(way or "") if dataset in tracks else None
        return (_MISSING, "dim") if found is None else (f"{found[1]:,}", "")

    columns = [
        _Column(board.leading or "", name, left=True),
        _Column("now", now),
        _Column("change", change),
    ]
    if way is not None:
        columns += [_Column("best", best), _Column("at step", at)]
    if any(track.logs > 2 for track in tracks.values()):
        columns.append(_curve(board, width))
    return [*columns, *_further(board)] if width > 100 or not any(tracks) else columns


def _curve(board: Board, width: int) -> _Column:
    cells, since, title = (24, board.step // 10, "") if width > 100 else (12, 0, "so far")
    if since and max(track.logs for track in board.tracks.values()) < 40:
        since = 0
    title = f"since step {since:,}" if since else "so far"

    def cell(dataset: str) -> tuple[str, str]:
        curve = board.tracks[dataset].curve(cells, since) if dataset in board.tracks else []
        known = [mean for mean, _ in curve if not math.isnan(mean)]
        if not known:
            return "!" * len(curve), ""
        low, high = min(known), max(known)
        half = high / 2 - low / 2  # the whole of it may be larger than any float

        def bar(mean: float) -> str:
            return _BARS[int(7.99 * ((mean / 2 - low / 2) / half))] if half > 0 else _BARS[0]

        return "".join(
            "!" if bad else " " if math.isnan(mean) else bar(mean) for mean, bad in curve
        ), ""

    return _Column(title, cell, left=True)


def _further(board: Board) -> list[_Column]:
    """Return columns for wide terminals: how much of each dataset, and of a distribution."""
    columns = []

    def cell(of: Callable[[str], float | None], shown: Callable[[float], str]) -> Any:
        def found(dataset: str) -> tuple[str, str]:
            value = of(dataset)
            return (_MISSING, "dim") if value is None else (shown(value), "")

        return found

    amount = _amount(board)
    if amount is not None:
        known = cell(lambda one: board.of(amount, dataset=one), _large)
        columns.append(_Column(amount, known, metric=amount))
        weights = _weights(board)
        total = sum(weights.values())
        if total > 0 and len(weights) > 1:
            share = cell(weights.get, lambda one: f"{100 * one / total:.1f} %")
            columns.append(_Column("share", share))
    distributed = (one.name for one in board.names.values() if one.aggregation == "distribution")
    for name in islice(distributed, 1):
        for statistic in ("p50", "p95"):
            title = (
                statistic
                if columns and columns[-1].title.startswith(name)
                else f"{name} {statistic}"
            )
            of = partial(board.of, name, statistic)
            if any(of(dataset) is not None for dataset in board.datasets):
                columns.append(_Column(title, cell(of, number), metric=name))
    return columns


# -- Lines of text ---------------------------------------------------------------------------------


def _text(parts: Sequence[_Part], width: int) -> Text:
    """Return a line, without the pieces that are needed least if there is no room for all."""
    from rich.cells import cell_len  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    kept = list(parts)
    while sum(cell_len(one.before + one.text) for one in kept) > width and len(kept) > 1:
        least = max(kept, key=lambda one: one.need)
        if least.need == 0:
            break
        kept.remove(least)
    found = Text(no_wrap=True, overflow="ellipsis", end="")
    for place, one in enumerate(kept):
        found.append(one.before if place else "")
        found.append(one.text, one.style)
    return _fitted(found, width)


def _fitted(text: Text, width: int) -> Text:
    text.truncate(max(width, 1), overflow="ellipsis")
    return text


def _wrapped(parts: Sequence[_Part], width: int, most: int) -> list[Text]:
    """Return pieces in at most so many lines; says how many there is no room for."""
    from rich.cells import cell_len  # noqa: PLC0415

    lines: list[list[_Part]] = [[]]
    used, left_out = 0, 0
    for part in sorted(parts, key=lambda one: one.need):
        size = cell_len(part.text) + (len(_GAP) if lines[-1] else 0)
        if lines[-1] and used + size > width:
            if len(lines) >= most:
                left_out += 1
                continue
            lines.append([])
            used, size = 0, cell_len(part.text)
        lines[-1].append(part)
        used += size
    if left_out:
        lines[-1].append(_Part(f"… {left_out} more: select= chooses", "dim", need=9))
    return [_text(one, width) for one in lines if one]


def _table(board: Board, way: str | None, width: int, most: int) -> tuple[list[Text], set[str]]:
    """Return the lines of the table of the leading metric, and which metrics have a column there."""
    from rich.cells import cell_len, set_cell_size  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    rows, caption = _chosen(board, _rows(board), most, way)
    columns = _columns(board, way, width)
    grids = [[column.cell(row) for row in rows] for column in columns]
    widths = [
        max(cell_len(column.title), *(cell_len(text) for text, _ in grid))
        for column, grid in zip(columns, grids, strict=True)
    ]
    # The name makes room first, then the last columns go; the value now never does.
    while len(columns) > 2 and sum(widths) + 2 * (len(columns) - 1) > width:
        narrowest = max(12, cell_len(columns[0].title))
        if widths[0] > narrowest:
            excess = sum(widths) + 2 * (len(columns) - 1) - width
            widths[0] = max(narrowest, widths[0] - excess)
            if sum(widths) + 2 * (len(columns) - 1) <= width:
                break
        columns, grids, widths = columns[:-1], grids[:-1], widths[:-1]
    widths[0] = max(min(widths[0], width - 2 - widths[1]), 1)

    def drawn_line(cells: Iterable[tuple[str, str]]) -> Text:
        found = Text(no_wrap=True, end="")
        for place, ((text, style), column, size) in enumerate(
            zip(cells, columns, widths, strict=True)
        ):
            shown = text if cell_len(text) <= size else set_cell_size(text, size - 1) + "…"
            pad = " " * (size - cell_len(shown))
            found.append("  " if place else "")
            found.append(shown + pad if column.left else pad + shown, style)
        found.rstrip()
        return _fitted(found, width)

    lines = [drawn_line([(column.title, "dim") for column in columns])]
    lines += [drawn_line([grid[place] for grid in grids]) for place in range(len(rows))]
    if caption:
        short = caption if cell_len(caption) <= width else caption.partition(" (")[0]
        lines.append(_fitted(Text(short, "dim", no_wrap=True, end=""), width))
    return lines, {column.metric for column in columns if column.metric}


def _whole(
    board: Board, width: int, height: int | None = None, *, timed: bool = False
) -> list[Text]:
    """Return a board as a table, in at most so many lines."""
    from rich.text import Text  # noqa: PLC0415

    way = board.better()
    lines = [_text(_header(board, timed=timed), width), *_marked(_warnings(board), width)]
    room = 10**9 if height is None else height - len(lines)
    most_others = 3
    shown: set[str] = set()
    if board.tracks:
        # A blank line before it, its titles, and below it a blank line and the rest.
        rows = max(room - 3 - 2, 1)
        table, shown = _table(board, way, width, rows)
        lines += [Text("", end=""), *table]
    others = _wrapped(_others(board, shown), width, most_others)
    left = 10**9 if height is None else height - len(lines) - 1
    if others and left > 0:
        lines += [Text("", end=""), *others[:left]]
    return lines if height is None else lines[:height]


def _marked(warnings: Sequence[tuple[str, str]], width: int) -> list[Text]:
    """Return what is said above a table, several in a line where there is room."""
    from rich.text import Text  # noqa: PLC0415

    lines: list[Text] = []
    for text, style in warnings:
        marked = Text.assemble((" ! ", style), f" {text}", no_wrap=True, end="")
        if lines and lines[-1].cell_len + len(_GAP) + marked.cell_len <= width:
            lines[-1] = Text.assemble(lines[-1], _GAP, marked, no_wrap=True, end="")
        else:
            lines.append(marked)
    return [_fitted(one, width) for one in lines]


def _brief(board: Board) -> list[_Part]:
    """Return a board in one line."""
    way = board.better()
    parts = [
        _Part(f"{board.prefix or 'metrics'} ", "bold cyan"),
        _Part(f"step {board.step:,}", "bold", before=""),
    ]
    bad = _warnings(board)
    if bad:
        parts.append(_Part(f" ! {bad[0][0]}", "bold red", need=1))
    total = board.tracks.get("") or next(iter(board.tracks.values()), None)
    if total is not None:
        text = _leading(total.value) if total.step == board.step else _MISSING
        parts.append(_Part(f"{board.leading} {text}"))
        if way is not None and (best := total.best(way)) is not None:
            parts.append(_Part(f"best {_leading(best[0])} (step {best[1]:,})", need=2))
    return [*parts, *(one._replace(need=3) for one in _others(board, set()))]


def drawn(boards: Sequence[Board], width: int, height: int | None = None) -> list[Text]:
    """Return all boards as lines: the first as a table, and others too where there is room.

    Args:
        boards: in order.
        width: columns of the terminal.
        height: lines there may be; None: any number.
    """
    from rich.text import Text  # noqa: PLC0415

    if not boards:
        return []
    if height is None:
        whole = [_whole(one, width, timed=one is boards[0]) for one in boards]
        return [line for one in whole for line in (*one, Text("", end=""))][:-1]
    first, *others = boards
    parts = [[_text(_brief(other), width)] for other in others]
    room = max(height - 2 * len(parts), min(height, 4))
    lines = _whole(first, width, room, timed=True)
    spare = height - len(lines) - 2 * len(parts)
    for place, other in enumerate(others):
        table = _whole(other, width)
        if len(table) - 1 <= spare:
            spare -= len(table) - 1
            parts[place] = table
    for part in parts:
        lines += [Text("", end=""), *part]
    return lines[:height]


def line(board: Board) -> str:
    """Return a board as one line for a file: the leading metric first, its datasets behind it."""
    parts = [f"step {board.step}", board.prefix]
    if board.tracks:
        rows = _rows(board)
        values = {
            one: _leading(board.tracks[one].value)
            for one in rows
            if one in board.tracks and board.tracks[one].step == board.step
        }
        told = ", ".join(f"{one} {value}" for one, value in values.items() if one)
        if len(rows) == 1:
            values, told = {"": values.get(rows[0], _MISSING)}, ""
        text = f"{board.leading} {values.get('', '')}".rstrip()
        parts.append(f"{text} ({told})" if told else text)
    parts += [one.text for one in _others(board, set()) if not one.text.startswith("…")]
    parts += [text for _, text in _throughput(board)]
    seconds, total = board.seconds_per_step(), board.total_steps
    if seconds is not None:
        parts.append(_step_time(seconds))
        if total is not None and total > board.step:
            parts.append(f"ETA {_duration((total - board.step) * seconds)}")
    return "  ".join(filter(None, parts))
