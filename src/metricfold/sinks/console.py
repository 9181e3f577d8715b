"""Metrics in the terminal: a live table per prefix, or plain aligned lines when piped.

     train · step 150 · 12:03:11
                            all   python_code   python_docs
     loss                 2.310         2.104         2.512
     tokens_seen        120,000        80,000        40,000

Keys are read as ``{prefix}_{dataset}/{name}`` and ``{prefix}/{name}``: one table per prefix, one
column per dataset (``all`` for what has none), one row per name. What has no ``/`` joins the table
of the keys it came with. Where a key does not start with the prefix that it was logged with, what
comes before the first ``_`` is taken for one.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from metricfold.sinks.record import Record
from metricfold.sinks.selection import SelectiveSink, require

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live
    from rich.table import Table

__all__ = ["ConsoleSink"]


class ConsoleSink(SelectiveSink):
    """Shows the latest metrics of each dataset in the terminal.

    On a terminal the tables are updated in place, below what the program prints. They share it with
    a `rich` progress bar on the same `console`. Output that is piped or redirected gets plain lines
    instead, each of which starts with its step, so that ``grep`` shows how a metric went. What is
    NaN or infinite stands out in both. Alerts are lines of their own.

    Args:
        console: the `rich.console.Console` to write to; by default a new one on stdout.
        live: update in place; by default if the console is an interactive terminal. Give ``False``
            when something other than rich, such as tqdm, draws on the same terminal.
        select: see `SelectiveSink`.
        key_format: see `SelectiveSink`.

    Raises:
        ImportError: the ``rich`` package is not installed.
    """

    arrays = False

    def __init__(
        self,
        console: Console | None = None,
        *,
        live: bool | None = None,
        select: str | Sequence[str] = "*",
        key_format: str | Callable[[str], str] = "{key}",
    ) -> None:
        super().__init__(select=select, key_format=key_format)
        require("rich", sink="ConsoleSink", extra="console")
        self._console = console
        self._wants_live = live
        self._live: Live | None = None
        self._boards: dict[str, _Board] = {}  # prefix -> what its table shows
        self._widths: dict[str, dict[str, int]] = {}  # prefix -> column -> widest cell so far

    def __repr__(self) -> str:
        return "ConsoleSink()"

    def close(self) -> None:
        """Leave the last tables where they are and give the terminal back."""
        if self._live is not None:
            # Printed for good, above whatever else is live on this console: stopping a display
            # that shows them would print them twice and scroll.
            self._live.update("", refresh=True)
            self._live.transient = True
            self._live.stop()
            self._live = None
            self._opened().print(self._tables())

    def rewind(self, step: int) -> None:
        """Clear the tables of the steps after `step`; lines that were printed stay."""
        self._boards = {name: one for name, one in self._boards.items() if one.step <= step}
        if self._live is not None:
            self._draw(self._live)

    def _write(self, record: Record) -> None:
        console = self._opened()
        live = console.is_interactive if self._wants_live is None else self._wants_live
        for board in _boards_of(record):
            prefix, shown = board.prefix, self._boards.get(board.prefix)
            laid_out = self._boards[prefix] = board.over(shown) if shown else board
            if not live:
                printed = replace(board, columns=laid_out.columns).folded()
                for line in _lines(printed, self._widths.setdefault(prefix, {})):
                    console.print(line, soft_wrap=True, markup=False, highlight=False, emoji=False)
        for alert in record.alerts:
            # For good: on a terminal they stay above the tables.
            text = f"step {alert.get('step', record.step)}  ALERT ({alert['severity']}): {alert['message']}"
            style = _ALARMING if alert["severity"] == "severe" else "bold yellow"
            shown_text = " ".join(text.splitlines())
            console.print(
                shown_text, style=style, soft_wrap=True, markup=False, highlight=False, emoji=False
            )
        if not live:
            return
        if self._live is None:
            from rich.live import Live  # noqa: PLC0415

            self._live = Live(console=console, auto_refresh=False)
            self._live.start()
        self._draw(self._live)

    def _opened(self) -> Console:
        if self._console is None:
            from rich.console import Console  # noqa: PLC0415

            self._console = Console()
        return self._console

    def _tables(self, height: int | None = None) -> RenderableType:
        from rich.console import Group  # noqa: PLC0415

        boards = list(self._boards.values())
        limits = _shares([len(board.rows) for board in boards], height)
        width = self._opened().width
        return Group(
            *(_table(one.folded(), rows, width) for one, rows in zip(boards, limits, strict=True))
        )

    def _draw(self, live: Live) -> None:
        # A live display taller than the terminal could not be updated in place; some lines are
        # left for a progress bar.
        live.update(self._tables(self._opened().height - 3), refresh=True)


_ALL = "all"
_MISSING = "-"


@dataclass(slots=True)
class _Board:
    """What the table of one prefix shows: cells by (row, column)."""

    prefix: str
    step: int
    wall_time: float
    columns: list[str]
    rows: list[str]
    cells: dict[tuple[str, str], str]

    def row(self, name: str) -> list[str]:
        return [self.cells.get((name, column), _MISSING) for column in self.columns]

    def folded(self) -> _Board:
        """Return a board of one column if the totals of all datasets say what the only one says."""
        if len(self.columns) != 2 or _ALL not in self.columns:
            return self
        (only,) = (column for column in self.columns if column != _ALL)
        pairs = map(self.row, self.rows)
        both = {total == own for total, own in pairs if _MISSING not in (total, own)}
        if both != {True}:
            return self
        cells = {(row, only): cell for (row, _), cell in self.cells.items()}
        return replace(self, columns=[only], cells=cells)

    def over(self, shown: _Board) -> _Board:
        """Return this board laid out as the one `shown` before it, so that nothing jumps."""
        cells = {**shown.cells, **self.cells} if shown.step == self.step else self.cells
        rows = _inserted(shown.rows, self.rows)
        columns = _inserted(shown.columns, self.columns)
        return _Board(self.prefix, self.step, self.wall_time, _ordered(columns), rows, cells)


def _inserted(shown: list[str], wanted: list[str]) -> list[str]:
    """Return `shown` with what is new in `wanted`, each behind the one that it follows there."""
    result, place = list(shown), 0
    for name in wanted:
        if name in result:
            place = result.index(name) + 1
        else:
            result.insert(place, name)
            place += 1
    return result


_ALARMING = "bold white on red"
_LOUD = re.compile(r"!(NaN|-?INF)")
_STATISTIC = re.compile(r"(?P<name>.+)_stat_(?P<statistic>mean|std|min|max|count|p\d+)")


def _boards_of(record: Record) -> list[_Board]:
    """Sort the flat keys of `record` into one board per prefix."""
    groups: dict[str, dict[tuple[str, str], dict[str, float]]] = {}
    loose: list[tuple[str, float]] = []  # keys without a "/"
    for key, value in record.metrics.items():
        split = _split(key, record.prefix)
        if split is None:
            loose.append((key, value))
            continue
        prefix, dataset, name = split
        match = _STATISTIC.fullmatch(name)
        name, statistic = (match["name"], match["statistic"]) if match else (name, "")
        metrics = groups.setdefault(prefix, {})
        metrics.setdefault((name, dataset or _ALL), {})[statistic] = value
    only = next(iter(groups)) if len(groups) == 1 else ""
    home = groups.setdefault(record.prefix or only, {})
    for key, value in loose:
        home[key, _ALL] = {"": value}

    boards = []
    for prefix, metrics in groups.items():
        cells = {
            (row, column): cell
            for (name, column), values in metrics.items()
            for row, cell in _rows(name, values)
        }
        rows = list(dict.fromkeys(row for row, _ in cells))
        columns = _ordered(dict.fromkeys(column for _, column in cells))
        boards.append(_Board(prefix, record.step, record.wall_time, columns, rows, cells))
    return [board for board in boards if board.rows]


def _split(key: str, prefix: str) -> tuple[str, str, str] | None:
    """Return prefix, dataset and name of `key`; None if it has no ``/``."""
    if prefix and key.startswith((f"{prefix}/", f"{prefix}_")):
        group, slash, name = key[len(prefix) :].partition("/")
        if slash:
            return prefix, group[1:], name
    group, slash, name = key.partition("/")
    if not slash:
        return None
    prefix, _, dataset = group.partition("_")
    return prefix, dataset, name


def _rows(name: str, values: dict[str, float]) -> Iterable[tuple[str, str]]:
    """Fold the statistics of one distribution into the few rows in which they are read."""
    if "" in values:
        yield name, _number(values[""])
    if "mean" in values:
        spread = f" ± {_number(values['std'])}" if "std" in values else ""
        yield f"{name} mean ± std", _number(values["mean"]) + spread
    if "min" in values and "max" in values:
        yield f"{name} min … max", f"{_number(values['min'])} … {_number(values['max'])}"
    percentiles = [one for one in values if one.startswith("p")]
    if percentiles:
        numbers = " · ".join(_number(values[one]) for one in percentiles)
        yield f"{name} {' · '.join(percentiles)}", numbers
    if "count" in values:
        yield f"{name} count", _number(values["count"])


def _ordered(columns: Iterable[str]) -> list[str]:
    return sorted(columns, key=lambda column: column != _ALL)


def _number(value: float) -> str:
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


_FRAME = 6  # lines of a table that are not rows


def _shares(needs: list[int], height: int | None) -> list[int]:
    """Return how many rows each table may show; small tables leave what they spare to large ones."""
    if height is None:
        return needs
    left = height - _FRAME * len(needs)
    shares = [0] * len(needs)
    for served, index in enumerate(sorted(range(len(needs)), key=needs.__getitem__)):
        shares[index] = min(needs[index], max(3, left // (len(needs) - served)))
        left -= shares[index]
    return shares


def _table(board: _Board, max_rows: int, width: int) -> Table:
    from rich import box  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    def is_calm(row: str) -> bool:
        return not any(map(_LOUD.search, board.row(row)))

    # What is not finite is shown whatever else has to make room.
    shown = set(sorted(board.rows, key=is_calm)[:max_rows])
    rows = {row: board.row(row) for row in board.rows if row in shown}
    room = width - 2 - max(map(len, rows))
    fitting = 0
    for cells in zip(board.columns, *rows.values(), strict=True):
        room -= 3 + max(map(len, cells))
        if room < 0 and fitting:
            break
        fitting += 1
    left_out = {"row": len(board.rows) - len(rows), "column": len(board.columns) - fitting}
    hidden = [f"{n} more {what}{'s' * (n > 1)}" for what, n in left_out.items() if n]
    clock = time.strftime("%H:%M:%S", time.localtime(board.wall_time))
    table = Table(
        title=Text.assemble(
            (board.prefix or "metrics", "bold cyan"),
            (f"  step {board.step:,}", "bold"),
            (f"  {clock}", "dim"),
        ),
        title_justify="left",
        caption=f"… {' and '.join(hidden)}: select= chooses" if hidden else None,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("", no_wrap=True)
    for column in board.columns[:fitting]:
        table.add_column(Text(column, "bold"), justify="right", no_wrap=True)
    for row, values in rows.items():
        table.add_row(Text(row), *map(_cell, values[:fitting]))
    return table


def _cell(cell: str) -> RenderableType:
    from rich.text import Text  # noqa: PLC0415

    text = Text(cell, "dim" if cell == _MISSING else "")
    text.highlight_regex(_LOUD, _ALARMING)
    return text


def _lines(board: _Board, widths: dict[str, int]) -> list[str]:
    """Return a line per row; `widths` is kept from record to record, so that columns stay put."""
    step = f"step {board.step}"
    names = ["step", "row", *board.columns]
    grid = [
        [step, board.prefix, *board.columns],
        *([step, row, *board.row(row)] for row in board.rows),
    ]
    for name, cells in zip(names, zip(*grid, strict=True), strict=True):
        widths[name] = max(widths.get(name, 0), *map(len, cells))
    across = [widths[name] for name in names]
    return ["  ".join(_aligned(cells, across)) for cells in grid]


def _aligned(cells: list[str], widths: list[int]) -> Iterable[str]:
    for place, (cell, width) in enumerate(zip(cells, widths, strict=True)):
        yield cell.ljust(width) if place < 2 else cell.rjust(width)
