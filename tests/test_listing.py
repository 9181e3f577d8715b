"""What a shell shows of our objects: one useful line, and a list without internals."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest
from ranks import run_threads

from metricfold import (
    AggregationType,
    ConsoleSink,
    DefaultTrainingMetricTransform,
    JSONLSink,
    LogLinearHistogram,
    Metric,
    MetricBatch,
    MetricsAggregator,
    MetricsCollator,
    MetricsLogger,
)


def completed(thing: Any) -> set[str]:
    """Return what a notebook offers after ``thing.`` and a tab."""
    return {name for name in dir(thing) if not name.startswith("_")}


def batch(*names: str) -> MetricBatch:
    return MetricBatch.from_metrics([Metric("d", n, 1.0, AggregationType.MEAN) for n in names])


# -- Completion -------------------------------------------------------------------------------------


def test_a_shell_completes_public_names_of_an_aggregator() -> None:
    aggregator = MetricsAggregator()
    assert completed(aggregator) == {
        *("update", "record", "record_all", "timer", "drain", "pause", "mark", "rollback"),
        *("register_handler", "derive", "reduce", "reduce_async", "get_metrics_for_logging"),
        *("state_dict", "load_state_dict", "reset", "close", "name"),
        *("collectives", "schema_rounds", "alert_on"),
    }
    assert completed(aggregator.mark()) == {"name"}
    assert completed(aggregator.timer("data")) == {"over"}
    assert completed(aggregator.reduce()) == {
        *("as_dict", "value", "histogram", "histograms", "per_rank", "owner", "tied", "lacking"),
        *(
            "lacking_count",
            "timing",
            "world_size",
            "seconds",
            "run_seconds",
            "empty",
            "sink_failed",
        ),
        *("alerts", "names", "results", "nan_rank", "array", "arrays"),
        *("level", "suspects", "bad_cells"),
    }
    # What is left out is there all the same.
    assert aggregator.leave_parent_behind is not None


def test_a_shell_completes_public_names_of_what_comes_before_and_after() -> None:
    assert completed(MetricsLogger([])) == {"log", "alerts", "rewind", "flush", "close"}
    assert completed(MetricsCollator()) == {"collate_fn", "dataset_ids", "on_bad_name"}
    assert completed(batch("loss")) == {"from_metrics", "pin_memory", "to"}
    assert completed(DefaultTrainingMetricTransform()) == {"dataset_name", "set_dataset_name"}
    assert completed(JSONLSink("x")) >= {"write", "flush", "close", "rewind", "path"}
    assert not {"fingerprint", "settle"} & completed(LogLinearHistogram())


def test_a_shell_completes_public_names_of_accumulators() -> None:
    pytest.importorskip("torch")
    from metricfold.torch import DeviceAccumulator

    acc = DeviceAccumulator({"loss": "mean"})
    public = {"update", "update_all", "at", "token_loss", "learn", "mark", "rollback", "empty"}
    public |= {"device"}
    assert completed(acc) == public
    assert completed(acc.mark()) == set()
    assert "tensor(" not in repr(acc.mark())
    for other in (copy.deepcopy(acc), pickle.loads(pickle.dumps(acc))):
        assert completed(other) == public


def test_a_shell_completes_public_names_of_a_watch() -> None:
    torch = pytest.importorskip("torch")
    from metricfold.torch import ModelWatch

    watch = ModelWatch(torch.nn.Linear(2, 1), every=5)
    assert completed(watch) == {"grads", "due", "empty", "close"}
    assert repr(watch) == "ModelWatch(2 parameters, every=5)"


def test_a_shell_completes_public_names_of_accumulators_of_jax() -> None:
    pytest.importorskip("jax")
    from metricfold.jax import DeviceAccumulator

    acc = DeviceAccumulator({"loss": "mean"})
    public = {"update", "update_all", "watch_tree", "at", "merge", "reduce", "empty", "from_0_1"}
    assert completed(acc) == public


def test_a_shell_completes_public_names_of_callbacks() -> None:
    lightning = pytest.importorskip("lightning")
    from metricfold.integrations.lightning import MetricfoldCallback

    ours = completed(MetricfoldCallback()) - set(dir(lightning.Callback))
    assert ours == {
        *("aggregator", "eval_aggregator", "accumulators", "window", "rollup", "alerts"),
    }


# -- One line ---------------------------------------------------------------------------------------


def test_an_aggregator_says_its_name_ranks_and_keys() -> None:
    aggregator = MetricsAggregator(name="val")
    assert repr(aggregator) == "MetricsAggregator(name='val', keys=0, seconds=0)"
    aggregator.record("loss", 1.0)
    aggregator.record("norm", 1.0, "max")
    assert repr(aggregator).startswith("MetricsAggregator(name='val', keys=2, seconds=")
    aggregator.reduce()
    assert repr(aggregator).startswith(
        "MetricsAggregator(name='val', rank=0, world_size=1, keys=2, "
    )
    aggregator.close()
    assert repr(aggregator).endswith(", out of use)")


def on_rank(communicator: Any) -> list[str]:
    aggregator = MetricsAggregator(name="train", communicator=communicator)
    aggregator.record("loss", 1.0)
    return [repr(aggregator), repr(aggregator.reduce())]


def test_ranks_and_their_snapshots_say_who_they_are() -> None:
    (first, snapshot), (second, _) = run_threads(on_rank, 2)
    assert first.startswith(
        "MetricsAggregator(name='train', rank=0, world_size=2, keys=1, seconds="
    )
    assert second.startswith("MetricsAggregator(name='train', rank=1, world_size=2, ")
    assert snapshot.startswith("Snapshot(world_size=2, keys=1, seconds=")
    assert ", run_seconds=" in snapshot


def test_a_logger_names_its_sinks() -> None:
    logger = MetricsLogger([JSONLSink("run.jsonl"), ConsoleSink()])
    assert repr(logger).startswith("MetricsLogger([JSONLSink('")
    assert repr(logger).endswith("ConsoleSink()])")
    logger.close()
    assert repr(logger).endswith("], closed)")
    many = MetricsLogger([JSONLSink(f"{n}.jsonl") for n in range(9)])
    assert repr(many).endswith("3.jsonl'), ... 5 more])")


def pad(samples: list[Any]) -> list[Any]:
    return samples


def test_a_collator_names_what_it_wraps_and_a_batch_its_first_keys() -> None:
    assert repr(MetricsCollator()) == "MetricsCollator()"
    assert repr(MetricsCollator(pad)) == "MetricsCollator(pad)"
    wrapped = repr(MetricsCollator(MetricsCollator(pad)))
    assert wrapped == "MetricsCollator(MetricsCollator(pad))"
    assert repr(batch()) == "MetricBatch()"
    assert repr(batch("a", "b")) == "MetricBatch(d/a, d/b)"
    assert repr(batch(*"abcdefg")) == "MetricBatch(d/a, d/b, d/c, d/d, ... 3 more)"


def test_every_line_is_one_line() -> None:
    aggregator = MetricsAggregator()
    for number in range(200):
        aggregator.record(f"a rather long name of a metric {number}", 1.0)
    for thing in (aggregator, aggregator.reduce(), batch(*map(str, range(200))), MetricsLogger([])):
        assert "\n" not in repr(thing)
        assert len(repr(thing)) < 160


def test_a_notebook_shows_a_snapshot_as_a_table_in_which_names_are_text() -> None:
    aggregator = MetricsAggregator()
    aggregator.record("loss", 2.5, dataset="<script>alert(1)</script>")
    aggregator.record("loss", 3.5, dataset="docs")
    aggregator.record("lr", 3e-4)
    aggregator.update([Metric("docs", "len_stat_x", float(n), "distribution") for n in range(3)])
    html = aggregator.reduce()._repr_html_()
    assert "<script>" not in html
    head, *rows = re.findall(r"<tr>(.*?)</tr>", html)
    assert re.findall(r"<th>(.*?)</th>", head)[1:] == [
        "all",
        "&lt;script&gt;alert(1)&lt;/script&gt;",
        "docs",
    ]
    cells = {
        re.findall(r"<th .*?>(.*?)</th>", row)[0]: re.findall(r"<td>(.*?)</td>", row)
        for row in rows
    }
    assert cells["loss"] == ["3", "2.5", "3.5"]
    assert cells["lr"] == ["0.0003", "", ""]
    assert cells["len_stat_x p50"][2] == "1"
    empty = aggregator.reduce()._repr_html_()
    assert "2.5" not in empty, "of an interval without values there are totals alone"
