"""MetricsLogger in one process: what is logged, and what a sink cannot do to the training."""

from __future__ import annotations

import logging
import math
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import Future
from fractions import Fraction

import numpy as np
import pytest

import metricfold
from metricfold import MetricsAggregator
from metricfold._core.sketch import Histogram
from metricfold.sinks import (
    JSONLSink,
    MetricsLogger,
    Record,
    SelectiveSink,
    Sink,
    read_jsonl,
    worker,
)

WAIT = 30  # seconds that nothing here should take


class Memory:
    """A user's own sink: just the four methods."""

    def __init__(self):
        self.records = []
        self.calls = []
        self.threads = set()

    def __repr__(self):
        return "Memory()"

    def write(self, record):
        self.records.append(record)
        self._called("write")

    def flush(self):
        self._called("flush")

    def close(self):
        self._called("close")

    def rewind(self, step):
        self.records = [record for record in self.records if record.step <= step]
        self._called("rewind")

    def _called(self, what):
        self.calls.append(what)
        self.threads.add(threading.current_thread())


class Failing(Memory):
    """Raises in `method`, the first `times` times that it is called."""

    def __init__(self, method, times=math.inf):
        super().__init__()
        self.method, self.left, self.attempts = method, times, 0

    def __repr__(self):
        return "Failing()"

    def _called(self, what):
        if what == self.method:
            self.attempts += 1
            if self.left > 0:
                self.left -= 1
                if what == "write":
                    self.records.pop()
                raise OSError(28, "No space left on device")
        super()._called(what)


class Gated(Memory):
    """Writes only once its gate is open."""

    def __init__(self):
        super().__init__()
        self.gate = threading.Event()
        self.entered = threading.Event()

    def write(self, record):
        self.entered.set()
        assert self.gate.wait(WAIT)
        super().write(record)


class Source:
    """Stands for an aggregator whose reductions end when the test says so."""

    def __init__(self):
        self.futures = []
        self.steps = []

    def reduce_async(self, step=None):
        self.steps.append(step)
        self.futures.append(Future())
        return self.futures[-1]


class Result:
    """What a reduction of `Source` gives."""

    def __init__(self, **metrics):
        self.metrics = metrics

    def as_dict(self, prefix, window, *, rollup):
        assert rollup
        return {f"{prefix}/{name}": value for name, value in self.metrics.items()}

    def histograms(self, prefix, window):
        return {}


def aggregator_with_data():
    aggregator = MetricsAggregator()
    for dataset, values in (("a", [1.0, 2.0, 3.0]), ("b", [5.0])):
        for value in values:
            aggregator.record("loss", value, dataset=dataset)
            aggregator.record("seen", 1, "sum", dataset=dataset)
            aggregator.record("len", value, "distribution", dataset=dataset)
    return aggregator


def said(caplog, level):
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "metricfold" and record.levelno == level
    ]


def warnings_in(caplog):
    return said(caplog, logging.WARNING)


def errors_in(caplog):
    return said(caplog, logging.ERROR)


# -- What is logged ------------------------------------------------------------------------------


def test_an_aggregator_is_logged_with_rollup_and_histograms():
    sink = Memory()
    before = time.time()
    with MetricsLogger([sink]) as logger:
        logger.log(50, aggregator_with_data(), prefix="train", extra={"lr": 0.5})
    (record,) = sink.records
    assert record.step == 50
    assert before <= record.wall_time <= time.time()
    assert record.metrics["train_a/loss"] == 2.0
    assert record.metrics["train_b/seen"] == 1.0
    assert record.metrics["train/loss"] == 11 / 4
    assert record.metrics["train_a/len_stat_p50"] == 2.0
    assert record.metrics["lr"] == 0.5
    assert record.prefix == "train"
    assert record.histograms["train_a/len"].counts.sum() == 3
    assert all(type(value) is float for value in record.metrics.values())


def test_the_window_is_auto_unless_chosen():
    aggregator = aggregator_with_data()
    sink = Memory()
    with MetricsLogger([sink]) as logger:
        for step, choice in enumerate(({}, {"window": "run"}, {"window": {"seen": "interval"}})):
            aggregator.record("loss", 9.0, dataset="a")
            aggregator.record("seen", 1, "sum", dataset="a")
            logger.log(step, aggregator, prefix="t", **choice)
    seen = [record.metrics["t_a/seen"] for record in sink.records]
    losses = [record.metrics["t_a/loss"] for record in sink.records]
    assert seen == [4.0, 5.0, 1.0], "totals over the run by default"
    assert losses == [15 / 4, 24 / 5, 9.0], "means over the interval by default"


def test_logging_closes_the_interval_and_gives_the_reduction_its_step():
    aggregator = aggregator_with_data()
    source = Source()
    with MetricsLogger([]) as logger:
        logger.log(1, aggregator, prefix="t")
        logger.log(np.int64(7), source, prefix="t")
        source.futures[0].set_result(Result())
    assert source.steps == [7]
    aggregator.record("loss", 7.0, dataset="a")
    assert aggregator.reduce().as_dict("t", "interval")["t_a/loss"] == 7.0


def test_a_snapshot_is_logged():
    snapshot = aggregator_with_data().reduce()
    sink = Memory()
    with MetricsLogger([sink]) as logger:
        logger.log(5, snapshot, prefix="val", window="run")
    (record,) = sink.records
    assert record.metrics == snapshot.as_dict("val", "run", rollup=True)
    assert record.histograms.keys() == {"val_a/len", "val_b/len", *record.histograms}


def test_a_dict_is_copied_and_its_keys_are_used_as_they_are_or_with_a_prefix():
    sink = Gated()
    values = {"loss": 1.5, "a/b": np.float32(0.5), "n": 3, "yes": True, "half": Fraction(1, 2)}
    with MetricsLogger([sink]) as logger:
        logger.log(1, values)
        logger.log(2, values, prefix="val", extra={"lr": 0.1})
        values["loss"] = -1.0
        sink.gate.set()
    first, second = sink.records
    assert first.metrics == {"loss": 1.5, "a/b": 0.5, "n": 3.0, "yes": 1.0, "half": 0.5}
    assert all(type(value) is float for value in first.metrics.values())
    assert second.metrics == {
        "val/loss": 1.5,
        "val/a/b": 0.5,
        "val/n": 3.0,
        "val/yes": 1.0,
        "val/half": 0.5,
        "lr": 0.1,
    }


def test_records_keep_their_order_although_a_reduction_takes_longer():
    sink, source = Memory(), Source()
    with MetricsLogger([sink]) as logger:
        logger.log(1, source, prefix="t")
        logger.log(2, {"x": 1.0})
        source.futures[0].set_result(Result(x=1.0))
    assert [record.step for record in sink.records] == [1, 2]


def test_an_aggregator_of_the_users_own_making_need_not_know_of_axes():
    sink, source = Memory(), Source()
    with MetricsLogger([sink]) as logger:
        logger.log(1, source, prefix="p", by="layer")
        source.futures[0].set_result(Result(x=1.0))
    assert [(record.metrics, record.arrays) for record in sink.records] == [({"p/x": 1.0}, {})]


def test_an_extra_that_a_metric_has_already_is_left_out_with_one_warning(caplog):
    sink = Memory()
    with MetricsLogger([sink]) as logger:
        for step in range(3):
            logger.log(step, {"loss": 1.0}, extra={"loss": 2.0, "lr": 3.0})
    assert [record.metrics for record in sink.records] == [{"loss": 1.0, "lr": 3.0}] * 3
    (warning,) = warnings_in(caplog)
    assert "'loss'" in warning


def test_a_users_own_object_is_a_sink():
    assert isinstance(Memory(), Sink)
    assert not isinstance(Memory(), SelectiveSink)
    sink = Memory()
    with MetricsLogger([sink]) as logger:
        logger.log(1, {"x": 1.0})
        logger.rewind(0)
        logger.log(1, {"x": 2.0})
    assert [record.metrics for record in sink.records] == [{"x": 2.0}]
    assert sink.calls == ["write", "rewind", "write", "flush", "close"]
    assert len(sink.threads) == 1
    assert threading.current_thread() not in sink.threads


def test_the_public_names_are_there(tmp_path):
    with metricfold.MetricsLogger([metricfold.JSONLSink(tmp_path / "x.jsonl")]) as logger:
        logger.log(1, {"loss": math.nan})
    (record,) = metricfold.read_jsonl(tmp_path / "x.jsonl")
    assert math.isnan(record.metrics["loss"])


# -- Bad input -----------------------------------------------------------------------------------


def one_dataset(aggregator):
    aggregator.record("loss", 2.0, dataset="code/a")
    aggregator.record("norm", 3.0)
    return aggregator


@pytest.mark.parametrize(
    ("rollup", "totals"),
    [
        (True, {"t/loss"}),
        (False, set()),
        ("levels", {"t/loss", "t_code/loss"}),
    ],
)
def test_totals_are_there_with_one_dataset_as_rollup_says(rollup, totals):
    sink, aggregator = Memory(), MetricsAggregator()
    with MetricsLogger([sink]) as logger:
        for step in range(2):
            logger.log(step, one_dataset(aggregator), prefix="t", rollup=rollup)
        logger.log(2, one_dataset(aggregator).reduce(), prefix="t", rollup=rollup)
    assert [record.metrics.keys() for record in sink.records] == [
        {"t_code/a/loss", "t/norm", *totals}
    ] * 3


@pytest.mark.parametrize("way", ["extra", "function", "dict"])
def test_a_key_that_is_logged_by_the_user_stays_his_where_a_total_would_print_it(way, caplog):
    sink, aggregator = Memory(), MetricsAggregator()
    aggregator.derive("double", lambda m: 2 * m["loss"])
    mine = {"t/loss": 9.0, "t/double": 8.0, "t/norm": 7.0}
    with MetricsLogger([sink]) as logger:
        for step in range(2):
            if way == "dict":
                logger.log(step, {"loss": 9.0, "double": 8.0}, prefix="t")
            extra = {"extra": mine, "function": lambda _: mine, "dict": {}}[way]
            logger.log(step, one_dataset(aggregator), prefix="t", extra=extra)
        logger.log(2, one_dataset(aggregator), prefix="t")  # whose keys do not become others'
    *logged, last = [record.metrics for record in sink.records if "t/norm" in record.metrics]
    own = {"t_code/a/loss": 2.0, "t_code/a/double": 4.0, "t/norm": 3.0}
    given = {} if way == "dict" else {"t/loss": 9.0, "t/double": 8.0}
    assert logged == [{**own, **given}] * 2
    assert last == own
    said = warnings_in(caplog)
    assert "'t/double', 't/loss' would be totals over datasets, but are logged as extra=" in said[0]
    # What was recorded is no total.
    assert len(said) == (1 if way == "dict" else 2)
    assert way == "dict" or "extra= names 't/norm', which are metrics of their own" in said[1]


def test_extra_may_be_a_function_of_the_snapshot(tmp_path, caplog):
    def owner(snapshot):
        return {"t/owner": snapshot.owner(None, "grad"), "t/none": None, "lr": 0.5}

    def fails(snapshot):
        return {"t/owner": snapshot.owner(None, "no such metric")}

    aggregator = MetricsAggregator()
    with MetricsLogger([JSONLSink(tmp_path / "run.jsonl")]) as logger:
        for step, extra in enumerate((owner, fails)):
            aggregator.record("grad", 2.0, "max")
            logger.log(step, aggregator, prefix="t", extra=extra)
        with pytest.raises(TypeError, match="extra is a function of a Snapshot, but the source"):
            logger.log(2, {"loss": 1.0}, extra=owner)
    first, second = read_jsonl(tmp_path / "run.jsonl")
    assert first.metrics == {"t/grad": 2.0, "t/owner": 0.0, "lr": 0.5}
    assert second.metrics == {"t/grad": 2.0}
    assert "the extra numbers of step 1 are left out" in caplog.text


@pytest.mark.parametrize(
    ("value", "shown"),
    [("2.5", "str"), (None, "NoneType"), ([1.0], "list"), (np.ones(1), "ndarray"), (1j, "complex")],
)
@pytest.mark.parametrize("where", ["source", "extra"])
def test_a_value_that_is_no_number_is_named(where, value, shown):
    bad = {"loss": value}
    match = rf"{where}\['loss'\] .*{shown}.* not a number"
    with MetricsLogger([]) as logger, pytest.raises(TypeError, match=match):
        logger.log(1, bad if where == "source" else {"x": 1.0}, extra=bad)


@pytest.mark.parametrize(
    ("arguments", "choice", "error", "match"),
    [
        ((-1, {}), {}, ValueError, "step is -1"),
        ((1.5, {}), {}, TypeError, r"step is 1\.5"),
        (("1", {}), {}, TypeError, "step is '1'"),
        ((1, {}), {"prefix": ""}, ValueError, "prefix is empty"),
        ((1, {}), {"prefix": "a\nb"}, ValueError, "prefix"),
        ((1, {}), {"window": "all"}, ValueError, "window"),
        ((1, {}), {"rollup": "all"}, ValueError, "rollup='all': use True"),
        ((1, {"": 1.0}), {}, ValueError, "a key of source is empty"),
        ((1, {3: 1.0}), {}, TypeError, "a key of source must be a string"),
        ((1, {"x": 10**400}), {}, ValueError, "too large"),
        ((1, [1.0]), {}, TypeError, r"cannot log \[1\.0\]"),
        ((1, {}), {"extra": [1.0]}, TypeError, "extra must be a dict"),
    ],
)
def test_an_argument_of_the_wrong_kind_is_named(arguments, choice, error, match):
    with MetricsLogger([]) as logger, pytest.raises(error, match=match):
        logger.log(*arguments, **choice)


@pytest.mark.parametrize(
    "choice", [{}, {"prefix": ""}, {"prefix": "t", "window": "x"}, {"prefix": "t", "step": -1}]
)
def test_a_refused_log_starts_no_reduction(choice):
    source = Source()
    with MetricsLogger([]) as logger, pytest.raises((TypeError, ValueError)):
        logger.log(choice.pop("step", 1), source, **choice)
    assert source.futures == []


def test_what_only_rank_0_was_given_is_refused_after_it_has_joined_the_reduction():
    source = Source()
    with MetricsLogger([]) as logger:
        with pytest.raises(TypeError, match="extra"):
            logger.log(1, source, prefix="t", extra={"lr": "high"})
        assert len(source.futures) == 1
        source.futures[0].set_result(Result())


def test_a_missing_prefix_says_what_to_write():
    with MetricsLogger([]) as logger:
        with pytest.raises(TypeError, match="prefix='train'"):
            logger.log(1, aggregator_with_data())
        with pytest.raises(TypeError, match="Snapshot needs a prefix"):
            logger.log(1, aggregator_with_data().reduce())


@pytest.mark.parametrize(
    ("sinks", "match"),
    [
        (JSONLSink("x"), r"write \[sink\]"),
        ([JSONLSink], "is a class, not a sink"),
        (["run.jsonl"], "lacks the methods write, flush, close, rewind"),
    ],
)
def test_what_is_no_sink_is_named(sinks, match):
    with pytest.raises(TypeError, match=match):
        MetricsLogger(sinks)


def test_a_queue_size_below_1_is_refused():
    with pytest.raises(ValueError, match="queue_size is 0"):
        MetricsLogger([], queue_size=0)


def test_a_closed_logger_says_so():
    logger = MetricsLogger([])
    logger.close()
    logger.close()
    for call in (lambda: logger.log(1, {}), lambda: logger.rewind(1), logger.flush):
        with pytest.raises(RuntimeError, match="closed"):
            call()


# -- What a sink cannot do to the training -------------------------------------------------------


def test_a_sink_that_raises_is_retried():
    sink = Failing("write", times=2)
    with MetricsLogger([sink]) as logger:
        logger.log(1, {"x": 1.0})
        logger.log(2, {"x": 2.0})
    assert [record.step for record in sink.records] == [1, 2]
    assert sink.attempts == 4


@pytest.mark.parametrize("method", ["write", "flush", "rewind"])
def test_a_sink_that_keeps_failing_is_tried_to_the_end_and_the_others_go_on(
    method, caplog, monkeypatch
):
    """Before, it was set aside after three attempts, and got no more records in that run."""
    monkeypatch.setattr(worker, "_FAILING_SECONDS", 0.7)
    bad, good = Failing(method), Memory()
    with MetricsLogger([bad, good]) as logger:
        logger.rewind(0)
        for step in range(1, 6):
            logger.log(step, {"x": 1.0})
        assert not logger.flush()
        for step in range(6, 11):
            logger.log(step, {"x": 1.0})
    assert [record.step for record in good.records] == list(range(1, 11))
    assert bad.attempts > 3
    assert bad.calls[-1] == "close", "what it holds is given back"
    assert bad.calls.count("close") == 1
    table = errors_in(caplog)[-1]
    assert table.startswith("not all that was logged has been written")
    written = {"write": 0, "flush": 10, "rewind": 10}[method]
    assert f"Failing(): {written} written, 0 skipped, {10 - written} lost" in table
    assert method in table
    assert "No space left on device" in " ".join([*warnings_in(caplog), table])


def test_a_sink_that_cannot_be_closed_is_reported(caplog):
    with MetricsLogger([Failing("close")]) as logger:
        logger.log(1, {"x": 1.0})
    (table,) = errors_in(caplog)
    assert "Failing(): 1 written, 0 skipped, 0 lost" in table
    assert "1 x close(): OSError(28, 'No space left on device')" in table


def test_an_output_that_cannot_be_written_is_loud_once_and_costs_the_training_nothing(
    tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(worker, "_FAILING_SECONDS", 0.2)
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "run.jsonl"
    with MetricsLogger([JSONLSink(path), JSONLSink(tmp_path / "good.jsonl")]) as logger:
        for step in range(3):
            logger.log(step, {"x": 1.0})
    loud, table = errors_in(caplog)
    assert f"{JSONLSink(path)!r} has not written anything yet: write() of step 0 fails" in loud
    assert "Not a directory" in loud or "File exists" in loud
    assert f"{JSONLSink(path)!r}: 0 written, 0 skipped, 3 lost" in table
    assert "good.jsonl" not in table
    assert len(read_jsonl(tmp_path / "good.jsonl")) == 3


def test_a_sink_that_fails_is_reported_on_stderr_without_any_logging_set_up(tmp_path):
    code = f"""
from metricfold.sinks import JSONLSink, MetricsLogger, worker
worker._FAILING_SECONDS = 0.2
with MetricsLogger([JSONLSink({str(tmp_path)!r})]) as logger:
    logger.log(1, {{"x": 1.0}})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loud, *table = done.stderr.splitlines()
    assert loud.startswith(f"JSONLSink('{tmp_path}') has not written anything yet: write() of")
    assert table == [
        "not all that was logged has been written:",
        f"  JSONLSink('{tmp_path}'): 0 written, 0 skipped, 1 lost",
        "      1 x write(), step 1: IsADirectoryError(21, 'Is a directory')",
    ]


def test_the_training_does_not_wait_for_a_sink_and_other_sinks_do_not_either():
    slow, fast = Gated(), Memory()
    with MetricsLogger([slow, fast]) as logger:
        for step in range(100):
            logger.log(step, {"x": 1.0})
        assert slow.entered.wait(WAIT)
        deadline = time.monotonic() + WAIT
        while len(fast.records) < 100 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(fast.records) == 100
        assert slow.records == []
        slow.gate.set()
    assert [record.step for record in slow.records] == list(range(100)), "and nothing is lost"


def test_a_full_queue_refuses_records_counts_them_and_loses_none_that_it_accepted(caplog):
    slow, fast = Gated(), Memory()
    with MetricsLogger([slow, fast], queue_size=3) as logger:
        for step in range(10):
            logger.log(step, {"x": 1.0})
            # One at a time, so that it is the slow sink that cannot keep up.
            deadline = time.monotonic() + WAIT
            while len(fast.records) <= step and time.monotonic() < deadline:
                time.sleep(0.001)
            assert slow.entered.wait(WAIT)
        slow.gate.set()
    assert [record.step for record in fast.records] == list(range(10))
    assert [record.step for record in slow.records] == [0, 1, 2]
    first, last = errors_in(caplog)
    assert "Gated" in first or "Memory()" in first
    assert "that of step 3 is the first to be left out: it is slower than the training" in first
    assert "Memory(): 3 written, 0 skipped, 7 lost" in last
    assert "7 x left out" in last


def test_what_waits_for_a_reduction_is_bounded_too_and_none_of_it_is_lost(caplog):
    sink, source = Memory(), Source()
    with MetricsLogger([sink], queue_size=3) as logger:
        logger.log(0, source, prefix="t")
        for step in range(1, 6):
            logger.log(step, {"x": 1.0})
        source.futures[0].set_result(Result(x=1.0))
    assert [record.step for record in sink.records] == [0, 1, 2]
    first, last = errors_in(caplog)
    assert "step 3" in first
    assert "3 written, 0 skipped, 3 lost" in last


def test_a_reduction_that_failed_leaves_room_for_others(caplog):
    sink, source = Memory(), Source()
    with MetricsLogger([sink], queue_size=1) as logger:
        for step in range(5):
            logger.log(step, source, prefix="t")
            source.futures[-1].set_exception(ConnectionError())
            with pytest.raises(ConnectionError):
                logger.log(step, source, prefix="t")
            logger.flush()
        logger.log(5, {"x": 1.0})
    assert [record.step for record in sink.records] == [5]
    assert warnings_in(caplog) == []


def test_files_are_flushed_every_second_also_while_records_keep_coming():
    times = []

    class Timed(Memory):
        def write(self, record):
            times.append(("write", time.monotonic()))
            time.sleep(0.02)

        def flush(self):
            times.append(("flush", time.monotonic()))

    with MetricsLogger([Timed()]) as logger:
        for step in range(125):
            logger.log(step, {"x": 1.0})
        time.sleep(4)
        before_close = list(times)
    unflushed_since = None
    for what, when in before_close:
        if what == "flush":
            unflushed_since = None
        elif unflushed_since is None:
            unflushed_since = when
        else:
            assert when - unflushed_since < 1.4
    assert unflushed_since is None, "also when nothing more comes"
    assert sum(what == "flush" for what, _ in before_close) <= 4, "but not for each record"


def test_flush_waits_until_everything_is_flushed():
    sink, source = Memory(), Source()
    with MetricsLogger([sink]) as logger:
        assert logger.flush()
        logger.log(1, source, prefix="t")
        threading.Timer(0.2, source.futures[0].set_result, [Result(x=1.0)]).start()
        assert logger.flush()
        assert sink.calls == ["write", "flush"]


def test_a_metric_that_cannot_be_finished_is_reported_and_the_training_goes_on(caplog):
    class Broken(Result):
        def as_dict(self, prefix, window, *, rollup):
            raise ZeroDivisionError("boom")

    sink, source = Memory(), Source()
    with MetricsLogger([sink]) as logger:
        logger.log(1, source, prefix="t")
        source.futures[0].set_result(Broken())
        logger.log(2, {"x": 1.0})
    assert [record.step for record in sink.records] == [2]
    assert "the metrics of step 1 are left out" in caplog.text
    assert "ZeroDivisionError: boom" in caplog.text


# -- Errors of reductions ------------------------------------------------------------------------


def test_the_error_of_a_reduction_is_raised_by_the_next_log_of_that_aggregator():
    sink, failing, other = Memory(), Source(), Source()
    with MetricsLogger([sink]) as logger:
        logger.log(1, failing, prefix="t")
        logger.log(1, other, prefix="v")
        failing.futures[0].set_exception(ConnectionError("rank 1 is gone"))
        other.futures[0].set_result(Result(x=1.0))
        logger.log(2, other, prefix="v")
        other.futures[1].set_result(Result(x=2.0))
        logger.log(2, {"lr": 1.0})
        with pytest.raises(ConnectionError, match="rank 1 is gone"):
            logger.log(2, failing, prefix="t")
        assert len(failing.futures) == 1, "no reduction that other ranks would not be in"
        logger.log(3, failing, prefix="t")
        failing.futures[1].set_result(Result(x=3.0))
    assert [record.step for record in sink.records] == [1, 2, 2, 3]


def test_the_error_of_the_last_reduction_is_raised_by_close_after_everything_is_written():
    sink, source = Memory(), Source()
    logger = MetricsLogger([sink])
    logger.log(1, source, prefix="t")
    logger.log(2, {"x": 1.0})
    source.futures[0].set_exception(ConnectionError("rank 1 is gone"))
    with pytest.raises(ConnectionError, match="rank 1 is gone"):
        logger.close()
    assert [record.step for record in sink.records] == [2]
    assert sink.calls[-1] == "close"
    logger.close()


def test_leaving_with_an_exception_waits_only_a_moment_for_a_reduction(caplog):
    sink, source = Memory(), Source()

    def train():
        with MetricsLogger([sink]) as logger:
            logger.log(1, {"x": 1.0})
            logger.log(2, source, prefix="t")
            logger.log(3, {"x": 1.0})
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        train()
    assert [record.step for record in sink.records] == [1, 3]
    assert sink.calls[-1] == "close"
    (warning,) = warnings_in(caplog)
    assert "the metrics of step 2 are lost" in warning


def test_an_aggregator_that_the_training_has_dropped_is_not_kept_until_close():
    with MetricsLogger([Memory()]) as logger:
        aggregator = aggregator_with_data()
        logger.log(1, aggregator, prefix="val")
        dropped = weakref.ref(aggregator)
        del aggregator
        deadline = time.monotonic() + WAIT
        while dropped() is not None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert dropped() is None


def test_a_reduction_that_went_well_is_forgotten():
    source = Source()
    with MetricsLogger([]) as logger:
        logger.log(1, source, prefix="val")
        result = Result(x=1.0)
        source.futures.pop().set_result(result)
        dropped = weakref.ref(result)
        del result
        assert dropped() is None


def test_the_error_of_an_aggregator_that_is_gone_is_raised_by_close_and_by_no_other_log():
    logger = MetricsLogger([])
    for _ in range(3):
        failing = Source()
        logger.log(1, failing, prefix="val")
        failing.futures[0].set_exception(ConnectionError("rank 1 is gone"))
        del failing
    # New objects may get the addresses of those that are gone.
    for _ in range(30):
        fresh = Source()
        logger.log(2, fresh, prefix="val")
        fresh.futures[0].set_result(Result(x=1.0))
    with pytest.raises(ConnectionError, match="rank 1 is gone"):
        logger.close()


# -- Rewinding -----------------------------------------------------------------------------------


def test_rewind_comes_after_what_was_logged_before_it(tmp_path):
    path = tmp_path / "run.jsonl"
    source = Source()
    with MetricsLogger([JSONLSink(path)]) as logger:
        for step in (10, 20):
            logger.log(step, {"x": 1.0})
        logger.log(30, source, prefix="t")
        logger.rewind(10)
        source.futures[0].set_result(Result(x=1.0))
        logger.log(20, {"x": 2.0})
    assert [(one.step, one.metrics) for one in read_jsonl(path)] == [
        (10, {"x": 1.0}),
        (20, {"x": 2.0}),
    ]


def test_a_resumed_run_shows_no_step_twice(tmp_path):
    path = tmp_path / "run.jsonl"

    def train(first, last, checkpoint):
        with MetricsLogger([JSONLSink(path)]) as logger:
            if checkpoint is not None:
                logger.rewind(checkpoint)
            for step in range(first, last):
                logger.log(step, {"x": float(step)})

    train(0, 37, None)
    train(31, 50, 30)
    assert [record.step for record in read_jsonl(path)] == list(range(50))


@pytest.mark.parametrize("step", [-2, 1.5, None])
def test_rewind_to_no_step_is_refused(step):
    with MetricsLogger([]) as logger, pytest.raises((TypeError, ValueError), match="step is"):
        logger.rewind(step)


# -- Threads -------------------------------------------------------------------------------------


def test_close_ends_all_threads():
    MetricsLogger([]).close()  # the thread that watches signals stays with the process
    before = set(threading.enumerate())
    logger = MetricsLogger([Memory(), Memory()])
    logger.log(1, {"x": 1.0})
    assert len(set(threading.enumerate()) - before) == 3
    logger.close()
    deadline = time.monotonic() + WAIT
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert set(threading.enumerate()) <= before


def test_a_logger_that_logs_nothing_starts_no_thread_and_closes_its_sinks():
    MetricsLogger([]).close()
    before = set(threading.enumerate())
    sink = Memory()
    with MetricsLogger([sink]):
        assert set(threading.enumerate()) <= before
    assert sink.calls == ["close"]


def test_several_threads_may_log():
    sink = Memory()
    with MetricsLogger([sink]) as logger:
        threads = [
            threading.Thread(
                target=lambda base=base: [logger.log(base + n, {"x": 1.0}) for n in range(50)]
            )
            for base in (0, 1000)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    steps = [record.step for record in sink.records]
    assert sorted(steps) == [*range(50), *range(1000, 1050)]
    assert [step for step in steps if step < 1000] == list(range(50))


def test_a_forked_child_is_told_to_make_its_own_logger(tmp_path):
    code = f"""
import os
from metricfold.sinks import JSONLSink, MetricsLogger
logger = MetricsLogger([JSONLSink({str(tmp_path / "run.jsonl")!r})])
logger.log(1, {{"x": 1.0}})
if os.fork() == 0:
    try:
        logger.log(2, {{"x": 1.0}})
    except RuntimeError as error:
        print(error, flush=True)
    raise SystemExit(0)  # with exit hooks, which must not wait for threads that are not there
os.wait()
logger.close()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert "this is a fork" in done.stdout
    assert [record.step for record in read_jsonl(tmp_path / "run.jsonl")] == [1]


def test_histograms_reach_the_file_from_a_distribution(tmp_path):
    aggregator = MetricsAggregator()
    for value in range(1000):
        aggregator.record("len", float(value), "distribution", dataset="a")
    with MetricsLogger([JSONLSink(tmp_path / "run.jsonl")]) as logger:
        logger.log(1, aggregator, prefix="t")
    histogram = read_jsonl(tmp_path / "run.jsonl")[0].histograms["t_a/len"]
    assert isinstance(histogram, Histogram)
    assert histogram.counts.sum() == 1000
    assert (histogram.minimum, histogram.maximum) == (0.0, 999.0)


def test_records_are_values():
    record = Record(1, 2.0, {})
    assert record == Record(1, 2.0, {}, {})
    with pytest.raises(AttributeError):
        record.step = 3


def test_records_with_histograms_are_compared_by_what_they_hold():
    def with_histogram(counts=(2.0, 1.0), *, minimum=0.5, key="t/len"):
        edges = np.array([0.0, 1.0, 2.0])
        histogram = Histogram(edges, np.array(counts), minimum, 1.5, 2.5, 2.75)
        return Record(1, 2.0, {}, {key: histogram})

    record = with_histogram()
    assert record == with_histogram()
    assert record not in (
        with_histogram((1.0, 2.0)),
        with_histogram((1.0,)),
        with_histogram(minimum=0.25),
        with_histogram(key="t/other"),
        Record(1, 2.0, {}),
        Record(1, 2.0, {}, record.histograms, prefix="t"),
        Record(1, 2.0, {"x": 1.0}, record.histograms),
        Record(1, 2.5, {}, record.histograms),
        Record(2, 2.0, {}, record.histograms),
        None,
    )
