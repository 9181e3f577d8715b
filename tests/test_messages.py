"""Mistakes that newcomers make: each ends in a message that says what to write instead."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from jax_devices import run_devices
from ranks import run_ranks
from torch.utils.data import DataLoader, default_collate

from metricfold import (
    AggregationType,
    DefaultTrainingMetricTransform,
    Metric,
    MetricsAggregator,
    MetricsCollator,
    MetricsLogger,
    MissingRanksError,
)
from metricfold._core.fold.builtin import MeanAggHandler
from metricfold.torch import DeviceAccumulator

LOSS = Metric("alpaca", "loss", 1.0, "mean")
RECORD_OR_ITEM = ["aggregator.record('x', value)", "value.item()"]
DRAIN = "accumulator = aggregator.drain(accumulator)"


class Memory:
    def __init__(self):
        self.records = []

    def write(self, record):
        self.records.append(record)

    def flush(self): ...

    def close(self): ...

    def rewind(self, step): ...


def logged(*arguments, **choice):
    """Return the metrics of all records of one `log`."""
    sink = Memory()
    with MetricsLogger([sink]) as logger:
        logger.log(*arguments, **choice)
    return [record.metrics for record in sink.records]


def a_batch():
    return MetricsCollator(lambda samples: {"x": [1, 2]})([{"x": 1, "metrics": [LOSS]}])


def an_accumulator():
    return DeviceAccumulator({"loss": "mean"}, ("alpaca",))


def jax_scalar():
    return pytest.importorskip("jax").numpy.float32(1.5)


def jax_accumulator():
    pytest.importorskip("flax")
    from metricfold.jax import DeviceAccumulator as JaxAccumulator

    return JaxAccumulator({"loss": "mean"}, ("alpaca",))


# -- Numbers that are logged ---------------------------------------------------------------------


def bfloat16_on_the_host():
    jax = pytest.importorskip("jax")
    return jax.device_get(jax.numpy.bfloat16(1.5))


@pytest.mark.parametrize(
    "make",
    [
        lambda: np.array(1.5),
        lambda: np.ma.array(1.5),
        lambda: np.array(1.5, dtype=np.float16),
        lambda: np.float32([1.0, 2.0]).mean(),
        lambda: np.array(1.5, dtype=object),
        lambda: Decimal("1.5"),
        lambda: Fraction(3, 2),
        lambda: torch.tensor(1.5).numpy(),
        bfloat16_on_the_host,
        lambda: pytest.importorskip("jax").device_get({"x": jax_scalar()})["x"],
    ],
)
def test_one_number_on_the_host_is_logged_whatever_holds_it(make):
    """Before, a NumPy array without axes, such as jax.device_get gives, and Decimal were refused."""
    assert logged(1, {"x": make()}, extra={"y": make()}) == [{"x": 1.5, "y": 1.5}]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: {"a": 1.0}, ["dict", "'x/a'"]),
        (lambda: {"a": {"b": 1.0}}, ["dict", "'x/a'"]),
        (lambda: "2.5", ["str", "float(text)", "'categorical_count'"]),
        (lambda: np.array("text"), ["float(text)"]),
        (lambda: None, ["None", "leave the key out"]),
        (lambda: np.array(None), ["leave the key out"]),
        (lambda: np.ma.masked, ["masked has no value"]),
        (lambda: np.ma.array(5.0, mask=True), ["masked has no value"]),
        (lambda: np.ma.array([5.0], mask=[True]), ["masked has no value"]),
        (lambda: torch.tensor(1.5), ["Tensor", *RECORD_OR_ITEM]),
        (lambda: torch.tensor(1.5, requires_grad=True), RECORD_OR_ITEM),
        (jax_scalar, RECORD_OR_ITEM),
        (lambda: torch.tensor([1.5]), ["value.item()"]),
        (lambda: np.ones(1), ["value.item()"]),
        (lambda: torch.ones(1000), ["one number of it", "'distribution'"]),
        (lambda: np.ones(1000), ["one number of it", "'distribution'"]),
        (lambda: [1.0, 2.0], ["one number of it"]),
        (lambda: 1j, ["real part"]),
        (lambda: np.array(1j), ["real part"]),
        (lambda: np.timedelta64(3, "s"), ["timedelta64", "its seconds"]),
        (lambda: np.datetime64("2026-01-01"), ["datetime64", "the seconds since"]),
        (lambda: {1.0}, ["set", "one number of it"]),
        (lambda: print, ["leave the key out"]),
        (lambda: LOSS, ["Metric"]),
        (an_accumulator, [DRAIN, "logger.log(step, aggregator"]),
    ],
)
@pytest.mark.parametrize("where", ["source", "extra"])
def test_what_is_no_number_in_a_dict_says_what_serves(make, words, where):
    bad = {"x": make()}
    with pytest.raises(TypeError) as caught:
        logged(1, bad if where == "source" else {"y": 1.0}, extra=bad)
    for word in [f"{where}['x']", "not a number", *words]:
        assert word in str(caught.value)
    assert len(str(caught.value)) < 500


# -- Calls ---------------------------------------------------------------------------------------


def update(given):
    return lambda: MetricsAggregator().update(given())


def log(*given):
    def call():
        with MetricsLogger([]) as logger:
            logger.log(*(one() if callable(one) else one for one in given))

    return call


def record(*given, **choice):
    return lambda: MetricsAggregator().record(*given, **choice)


MISTAKES = {
    # update
    "a batch": (update(a_batch), TypeError, ["dict", "update(batch.pop('metrics'))"]),
    "a tuple": (update(lambda: (a_batch(), 1)), TypeError, ["update(batch[0].pop('metrics'))"]),
    "no metrics in it": (update(lambda: {"x": [1]}), TypeError, ["collate_fn=MetricsCollator"]),
    "numbers": (update(lambda: {"loss": 1.0}), TypeError, ["aggregator.record_all({...})"]),
    "None": (update(lambda: None), TypeError, ["MetricsCollator", "'metrics'"]),
    "one metric": (update(lambda: LOSS), TypeError, ["update([metric])"]),
    "a generator": (update(lambda: iter([LOSS])), TypeError, ["update(list(metrics))"]),
    "lists of samples": (update(lambda: [[LOSS], [LOSS]]), TypeError, ["MetricsCollator"]),
    "batches": (update(lambda: [a_batch()["metrics"]]), TypeError, ["one MetricBatch at a time"]),
    "an accumulator": (update(an_accumulator), TypeError, [DRAIN]),
    # log
    "log an accumulator": (log(1, an_accumulator), TypeError, [DRAIN, "logger.log(step, aggr"]),
    "log JAX's": (log(1, jax_accumulator), TypeError, [DRAIN]),
    "log metrics": (log(1, lambda: [LOSS]), TypeError, ["aggregator.update(metrics)"]),
    "log a batch": (log(1, lambda: a_batch()["metrics"]), TypeError, ["aggregator.update(metrics"]),
    "log a number": (log(1, 2.5), TypeError, ["aggregator.record('loss', value)"]),
    "log a future": (
        log(1, lambda: MetricsAggregator().reduce_async()),
        TypeError,
        ["future.result()"],
    ),
    "log a tensor": (log(1, lambda: torch.ones(())), TypeError, ["aggregator.record('loss', v"]),
    "log the step last": (log(MetricsAggregator, 1), TypeError, ["the step comes first"]),
    "log the step after a dict": (log({"x": 1.0}, 1), TypeError, ["the step comes first"]),
    "a step of 10.0": (log(10.0, {}), TypeError, ["10.0", "int(step)"]),
    "a step of np.float64": (log(np.float64(10), {}), TypeError, ["int(step)"]),
    "a step of tensor(3.)": (log(lambda: torch.tensor(3.0), {}), TypeError, ["int(step)"]),
    "a step of '10'": (log("10", {}), TypeError, ["int(step)"]),
    "no step": (log(None, {}), TypeError, ["step is None", "whole number"]),
    # record
    "the dataset first": (record("alpaca", "loss", 1.0), TypeError, ["1.0, dataset='alpaca'"]),
    "the weight third": (record("loss", 1.0, 32), TypeError, ["weight=32"]),
    "a dict of numbers": (record("loss", {"a": 1.0}), TypeError, ["each of its numbers"]),
    "text": (record("loss", "1.0"), TypeError, ["'1.0'", "'categorical_count'"]),
    "no value": (record("loss", None), TypeError, ["None", "record nothing"]),
    "values": (record("loss", [1.0, 2.0]), TypeError, ["its mean"]),
    "record an accumulator": (lambda: record("x", an_accumulator())(), TypeError, [DRAIN]),
    # Metric
    "type and value": (
        update(lambda: [Metric("a", "loss", "mean", 2.0)]),
        TypeError,
        ["changed places", "Metric('a', 'loss', 2.0, 'mean')"],
    ),
    "member and value": (
        update(lambda: [Metric("a", "loss", AggregationType.SUM, 2)]),
        TypeError,
        ["Metric('a', 'loss', 2, AggregationType.SUM)"],
    ),
    # other arguments
    "a path for a logger": (lambda: MetricsLogger("run.jsonl"), TypeError, ["[JSONLSink('run.js"]),
    "paths for a logger": (lambda: MetricsLogger(["run.jsonl"]), TypeError, ["JSONLSink('run.js"]),
    "a name for a window": (lambda: MetricsAggregator("train"), ValueError, ["name='train'"]),
    "a handler first": (
        lambda: MetricsAggregator().register_handler(MeanAggHandler(), "mine"),
        TypeError,
        ["the type first", "register_handler('mine', handler)"],
    ),
    "a function first": (
        lambda: MetricsAggregator().derive(abs, "size"),
        TypeError,
        ["the name first", "derive('size', function)"],
    ),
    "a type that devices lack": (
        lambda: DeviceAccumulator({"loss": "avg"}, ("a",)),
        ValueError,
        ["'avg'", "did you mean 'mean'?"],
    ),
    # views, prefixes and percentiles
    "window all": (
        lambda: MetricsAggregator().get_metrics_for_logging(window="all"),
        ValueError,
        ["'run'", "The run is everything since the start"],
    ),
    "fractions": (
        lambda: MetricsAggregator(percentiles=(0.5, 0.99)),
        ValueError,
        ["0..100", "percentiles=(50, 99)"],
    ),
    "fractions and bounds": (
        lambda: MetricsAggregator(percentiles=(0, 0.125, 0.5, 1)),
        ValueError,
        ["percentiles=(0, 12.5, 50, 100)"],
    ),
    "a slash": (
        lambda: MetricsAggregator().get_metrics_for_logging("train/"),
        ValueError,
        ["'train//loss'", "prefix='train'"],
    ),
    "a slash in log": (
        lambda: logged(1, MetricsAggregator(), prefix="a/b/"),
        ValueError,
        ["prefix='a/b'"],
    ),
    "a slash before keys": (lambda: logged(1, {"x": 1}, prefix="t/"), ValueError, ["prefix='t'"]),
    "no prefix": (log(1, MetricsAggregator), TypeError, ["prefix='train'"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_in_words_that_say_what_to_write(mistake):
    call, kind, words = MISTAKES[mistake]
    with pytest.raises(kind) as caught:
        call()
    for word in words:
        assert word in str(caught.value)
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)


def test_other_numbers_are_steps_as_before():
    for step in (3, np.int64(3), torch.tensor(3), np.array(3)):
        assert logged(step, {"x": 1.0}) == [{"x": 1.0}]


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        *[(name, "'mean'") for name in ("avg", "average", "Mean", "MEAN", "weighted_mean", "meen")],
        *[(name, "'sum'") for name in ("total", "AggregationType.SUM", "Sum", "count")],
        *[(name, "'max'") for name in ("maximum", "MAX")],
        *[(name, "'min'") for name in ("minimum", "lowest")],
        *[(name, "'distribution'") for name in ("p95", "p99.9", "median", "std", "histogram")],
        *[(name, "'categorical_count'") for name in ("category", "categorical", "count")],
        ("throughput", "'rate'"),
    ],
)
def test_a_type_by_another_name_says_which_one_is_meant(given, meant):
    with pytest.raises(ValueError, match="no handler is registered") as caught:
        MetricsAggregator().record("loss", 1.0, given)
    assert meant in str(caught.value).partition("did you mean ")[2]


def test_a_type_of_ones_own_gets_no_guess():
    with pytest.raises(ValueError, match="no handler is registered") as caught:
        MetricsAggregator().record("loss", 1.0, "bits_per_byte")
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize("percentiles", [(), (0, 1), (0, 100), (0.1, 50), (0.5, 99.5)])
def test_percentiles_below_the_first_are_percentiles(percentiles):
    aggregator = MetricsAggregator(percentiles=percentiles)
    aggregator.record("len", 3.0, "distribution")
    assert aggregator.get_metrics_for_logging()["data/len_stat_mean"] == 3.0


# -- The prefix, twice ---------------------------------------------------------------------------


def said(caplog):
    return [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING]


def test_a_name_that_repeats_the_prefix_is_said_once(caplog):
    aggregator, sink = MetricsAggregator(), Memory()
    with MetricsLogger([sink]) as logger:
        for step in range(3):
            aggregator.record("train/loss", 1.0)
            aggregator.record("train/lr", 1.0, dataset="a")
            logger.log(step, aggregator, prefix="train")
    assert sink.records[0].metrics["train/train/loss"] == 1.0, "what is printed is as it was"
    (warning,) = said(caplog)
    for word in ("'train/loss'", "'train/train/loss'", "name it 'loss'"):
        assert word in warning


def test_a_key_that_repeats_the_prefix_is_said_once(caplog):
    with MetricsLogger([Memory()]) as logger:
        for step in range(3):
            logger.log(step, {"lr": 1.0, "val/loss": 1.0}, prefix="val")
            logger.log(step, {"val/loss": 1.0})
            logger.log(step, {"val/loss": 1.0}, prefix="train")
    (warning,) = said(caplog)
    assert "name it 'loss'" in warning


# -- Without MetricsCollator ---------------------------------------------------------------------


def samples(lengths=(3, 3), agg_type=AggregationType.SUM):
    return [
        {"x": 1.0, "metrics": [Metric("a", "n", 1, agg_type)] * length, "label": 2}
        for length in lengths
    ]


def transformed():
    transform = DefaultTrainingMetricTransform()
    transform.set_dataset_name("alpaca")
    return [transform({"tokens": [1, 2, 3]}) for _ in range(4)]


@pytest.mark.parametrize(
    "dataset",
    [
        samples(),
        samples((1, 3)),
        samples(agg_type="sum"),
        [(sample, 1) for sample in samples()],
        transformed(),
    ],
    ids=["types", "uneven lists", "types as text", "tuples", "transformed"],
)
def test_a_loader_without_the_collator_says_to_give_it_one(dataset):
    """Before: "found <enum 'AggregationType'>", "each element ... of equal size", or no error."""
    MetricsAggregator()
    with pytest.raises(ValueError, match=r"collate_fn=MetricsCollator\(\)"):
        next(iter(DataLoader(dataset, batch_size=2)))


def test_the_collator_and_what_carries_no_metrics_collate_as_before():
    MetricsAggregator()
    batch = next(iter(DataLoader(samples(), batch_size=2, collate_fn=MetricsCollator())))
    aggregator = MetricsAggregator()
    aggregator.update(batch.pop("metrics"))
    assert aggregator.get_metrics_for_logging() == {"data_a/n": 6.0}
    assert batch["x"].tolist() == [1.0, 1.0]
    plain = default_collate([{"x": [1, 2], "y": [], "z": (1, "a")}] * 2)
    assert [one.tolist() for one in plain["x"]] == [[1, 1], [2, 2]]
    assert plain["z"][1] == ("a", "a")


def test_a_worker_says_it_too():
    loader = DataLoader(
        Lazily(), batch_size=2, num_workers=1, multiprocessing_context="spawn", timeout=60
    )
    with pytest.raises(ValueError, match=r"collate_fn=MetricsCollator\(\)"):
        next(iter(loader))


class Lazily(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        transform = DefaultTrainingMetricTransform()
        transform.set_dataset_name("alpaca")
        return transform({"tokens": [1, 2, 3]})


def stacked_by_grain(metrics):
    from metricfold.data.grain import stack

    return stack(metrics)


def test_metrics_that_another_collate_function_has_stacked_say_so():
    ready = [one["metrics"] for one in samples(agg_type="sum")]
    listed = [Metric(*map(list, zip(*ready[0], strict=True)))]
    for stacked in (listed, run_devices(stacked_by_grain, 1, ready)):
        with pytest.raises(TypeError) as caught:
            MetricsAggregator().update(stacked)
        for word in ("must be a string", "has stacked", "collate_fn=MetricsCollator("):
            assert word in str(caught.value)
    with pytest.raises(TypeError) as caught:
        MetricsAggregator().update([Metric(["a"] * 999, ["n"] * 999, [1] * 999, ["sum"] * 999)])
    assert len(str(caught.value)) < 500


# -- Ranks and installations ---------------------------------------------------------------------


def ends_early(rank, how):
    aggregator, logger = MetricsAggregator(timeout=1.5), MetricsLogger([])
    try:
        for step in range(3):
            if rank == 1 and step == 2:
                if how == "exits":
                    os._exit(0)
                if how == "closes":
                    aggregator.close()
                if how == "makes no call":
                    time.sleep(3)
                return None
            aggregator.record("x", 1.0)
            logger.log(step, aggregator, prefix="t")
        logger.close()
    except MissingRanksError as error:
        return str(error)


@pytest.mark.parametrize("how", ["exits", "closes"])
def test_a_rank_that_ended_early_is_said_to_have_ended(how):
    """Before, the one cause that was named was a call inside ``if rank == 0:``."""
    text = run_ranks(ends_early, 2, how, dies=(1,))[0]
    for word in ("rank(s) 1 of 2", "has ended, or closed its aggregator", "fewer batches"):
        assert word in text
    assert "if rank == 0" not in text


def test_a_rank_that_makes_no_call_is_told_of_the_usual_causes():
    text = run_ranks(ends_early, 2, "makes no call")[0]
    for word in ("rank(s) 1 of 2", "did not come within", "if rank == 0:", "fewer batches"):
        assert word in text


def test_jax_on_a_python_that_it_does_not_support_says_so():
    code = """
import sys
import metricfold, importlib.util
found, version = importlib.util.find_spec, sys.version_info
importlib.util.find_spec = lambda name, *rest: None if name in ("jax", "flax") else found(name, *rest)
for given in ((3, 10, 4), (3, 11, 0)):
    sys.version_info = given
    try:
        import metricfold.jax
    except ImportError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    old, new = done.stdout.splitlines()
    assert "need Python 3.11" in old
    assert "on this Python 3.10 pip install 'metricfold[jax]' installs neither" in old
    assert new.endswith("not installed: pip install 'metricfold[jax]'")
