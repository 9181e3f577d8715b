"""The console: a live table on a terminal, plain aligned lines when piped."""

from __future__ import annotations

import io
import math
import os
import pty
import re
import subprocess
import sys

import pytest
from rich.console import Console
from rich.progress import Progress

from metricfold import Alert, MetricsAggregator
from metricfold.sinks import ConsoleSink, MetricsLogger, Record

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")

TRAIN = {
    "train/loss": 2.5,
    "train_docs/loss": 2.25,
    "train_code/loss": 2.75,
    "train_docs/tokens_seen": 120000.0,
    "lr": 0.0003,
}


def terminal(width=100, height=40):
    """Return a console that takes itself for a terminal, and what it writes to."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=width, height=height, color_system=None)
    return console, file


def piped():
    file = io.StringIO()
    return Console(file=file, force_terminal=False, width=80), file


def rows(lines):
    """Return the cells of each row of the table of the leading metric, by its name."""
    begin = next(number for number, line in enumerate(lines) if re.match(r"\S+ +now", line)) + 1
    found = {}
    for line in lines[begin:]:
        if not line or line.startswith("…"):
            break
        name, *cells = line.split()
        found[name] = cells
    return found


def shown(*records, **choice):
    """Return the lines that are printed for `records` when piped."""
    console, file = piped()
    sink = ConsoleSink(console, **{"lines": "table", **choice})
    for record in records:
        sink.write(record)
    sink.close()
    return file.getvalue().splitlines()


def screen(text, height=200):
    """Return what a terminal shows after `text`, as lines: a terminal that knows what rich sends."""
    lines, row, column = [""], 0, 0
    for piece in re.split(r"(\x1b\[[0-9;?]*[A-Za-z]|\n|\r)", text):
        match = re.fullmatch(r"\x1b\[([0-9;?]*)([A-Za-z])", piece)
        if piece == "\n":
            row, column = row + 1, 0
        elif piece == "\r":
            column = 0
        elif match is None:
            lines += [""] * (row + 1 - len(lines))
            line = lines[row].ljust(column)
            lines[row] = line[:column] + piece + line[column + len(piece) :]
            column += len(piece)
        elif match[2] == "A":
            row -= int(match[1] or 1)
            assert row >= 0, "the display moves up beyond its first line"
        elif match[2] == "K":
            assert match[1] == "2"
            lines += [""] * (row + 1 - len(lines))
            lines[row] = ""
        else:
            assert match[2] in "hlm", piece
    return [line.rstrip() for line in lines]


def test_piped_output_is_a_line_per_metric_with_a_column_per_dataset():
    assert shown(Record(50, 0.0, TRAIN)) == [
        "step 50  train           all     docs   code",
        "step 50  loss          2.500    2.250  2.750",
        "step 50  tokens_seen       -  120,000      -",
        "step 50  lr           0.0003        -      -",
    ]


def test_piped_columns_stay_put_from_record_to_record():
    lines = shown(
        Record(50, 0.0, TRAIN),
        Record(100, 0.0, {"train_code/loss": 2.125}),
        Record(150, 0.0, {"train_code/loss": 1.75, "train_more/loss": 1.5}),
    )
    assert lines[4:] == [
        "step 100  train           all     docs   code",
        "step 100  loss              -        -  2.125",
        "step 150  train           all     docs   code   more",
        "step 150  loss              -        -  1.750  1.500",
    ]


def test_piped_output_is_not_wrapped_and_not_marked_up():
    name = "[bold]" + "x" * 200 + "[/bold] :smile:"
    (_, line) = shown(Record(1, 0.0, {f"train/{name}": 1.0}))
    assert name in line
    assert line.endswith("1")


def test_prefixes_have_their_own_tables():
    lines = shown(Record(1, 0.0, {"train_a/loss": 1.5, "val_a/loss": 2.5, "val/loss": 2.75}))
    assert lines == [
        "step 1  train      a",
        "step 1  loss   1.500",
        "step 1  val     all      a",
        "step 1  loss  2.750  2.500",
    ]


@pytest.mark.parametrize("prefix", ["my_run", "exp/train", "exp_1/my_run"])
def test_a_prefix_may_hold_what_separates_it_from_the_dataset(prefix):
    metrics = {f"{prefix}/loss": 2.0, f"{prefix}_alpaca_gpt/loss": 1.5, "lr": 0.25}
    lines = shown(Record(1, 0.0, metrics, prefix=prefix))
    assert [line.split()[2:] for line in lines] == [
        [prefix, "all", "alpaca_gpt"],
        ["loss", "2", "1.500"],
        ["lr", "0.2500", "-"],
    ]


def test_keys_that_do_not_start_with_their_prefix_are_shown_by_what_they_look_like():
    metrics = {"my_run_a/loss": 2.0, "optim_x/lr": 0.25, "my_runner/loss": 3.0, "my_run": 4.0}
    lines = shown(Record(1, 0.0, metrics, prefix="my_run"))
    assert [line.split()[2:] for line in lines] == [
        ["my_run", "all", "a"],
        ["loss", "-", "2"],
        ["my_run", "4", "-"],
        ["optim", "x"],
        ["lr", "0.2500"],
        ["my", "runner"],
        ["loss", "3"],
    ]


def test_the_console_shows_the_prefix_that_was_logged():
    console, file = piped()
    aggregator = MetricsAggregator()
    for dataset in ("alpaca", "orca_math"):
        aggregator.record("loss", 1.5, dataset=dataset)
    with MetricsLogger([ConsoleSink(console, lines="table")]) as logger:
        logger.log(1, aggregator, prefix="my_run")
    header, row = file.getvalue().splitlines()
    assert header.split()[2:] == ["my_run", "all", "alpaca", "orca_math"]
    assert row.split()[2:] == ["loss", "1.500", "1.500", "1.500"]


def test_one_dataset_is_one_column_and_its_totals_are_none_until_there_is_another():
    console, file = piped()
    aggregator = MetricsAggregator()
    with MetricsLogger([ConsoleSink(console, lines="table")]) as logger:
        for step, datasets in enumerate((("docs",), ("docs",), ("docs", "code"), ("docs",))):
            for place, dataset in enumerate(datasets):
                aggregator.record("loss", 2.25 + place, dataset=dataset)
            aggregator.record("norm", 0.5)
            logger.log(step, aggregator, prefix="train", extra={"lr": 0.25})
    lines = [line.split() for line in file.getvalue().splitlines()]
    assert [line[2:] for line in lines[:8]] == [
        ["train", "docs"],
        ["norm", "0.5000"],
        ["loss", "2.250"],
        ["lr", "0.2500"],
    ] * 2
    assert [line[2:] for line in lines[8:]] == [
        ["train", "all", "code", "docs"],
        ["norm", "0.5000", "-", "-"],
        ["loss", "2.750", "3.250", "2.250"],
        ["lr", "0.2500", "-", "-"],
        # Nothing jumps any more.
        ["train", "all", "code", "docs"],
        ["norm", "0.5000", "-", "-"],
        ["loss", "2.250", "-", "2.250"],
        ["lr", "0.2500", "-", "-"],
    ]


def test_a_total_that_says_something_else_has_its_column():
    both = {"train/loss": 2.5, "train_docs/loss": 2.25, "train/n": 1.0, "train_docs/n": 1.0}
    assert shown(Record(1, 0.0, both))[0].split()[2:] == ["train", "all", "docs"]


def test_a_live_table_of_one_dataset_has_one_row():
    console, file = terminal()
    sink = ConsoleSink(console)
    for step in range(3):
        metrics = {"train/loss": 2.25, "train_docs/loss": 2.25, "train/lr": 0.5}
        sink.write(Record(step, 0.0, metrics))
    sink.close()
    lines = screen(file.getvalue())
    assert rows(lines) == {"docs": ["2.2500", "=", "0.000", "2.2500", "0", "▁▁▁"]}
    assert "lr 0.5000" in lines


def test_keys_without_prefix_are_shown_too():
    assert shown(Record(1, 0.0, {"loss": 1.5})) == ["step 1          all", "step 1  loss  1.500"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (math.nan, "!NaN"),
        (math.inf, "!INF"),
        (-math.inf, "!-INF"),
        (0.0, "0"),
        (-3.0, "-3"),
        (1234567.0, "1,234,567"),
        (1234567.5, "1,234,567.5"),
        (2.0**60, "1.153e+18"),
        (0.12345678, "0.1235"),
        (0.00012, "0.00012"),
        (99.987654, "99.99"),
        (-2.34567, "-2.346"),
    ],
)
def test_numbers_are_readable(value, text):
    assert shown(Record(1, 0.0, {"m/x": value}))[1].split() == ["step", "1", "x", text]


def test_a_distribution_takes_few_rows():
    statistics = {"mean": 84.5, "std": 31.25, "min": 1.0, "max": 512.0}
    statistics |= {"p05": 12.0, "p50": 80.5, "p95": 310.0, "count": 1600.0}
    lines = shown(Record(1, 0.0, {f"m_a/len_stat_{key}": one for key, one in statistics.items()}))
    assert [line.split(maxsplit=2)[2] for line in lines[1:]] == [
        "len mean ± std          84.50 ± 31.25",
        "len min … max                 1 … 512",
        "len p05 · p50 · p95  12 · 80.50 · 310",
        "len count                       1,600",
    ]


def test_a_live_table_is_updated_in_place_and_stays_when_closed():
    console, file = terminal()
    sink = ConsoleSink(console)
    sink.write(Record(50, 0.0, TRAIN))
    for step in range(51, 60):
        sink.write(Record(step, 0.0, {"train/loss": step / 100, "train_docs/loss": math.nan}))
    sink.close()
    assert "\x1b[?25h" in file.getvalue(), "the cursor is given back"
    lines = screen(file.getvalue())
    assert sum(line.startswith("train ") for line in lines) == 1
    assert lines[0].startswith("train step 59"), "the display leaves no gap where it was"
    shown_rows = rows(lines)
    assert list(shown_rows) == ["all", "docs", "code"]
    assert shown_rows["all"][:3] == ["0.5900", "▲", "0.010"]
    assert shown_rows["docs"][0] == "!NaN"
    # What the last record lacks is not passed off as current, and does not make the table jump.
    assert shown_rows["code"] == ["-", "2.7500", "50", "▁"]
    assert "tokens_seen" not in "\n".join(lines)


def test_two_records_of_one_step_share_a_table():
    console, file = terminal()
    sink = ConsoleSink(console)
    sink.write(Record(5, 0.0, {"train/loss": 1.5}))
    sink.write(Record(5, 0.0, {"train/grad_norm": 2.5}))
    sink.close()
    lines = screen(file.getvalue())
    assert rows(lines)["train"][0] == "1.5000"
    assert "grad_norm 2.500" in lines


def test_not_finite_stands_out_in_colour():
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=80, color_system="standard")
    sink = ConsoleSink(console)
    sink.write(Record(1, 0.0, {"train/loss": math.nan}))
    sink.close()
    assert "\x1b[1;37;41m!NaN\x1b[0m" in file.getvalue()


def test_the_table_shares_the_terminal_with_a_progress_bar_and_prints():
    console, file = terminal()
    sink = ConsoleSink(console)
    with Progress(console=console, auto_refresh=False) as progress:
        task = progress.add_task("training", total=3)
        for step in range(3):
            progress.update(task, advance=1, refresh=True)
            sink.write(Record(step, 0.0, TRAIN))
            console.print(f"saved {step}")
        sink.close()
        progress.refresh()
    lines = screen(file.getvalue())
    assert [line for line in lines if line.startswith("saved")] == ["saved 0", "saved 1", "saved 2"]
    assert sum(line.startswith("train step") for line in lines) == 1
    assert sum("training" in line for line in lines) == 1
    table = next(number for number, line in enumerate(lines) if "step 2" in line)
    assert "training" in lines[-2] or "training" in lines[-1]
    assert table > lines.index("saved 2")


def test_a_display_that_fits_no_terminal_is_cut_but_never_what_is_not_finite():
    console, file = terminal(width=60, height=20)
    metrics = {f"train_set{number:02}/loss": 1.0 for number in range(40)}
    metrics["train_set33/loss"] = math.nan
    sink = ConsoleSink(console)
    sink.write(Record(1, 0.0, {**metrics, "train_set33/loss": 1.0}))
    sink.write(Record(2, 0.0, metrics))
    lines = screen(file.getvalue())
    assert len(lines) < 20
    assert max(map(len, lines)) <= 60
    assert next(iter(rows(lines).items()))[0] == "set33"
    assert rows(lines)["set33"][0] == "!NaN"
    assert any("more datasets, all within 0 of the log before" in line for line in lines)
    sink.close()
    assert len(rows(screen(file.getvalue()))) >= 40, "all rows in the end"


def test_live_can_be_turned_off_for_other_progress_bars():
    console, file = terminal()
    sink = ConsoleSink(console, live=False, lines="table")
    sink.write(Record(50, 0.0, TRAIN))
    sink.close()
    assert ESCAPE.sub("", file.getvalue()).startswith("step 50  train")


def test_rewind_clears_what_is_after_the_checkpoint():
    console, file = terminal()
    sink = ConsoleSink(console)
    sink.write(Record(10, 0.0, {"val/loss": 1.0}))
    sink.write(Record(20, 0.0, {"train/loss": 1.0}))
    sink.rewind(15)
    sink.close()
    text = "\n".join(screen(file.getvalue()))
    assert "val step 10" in text
    assert "train" not in text


def test_nothing_is_printed_for_nothing():
    console, file = terminal()
    sink = ConsoleSink(console)
    sink.rewind(3)
    sink.flush()
    sink.close()
    assert file.getvalue() == ""


SCRIPT = """
from metricfold.sinks import ConsoleSink, Record
sink = ConsoleSink()
sink.write(Record(7, 0.0, {"train/loss": 2.5}))
print("hello")
sink.close()
"""


def test_a_real_pipe_gets_lines_and_a_real_terminal_gets_a_table():
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "60", "LINES": "20"}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "step 7  train  loss 2.5000\nhello\n"

    ours, theirs = pty.openpty()
    with subprocess.Popen(command, stdout=theirs, env=environment) as process:
        os.close(theirs)
        output = b""
        try:
            while piece := os.read(ours, 4096):
                output += piece
        except OSError:
            pass  # how Linux says that the terminal's other end was closed
        assert process.wait(timeout=60) == 0
    os.close(ours)
    lines = screen(output.decode().replace("\r\n", "\n"))
    assert any("train step 7" in line for line in lines)
    assert "hello" in lines


ALERTS = [
    Alert("loss is nan,\non rank 1", "severe").to_json(),
    Alert("[b]slow[/b]", step=9).to_json(),
]


def test_alerts_are_lines_of_their_own_when_piped():
    lines = shown(Record(10, 0.0, {"train/loss": 2.0}, alerts=ALERTS), select="nothing*")
    assert lines == [
        "step 10  ALERT (severe): loss is nan, on rank 1",
        "step 9  ALERT (warning): [b]slow[/b]",
    ]


def test_alerts_stay_above_the_tables_of_a_terminal():
    console, file = terminal()
    sink = ConsoleSink(console)
    for step in (10, 20):
        alerts = ALERTS[:1] if step == 10 else []
        sink.write(Record(step, 0.0, {"train/loss": 2.0}, alerts=alerts))
    sink.close()
    lines = screen(file.getvalue())
    assert sum("ALERT (severe): loss is nan, on rank 1" in line for line in lines) == 1
    assert rows(lines)["train"][0] == "2.0000"
    assert " !  loss is nan, on rank 1 (10 steps ago)" in lines, "and it is remembered"
