"""`show` and `tail` fit the terminal, hide no spike and no NaN, and print whatever names there are."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from look_runs import plain, training

from metricfold import JSONLSink, MetricsAggregator, MetricsLogger
from metricfold.cli import main
from metricfold.look import LookError, read, show, tail
from metricfold.look.chart import chart, sparkline
from metricfold.look.text import Terminal, width
from metricfold.sinks import Meaning, Record


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = training(tmp_path_factory.mktemp("show") / "first.jsonl", 1, logs=300)
    sink = JSONLSink(path)
    bad = {"train_web/loss": math.nan, "train_code/loss": 1.25}
    alert = {"message": "loss is nan\non rank 3", "severity": "severe", "step": 3010}
    sink.write(Record(3010, 2e9, bad, {}, "train", alerts=[alert]))
    sink.write(Record(3020, 2e9, {"train_web/loss": 2.5, "train_code/loss": 1.5}, prefix="train"))
    sink.close()
    return path


@pytest.mark.parametrize("columns", [40, 80, 140])
@pytest.mark.parametrize("names", [(), ("loss",), ("train_*/loss", "lr")])
@pytest.mark.parametrize("ascii_only", [False, True])
def test_no_line_is_wider_than_the_terminal(run, columns, names, ascii_only):
    text = show(run, names, terminal=Terminal(columns, ascii=ascii_only))
    assert max(map(width, text.splitlines())) <= columns
    assert text.isascii() == ascii_only


def test_the_loss_comes_first_with_a_row_for_each_dataset(run):
    text = show(run, terminal=Terminal(100))
    lines = text.splitlines()
    assert re.match(r"first · step 3,020 · .* · 302 records · 2 ranks", lines[0])
    head = next(place for place, line in enumerate(lines) if line.startswith("train/loss  "))
    rows = [line.split()[0] for line in lines[head + 1 : head + 5]]
    assert rows == ["all", "web", "code", "books"]
    column = next(one for one in read(run).columns.values() if one.printed == "train_code/loss")
    best = column.values.argmin()
    cells = lines[head + 3].split()
    assert cells[1:4] == ["1.5000", f"{column.values[best]:.4f}", f"{column.steps[best]:,}"]


def test_what_was_not_finite_and_the_last_alert_are_said_first(run):
    lines = show(run, terminal=Terminal(120)).splitlines()
    assert lines[2] == " !  alert at step 3,010: loss is nan on rank 3"
    assert lines[3] == " !  train_web/loss: NaN at step 3,010; finite in the 1 logs since"


def test_a_chart_shows_the_spike_of_one_log_in_ten_thousand(tmp_path):
    values = np.ones(10_000)
    values[7000] = 50.0
    lines = chart(np.arange(10_000), values, 60, 8)
    label, _, curve = lines[0].partition("┤")
    assert label.strip() == "50"
    at = [place for place, mark in enumerate(curve) if mark.strip()]
    assert at == [pytest.approx(0.7 * (60 - len(label) - 1), abs=1)]


def test_what_is_not_finite_is_a_gap_with_a_mark_below():
    values = [1.0, 1.0, math.nan, 1.0, math.inf, 1.0]
    *curve, marks, _, _ = chart(range(6), values, 14, 3)
    assert marks.count("!") == 2
    (middle,) = (line for line in curve if "┤" in line)
    places = [place for place, mark in enumerate(marks) if mark == "!"]
    assert {middle[place] for place in places} == {" "}
    assert sparkline(range(6), values, 6).count("!") == 2


@pytest.mark.parametrize(
    ("values", "log"),
    [
        ([], False),
        ([1.0], False),
        ([0.0] * 5, False),
        ([math.nan] * 3, False),
        ([math.inf, 1.0], False),
        ([-1.0, 0.0, 10.0], True),
        ([-1.0, 0.0], True),
        ([1e308, -1e308], False),
        ([5e-324, 1e-300], True),
        (list(range(1000)), False),
    ],
)
def test_any_curve_can_be_drawn(values, log):
    steps = np.arange(len(values))
    for plain_text in (False, True):
        lines = chart(steps, values, 60, 6, log=log, plain=plain_text)
        assert max(map(width, lines)) <= 60
        assert width(sparkline(steps, values, 10, plain=plain_text)) <= 10


def test_a_thousand_metrics_are_counted_and_not_listed(tmp_path):
    sink = JSONLSink(tmp_path / "run.jsonl")
    metrics = {f"train/layer_{place:03}/norm": float(place) for place in range(1000)}
    sink.write(Record(1, 1e9, metrics, prefix="train"))
    sink.close()
    text = show(tmp_path, terminal=Terminal(80))
    assert len(text.splitlines()) < 40
    assert "997 more" in text


HOSTILE = ["a\u202eb", "損失", "👩\u200d🔬", "x" * 200, "%s{0}", "[bold]", "-rf"]


def test_names_can_be_anything(tmp_path, capsys):
    keys = {
        f"t_{name}/loss": Meaning(name, "loss", "", "mean")
        for name in HOSTILE
        if name.isprintable()
    }
    sink = JSONLSink(tmp_path / "run.jsonl")
    for step in range(1, 30):
        sink.write(Record(step, 1e9, dict.fromkeys(keys, 1.0), prefix="t", keys=keys))
    sink.close()
    text = show(tmp_path, terminal=Terminal(80))
    assert max(map(width, text.splitlines())) <= 80
    for name in keys:
        assert keys[name].dataset[:6] in text
    for command in (["show"], ["tail"], ["export"], ["compare", str(tmp_path)]):
        assert main([command[0], *command[1:], str(tmp_path)]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_a_message_of_an_alert_cannot_write_to_the_terminal(tmp_path):
    sink = JSONLSink(tmp_path / "run.jsonl")
    alert = {"message": "\x1b[31mred\x07", "severity": "warning", "step": 1}
    run = {"name": "\x1b]0;title\x07", "world_size": "\x1b[2J"}
    sink.write(Record(1, 1e9, {"loss": 1.0}, alerts=[alert], run=run))
    sink.close()
    for text in (show(tmp_path), *tail(tmp_path)):
        assert "\x1b" not in text
        assert "\x07" not in text


def test_a_run_without_a_number_yet(tmp_path, capsys):
    (tmp_path / "run.jsonl").write_text("")
    assert "nothing is logged yet" in show(tmp_path / "run.jsonl")
    assert list(tail(tmp_path / "run.jsonl")) == []


def test_only_what_is_asked_for_is_shown_from_the_step_that_is_asked_for(run):
    text = show(run, ["train/lr"], since=2000)
    assert "step_seconds" not in text
    assert re.search(r"^ +2,000 +3,000$", text, re.MULTILINE)


# -- tail ------------------------------------------------------------------------------------------


def test_tail_is_a_line_for_each_record_that_grep_takes(run):
    lines = list(tail(run, ["loss"], lines=3))
    assert [line.split("  ")[0] for line in lines] == [
        "step 3,000",
        "step 3,010",
        "step 3,010",
        "step 3,020",
    ]
    assert "loss web NaN  code 1.2500" in lines[1]
    assert lines[2] == "step 3,010  ALERT (severe): loss is nan on rank 3"


def test_tail_follows_a_run_through_rewind_and_a_new_file(tmp_path):
    path = tmp_path / "run.jsonl"
    found = []

    def follow():
        for line in tail(path, ["loss", "acc"], follow=True, every=0.01):
            found.append(line)
            if "step 99" in line:
                return

    thread = threading.Thread(target=follow)
    thread.start()

    def wait_for(text):
        until = time.monotonic() + 20
        while not any(text in line for line in found) and time.monotonic() < until:
            time.sleep(0.005)
        assert any(text in line for line in found), (text, found)

    with MetricsLogger([JSONLSink(path)]) as logger:
        for step in (1, 2, 3):
            logger.log(step, {"loss": float(step)}, prefix="train")
        wait_for("step 3")
        wait_for("is called acc")
        logger.rewind(1)
        logger.flush()
        wait_for("now at step 1")
        logger.log(2, {"loss": 9.0}, prefix="train")
        wait_for("loss 9")
        logger.log(3, {"acc": 0.5}, prefix="train")
        wait_for("acc 0.5")
    path.unlink()
    wait_for("is gone")
    plain(path, [99], [1.0])
    thread.join(20)
    assert not thread.is_alive()


# -- The command -----------------------------------------------------------------------------------


def run_command(*arguments, **how):
    environment = {**os.environ, "PYTHONIOENCODING": how.pop("encoding", "utf-8"), **how}
    return subprocess.run(
        [sys.executable, "-m", "metricfold", *map(str, arguments)],
        capture_output=True,
        timeout=60,
        check=False,
        env=environment,
    )


def test_the_module_is_the_command_and_ascii_is_shown_where_the_encoding_asks(run):
    done = run_command("show", run, encoding="ascii", COLUMNS="80")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.isascii()
    assert b"train/loss" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["show", "nowhere"], "nowhere does not exist"),
        (["show"], "the following arguments are required: RUN"),
        (["show", "{run}", "lss"], "no metric of first is called lss; there is train/loss"),
        (["show", "{run}", "--since", "soon"], "'soon' is no step"),
        (["tail", "{run}", "-n", "-3"], "'-3' is no whole number"),
        (["compare", "{run}"], "the following arguments are required: B"),
        (["compare", "{run}", "nowhere"], "nowhere does not exist"),
        (["export", "{run}", "--to", "xlsx"], "invalid choice: 'xlsx'"),
        (["export", "{run}", "--wide", "nothing"], "no metric of first is called nothing"),
        (["show", __file__], "is not a run: it begins with"),
    ],
)
def test_a_mistake_is_one_sentence(run, capsys, arguments, said):
    try:
        code = main([one.format(run=run) for one in arguments])
    except SystemExit as exit_:
        code = exit_.code
    output = capsys.readouterr()
    assert code == 2
    assert output.out == ""
    assert said in output.err
    assert output.err.count("\n") == 1
    assert output.err.startswith("metricfold ")


def test_names_may_stand_behind_options(run, capsys):
    assert main(["show", str(run), "--log", "lr"]) == 0
    assert "train/lr (logarithmic)" in capsys.readouterr().out


def test_a_reader_that_has_enough_is_no_error(run):
    code = "import sys; from metricfold.cli import main; sys.exit(main(sys.argv[1:]))"
    with subprocess.Popen(
        [sys.executable, "-c", code, "export", str(run)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout.readline().startswith(b"run,step")
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(30) in (0, 141)


def test_functions_take_what_read_returns(run):
    opened = read(run)
    assert show(opened) == show(run)
    with pytest.raises(LookError, match="there is"):
        show(opened, ["nothing"])


def test_a_real_training_is_shown(tmp_path):
    aggregator = MetricsAggregator()
    with MetricsLogger([JSONLSink(tmp_path / "run.jsonl")], total_steps=40) as logger:
        for step in range(1, 21):
            for dataset in ("web", "code"):
                aggregator.record("loss", 2.0 / step, dataset=dataset)
                aggregator.record("seq_len", step, "distribution", dataset=dataset)
            logger.log(step, aggregator, prefix="train")
    text = show(tmp_path)
    assert "step 20 of 40 (50 %)" in text
    assert "train/seq_len p50" in text
