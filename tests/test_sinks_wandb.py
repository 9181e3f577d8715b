"""W&B: the real package in offline mode; its run files are read back."""

from __future__ import annotations

import logging
import math
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import wandb
from wandb_files import finished, history, run_files

from metricfold.histogram import Histogram
from metricfold.sinks import MetricsLogger, Record, WandbSink


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    for name in ("WANDB_MODE", "WANDB_RUN_ID", "WANDB_DIR", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    yield
    if wandb.run is not None:
        wandb.finish()


def losses(*steps):
    return [Record(step, 1.0, {"train/loss": step / 4}) for step in steps]


def started(folder):
    settings = wandb.Settings(silent=True, console="off")
    return wandb.init(mode="offline", dir=str(folder), settings=settings)


def write(sink, *records):
    for record in records:
        sink.write(record)


def test_scalars_and_histograms_arrive_in_an_offline_run(tmp_path):
    histogram = Histogram(
        np.array([0.0, 1.0, 2.0, 4.0]), np.array([3.0, 0.0, 1.5]), 0.25, 3.5, 6.0, 20.0
    )
    sink = WandbSink(dir=str(tmp_path / "new" / "out"), project="p", name="n")
    sink.write(Record(3, 1.0, {"train_a/loss": 2.5, "lr": 1e-5}, {"train_a/len": histogram}))
    sink.write(Record(3, 1.0, {"val_a/loss": 7.5}))
    sink.write(Record(5, 1.0, {"train_a/loss": 2.25}))
    assert sink.run.settings.mode == "offline"
    sink.close()
    assert wandb.run is None, "the run that the sink started is finished"
    (path,) = run_files(tmp_path / "new" / "out")
    assert history(path) == {
        3: {
            "train_a/loss": 2.5,
            "lr": 1e-5,
            "train_a/len _type": "histogram",
            "train_a/len values": [3.0, 0.0, 1.5],
            "train_a/len bins": [0.0, 1.0, 2.0, 4.0],
            "val_a/loss": 7.5,
        },
        5: {"train_a/loss": 2.25},
    }
    (run,) = [one.run for one in finished(path) if one.WhichOneof("record_type") == "run"]
    assert (run.project, run.display_name) == ("p", "n")


def test_what_is_not_finite_arrives(tmp_path):
    sink = WandbSink(dir=tmp_path)
    sink.write(Record(1, 1.0, {"a": math.nan, "b": math.inf, "c": -math.inf}))
    sink.close()
    row = history(run_files(tmp_path)[0])[1]
    assert math.isnan(float(row["a"]))
    assert (float(row["b"]), float(row["c"])) == (math.inf, -math.inf)


def test_a_histogram_of_many_buckets_is_resampled_to_what_wandb_takes(tmp_path):
    counts = np.arange(3000.0)
    sink = WandbSink(dir=tmp_path)
    edges = np.geomspace(1.0, 1e6, 3001)
    sink.write(Record(1, 1.0, {}, {"h": Histogram(edges, counts, 1.0, 1e6, 1.0, 1.0)}))
    sink.close()
    row = history(run_files(tmp_path)[0])[1]
    assert len(row["h values"]) == 512
    assert len(row["h bins"]) == 513
    assert sum(row["h values"]) == counts.sum()
    assert set(row["h bins"]) <= set(edges.tolist())


def test_a_run_that_the_user_started_is_used_and_left_open(tmp_path):
    run = started(tmp_path)
    sink = WandbSink()
    write(sink, *losses(1, 2))
    sink.close()
    assert wandb.run is run
    run.log({"mine": 1.0}, step=3)
    run.finish()
    (path,) = run_files(tmp_path)
    assert history(path) == {1: {"train/loss": 0.25}, 2: {"train/loss": 0.5}, 3: {"mine": 1.0}}


def test_a_run_that_is_given_is_used(tmp_path):
    run = started(tmp_path)
    sink = WandbSink(run=run)
    assert repr(sink) == f"WandbSink(run={run.id!r})"
    write(sink, *losses(1))
    sink.close()
    run.finish()
    assert list(history(run_files(tmp_path)[0])) == [1]


def test_a_run_and_arguments_for_another_are_refused():
    with pytest.raises(TypeError, match="run= and project=, name="):
        WandbSink(run=object(), project="p", name="n")


def test_rewind_of_an_own_run_goes_on_in_a_new_one_of_the_same_group(tmp_path, caplog):
    sink = WandbSink(dir=tmp_path, id="first")
    write(sink, *losses(10, 20, 30))
    sink.rewind(20)
    (message,) = [one.getMessage() for one in caplog.records if one.name == "metricfold"]
    assert "cannot remove steps: run first is finished with what it holds, up to step 30" in message
    assert "group 'first' goes on after step 20" in message
    write(sink, *losses(30, 40))
    assert (sink.run.group, sink.run.id == "first") == ("first", False)
    sink.close()
    assert sorted(list(history(path)) for path in run_files(tmp_path)) == [[10, 20, 30], [30, 40]]


def test_rewind_of_the_users_run_says_that_it_cannot_and_leaves_out_what_is_shown(tmp_path, caplog):
    run = started(tmp_path)
    sink = WandbSink()
    write(sink, *losses(10, 20, 30))
    sink.rewind(20)
    assert f"resume_from='{run.id}?_step=20'" in caplog.text
    sink.write(Record(30, 1.0, {"train/loss": -1.0}))
    write(sink, *losses(40))
    sink.close()
    run.finish()
    rows = history(run_files(tmp_path)[0])
    assert list(rows) == [10, 20, 30, 40]
    assert rows[30] == {"train/loss": 7.5}


def test_rewind_with_nothing_to_take_back_starts_nothing_and_says_so(tmp_path, caplog):
    caplog.set_level(logging.INFO, "metricfold")
    sink = WandbSink(dir=tmp_path)
    sink.rewind(20)
    assert "no step after 20" in caplog.text
    assert wandb.run is None
    write(sink, *losses(21))
    sink.rewind(21)
    write(sink, *losses(22))
    sink.close()
    assert list(history(run_files(tmp_path)[0])) == [21, 22]


def test_a_step_that_wandb_would_drop_silently_is_an_error_that_says_what_to_do(tmp_path):
    sink = WandbSink(dir=tmp_path)
    write(sink, *losses(10))
    with pytest.raises(ValueError, match=r"refuses step 9 after step 10 .*logger\.rewind"):
        write(sink, *losses(9))
    sink.close()


SCRIPT = """
import logging, os, socket, sys, time
def forbid(event, args):
    if event == "socket.connect" and args[0].family != socket.AF_UNIX:
        print("connected to", args[1])
sys.addaudithook(forbid)
from metricfold.sinks import MetricsLogger, WandbSink
logger = MetricsLogger([WandbSink(dir=sys.argv[1])])
for step in range(200):
    logger.log(step, {"train/loss": step})
if sys.argv[2] == "kill":
    print("logged", flush=True)
    time.sleep(60)
if sys.argv[2] == "inspect":
    logger.flush()
    children = os.popen(f"ps -ww -o args= --ppid {os.getpid()}").read()
    print("core without reports:", "wandb-core" in children and "--no-observability" in children)
"""


def test_an_offline_run_opens_no_connection(tmp_path):
    environment = {name: one for name, one in os.environ.items() if not name.startswith("WANDB")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), "inspect"],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
        timeout=120,
    )
    assert done.stdout == "core without reports: True\n"
    assert done.stderr == "", "the terminal is the training's"


def test_nothing_is_lost_on_exit_without_close(tmp_path):
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), "exit"]
    subprocess.run(command, check=True, timeout=120)
    (path,) = run_files(tmp_path)
    assert list(history(path)) == list(range(200))


def test_nothing_is_lost_on_sigterm(tmp_path):
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), "kill"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "logged\n"
        process.terminate()
        assert process.wait(timeout=60) == -signal.SIGTERM
    (path,) = run_files(tmp_path)
    assert list(history(path)) == list(range(200))


def test_the_logger_closes_the_run(tmp_path):
    with MetricsLogger([WandbSink(dir=tmp_path, select="*/loss", key_format="x/{key}")]) as logger:
        logger.log(1, {"train/loss": 0.5, "lr": 1.0})
    assert wandb.run is None
    assert history(run_files(tmp_path)[0]) == {1: {"x/train/loss": 0.5}}
