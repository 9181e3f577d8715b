"""JSONL: valid JSON per line, nothing lost, and a file that survives crashes and resumes."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metricfold.histogram import Histogram
from metricfold.sinks import JSONLSink, Record, read_jsonl


def record(step, **metrics):
    return Record(step, 100.5 + step, metrics or {"loss": float(step)})


def write(path, *records):
    sink = JSONLSink(path)
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
    metrics=st.dictionaries(st.text(), st.floats()),
    step=st.integers(0, 2**70),
    wall_time=st.floats(allow_nan=False, allow_infinity=False),
    prefix=st.text(),
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
    ['{"step": 1, "wall', "[1, 2]", '{"loss": 1}', '{"step": 1, "wall_time": "x"}', "", "\x00"],
)
def test_a_damaged_line_in_the_middle_is_named(tmp_path, line):
    path = tmp_path / "run.jsonl"
    write(path, record(1))
    with path.open("a") as file:
        file.write(line + "\n")
    write(path, record(3))
    with pytest.raises(ValueError, match=r"run\.jsonl, line 2 is not a record"):
        read_jsonl(path)


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
    with pytest.raises(ValueError, match="line 1 is not a record"):
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


def test_two_sinks_on_one_file_do_not_tear_each_others_lines(tmp_path):
    path = tmp_path / "run.jsonl"
    first, second = JSONLSink(path), JSONLSink(path)
    for step in range(0, 20, 2):
        first.write(record(step))
        second.write(record(step + 1))
    first.close()
    second.close()
    assert steps(path) == list(range(20))


def test_a_path_may_be_a_string_or_a_path_and_shows_in_the_name(tmp_path):
    sink = JSONLSink(os.fspath(tmp_path / "run.jsonl"))
    assert repr(sink) == f"JSONLSink({str(tmp_path / 'run.jsonl')!r})"


def test_reading_a_missing_file_says_which(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.jsonl"):
        read_jsonl(tmp_path / "gone.jsonl")
