"""`select=` and `key_format=`, which every backend takes."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from metricfold._core.sketch import Histogram
from metricfold.sinks import (
    ConsoleSink,
    JSONLSink,
    Record,
    SelectiveSink,
    Sink,
    TensorBoardSink,
    WandbSink,
)

HISTOGRAM = Histogram(np.array([0.0, 1.0]), np.array([2.0]), 0.25, 0.5, 0.75, 0.3125)


class Collecting(SelectiveSink):
    def __init__(self, **choice):
        super().__init__(**choice)
        self.records = []

    def _write(self, record):
        self.records.append(record)

    def flush(self):
        pass

    def close(self):
        pass

    def rewind(self, step):
        pass


def written(metrics, histograms=(), **choice):
    sink = Collecting(**choice)
    sink.write(Record(7, 1.5, metrics, dict.fromkeys(histograms, HISTOGRAM)))
    return sink.records


def test_everything_is_selected_by_default():
    metrics = {"train/loss": 1.0, "lr": 0.5}
    assert written(metrics, ["train/len"]) == [Record(7, 1.5, metrics, {"train/len": HISTOGRAM})]


@pytest.mark.parametrize(
    ("select", "names"),
    [
        ("*/loss", ["train_a/loss", "val_a/loss"]),
        ("train_*", ["train_a/loss", "train_a/len"]),
        (["val_*", "lr"], ["val_a/loss", "lr"]),
        ("*/LOSS", []),
        ("train_[!b]/l*s", ["train_a/loss"]),
    ],
)
def test_select_takes_a_glob_or_several(select, names):
    metrics = {"train_a/loss": 1.0, "train_a/len": 2.0, "val_a/loss": 3.0, "lr": 4.0}
    records = written(metrics, select=select)
    assert [name for record in records for name in record.metrics] == names


def test_select_chooses_histograms_too():
    (record,) = written({"a/loss": 1.0}, ["a/len", "b/len"], select=["b/*", "*/loss"])
    assert list(record.histograms) == ["b/len"]


def test_select_chooses_arrays_too_and_alerts_go_to_every_sink():
    sink = Collecting(select="b/*", key_format="run7/{key}")
    axes = {"axes": [["layer", 1]]}
    arrays = {"a/load": {**axes, "values": [1.0]}, "b/load": {**axes, "values": [2.0]}}
    alerts = [{"rule": "Spike"}]
    sink.write(Record(7, 1.5, {}, arrays=arrays))
    sink.write(Record(8, 1.5, {"a/loss": 1.0}, alerts=alerts, run={"world_size": 2}))
    assert sink.records == [
        Record(7, 1.5, {}, arrays={"run7/b/load": {**axes, "values": [2.0]}}),
        Record(8, 1.5, {}, alerts=alerts, run={"world_size": 2}),
    ]


def test_a_record_of_which_nothing_is_selected_is_not_written():
    assert written({"a/loss": 1.0}, ["a/len"], select="b/*") == []


@pytest.mark.parametrize("key_format", ["run7/{key}", lambda key: "run7/" + key])
def test_key_format_renames_metrics_and_histograms(key_format):
    (record,) = written({"a/loss": 1.0}, ["a/len"], key_format=key_format)
    assert record.metrics == {"run7/a/loss": 1.0}
    assert list(record.histograms) == ["run7/a/len"]


def test_select_speaks_of_keys_before_they_are_renamed():
    (record,) = written({"a/loss": 1.0, "b/loss": 2.0}, select="a/*", key_format="b/{key}")
    assert record.metrics == {"b/a/loss": 1.0}


def test_two_keys_under_one_name_are_refused_by_name():
    with pytest.raises(ValueError, match=r"'loss' of each of \['a/loss', 'b/loss'\]"):
        written({"a/loss": 1.0, "b/loss": 2.0}, key_format=lambda key: key.split("/")[1])


@pytest.mark.parametrize("key_format", ["constant", "{}", "{name}", "{key", "{key.x}"])
def test_a_key_format_that_is_no_format_of_the_key_is_refused(key_format):
    with pytest.raises(ValueError, match="key_format="):
        Collecting(key_format=key_format)


def test_a_key_function_that_returns_no_string_is_refused():
    with pytest.raises(TypeError, match="of 'a' must be a string, but is None"):
        written({"a": 1.0}, key_format=lambda key: None)


@pytest.mark.parametrize("select", ["", [], ["a", ""], [3]])
def test_a_select_that_names_no_key_is_refused(select):
    with pytest.raises(ValueError, match="names no key"):
        Collecting(select=select)


@pytest.mark.parametrize(
    "make",
    [
        lambda path, **choice: ConsoleSink(**choice),
        lambda path, **choice: JSONLSink(path / "x.jsonl", **choice),
        lambda path, **choice: TensorBoardSink(path, **choice),
        lambda path, **choice: WandbSink(**choice),
    ],
    ids=["console", "jsonl", "tensorboard", "wandb"],
)
def test_every_backend_is_a_sink_and_takes_the_choices(make, tmp_path):
    sink = make(tmp_path, select="*/loss", key_format="x/{key}")
    assert isinstance(sink, Sink)
    assert isinstance(sink, SelectiveSink)
    sink.close()
    assert list(tmp_path.iterdir()) == [], "a sink that nothing was written to makes no file"


def test_no_backend_is_imported_before_it_is_used(tmp_path):
    code = f"""
import sys
from metricfold.sinks import ConsoleSink, JSONLSink, TensorBoardSink, WandbSink
sinks = [ConsoleSink(), JSONLSink({str(tmp_path / "x")!r}), TensorBoardSink("x"), WandbSink()]
print(sorted({{"rich", "tensorboard", "wandb", "torch", "jax"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("package", "extra", "make"),
    [
        ("rich", "console", ConsoleSink),
        ("tensorboard", "tensorboard", lambda: TensorBoardSink("x")),
        ("wandb", "wandb", WandbSink),
    ],
)
def test_a_missing_package_is_named_with_what_to_install(package, extra, make, monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=rf"pip install 'metricfold\[{extra}\]"):
        make()


def test_keys_come_in_the_order_of_the_patterns_that_select_them():
    metrics = {"t/accuracy": 1.0, "t/perplexity": 2.0, "t/loss": 3.0, "t_a/loss": 4.0}
    (record,) = written(metrics, select=["*/loss", "*/perplexity", "*"])
    assert list(record.metrics) == ["t/loss", "t_a/loss", "t/perplexity", "t/accuracy"]
