"""The table of the console: the loss first whatever the number of datasets, and what was bad remembered."""

from __future__ import annotations

import io
import math
import re
import subprocess
import sys

import pytest
from rich.cells import cell_len
from rich.console import Console
from test_sinks_console import rows, screen, terminal

from metricfold import MetricsAggregator
from metricfold.sinks import ConsoleSink, MetricsLogger, Record
from metricfold.sinks.board import Board, Track, readings_of
from metricfold.sinks.drawing import drawn

NAMES = [
    *["web", "code", "books", "wiki", "papers", "math", "chat", "多言語"],
    *(f"lang_{n:02}" for n in range(22)),
]


def training(datasets, logs=60, bad_at=None):
    """Yield the records of a training: datasets that get better, and one that gets worse in the end."""
    for log in range(logs):
        step = 10 * (log + 1)
        losses = {name: 2 + place / 100 - log / 200 for place, name in enumerate(datasets)}
        if log == logs - 1:
            losses[datasets[-1]] += 0.4
        if step == bad_at:
            losses[datasets[0]] = math.nan
        metrics = {f"train_{name}/loss": loss for name, loss in losses.items()}
        metrics |= {f"train_{name}/tokens_seen": 1e6 * step for name in datasets}
        metrics |= {f"train_{name}/len_stat_p50": 5.0 for name in datasets}
        metrics |= {"train/loss": sum(losses.values()) / len(losses), "lr": 3e-4}
        metrics |= {
            "train/kind_count_a": 3.0,
            "train/kind_count_b": 1.0,
            "train/tokens_per_second": 4.02e5,
        }
        yield Record(step, 1e9 + 1.21 * step, metrics, prefix="train", run={"total_steps": 50_000})


def table(records, width=80, height=24, **choice):
    """Return the lines that a terminal shows while the table is live."""
    console, file = terminal(width, height)
    sink = ConsoleSink(console, **choice)
    for record in records:
        sink.write(record)
    lines = screen(file.getvalue())
    sink.close()
    return lines


@pytest.mark.parametrize("size", [(80, 24), (140, 40), (30, 24), (60, 8), (20, 5)])
@pytest.mark.parametrize("number", [1, 8, 30])
def test_the_loss_comes_first_in_no_more_room_than_there_is(size, number):
    width, height = size
    lines = table(training(NAMES[:number], bad_at=450), width, height)
    assert len(lines) < height
    assert max(map(cell_len, lines)) <= width
    assert lines[0].startswith("train step 600")
    assert lines[1].startswith(" !  web/loss w"), "a NaN of 150 steps ago"
    if height > 8:
        shown = rows(lines)
        assert next(iter(shown)) == ("web" if number == 1 else "all")
        last, bad = NAMES[number - 1], NAMES[0]
        assert {last, bad} <= shown.keys(), "what was bad, and what got worse, is never hidden"
        assert shown[last][:2][1] == "▲"


def test_what_there_is_no_room_for_is_said():
    lines = table(training(NAMES))
    (said,) = (line for line in lines if line.startswith("…"))
    assert said == "… 17 more datasets, all within 0.005 of the log before"
    (said,) = (line for line in table(training(NAMES), 140, 30) if line.startswith("…"))
    assert said.endswith("(sorted: not finite, worst change, most tokens)")


def test_it_says_how_long_a_step_takes_and_when_the_training_ends():
    head = table(training(["web"]), 140)[0].rpartition("   ")
    assert head[0] == "train step 600 / 50,000  1 %   1.21 s/step   402k tokens/s   ETA 16 h 36 min"
    narrow = table(training(["web"]))[0]
    assert narrow == f"train step 600 / 50,000  1 %   1.21 s/step   ETA 16 h 36 min   {head[2]}"


def test_the_other_metrics_are_below_and_categories_are_shares():
    lines = table(training(NAMES[:3]))
    assert "kind a 75 %  b 25 %   lr 0.0003" in lines[-1]


def test_a_wide_terminal_shows_how_much_there_was_of_each_dataset():
    lines = table(training(NAMES[:2]), 140)
    header = next(line for line in lines if line.startswith("loss"))
    assert header.split()[-4:] == ["tokens_seen", "share", "len", "p50"]
    assert rows(lines)["web"][-5:] == ["600.0", "M", "50.0", "%", "5"]


def test_an_encoding_that_lacks_the_signs_gets_others_of_the_same_width():
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii", errors="strict", write_through=True)
    console = Console(file=file, force_terminal=True, width=80, height=24, color_system=None)
    sink = ConsoleSink(console)
    for record in training(["web", "多言語"], bad_at=450):
        sink.write(record)
    sink.close()
    text = raw.getvalue().decode("ascii")
    assert " v 0.005" in text
    assert " ^ 0.395" in text
    lines = screen(text)
    assert max(map(len, lines)) <= 80


def test_which_way_is_better_is_what_the_run_says():
    console, file = terminal()
    with MetricsLogger([ConsoleSink(console)], better={"accuracy": "higher"}) as logger:
        for step, value in enumerate((0.5, 0.75, 0.625)):
            logger.log(step, {"val/accuracy": value, "val_a/accuracy": value / 2})
    shown = rows(screen(file.getvalue()))
    assert shown["all"][3:5] == ["0.7500", "1"]
    plain = table(Record(s, 0.0, {"val/accuracy": v}) for s, v in enumerate((0.5, 0.75)))
    assert not any("best" in line for line in plain), "nobody has said which way"


def test_names_that_hold_what_separates_them_are_read_by_what_they_stand_for():
    console, file = terminal()
    aggregator = MetricsAggregator()
    for step in range(2):
        with MetricsLogger([ConsoleSink(console)]) as logger:
            aggregator.record("loss", 2.0, dataset="a_b/c")
            aggregator.record("x_stat_p50", 1.0)
            logger.log(step, aggregator, prefix="my_run")
    lines = screen(file.getvalue())
    assert any(line.startswith("my_run step 1") for line in lines)
    assert "a_b/c" in rows(lines[6:])
    assert any("x_stat_p50 1" in line for line in lines)


def test_key_format_is_honoured():
    lines = table(
        [Record(1, 0.0, {"train/loss": 1.0, "train_a/loss": 2.0}, prefix="train")],
        key_format=lambda key: f"run7_{key.replace('/', '.')}/l",
    )
    assert lines[0].startswith("run7 step 1")


def test_a_rewind_forgets_what_came_after():
    console, file = terminal()
    sink = ConsoleSink(console)
    for record in training(["web"], bad_at=450):
        sink.write(record)
    sink.rewind(400)
    for record in list(training(["web"]))[40:45]:
        sink.write(record)
    sink.close()
    lines = screen(file.getvalue())
    assert lines[0].startswith("train step 450")
    assert not any("NaN" in line for line in lines)
    assert rows(lines)["web"][3:5] == ["1.7800", "450"]


def test_a_line_for_each_log_where_nothing_is_updated_in_place():
    file = io.StringIO()
    sink = ConsoleSink(Console(file=file, width=80))
    for record in [*training(["web", "code"], bad_at=600)]:
        sink.write(record)
    sink.close()
    lines = file.getvalue().splitlines()
    assert len(lines) == 60
    assert lines[1].startswith("step 20  train  loss 2.0000 (web 1.9950, code 2.0050)  kind a 75 %")
    assert lines[-1].startswith("step 600  train  loss !NaN (web !NaN, code 2.1150)")
    assert lines[-1].endswith("402k tokens/s  1.21 s/step  ETA 16 h 36 min")


def test_lines_is_log_or_table():
    with pytest.raises(ValueError, match="lines='block': use 'log' or 'table'"):
        ConsoleSink(lines="block")


def test_two_sinks_share_a_terminal():
    console, file = terminal()
    # One with a console of its own on the same file, as two libraries of a program may have.
    other = Console(file=file, force_terminal=True, width=100, height=40, color_system=None)
    sinks = ConsoleSink(console, select="train*"), ConsoleSink(other, select="val*")
    for step in range(4):
        for sink in sinks:
            sink.write(Record(step, 0.0, {"train/loss": 1.0 + step, "val/loss": 3.0 + step}))
    heads = [line[:14] for line in screen(file.getvalue()) if "step 3" in line]
    assert heads == ["train step 3  ", "val step 3   0"]
    for sink in sinks:
        sink.close()
    lines = screen(file.getvalue())
    assert [line[:12] for line in lines if "step 3" in line] == ["train step 3", "val step 3  "]
    assert not any("step 2" in line for line in lines)


def test_beside_a_bar_of_tqdm_lines_are_printed_above_it():
    tqdm = pytest.importorskip("tqdm")

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    file = Terminal()
    console = Console(file=file, force_terminal=True, width=80, height=24, color_system=None)
    sink = ConsoleSink(console)
    for step in tqdm.tqdm(range(3), file=file, ncols=60, mininterval=0):
        sink.write(Record(step, 0.0, {"train/loss": 1.0 + step}))
    sink.close()
    text = file.getvalue()
    assert "\x1b[?25l" not in text, "no live table fights with the bar"
    lines = [line for line in text.replace("\r", "\n").splitlines() if line.startswith("step")]
    assert lines == [f"step {n}  train  loss {n + 1}.0000" for n in range(3)]


KERNEL = """
import sys
assert "ipywidgets" not in sys.modules
sys.modules["ipywidgets"] = None
from metricfold.sinks import ConsoleSink, MetricsLogger
with MetricsLogger([ConsoleSink()]) as logger:
    for step in range(3):
        logger.log(step, {"train/loss": 2.0 - step, "train_<b>/loss": 1.0})
        logger.flush()
"""


def test_a_notebook_shows_one_table_without_widgets():
    pytest.importorskip("ipykernel")
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel(kernel_name="python3")
    try:
        found = []
        client.execute_interactive(KERNEL, timeout=60, output_hook=found.append)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    kinds = [message["msg_type"] for message in found]
    assert "error" not in kinds, found
    shown = [
        one["content"]
        for one in found
        if one["msg_type"] in ("display_data", "update_display_data")
    ]
    assert kinds.count("display_data") == 1
    assert kinds.count("update_display_data") >= 2
    assert len({one["transient"]["display_id"] for one in shown}) == 1
    assert "train step 2" in shown[-1]["data"]["text/plain"]
    html = shown[-1]["data"]["text/html"]
    assert html.startswith("<pre")
    assert "&lt;b&gt;" in html
    assert "<b>" not in html


def test_a_track_is_bounded_and_knows_the_best_of_all_and_where():
    track = Track()
    for step in range(10_000):
        track.add(step, math.nan if step == 7000 else abs(step - 4321) / 100)
    assert track.best("lower") == (0.0, 4321)
    assert track.best("higher") == (56.78, 9999)
    assert track.logs == 10_000
    curve = track.curve(12)
    assert [bad for _, bad in curve] == [place == 8 for place in range(12)]
    assert len(track._stretches) <= 128
    assert track.rewind(5000)
    assert track.step <= 5000
    assert track.best("higher")[1] == 0
    assert not track.rewind(-1)


def test_it_is_drawn_without_torch_or_jax():
    code = (
        "import sys; from metricfold.sinks import ConsoleSink, Record; s = ConsoleSink(live=False);"
        "s.write(Record(1, 0.0, {'a/loss': 1.0})); s.close(); print({'torch', 'jax', 'IPython', 'tqdm'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["step 1  a  loss 1.0000", "set()"]


ODD = {
    "larger sums than any float": [1e308] * 300,
    "larger differences than any float": [1e308, -1e308, 1e308, -1e308],
    "the smallest floats": [5e-324, 0.0, 1e-323, 0.0],
    "nothing but zero": [0.0] * 4,
    "NaN first": [math.nan, 1.0, math.inf, 2.0],
}


@pytest.mark.parametrize("values", ODD.values(), ids=ODD)
def test_any_number_is_drawn(values):
    records = [
        Record(step, 1e9, {f"train_{n}/loss": value for n in range(30)}, prefix="train")
        for step, value in enumerate(values)
    ]
    lines = table(records)
    assert lines[0].startswith(f"train step {len(values) - 1}")
    assert len(lines) <= 24
    assert any(line.startswith("loss") for line in lines)


def test_a_time_that_no_calendar_has_is_left_out():
    lines = table([Record(1, 1e18, {"train/loss": 2.0}, prefix="train")])
    assert lines[0] == "train step 1"


def test_a_metric_that_is_called_like_a_column_is_shown():
    metrics = {f"train/{name}": 7.0 for name in ("loss", "best", "now", "change", "so")}
    lines = table([Record(step, 1e9, metrics, prefix="train") for step in range(4)])
    assert "best 7   now 7   change 7   so 7" in lines


def test_what_was_bad_at_a_step_that_was_gone_back_over_is_not_in_the_future():
    values = {10: 1.0, 30: math.nan, 5: 1.0}
    lines = table(
        [Record(at, 1e9, {"train/loss": one}, prefix="train") for at, one in values.items()]
    )
    assert " !  loss was NaN once, at step 30; finite since" in lines


def test_what_a_table_costs_grows_as_the_number_of_metrics_does():
    def looked_at(number):
        class Counted(dict):
            looks = 0

            def items(self):
                for item in super().items():
                    Counted.looks += 1
                    yield item

        board = Board("train", {})
        record = Record(1, 1e9, {f"train/m{n}": math.nan for n in range(number)}, prefix="train")
        board.take(record, readings_of(record)["train"])
        board.current, board.bad = Counted(board.current), Counted(board.bad)
        drawn([board], 80, 24)
        return Counted.looks

    assert looked_at(400) == 2 * looked_at(200)


def test_a_step_that_no_float_holds_ends_nothing():
    records = [
        Record(s, 1.0 + n, {"train/loss": 1.0}) for n, s in enumerate((0, 10**400, 10**400 + 1, 7))
    ]
    lines = table([*records, Record(8, 9.0, {"train/loss": 2.0}, run={"total_steps": 10**400})])
    assert re.fullmatch(r"train step 8   \S+ s/step   \d\d:\d\d:\d\d", lines[0]), lines[0]
    assert rows(lines)["train"][0] == "2.0000"
