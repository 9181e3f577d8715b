"""Trackio: the real package with a database on disk, which is read back."""

from __future__ import annotations

import json
import math
import os
import sqlite3
import threading

import numpy as np
import pytest

pytest.importorskip("trackio")

from metricfold._core.sketch import Histogram
from metricfold.sinks import MetricsLogger, Record, RecordRefused, TrackioSink


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where Trackio, which asks once when it is imported, puts its databases."""
    os.environ["TRACKIO_DIR"] = str(tmp_path_factory.mktemp("trackio"))
    import trackio

    yield trackio.utils.TRACKIO_DIR
    os.environ.pop("TRACKIO_DIR")


@pytest.fixture
def started(folder, request):
    import trackio
    from trackio.context_vars import current_run

    runs = []

    def start(**given):
        quiet = {"embed": False, "auto_log_cpu": False, "auto_log_gpu": False}
        runs.append(trackio.init(project=project(request), **quiet, **given))
        return runs[-1]

    yield start
    for run in runs:
        run.finish()
    current_run.set(None)


def project(request):
    return f"p{abs(hash(request.node.name))}"


def rows(folder, request, table="metrics"):
    with sqlite3.connect(folder / f"{project(request)}.db") as database:
        database.row_factory = sqlite3.Row
        found = database.execute(f"select * from {table} order by id").fetchall()
    database.close()
    return [dict(row) for row in found]


def metrics(folder, request):
    return [(row["step"], json.loads(row["metrics"])) for row in rows(folder, request)]


def test_the_run_of_the_thread_that_makes_the_sink_gets_everything_and_stays_open(
    folder, request, started
):
    """Trackio's current run belongs to a thread's context: on another there is none."""
    mine = started(name="mine")
    sink = TrackioSink()
    assert repr(sink) == "TrackioSink(run='mine')"
    thread = threading.Thread(target=sink.write, args=[Record(1, 1.0, {"loss": 0.5})])
    thread.start()
    thread.join()
    with MetricsLogger([sink]) as logger:
        logger.log(2, {"loss": 0.25}, prefix="val")
        assert logger.flush()
        assert metrics(folder, request) == [(1, {"loss": 0.5}), (2, {"val/loss": 0.25})]
    mine.log({"loss": 0.125}, step=3)
    mine.finish()
    assert metrics(folder, request)[2:] == [(3, {"loss": 0.125})]
    assert {row["run_name"] for row in rows(folder, request)} == {"mine"}


def test_histograms_heat_maps_and_what_is_not_finite_arrive(folder, request, started):
    histogram = Histogram(
        np.array([0.0, 1.0, 2.0, 4.0]), np.array([3.0, 0.0, 1.5]), 0.25, 3.5, 6.0, 20.0
    )
    cells = {"axes": [["layer", 2], ["expert", 3]], "values": np.arange(6.0).reshape(2, 3)}
    sink = TrackioSink(started())
    odd = {"a": math.nan, "b": math.inf, "c": -math.inf}
    sink.write(Record(1, 1.0, odd, {"len": histogram}, arrays={"tokens": cells}))
    sink.flush()
    ((_, row),) = metrics(folder, request)
    assert row["len"] == {
        "_type": "trackio.histogram",
        "bins": [0.0, 1.0, 2.0, 4.0],
        "values": [3.0, 0.0, 1.5],
    }
    assert (row["a"], row["b"], row["c"]) == ("NaN", "Infinity", "-Infinity")
    assert row["tokens/cells"]["_type"] == "trackio.image"


def test_alerts_are_trackios(folder, request, started, capsys):
    alert = {"rule": "Spike", "severity": "severe", "message": "high", "dataset": "a", "name": "x"}
    sink = TrackioSink(started())
    sink.write(Record(2, 1.0, {"loss": 1.0}, prefix="train", alerts=[{**alert, "step": 1}]))
    sink.flush()
    (row,) = rows(folder, request, "alerts")
    assert (row["title"], row["text"]) == ("train x of a: severe", "step 1: high")
    assert (row["level"], row["step"]) == ("error", 2)


def test_a_run_of_its_own_has_the_configuration_and_is_finished(folder, request):
    from trackio.context_vars import current_run

    given = {"project": project(request), "name": "own", "auto_log_cpu": False}
    sink = TrackioSink(**given)
    run = {"config": {"optimizer": {"lr": 0.5}}}
    thread = threading.Thread(target=sink.write, args=[Record(1, 1.0, {"x": 1.0}, run=run)])
    thread.start()
    thread.join()
    sink.close()
    assert current_run.get() is None
    assert metrics(folder, request) == [(1, {"x": 1.0})]
    (row,) = rows(folder, request, "configs")
    assert json.loads(row["config"])["optimizer"] == {"lr": 0.5}


def test_without_a_run_nothing_is_written_and_that_is_said(folder, caplog):
    with MetricsLogger([TrackioSink()]) as logger:
        logger.log(1, {"loss": 1.0})
    assert "there was no run of Trackio, neither where the sink was made" in caplog.text
    with pytest.raises(TypeError, match="run= and name=: those are for trackio"):
        TrackioSink(object(), name="b")


def test_a_step_that_the_database_cannot_hold_costs_itself_alone(folder, request, started):
    """In Trackio it costs the batch that it is written with, with a warning of a thread."""
    sink = TrackioSink(started())
    sink.write(Record(1, 1.0, {"x": 1.0}))
    with pytest.raises(RecordRefused, match="beyond the 64 bits"):
        sink.write(Record(2**63, 1.0, {"x": 2.0}))
    sink.write(Record(2**63 - 1, 1.0, {"x": 3.0}))
    sink.flush()
    assert metrics(folder, request) == [(1, {"x": 1.0}), (2**63 - 1, {"x": 3.0})]


def test_a_run_that_is_resumed_goes_on(folder, request, started, caplog):
    for step in (1, 2):
        run = started(name="again", resume="allow")
        with MetricsLogger([TrackioSink(run)]) as logger:
            logger.rewind(step - 1)
            logger.log(step, {"x": float(step)})
        run.finish()
    assert metrics(folder, request) == [(1, {"x": 1.0}), (2, {"x": 2.0})]
    assert "cannot take back steps" in caplog.text
