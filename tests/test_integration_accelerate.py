"""Training loops with Hugging Face Accelerate count what was trained on, on one and two ranks."""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports what could ask a server
pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytest.importorskip("tensorboard")

from accelerate import Accelerator
from accelerate.state import GradientState
from accelerate.tracking import GeneralTracker, on_main_process
from accelerate.utils import DataLoaderConfiguration

from metricfold import (
    DefaultTrainingMetricTransform,
    MetricsAggregator,
    MetricsCollator,
    MetricsLogger,
    NonFinite,
    read_jsonl,
)
from metricfold.integrations.accelerate import TrackerSink, register, sample_weights
from metricfold.torch import DeviceAccumulator

ROOT = Path(__file__).parent.parent
LENGTHS = range(1, 20)
BATCH = 4
UPDATES, EVERY, HALF = 12, 4, 6  # of the example, fewer than it has


def samples(length: int) -> list[dict[str, Any]]:
    transform = DefaultTrainingMetricTransform()
    transform.set_dataset_name("a")
    return [transform({"tokens": [1] * (i + 1), "i": i}) for i in range(length)]


def collate(batch: list[Any]) -> dict[str, Any]:
    return {"i": torch.tensor([sample["i"] for sample in batch])}


def loader(data: Any, **options: Any) -> Any:
    return DataLoader(data, batch_size=BATCH, collate_fn=MetricsCollator(collate), **options)


def accelerator(**configuration: Any) -> Accelerator:
    # All accelerators of a process share it, with the loaders of loops that a test has left early.
    GradientState._reset_state()
    return Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(**configuration))


class Stream(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Any:
        return iter(samples(9))


# -- Two ranks -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("two")
    return folder, run_ranks(on_two_ranks, 2, folder, timeout=150)


def on_two_ranks(rank: int, folder: Path) -> dict[str, Any]:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # asked for, though we have a group
    torch.set_num_threads(1)
    return {
        "example": run_example(folder),
        "even": read_by(accelerator()),
        "uneven": read_by(accelerator(even_batches=False)),
        "split": read_by(accelerator(split_batches=True)),
        "sampler": read_by_a_sampler(rank),
        "stream": read_streams(accelerator(dispatch_batches=False)),
        "stopped": stop_by_alerts(accelerator()),
    }


def stop_by_alerts(made: Accelerator) -> tuple[int, list[Any]]:
    """Return the step after which a loop ends by Accelerate's own switch; rank 1 has a NaN in step 3."""
    aggregator = MetricsAggregator()
    aggregator.alert_on(NonFinite("*/loss"))
    with MetricsLogger([]) as logger:
        for step in range(20):
            bad = (step, made.process_index) == (3, 1)
            aggregator.record("loss", float("nan") if bad else 1.0, dataset="a")
            alerts = logger.log(step, aggregator, prefix="train")
            if alerts.severe:
                made.set_trigger()
            if made.check_trigger():
                break
    return step, [(one.dataset, one.rank, one.step) for one in alerts]


def example() -> Any:
    spec = importlib.util.spec_from_file_location(
        "mixture", ROOT / "examples/accelerate_mixture.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_example(folder: Path) -> dict[str, Any]:
    """Train without a break, then once more from the checkpoint half-way; evaluate."""
    module = example()
    module.UPDATES, module.EVERY, module.HALF = UPDATES, EVERY, HALF
    logs = []
    for resume in (False, True):
        made = Accelerator(
            cpu=True,
            gradient_accumulation_steps=module.ACCUMULATION,
            log_with="tensorboard",
            project_dir=folder,
        )
        assert made.num_processes == 2
        model = module.train(made, folder, resume=resume)
        for tracker in made.trackers:  # end_training() would end the process group as well
            tracker.finish()
        if made.is_main_process:
            logs.append([(one.step, one.metrics) for one in read_jsonl(folder / "log.jsonl")])
    count = UPDATES * module.ACCUMULATION * module.BATCH * 2
    trained = module.seen.select(range(count)).remove_columns("metrics")
    truth = {}
    for source, name in enumerate(module.NAMES):
        lengths = [len(one["tokens"]) for one in trained if one["source"] == source]
        truth[f"train_{name}/samples_seen"] = len(lengths)
        truth[f"train_{name}/tokens_seen"] = sum(lengths)
    return {"logs": logs, "truth": truth, "evaluation": module.evaluate(made, model)}


def read_by(made: Accelerator) -> list[tuple[list[int], float]]:
    """Return, for datasets of each length, what has weight 1 over ranks, and what was read."""
    results = []
    for length in LENGTHS:
        aggregator = MetricsAggregator()
        counted: list[int] = []
        for batch in made.prepare(loader(samples(length))):
            aggregator.update(batch.pop("metrics"))
            weights = sample_weights(made, len(batch["i"]))
            counted += batch["i"][weights > 0].tolist()
        everyone: list[Any] = [None, None]
        dist.all_gather_object(everyone, counted)
        seen = aggregator.get_metrics_for_logging()["data_a/samples_seen"]
        results.append((sorted(everyone[0] + everyone[1]), seen))
    return results


def read_by_a_sampler(rank: int) -> list[tuple[list[int], float]]:
    """Do the same with torch's own sampler, and the rule that the documentation gives for it."""
    results = []
    for length in LENGTHS:
        data = samples(length)
        aggregator = MetricsAggregator()
        counted: list[int] = []
        at = 0
        for batch in loader(data, sampler=DistributedSampler(data, 2, rank)):
            aggregator.update(batch.pop("metrics"))
            size = len(batch["i"])
            places = torch.arange(at, at + size) * 2 + rank
            at += size
            counted += batch["i"][places < length].tolist()
        everyone: list[Any] = [None, None]
        dist.all_gather_object(everyone, counted)
        seen = aggregator.get_metrics_for_logging()["data_a/samples_seen"]
        results.append((sorted(everyone[0] + everyone[1]), seen))
    return results


def read_streams(made: Accelerator) -> dict[str, Any]:
    import datasets

    from metricfold.integrations.datasets import with_metrics

    rows = {"tokens": [[1] * (i + 1) for i in range(9)], "i": list(range(9))}
    stream = datasets.Dataset.from_dict(rows).to_iterable_dataset(num_shards=3)
    stream = with_metrics(stream, DefaultTrainingMetricTransform(), "a")
    aggregator = MetricsAggregator()
    kept = 0.0
    for batch in made.prepare(loader(stream)):
        aggregator.update(batch.pop("metrics"))
        kept += sample_weights(made, len(batch["i"])).sum().item()
    aggregator.record("kept", kept, "sum")
    results = aggregator.get_metrics_for_logging(prefix="d")
    error = ""
    for batch in made.prepare(loader(Stream())):
        try:
            sample_weights(made, len(batch["i"]))
        except ValueError as caught:
            error = str(caught)
    return {"kept": results["d/kept"], "tokens": results["d_a/tokens_seen"], "error": error}


def test_the_example_counts_what_it_trained_on(two: Any) -> None:
    _, ranks = two
    *_, (step, metrics) = ranks[0]["example"]["logs"][0]
    assert step == UPDATES
    truth = ranks[0]["example"]["truth"]
    assert len(truth) == 4
    assert {key: metrics[key] for key in truth} == truth
    losses = [metrics["train/loss"] for _, metrics in ranks[0]["example"]["logs"][0]]
    assert losses[-1] < losses[0] - 1


def test_a_resumed_training_logs_what_one_without_a_break_does(two: Any) -> None:
    _, ranks = two
    whole, resumed = ranks[0]["example"]["logs"]
    assert [step for step, _ in whole] == [4, 8, 12]
    for (step, metrics), (again, after) in zip(whole, resumed, strict=True):
        assert step == again
        assert after == pytest.approx(metrics, rel=1e-12)


def test_the_trackers_have_what_the_log_has(two: Any) -> None:
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    folder, ranks = two
    events = EventMultiplexer().AddRunsFromDirectory(str(folder / "mixture")).Reload()
    (run,) = events.Runs()
    shown = {event.step: event.value for event in events.Scalars(run, "train_docs/loss")}
    logged = {step: metrics["train_docs/loss"] for step, metrics in ranks[0]["example"]["logs"][0]}
    assert shown == pytest.approx(logged, rel=1e-6)


def test_what_rules_find_stops_both_ranks_after_the_same_step(two: Any) -> None:
    _, ranks = two
    assert [rank["stopped"] for rank in ranks] == [(4, [("a", 1, 3)])] * 2


def test_an_evaluation_is_that_of_each_text_by_itself(two: Any) -> None:
    for rank in two[1]:
        results = rank["example"]["evaluation"]
        assert results["ours"] == pytest.approx(results["the truth, text by text"], rel=1e-6)
        for name in ("gather(loss).mean()", "gather_for_metrics(loss.repeat(n))"):
            assert results[f"theirs: {name}"] != pytest.approx(results["ours"], rel=1e-4)
        assert (results["samples read"], results["samples held out"]) == (80, 77)


@pytest.mark.parametrize("how", ["even", "uneven", "split", "sampler"])
def test_each_sample_has_weight_once_whatever_fills_up_the_batches(two: Any, how: str) -> None:
    for rank in two[1]:
        for length, (counted, _) in zip(LENGTHS, rank[how], strict=True):
            assert counted == list(range(length))


def test_what_is_read_twice_counts_twice_in_the_metrics_of_samples(two: Any) -> None:
    read = {how: [seen for _, seen in two[1][0][how]] for how in ("even", "uneven", "sampler")}
    assert read["even"] == [-(-length // 8) * 8 for length in LENGTHS]
    assert read["uneven"] == list(LENGTHS)
    assert read["sampler"] == [length + length % 2 for length in LENGTHS]


def test_a_stream_of_several_shards_is_read_once(two: Any) -> None:
    for rank in two[1]:
        assert rank["stream"]["kept"] == 9
        assert rank["stream"]["tokens"] == sum(range(1, 10))
        assert "the dataset has no length" in rank["stream"]["error"]


# -- One process -----------------------------------------------------------------------------------


def test_a_checkpoint_holds_what_accumulators_had_taken_in(tmp_path: Path) -> None:
    made = accelerator()
    aggregator, accumulator = MetricsAggregator(), DeviceAccumulator({"loss": "mean"})
    register(made, aggregator, accumulator)
    aggregator.record("steps", 1, "sum")
    accumulator.update("loss", torch.tensor([1.0, 3.0]))
    made.save_state(tmp_path)
    aggregator.record("steps", 5, "sum")
    accumulator.update("loss", torch.tensor([100.0]))
    made.load_state(tmp_path)
    accumulator.update("loss", torch.tensor([8.0]))
    aggregator.drain(accumulator)
    assert aggregator.get_metrics_for_logging("d") == {"d/steps": 1.0, "d/loss": 4.0}


def test_loaders_that_dispatch_batches_are_refused_with_what_to_set() -> None:
    what_to_set = r"DataLoaderConfiguration\(dispatch_batches=False\)"
    with pytest.raises(ValueError, match=what_to_set):
        register(accelerator(dispatch_batches=True), MetricsAggregator())
    made = accelerator()
    made.prepare(loader(Stream()))
    with pytest.raises(ValueError, match=f"default for iterable datasets.*{what_to_set}"):
        register(made, MetricsAggregator())
    made = accelerator(dispatch_batches=False)
    made.prepare(loader(Stream()))
    register(made, MetricsAggregator())


def test_an_aggregator_is_registered_once() -> None:
    made, aggregator = accelerator(), MetricsAggregator(name="twice")
    register(made, aggregator)
    register(made, MetricsAggregator())
    with pytest.raises(ValueError, match="'twice' is registered with this accelerator already"):
        register(made, aggregator)


def test_a_step_that_was_skipped_leaves_no_metrics() -> None:
    made = Accelerator(cpu=True, gradient_accumulation_steps=2)
    made.scaler = torch.amp.GradScaler("cpu")  # as mixed precision has it on a GPU
    model = torch.nn.Linear(1, 1)
    aggregator, accumulator = MetricsAggregator(), DeviceAccumulator({"loss": "mean"})
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    model, optimizer, batches = made.prepare(model, optimizer, loader(samples(24)))
    skipped = []
    mark, on_device = aggregator.mark(), accumulator.mark()
    for batch in batches:
        aggregator.update(batch.pop("metrics"))
        with made.accumulate(model):
            x = batch["i"][:, None].float()
            x[x == 9] = torch.inf  # in the third batch of six, so in the second of three steps
            loss = model(x).square().mean()
            accumulator.update("loss", loss)
            made.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        if made.sync_gradients:
            skipped.append(made.optimizer_step_was_skipped)
            if skipped[-1]:
                aggregator.rollback(mark)
                accumulator.rollback(on_device)
            mark, on_device = aggregator.mark(), accumulator.mark()
    aggregator.drain(accumulator)
    results = aggregator.get_metrics_for_logging("d")
    assert skipped == [False, True, False]
    assert results["d_a/samples_seen"] == 16
    assert results["d_a/tokens_seen"] == sum(range(1, 25)) - sum(range(9, 17))
    assert torch.isfinite(torch.tensor(results["d/loss"]))


def test_weights_are_of_the_batch_at_hand() -> None:
    made = accelerator()
    with pytest.raises(RuntimeError, match="inside the loop over a loader"):
        sample_weights(made, 4)
    for batch in made.prepare(loader(samples(9))):
        assert sample_weights(made, len(batch["i"])).tolist() == [1.0] * len(batch["i"])


class Kept(GeneralTracker):
    name = "kept"
    requires_logging_directory = False

    def __init__(self, failures: int = 0) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []
        self.failures = failures

    @property
    def tracker(self) -> Any:
        return self.rows

    @on_main_process
    def log(self, values: dict[str, float], step: int | None = None, **_: Any) -> None:
        if self.failures:
            self.failures -= 1
            raise OSError("the disk is full")
        self.rows.append((step, dict(values)))


def test_a_tracker_that_fails_once_gets_the_record_again_and_the_others_do_not() -> None:
    steady, failing = Kept(), Kept(failures=1)
    made = Accelerator(cpu=True, log_with=[steady, failing])
    made.init_trackers("run")
    with MetricsLogger([TrackerSink(made, select="*/loss", key_format="mine/{key}")]) as logger:
        for step in (1, 2):
            logger.log(step, {"a/loss": 0.5 / step, "a/other": 1.0})
    rows = [(1, {"mine/a/loss": 0.5}), (2, {"mine/a/loss": 0.25})]
    assert steady.rows == rows
    assert failing.rows == rows


class Picky(Kept):
    """Takes no row that holds `refuses`, as a server that checks a batch as a whole does."""

    name = "picky"

    def __init__(self, refuses: str, error: BaseException) -> None:
        super().__init__()
        self.refuses = refuses
        self.error = error
        self.calls = 0

    @on_main_process
    def log(self, values: dict[str, float], step: int | None = None, **_: Any) -> None:
        self.calls += 1
        if self.refuses in values:
            raise self.error
        self.rows.append((step, dict(values)))


@pytest.mark.parametrize("error", [RuntimeError("HTTP 400"), ValueError("a bad name")])
def test_a_name_that_one_tracker_refuses_costs_that_name_there_and_nothing_else(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    """Before, this tracker got no more records; then what it left out was said, but not counted."""
    steady, picky = Kept(), Picky("bad@name", error)
    made = Accelerator(cpu=True, log_with=[steady, picky])
    made.init_trackers("run")
    with MetricsLogger([TrackerSink(made)]) as logger:
        for step in range(3):
            logger.log(step, {"loss": float(step), "bad@name": 1.0, "lr": 0.5})
    assert steady.rows == [(n, {"loss": float(n), "bad@name": 1.0, "lr": 0.5}) for n in range(3)]
    written: dict[int, dict[str, float]] = {}
    for step, row in picky.rows:
        assert step is not None
        written.setdefault(step, {}).update(row)
    assert written == {n: {"loss": float(n), "lr": 0.5} for n in range(3)}
    assert picky.calls == 1 + 4 + 1 + 2, "and what is known is not asked again"
    (*_, table) = [one.getMessage() for one in caplog.records if one.name == "metricfold"]
    assert "TrackerSink('picky'): 3 written, 0 skipped, 0 lost" in table
    assert f"3 x without 'bad@name', steps 0 to 2: {error!r}" in table


def test_a_value_that_a_tracker_refuses_costs_that_value(caplog: pytest.LogCaptureFixture) -> None:
    class Finite(Kept):
        def log(self, values: dict[str, float], step: int | None = None, **_: Any) -> None:
            if not all(math.isfinite(one) for one in values.values()):
                raise ValueError("NaN is no JSON")
            super().log(values, step)

    tracker = Finite()
    made = Accelerator(cpu=True, log_with=[tracker])
    made.init_trackers("run")
    with MetricsLogger([TrackerSink(made)]) as logger:
        for step, loss in enumerate((1.0, math.nan, 3.0)):
            logger.log(step, {"loss": loss, "lr": 0.5})
    assert [row.get("loss") for _, row in tracker.rows if row.keys() != {"lr"}] == [1.0, 3.0]
    assert [step for step, row in tracker.rows if "lr" in row] == [0, 1, 2]


def test_a_tracker_that_is_away_holds_up_no_other(caplog: pytest.LogCaptureFixture) -> None:
    steady, away = Kept(), Kept(failures=3)
    away.name = "away"
    made = Accelerator(cpu=True, log_with=[away, steady])
    made.init_trackers("run")
    with MetricsLogger([TrackerSink(made)]) as logger:
        for step in range(3):
            logger.log(step, {"loss": float(step)})
        deadline = time.monotonic() + 30
        while len(steady.rows) < 3 and time.monotonic() < deadline:
            time.sleep(0.005)
        assert len(away.rows) < 3, "it has not come back yet"
    assert steady.rows == away.rows == [(step, {"loss": float(step)}) for step in range(3)]


def test_mlflow_gets_what_is_logged_in_the_run_of_init_trackers(tmp_path: Path) -> None:
    """Before, it went to a run of its own: MLflow's active run belongs to a thread."""
    code = """
import sys
import mlflow
from accelerate import Accelerator
from metricfold import MetricsAggregator, MetricsLogger
from metricfold.integrations.accelerate import TrackerSink
accelerator = Accelerator(cpu=True, log_with="mlflow", project_dir=".")
accelerator.init_trackers("demo")
mine = mlflow.active_run().info.run_id
aggregator = MetricsAggregator()
with MetricsLogger([TrackerSink(accelerator)]) as logger:
    for step in (10, 20):
        aggregator.record("loss", step / 10)
        logger.log(step, aggregator, prefix="val", extra={"bad@name": 1.0})
accelerator.end_training()
client = mlflow.MlflowClient()
(run,) = [
    run for experiment in client.search_experiments()
    for run in client.search_runs([experiment.experiment_id])
]
assert run.info.run_id == mine and run.info.status == "FINISHED"
print([(one.step, one.value) for one in client.get_metric_history(mine, "val/loss")])
"""
    pytest.importorskip("mlflow")
    environment = {
        **os.environ,
        "MLFLOW_TRACKING_URI": f"file:{tmp_path}/mlruns",
        "MLFLOW_ALLOW_FILE_STORE": "true",
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[(10, 1.0), (20, 2.0)]"


def test_a_sink_without_trackers_says_what_to_do(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match=r"Accelerator\(log_with='tensorboard'"):
        TrackerSink(Accelerator(cpu=True))
    sink = TrackerSink(Accelerator(cpu=True, log_with=Kept()))
    with caplog.at_level(logging.WARNING, "metricfold"):
        sink.rewind(3)
    assert "cannot take back steps" in caplog.text
    assert "after step 3" in caplog.text
    with pytest.raises(RuntimeError, match=r"call accelerator\.init_trackers\(\)"):
        sink.write(record())


def record() -> Any:
    from metricfold.sinks.record import Record

    return Record(step=1, wall_time=0.0, metrics={"a/loss": 1.0})
