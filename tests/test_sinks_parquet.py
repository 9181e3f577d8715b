"""Parquet: folders that Arrow and pandas read back as one table, whatever happens meanwhile."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time

import pytest

from metricfold import MetricsAggregator
from metricfold.sinks import MetricsLogger, ParquetSink, Record

pq = pytest.importorskip("pyarrow.parquet")


def table(folder):
    return pq.read_table(folder).to_pylist()


def values(folder):
    return [(row["step"], row["key"], row["value"]) for row in table(folder)]


def written(folder, *steps, **how):
    sink = ParquetSink(folder, **how)
    for step in steps:
        sink.write(Record(step, 1.5, {"loss": float(step)}))
    sink.close()


def test_a_value_is_a_row_that_says_what_it_is(tmp_path):
    aggregator = MetricsAggregator()
    aggregator.record("len", 3.0, "distribution", dataset="a_b")
    with MetricsLogger(
        [ParquetSink(tmp_path / "new" / "run", select=["train_*p50", "lr"])]
    ) as logger:
        logger.log(50, aggregator, prefix="train", extra={"lr": 0.1})
    first, second = table(tmp_path / "new" / "run")
    assert first.pop("wall_time") == second.pop("wall_time") > 1.7e9
    assert first == {
        "step": 50,
        "prefix": "train",
        "key": "train_a_b/len_stat_p50",
        "dataset": "a_b",
        "name": "len",
        "statistic": "p50",
        "value": 3.0,
    }
    assert second == {
        "step": 50,
        "prefix": "train",
        "key": "lr",
        "dataset": "",
        "name": "",
        "statistic": "",
        "value": 0.1,
    }


def test_what_is_not_finite_stays_so_and_pandas_reads_it(tmp_path):
    pandas = pytest.importorskip("pandas")
    sink = ParquetSink(tmp_path)
    sink.write(Record(1, 1.0, {"a": math.nan, "b": math.inf}))
    sink.write(Record(2, 1.0, {"late": 0.1}))
    sink.close()
    frame = pandas.read_parquet(tmp_path)
    assert math.isnan(frame["value"][0])
    assert frame["value"][1:].tolist() == [math.inf, 0.1]


def test_a_flush_brings_what_was_logged_into_whole_files(tmp_path):
    sink = ParquetSink(tmp_path, rows=3)
    counts = []
    for step in range(8):
        sink.write(Record(step, 1.5, {"loss": float(step)}))
        sink.flush()
        assert values(tmp_path) == [(n, "loss", float(n)) for n in range(step + 1)]
        counts.append(len(list(tmp_path.iterdir())))
    assert counts == [1, 1, 1, 2, 2, 2, 3, 3]
    sink.close()
    assert len(list(tmp_path.iterdir())) == 3


def test_a_new_process_adds_and_a_rewind_takes_back(tmp_path):
    written(tmp_path, 1, 2, 3, 4, 5, rows=2)
    with MetricsLogger([ParquetSink(tmp_path)]) as logger:
        logger.rewind(3)
        logger.log(4, {"loss": 0.5})
    assert values(tmp_path) == [
        *[(1, "loss", 1.0), (2, "loss", 2.0), (3, "loss", 3.0)],
        (4, "loss", 0.5),
    ]


def test_a_rewind_in_the_middle_of_a_run(tmp_path):
    sink = ParquetSink(tmp_path)
    for step in (1, 2, 3):
        sink.write(Record(step, 1.5, {"loss": float(step)}))
    sink.rewind(1)
    sink.write(Record(2, 1.5, {"loss": 0.5}))
    sink.close()
    assert values(tmp_path) == [(1, "loss", 1.0), (2, "loss", 0.5)]


def test_files_of_others_are_neither_touched_nor_mixed_with(tmp_path):
    other = tmp_path / "data.parquet"
    other.write_bytes(b"PAR1")
    sink = ParquetSink(tmp_path)
    with pytest.raises(FileExistsError, match=r"other Parquet files, such as 'data\.parquet'"):
        sink.write(Record(1, 1.5, {"loss": 1.0}))
    sink.close()
    assert [one.name for one in tmp_path.iterdir()] == ["data.parquet"]


def test_a_disk_that_is_full_leaves_what_is_there_and_costs_nothing(tmp_path, monkeypatch):
    sink = ParquetSink(tmp_path)
    sink.write(Record(1, 1.5, {"loss": 1.0}))
    sink.flush()
    sink.write(Record(2, 1.5, {"loss": 2.0}))
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            sink.flush()
    assert values(tmp_path) == [(1, "loss", 1.0)]
    assert len(list(tmp_path.iterdir())) == 1
    sink.close()
    assert values(tmp_path) == [(1, "loss", 1.0), (2, "loss", 2.0)]


def full(descriptor):
    raise OSError(28, "No space left on device")


def test_a_process_that_is_killed_leaves_a_table(tmp_path):
    """axol #154, apache/arrow #3203: a file without its footer cannot be read at all."""
    writing = """
import sys
from metricfold.sinks import ParquetSink, Record
sink = ParquetSink(sys.argv[1], rows=20)
for step in range(10**6):
    sink.write(Record(step, 1.5, {"loss": float(step)}))
    sink.flush()
"""
    with subprocess.Popen([sys.executable, "-c", writing, tmp_path]) as writer:
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("metrics-*"))) < 3 and time.monotonic() < deadline:
            time.sleep(0.001)
        os.kill(writer.pid, signal.SIGKILL)
    found = values(tmp_path)
    assert len(found) >= 40
    assert found == [(step, "loss", float(step)) for step in range(len(found))]
    written(tmp_path, -1)
    assert values(tmp_path) == [*found, (-1, "loss", -1.0)]


def test_what_cannot_be_is_refused(tmp_path):
    with pytest.raises(ValueError, match="a file has at least one"):
        ParquetSink(tmp_path, rows=0)
    with pytest.raises(OverflowError, match="beyond the 64 bits"):
        ParquetSink(tmp_path).write(Record(2**63, 1.5, {"loss": 1.0}))
    assert repr(ParquetSink(tmp_path)) == f"ParquetSink('{tmp_path}')"
    ParquetSink(tmp_path / "never").rewind(3)
    assert not (tmp_path / "never").exists()
