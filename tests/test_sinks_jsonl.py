"""JSONL: valid JSON per line, nothing lost, and a file that survives crashes and resumes."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metricfold._core.sketch import Histogram
from metricfold.metric import is_name
from metricfold.sinks import JSONLSink, MetricsLogger, Record, read_jsonl, worker
from metricfold.sinks.lines import LONGEST


def record(step, **metrics):
    return Record(step, 100.5 + step, metrics or {"loss": float(step)})


def write(path, *records, **how):
    sink = JSONLSink(path, **how)
    for one in records:
        sink.write(one)
    sink.close()


def steps(path):
    return [one.step for one in read_jsonl(path)]


def strict_lines(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = path.read_text()
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_each_record_is_one_line_of_json(tmp_path):
    path = tmp_path / "new" / "folder" / "run.jsonl"
    write(path, Record(3, 17.25, {"train_a/loss": 1.5, "lr": 1e-300}), record(4))
    assert strict_lines(path)[0] == {
        "step": 3,
        "wall_time": 17.25,
        "prefix": "",
        "metrics": {"train_a/loss": 1.5, "lr": 1e-300},
        "histograms": {},
    }
    assert steps(path) == [3, 4]


def test_what_is_not_finite_is_valid_json_and_comes_back(tmp_path):
    path = tmp_path / "run.jsonl"
    write(path, record(1, a=math.nan, b=math.inf, c=-math.inf, d=-0.0))
    assert strict_lines(path)[0]["metrics"] == {
        "a": "NaN",
        "b": "Infinity",
        "c": "-Infinity",
        "d": -0.0,
    }
    (back,) = read_jsonl(path)
    assert math.isnan(back.metrics["a"])
    assert (back.metrics["b"], back.metrics["c"]) == (math.inf, -math.inf)
    assert math.copysign(1, back.metrics["d"]) == -1


@given(
    metrics=st.dictionaries(st.text().filter(is_name), st.floats()),
    step=st.integers(0, 2**70),
    wall_time=st.floats(allow_nan=False, allow_infinity=False),
    prefix=st.just("") | st.text().filter(is_name),
)
def test_any_record_comes_back_as_it_was(tmp_path_factory, metrics, step, wall_time, prefix):
    path = tmp_path_factory.mktemp("jsonl") / "run.jsonl"
    sink = JSONLSink(path)
    sink.write(Record(step, wall_time, {"at least": 1.0, **metrics}, prefix=prefix))
    sink.close()
    (back,) = read_jsonl(path)
    assert (back.step, back.wall_time, back.prefix) == (step, wall_time, prefix)
    # repr tells NaN from numbers and -0.0 from 0.0
    assert repr(back.metrics) == repr({"at least": 1.0, **metrics})


def test_lines_that_name_no_prefix_are_read(tmp_path):
    path = tmp_path / "run.jsonl"
    line = {"step": 3, "wall_time": 17.25, "metrics": {"train_a/loss": 1.5}, "histograms": {}}
    path.write_text(json.dumps(line) + "\n")
    assert read_jsonl(path) == [Record(3, 17.25, {"train_a/loss": 1.5})]


AXES = [["layer", 2], ["parameter", ["bias", "weight"]]]
ARRAYS = {"train/tokens": {"axes": AXES, "values": np.array([[3.0, math.nan], [-0.0, math.inf]])}}
ALERTS = [{"rule": "Spike", "key": "train/loss", "value": 7.5}]
RUN = {"metricfold": "0.2.0", "world_size": 8, "config": {"lr": 1e-3}}


def test_arrays_alerts_and_the_header_of_a_run_come_back_and_stand_where_there_are_any(tmp_path):
    path = tmp_path / "run.jsonl"
    first = Record(1, 2.0, {"train/loss": 7.5}, {}, "train", ARRAYS, ALERTS, RUN)
    write(path, first, record(2))
    assert read_jsonl(path) == [first, record(2)]
    one, two = strict_lines(path)
    assert (one["alerts"], one["run"]) == (ALERTS, RUN)
    assert one["arrays"] == {
        "train/tokens": {"axes": AXES, "values": [3.0, "NaN", -0.0, "Infinity"]}
    }
    assert two.keys() == {"step", "wall_time", "prefix", "metrics", "histograms"}


def test_arrays_may_be_left_out(tmp_path):
    write(tmp_path / "run.jsonl", Record(1, 2.0, {"a": 7.5}, arrays=ARRAYS), arrays=False)
    assert read_jsonl(tmp_path / "run.jsonl") == [Record(1, 2.0, {"a": 7.5})]


VALUES = [1.0, 2.0]


@pytest.mark.parametrize(
    "array",
    [
        {"axes": [["a", 2]]},
        {"values": VALUES},
        {"axes": [], "values": [1.0]},
        {"axes": {"a": 2}, "values": VALUES},
        {"axes": [["a", 3]], "values": VALUES},
        {"axes": [["a", 1]], "values": VALUES},
        {"axes": [["a", -1], ["b", -2]], "values": VALUES},
        {"axes": [["a", 0]], "values": []},
        {"axes": [["a", True], ["b", 2]], "values": VALUES},
        {"axes": [["a", 2.0]], "values": VALUES},
        {"axes": [["a", 2**62], ["b", 2**62]], "values": VALUES},
        {"axes": [["a", 2, 1]], "values": VALUES},
        {"axes": [["", 2]], "values": VALUES},
        {"axes": [["a", ["x", "x"]]], "values": VALUES},
        {"axes": [["a", ["x", "y\x1b[31m"]]], "values": VALUES},
        {"axes": [["a", ["x", 1]]], "values": VALUES},
        {"axes": [["a", 2], *([[f"b{i}", 1] for i in range(40)])], "values": VALUES},
        {"axes": [["a", 2]], "values": [1.0, None]},
        {"axes": [["a", 2]], "values": [1.0, True]},
        {"axes": [["a", 2]], "values": [[1.0], [2.0]]},
        {"axes": [["a", 2]], "values": [1.0, 10**400]},
        {"axes": [["a", 2]], "values": "NaN"},
    ],
    ids=repr,
)
def test_an_array_that_does_not_fit_is_refused(tmp_path, array):
    path = tmp_path / "run.jsonl"
    write(path, record(1))
    line = {**strict_lines(path)[0], "arrays": {"train/t": array}}
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(ValueError, match=r"run\.jsonl, line 1 is not a record"):
        read_jsonl(path)


def test_a_field_that_a_later_version_adds_is_left_as_it_is(tmp_path):
    path = tmp_path / "run.jsonl"
    write(path, record(1))
    line = {**strict_lines(path)[0], "later": [1, {"x": None}]}
    path.write_text(json.dumps(line) + "\n")
    assert read_jsonl(path) == [record(1)]
    write(path, record(2))
    JSONLSink(path).rewind(1)
    assert strict_lines(path) == [line]


@pytest.mark.parametrize(
    "wrong", [{"arrays": {"a": 1}}, {"arrays": []}, {"alerts": [1]}, {"alerts": 7}, {"run": "x"}]
)
def test_reserved_fields_of_another_form_are_no_record(tmp_path, wrong):
    path = tmp_path / "run.jsonl"
    write(path, record(1))
    path.write_text(json.dumps({**strict_lines(path)[0], **wrong}) + "\n")
    with pytest.raises(ValueError, match="line 1 is not a record"):
        read_jsonl(path)


def test_histograms_come_back(tmp_path):
    path = tmp_path / "run.jsonl"
    edges, counts = np.array([-1.0, 0.1, 3.0]), np.array([2.0, 0.5])
    histogram = Histogram(edges, counts, -0.75, 2.5, 1.25, 7.0)
    write(path, Record(1, 2.0, {}, {"train_a/len": histogram}))
    back = read_jsonl(path)[0].histograms["train_a/len"]
    np.testing.assert_array_equal(back.edges, edges)
    np.testing.assert_array_equal(back.counts, counts)
    assert back.edges.dtype == back.counts.dtype == np.float64
    assert (back.minimum, back.maximum) == (-0.75, 2.5)
    assert (back.total, back.total_squares) == (1.25, 7.0)


def test_a_line_is_in_the_file_as_soon_as_it_is_written(tmp_path):
    sink = JSONLSink(tmp_path / "run.jsonl")
    for step in range(3):
        sink.write(record(step))
        assert steps(tmp_path / "run.jsonl") == list(range(step + 1))
    sink.close()


def test_an_existing_file_is_continued(tmp_path):
    path = tmp_path / "run.jsonl"
    write(path, record(1), record(2))
    write(path, record(3))
    assert steps(path) == [1, 2, 3]


@pytest.mark.parametrize("lost", [1, 2, 20])
def test_a_half_written_last_line_is_left_out_and_does_not_swallow_the_next(tmp_path, lost):
    path = tmp_path / "run.jsonl"
    write(path, record(1), record(2))
    whole = path.read_bytes()
    path.write_bytes(whole[:-lost])
    # Without its line break alone, a line is still complete.
    survivors = [1, 2] if lost == 1 else [1]
    assert steps(path) == survivors
    write(path, record(3))
    assert steps(path) == [*survivors, 3]
    strict_lines(path)


def test_a_last_line_longer_than_the_read_buffer_is_mended(tmp_path):
    path = tmp_path / "run.jsonl"
    long = Record(2, 1.0, {f"metric {number:06}": 1.0 for number in range(10_000)})
    write(path, record(1), long)
    path.write_bytes(path.read_bytes()[:-5])
    write(path, record(3))
    assert steps(path) == [1, 3]


def test_an_empty_file_holds_no_records(tmp_path):
    path = tmp_path / "run.jsonl"
    path.touch()
    assert read_jsonl(path) == []
    write(path, record(1))
    assert steps(path) == [1]


@pytest.mark.parametrize(
    "line",
    [
        *("[1, 2]", '{"loss": 1}', '{"step": 1, "wall_time": "x"}', "null", '{"text": "a'),
        '{"step": true, "wall_time": 1.0, "prefix": "", "metrics": {}, "histograms": {}}',
        '{"step": 1.0, "wall_time": 1.0, "prefix": "", "metrics": {}, "histograms": {}}',
        '{"step": 1, "wall_time": true, "prefix": "", "metrics": {}, "histograms": {}}',
        '{"step": 1, "wall_time": 1.0, "prefix": 3, "metrics": {}, "histograms": {}}',
        '{"step": 1, "wall_time": 1.0, "prefix": "", "metrics": {"a": null}, "histograms": {}}',
        '{"step": 1, "wall_time": 1.0, "prefix": "", "metrics": {"a": "1.5"}, "histograms": {}}',
        '{"step": 1, "wall_time": 1.0, "prefix": "", "metrics": {"a": NaN}, "histograms": {}, "x": '
        + "[" * 100_000
        + "]" * 100_000
        + "}",
        "[" * 100_000 + "]" * 100_000,
        '{"step": 1, "wall_time": 1.0, "prefix": "", "metrics": {"\\u001b[31m": 1.0}, "histograms": {}}',
        '{"step": 1, "wall_time": 1.0, "prefix": "", "metrics": {"\\u202e": 1.0}, "histograms": {}}',
        '{"step": 1, "wall_time": 1.0, "prefix": "", "metrics": {"\\ud800": 1.0}, "histograms": {}}',
        '{"step": 1, "wall_time": 1.0, "prefix": "\\u001b", "metrics": {"a": 1.0}, "histograms": {}}',
        (
            '{"step": 1, "wall_time": 1.0, "metrics": {}, "histograms": {"\\n": {"edges": [0, 1], "counts": '
            '[1], "minimum": 0, "maximum": 1, "total": 1, "total_squares": 1}}}'
        ),
        '{"step": 1, "wall_time": 1.0, "metrics": {"a": 1' + "0" * 400 + '}, "histograms": {}}',
        '{"step": 1, "wall_time": 1.0, "metrics": {"a": 1e999}, "histograms": {}}',
        '{"step": 1, "wall_time": "NaN", "metrics": {"a": 1.0}, "histograms": {}}',
    ],
    ids=lambda line: line[:90],
)
def test_a_damaged_line_in_the_middle_is_named(tmp_path, line):
    path = tmp_path / "run.jsonl"
    write(path, record(1))
    with path.open("a") as file:
        file.write(line + "\n")
    write(path, record(3))
    with pytest.raises(ValueError, match=r"run\.jsonl, line 2 is not a record"):
        read_jsonl(path)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("edges", [0.0, 1.0]),
        ("edges", [0.0, 2.0, 1.0]),
        ("edges", [0.0, 1.0, "Infinity"]),
        ("edges", {}),
        ("counts", [1.0]),
        ("counts", [1.0, -1.0]),
        ("counts", [1.0, True]),
        ("counts", [[1.0], [1.0]]),
        ("minimum", None),
        ("minimum", "NaN"),
        ("minimum", 1e9),
    ],
)
def test_a_histogram_that_does_not_fit_is_refused(tmp_path, part, value):
    """Before, edges and counts of any lengths came back as a histogram."""
    path = tmp_path / "run.jsonl"
    histogram = {
        "edges": [0.0, 1.0, 2.0],
        "counts": [1.0, 2.0],
        **dict.fromkeys(("minimum", "maximum", "total", "total_squares"), 1.0),
        part: value,
    }
    line = {
        "step": 1,
        "wall_time": 1.0,
        "prefix": "",
        "metrics": {},
        "histograms": {"h": histogram},
    }
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(ValueError, match=r"run\.jsonl, line 1 is not a record"):
        read_jsonl(path)


def test_a_line_longer_than_any_record_is_refused_before_it_is_in_memory(tmp_path):
    path = tmp_path / "run.jsonl"
    write(path, record(1))
    with path.open("ab") as file:
        file.truncate(2 * LONGEST)  # of NULs, which take no room on the disk
    with pytest.raises(ValueError, match=r"run\.jsonl, line 2 is longer than"):
        read_jsonl(path)


def test_empty_lines_are_no_records(tmp_path):
    path = tmp_path / "run.jsonl"
    write(path, record(1))
    with path.open("a") as file:
        file.write("\n  \n")
    write(path, record(2), record(5))
    sink = JSONLSink(path)
    sink.rewind(3)
    sink.close()
    assert steps(path) == [1, 2]


@pytest.mark.parametrize("torn", ['{"step": 9, "wall', '{"st', "\0\0\0", '{"step": 9, "wall\0\0'])
def test_torn_lines_in_the_middle_are_left_out_and_counted(tmp_path, caplog, torn):
    """Before, they were an error, and the file could not be read at all."""
    path = tmp_path / "run.jsonl"
    write(path, record(1))
    for step in (2, 3):
        with path.open("a") as file:
            file.write(torn + "\n")
        write(path, record(step))
    assert steps(path) == [1, 2, 3]
    (warning,) = [one.getMessage() for one in caplog.records]
    assert f"{path}: 2 lines break off in the middle and are left out" in warning
    assert "line 2" in warning


def test_a_record_behind_a_torn_line_that_nothing_had_closed_is_read(tmp_path, caplog):
    path = tmp_path / "run.jsonl"
    write(path, record(1), record(2))
    path.write_bytes(b'{"step": 0, "wall_ti' + path.read_bytes())
    assert steps(path) == [1, 2]
    assert caplog.records == []


def test_rewind_cuts_the_steps_after_the_checkpoint(tmp_path):
    path = tmp_path / "run.jsonl"
    write(path, *(record(step) for step in (10, 20, 30, 40)))
    sink = JSONLSink(path)
    sink.rewind(20)
    assert steps(path) == [10, 20]
    sink.write(record(30, loss=-1.0))
    sink.close()
    assert steps(path) == [10, 20, 30]
    assert read_jsonl(path)[-1].metrics == {"loss": -1.0}


def test_rewind_keeps_earlier_steps_that_were_logged_late(tmp_path):
    path = tmp_path / "run.jsonl"
    write(path, *(record(step) for step in (10, 30, 20, 40, 5)))
    sink = JSONLSink(path)
    sink.rewind(20)
    sink.close()
    assert steps(path) == [10, 20, 5]


def test_rewind_mends_a_file_that_a_crash_left(tmp_path):
    path = tmp_path / "run.jsonl"
    write(path, record(10), record(20), record(30))
    path.write_bytes(path.read_bytes()[:-7])
    sink = JSONLSink(path)
    sink.rewind(10)
    sink.write(record(11))
    sink.close()
    assert steps(path) == [10, 11]


def test_rewind_behind_the_first_step_empties_the_file_and_beyond_the_last_does_nothing(tmp_path):
    path = tmp_path / "run.jsonl"
    write(path, record(0), record(1))
    sink = JSONLSink(path)
    sink.rewind(1)
    assert steps(path) == [0, 1]
    sink.rewind(-1)
    sink.close()
    assert path.read_bytes() == b""


def test_rewind_makes_no_file(tmp_path):
    sink = JSONLSink(tmp_path / "run.jsonl")
    sink.rewind(5)
    sink.close()
    assert list(tmp_path.iterdir()) == []


def test_rewind_leaves_a_foreign_file_as_it_is(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text('{"text": "somebody\'s data set"}\n')
    sink = JSONLSink(path)
    with pytest.raises(FileExistsError, match="holds something else than records"):
        sink.rewind(0)
    sink.close()
    assert path.read_text() == '{"text": "somebody\'s data set"}\n'


def test_a_full_disk_leaves_no_half_line(tmp_path):
    # A limit on the size of files makes write() stop in the middle of a line, as a full disk does.
    path = tmp_path / "run.jsonl"
    code = f"""
import resource, signal
from metricfold.sinks import JSONLSink, Record
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
before = resource.getrlimit(resource.RLIMIT_FSIZE)
sink = JSONLSink({str(path)!r})
sink.write(Record(1, 1.0, {{"a": 1.0}}))
resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
try:
    sink.write(Record(2, 1.0, {{"a": 1.0}}))
except OSError as error:
    print(error.errno)
resource.setrlimit(resource.RLIMIT_FSIZE, before)
sink.write(Record(3, 1.0, {{"a": 1.0}}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(errno.EFBIG)
    assert steps(path) == [1, 3]
    strict_lines(path)


# -- Whose file it is ----------------------------------------------------------------------------

FOREIGN = {
    "text without newline": b"all I know, on one line",
    "several lines of JSON": b'{\n  "lr": 0.1\n}',
    "one line of JSON": b'{"lr": 0.1}',
    "the beginning of some JSON": b"{\n",
    "a list": b"[1, 2]\n",
    "numbers": b"a,b\n1,2\n",
    "binary": bytes(range(11, 256)) * 20,
    "NUL": b"\0" * 4096,
    "JSON lines of others": b'{"step": 1, "loss": 2}\n',
    "half a line of others, closed": b'{"step": 1\n{"step": 2, "loss": 2}\n',
    "half a line of others": b'{"step": 1, "loss',
    "a long line of others": b'{"step": 1, "loss": "' + b"x" * (1 << 21),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_of_something_else_is_left_as_it_is_and_loud(tmp_path, caplog, monkeypatch, name):
    """Before, its last line was cut off if no line break followed it, and records came behind."""
    monkeypatch.setattr(worker, "_FAILING_SECONDS", 0.1)
    path = tmp_path / "mine"
    path.write_bytes(FOREIGN[name])
    with MetricsLogger([JSONLSink(path)]) as logger:
        logger.rewind(0)
        for step in range(3):
            logger.log(step, {"x": 1.0})
    assert path.read_bytes() == FOREIGN[name]
    assert list(tmp_path.iterdir()) == [path]
    loud, table = [one.getMessage() for one in caplog.records if one.levelno == logging.ERROR]
    assert "holds something else than records of JSONLSink" in loud
    assert "give another path, or move the file away" in loud
    assert "0 written, 0 skipped, 3 lost" in table


def test_records_go_on_once_the_foreign_file_is_moved_away(tmp_path, monkeypatch):
    path = tmp_path / "run.jsonl"
    path.write_text("notes")
    with MetricsLogger([JSONLSink(path)]) as logger:
        for step in range(3):
            logger.log(step, {"x": 1.0})
        time.sleep(0.2)
        path.rename(tmp_path / "notes.txt")
    assert steps(path) == [0, 1, 2]


@pytest.mark.parametrize(
    ("before", "kept"),
    [
        (b"", []),
        (b'{"step": 1, "wall_time": 101.5, "prefix": "", "metr', []),
        (b'{"st', []),
        (b'{"step": 1', []),
        (b'{"step": 1, "wall_time": 10\n', []),  # closed by a start since then
        # Refused until now, though records follow.
        (b'{"st\n{"step": 1, "wall_time": 1.0, "metrics": {}, "histograms": {}}\n', [1]),
        (b'{"step": 0, \n{"s\n', []),
        (b'{"step": 7, "wall_time":{"step": 8, "wal{"step": 9, "wall_time": 1\n', []),
        (b'{\n{"step": 1\n{"step": 2, "wall_time": 1.0, "metrics": {}, "histograms": {}}\n', [2]),
        (b'{"step": 1, "wall_time": 1.0, "metrics": {}, "histograms": {}}', [1]),
        (b'{"metrics": {}, "step": 1, "histograms": {}, "wall_time": 1.0}\n', [1]),
    ],
)
def test_what_is_a_record_or_half_of_one_is_continued(tmp_path, before, kept):
    path = tmp_path / "run.jsonl"
    path.write_bytes(before)
    write(path, record(3))
    assert steps(path) == [*kept, 3]


def test_a_last_line_that_did_not_begin_as_a_record_is_kept(tmp_path):
    path = tmp_path / "run.jsonl"
    write(path, record(1))
    with path.open("a") as file:
        file.write("# a note of mine")
    write(path, record(2))
    assert "\n# a note of mine\n" in path.read_text()
    assert len(path.read_text().splitlines()) == 3


# -- Where it is ---------------------------------------------------------------------------------


def test_a_relative_path_is_meant_from_where_the_sink_was_made(tmp_path, monkeypatch):
    """Before, it was meant from wherever the first record was written, and a rewind from there."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    sink = JSONLSink("run.jsonl")
    monkeypatch.chdir(tmp_path / "b")
    for step in range(3):
        sink.write(record(step))
    monkeypatch.chdir(tmp_path)
    sink.rewind(1)
    sink.close()
    assert steps(tmp_path / "a" / "run.jsonl") == [0, 1]
    assert list((tmp_path / "b").iterdir()) == []


@pytest.mark.parametrize("how", ["removed", "moved", "replaced"])
def test_a_file_that_is_gone_is_begun_anew(tmp_path, how, caplog):
    path = tmp_path / "run.jsonl"
    sink = JSONLSink(path)
    sink.write(record(1))
    if how == "removed":
        path.unlink()
    else:
        path.rename(tmp_path / "run.jsonl.1")
    if how == "replaced":
        write(path, record(7))
    for step in (2, 3):
        sink.write(record(step))
    sink.close()
    assert steps(path) == ([7, 2, 3] if how == "replaced" else [2, 3])
    if how != "removed":
        assert steps(tmp_path / "run.jsonl.1") == [1]
    (warning,) = [one.getMessage() for one in caplog.records]
    assert f"{path} has been moved or removed" in warning


def test_a_foreign_file_that_takes_its_place_is_left_as_it_is(tmp_path):
    path = tmp_path / "run.jsonl"
    sink = JSONLSink(path)
    sink.write(record(1))
    path.unlink()
    path.write_text("notes")
    with pytest.raises(FileExistsError):
        sink.write(record(2))
    assert path.read_text() == "notes"
    path.unlink()
    sink.write(record(3))
    sink.close()
    assert steps(path) == [3]


@pytest.mark.parametrize("size", [0, 5, -5])
def test_a_file_that_somebody_cuts_goes_on_at_its_end(tmp_path, size):
    path = tmp_path / "run.jsonl"
    sink = JSONLSink(path)
    sink.write(record(1))
    sink.write(record(2))
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)
    sink.write(record(3))
    sink.close()
    assert steps(path) == ([1, 3] if size < 0 else [3])
    strict_lines(path)


def test_rewind_keeps_a_symbolic_link_and_the_files_mode(tmp_path):
    real, link = tmp_path / "real" / "run.jsonl", tmp_path / "link.jsonl"
    write(real, *(record(step) for step in (1, 4, 2)))
    real.chmod(0o640)
    link.symlink_to(real)
    sink = JSONLSink(link)
    sink.rewind(2)
    sink.write(record(3))
    sink.close()
    assert link.is_symlink()
    assert steps(real) == [1, 2, 3]
    assert real.stat().st_mode & 0o777 == 0o640
    assert list(real.parent.iterdir()) == [real]


def test_a_rewind_that_fails_halfway_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "run.jsonl"
    code = f"""
import resource, signal
from metricfold.sinks import JSONLSink, Record
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
sink = JSONLSink({str(path)!r})
for step in (1, 2, 3, 50, 4):
    sink.write(Record(step, 1.0, {{"a": 1.0}}))
before = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
try:
    sink.rewind(10)
except OSError as error:
    print(error.errno)
resource.setrlimit(resource.RLIMIT_FSIZE, before)
sink.write(Record(5, 1.0, {{"a": 1.0}}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(errno.EFBIG)
    assert steps(path) == [1, 2, 3, 50, 4, 5]
    assert list(tmp_path.iterdir()) == [path]


def test_a_rewind_that_is_killed_leaves_the_old_or_the_new_file(tmp_path):
    before, after = [*range(200), 7], [*range(51), 7]
    seen = set()
    for trial in range(24):
        path = tmp_path / f"{trial}.jsonl"
        write(path, *(record(step) for step in before))
        child = os.fork()
        if child == 0:
            JSONLSink(path).rewind(50)
            os._exit(0)
        time.sleep(0.0006 * trial)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = steps(path)
        assert found in (before, after)
        seen.add(len(found))
    assert seen <= {len(before), len(after)}


def test_records_go_through_a_pipe_as_they_come():
    """Such as ``JSONLSink("/dev/stdout")`` of a program whose output another one reads."""
    code = """
from metricfold.sinks import JSONLSink, MetricsLogger
with MetricsLogger([JSONLSink("/dev/stdout"), JSONLSink("/dev/null")]) as logger:
    for step in range(3):
        logger.log(step, {"x": 1.0})
    logger.rewind(1)
    logger.log(2, {"x": 1.0})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert [json.loads(line)["step"] for line in done.stdout.splitlines()] == [0, 1, 2, 2]
    assert "1 x rewind(), step 1: ValueError(" in done.stderr
    assert "4 written, 0 skipped, 0 lost" in done.stderr


# -- Two writers ---------------------------------------------------------------------------------


def test_two_sinks_of_one_process_do_not_tear_each_others_lines(tmp_path):
    path = tmp_path / "run.jsonl"
    first, second = JSONLSink(path), JSONLSink(path)
    for step in range(0, 20, 2):
        first.write(record(step))
        second.write(record(step + 1))
    first.close()
    second.write(record(20))
    second.rewind(18)
    second.close()
    assert steps(path) == list(range(19))


HOLDS = """
import sys
from metricfold.sinks import JSONLSink, Record
sink = JSONLSink(sys.argv[1])
sink.write(Record(0, 1.0, {"x": 1.0}))
print("holds", flush=True)
sys.stdin.readline()
sink.close()
print("closed", flush=True)
sys.stdin.readline()
"""


def test_a_file_that_does_not_respond_holds_up_no_other(tmp_path):
    """Until now a sink that had yet to open its file waited for the one that hung."""
    full = tmp_path / "pipe"
    os.mkfifo(full)
    descriptor = os.open(full, os.O_RDWR | os.O_NONBLOCK)
    with contextlib.suppress(BlockingIOError):
        while os.write(descriptor, bytes(4096)):
            pass
    hanging = JSONLSink(full)
    writing = threading.Thread(target=hanging.write, args=(record(1),), daemon=True)
    writing.start()
    while hanging._file is None:
        time.sleep(0.001)
    other = threading.Thread(target=write, args=(tmp_path / "run.jsonl", record(1)), daemon=True)
    other.start()
    other.join(20)
    assert not other.is_alive()
    assert writing.is_alive()
    assert steps(tmp_path / "run.jsonl") == [1]
    while writing.is_alive():
        with contextlib.suppress(BlockingIOError):
            os.read(descriptor, 65536)
        writing.join(0.01)
    os.close(descriptor)


@pytest.mark.parametrize("ends", ["closes", "is killed"])
def test_a_second_process_waits_for_the_first_and_then_writes(tmp_path, ends, caplog):
    path = tmp_path / "run.jsonl"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", HOLDS, str(path)], **pipes) as first:
        assert first.stdout.readline() == "holds\n"
        with MetricsLogger([JSONLSink(path)]) as logger:
            for step in (1, 2):
                logger.log(step, {"x": 1.0})
            deadline = time.monotonic() + 30
            while not caplog.records and time.monotonic() < deadline:
                time.sleep(0.01)
            assert steps(path) == [0]
            if ends == "closes":
                first.stdin.write("\n")
                first.stdin.flush()
                assert first.stdout.readline() == "closed\n"
            else:
                first.kill()
        first.kill()
    assert steps(path) == [0, 1, 2]
    (loud,) = [one.getMessage() for one in caplog.records if one.levelno == logging.ERROR]
    assert "another process writes to this file" in loud


def test_a_fork_does_not_keep_the_file_from_others(tmp_path):
    path = tmp_path / "run.jsonl"
    sink = JSONLSink(path)
    sink.write(record(0))
    child = os.fork()
    if child == 0:
        time.sleep(30)
        os._exit(0)
    try:
        sink.close()
        code = "import sys; from metricfold.sinks import *; JSONLSink(sys.argv[1]).write(Record(1, 1.0, {'x': 1.0}))"
        subprocess.run([sys.executable, "-c", code, str(path)], check=True)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert steps(path) == [0, 1]


def test_where_there_are_no_locks_what_others_write_is_not_cut(tmp_path, monkeypatch):
    def no_locks(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    path = tmp_path / "run.jsonl"
    write(path, record(1))
    with path.open("a") as file:
        file.write('{"step": 2, "wall_time": 1')  # of a process that is about to finish it
    sink = JSONLSink(path)
    sink.write(record(3))
    sink.close()
    assert steps(path) == [1, 3]
    assert '"wall_time": 1\n' in path.read_text()


def test_a_path_may_be_a_string_or_a_path_and_shows_in_the_name(tmp_path):
    sink = JSONLSink(os.fspath(tmp_path / "run.jsonl"))
    assert repr(sink) == f"JSONLSink({str(tmp_path / 'run.jsonl')!r})"


def test_reading_a_missing_file_says_which(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.jsonl"):
        read_jsonl(tmp_path / "gone.jsonl")
