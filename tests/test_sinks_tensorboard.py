"""TensorBoard: event files that TensorBoard's own reader reads."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from metricfold import Alert, Metric, MetricsAggregator
from metricfold._core.sketch import Histogram
from metricfold.sinks import MetricsLogger, Record, TensorBoardSink


def read(logdir):
    accumulator = EventAccumulator(str(logdir), size_guidance={"scalars": 0, "histograms": 0})
    accumulator.Reload()
    return accumulator


def steps(logdir, tag="train/loss"):
    return [event.step for event in read(logdir).Scalars(tag)]


def write(logdir, *records):
    sink = TensorBoardSink(logdir)
    for record in records:
        sink.write(record)
    sink.close()


def losses(*steps, loss=1.0):
    return [Record(step, 100.0 + step, {"train/loss": loss}) for step in steps]


def test_scalars_arrive_with_step_and_time(tmp_path):
    write(
        tmp_path / "new" / "folder",
        Record(10, 1700000000.25, {"train/loss": 2.5, "train_a/tokens_seen": 16777216.0}),
        Record(20, 1700000001.5, {"train/loss": -1e-30}),
    )
    accumulator = read(tmp_path / "new" / "folder")
    assert sorted(accumulator.Tags()["scalars"]) == ["train/loss", "train_a/tokens_seen"]
    first, second = accumulator.Scalars("train/loss")
    assert (first.step, first.wall_time, first.value) == (10, 1700000000.25, 2.5)
    assert (second.step, second.wall_time) == (20, 1700000001.5)
    assert second.value == pytest.approx(-1e-30, rel=1e-7)
    assert accumulator.Scalars("train_a/tokens_seen")[0].value == 2**24


def test_what_is_not_finite_arrives(tmp_path):
    write(tmp_path, Record(1, 1.0, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1e300}))
    accumulator = read(tmp_path)
    assert math.isnan(accumulator.Scalars("a")[0].value)
    assert accumulator.Scalars("b")[0].value == math.inf
    assert accumulator.Scalars("c")[0].value == -math.inf
    assert accumulator.Scalars("d")[0].value == math.inf, "beyond what float32 holds"


def test_histograms_arrive_bucket_by_bucket(tmp_path):
    histogram = Histogram(
        edges=np.array([0.0, 1.0, 2.0, 4.0]),
        counts=np.array([3.0, 0.0, 1.5]),
        minimum=0.25,
        maximum=3.5,
        total=6.0,
        total_squares=20.0,
    )
    write(tmp_path, Record(5, 9.0, {}, {"train_a/seq_len": histogram}))
    (event,) = read(tmp_path).Histograms("train_a/seq_len")
    assert (event.step, event.wall_time) == (5, 9.0)
    value = event.histogram_value
    assert (value.min, value.max, value.num) == (0.25, 3.5, 4.5)
    assert (value.sum, value.sum_squares) == (6.0, 20.0)
    assert value.bucket_limit == [1.0, 2.0, 4.0]
    assert value.bucket == [3.0, 0.0, 1.5]


def test_a_histogram_of_many_buckets_keeps_all_counts(tmp_path):
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 5, 5000).astype(float)
    edges = np.linspace(-7.0, 9.0, 5001)
    write(tmp_path, Record(1, 1.0, {}, {"h": Histogram(edges, counts, -7.0, 9.0, 1.0, 2.0)}))
    value = read(tmp_path).Histograms("h")[0].histogram_value
    assert len(value.bucket) <= 512
    assert value.num == counts.sum()
    # Every edge that is left has exactly the counts below it that it had before.
    below = np.concatenate(([0.0], np.cumsum(counts)))
    kept = np.searchsorted(edges, value.bucket_limit)
    np.testing.assert_array_equal(np.cumsum(value.bucket), below[kept])


def test_an_empty_histogram_is_left_out(tmp_path):
    empty = Histogram(np.array([0.0, 1.0]), np.array([0.0]), math.nan, math.nan, 0.0, 0.0)
    write(tmp_path, Record(1, 1.0, {"a": 1.0}, {"h": empty}))
    assert read(tmp_path).Tags()["histograms"] == []


def test_a_record_can_be_read_as_soon_as_it_is_written(tmp_path):
    sink = TensorBoardSink(tmp_path)
    for step in range(3):
        sink.write(*losses(step))
        assert steps(tmp_path) == list(range(step + 1))
    sink.close()


def test_rewind_drops_the_steps_after_the_checkpoint(tmp_path):
    write(tmp_path, *losses(10, 20, 30, 40))
    sink = TensorBoardSink(tmp_path)
    sink.rewind(20)
    for record in losses(30, 40, 50, loss=9.0):
        sink.write(record)
    sink.close()
    events = read(tmp_path).Scalars("train/loss")
    assert [event.step for event in events] == [10, 20, 30, 40, 50]
    assert [event.value for event in events] == [1.0, 1.0, 9.0, 9.0, 9.0]


def test_rewinds_within_a_second_and_within_a_run_are_read_in_order(tmp_path):
    sink = TensorBoardSink(tmp_path)
    sink.write(*losses(1))
    for attempt in range(12):
        for record in losses(2, 3, loss=float(attempt)):
            sink.write(record)
        sink.rewind(1)
    sink.close()
    assert steps(tmp_path) == [1]
    assert read(tmp_path).Scalars("train/loss")[0].value == 1.0
    assert len(list(tmp_path.iterdir())) == 13


def test_rewind_comes_after_files_of_a_clock_that_is_ahead(tmp_path):
    write(tmp_path, *losses(1, 2))
    (old,) = tmp_path.iterdir()
    old.rename(tmp_path / "events.out.tfevents.4000000000.other-host.1.0")
    sink = TensorBoardSink(tmp_path)
    sink.rewind(1)
    sink.close()
    assert steps(tmp_path) == [1]


def test_rewind_makes_no_file(tmp_path):
    sink = TensorBoardSink(tmp_path / "runs")
    sink.rewind(5)
    sink.close()
    assert list(tmp_path.iterdir()) == []


def test_a_relative_folder_is_meant_from_where_the_sink_was_made(tmp_path, monkeypatch):
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    sink = TensorBoardSink("runs")
    monkeypatch.chdir(tmp_path / "other")
    for record in losses(1, 2):
        sink.write(record)
    sink.rewind(1)
    sink.close()
    assert steps(tmp_path / "runs") == [1]
    assert list((tmp_path / "other").iterdir()) == []


def test_a_file_that_is_gone_is_begun_anew(tmp_path, caplog):
    sink = TensorBoardSink(tmp_path)
    (first,) = losses(1)
    sink.write(first)
    (path,) = tmp_path.iterdir()
    path.unlink()
    for record in losses(2, 3):
        sink.write(record)
    sink.close()
    assert steps(tmp_path) == [2, 3]
    (warning,) = [one.getMessage() for one in caplog.records if one.name == "metricfold"]
    assert "has been moved or removed" in warning


def test_a_step_that_tensorboard_cannot_hold_costs_one_record(tmp_path, caplog):
    """Before, it cost all that came after it."""
    with MetricsLogger([TensorBoardSink(tmp_path)]) as logger:
        for step in (1, 2**63, 3):
            logger.log(step, {"train/loss": 1.0})
    assert steps(tmp_path) == [1, 3]
    assert "2 written, 1 skipped, 0 lost" in caplog.records[-1].getMessage()


def test_a_url_is_refused(tmp_path):
    with pytest.raises(ValueError, match="gs://bucket/run"):
        TensorBoardSink("gs://bucket/run")


def test_writing_needs_no_tensorflow_and_prints_nothing(tmp_path):
    code = f"""
import sys
from metricfold.sinks import Record, TensorBoardSink
sink = TensorBoardSink({str(tmp_path)!r})
sink.write(Record(1, 1.0, {{"a": 1.0}}))
sink.close()
assert not {{"tensorflow", "torch"}} & set(sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert steps(tmp_path, "a") == [1]


def test_alerts_are_texts_beside_the_scalars(tmp_path):
    found = [Alert("loss is nan, on rank 1", "severe").to_json(), Alert("slow").to_json()]
    write(
        tmp_path,
        Record(3, 1.0, {"train/loss": 2.0}, prefix="train", alerts=found),
        Record(4, 1.0, {}, alerts=found[1:]),
    )
    accumulator = read(tmp_path)
    assert sorted(accumulator.PluginTagToContent("text")) == ["alerts", "alerts/train"]
    (event,) = accumulator.Tensors("alerts/train")
    assert event.step == 3
    assert list(event.tensor_proto.string_val) == [
        b"**severe**: loss is nan, on rank 1",
        b"**warning**: slow",
    ]
    assert [event.step for event in accumulator.Tensors("alerts")] == [4]
    assert steps(tmp_path) == [3]


def served(logdir):
    """Return what TensorBoard's own plugins say of a folder, and whether TensorFlow was needed."""
    code = """
import json, sys
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins import base_plugin
from tensorboard.plugins.custom_scalar.custom_scalars_plugin import CustomScalarsPlugin
from tensorboard.plugins.hparams.backend_context import Context
multiplexer = EventMultiplexer().AddRunsFromDirectory(sys.argv[1])
multiplexer.Reload()
provider = MultiplexerDataProvider(multiplexer, sys.argv[1])
context = base_plugin.TBContext(data_provider=provider, multiplexer=multiplexer, logdir=sys.argv[1])
layout = CustomScalarsPlugin(context).layout_impl(RequestContext(), "")
hparams = Context(context)
run = hparams.hparams_metadata(RequestContext(), "")
experiment = hparams.experiment_from_metadata(RequestContext(), "", True, run, hparams.hparams_from_data_provider(RequestContext(), "", None))
print(json.dumps([json.loads(layout), [one.name for one in experiment.hparam_infos], [one.name.tag for one in experiment.metric_infos], "tensorflow" in sys.modules]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(logdir)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_losses_of_all_datasets_are_in_one_chart_and_settings_are_shown(tmp_path):
    aggregator = MetricsAggregator()
    config = {"lr": 1e-3, "optimizer": {"name": "adam", "fused": True}}
    with MetricsLogger([TensorBoardSink(tmp_path)], config=config, name="first") as logger:
        for step, datasets in enumerate((("web", "a|b"), ("web", "a|b", "late"))):
            for dataset in datasets:
                aggregator.record("tokens", 5, "sum", dataset=dataset)
                aggregator.record("loss", 2.0, dataset=dataset)
                aggregator.update([Metric(dataset, "len", 3.0, "distribution")])
            logger.log(step, aggregator, prefix="train")
    layout, hparams, judged, tensorflow = served(tmp_path)
    assert not tensorflow
    (category,) = layout["category"]
    assert category["title"] == "train"
    first, second, *bands = category["chart"]
    assert (first["title"], second["title"]) == ("loss of every dataset", "tokens of every dataset")
    names = ["train_a|b/loss", "train_web/loss", "train/loss", "train_late/loss"]
    assert sorted(first["multiline"]["tag"]) == sorted(f"^{re.escape(name)}$" for name in names)
    assert {one["title"] for one in bands} >= {"len of late: p05, p50, p95"}
    assert bands[0]["margin"]["series"][0]["value"].endswith("/len_stat_p50")
    assert sorted(hparams) == ["lr", "optimizer.fused", "optimizer.name"]
    assert judged == ["train/loss"]
    tags = read(tmp_path).Tags()["tensors"]
    assert {"run", "_hparams_/session_end_info"} <= {*tags}
    (said,) = read(tmp_path).Tensors("run")
    assert b"| optimizer.name | adam |" in said.tensor_proto.string_val[0]


def test_the_layout_is_written_again_after_a_rewind(tmp_path):
    aggregator = MetricsAggregator()
    with MetricsLogger([TensorBoardSink(tmp_path)]) as logger:
        for step in (1, 2):
            for dataset in ("web", "code"):
                aggregator.record("loss", 2.0, dataset=dataset)
            if step == 2:
                logger.rewind(0)
            logger.log(step, aggregator, prefix="train")
    assert read(tmp_path).Tensors("custom_scalars__config__")[-1].step == 2
