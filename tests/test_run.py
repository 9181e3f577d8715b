"""`Run`: a start in one line, whose parts are the library's own."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from ranks import run_threads

import metricfold
from metricfold import MetricsAggregator, Run, look, read_jsonl


def train(run: Run, steps: range) -> None:
    for step in steps:
        run.aggregator.record("tokens", 1, "sum", dataset="docs")
        run.aggregator.record("loss", float(step), dataset="docs")
        run.log(step)


def test_one_line_gives_a_folder_a_table_and_what_the_run_is(tmp_path, capsys):
    config = {"lr": 0.1, "model": {"width": 64}}
    with Run(
        tmp_path / "first", config=config, total_steps=30, better={"accuracy": "higher"}
    ) as run:
        train(run, range(3))
    assert [*capsys.readouterr().out.splitlines()][-1].startswith("step 2  train  loss 2.0000")
    found = look.read(tmp_path / "first")
    assert found.header["name"] == found.label == "first"
    assert (found.header["config"], found.header["total_steps"]) == (config, 30)
    assert found.header["better"] == {"accuracy": "higher"}
    assert found.header["world_size"] == 1
    assert [*(tmp_path / "first" / "tensorboard").glob("events*")]
    assert repr(run) == f"Run({str(tmp_path / 'first')!r})"


def test_a_run_that_crashed_after_its_checkpoint_goes_on_from_it(tmp_path):
    run = Run(tmp_path)
    train(run, range(5))
    state = json.loads(json.dumps(run.state_dict()))
    train(run, range(5, 9))  # whose steps are lost with the crash
    run.close()
    with Run(tmp_path) as again:
        again.load_state_dict(state)
        train(again, range(5, 7))
    records = read_jsonl(tmp_path / "metrics.jsonl")
    assert [record.step for record in records] == [*range(7)]
    assert [record.metrics["train_docs/tokens"] for record in records] == [*range(1, 8)]
    assert records[5].run is not None, "the process that goes on says what it is"


def test_before_the_first_log_a_checkpoint_takes_back_everything(tmp_path):
    run = Run(tmp_path)
    state = run.state_dict()
    train(run, range(2))
    run.close()
    with Run(tmp_path) as again:
        again.load_state_dict(state)
        train(again, range(1))
    assert [record.step for record in read_jsonl(tmp_path / "metrics.jsonl")] == [0]


@pytest.mark.parametrize("logged", [None, "5", True, -2, 1.5, float("nan"), float("inf")])
def test_a_state_that_is_none_of_a_run_changes_nothing(tmp_path, logged):
    with Run(tmp_path) as run:
        train(run, range(2))
        state = MetricsAggregator().state_dict() | {"logged": logged}
        with pytest.raises(ValueError, match=re.escape("no state of a Run")):
            run.load_state_dict(state)
        with pytest.raises(ValueError, match="no state of a Run"):
            run.load_state_dict(None)
        with pytest.raises(ValueError, match="payload"):
            run.load_state_dict({**state, "logged": 1, "payload": "{}"})
        train(run, range(2, 4))
    records = read_jsonl(tmp_path / "metrics.jsonl")
    assert [record.metrics["train_docs/tokens"] for record in records] == [1, 2, 3, 4]


def test_prefixes_and_the_choices_of_a_log_are_those_of_the_logger(tmp_path):
    with Run(tmp_path) as run:
        for dataset in ("a", "b"):
            run.aggregator.record("loss", 1.0, dataset=dataset)
        alerts = run.log(3, prefix="val", rollup=False, extra={"lr": 0.5})
    assert not alerts
    (record,) = read_jsonl(tmp_path / "metrics.jsonl")
    assert record.metrics == {"val_a/loss": 1.0, "val_b/loss": 1.0, "lr": 0.5}


def test_ranks_make_it_together(tmp_path):
    def of_rank(communicator: Any) -> dict[str, Any]:
        aggregator = MetricsAggregator(communicator=communicator)
        folder = tmp_path / str(communicator.rank)  # threads of one process all write
        with Run(folder, aggregator=aggregator) as run:
            train(run, range(2))
            return run.state_dict()

    one, other = run_threads(of_rank, 2)
    assert one == other
    (*_, last) = read_jsonl(tmp_path / "0" / "metrics.jsonl")
    assert last.metrics["train_docs/tokens"] == 4


def test_a_url_is_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="is a URL: give a folder"):
        Run("s3://bucket/runs/1")
    assert not [*tmp_path.iterdir()]


def test_it_is_a_public_name(tmp_path):
    assert "Run" in metricfold.__all__
    assert str(Run) == "<class 'metricfold.Run'>"
