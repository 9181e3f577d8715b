"""What a run file says of its run and of its keys: once for each process, whatever is cut or lost."""

from __future__ import annotations

import argparse
import enum
import json
import logging
import math
from collections import OrderedDict
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import metricfold
from metricfold import JSONLSink, MetricsAggregator, MetricsLogger, read_jsonl
from metricfold.look import Key, read
from metricfold.sinks import Record, SelectiveSink
from metricfold.sinks.config import config_as_json


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def run_of(path):
    return [line["step"] for line in lines(path) if "run" in line]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.jsonl"


def test_the_first_record_says_what_is_known_of_the_run(path):
    config = {"lr": 3e-4, "clip": math.inf}
    made = MetricsLogger(
        [JSONLSink(path)], config=config, name="first", total_steps=50, better={"acc": "higher"}
    )
    config["lr"] = 1.0  # it is as it was
    with made as logger:
        logger.log(1, {"loss": 1.0}, prefix="train")
        logger.log(2, {"loss": 1.0}, prefix="train")
    assert run_of(path) == [1]
    said = lines(path)[0]["run"]
    assert said["metricfold"] == metricfold.__version__
    assert said["numpy"] == np.__version__
    assert {name: said[name] for name in ("world_size", "name", "total_steps", "better")} == {
        "world_size": 1,
        "name": "first",
        "total_steps": 50,
        "better": {"acc": "higher"},
    }
    assert said["config"] == {"lr": 3e-4, "clip": "Infinity"}
    run = read(path)
    assert (run.label, run.header["step"]) == ("first", 1)
    assert run.better(Key("train", "", "acc")) == "higher"
    assert run.better(Key("train", "", "z_loss")) == "lower"
    assert run.better(Key("train", "", "lossless")) is None


def test_each_process_says_it_and_again_what_rewind_has_cut(path):
    for name, first in (("a", 1), ("b", 4)):
        with MetricsLogger([JSONLSink(path)], name=name) as logger:
            for step in range(first, first + 3):
                logger.log(step, {"loss": 1.0})
    assert run_of(path) == [1, 4]
    assert [one["name"] for one in read(path).headers] == ["a", "b"]
    with MetricsLogger([JSONLSink(path)], name="c") as logger:
        logger.rewind(5)
        logger.log(6, {"loss": 1.0})
        logger.log(7, {"loss": 1.0})
        logger.rewind(4)
        logger.log(5, {"loss": 1.0})
    assert [(one["name"], one["step"]) for one in read(path).headers] == [
        ("a", 1),
        ("b", 4),
        ("c", 5),
    ]


def test_a_new_file_is_told_again(path):
    with MetricsLogger([JSONLSink(path)], name="a") as logger:
        aggregator = MetricsAggregator()
        for step in (1, 2):
            aggregator.record("loss", 1.0, dataset="web")
            logger.log(step, aggregator, prefix="train")
            logger.flush()
            if step == 1:
                path.unlink()
    assert [one["step"] for one in lines(path)] == [2] == run_of(path)
    assert lines(path)[0]["keys"]["train_web/loss"] == ["web", "loss", "", "mean"]


def test_a_sink_that_does_not_take_the_first_record_says_it_with_the_first_that_it_takes(path):
    with MetricsLogger([JSONLSink(path, select="val/*")], name="a") as logger:
        for step in (1, 2, 3):
            logger.log(step, {"loss": 1.0}, prefix="train" if step < 2 else "val")
    assert run_of(path) == [2]


def test_a_disk_that_is_away_for_a_record_costs_neither(path, monkeypatch):
    failing = [OSError(5, "away")] * 2
    write = SelectiveSink.write

    def flaky(self, record):
        if failing:
            raise failing.pop()
        write(self, record)

    monkeypatch.setattr(JSONLSink, "write", flaky)
    with MetricsLogger([JSONLSink(path)], name="a") as logger:
        logger.log(1, {"loss": 1.0})
    assert run_of(path) == [1]


def test_a_sink_of_ones_own_is_told_of_the_run_and_of_keys():
    seen = []

    class Mine:
        def write(self, record):
            seen.append(record)

        def flush(self): ...
        def close(self): ...
        def rewind(self, step): ...

    aggregator = MetricsAggregator()
    with MetricsLogger([Mine()], name="a") as logger:
        for step in (1, 2):
            aggregator.record("loss", 1.0, dataset="web")
            logger.log(step, aggregator, prefix="train", extra={"train/lr": 0.1})
    assert [one.run and one.run["name"] for one in seen] == ["a", None]
    assert seen[1].keys["train_web/loss"] == ("web", "loss", "", "mean")
    assert "train/lr" not in seen[1].keys


# -- What keys stand for ---------------------------------------------------------------------------


def test_dataset_name_and_statistic_are_told_apart_whatever_they_are_called(path):
    aggregator = MetricsAggregator(by={"tokens": "layer"})
    aggregator.derive("a/ratio_stat_p50", lambda of: of["loss"] * 2)
    with MetricsLogger([JSONLSink(path)]) as logger:
        for dataset in ("my_docs", "code/py_x", "code/rust", "a_b/c_stat_d"):
            aggregator.record("loss", 1.0, dataset=dataset)
            aggregator.record("x_stat_y", 1.0, "max", dataset=dataset)
            aggregator.record("len/of_it", 1.0, "distribution", dataset=dataset)
            aggregator.record("kind", "p50_count_1", "categorical_count", dataset=dataset)
        aggregator.record("tokens", np.ones((2, 3)), "sum", axes={"layer": 2, "expert": 3})
        aggregator.record("alone_count", 1.0)
        logger.log(1, aggregator, prefix="train_it", rollup="levels", extra={"train_it/lr": 0.1})
    run = read(path)
    found = {(key[1:], run.columns[key].aggregation) for key in run.columns}
    datasets = ("my_docs", "code/py_x", "code/rust", "a_b/c_stat_d", "code", "a_b", "")
    for dataset in datasets:
        assert ((dataset, "loss", ""), "mean") in found
        assert ((dataset, "x_stat_y", ""), "max") in found
        assert ((dataset, "len/of_it", "p50"), "distribution") in found
        assert ((dataset, "kind", "p50_count_1"), "categorical_count") in found
        assert ((dataset, "a/ratio_stat_p50", ""), "derived") in found
    assert (("", "tokens", ""), "sum") in found
    assert (("", "tokens/layer_1", ""), "sum") in found
    assert (("", "alone_count", ""), "mean") in found
    assert (("", "lr", ""), None) in found
    assert {key.prefix for key in run.columns} == {"train_it"}
    assert {key.dataset for key in run.columns} == set(datasets)
    assert Key("train_it", "code/py_x", "len/of_it") in run.histograms
    assert Key("train_it", "", "tokens") in run.arrays


def test_each_key_is_explained_once_and_again_after_a_restart(path):
    for start in (1, 11):
        aggregator = MetricsAggregator()
        with MetricsLogger([JSONLSink(path)]) as logger:
            for step in range(start, start + 4):
                aggregator.record("loss", 1.0, dataset="web")
                if step % 2 == 0:
                    aggregator.record("late", 1.0, dataset="web")
                logger.log(step, aggregator, prefix="train")
    explained = {line["step"]: sorted(line["keys"]) for line in lines(path) if "keys" in line}
    assert explained == {
        1: ["train/loss", "train_web/loss"],
        2: ["train/late", "train_web/late"],
        11: ["train/loss", "train_web/loss"],
        12: ["train/late", "train_web/late"],
    }
    assert all(one.keys["train_web/loss"].dataset == "web" for one in read_jsonl(path))


def test_keys_mean_what_they_mean_under_the_name_that_a_sink_gives_them(path):
    aggregator = MetricsAggregator()
    with MetricsLogger([JSONLSink(path, key_format="run7/{key}")]) as logger:
        aggregator.record("loss", 1.0, dataset="web")
        logger.log(1, aggregator, prefix="train")
    column = read(path).columns[Key("train", "web", "loss")]
    assert column.printed == "run7/train_web/loss"


def test_keys_of_older_files_are_read_as_they_are_made(path):
    """Before 0.2 a record said its prefix, and nothing of its keys."""
    metrics = [
        "train_web/loss",
        "train_my_docs/a/b",
        "train/lr",
        "train_it",
        "trainer/x",
        "train_/x",
    ]
    record = Record(1, 2.0, dict.fromkeys(metrics, 1.0), prefix="train")
    bare = Record(2, 3.0, dict.fromkeys(["eval/acc", "loss", "/x"], 1.0))
    sink = JSONLSink(path)
    sink.write(record)
    sink.write(bare)
    sink.close()
    assert [*read(path).columns] == [
        Key("train", "web", "loss"),
        Key("train", "my_docs", "a/b"),
        Key("train", "", "lr"),
        Key("train", "", "train_it"),
        Key("train", "", "trainer/x"),
        Key("train", "", "train_/x"),
        Key("eval", "", "acc"),
        Key("", "", "loss"),
        Key("", "", "/x"),
    ]


def test_a_key_that_comes_to_mean_something_else_is_another_column_from_then_on(path):
    sink = JSONLSink(path)
    for step, said in ((1, ("a_b", "x")), (2, ("a_b", "x")), (3, ("a", "b/x"))):
        keys = {"t_a_b/x": metricfold.sinks.Meaning(*said, "", "mean")}
        if step == 3:
            sink = JSONLSink(path)
        sink.write(Record(step, 2.0, {"t_a_b/x": 1.0}, prefix="t", keys=keys))
        if step > 1:
            sink.close()
    columns = read(path).columns
    assert [(key.dataset, key.name, len(columns[key])) for key in columns] == [
        ("a_b", "x", 2),
        ("a", "b/x", 1),
    ]


# -- Configurations --------------------------------------------------------------------------------


class Mode(enum.Enum):
    FAST = "fast"


@dataclass
class Optimiser:
    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)


@dataclass
class Settings:
    optimiser: Optimiser = field(default_factory=Optimiser)
    mode: Mode = Mode.FAST


class WithDict:
    def to_dict(self):
        return {"hidden": 8}


def function():
    """Something that a configuration may name."""


@pytest.mark.parametrize(
    ("config", "written"),
    [
        ({}, {}),
        (OrderedDict(a={1: None, "b": {3, 1, 2}}), {"a": {"1": None, "b": [1, 2, 3]}}),
        (Settings(), {"optimiser": {"lr": 3e-4, "betas": [0.9, 0.95]}, "mode": "fast"}),
        (argparse.Namespace(lr=0.1, out=Path("a/b")), {"lr": 0.1, "out": "a/b"}),
        (WithDict(), {"hidden": 8}),
        ({"x": math.nan, "y": -math.inf}, {"x": "NaN", "y": "-Infinity"}),
        ({"n": np.int64(3), "f": np.float32(0.5)}, {"n": 3, "f": 0.5}),
        ({"w": np.zeros((2, 3))}, {"w": "ndarray of shape (2, 3)"}),
        ({"c": Mode, "f": function}, {"c": f"{__name__}.Mode", "f": f"{__name__}.function"}),
        ({"o": object()}, {"o": "<object object>"}),
        ({"b": b"secret"}, {"b": "6 bytes"}),
        ({"t": "\udcff\n"}, {"t": "\\udcff\n"}),
    ],
)
def test_a_configuration_may_be_what_programs_have(path, config, written):
    with MetricsLogger([JSONLSink(path)], config=config) as logger:
        logger.log(1, {"loss": 1.0})
    assert read(path).header["config"] == written


@pytest.mark.parametrize("config", [3, "lr=1", [("lr", 1)], Settings])
def test_what_is_no_configuration_is_refused(config):
    with pytest.raises(TypeError, match="is no configuration: give a dict"):
        MetricsLogger([], config=config)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"total_steps": 0}, "total_steps is 0"),
        ({"name": ""}, "name= is empty"),
        ({"better": {"acc": "up"}}, "use 'higher' or 'lower'"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        MetricsLogger([], **arguments)


def test_a_configuration_that_is_too_large_is_bounded_and_that_is_said(path, caplog):
    data = {"lr": 0.1, "rows": list(range(100_000)), "text": "x" * 10_000, "after": 1}
    with caplog.at_level(logging.WARNING), MetricsLogger([JSONLSink(path)], config=data) as logger:
        logger.log(1, {"loss": 1.0})
    assert path.stat().st_size < 100_000
    header = read(path).header
    assert header["config"]["lr"] == 0.1
    assert header["config_left_out"] > 80_000
    assert "entries are left out" in caplog.text
    found, left_out = config_as_json({"text": "x" * 10_000})
    assert found["text"].endswith("… (10000 characters)")
    assert left_out == 0


def test_a_configuration_that_holds_itself_ends():
    config = {"lr": 1}
    config["self"] = config
    found, _ = config_as_json(config)
    assert found["self"]["self"]["lr"] == 1


@pytest.mark.skipif(find_spec("omegaconf") is None, reason="needs omegaconf")
def test_a_configuration_of_omegaconf_is_resolved_and_what_is_missing_in_it_is_named():
    from omegaconf import OmegaConf

    config = OmegaConf.create({"lr": 0.1, "twice": "${lr}", "must": "???", "list": [1, 2]})
    found, _ = config_as_json(config)
    assert found == {"lr": 0.1, "twice": 0.1, "must": "(MissingMandatoryValue)", "list": [1, 2]}
