"""The cells of metrics with axes in what a logger writes: as numbers, as heat maps, or not at all."""

from __future__ import annotations

import io
import logging
import math
from typing import Any

import numpy as np
import pytest

from metricfold import JSONLSink, MetricsAggregator, MetricsLogger, read_jsonl
from metricfold.sinks import ConsoleSink, Record, TensorBoardSink, WandbSink, heat_map

PIL = pytest.importorskip("PIL.Image")

TOKENS = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
AXES = {"layer": 2, "expert": 3}
SHOWN = [["layer", 2], ["expert", 3]]


class Collecting:
    def __init__(self) -> None:
        self.records: list[Record] = []

    def write(self, record: Record) -> None:
        self.records.append(record)

    def flush(self) -> None: ...
    def close(self) -> None: ...
    def rewind(self, step: int) -> None: ...


class Without(Collecting):
    arrays = False


def logged(*sinks: Any, **how: Any) -> None:
    aggregator = MetricsAggregator()
    with MetricsLogger(sinks) as logger:
        for step, number in ((1, 1.0), (2, 10.0)):
            aggregator.record("tokens", number * TOKENS, "sum", axes=AXES, dataset="web")
            norms = np.array([number, math.nan])
            aggregator.record("norm", norms, axes={"p": ["b", "a"]}, weight=np.array([1, 0]))
            aggregator.record("loss", 2.0)
            logger.log(step, aggregator, prefix="train", **how)
        logger.log(3, aggregator, prefix="train", **how)


def values_of(record: Record) -> dict[str, Any]:
    return {key: one["values"].tolist() for key, one in record.arrays.items()}


def test_a_file_holds_the_cells_of_what_a_log_shows_and_reads_them_back(tmp_path: Any) -> None:
    sink = Collecting()
    logged(JSONLSink(tmp_path / "run.jsonl"), sink, window="auto")
    first, second, third = read_jsonl(tmp_path / "run.jsonl")
    assert [first, second, third] == sink.records
    assert sorted(first.arrays) == ["train/norm", "train/tokens", "train_web/tokens"]
    assert first.arrays["train/tokens"]["axes"] == SHOWN
    assert first.arrays["train/norm"]["axes"] == [["p", ["a", "b"]]]
    np.testing.assert_equal(first.arrays["train/norm"]["values"], [math.nan, 1.0])
    # A SUM is of the run, a MEAN of the interval, as the numbers beside them.
    assert values_of(second)["train_web/tokens"] == (11 * TOKENS).tolist()
    np.testing.assert_equal(second.arrays["train/norm"]["values"], [math.nan, 10.0])
    assert sorted(third.arrays) == ["train/tokens", "train_web/tokens"], "norm had no value"
    assert third.metrics["train_web/tokens"] == 231.0


def test_totals_and_keys_that_are_not_shown_have_no_cells(tmp_path: Any) -> None:
    sink = Collecting()
    logged(JSONLSink(tmp_path / "a.jsonl", select="*/norm"), sink, rollup=False)
    assert [sorted(one.arrays) for one in read_jsonl(tmp_path / "a.jsonl")] == [["train/norm"]] * 2
    assert sorted(sink.records[0].arrays) == ["train/norm", "train_web/tokens"]
    own = Collecting()
    logged(own, extra={"train/tokens": 7.0})
    assert sorted(own.records[0].arrays) == ["train/norm", "train_web/tokens"]


def test_cells_are_left_out_where_no_sink_takes_them(tmp_path: Any) -> None:
    without, plain = Without(), Collecting()
    logged(without, JSONLSink(tmp_path / "run.jsonl", arrays=False))
    assert [one.arrays for one in without.records] == [{}] * 3
    assert [one.arrays for one in read_jsonl(tmp_path / "run.jsonl")] == [{}] * 3
    # Where one does, those that do not are free to leave them.
    logged(without, JSONLSink(tmp_path / "more.jsonl", arrays=False), plain)
    assert read_jsonl(tmp_path / "more.jsonl")[0].arrays == {}
    assert plain.records[0].arrays


def test_the_console_shows_numbers_alone() -> None:
    rich = pytest.importorskip("rich.console")
    text = io.StringIO()
    logged(ConsoleSink(rich.Console(file=text)))
    assert "tokens" in text.getvalue()
    assert "cells" not in text.getvalue()


def test_cells_that_a_handler_of_the_users_fails_at_are_left_out_and_the_numbers_stay(
    caplog: pytest.LogCaptureFixture,
) -> None:
    from metricfold import LaneHandler

    class Picky(LaneHandler):
        sum_lanes = ("total",)

        def sums_of(self, values: Any, weights: Any) -> tuple[float, ...]:
            return (float(values.sum()),)

        def result(self, lanes: Any) -> float:
            return 1.0 / (lanes["total"] - 1.0)

    aggregator, sink = MetricsAggregator(), Collecting()
    aggregator.register_handler("picky", Picky())
    with MetricsLogger([sink]) as logger, caplog.at_level(logging.WARNING, "metricfold"):
        for step in (1, 2):
            aggregator.record("t", np.array([1.0, 2.0]), "picky", axes={"a": 2})
            aggregator.record("u", np.array([1.0, 2.0]), "sum", axes={"a": 2})
            logger.log(step, aggregator, prefix="t", window="interval")
    assert [(one.metrics["t/t"], sorted(one.arrays)) for one in sink.records] == [
        (0.5, ["t/u"])
    ] * 2
    said = [one.getMessage() for one in caplog.records if "cells" in one.getMessage()]
    assert len(said) == 1
    assert "the cells of metric 't' are left out" in said[0]


# -- Images


def test_colours_go_from_the_smallest_value_to_the_largest() -> None:
    image = heat_map.heat_map(np.array([[0.0, 5.0, 10.0], [math.nan, math.inf, -math.inf]]))
    height, width, _ = image.shape
    rows, columns = height // 2, width // 3
    found = image[rows // 2 :: rows, columns // 2 :: columns]
    assert found[0, 0].tolist() == [68, 1, 84]
    assert found[0, 2].tolist() == [253, 231, 37]
    assert found[1].tolist() == [[160] * 3, [214, 39, 40], [214, 39, 40]]
    brightness = heat_map.heat_map(np.arange(256.0))[0, ::2] @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(brightness) > -1).all()
    assert (np.diff(brightness[::16]) > 0).all()


@pytest.mark.parametrize(
    "values",
    [
        np.zeros(()),
        np.zeros(5),
        np.full((2, 2), np.nan),
        np.full(3, 7.0),
        np.array([-1.7e308, 1.7e308]),
        np.array([5e-324, 0.0]),
        np.ones((2, 3, 4)),
        np.arange(5000.0),
        np.arange(6000.0).reshape(2000, 3),
    ],
    ids=lambda values: str(values.shape),
)
def test_any_array_is_an_image_that_other_programs_read(values: Any) -> None:
    image = heat_map.heat_map(values)
    read = PIL.open(io.BytesIO(heat_map.png(image)))
    assert np.array_equal(np.asarray(read.convert("RGB")), image)
    assert min(image.shape[:2]) >= 16
    assert max(image.shape[:2]) <= 1024


@pytest.mark.parametrize("scale", [1e-300, 1e-8, 1e8, 1e300])
def test_an_image_is_the_same_at_any_scale_as_in_wandb_6287_it_was_not(scale: float) -> None:
    values = np.random.default_rng(0).random((10, 20))
    assert np.array_equal(heat_map.heat_map(values * scale), heat_map.heat_map(values))


def test_of_many_cells_neighbours_are_shown_by_their_mean() -> None:
    values = np.zeros(4096)
    values[4:8], values[8], values[12] = 8.0, math.nan, math.inf
    image = heat_map.heat_map(values)[0]
    assert image.shape == (1024, 3)
    assert image[:4].tolist() == [[68, 1, 84], [253, 231, 37], [68, 1, 84], [214, 39, 40]]


def test_tensorboard_shows_a_heat_map_beside_the_number(tmp_path: Any) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logged(TensorBoardSink(tmp_path / "with"), TensorBoardSink(tmp_path / "without", arrays=False))

    def read(name: str) -> Any:
        found = accumulators.EventAccumulator(str(tmp_path / name), size_guidance={"images": 0})
        return found.Reload()

    found = read("with")
    assert sorted(found.Tags()["images"]) == [
        "train/norm/cells",
        "train/tokens/cells",
        "train_web/tokens/cells",
    ]
    assert [one.value for one in found.Scalars("train_web/tokens")] == [21.0, 231.0, 231.0]
    first, *_ = found.Images("train_web/tokens/cells")
    assert first.step == 1
    image = np.asarray(PIL.open(io.BytesIO(first.encoded_image_string)).convert("RGB"))
    assert np.array_equal(image, heat_map.heat_map(TOKENS))
    assert (first.height, first.width) == image.shape[:2]
    assert read("without").Tags()["images"] == []


@pytest.fixture
def _offline(monkeypatch: pytest.MonkeyPatch) -> Any:
    wandb = pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    yield
    if wandb.run is not None:
        wandb.finish()


@pytest.mark.usefixtures("_offline")
def test_wandb_shows_a_heat_map_beside_the_number(tmp_path: Any) -> None:
    from wandb_files import history, run_files

    logged(WandbSink(dir=str(tmp_path)))
    (path,) = run_files(tmp_path)
    rows = history(path)
    assert rows[2]["train_web/tokens"] == 231.0
    assert rows[1]["train_web/tokens/cells _type"] == "image-file"
    file = path.parent / "files" / rows[1]["train_web/tokens/cells path"]
    assert np.array_equal(np.asarray(PIL.open(file).convert("RGB")), heat_map.heat_map(TOKENS))


@pytest.mark.usefixtures("_offline")
@pytest.mark.parametrize("how", ["arrays=False", "no pillow"])
def test_wandb_writes_numbers_alone_where_images_are_not_wanted_or_cannot_be(
    tmp_path: Any, how: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from wandb_files import history, run_files

    if how == "no pillow":
        monkeypatch.setattr("metricfold.sinks.wandb.find_spec", lambda name: None)
    with caplog.at_level(logging.WARNING, "metricfold"):
        sink = WandbSink(dir=str(tmp_path), arrays=how != "arrays=False")
        for step in (1, 2):
            array = {"axes": SHOWN, "values": TOKENS}
            sink.write(Record(step, 1.0, {"a": 1.0}, arrays={"t": array}))
        sink.close()
    rows = history(run_files(tmp_path)[0])
    assert rows == {1: {"a": 1.0, "step": 1}, 2: {"a": 1.0, "step": 2}}
    said = [one.getMessage() for one in caplog.records if "pillow" in one.getMessage()]
    assert len(said) == (how == "no pillow")


def test_a_metric_that_has_the_name_of_a_heat_map_stays_and_it_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    maps = heat_map.HeatMaps()
    record = Record(1, 1.0, {"t/cells": 3.0}, arrays={"t": {"axes": SHOWN, "values": TOKENS}})
    with caplog.at_level(logging.WARNING, "metricfold"):
        assert maps.of(record) == maps.of(record) == {}
    assert [one.getMessage()[:40] for one in caplog.records] == [
        "the heat map of 't' is left out, for the"
    ]
