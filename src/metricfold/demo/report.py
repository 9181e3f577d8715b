"""What ``metricfold demo`` prints besides the training itself."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from itertools import groupby
from pathlib import Path

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from metricfold.demo.folder import RunFolder
from metricfold.demo.proof import Proof, Row, count

__all__ = ["print_opening", "print_proof", "print_resumed", "print_where_to_look"]


def print_opening(console: Console, folder: RunFolder, parts: int, steps: int) -> None:
    """Say what is about to happen."""
    framework = folder.framework
    console.print(
        Text.assemble(
            ("metricfold demo", "bold"),
            f": {count(parts, framework.part)} {'train' if parts > 1 else 'trains'} a small "
            f"byte-level transformer for {count(steps, 'step')} with {framework.title}",
        )
    )
    for corpus in folder.read_mixture().corpora:
        megabytes = sum(len(text.text.encode()) for text in corpus.training) / 1e6
        console.print(Text(f"  {corpus.name}: {len(corpus.training):,} texts, {megabytes:.2f} MB"))


def print_proof(console: Console, folder: RunFolder, proof: Proof) -> None:
    """Show the numbers side by side, and what it cost to get them."""
    parts = f"{folder.framework.part}s"
    table = Table(
        title=(
            "The last log, counted again from the data "
            f"(steps {proof.interval[0]} to {proof.interval[-1]})"
        ),
        title_style="bold",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        caption=(
            f"{parts.capitalize()} see different texts: batches are cut by length. Merging what the "
            f"{parts} have counted gives the truth; averaging what each of them makes of it does not."
        ),
        caption_justify="left",
    )
    table.add_column("")
    table.add_column("dataset")
    for title in ("ours", f"average over {parts}", "truth"):
        table.add_column(title, justify="right")
    for metric, rows in groupby(proof.rows, lambda row: row.metric):
        table.add_section()
        label = "tokens_seen, whole run" if metric == "tokens_seen" else metric
        for row in rows:
            table.add_row(label, Text(row.dataset), _ours(row), _averaged(row), _number(row.truth))
            label = ""
    console.print(table)
    for sentence in proof.sentences:
        console.print(Padding(f"{sentence}.", (0, 0, 0, 2), expand=False), highlight=False)


def print_resumed(console: Console, folder: RunFolder, proof: Proof, parts: int) -> None:
    """Show that every token counts once, although the number of ranks or devices has changed."""
    now = count(parts, folder.framework.part)
    console.print(f"\nAfter step {proof.interval[-1]}, now on {now}:", style="bold")
    for row in proof.rows:
        if row.metric == "tokens_seen":
            same = "=" if row.holds else "≠"
            console.print(
                Text.assemble(
                    f"  tokens_seen of {row.dataset}: ",
                    _ours(row),
                    f" {same} {_number(row.truth)} counted from the data",
                )
            )


def print_where_to_look(console: Console, folder: RunFolder) -> None:
    """Print the commands that show the run, and the path of the JSONL file."""
    name = folder.framework.name
    chosen = "" if name == "torch" else f" --framework {name}"
    events, run = shlex.quote(str(folder.tensorboard)), shlex.quote(str(folder.path))
    report = shlex.quote(str(folder.path / "report.html"))
    console.print()
    for label, what in (
        ("look at it", f"{_command('metricfold')} show {run}"),
        ("in a browser", f"{_command('metricfold')} report {run} -o {report}"),
        ("TensorBoard", f"{_command('tensorboard')} --logdir {events}"),
        ("every record", str(folder.metrics)),
        ("train on", f"{_command('metricfold')} demo{chosen} --resume --out {run}"),
    ):
        # Whole, so that it can be copied, however narrow the terminal.
        console.print(f"  {label + ':':14}{what}", soft_wrap=True, markup=False, highlight=False)


def _ours(row: Row) -> Text:
    return Text(_number(row.ours), "bold green" if row.holds else "bold white on red")


def _averaged(row: Row) -> Text:
    error = row.averaged / row.truth - 1
    return Text.assemble(
        _number(row.averaged), (f"  {error:+7.1%}", "red" if abs(error) > 5e-4 else "")
    )


def _number(value: float) -> str:
    if value == int(value):
        return f"{int(value):,}"
    return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.4f}"


def _command(name: str) -> str:
    """Return how to call a command of this environment from here."""
    if shutil.which(name):
        return name
    beside = Path(sys.executable).with_name(name)
    return shlex.quote(
        os.path.relpath(beside) if beside.is_relative_to(Path.cwd()) else str(beside)
    )
