"""What the command ``metricfold`` does with runs that were written.

`COMMANDS` lists them; each is a name, a line of help, a function that adds its arguments, and one that
does it and returns the exit code. What is wrong is a `LookError`, which becomes one sentence.
"""

from __future__ import annotations

import argparse
import json
import sys
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from metricfold.look.compared import as_text
from metricfold.look.comparing import Condition, compare
from metricfold.look.exporting import export
from metricfold.look.place import LookError
from metricfold.look.reading import read
from metricfold.look.report import report
from metricfold.look.showing import show
from metricfold.look.tailing import tail
from metricfold.look.text import Terminal
from metricfold.look.view import view

__all__ = ["COMMANDS", "Command"]

_NAMES = (
    "a metric (loss), with its prefix (train/loss), with a statistic ('seq_len p95'), or a key as it is "
    "logged (train_web/loss); each may be a glob ('val/*')"
)
_RUN = "a file that JSONLSink wrote, or the folder that it is in"


class Command(NamedTuple):
    """One command of ``metricfold``."""

    name: str
    help: str
    description: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


# -- show ------------------------------------------------------------------------------------------


def _show_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help=_RUN)
    parser.add_argument("names", metavar="NAME", nargs="*", help=_NAMES)
    parser.add_argument("--log", action="store_true", help="logarithmic vertical axes")
    parser.add_argument("--since", type=_step, metavar="STEP", help="leave out what is before")


def _show(options: argparse.Namespace) -> int:
    terminal = Terminal.of(sys.stdout)
    text = show(options.run, options.names, terminal=terminal, log=options.log, since=options.since)
    _write(text)
    return 0


# -- tail ------------------------------------------------------------------------------------------


def _tail_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help=_RUN)
    parser.add_argument("names", metavar="NAME", nargs="*", help=_NAMES)
    parser.add_argument("-f", "--follow", action="store_true", help="go on as records come")
    parser.add_argument(
        "-n",
        "--lines",
        type=_count,
        default=10,
        metavar="N",
        help="how many records to begin with (default: 10)",
    )


def _tail(options: argparse.Namespace) -> int:
    terminal = Terminal.of(sys.stdout) if sys.stdout.isatty() else None
    for line in tail(
        options.run,
        options.names,
        lines=options.lines,
        follow=options.follow,
        terminal=terminal,
    ):
        _write(line + "\n")
    return 0


# -- compare ---------------------------------------------------------------------------------------


def _compare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A", help=_RUN)
    parser.add_argument("b", metavar="B", help="the run that is judged against A")
    parser.add_argument("names", metavar="NAME", nargs="*", help=_NAMES)
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object, with all digits"
    )
    parser.add_argument(
        "--fail-if",
        type=str,
        action="append",
        default=[],
        metavar="CONDITION",
        help=(
            "exit with 1 if it is true of the final values, such as 'val/loss > +0.5%%' (B against A), "
            "'val/loss > +0.02' (the same, absolute) or 'val/accuracy < 0.7' (B alone); a value that is "
            "not finite makes it true; may be given repeatedly"
        ),
    )


def _compare(options: argparse.Namespace) -> int:
    conditions = [Condition.of(text) for text in options.fail_if]
    a, b = read(options.a), read(options.b)
    found = compare(a, b, options.names)
    failed = {one.text: said for one in conditions if (said := one.holds(a, b))}
    if options.json:
        _write(json.dumps(found.to_json() | {"failed": failed}, allow_nan=False) + "\n")
    else:
        terminal = Terminal.of(sys.stdout)
        _write(as_text(found, terminal))
        for text, said in failed.items():
            _write(terminal.written(f"FAILED  {text}  ({'; '.join(said)})") + "\n")
    return 1 if failed else 0


# -- export ----------------------------------------------------------------------------------------


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUN", nargs="+", help=_RUN)
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help=f"export {_NAMES}; repeatable"
    )
    parser.add_argument(
        "--wide",
        action="append",
        default=[],
        metavar="NAME",
        help="a row for each step, and a column for each key of these metrics; repeatable",
    )
    parser.add_argument(
        "-o", "--out", type=Path, metavar="FILE", help="where to (default: CSV on standard output)"
    )
    parser.add_argument(
        "--to",
        choices=("csv", "parquet"),
        help="csv or parquet, which needs pyarrow (default: what FILE is called, or csv)",
    )


def _export(options: argparse.Namespace) -> int:
    if options.wide and options.only:
        raise LookError("--wide names metrics itself: leave out --only")
    to = options.to
    if to is None:
        suffix = options.out.suffix if options.out else ""
        to = "parquet" if suffix in (".parquet", ".pq") else "csv"
    export(
        options.runs,
        options.out or sys.stdout,
        names=options.wide or options.only,
        wide=bool(options.wide),
        to=to,
    )
    return 0


# -- report ----------------------------------------------------------------------------------------


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUN", nargs="+", help=_RUN)
    parser.add_argument(
        "-o", "--out", type=Path, metavar="FILE", required=True, help="the HTML file to write"
    )


def _report(options: argparse.Namespace) -> int:
    report(options.runs, options.out)
    return 0


# -- view ------------------------------------------------------------------------------------------


def _view_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUN", nargs="+", help=_RUN)
    parser.add_argument(
        "--port",
        type=_port,
        default=0,
        metavar="N",
        help="where to listen (default: any free port)",
    )
    parser.add_argument("--open", action="store_true", help="open the page in a browser here")


def _view(options: argparse.Namespace) -> int:
    with view(options.runs, port=options.port) as server:
        _write(f"{server.url}\n")
        if sys.stderr.isatty():
            forward = f"ssh -N -L {server.port}:127.0.0.1:{server.port} HOST"
            sys.stderr.write(f"Ctrl-C ends it. From another machine: {forward}\n")
        if options.open:
            webbrowser.open(server.url)
        server.wait()
    return 0


# -- What they share -------------------------------------------------------------------------------


def _write(text: str) -> None:
    # Names may hold what the encoding of the terminal does not.
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
    sys.stdout.flush()


def _step(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no step")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number")
    return int(text)


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: give a number up to 65535")
    return int(text)


COMMANDS = [
    Command(
        "show",
        "show a run in the terminal: curves, last and best values, what went wrong",
        "Show a run in the terminal: what was not finite and the alerts, the loss as a curve, and of "
        "each metric the last value, the best one and a small curve; with NAMEs the curves of these.",
        _show_arguments,
        _show,
    ),
    Command(
        "tail",
        "show the newest records of a run, a line each",
        "Show the newest records of a run, a line each; with -f go on as they come, until Ctrl-C.",
        _tail_arguments,
        _tail,
    ),
    Command(
        "compare",
        "compare two runs: which is better, since when, and what else is different",
        "Compare two runs: final values with the error of their difference, the best ones, since when "
        "the runs are apart, whether they saw the same data, and which settings differ. Exits with 0, "
        "with 1 if a --fail-if is true, and with 2 after a mistake.",
        _compare_arguments,
        _compare,
    ),
    Command(
        "export",
        "write all numbers of runs as CSV or Parquet",
        "Write all numbers of runs as CSV or Parquet, a row for each: run, step, wall_time, prefix, "
        "dataset, name, statistic, value. Nothing is sampled or rounded, and NaN and infinities stay.",
        _export_arguments,
        _export,
    ),
    Command(
        "report",
        "write a page about runs: one HTML file that needs nothing else",
        "Write a page about one or several runs: one HTML file that opens anywhere and asks for "
        "nothing. Values have five digits; export has all.",
        _report_arguments,
        _report,
    ),
    Command(
        "view",
        "serve that page to this machine's browser, and follow the runs",
        "Serve a page that follows one or several runs, on 127.0.0.1 and under an address with a "
        "secret in it, which is printed. Ctrl-C ends it.",
        _view_arguments,
        _view,
    ),
]
"""In the order of ``metricfold --help``."""
