"""Lightning's Trainer with `MetricfoldCallback`, in real trainings on one and two ranks."""

from __future__ import annotations

import copy
import csv
import importlib.util
import inspect
import logging
import os
import pickle
import runpy
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from torch.utils.data import DataLoader, DistributedSampler

pytest.importorskip("lightning")
if importlib.util.find_spec("sklearn") is None:
    pytest.skip("the digits are scikit-learn's", allow_module_level=True)
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch import callbacks as theirs
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.tuner import Tuner

import metricfold.integrations.lightning
from metricfold import (
    AggregationType,
    Metric,
    MetricBatch,
    MetricsAggregator,
    MetricsCollator,
    MetricTransform,
    NonFinite,
)
from metricfold.integrations.lightning import MetricfoldCallback
from metricfold.torch import DeviceAccumulator, ModelWatch

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        # Lightning's advice about speed and about what is small here.
        ".*does not have many workers",
        ".*number of training batches.*smaller than the logging",
        # One model serves the tests that evaluate and those that do not.
        "You defined a `validation_step` but have no",
        # Who resumes need not go on saving.
        "Be aware that when using `ckpt_path`, callbacks used to create",
        # What Lightning 2.6 and torchdata 0.11 call in PyTorch 2.13.
        ".isinstance.treespec, LeafSpec.. is deprecated",
        "'set_vital' is deprecated",
    )
]

NAMES = ("low", "high")  # the digits up to 4, and those from 5
TRAINED, EVALUATED = 50, 13  # samples
ACCUMULATED = 2  # batches of 4 samples per step: 7 steps an epoch on one rank, 4 on two


# -- Data, model, trainer --------------------------------------------------------------------------


class Ink(MetricTransform):
    def _generate_metrics(self, sample: Any) -> list[Metric]:
        ink = sample["image"].sum().item()
        return [
            Metric(self.dataset_name, "samples_seen", 1, AggregationType.SUM),
            Metric(self.dataset_name, "ink", ink, AggregationType.DISTRIBUTION),
        ]


@cache
def digits() -> list[dict[str, Any]]:
    """Return scanned digits, tagged by dataset."""
    package = importlib.util.find_spec("sklearn")  # not imported, for that takes seconds
    assert package is not None
    file = Path(package.submodule_search_locations[0], "datasets/data/digits.csv.gz")
    table = np.loadtxt(file, delimiter=",", max_rows=TRAINED + EVALUATED)
    images, labels = table[:, :-1], table[:, -1]
    transforms = [Ink(), Ink()]
    for name, transform in zip(NAMES, transforms, strict=True):
        transform.set_dataset_name(name)
    return [
        transforms[int(label > 4)](
            {
                "image": torch.tensor(images[index], dtype=torch.float32),
                "label": int(label),
                "dataset": int(label > 4),
                "index": index,
            }
        )
        for index, label in enumerate(labels)
    ]


class Classifier(LightningModule):
    """A small model that keeps account of what it consumes, by other means."""

    def __init__(self, metrics: MetricfoldCallback, *, fails_at: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(64, 10)
        self.metrics = metrics
        self.fails_at = fails_at
        self.ledger: list[tuple[int, int, float]] = []  # step, sample, loss
        self.evaluated: list[tuple[int, float]] = []
        self.batches = 0

    def setup(self, stage: str) -> None:
        self.losses = DeviceAccumulator({"loss": "mean"}, NAMES, device=self.device)
        self.metrics.accumulators[:] = [self.losses]

    def losses_of(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        assert set(batch) == {"image", "label", "dataset", "index"}
        logits = self.layer(batch["image"] / 16)
        self.losses.token_loss(logits, batch["label"], batch["dataset"])
        return torch.nn.functional.cross_entropy(logits, batch["label"], reduction="none")

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        losses = self.losses_of(batch)
        self.batches += 1
        if self.batches == self.fails_at:
            raise ArithmeticError("something in the step")
        self.metrics.aggregator.record("batches", 1, "sum")
        step = self.trainer.global_step + 1
        rows = zip(batch["index"].tolist(), losses.tolist(), strict=True)
        self.ledger += [(step, index, loss) for index, loss in rows]
        return losses.mean()

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        losses = self.losses_of(batch)
        self.metrics.eval_aggregator.record("batches", 1, "sum")
        if not self.trainer.sanity_checking:
            self.evaluated += zip(batch["index"].tolist(), losses.tolist(), strict=True)

    def test_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.losses_of(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def loader(
    samples: list[Any], *, of: Callable[..., Any] = DataLoader, **changes: Any
) -> DataLoader[Any]:
    return of(samples, **{"batch_size": 4, "collate_fn": MetricsCollator(), **changes})


def train_loader(**changes: Any) -> DataLoader[Any]:
    return loader(digits()[:TRAINED], **changes)


def val_loader(**changes: Any) -> DataLoader[Any]:
    return loader(digits()[TRAINED:], **changes)


def moving_average() -> Any:
    if not hasattr(theirs, "EMAWeightAveraging"):
        pytest.skip("this Lightning has no EMAWeightAveraging: it came with 2.6")
    return theirs.EMAWeightAveraging(decay=0.5, update_every_n_steps=1)


def make(folder: Path, *callbacks: Any, **changes: Any) -> Trainer:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    return Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 2,
            "accumulate_grad_batches": ACCUMULATED,
            "log_every_n_steps": 3,
            "logger": CSVLogger(folder, name="", version=""),
            "default_root_dir": folder,
            "enable_checkpointing": any(isinstance(one, theirs.Checkpoint) for one in callbacks),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [*callbacks],
            **changes,
        }
    )


def every_epoch(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder / "saved", "{epoch}", save_top_k=-1)


def on_exception(folder: Path) -> Callback:
    if "save_on_exception" in inspect.signature(ModelCheckpoint).parameters:
        return ModelCheckpoint(folder / "failed", save_on_exception=True, every_n_epochs=9)
    return theirs.OnExceptionCheckpoint(folder / "failed")  # before Lightning 2.6


def saved_on_exception(folder: Path) -> MetricsAggregator:
    (file,) = folder.glob("failed/*.ckpt")
    saved = torch.load(file, weights_only=True)
    aggregator = MetricsAggregator()
    aggregator.load_state_dict(saved["callbacks"]["MetricfoldCallback"])
    return aggregator


# -- The truth -------------------------------------------------------------------------------------


def truth(
    prefix: str, rows: Iterable[tuple[int, float]], totals: Iterable[int]
) -> dict[str, float]:
    """Return what should be logged.

    Args:
        prefix: of the keys.
        rows: sample and loss of each one in the interval.
        totals: each sample that counts.
    """
    samples = digits()
    rows, totals = list(rows), list(totals)
    expected: dict[str, float] = {}
    for key, datasets in ((prefix, (0, 1)), (f"{prefix}_low", (0,)), (f"{prefix}_high", (1,))):
        inside = [(index, loss) for index, loss in rows if samples[index]["dataset"] in datasets]
        ink = [samples[index]["image"].sum().item() for index, _ in inside]
        seen = sum(samples[index]["dataset"] in datasets for index in totals)
        expected[f"{key}/samples_seen"] = seen
        if not inside:
            continue
        expected[f"{key}/loss"] = float(np.mean([loss for _, loss in inside]))
        expected[f"{key}/ink_stat_mean"] = float(np.mean(ink))
        expected[f"{key}/ink_stat_p50"] = float(np.percentile(ink, 50))
    return expected


def read(folder: Path, key: str) -> dict[int, dict[str, float]]:
    """Return what Lightning's CSV file has, by step, of the rows that have `key`."""
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {
        int(row["step"]): {name: float(text) for name, text in row.items() if text}
        for row in rows
        if row.get(key)
    }


def agree(logged: dict[str, float], expected: dict[str, float]) -> None:
    for key, value in expected.items():
        tolerance = 1e-6 if key.endswith("/loss") else 1e-12
        assert logged[key] == pytest.approx(value, rel=tolerance, abs=0), key


def check_training(folder: Path, ledgers: list[Any], steps: list[int], *, since: int = 0) -> None:
    """Compare all logs of a training, from step `since` on, with what the models consumed."""
    rows = [row for ledger in ledgers for row in ledger]
    logged = read(folder, "train/samples_seen")
    assert list(logged) == steps
    for before, step in zip([since, *steps], steps, strict=False):
        interval = [(index, loss) for at, index, loss in rows if before < at <= step]
        totals = [index for at, index, _ in rows if at <= step]
        agree(logged[step], truth("train", interval, totals))


# -- One rank --------------------------------------------------------------------------------------


def test_logs_of_a_training_are_what_its_samples_say(tmp_path: Path) -> None:
    metrics = MetricfoldCallback()
    model = Classifier(metrics)
    tensorboard = TensorBoardLogger(tmp_path, name="", version="board")
    watch = (
        EarlyStopping("val/loss", patience=9, check_on_train_epoch_end=False),
        ModelCheckpoint(tmp_path / "best", monitor="val_high/loss"),
    )
    trainer = make(
        tmp_path, *watch, metrics, logger=[CSVLogger(tmp_path, name="", version=""), tensorboard]
    )
    trainer.validate(model, val_loader(), verbose=False)
    before = [*model.evaluated]
    trainer.fit(model, train_loader(), val_loader())

    check_training(tmp_path, [model.ledger], [3, 6, 7, 9, 12, 14])
    assert len(model.ledger) == 2 * TRAINED
    evaluations = read(tmp_path, "val/samples_seen")
    assert list(evaluations) == [0, 7, 14]  # not the sanity check
    assert evaluations[7]["val/batches"] == 4
    agree(evaluations[0], truth("val", before, range(TRAINED, TRAINED + EVALUATED)))
    for number, step in enumerate((7, 14), start=1):
        rows = model.evaluated[number * EVALUATED :][:EVALUATED]
        agree(evaluations[step], truth("val", rows, [index for index, _ in rows]))
    assert trainer.callback_metrics["val/loss"].item() == evaluations[14]["val/loss"]
    assert watch[1].best_model_score is not None

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    shown = {event.step: event.value for event in board.Scalars("train_low/samples_seen")}
    logged = read(tmp_path, "train/samples_seen")
    assert shown == {step: row["train_low/samples_seen"] for step, row in logged.items()}


def test_a_test_has_its_own_values_and_leaves_those_of_the_run(tmp_path: Path) -> None:
    metrics = MetricfoldCallback()
    model = Classifier(metrics)
    trainer = make(tmp_path, metrics, every_epoch(tmp_path))
    trainer.fit(model, train_loader())
    trainer.test(model, val_loader(), ckpt_path=str(tmp_path / "saved/epoch=0.ckpt"), verbose=False)
    rows = model.evaluated
    agree(read(tmp_path, "test/loss")[14], truth("test", rows, [index for index, _ in rows]))
    assert len(trainer.predict(model, val_loader()) or ()) == 4
    totals = metrics.aggregator.get_metrics_for_logging("train")
    assert totals["train_low/samples_seen"] + totals["train_high/samples_seen"] == 2 * TRAINED


def test_batches_read_ahead_when_a_run_breaks_off_count_once(tmp_path: Path) -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader

    def data() -> DataLoader[Any]:
        return train_loader(of=stateful, num_workers=1, prefetch_factor=4)

    broken = Classifier(MetricfoldCallback(), fails_at=10)
    saver = ModelCheckpoint(tmp_path / "saved", "{step}", every_n_train_steps=3, save_top_k=-1)
    with pytest.raises(ArithmeticError):
        make(tmp_path / "broken", broken.metrics, saver).fit(broken, data())

    again = Classifier(MetricfoldCallback())
    make(tmp_path / "again", again.metrics).fit(
        again, data(), ckpt_path=tmp_path / "saved/step=3.ckpt"
    )
    consumed = [row for row in broken.ledger if row[0] <= 3] + again.ledger
    assert sorted(index for _, index, _ in consumed) == sorted([*range(TRAINED)] * 2)
    agree(
        read(tmp_path / "again", "train/samples_seen")[14],
        {"train/samples_seen": 2 * TRAINED, "train/batches": 26},
    )
    again_logged = read(tmp_path / "again", "train/samples_seen")
    interval = [(index, loss) for step, index, loss in consumed if 3 < step <= 6]
    totals = [index for step, index, _ in consumed if step <= 6]
    agree(again_logged[6], truth("train", interval, totals))


def test_a_step_that_failed_does_not_count_in_the_checkpoint_that_it_leaves(tmp_path: Path) -> None:
    broken = Classifier(MetricfoldCallback(), fails_at=4)
    with pytest.raises(ArithmeticError):
        make(tmp_path, broken.metrics, on_exception(tmp_path)).fit(broken, train_loader())
    aggregator = saved_on_exception(tmp_path)
    agree(aggregator.reduce().as_dict("t", rollup=True), {"t/samples_seen": 12, "t/batches": 3})


def test_batches_of_several_loaders_and_tuples_are_found(tmp_path: Path) -> None:
    class Any_(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            (one, _), two = batch["tuple"], batch["dict"]
            return super().training_step(one, batch_idx) + super().training_step(two, batch_idx)

    pairs = [(sample, sample["label"]) for sample in digits()[:8]]
    model = Any_(MetricfoldCallback())
    make(tmp_path, model.metrics).fit(
        model, {"tuple": loader(pairs), "dict": loader(digits()[20:28])}
    )
    check_training(tmp_path, [model.ledger], [1, 2])
    assert len(model.ledger) == 32


class Logged(Classifier):
    """Logs by itself what is called as totals over datasets are; its evaluation takes a while."""

    fails = False

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.metrics.aggregator.record("rate", 1, "rate")
        self.log("train/loss", 123.0, on_step=False, on_epoch=True, batch_size=1)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        began = time.perf_counter()
        super().validation_step(batch, batch_idx)
        self.log("val/loss", 7.0, batch_size=1)
        time.sleep(0.02)
        self.evaluating = getattr(self, "evaluating", 0.0) + time.perf_counter() - began
        if self.fails and not self.trainer.sanity_checking:
            raise ArithmeticError("something in the evaluation")


def one_dataset(indices: slice) -> DataLoader[Any]:
    return loader([sample for sample in digits()[indices] if not sample["dataset"]])


def log_beside(folder: Path, **changes: Any) -> tuple[Logged, dict[str, float], list[str]]:
    """Train on one dataset; returns the model, what can be monitored, and what was warned of."""
    model = Logged(MetricfoldCallback())
    stop = EarlyStopping("val_low/loss", patience=9)
    trainer = make(folder, stop, model.metrics, log_every_n_steps=1, **changes)
    began = time.perf_counter()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.fit(model, one_dataset(slice(TRAINED)), one_dataset(slice(TRAINED, None)))
    seconds = model.metrics.aggregator.reduce().run_seconds
    assert seconds > 0
    if trainer.world_size == 1:  # they are the slowest rank's, which may have begun before this one
        assert seconds <= time.perf_counter() - began - model.evaluating
    monitored = {key: value.item() for key, value in trainer.callback_metrics.items()}
    return (
        model,
        monitored,
        [str(one.message) for one in said if "is logged by" in str(one.message)],
    )


def check_beside(folder: Path, monitored: dict[str, float], said: list[str]) -> None:
    assert (monitored["val/loss"], monitored["train/loss"]) == (7.0, 123.0)
    # Its own keys are its own from the first log on, and nobody else's.
    for key, value in (("train/loss", 123.0), ("val/loss", 7.0)):
        assert {row[key] for row in read(folder, key).values()} == {value}
    ours = read(folder, "train_low/loss")
    assert not any("train/loss" in row for row in ours.values())
    assert all(row["train/samples_seen"] == row["train_low/samples_seen"] for row in ours.values())
    assert len(said) == 2
    assert "'train/loss' is logged by the module too" in said[0]
    assert "'val/loss' is logged by the module too" in said[1]


def test_a_watch_of_the_model_is_drained_with_the_accumulators(tmp_path: Path) -> None:
    class Watched(Classifier):
        def on_train_start(self) -> None:
            self.watch = ModelWatch(self, self.optimizers(), every=2)
            self.metrics.accumulators.append(self.watch)

    callback = MetricfoldCallback()
    trainer = make(tmp_path, callback, max_steps=4, log_every_n_steps=2)
    trainer.fit(Watched(callback), train_loader())
    found = callback.aggregator.get_metrics_for_logging("train", window="run")
    assert found["train/grad/norm"] > 0
    assert found["train/param/norm"] > 0


def test_a_key_that_the_module_logs_stays_its_own_and_an_evaluation_is_a_pause(
    tmp_path: Path,
) -> None:
    _, monitored, said = log_beside(tmp_path)
    check_beside(tmp_path, monitored, said)


def test_one_dataset_has_totals_to_monitor_where_early_stopping_used_to_find_none(
    tmp_path: Path,
) -> None:
    model = Classifier(MetricfoldCallback(rollup="levels"))
    trainer = make(tmp_path, EarlyStopping("val/loss"), model.metrics, max_epochs=1)
    trainer.fit(model, one_dataset(slice(TRAINED)), one_dataset(slice(TRAINED, None)))
    for key in ("train", "val"):
        logged = [*read(tmp_path, f"{key}/loss").values()]
        assert logged
        assert all(row[f"{key}/loss"] == row[f"{key}_low/loss"] for row in logged)
    without = Classifier(MetricfoldCallback(rollup=False))
    make(tmp_path / "without", without.metrics, max_epochs=1).fit(without, train_loader())
    assert read(tmp_path / "without", "train/batches")
    assert not read(tmp_path / "without", "train_low/loss")[7].keys() & {"train/loss"}


@pytest.mark.filterwarnings("ignore:.*is logged by the module too")
def test_an_evaluation_that_fails_ends_its_pause(tmp_path: Path) -> None:
    model = Logged(MetricfoldCallback())
    model.fails = True
    with pytest.raises(ArithmeticError):
        make(tmp_path, model.metrics).fit(model, train_loader(), val_loader())
    before = model.metrics.aggregator.reduce().run_seconds
    time.sleep(0.02)
    model.metrics.aggregator.record("rate", 1, "rate")
    assert model.metrics.aggregator.reduce().run_seconds >= before + 0.02


def test_what_cannot_work_says_what_to_do(tmp_path: Path) -> None:
    class Other(MetricfoldCallback):
        pass

    with pytest.raises(RuntimeError, match="more than one stateful callback of type `Metricfold"):
        make(tmp_path, MetricfoldCallback(), MetricfoldCallback())
    model = Classifier(MetricfoldCallback())
    with pytest.raises(ValueError, match=r"several MetricfoldCallbacks.*leave one"):
        make(tmp_path, model.metrics, Other()).fit(model, train_loader())
    with pytest.raises(ValueError, match="window"):
        MetricfoldCallback(window="epoch")
    with pytest.raises(ValueError, match="rollup='all': use True"):
        MetricfoldCallback(rollup="all")  # type: ignore[arg-type]


def test_a_collator_that_is_missing_is_warned_about_once(tmp_path: Path) -> None:
    class Bare(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return self.layer(batch["image"]).square().mean()

    def lose(samples: list[Any]) -> dict[str, Any]:
        return {"image": torch.stack([sample["image"] for sample in samples])}

    def keep(samples: list[Any]) -> dict[str, Any]:
        return {**lose(samples), "metrics": [sample["metrics"] for sample in samples]}

    for collate in (lose, keep):
        model = Bare(MetricfoldCallback())
        trainer = make(tmp_path, model.metrics)
        with pytest.warns(RuntimeWarning, match=r"collate_fn=MetricsCollator") as caught:
            trainer.fit(model, train_loader(collate_fn=collate))
        assert len([one for one in caught if "MetricsCollator" in str(one.message)]) == 1
    assert not (tmp_path / "metrics.csv").exists()


@pytest.mark.parametrize(
    "averaging",
    [
        lambda: StochasticWeightAveraging(0.01, swa_epoch_start=1),
        moving_average,
    ],
    ids=["SWA", "EMA"],
)
@pytest.mark.parametrize("given", [True, False])
def test_weight_averaging_copies_a_module_that_keeps_the_callback(
    tmp_path: Path, averaging: Any, given: bool
) -> None:
    # It ended in "cannot be pickled or copied", before the first step or in the second fit.
    aggregator = MetricsAggregator(on_nan="skip") if given else None
    metrics = MetricfoldCallback(aggregator=aggregator)
    module = Classifier(metrics)
    first = make(tmp_path / "first", metrics, *([averaging()] if given else []))
    first.fit(module, train_loader())
    seen = first.callback_metrics["train/samples_seen"]
    second = make(tmp_path / "second", metrics, averaging())
    second.fit(module, train_loader())
    assert second.callback_metrics["train/samples_seen"] == 2 * seen
    assert copy.deepcopy(metrics) is metrics
    assert copy.copy(module).metrics is metrics


class Reader(Callback):
    """Looks at what is logged when an epoch has ended."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seen.append(float(trainer.callback_metrics["train/samples_seen"]))


@pytest.mark.parametrize("last", [True, False], ids=["metrics last", "metrics first"])
def test_whoever_looks_at_the_end_of_an_epoch_finds_its_values_in_any_order(
    tmp_path: Path, last: bool
) -> None:
    """A callback that stood before ours saw none in the first epoch, and later those of the one before."""
    model = Classifier(MetricfoldCallback())
    stops, reader = EarlyStopping("train/loss", patience=9), Reader()
    saves = ModelCheckpoint(tmp_path, monitor="train/loss", save_on_train_epoch_end=True)
    order = [stops, saves, reader, model.metrics]
    trainer = make(tmp_path, *(order if last else reversed(order)))
    trainer.fit(model, train_loader())
    assert reader.seen == [TRAINED, 2 * TRAINED]
    logged = read(tmp_path, "train/loss")
    assert stops.best_score in [logged[step]["train/loss"] for step in (7, 14)]
    assert saves.best_model_score == stops.best_score


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
def test_processes_that_a_trainer_starts_make_aggregators_of_their_own(tmp_path: Path) -> None:
    """As `ddp_notebook` and `ddp_spawn` do; what they have counted is in the Trainer afterwards."""
    model = Classifier(MetricfoldCallback())
    started: dict[str, Any] = {"devices": 2, "strategy": "ddp_fork", "logger": False}
    trainer = make(tmp_path, model.metrics, max_epochs=1, **started)
    trainer.fit(model, train_loader(), val_loader(batch_size=1))
    assert trainer.callback_metrics["train/samples_seen"] == TRAINED
    assert trainer.callback_metrics["val/samples_seen"] == EVALUATED + 1  # one fills up


class Normed(Classifier):
    """Has batch norms, whose statistics averaged weights need anew: a pass over all batches."""

    def __init__(self, metrics: MetricfoldCallback) -> None:
        super().__init__(metrics)
        self.layer = torch.nn.Sequential(torch.nn.BatchNorm1d(64), torch.nn.Linear(64, 10))


def test_a_pass_that_only_makes_batch_norms_anew_counts_nothing(tmp_path: Path) -> None:
    """It counted as a third epoch: 150 samples, of which no step has learned from 50."""
    metrics = MetricfoldCallback()
    model = Normed(metrics)
    averaging = StochasticWeightAveraging(0.01, swa_epoch_start=1)
    trainer = make(tmp_path, averaging, metrics)
    trainer.fit(model, train_loader(), val_loader())
    assert len(model.ledger) == 3 * TRAINED
    check_training(tmp_path, [model.ledger[: 2 * TRAINED]], [3, 6, 7, 9, 12, 14])
    totals = metrics.aggregator.reduce().as_dict("t", "run")
    assert totals["t/batches"] == 2 * 13
    assert totals["t_low/samples_seen"] + totals["t_high/samples_seen"] == 2 * TRAINED
    evaluations = [*read(tmp_path, "val/samples_seen").values()]
    rows = model.evaluated[-EVALUATED:]
    agree(evaluations[-1], truth("val", rows, [index for index, _ in rows]))
    assert len(evaluations) == 3


def test_an_evaluation_with_averaged_weights_is_that_of_the_averaged_model(tmp_path: Path) -> None:
    model = Classifier(MetricfoldCallback())
    trainer = make(tmp_path, moving_average(), model.metrics)
    trainer.fit(model, train_loader(), val_loader())
    check_training(tmp_path, [model.ledger], [3, 6, 7, 9, 12, 14])
    evaluations = read(tmp_path, "val/loss")
    for number, step in enumerate((7, 14)):
        rows = model.evaluated[number * EVALUATED :][:EVALUATED]
        agree(evaluations[step], truth("val", rows, [index for index, _ in rows]))


class Tuned(Classifier):
    def __init__(self, metrics: MetricfoldCallback) -> None:
        super().__init__(metrics)
        self.lr, self.batch_size = 0.1, 4

    def train_dataloader(self) -> DataLoader[Any]:
        return train_loader(batch_size=self.batch_size)

    def val_dataloader(self) -> DataLoader[Any]:
        return val_loader(batch_size=self.batch_size)


def find_rate(tuner: Tuner, model: Tuned) -> None:
    tuner.lr_find(model, num_training=5, update_attr=False)


def scale_batches(tuner: Tuner, model: Tuned) -> None:
    tuner.scale_batch_size(model, max_trials=2, steps_per_trial=2, init_val=4)
    model.batch_size = 4


def scale_batches_of_evaluations(tuner: Tuner, model: Tuned) -> None:
    tuner.scale_batch_size(model, method="validate", max_trials=2, steps_per_trial=2, init_val=4)
    model.batch_size = 4


@pytest.mark.parametrize("tune", [find_rate, scale_batches, scale_batches_of_evaluations])
def test_what_the_tuner_tries_out_counts_nothing_and_sees_no_metrics(
    tmp_path: Path, tune: Callable[[Tuner, Tuned], None]
) -> None:
    """Its steps saw 'metrics' in their batches, since it sets callbacks aside."""
    metrics = MetricfoldCallback()
    model = Tuned(metrics)
    first = make(tmp_path / "first", metrics, max_epochs=1, num_sanity_val_steps=0)
    first.fit(model)
    before = metrics.aggregator.reduce()
    evaluation = dict(first.callback_metrics)
    trained, evaluated = [*model.ledger], [*model.evaluated]

    second = make(tmp_path / "second", metrics, max_epochs=1, num_sanity_val_steps=0)
    tune(Tuner(second), model)
    assert model.ledger + model.evaluated != trained + evaluated
    after = metrics.aggregator.reduce()
    assert after.as_dict("t", "run") == before.as_dict("t", "run")

    model.ledger[:], model.evaluated[:] = [], []
    model.train()  # trials of evaluations leave it in the other mode
    second.fit(model)
    assert len(model.ledger) == TRAINED
    logged = read(tmp_path / "second", "train/samples_seen")
    again = [(step, index, loss) for step, index, loss in model.ledger if step > 6]
    agree(
        logged[7],
        truth(
            "train",
            [(index, loss) for _, index, loss in again],
            [index for _, index, _ in trained + model.ledger],
        ),
    )
    rows = model.evaluated
    agree(
        read(tmp_path / "second", "val/loss")[7], truth("val", rows, [index for index, _ in rows])
    )
    assert evaluation["val/samples_seen"] == EVALUATED


def test_trials_that_fail_leave_nothing_behind(tmp_path: Path) -> None:
    """A Trainer whose trial has failed keeps callbacks aside for good; the next one goes on."""
    metrics = MetricfoldCallback()
    model = Tuned(metrics)
    model.fails_at = 3
    with pytest.raises(ArithmeticError):
        find_rate(Tuner(make(tmp_path / "first", metrics)), model)
    model.ledger.clear()
    trainer = make(tmp_path / "second", metrics, max_epochs=1)
    trainer.fit(model)
    assert trainer.callback_metrics["train/samples_seen"] == TRAINED
    assert trainer.callback_metrics["train/batches"] == 13
    losses = [loss for step, _, loss in model.ledger if step == 7]
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(np.mean(losses), rel=1e-6)


def test_a_callback_that_is_not_in_use_yet_is_copied_plainly() -> None:
    metrics = MetricfoldCallback(window="run")
    for another in (
        copy.deepcopy(metrics),
        copy.copy(metrics),
        pickle.loads(pickle.dumps(metrics)),
    ):
        assert another is not metrics
        assert another.window == "run"
        assert another.aggregator is not metrics.aggregator


def test_a_callback_among_the_hyperparameters_does_not_end_a_run_at_its_first_checkpoint(
    tmp_path: Path,
) -> None:
    class Keeping(Classifier):
        def __init__(self, metrics: MetricfoldCallback, width: int = 3) -> None:
            super().__init__(metrics)
            self.save_hyperparameters()

    metrics = MetricfoldCallback()
    trainer = make(tmp_path, metrics, every_epoch(tmp_path))
    with pytest.warns(RuntimeWarning, match=r"save_hyperparameters\(ignore=\['metrics'\]\)"):
        trainer.fit(Keeping(metrics), train_loader())
    saved = torch.load(tmp_path / "saved/epoch=1.ckpt", weights_only=True)
    assert saved["hyper_parameters"] == {"width": 3}


def test_without_a_logger_values_are_there_to_be_monitored(tmp_path: Path) -> None:
    model = Classifier(MetricfoldCallback())
    trainer = make(tmp_path, model.metrics, logger=False, max_epochs=1)
    trainer.fit(model, train_loader())
    assert trainer.callback_metrics["train/samples_seen"] == TRAINED
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_without_metrics_is_warned_about(tmp_path: Path) -> None:
    model = Classifier(MetricfoldCallback())
    make(tmp_path, every_epoch(tmp_path), max_epochs=1).fit(model, train_loader(collate_fn=bare))
    with pytest.warns(RuntimeWarning, match="holds no metrics.*start from nothing"):
        make(tmp_path / "again", model.metrics).fit(
            model, train_loader(), ckpt_path=tmp_path / "saved/epoch=0.ckpt"
        )
    assert read(tmp_path / "again", "train/samples_seen")[14]["train/samples_seen"] == TRAINED


def test_a_state_that_cannot_be_loaded_takes_nothing_from_accumulators() -> None:
    """It had emptied them by then."""
    losses = DeviceAccumulator({"loss": "mean"})
    metrics = MetricfoldCallback(accumulators=[losses])
    losses.update("loss", torch.tensor([1.0, 3.0]))
    with pytest.raises(ValueError, match="state"):
        metrics.load_state_dict({"no": "state"})
    assert metrics.aggregator.get_metrics_for_logging("t") == {"t/loss": 2.0}
    losses.update("loss", torch.tensor([5.0]))
    metrics.load_state_dict(MetricsAggregator().state_dict())
    assert metrics.aggregator.reduce().empty


def test_what_follows_an_evaluation_that_failed_is_of_training() -> None:
    metrics, trainer = MetricfoldCallback(), Trainer(logger=False, enable_checkpointing=False)
    model: Any = None
    metrics.on_validation_start(trainer, model)
    metrics.on_validation_batch_end(trainer, model, None, counted(2), 0)
    metrics.on_exception(trainer, model, ArithmeticError())
    metrics.on_train_batch_end(trainer, model, None, counted(3), 0)
    assert metrics.aggregator.get_metrics_for_logging("t") == {"t_digits/samples": 3.0}
    assert metrics.eval_aggregator.get_metrics_for_logging("t") == {"t_digits/samples": 2.0}


def counted(samples: int) -> dict[str, Any]:
    return {
        "metrics": MetricBatch.from_metrics([Metric("digits", "samples", 1.0, "sum")] * samples)
    }


def bare(samples: list[Any]) -> Any:
    batch = MetricsCollator()(samples)
    del batch["metrics"]
    return batch


def test_the_example_shows_the_truth_for_each_dataset(tmp_path: Path) -> None:
    example = runpy.run_path(str(Path(__file__).parent.parent / "examples/lightning_digits.py"))
    main = example["main"]
    main.__globals__.update(EPOCHS=1, EVALUATED=73)
    trainer, rows = main(str(tmp_path))
    assert trainer.global_step == 72
    assert [name for name, *_ in rows] == [
        "training, all/loss",
        "evaluation, all/loss",
        "evaluation, low/loss",
        "evaluation, high/loss",
        "evaluation, all/ink_stat_p50",
        "evaluation, all/samples_seen",
    ]
    for name, _, ours, truth in rows:
        assert ours == pytest.approx(truth, rel=1e-6), name
    assert len(example["table"](rows).splitlines()) == 7


# -- Two ranks, one launch -------------------------------------------------------------------------


class Parallel(Classifier):
    def configure_model(self) -> None:
        """Shards nothing; Lightning asks for this method."""


class Unpadded(DistributedSampler[Any]):
    """Deals out all samples, and none of them twice."""

    def __iter__(self) -> Any:
        return iter(range(self.rank, len(self.dataset), self.num_replicas))

    def __len__(self) -> int:
        return len(range(self.rank, len(self.dataset), self.num_replicas))


class Spoiled(Classifier):
    """Rank 1 has a NaN in its second step."""

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        bad = (self.trainer.global_step, self.trainer.global_rank) == (1, 1)
        value = float("nan") if bad else 1.0
        self.metrics.aggregator.record("ink_of_step", value, dataset="high")
        return super().training_step(batch, batch_idx)


def on_two_ranks(rank: int, folder: Path) -> dict[str, Any]:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(LOCAL_WORLD_SIZE="2", GROUP_RANK="0", TORCHELASTIC_RUN_ID="tests")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # asked for, though we have a group
    ranks: dict[str, Any] = {"devices": 2, "strategy": "ddp"}

    whole = Classifier(MetricfoldCallback())
    checkpoints = every_epoch(folder)
    trainer = make(folder / "whole", whole.metrics, checkpoints, **ranks)
    trainer.fit(whole, train_loader(), val_loader())
    padded = [*whole.evaluated]
    whole.evaluated.clear()
    trainer.test(whole, val_loader(sampler=Unpadded(digits()[TRAINED:])), verbose=False)
    state = whole.metrics.state_dict()

    resumed = Classifier(MetricfoldCallback())
    make(folder / "resumed", resumed.metrics, **ranks).fit(
        resumed, train_loader(), ckpt_path=folder / "saved/epoch=0.ckpt"
    )

    broken = Classifier(MetricfoldCallback(), fails_at=14)
    with pytest.raises(ArithmeticError):
        make(folder / "broken", broken.metrics, on_exception(folder), **ranks).fit(
            broken, train_loader()
        )
    tensor_parallel = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2)
    sharing = make(folder, MetricfoldCallback(), devices=2, strategy=tensor_parallel)
    with pytest.raises(ValueError, match="ranks that share a batch"):
        sharing.fit(Parallel(MetricfoldCallback()), train_loader())

    _, monitored, said = log_beside(folder / "beside", max_epochs=1, **ranks)

    callback = MetricfoldCallback(stop_on="severe")
    callback.aggregator.alert_on(NonFinite("*/ink_of_step"))
    stopped = Spoiled(callback)
    last = make(folder / "stopped", callback, **ranks)
    with pytest.warns(RuntimeWarning, match="stops at step 3") if rank == 0 else nullcontext():
        last.fit(stopped, train_loader())

    metricfold.integrations.lightning._PATIENCE = 0.3
    alone: dict[str, Any] = {}
    if rank == 0:
        broken.metrics.aggregator.record("batches", 1, "sum")  # nobody comes to hear of it
        with pytest.warns(RuntimeWarning, match="at step 7, but not all ranks"):
            alone = broken.metrics.state_dict()
    return {
        "ledger": whole.ledger,
        "padded": padded,
        "unpadded": whole.evaluated,
        "monitored": trainer.callback_metrics["test/loss"].item(),
        "state": state,
        "resumed": resumed.ledger,
        "broken": broken.ledger,
        "alone": alone,
        "beside": (monitored, said),
        "stopped": (
            last.global_step,
            [(one.dataset, one.name, one.rank, one.step) for one in callback.alerts],
        ),
    }


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("two")
    return folder, run_ranks(on_two_ranks, 2, folder, timeout=150)


def test_logs_of_two_ranks_are_what_the_samples_of_both_say(two: Any) -> None:
    folder, ranks = two
    check_training(folder / "whole", [rank["ledger"] for rank in ranks], [3, 4, 6, 8])
    assert ranks[0]["state"] == ranks[1]["state"]
    assert ranks[0]["monitored"] == ranks[1]["monitored"]


def test_an_evaluation_counts_the_samples_that_fill_up_unless_the_sampler_leaves_them_out(
    two: Any,
) -> None:
    folder, ranks = two
    rows = [row for rank in ranks for row in rank["padded"][-7:]]
    assert len(rows) == EVALUATED + 1
    agree(
        read(folder / "whole", "val/samples_seen")[8],
        truth("val", rows, [index for index, _ in rows]),
    )
    rows = [row for rank in ranks for row in rank["unpadded"]]
    logged = read(folder / "whole", "test/samples_seen")[8]
    agree(logged, truth("test", rows, range(TRAINED, TRAINED + EVALUATED)))


def test_what_rules_find_stops_both_ranks_after_the_same_step(two: Any) -> None:
    _, ranks = two
    assert [rank["stopped"] for rank in ranks] == [(3, [("high", "ink_of_step", 1, 3)])] * 2
    with pytest.raises(ValueError, match="stop_on='bad'"):
        MetricfoldCallback(stop_on="bad")  # type: ignore[arg-type]


def test_keys_of_the_modules_own_stay_so_on_two_ranks(two: Any) -> None:
    folder, ranks = two
    (monitored, said), (elsewhere, silent) = (rank["beside"] for rank in ranks)
    check_beside(folder / "beside", monitored, said)
    assert elsewhere == monitored
    assert silent == []  # one rank says it


def test_a_resumed_training_of_two_ranks_logs_what_the_whole_one_did(two: Any) -> None:
    folder, ranks = two
    whole, resumed = (read(folder / of, "train/samples_seen") for of in ("whole", "resumed"))
    assert resumed == {step: whole[step] for step in (6, 8)}
    assert sum(len(rank["resumed"]) for rank in ranks) == TRAINED


def test_a_checkpoint_of_two_ranks_goes_on_exactly_on_one(two: Any, tmp_path: Path) -> None:
    folder, ranks = two
    one = Classifier(MetricfoldCallback())
    make(tmp_path, one.metrics).fit(one, train_loader(), ckpt_path=folder / "saved/epoch=0.ckpt")
    assert len(one.ledger) == TRAINED
    of_two = [row for rank in ranks for row in rank["ledger"] if row[0] <= 4]
    check_training(tmp_path, [of_two, one.ledger], [6, 9, 11], since=4)


def test_a_checkpoint_after_an_exception_on_all_ranks_is_exact(two: Any) -> None:
    folder, ranks = two
    consumed = [index for rank in ranks for _, index, _ in rank["broken"]]
    agree(
        saved_on_exception(folder).reduce().as_dict("t", rollup=True),
        {"t/samples_seen": len(consumed), "t/batches": 2 * 13},
    )


def test_a_rank_that_saves_alone_after_an_exception_has_the_last_state(two: Any) -> None:
    folder, ranks = two
    totals = saved_on_exception(folder).get_metrics_for_logging("t")
    aggregator = MetricsAggregator()
    aggregator.load_state_dict(ranks[0]["alone"])
    assert aggregator.get_metrics_for_logging("t") == totals
