"""CSV: files that the csv module and pandas read back, whatever happens while they are written."""

from __future__ import annotations

import csv
import math
import multiprocessing
import os
import random
import signal
import time

import pytest

from metricfold.sinks import CSVSink, KeysRefused, MetricsLogger, Record


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file, strict=True))


def numbers(path):
    """Return the steps and the values by key, as they were logged."""
    return [
        (int(row["step"]), {k: float(v) for k, v in list(row.items())[3:] if v})
        for row in rows(path)
    ]


def write(sink, *records):
    for step, metrics in records:
        sink.write(Record(step, 1.5, metrics, prefix="train"))


def put(path, *records):
    sink = CSVSink(path)
    try:
        write(sink, *records)
    finally:
        sink.close()


def test_a_log_is_a_row_and_a_key_is_a_column(tmp_path):
    path = tmp_path / "new" / "run.csv"
    with MetricsLogger([CSVSink(path)]) as logger:
        logger.log(50, {"loss": 2.31, "tokens": 120000}, prefix="train")
        logger.log(100, {"loss": 0.1 + 0.2, "tokens": 240000}, prefix="train")
    header, *lines = path.read_text().splitlines()
    assert header == "step,wall_time,prefix,train/loss,train/tokens"
    assert [line.split(",")[0] for line in lines] == ["50", "100"]
    assert numbers(path)[1] == (100, {"train/loss": 0.1 + 0.2, "train/tokens": 240000.0})


def test_a_key_that_comes_up_late_gets_a_column_and_no_value_moves(tmp_path):
    """In Lightning #18567 and agno #10255 the header is that of the first row."""
    path = tmp_path / "run.csv"
    sink = CSVSink(path)
    logged = [
        (1, {"a": 1.0}),
        (2, {"b": 2.0, "a": math.inf}),
        (3, {"c": -math.inf}),
        (4, {"a": 4.0, "c": 5.0}),
    ]
    write(sink, *logged)
    assert numbers(path) == logged
    assert path.read_text().splitlines() == [
        "step,wall_time,prefix,a,b,c",
        "1,1.5,train,1.0,,",
        "2,1.5,train,Infinity,2.0,",
        "3,1.5,train,,,-Infinity",
        "4,1.5,train,4.0,,5.0",
    ]


def test_the_file_is_written_anew_for_a_new_column_alone(tmp_path):
    """In Lightning #17725 each write takes as long as all before it together."""
    path = tmp_path / "run.csv"
    sink = CSVSink(path)
    nodes = []
    for step, metrics in [(1, {"a": 1.0}), (2, {"a": 1.0}), (3, {"b": 1.0}), (4, {"a": 1.0})]:
        write(sink, (step, metrics))
        nodes.append(path.stat().st_ino)
    assert nodes[0] == nodes[1] != nodes[2] == nodes[3]


def test_nan_is_not_what_was_not_logged(tmp_path):
    path = tmp_path / "run.csv"
    put(path, (1, {"a": math.nan, "b": 1.0}), (2, {"b": 2.0}))
    assert [row["a"] for row in rows(path)] == ["NaN", ""]
    assert math.isnan(numbers(path)[0][1]["a"])


HOSTILE = ["a,b", 'say "hi"', "'", " blank ", "=1+1", "ü/語/🙂", "a;b\\", '"', ",,"]


def test_names_of_all_kinds_come_back(tmp_path):
    path = tmp_path / "run.csv"
    sink = CSVSink(path)
    for step, name in enumerate(HOSTILE):
        write(sink, (step, {name: float(step)}))
    assert numbers(path) == [(step, {name: float(step)}) for step, name in enumerate(HOSTILE)]
    put(path, (9, dict.fromkeys(HOSTILE, 1.0)))
    assert numbers(path)[-1] == (9, dict.fromkeys(HOSTILE, 1.0))


def test_pandas_reads_it(tmp_path):
    pandas = pytest.importorskip("pandas")
    path = tmp_path / "run.csv"
    put(path, (1, {"a": math.nan, "b,c": math.inf}), (2, {"late": 0.1}))
    frame = pandas.read_csv(path)
    assert list(frame.columns) == ["step", "wall_time", "prefix", "a", "b,c", "late"]
    assert frame["b,c"].tolist()[0] == math.inf
    assert frame["late"].tolist()[1] == 0.1


def test_a_run_that_goes_on_keeps_what_is_there_and_what_will_be_run_again_goes(tmp_path):
    """rf-detr #1321: Lightning's CSVLogger deletes the file; keras #4426: another header in the middle."""
    path = tmp_path / "run.csv"
    put(path, (1, {"a": 1.0}), (2, {"a": 2.0}), (3, {"a": 3.0}))
    with MetricsLogger([CSVSink(path)]) as logger:
        logger.rewind(2)
        logger.log(3, {"b": 4.0})
        logger.log(4, {"a": 5.0})
    assert numbers(path) == [(1, {"a": 1.0}), (2, {"a": 2.0}), (3, {"b": 4.0}), (4, {"a": 5.0})]


def test_steps_out_of_order_are_taken_back_too(tmp_path):
    path = tmp_path / "run.csv"
    sink = CSVSink(path)
    write(sink, (5, {"a": 5.0}), (1, {"a": 1.0}), (7, {"a": 7.0}), (-2, {"a": 2.0}))
    sink.rewind(1)
    write(sink, (2, {"a": 0.0}))
    assert [step for step, _ in numbers(path)] == [1, -2, 2]
    sink.rewind(-5)
    write(sink, (0, {"a": 1.0}))
    assert numbers(path) == [(0, {"a": 1.0})]


@pytest.mark.parametrize("half", ["3,1.5,train,1.2", "3", "3,1.5,tr\0\0\0"])
def test_half_a_last_row_goes_and_that_is_said(tmp_path, caplog, half):
    path = tmp_path / "run.csv"
    put(path, (1, {"a": 1.0}))
    with path.open("a") as file:
        file.write(half)
    put(path, (4, {"a": 4.0}))
    assert numbers(path) == [(1, {"a": 1.0}), (4, {"a": 4.0})]
    assert "the last row breaks off, and is taken away" in caplog.text


def test_half_a_header_is_begun_anew(tmp_path):
    path = tmp_path / "run.csv"
    for half in ("st", "step,wall_time,prefix", 'step,wall_time,prefix,"a'):
        path.write_text(half)
        put(path, (1, {"a": 1.0}))
        assert numbers(path) == [(1, {"a": 1.0})]


@pytest.mark.parametrize("text", ["epoch,loss\n1,2\n", "step\n1\n", "\n", "hello", '{"step": 1'])
def test_the_files_of_others_stay_as_they_are(tmp_path, text):
    path = tmp_path / "run.csv"
    path.write_text(text)
    with pytest.raises(FileExistsError, match="holds something else than records of CSVSink"):
        put(path, (1, {"a": 1.0}))
    assert path.read_text() == text


def test_a_file_that_a_spreadsheet_has_saved_is_continued(tmp_path):
    path = tmp_path / "run.csv"
    path.write_bytes(b"\xef\xbb\xbfstep,wall_time,prefix,a\r\n1,1.5,train,1\r\n")
    put(path, (2, {"a": 2.0}), (3, {"b": 3.0}))
    assert numbers(path) == [(1, {"a": 1.0}), (2, {"a": 2.0}), (3, {"b": 3.0})]


def test_two_sinks_of_a_process_share_the_columns(tmp_path):
    path = tmp_path / "run.csv"
    one, other = CSVSink(path), CSVSink(path)
    write(one, (1, {"a": 1.0}))
    write(other, (2, {"b": 2.0}))
    write(one, (3, {"c": 3.0}), (4, {"a": 4.0, "b": 5.0}))
    assert numbers(path) == [
        *[(1, {"a": 1.0}), (2, {"b": 2.0})],
        *[(3, {"c": 3.0}), (4, {"a": 4.0, "b": 5.0})],
    ]


def test_a_metric_called_as_a_column_of_the_sinks_own_is_left_out_and_counted(tmp_path, caplog):
    path = tmp_path / "run.csv"
    with MetricsLogger([CSVSink(path)]) as logger:
        logger.log(1, {"step": 9.0, "loss": 1.0})
    assert numbers(path) == [(1, {"loss": 1.0})]
    assert "1 written, 0 skipped, 0 lost" in caplog.text
    assert "1 x without 'step', step 1" in caplog.text
    with pytest.raises(KeysRefused):
        CSVSink(tmp_path / "other.csv").write(Record(1, 1.0, {"prefix": 1.0}))
    renamed = CSVSink(path, key_format="of/{key}")
    renamed.write(Record(2, 1.0, {"step": 9.0}))
    assert numbers(path)[1] == (2, {"of/step": 9.0})


def test_a_disk_that_is_full_leaves_the_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "run.csv"
    sink = CSVSink(path)
    write(sink, (1, {"a": 1.0}))
    before = path.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            write(sink, (2, {"b": 2.0}))
    assert path.read_bytes() == before
    assert [one.name for one in tmp_path.iterdir()] == ["run.csv"]
    write(sink, (2, {"b": 2.0}))
    assert numbers(path) == [(1, {"a": 1.0}), (2, {"b": 2.0})]


def full(descriptor):
    raise OSError(28, "No space left on device")


def test_a_process_that_is_killed_leaves_whole_rows(tmp_path):
    """Whenever it is, between two columns or in the middle of a file that is written anew."""
    path = tmp_path / "run.csv"
    context = multiprocessing.get_context("fork")
    for round_ in range(4):
        writer = context.Process(target=write_on, args=(path, 1000 * round_))
        writer.start()
        time.sleep(0.05 + 0.05 * random.random())
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        for step, metrics in numbers(path):
            assert set(metrics.values()) == {float(step)}
    assert numbers(path)


def write_on(path, start):
    sink = CSVSink(path)
    for step in range(start, start + 10**6):
        write(sink, (step, {f"k{step % 50}": float(step), "a": float(step)}))


def test_nothing_is_written_where_there_is_nothing_to_write(tmp_path):
    path = tmp_path / "run.csv"
    alert = {"rule": "Mine", "severity": "warning", "message": "m"}
    CSVSink(path).write(Record(1, 1.0, {}, alerts=[alert]))
    CSVSink(path).rewind(0)
    assert not path.exists()
