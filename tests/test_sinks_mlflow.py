"""MLflow: the real package with a file store, which is read back."""

from __future__ import annotations

import http.server
import json
import math
import threading

import pytest

mlflow = pytest.importorskip("mlflow")

from metricfold.sinks import (  # noqa: E402
    KeysRefused,
    MetricsLogger,
    MLflowSink,
    Record,
    RecordRefused,
)


@pytest.fixture(autouse=True)
def _file_store(tmp_path, monkeypatch):
    for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"file:{tmp_path}/mlruns")
    yield
    mlflow.end_run()
    mlflow.set_tracking_uri(before)


def history(run_id, key):
    return [(one.step, one.value) for one in mlflow.MlflowClient().get_metric_history(run_id, key)]


def runs():
    client = mlflow.MlflowClient()
    experiments = [one.experiment_id for one in client.search_experiments()]
    return {run.info.run_id: run for run in client.search_runs(experiments)}


def test_the_run_of_the_thread_that_makes_the_sink_gets_everything_and_stays_open():
    """mlflow#3592, #5979: logged from another thread, metrics open a run of their own."""
    run = mlflow.start_run(run_name="mine")
    with MetricsLogger([MLflowSink()]) as logger:
        mlflow.end_run()
        with mlflow.start_run(run_name="another"):
            for step in range(3):
                logger.log(step, {"loss": step / 4}, prefix="val")
            logger.flush()
    mine = runs().pop(run.info.run_id)
    assert history(run.info.run_id, "val/loss") == [(0, 0.0), (1, 0.25), (2, 0.5)]
    assert len(runs()) == 2
    assert all(not one.data.metrics for name, one in runs().items() if name != mine.info.run_id)


def test_a_run_that_the_user_started_is_left_running():
    run = mlflow.start_run()
    with MetricsLogger([MLflowSink()]) as logger:
        logger.log(1, {"loss": 1.0})
    assert mlflow.active_run().info.run_id == run.info.run_id
    assert runs()[run.info.run_id].info.status == "RUNNING"


def test_without_a_run_a_new_one_is_started_said_and_ended(caplog):
    with MetricsLogger([MLflowSink()]) as logger:
        logger.log(1, {"loss": 1.0})
    ((run_id, run),) = runs().items()
    assert run.info.status == "FINISHED"
    assert f"it logs to a new one, {run_id}. To log to yours" in caplog.text
    assert mlflow.active_run() is None, "the new one was active in the sink's thread alone"


def test_what_start_run_is_told_goes_without_saying(caplog):
    with MetricsLogger([MLflowSink(run_name="a", tags={"team": "x"})]) as logger:
        logger.log(1, {"loss": 1.0})
    ((_, run),) = runs().items()
    assert (run.info.run_name, run.data.tags["team"]) == ("a", "x")
    assert caplog.text == ""


def test_a_run_goes_on_after_a_restart_by_its_id():
    with mlflow.start_run() as run:
        pass
    for step in (1, 2):
        with MetricsLogger([MLflowSink(run.info.run_id)]) as logger:
            logger.rewind(step - 1)
            logger.log(step, {"loss": 1.0 * step})
    assert history(run.info.run_id, "loss") == [(1, 1.0), (2, 2.0)]
    with pytest.raises(TypeError, match=r"run_id= and run_name=: those are for mlflow\.start_run"):
        MLflowSink(run.info.run_id, run_name="b")


def test_what_is_not_finite_and_large_steps_arrive():
    """mlflow#10258 and its kind: NaN is a value."""
    sink = MLflowSink(mlflow.start_run().info.run_id)
    odd = {"a": math.nan, "b": math.inf, "c": -math.inf}
    sink.write(Record(2**63 - 1, 1.5, odd))
    ((_, nan),) = history(sink.run_id, "a")
    assert math.isnan(nan)
    assert history(sink.run_id, "b") == [(2**63 - 1, math.inf)]
    assert history(sink.run_id, "c") == [(2**63 - 1, -math.inf)]
    (metric,) = mlflow.MlflowClient().get_metric_history(sink.run_id, "b")
    assert metric.timestamp == 1500
    with pytest.raises(RecordRefused, match="beyond the 64 bits"):
        sink.write(Record(2**63, 1.5, {"a": 1.0}))


def test_more_metrics_than_one_call_takes_go_in_several():
    """A call of more than 1,000 is refused as a whole."""
    sink = MLflowSink(mlflow.start_run().info.run_id)
    sink.write(Record(1, 1.0, {f"layer_{n}/norm": float(n) for n in range(1001)}))
    found = runs()[sink.run_id].data.metrics
    assert len(found) == 1001
    assert found["layer_1000/norm"] == 1000.0


def test_a_name_that_mlflow_refuses_costs_itself_alone_and_is_counted(caplog):
    run_id = mlflow.start_run().info.run_id
    with MetricsLogger([MLflowSink()]) as logger:
        for step in range(3):
            logger.log(step, {"tokens@32": 1.0, "loss": step / 4, "../up": 2.0})
        assert not logger.flush()
    assert history(run_id, "loss") == [(0, 0.0), (1, 0.25), (2, 0.5)]
    assert runs()[run_id].data.metrics.keys() == {"loss"}
    (*_, table) = [one.getMessage() for one in caplog.records if one.name == "metricfold"]
    assert f"MLflowSink({run_id!r}): 3 written, 0 skipped, 0 lost" in table
    assert "3 x without 'tokens@32', steps 0 to 2: MlflowException(" in table
    assert "3 x without '../up', steps 0 to 2: MlflowException(" in table


def test_a_metric_whose_name_is_a_folder_of_others_costs_them_alone(caplog):
    """`by=` prints such names. MLflow's file store stops at them, after a part of the batch."""
    run_id = mlflow.start_run().info.run_id
    for start in (0, 2):  # another process knows nothing of what is there
        with MetricsLogger([MLflowSink()]) as logger:
            for step in (start, start + 1):
                logger.log(step, {"lr": 0.5, "loss": 1.0, "loss/layer_7": 2.0, "z": 3.0})
    expected = [(step, 1.0) for step in range(4)]
    assert history(run_id, "loss") == expected
    assert [len(history(run_id, key)) for key in ("lr", "z")] == [4, 4]
    assert runs()[run_id].data.metrics.keys() == {"lr", "loss", "z"}
    assert "2 x without 'loss/layer_7', steps 0 to 1: ValueError(" in caplog.text
    assert "names that begin with 'loss/': give one of them another" in caplog.text


def test_a_folder_that_another_process_has_made_costs_the_name_alone(caplog):
    sink = MLflowSink(mlflow.start_run().info.run_id)
    sink.write(Record(1, 1.0, {"loss/layer_7": 2.0}))
    other = MLflowSink(sink.run_id)
    with pytest.raises(KeysRefused, match="left out are 'loss'"):
        other.write(Record(2, 1.0, {"loss": 1.0, "lr": 0.5}))
    assert history(sink.run_id, "lr") == [(2, 0.5)]


def test_one_name_among_a_thousand_is_found_by_halves(monkeypatch):
    sink = MLflowSink(mlflow.start_run().info.run_id)
    calls, log_batch = [], mlflow.MlflowClient.log_batch

    def counting(self, run, metrics=(), **named):
        calls.append(len(metrics))
        return log_batch(self, run, metrics=metrics, **named)

    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", counting)
    values = {f"expert_{n}": float(n) for n in range(300)}
    with pytest.raises(KeysRefused):
        sink.write(Record(1, 1.0, values | {"a@b": 1.0}))
    assert len(calls) < 25
    assert runs()[sink.run_id].data.metrics == values


def test_a_server_that_takes_fewer_at_once_gets_all_of_them(monkeypatch):
    """mlflow#2441: that of Azure takes 200, and says so with the error of a bad name."""
    sink = MLflowSink(mlflow.start_run().info.run_id)
    log_batch = mlflow.MlflowClient.log_batch

    def of_azure(self, run, metrics=(), **named):
        if len(metrics) > 200:
            text, code = "a field of the entity is over the size limit", 1000
            raise mlflow.exceptions.MlflowException(text, error_code=code)
        return log_batch(self, run, metrics=metrics, **named)

    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", of_azure)
    values = {f"expert_{n}": float(n) for n in range(500)}
    for step in (1, 2):
        sink.write(Record(step, 1.0, values))
    assert runs()[sink.run_id].data.metrics == values
    assert history(sink.run_id, "expert_499") == [(1, 499.0), (2, 499.0)]


def test_a_run_that_was_deleted_and_restored_gets_all_keys_again():
    """What it refuses meanwhile says nothing of the keys."""
    sink = MLflowSink(mlflow.start_run().info.run_id)
    client = mlflow.MlflowClient()
    client.delete_run(sink.run_id)
    with pytest.raises(RecordRefused, match="all of its keys are refused"):
        sink.write(Record(1, 1.0, {"loss": 1.0, "lr": 1.0}))
    client.restore_run(sink.run_id)
    sink.write(Record(2, 1.0, {"loss": 1.0, "lr": 1.0}))
    assert history(sink.run_id, "loss") == [(2, 1.0)]


def test_what_is_refused_is_asked_once(monkeypatch):
    sink = MLflowSink(mlflow.start_run().info.run_id)
    calls = []
    log_batch = mlflow.MlflowClient.log_batch
    monkeypatch.setattr(
        mlflow.MlflowClient,
        "log_batch",
        lambda self, *given, **named: calls.append(1) or log_batch(self, *given, **named),
    )
    counts = []
    for step in range(3):
        with pytest.raises(KeysRefused, match="left out are 'a@b'"):
            sink.write(Record(step, 1.0, {"a@b": 1.0, "loss": 2.0}))
        counts.append(len(calls))
    assert counts == [4, 5, 6]
    with pytest.raises(RecordRefused, match="all of its keys are refused"):
        sink.write(Record(4, 1.0, {"a@b": 1.0}))
    assert len(calls) == 6


@pytest.mark.parametrize("status", [429, 502, 503])
def test_a_server_that_is_away_gets_each_value_once_when_it_is_back(status, monkeypatch):
    """Its trouble is an MlflowException, as a refused name is; keys are not asked one by one for it."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    batches: list[list[str]] = []
    got: list[tuple[str, int]] = []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            metrics = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["metrics"]
            batches.append([one["key"] for one in metrics])
            if len(batches) < 3:
                return self.say(status, "TEMPORARILY_UNAVAILABLE")
            if "of_server" in batches[-1]:
                return self.say(400, "INVALID_PARAMETER_VALUE")
            got.extend((one["key"], one["step"]) for one in metrics)
            return self.say(200)

        def say(self, status, error=""):
            answer = json.dumps({"error_code": error, "message": error} if error else {}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    mlflow.set_tracking_uri(f"http://127.0.0.1:{server.server_port}")
    try:
        with MetricsLogger([MLflowSink("a" * 32)]) as logger:
            for step in (1, 2):
                logger.log(step, {"loss": 1.0, "of_server": 2.0, "lr": 3.0})
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert batches[:3] == [["loss", "of_server", "lr"]] * 3
    assert sorted(got) == [("loss", 1), ("loss", 2), ("lr", 1), ("lr", 2)]


def test_the_configuration_becomes_parameters_and_costs_no_metrics(caplog):
    """mlflow#5702 and its kind: values are limited to 6,000 characters, and may not change."""
    run_id = mlflow.start_run().info.run_id
    mlflow.log_param("optimizer.lr", "0.1")
    config = {"seed": 7, "optimizer": {"lr": 0.2}, "text": "x" * 7000, "a@b": 1}
    config |= {f"n{n}": n for n in range(120)}
    sink = MLflowSink(run_id)
    sink.write(Record(1, 1.0, {"loss": 1.0}, run={"config": config, "world_size": 2}))
    data = runs()[run_id].data
    assert data.metrics == {"loss": 1.0}
    assert {name: data.params[name] for name in ("seed", "optimizer.lr", "n119")} == {
        "seed": "7",
        "optimizer.lr": "0.1",
        "n119": "119",
    }
    assert data.params["text"] == "x" * 6000
    assert len(data.params) == 123
    assert "did not take what goes beside the values" in caplog.text


def test_the_configuration_goes_once_though_keys_are_refused(monkeypatch):
    """It went with every record until one was taken whole."""
    run_id = mlflow.start_run().info.run_id
    sent, log_batch = [], mlflow.MlflowClient.log_batch

    def counting(self, run, metrics=(), params=(), **named):
        sent.extend(params)
        return log_batch(self, run, metrics=metrics, params=params, **named)

    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", counting)
    with MetricsLogger([MLflowSink()], config={"seed": 7}) as logger:
        for step in (1, 2, 3):
            logger.log(step, {"a@b": 1.0, "loss": 1.0})
    assert runs()[run_id].data.params == {"seed": "7"}
    assert len(sent) == 1


def test_the_newest_alert_about_a_metric_is_a_tag():
    sink = MLflowSink(mlflow.start_run().info.run_id)
    alert = {"rule": "Spike", "severity": "warning", "message": "high", "dataset": "a", "name": "x"}
    alone = {"rule": "Mine", "severity": "severe", "message": "stop"}
    sink.write(Record(1, 1.0, {"loss": 1.0}, prefix="train", alerts=[alert]))
    sink.write(Record(2, 1.0, {}, prefix="train", alerts=[{**alert, "step": 1}, alone]))
    tags = runs()[sink.run_id].data.tags
    assert tags["alert.train.a/x"] == "warning, step 1: high"
    assert tags["alert.train.Mine"] == "severe, step 2: stop"


def test_going_back_is_said(caplog):
    sink = MLflowSink(mlflow.start_run().info.run_id)
    sink.rewind(3)  # of an earlier process it may hold more
    assert "cannot take back steps: what the tracker holds after step 3" in caplog.text
    caplog.clear()
    MLflowSink(run_name="new").rewind(3)
    sink.write(Record(3, 1.0, {"loss": 1.0}))
    sink.rewind(3)
    assert caplog.text == "", "there is nothing to take back"
    sink.rewind(2)
    assert "after step 2" in caplog.text


def test_the_tracking_server_is_that_of_when_the_sink_was_made(tmp_path):
    run_id = mlflow.start_run().info.run_id
    sink, first = MLflowSink(), mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"file:{tmp_path}/elsewhere")
    thread = threading.Thread(target=sink.write, args=[Record(1, 1.0, {"loss": 1.0})])
    thread.start()
    thread.join()
    mlflow.set_tracking_uri(first)
    assert history(run_id, "loss") == [(1, 1.0)]
    assert not (tmp_path / "elsewhere").exists()
