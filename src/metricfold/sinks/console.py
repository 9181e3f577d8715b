"""Metrics in the terminal: a table that puts the loss first, or plain lines when piped.

What is known of a run stands in `board`, what a terminal shows of it in `drawing`, and here is who draws:
one `_Screen` for a terminal, whichever sinks and progress bars share it.
"""

from __future__ import annotations

import io
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, TextIO
from weakref import WeakKeyDictionary

from metricfold._core.fold.handlers import check_choice
from metricfold.sinks.block import Blocks
from metricfold.sinks.board import Board, readings_of
from metricfold.sinks.drawing import ALARMING, drawn, in_ascii, line
from metricfold.sinks.record import Record
from metricfold.sinks.selection import SelectiveSink, require

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

__all__ = ["ConsoleSink"]

_SPARED = 3  # lines of a terminal that are left to a progress bar


class ConsoleSink(SelectiveSink):
    """Shows the loss of each dataset in the terminal, how it went, and what was bad.

    On a terminal one table is updated in place, below what the program prints: the loss of each dataset
    with its change, its best value and a curve; above it the time of a step, and what was not finite
    or an alert at some time; below it the other metrics. Where there is no room for all, those
    datasets come first that were not finite or got worse. ``total_steps=`` of `MetricsLogger` lets it
    say when training ends, and ``better=`` of which metrics there is a best value.

    The terminal may be shared: with other sinks, with a `rich` progress bar on the same console, and with tqdm,
    beside which lines are printed. In a notebook the table is updated in its cell.

    Output that is piped or redirected gets a line for each log, which starts with its step, so that ``grep``
    shows how a metric went. What is NaN or infinite stands out. Alerts are lines of their own.

    Args:
        console: the `rich.console.Console` to write to; by default rich's own, on stdout.
        live: update in place; by default if the console is an interactive terminal or a notebook.
        lines: what is printed where nothing is updated in place: ``"log"``: a line for each log;
            ``"table"``: a line for each metric, with a column for each dataset.
        select: see `SelectiveSink`.
        key_format: see `SelectiveSink`.

    Raises:
        ImportError: the ``rich`` package is not installed.
        ValueError: `lines` is something else.
    """

    arrays = False

    def __init__(
        self,
        console: Console | None = None,
        *,
        live: bool | None = None,
        lines: str = "log",
        select: str | Sequence[str] = "*",
        key_format: str | Callable[[str], str] = "{key}",
    ) -> None:
        super().__init__(select=select, key_format=key_format)
        require("rich", sink="ConsoleSink", extra="console")
        self._console = console
        self._live = live
        self._renames = key_format != "{key}"
        self._blocks = Blocks() if check_choice("lines", lines, "log", "table") == "table" else None
        self._boards: dict[str, Board] = {}
        self._said: dict[str, Any] = {}  # by the run, of itself
        self._screen: _Screen | None = None

    def __repr__(self) -> str:
        return "ConsoleSink()"

    def close(self) -> None:
        """Leave the last table where it is and give the terminal back."""
        if self._screen is not None:
            self._screen.leave(self)
            self._screen = None

    def rewind(self, step: int) -> None:
        """Forget the steps after `step`; lines that were printed stay."""
        for board in self._boards.values():
            board.rewind(step)
        self._boards = {name: one for name, one in self._boards.items() if not one.empty}
        if self._screen is not None:
            self._screen.draw()

    def boards(self) -> list[Board]:
        """Return what there is to show."""
        return list(self._boards.values())

    def _write(self, record: Record) -> None:
        if record.run is not None:
            self._said.update(record.run)
        if self._renames:
            record = replace(
                record, keys={}
            )  # what they stand for is not what they are called here
        console = self._opened()
        taken = []
        for prefix, readings in readings_of(record).items():
            board = self._boards.setdefault(prefix, Board(prefix, self._said))
            board.take(record, readings)
            taken.append(board)
        home = self._boards.get(record.prefix) or next(iter(taken), None)
        for alert in record.alerts:
            if home is not None:
                home.remember(alert, record.step)
        screen = _Screen.of(console) if self._updates_in_place(console) else None
        if screen is None and self._screen is not None:
            self.close()
        with _beside_tqdm(console) if screen is None else nullcontext():
            if screen is None:
                lines = self._blocks.lines(record) if self._blocks else map(line, taken)
                for text in lines:
                    _print(console, text)
            for alert in record.alerts:
                # For good: on a terminal they stay above the table.
                style = ALARMING if alert["severity"] == "severe" else "bold yellow"
                at = alert.get("step", record.step)
                said = " ".join(str(alert["message"]).split())
                _print(console, f"step {at}  ALERT ({alert['severity']}): {said}", style)
        if screen is not None:
            self._screen = screen
            screen.join(self)

    def _updates_in_place(self, console: Console) -> bool:
        if self._live is not None:
            return self._live
        in_place: bool = console.is_interactive or console.is_jupyter
        return in_place and not _bars_of_tqdm(console)

    def _opened(self) -> Console:
        if self._console is None:
            from rich import get_console  # noqa: PLC0415

            # That of rich.progress.track() and rich.print: one console, so one who draws.
            self._console = get_console()
        return self._console


def _print(console: Console, text: str, style: str | None = None) -> None:
    text = in_ascii(text, console.encoding)
    console.print(text, style=style, soft_wrap=True, markup=False, highlight=False, emoji=False)


# -- Who draws -------------------------------------------------------------------------------------


class _Screen:
    """A terminal, or a notebook, and the sinks that show their tables on it."""

    _all: ClassVar[WeakKeyDictionary[Any, _Screen]] = WeakKeyDictionary()
    _finding = threading.Lock()

    def __init__(self, console: Console) -> None:
        self._console = console
        self._lock = threading.RLock()
        self._sinks: list[ConsoleSink] = []
        self._live: Live | None = None
        self._cell: _Cell | None = None

    @classmethod
    def of(cls, console: Console) -> _Screen:
        """Return the screen that a console writes to: one for all consoles that write there."""
        with cls._finding:
            found = cls._all.get(console.file)
            if found is None:
                found = cls._all[console.file] = cls(console)
            return found

    def join(self, sink: ConsoleSink) -> None:
        """Draw a sink's tables among those of the others."""
        with self._lock:
            if sink not in self._sinks:
                self._sinks.append(sink)
            self.draw()

    def leave(self, sink: ConsoleSink) -> None:
        """Print a sink's tables for good, above whatever else is live."""
        with self._lock:
            if sink not in self._sinks:
                return
            self._sinks.remove(sink)
            last = not self._sinks
            if self._cell is not None:
                # A cell shows what it was given last; that of the others goes on in it.
                self._cell.show(self._texts([sink], None) if last else self._texts())
                self._cell = None if last else self._cell
                return
            if self._live is not None:
                self._live.update(self._group(self._texts()), refresh=True)
                if last:
                    self._live.transient = True
                    self._live.stop()
                    self._live = None
            self._console.print(self._group(self._texts([sink], None)))

    def draw(self) -> None:
        """Show the newest tables."""
        with self._lock:
            if not self._sinks:
                return
            if self._console.is_jupyter:
                self._cell = self._cell or _Cell(self._console)
                self._cell.show(self._texts())
                return
            if self._live is None:
                from rich.live import Live  # noqa: PLC0415

                self._live = Live(console=self._console, auto_refresh=False)
                self._live.start()
            # A display taller than the terminal could not be updated in place.
            height = max(self._console.height - _SPARED, 1)
            self._live.update(self._group(self._texts(height=height)), refresh=True)

    def _texts(
        self, sinks: Sequence[ConsoleSink] | None = None, height: int | None = None
    ) -> list[Text]:
        from rich.text import Text  # noqa: PLC0415

        some = self._sinks if sinks is None else sinks
        boards = [board for sink in some for board in sink.boards()]
        texts = drawn(boards, self._console.width, height)
        encoding = self._console.encoding
        for text in texts:
            if (plain := in_ascii(text.plain, encoding)) != text.plain:
                text.plain = plain
        return texts or [Text("", end="")]

    def _group(self, texts: Sequence[Text]) -> Any:
        from rich.text import Text  # noqa: PLC0415

        return Text("\n", no_wrap=True).join(texts)


class _Cell:
    """What a notebook shows below the cell that runs, updated in place, without widgets."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._id: str | None = None

    def show(self, texts: Sequence[Text]) -> None:
        display = import_module("IPython.display").display
        if self._id is None:
            self._id = f"metricfold-{id(self)}"
            display(self._data(texts), raw=True, display_id=self._id)
        else:
            display(self._data(texts), raw=True, display_id=self._id, update=True)

    def _data(self, texts: Sequence[Text]) -> dict[str, str]:
        from rich.console import Console  # noqa: PLC0415

        width = max([self._console.width, *(text.cell_len for text in texts)])
        recorded = Console(
            file=io.StringIO(), record=True, width=width, force_jupyter=False, force_terminal=True
        )
        for text in texts:
            recorded.print(text, soft_wrap=True, end="\n")
        html = recorded.export_html(inline_styles=True, code_format=_HTML, clear=False)
        return {"text/plain": recorded.export_text().rstrip(), "text/html": html}


_HTML = '<pre style="white-space:pre;overflow-x:auto;line-height:1.25">{code}</pre>'


# -- Progress bars of tqdm -------------------------------------------------------------------------


def _bars_of_tqdm(console: Console) -> list[Any]:
    """Return the bars that tqdm draws on the terminal now: it knows nothing of others who draw."""
    tqdm = getattr(sys.modules.get("tqdm.std"), "tqdm", None)
    bars = list(getattr(tqdm, "_instances", None) or ())
    return [one for one in bars if _is_terminal(getattr(one, "fp", None)) == console.is_terminal]


def _is_terminal(file: TextIO | None) -> bool:
    try:
        return file is not None and file.isatty()
    except (AttributeError, OSError, ValueError):
        return False


@contextmanager
def _beside_tqdm(console: Console) -> Iterator[None]:
    """Let what is printed meanwhile stand above the bars of tqdm."""
    if not _bars_of_tqdm(console):
        yield
        return
    tqdm = sys.modules["tqdm.std"].tqdm
    with tqdm.external_write_mode(file=console.file):
        yield
