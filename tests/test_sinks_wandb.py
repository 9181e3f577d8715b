"""W&B: the real package in offline mode; its run files are read back."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import wandb
from wandb_files import finished, history, run_files

from metricfold import Alert, MetricsAggregator
from metricfold._core.sketch import Histogram
from metricfold.sinks import MetricsLogger, Record, RecordRefused, WandbSink


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
            "step": 3,
            "train_a/loss": 2.5,
            "lr": 1e-5,
            "train_a/len _type": "histogram",
            "train_a/len values": [3.0, 0.0, 1.5],
            "train_a/len bins": [0.0, 1.0, 2.0, 4.0],
            "val_a/loss": 7.5,
        },
        5: {"train_a/loss": 2.25, "step": 5},
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
    assert history(path) == {
        1: {"train/loss": 0.25, "step": 1},
        2: {"train/loss": 0.5, "step": 2},
        3: {"mine": 1.0},
    }


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
    with pytest.raises(RecordRefused, match="keeps what it holds of step 30"):
        sink.write(Record(30, 1.0, {"train/loss": -1.0}))
    write(sink, *losses(40))
    sink.close()
    run.finish()
    rows = history(run_files(tmp_path)[0])
    assert list(rows) == [10, 20, 30, 40]
    assert rows[30] == {"train/loss": 7.5, "step": 30}


def test_rewind_leaves_out_of_each_prefix_what_is_shown_of_it(tmp_path):
    run = started(tmp_path)
    with MetricsLogger([WandbSink()]) as logger:
        for step in range(1, 6):
            logger.log(step, {"loss": float(step)}, prefix="train")
            logger.flush()
            run.log({"mine": 1.0})  # W&B's own step is ahead from here on
            logger.log(10 * step, {"acc": 1.0}, prefix="val")
        logger.rewind(3)
        for step in (4, 5, 6):
            logger.log(step, {"loss": -1.0}, prefix="train")
        logger.log(60, {"acc": -1.0}, prefix="val")
    run.finish()
    found, _ = shown(tmp_path)
    assert found["train/loss"] == {**{step: float(step) for step in range(1, 6)}, 6: -1.0}
    assert found["val/acc"] == {10: 1.0, 20: 1.0, 30: 1.0, 40: 1.0, 50: 1.0, 60: -1.0}


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


# -- Steps that W&B would leave out ---------------------------------------------------------------


def shown(folder):
    """Return what each key has at each step of its own prefix, and the axes that W&B was told."""
    (path,) = run_files(folder)
    found, axes = {}, {}
    for record in finished(path):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            row = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            for key, value in row.items():
                axis = f"{key.partition('/')[0].partition('_')[0]}/step"
                if not key.endswith("/step") and axis in row:
                    found.setdefault(key, {})[row[axis]] = value
        if kind == "metric":
            axes[record.metric.name or record.metric.glob_name] = record.metric.step_metric
    return found, axes


def logged(run, sink, script):
    """Log what `script(log)` does, and return the table that the logger closes with."""
    with MetricsLogger([sink]) as logger:

        def log(step, prefix, **values):
            logger.log(step, values, prefix=prefix)
            logger.flush()

        script(log)
    run.finish()


def table(caplog):
    errors = [one.getMessage() for one in caplog.records if one.levelno == logging.ERROR]
    (line,) = [line for one in errors for line in one.splitlines() if " written, " in line]
    return line.partition(": ")[2]


def test_validation_by_epochs_joins_the_rows_of_training(tmp_path, caplog):
    """Before, the first of them was an error, after which nothing more was logged to W&B."""
    run = started(tmp_path)

    def script(log):
        for step in range(1, 21):
            log(step, "train", loss=float(step))
            if step % 5 == 0:
                log(step // 5, "val", acc=step / 20)

    logged(run, WandbSink(run=run), script)
    found, axes = shown(tmp_path)
    assert found["train/loss"] == {step: float(step) for step in range(1, 21)}
    assert found["val/acc"] == {1: 0.25, 2: 0.5, 3: 0.75, 4: 1.0}
    assert axes == {"val/step": "", "val/acc": "val/step"}
    assert not [one for one in caplog.records if one.levelno >= logging.ERROR]


def test_rows_that_something_else_logs_between_cost_none_of_ours(tmp_path, caplog):
    """Natively, W&B leaves out as many rows as were logged between."""
    run = started(tmp_path)

    def script(log):
        for step in range(1, 12):
            log(step, "train", loss=float(step))
            if step in (1, 5):
                for part in ("export", "move", "generate"):
                    run.log({f"profiling/{part}": 0.5})
                run.log({"table": wandb.Table(columns=["a"], data=[[1]])})

    logged(run, WandbSink(), script)
    found, _ = shown(tmp_path)
    assert found["train/loss"] == {step: float(step) for step in range(1, 12)}
    assert not [one for one in caplog.records if one.levelno >= logging.WARNING]


def test_an_axis_that_is_ahead_costs_the_others_no_row(tmp_path, caplog):
    """A validation that counts samples, over a training that counts steps."""
    run = started(tmp_path)

    def script(log):
        for epoch in range(3):
            for step in range(3):
                log(3 * epoch + step, "train", loss=float(step), lr=0.5)
            for batch in range(4):
                log(100 * epoch + batch, "val", acc=float(batch), lr=0.5)

    logged(run, WandbSink(), script)
    found, axes = shown(tmp_path)
    assert list(found["train/loss"]) == list(range(9))
    assert list(found["val/acc"]) == [
        100 * epoch + batch for epoch in range(3) for batch in range(4)
    ]
    assert axes["train/loss"] == "train/step"
    assert not [one for one in caplog.records if one.levelno >= logging.WARNING]


def test_late_rows_of_ascending_steps_are_all_there(tmp_path, caplog):
    run = started(tmp_path)

    def script(log):
        log(10, "train", loss=1.0)
        log(7, "eval", acc=0.7)
        log(8, "eval", acc=0.8)  # that row has one already
        log(10, "eval", acc=1.0)
        log(11, "train", loss=1.1)
        log(11, "train", loss=1.2)  # a second time

    logged(run, WandbSink(), script)
    found, axes = shown(tmp_path)
    assert found == {"train/loss": {10: 1.0, 11: 1.2}, "eval/acc": {7: 0.7, 8: 0.8, 10: 1.0}}
    assert axes["eval/acc"] == "eval/step"
    assert not [one for one in caplog.records if one.levelno >= logging.WARNING]


def test_what_several_prefixes_log_has_no_axis_of_one_of_them(tmp_path):
    run = started(tmp_path)
    with MetricsLogger([WandbSink()]) as logger:
        for step in (10, 20):
            logger.log(step, {"loss": 1.0}, prefix="train", extra={"lr": 0.5})
            logger.log(step // 10, {"acc": 1.0}, prefix="val", extra={"lr": 0.25})
    run.finish()
    _, axes = shown(tmp_path)
    assert axes == {"val/step": "", "val/acc": "val/step"}


def test_a_forgotten_rewind_costs_the_steps_that_are_there_and_no_later_ones(tmp_path, caplog):
    run = started(tmp_path)

    def script(log):
        for step in (*range(1, 11), *range(7, 15)):
            log(step, "train", loss=float(step))

    logged(run, WandbSink(), script)
    found, _ = shown(tmp_path)
    assert found["train/loss"] == {step: float(step) for step in range(1, 15)}
    assert table(caplog) == "15 written, 3 skipped, 0 lost"


def test_with_a_step_metric_steps_may_go_back(tmp_path, caplog):
    run = started(tmp_path)

    def script(log):
        for step in (1, 2, 3, 2, 4):
            log(step, "train", loss=float(step))
        log(1, "val", acc=0.5)
        run.log({"mine": 1.0})
        log(5, "train", loss=5.0)

    logged(run, WandbSink(step_metric="global"), script)
    found, axes = shown(tmp_path)
    assert found["train/loss"] == {step: float(step) for step in (1, 2, 3, 4, 5)}
    assert found["val/acc"] == {1: 0.5}
    assert axes.pop("global") == ""
    assert axes.pop("*") == "global"
    assert {*axes.values()} <= {"global"}  # before 0.25, W&B says it of each key as well
    assert len(history(run_files(tmp_path)[0])) == 8
    assert not [one for one in caplog.records if one.levelno >= logging.ERROR]


def test_with_a_step_metric_a_rewind_of_an_own_run_goes_on_in_a_new_one(tmp_path):
    sink = WandbSink(dir=tmp_path, step_metric="global")
    write(sink, *losses(10, 20, 30))
    sink.rewind(20)
    write(sink, *losses(30))
    sink.close()
    assert sorted(len(history(path)) for path in run_files(tmp_path)) == [1, 3]


def test_a_metric_called_step_and_a_key_format_that_knows_no_axis_keep_theirs(tmp_path):
    names = {"step": "mine/step", "train/loss": "loss"}
    sink = WandbSink(dir=tmp_path, key_format=lambda key: names[key])
    sink.write(Record(3, 1.0, {"train/loss": 1.0, "step": 99.0}))
    sink.write(Record(4, 1.0, {"train/loss": 2.0}, prefix="train"))
    sink.close()
    assert history(run_files(tmp_path)[0]) == {
        3: {"loss": 1.0, "mine/step": 99.0},
        4: {"loss": 2.0, "train/step": 4},
    }


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
        # W&B takes seconds to begin a run on a busy machine, and who is told to end has a few only.
        while not run_files(tmp_path) and process.poll() is None:
            time.sleep(0.01)
        process.terminate()
        assert process.wait(timeout=60) == -signal.SIGTERM
    (path,) = run_files(tmp_path)
    assert list(history(path)) == list(range(200))


def test_the_logger_closes_the_run(tmp_path):
    with MetricsLogger([WandbSink(dir=tmp_path, select="*/loss", key_format="x/{key}")]) as logger:
        logger.log(1, {"train/loss": 0.5, "lr": 1.0})
    assert wandb.run is None
    assert history(run_files(tmp_path)[0]) == {1: {"x/train/loss": 0.5, "x/step": 1}}


def test_alerts_are_sent_and_cost_no_row(tmp_path):
    nan = Alert("loss of web is nan,\non rank 1", "severe", "web", "loss", math.nan, 1, "r", 3)
    slow = Alert("rank 2 is slow", rule="x" * 100)
    sink = WandbSink(dir=tmp_path)
    sink.write(Record(3, 1.0, {"train/loss": math.nan}, prefix="train", alerts=[nan.to_json()]))
    sink.write(Record(5, 1.0, {}, alerts=[slow.to_json()]))
    sink.close()
    (path,) = run_files(tmp_path)
    found = [one.alert for one in finished(path) if one.WhichOneof("record_type") == "alert"]
    first, second = [(one.title, one.text, one.level) for one in found]
    assert first == ("train loss of web: severe", "step 3: loss of web is nan,\non rank 1", "ERROR")
    assert second[0].endswith("xx: warning")
    assert len(second[0]) < 64
    assert second[1:] == ("step 5: rank 2 is slow", "WARN")
    assert list(history(path)) == [3]


def test_an_alert_that_is_not_taken_is_said_and_its_row_is_there_once(
    tmp_path, monkeypatch, caplog
):
    sink = WandbSink(run=(run := started(tmp_path)))
    monkeypatch.setattr(type(run), "alert", property(lambda self: (_ for _ in ()).throw(OSError)))
    sink.write(Record(3, 1.0, {"loss": 1.0}, alerts=[Alert("bad").to_json()]))
    run.finish()
    assert history(run_files(tmp_path)[0]) == {3: {"loss": 1.0, "step": 3}}
    assert "did not take the alert 'bad'" in caplog.text


def test_losses_are_summed_up_by_their_best_and_drawn_over_the_step_of_their_prefix(tmp_path):
    aggregator = MetricsAggregator()
    sink = WandbSink(dir=tmp_path)
    config = {"lr": 0.1, "optimizer": {"name": "adam"}}
    with MetricsLogger([sink], better={"accuracy": "higher"}, config=config) as logger:
        for step in (10, 20):
            aggregator.record("loss", 2.0, dataset="docs")
            aggregator.record("accuracy", 0.5)
            aggregator.record("grad_norm", 1.0)
            logger.log(step, aggregator, prefix="train", extra={"lr": 0.5})
    records = finished(run_files(tmp_path)[0])
    defined = {}
    for record in records:
        if record.WhichOneof("record_type") == "metric":
            one = record.metric
            defined[one.name] = (one.step_metric, one.summary.min, one.summary.max)
    assert defined == {
        "train/step": ("", False, False),
        "train/loss": ("train/step", True, False),
        "train_docs/loss": ("train/step", True, False),
        "train/accuracy": ("train/step", False, True),
        "train/grad_norm": ("train/step", False, False),
    }
    said = {}
    for record in records:
        if record.WhichOneof("record_type") == "config":
            said |= {one.key: json.loads(one.value_json) for one in record.config.update}
    assert {name: said[name] for name in config} == config


def test_with_a_step_metric_what_is_summed_up_by_its_best_is_drawn_over_it_too(tmp_path):
    aggregator = MetricsAggregator()
    with MetricsLogger([WandbSink(dir=tmp_path, step_metric="global")]) as logger:
        aggregator.record("loss", 2.0)
        logger.log(10, aggregator, prefix="train")
    records = finished(run_files(tmp_path)[0])
    metrics = [one.metric for one in records if one.WhichOneof("record_type") == "metric"]
    (loss,) = [one for one in metrics if one.name == "train/loss"]
    assert (loss.step_metric, loss.summary.min) == ("global", True)
