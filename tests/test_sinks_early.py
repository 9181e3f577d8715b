"""What a mistake makes empty, or sends backwards, is said once and early."""

from __future__ import annotations

import logging

import pytest
import torch

from metricfold import MetricsAggregator
from metricfold.sinks import ConsoleSink, JSONLSink, MetricsLogger, read_jsonl
from metricfold.torch import DeviceAccumulator


def said(caplog):
    return [
        one.getMessage()
        for one in caplog.records
        if one.name == "metricfold" and one.levelno >= logging.WARNING
    ]


# -- Nothing has come in -------------------------------------------------------------------------


def test_an_aggregator_that_nothing_came_into_says_so_once(tmp_path, caplog):
    aggregator, accumulator = MetricsAggregator(), DeviceAccumulator({"loss": "mean"}, ("a",))
    with MetricsLogger([JSONLSink(tmp_path / "run.jsonl")]) as logger:
        for step in (10, 20, 30):
            accumulator.update("loss", torch.ones(2))
            logger.log(step, aggregator, prefix="train", extra={"lr": 0.5})
        aggregator.drain(accumulator)
        logger.log(40, aggregator, prefix="train")
    (warning,) = said(caplog)
    assert "no metric has come in so far: the record of step 10, with prefix='train', is" in warning
    for word in ("aggregator.update(batch.pop('metrics'))", "aggregator.drain(accumulator)"):
        assert word in warning
    assert read_jsonl(tmp_path / "run.jsonl")[-1].metrics["train_a/loss"] == 1.0


def test_a_log_before_the_first_batch_is_no_mistake(caplog):
    aggregator = MetricsAggregator()
    with MetricsLogger([]) as logger:
        logger.log(0, aggregator, prefix="train")
    with MetricsLogger([Sink()]) as logger:
        logger.log(0, aggregator, prefix="train")
        aggregator.record("loss", 1.0)
        logger.log(50, aggregator, prefix="train")
    assert said(caplog) == []


@pytest.mark.filterwarnings("error")
def test_warnings_that_are_made_errors_cost_no_record(caplog):
    aggregator, sink = MetricsAggregator(), Sink()
    aggregator.derive("ratio", lambda metrics: 1 / 0)
    with MetricsLogger([sink]) as logger:
        for step in range(3):
            if step == 0:
                aggregator.record("loss", 1.0)
            logger.log(step, aggregator, prefix="train")
    assert sink.steps == [0, 1, 2]
    failed, empty = said(caplog)
    assert "the derived metric 'ratio' failed" in failed
    assert "the interval is empty" in empty


def test_each_prefix_is_looked_at_by_itself(caplog):
    training, validation = MetricsAggregator(), MetricsAggregator()
    with MetricsLogger([Sink()]) as logger:
        for step in range(3):
            training.record("loss", 1.0)
            logger.log(step, training, prefix="train")
            logger.log(step, validation, prefix="val")
    (warning,) = said(caplog)
    assert "prefix='val'" in warning


class Sink:
    def __init__(self):
        self.steps = []

    def write(self, record):
        self.steps.append(record.step)

    def flush(self): ...

    def close(self): ...

    def rewind(self, step): ...


# -- select= -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("select", "instead"),
    [
        ("loss", "*/loss"),
        ("train", "train*"),
        ("alpaca", "*alpaca*"),
        (["loss", "acc"], "*/loss"),
        ("*/LOSS", "train_alpaca/loss"),
    ],
)
def test_a_select_that_matches_no_whole_key_says_at_once_what_would(
    tmp_path, caplog, select, instead
):
    sink = JSONLSink(tmp_path / "run.jsonl", select=select)
    with MetricsLogger([sink]) as logger:
        for step in range(3):
            logger.log(step, {"train_alpaca/loss": 1.0})
    (warning,) = said(caplog)
    assert f"{sink!r} has nothing to write so far" in warning
    assert warning.endswith(f"write {instead!r}")
    assert list(tmp_path.iterdir()) == []


def test_a_select_that_is_far_from_every_key_says_so_after_a_while(tmp_path, caplog):
    sink = JSONLSink(tmp_path / "run.jsonl", select=["val*", "!*_count_*"])
    with MetricsLogger([sink]) as logger:
        for step in range(19):
            logger.log(step, {"train/loss": 1.0})
        logger.flush()
        assert said(caplog) == []
        for step in range(19, 50):
            logger.log(step, {"train/loss": 1.0})
    (warning,) = said(caplog)
    assert "select=['val*', '!*_count_*'] matches none of the keys of 20 records" in warning
    assert "'train/loss'" in warning


def test_a_select_that_has_matched_is_never_said_to_be_wrong(tmp_path, caplog):
    with MetricsLogger([JSONLSink(tmp_path / "run.jsonl", select="val*")]) as logger:
        logger.log(0, {"val/loss": 1.0})
        for step in range(50):
            logger.log(step, {"train/a_val": 1.0}, prefix="p")
    assert said(caplog) == []


@pytest.mark.parametrize(
    ("select", "kept"),
    [
        ("!*/len_stat_*", ["val/loss", "train/loss", "lr"]),
        (["*/loss", "!val*"], ["train/loss"]),
        (["!val*", "lr", "*"], ["lr", "train/len_stat_p50", "train/loss"]),
        (["!*"], []),
    ],
)
def test_a_glob_that_begins_with_an_exclamation_mark_leaves_out(tmp_path, select, kept):
    keys = ["train/len_stat_p50", "val/loss", "train/loss", "lr"]
    path = tmp_path / "run.jsonl"
    with MetricsLogger([JSONLSink(path, select=select)]) as logger:
        logger.log(1, dict.fromkeys(keys, 1.0))
    found = list(read_jsonl(path)[0].metrics) if path.exists() else []
    assert sorted(found) == sorted(kept)
    if "lr" in select:
        assert found[0] == "lr", "the order is that of the globs that select"


@pytest.mark.parametrize("select", ["", "!", [], ["*/loss", "!"]])
def test_a_glob_of_nothing_is_refused(select):
    with pytest.raises(ValueError, match="names no key"):
        ConsoleSink(select=select)


# -- Steps that go back --------------------------------------------------------------------------


def test_steps_that_go_back_are_said_once_and_written(tmp_path, caplog):
    sink = Sink()
    with MetricsLogger([sink, JSONLSink(tmp_path / "run.jsonl")]) as logger:
        for step in (10, 20, 15, 30, 25):
            logger.log(step, {"x": 1.0}, prefix="train")
    assert sink.steps == [10, 20, 15, 30, 25]
    assert [one.step for one in read_jsonl(tmp_path / "run.jsonl")] == sink.steps
    (warning,) = said(caplog)
    assert "step 15 is logged after step 20, with prefix='train'" in warning
    assert "logger.rewind(step)" in warning


def test_each_prefix_has_steps_of_its_own_and_a_rewind_takes_them_back(caplog):
    with MetricsLogger([Sink()]) as logger:
        for step in range(0, 30, 10):
            logger.log(step, {"x": 1.0}, prefix="train")
            logger.log(step // 10, {"x": 1.0}, prefix="val")
            logger.log(step, {"x": 1.0})
        logger.rewind(10)
        for step in (11, 12):
            logger.log(step, {"x": 1.0}, prefix="train")
            logger.log(step, {"x": 1.0})
    assert said(caplog) == []
