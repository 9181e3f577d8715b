"""The Trainer of HF Transformers with `MetricfoldMixin`, in real trainings on one and two ranks."""

from __future__ import annotations

import gc
import json
import os
import pydoc_data.topics
import random
import runpy
import textwrap
import time
from contextlib import nullcontext
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks

if not all(map(find_spec, ("transformers", "accelerate", "datasets"))):  # to import takes seconds
    pytest.skip("needs transformers, accelerate and datasets", allow_module_level=True)

from metricfold import (
    DefaultTrainingMetricTransform,
    Metric,
    MetricsAggregator,
    MetricsCollator,
    MetricTransform,
    NonFinite,
)
from metricfold.data import metrics_of
from metricfold.data.origin import ORIGINS
from metricfold.integrations.transformers import CHECKPOINT_FILE, MetricfoldMixin
from metricfold.torch import DeviceAccumulator

PAD = 256
UNEVEN = 7  # samples of the evaluation: two ranks of 2 a batch need 8
SAVED, STEPS = 4, 9  # of 12 steps in an epoch; logs are at 3, 6 and 9


# -- Data, model, trainer --------------------------------------------------------------------------


def tagged(texts: list[str], name: str) -> list[dict[str, Any]]:
    transform = DefaultTrainingMetricTransform()
    transform.set_dataset_name(name)
    return [transform({"input_ids": [*text.encode()[:48]]}) for text in texts if len(text) > 4]


def mixture() -> list[dict[str, Any]]:
    """Return 101 samples of two datasets, of 5 to 48 bytes."""
    topics = pydoc_data.topics.topics
    docs = [part for name in sorted(topics)[:9] for part in topics[name].split("\n")]
    code = Path(textwrap.__file__).read_text().split("\n\n")
    samples = tagged(docs, "docs")[:61] + tagged(code, "code")[:40]
    random.Random(0).shuffle(samples)
    assert len(samples) == 101
    return samples


def pad(samples: list[dict[str, Any]]) -> dict[str, Any]:
    ids = [torch.tensor(sample["input_ids"]) for sample in samples]
    ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=PAD)
    labels = ids.where(ids.ne(PAD), -100)
    return {"input_ids": ids, "attention_mask": ids.ne(PAD), "labels": labels}


def model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=PAD,
    )
    return LlamaForCausalLM(config)


def arguments(folder: Path, **changes: Any) -> Any:
    from transformers import TrainingArguments

    return TrainingArguments(
        str(folder),
        **{
            "remove_unused_columns": False,
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "max_steps": STEPS,
            "logging_steps": 3,
            "save_strategy": "no",
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "ddp_find_unused_parameters": False,
            **changes,
        },
    )


def reference(model: Any, samples: list[dict[str, Any]], ledger: dict[str, float]) -> None:
    """Add to `ledger` what samples have to say, looked at one by one."""
    for sample in samples:
        ids = torch.tensor(sample["input_ids"])
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, :-1].double()
        losses = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum")
        dataset = sample["metrics"][0].dataset_name
        for name in (dataset, "all"):
            for key, value in (
                ("samples_seen", 1),
                ("tokens_seen", len(ids)),
                ("loss_sum", losses.item()),
                ("loss_count", len(ids) - 1),
            ):
                ledger[f"{name}/{key}"] = ledger.get(f"{name}/{key}", 0.0) + value


def plain_class() -> type:
    from transformers import Trainer

    class Plain(MetricfoldMixin, Trainer):
        pass

    return Plain


def trainer_class() -> type:
    class Ledgered(plain_class()):  # type: ignore[misc]
        """A Trainer that keeps account of what it consumes, by other means."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.ledger: dict[str, float] = {}
            self.seen: list[bytes] = []

        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            texts = [bytes(row[row < PAD].tolist()) for row in inputs["input_ids"]]
            self.seen += texts
            by_text = {bytes(sample["input_ids"]): sample for sample in mixture()}
            reference(self.model, [by_text[text] for text in texts], self.ledger)
            return super().training_step(model, inputs, *args, **kwargs)

    return Ledgered


def make(folder: Path, *, of: Any = None, **changes: Any) -> Any:
    samples = mixture()
    own = ("train_dataset", "data_collator", "stop_on")
    given = {key: changes.pop(key) for key in own if key in changes}
    return (of or trainer_class())(
        model(),
        arguments(folder, **changes),
        **{"train_dataset": samples[UNEVEN:], "data_collator": pad, **given},
        eval_dataset=samples[:UNEVEN],
        loss_per_dataset=True,
    )


def merged(ledgers: list[dict[str, float]]) -> dict[str, float]:
    """Return what all ranks and runs together should report."""
    total: dict[str, float] = {}
    for ledger in ledgers:
        for key, value in ledger.items():
            total[key] = total.get(key, 0.0) + value
    for name in ("docs", "code", "all"):
        total[f"{name}/loss"] = total.pop(f"{name}/loss_sum") / total.pop(f"{name}/loss_count")
    return total


def agree(logged: dict[str, float], expected: dict[str, float], prefix: str = "") -> None:
    for key, value in expected.items():
        tolerance = 1e-6 if key.endswith("loss") else 0.0
        assert logged[prefix + key] == pytest.approx(value, rel=tolerance, abs=0), key


# -- Two ranks, one launch -------------------------------------------------------------------------


class Stream(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Any:
        return iter(mixture()[:24])


def arrow_mixture() -> Any:
    from datasets import Dataset, interleave_datasets

    from metricfold.integrations.datasets import with_metrics

    parts = []
    for name in ("docs", "code"):
        of_name = [one for one in mixture() if one["metrics"][0].dataset_name == name]
        rows = Dataset.from_list([{"input_ids": one["input_ids"]} for one in of_name])
        parts.append(with_metrics(rows, DefaultTrainingMetricTransform(), name))
    return interleave_datasets(parts)


def restored(storage: Any, location: str) -> Any:
    return storage if location.startswith("cpu:") else None


def on_two_ranks(rank: int, folder: Path) -> dict[str, Any]:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # asked for, though we have a group
    # Where ranks train on CPUs, Trainers before 5 load their optimizer to "cpu:0", of which torch knows nothing.
    torch.serialization.register_package(99, lambda storage: None, restored)
    trainer_class()
    gc.freeze()  # each training collects garbage, and would look at all that was imported
    saving = {"save_strategy": "steps", "save_steps": SAVED}
    evaluating = {"eval_strategy": "steps", "eval_steps": SAVED, "load_best_model_at_end": True}

    whole = make(
        folder / "whole",
        **saving,
        **evaluating,
        report_to="tensorboard",
        include_num_input_tokens_seen="all",
    )
    output = whole.train()
    history = [*whole.state.log_history]
    told = {"loss": 3.0, "of": "one rank"}
    if rank == 0:
        whole.log(told)  # not the Trainer's own: no other rank takes part
    evaluation: dict[str, float] = {}
    reference(whole.model, whole.eval_dataset, evaluation)

    resumed = make(folder / "resumed", **evaluating, **saving, save_total_limit=2)
    resumed.train(resume_from_checkpoint=str(folder / f"whole/checkpoint-{SAVED}"))

    plain = make(folder / "plain", max_steps=6, dataloader_num_workers=1)
    plain._loss, plain.compute_loss_func = None, None  # as without loss_per_dataset
    plain.train()

    arrow = make(folder / "arrow", train_dataset=arrow_mixture(), max_steps=3)
    arrow.train()

    iterable = make(
        folder / "iterable",
        train_dataset=Stream(),
        max_steps=3,
        accelerator_config={"dispatch_batches": False},
    )
    iterable.train()

    from transformers import DataCollatorWithFlattening

    flat = make(folder / "flat", of=plain_class(), data_collator=DataCollatorWithFlattening())
    flattened: dict[str, float] = {}
    reference(flat.model, flat.eval_dataset, flattened)

    class Spoiled(plain_class()):  # type: ignore[misc]
        """Rank 1 has a NaN in its fourth step."""

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            bad = (self.state.global_step, rank) == (3, 1)
            self.aggregator.record("reward", float("nan") if bad else 1.0, dataset="code")
            return super().training_step(*args, **kwargs)

    stopped = make(folder / "stopped", of=Spoiled, stop_on="warning")
    stopped.aggregator.alert_on(NonFinite("*/reward", "warning"))
    with pytest.warns(RuntimeWarning, match="stops at step 6") if rank == 0 else nullcontext():
        stopped.train()
    return {
        "stopped": (
            stopped.state.global_step,
            [(one.dataset, one.name, one.rank, one.step) for one in stopped.alerts],
        ),
        "history": history,
        "output": output.metrics,
        "told": told,
        "best": whole.state.best_model_checkpoint,
        "after": whole.aggregator.reduce().as_dict("train"),
        "evaluated": whole.evaluate(),
        "evaluation": evaluation,
        "flat": (flat.evaluate(), flattened),
        "predicted": whole.predict(mixture()[:UNEVEN]).metrics,
        "ledger": whole.ledger,
        "seen": whole.seen,
        "resumed": resumed.state.log_history,
        "resumed_ledger": resumed.ledger,
        "plain": plain.state.log_history,
        "arrow": arrow.state.log_history,
        "arrow_ledger": arrow.ledger,
        "iterable": iterable.state.log_history,
        "iterable_ledger": iterable.ledger,
    }


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("two")
    return folder, run_ranks(on_two_ranks, 2, folder, timeout=150)


def test_totals_and_losses_of_two_ranks_are_those_counted_sample_by_sample(two: Any) -> None:
    _, ranks = two
    expected = merged([rank["ledger"] for rank in ranks])
    assert expected["all/samples_seen"] == 2 * 2 * 2 * STEPS
    for rank in ranks:
        last = rank["history"][-1]
        agree(last, expected, "train_")
        assert rank["output"]["train_docs/loss"] == last["train_docs/loss"]
    logs = [log for log in ranks[0]["history"] if "docs/loss" in log]
    assert [log["step"] for log in logs] == [3, 6, 9]
    assert [log["all/samples_seen"] for log in logs] == [24, 48, 72]
    assert logs[-1]["num_input_tokens_seen"] >= logs[-1]["all/tokens_seen"]


def test_an_evaluation_counts_each_sample_once_though_ranks_fill_up_their_batches(two: Any) -> None:
    _, ranks = two
    expected = merged([ranks[0]["evaluation"]])
    assert expected["all/samples_seen"] == UNEVEN
    for rank in ranks:
        agree(rank["evaluated"], expected, "eval_")
        agree(rank["predicted"], expected, "test_")
        at_saves = [log for log in rank["history"] if "eval_docs/loss" in log]
        assert [log["step"] for log in at_saves[:2]] == [4, 8]
        assert at_saves[0]["eval_all/tokens_seen"] == expected["all/tokens_seen"]


def test_an_evaluation_in_one_row_leaves_out_the_tokens_that_fill_up(two: Any) -> None:
    pytest.importorskip(
        "transformers", minversion="5", reason="before, samples of a row saw each other"
    )
    for one in two[1]:
        evaluated, ledger = one["flat"]
        agree(evaluated, merged([ledger]), "eval_")


def test_a_resumed_run_reports_what_the_uninterrupted_one_does(two: Any) -> None:
    folder, ranks = two
    for rank in ranks:
        assert len(rank["resumed"]) == len(rank["history"])
        for log, again in zip(rank["history"], rank["resumed"], strict=True):
            ours = {key: value for key, value in log.items() if "/" in key}
            assert {key: again[key] for key in ours} == ours
        assert rank["resumed_ledger"]["all/samples_seen"] == 2 * 2 * (STEPS - SAVED)
    saved = [*folder.glob("whole/checkpoint-*"), *folder.glob("resumed/checkpoint-*")]
    assert len(saved) == 3 + 2
    assert all((checkpoint / CHECKPOINT_FILE).exists() for checkpoint in saved)


def test_loading_the_best_model_leaves_the_metrics_at_the_end(two: Any) -> None:
    _, ranks = two
    for rank in ranks:
        assert rank["best"] is not None
        assert (
            rank["after"]["train_docs/samples_seen"]
            == (rank["history"][-1]["train_docs/samples_seen"])
        )


def test_what_rules_find_stops_both_ranks_after_the_same_step(two: Any) -> None:
    _, ranks = two
    assert [rank["stopped"] for rank in ranks] == [(6, [("code", "reward", 1, 6)])] * 2


def test_a_log_that_one_rank_makes_goes_by_untouched(two: Any) -> None:
    _, ranks = two
    assert {key for key in ranks[0]["told"] if "/" in key} == set()
    assert ranks[0]["told"]["of"] == "one rank"


def test_the_loss_that_trains_the_model_stays_what_it_was(two: Any) -> None:
    _, ranks = two
    with_it = [log["loss"] for log in ranks[0]["history"] if "grad_norm" in log]
    without = [log["loss"] for log in ranks[0]["plain"] if "grad_norm" in log]
    assert without == pytest.approx(with_it[:2], rel=1e-6)
    assert not any("docs/loss" in log for log in ranks[0]["plain"])
    assert ranks[0]["plain"][-1]["train_docs/tokens_seen"] > 0


@pytest.mark.parametrize("kind", ["arrow", "iterable"])
def test_datasets_of_other_kinds_count_what_was_consumed(two: Any, kind: str) -> None:
    _, ranks = two
    expected = merged([rank[f"{kind}_ledger"] for rank in ranks])
    assert expected["all/samples_seen"] == 24
    agree(ranks[0][kind][-1], expected, "train_")


def test_tensorboard_shows_what_the_trainer_logged(two: Any) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, ranks = two
    events = next(folder.glob("whole/runs/**/events*"))
    read = EventAccumulator(str(events.parent))
    read.Reload()
    logged = [log["docs/loss"] for log in ranks[0]["history"] if "docs/loss" in log]
    shown = read.Scalars("train/docs/loss")
    assert [event.step for event in shown] == [3, 6, 9]
    assert [event.value for event in shown] == pytest.approx(logged, rel=1e-6)
    assert read.Scalars("eval/code/loss")[0].step == SAVED


# -- One rank --------------------------------------------------------------------------------------


def test_a_checkpoint_of_two_ranks_goes_on_exactly_on_one(two: Any, tmp_path: Path) -> None:
    pytest.importorskip(
        "transformers", minversion="5", reason="before, batches were as in the checkpoint"
    )
    folder, ranks = two
    # As many samples a step, so that the sampler deals the same ones.
    one = make(tmp_path, per_device_train_batch_size=4)
    one.train(resume_from_checkpoint=str(folder / f"whole/checkpoint-{SAVED}"))
    whole, last = ranks[0]["history"][-1], one.state.log_history[-1]
    counted = {key: value for key, value in whole.items() if "_seen" in key and "/" in key}
    assert len(counted) == 6
    assert {key: last[key] for key in counted} == counted
    for name in ("docs", "code", "all"):
        assert last[f"train_{name}/loss"] == pytest.approx(whole[f"train_{name}/loss"], rel=1e-5)
        assert last[f"train_{name}/seq_len_stat_max"] == whole[f"train_{name}/seq_len_stat_max"]


def test_training_anew_starts_from_nothing(tmp_path: Path) -> None:
    trainer = make(tmp_path, max_steps=2, data_collator=MetricsCollator(pad))
    trainer.aggregator = MetricsAggregator(name="mine")
    trainer.aggregator.derive("perplexity", lambda metrics: float(np.exp(metrics["loss"])))
    for _ in range(2):
        trainer.train()
        last = trainer.state.log_history[-1]
        assert last["train_all/samples_seen"] == 8
        assert last["train_docs/perplexity"] == pytest.approx(np.exp(last["train_docs/loss"]))
    with pytest.warns(RuntimeWarning, match=r"holds no metricfold.json.*start from nothing"):
        trainer._load_metrics(tmp_path / CHECKPOINT_FILE)
    (tmp_path / CHECKPOINT_FILE).write_text(json.dumps(trainer.aggregator.state_dict())[:-9])
    with pytest.raises(ValueError, match=r"metricfold.json' is damaged .* another checkpoint"):
        trainer._load_metrics(tmp_path / CHECKPOINT_FILE)


def test_a_training_without_metrics_is_warned_about_once(tmp_path: Path) -> None:
    """Nobody said so: with_metrics() forgotten, the log was without them and without a word."""
    trainer = plain_class()(
        model(),
        arguments(tmp_path, logging_steps=1),
        data_collator=pad,
        train_dataset=bare_mixture(),
    )
    with pytest.warns(RuntimeWarning, match="no metrics to log: let samples carry some") as said:
        trainer.train()
    assert len([one for one in said if "no metrics to log" in str(one.message)]) == 1


def bare_mixture() -> list[dict[str, Any]]:
    return [{"input_ids": sample["input_ids"]} for sample in mixture()]


class Unread(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Samples of which nobody knows what they carry until one is read."""

    def __init__(self, samples: list[dict[str, Any]]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.samples[index]


@pytest.mark.parametrize("kind", ["list", "arrow"])
def test_evaluation_sets_without_metrics_are_said_at_construction(
    tmp_path: Path, kind: str
) -> None:
    """They were silently left out of all logs; with loss_per_dataset the first evaluation failed."""

    def made(train: Any, evaluate: Any, **changes: Any) -> Any:
        return plain_class()(
            model(),
            arguments(tmp_path),
            data_collator=pad,
            train_dataset=train,
            eval_dataset=evaluate,
            **changes,
        )

    bare: Any = bare_mixture()[:UNEVEN]
    tagged_ones: Any = mixture()
    if kind == "arrow":
        from datasets import Dataset

        bare, tagged_ones = Dataset.from_list(bare), arrow_mixture()
    with pytest.warns(
        RuntimeWarning, match=r"samples of eval_dataset\['b'\] carry no metrics, while"
    ):
        made(tagged_ones, {"a": tagged_ones, "b": bare})
    with pytest.warns(
        RuntimeWarning, match="of train_dataset carry no metrics, while those of eval"
    ):
        made(bare, tagged_ones)
    with pytest.raises(ValueError, match=r"loss_per_dataset=True, but the samples of eval_dataset"):
        made(tagged_ones, bare, loss_per_dataset=True)
    made(bare, bare)
    made(tagged_ones, None)


def test_an_evaluation_that_brings_nothing_is_said_once(tmp_path: Path) -> None:
    trainer = plain_class()(
        model(),
        arguments(tmp_path, max_steps=2, logging_steps=1, eval_strategy="steps", eval_steps=1),
        data_collator=pad,
        train_dataset=mixture(),
        eval_dataset=Unread(bare_mixture()[:UNEVEN]),
    )
    with pytest.warns(RuntimeWarning, match=r"no metrics, while training does \(eval_") as said:
        trainer.train()
    assert len([one for one in said if "an evaluation has" in str(one.message)]) == 1


def slow_compute_metrics(prediction: Any) -> dict[str, float]:
    """Count an evaluation's samples, under a name that a total has, after a while."""
    time.sleep(0.05)
    return {"all/samples_seen": -1.0, "docs/mine": 2.0}


def test_one_dataset_has_its_totals_and_what_the_trainer_has_stays(tmp_path: Path) -> None:
    docs = [one for one in mixture() if one["metrics"][0].dataset_name == "docs"]
    trainer = plain_class()(
        model(),
        arguments(tmp_path, max_steps=4, logging_steps=2, eval_strategy="steps", eval_steps=2),
        data_collator=pad,
        train_dataset=docs[UNEVEN:],
        eval_dataset=docs[:UNEVEN],
        compute_metrics=slow_compute_metrics,
    )
    began = time.perf_counter()
    with pytest.warns(RuntimeWarning, match="'eval_all/samples_seen' is the Trainer's own") as said:
        trainer.train()
    measured = time.perf_counter() - began
    assert len([one for one in said if "the Trainer's own" in str(one.message)]) == 1
    logs = trainer.state.log_history
    training = [log for log in logs if "learning_rate" in log]
    assert [log["all/samples_seen"] for log in training] == [8, 16]
    assert all(log["all/samples_seen"] == log["docs/samples_seen"] for log in training)
    evaluations = [log for log in logs if "eval_docs/mine" in log]
    assert [log["eval_all/samples_seen"] for log in evaluations] == [-1.0, -1.0]
    assert [log["eval_docs/samples_seen"] for log in evaluations] == [UNEVEN, UNEVEN]
    assert logs[-1]["train_all/samples_seen"] == 16
    # An evaluation is a pause in the time of training.
    assert trainer.aggregator.reduce().run_seconds <= measured - 2 * 0.05


def test_totals_are_those_that_are_asked_for_and_a_dataset_named_all_keeps_its_name(
    tmp_path: Path,
) -> None:
    texts = [*pydoc_data.topics.topics["if"].split("\n")]
    samples = tagged(texts, "all") + tagged(texts, "code/a") + tagged(texts, "code/b")
    given = {"data_collator": pad, "train_dataset": samples}
    trainer = plain_class()(model(), arguments(tmp_path, max_steps=1), rollup="levels", **given)
    for place, name in enumerate(("all", "code/a", "code/b")):
        trainer.aggregator.record("place", place, dataset=name)
    with pytest.warns(RuntimeWarning, match="'train_all/place' is of a dataset named 'all'"):
        trainer.log({"train_runtime": 1.0})
    logged = trainer.state.log_history[-1]
    assert {key: logged[key] for key in logged if "place" in key} == {
        "train_all/place": 0.0,
        "train_code/place": 1.5,
        "train_code/a/place": 1.0,
        "train_code/b/place": 2.0,
    }
    with pytest.raises(ValueError, match="rollup='all': use True"):
        plain_class()(model(), arguments(tmp_path), rollup="all", **given)


def test_accumulators_of_the_users_own_are_read_at_logs_and_evaluations(tmp_path: Path) -> None:
    class Own(plain_class()):  # type: ignore[misc]
        def compute_loss(
            self,
            model: Any,
            inputs: Any,
            return_outputs: bool = False,
            num_items_in_batch: Any = None,
        ) -> Any:
            labels, ids = inputs.pop("labels"), inputs.pop("dataset_ids")
            outputs = model(**inputs)
            loss = self.accumulators[0].token_loss(
                outputs.logits[:, :-1],
                labels[:, 1:],
                ids,
                num_items=None  # in evaluations of older Trainers
                if num_items_in_batch is None
                else num_items_in_batch / self.accelerator.num_processes,
            )
            return (loss, outputs) if return_outputs else loss

    def with_ids(samples: list[dict[str, Any]]) -> dict[str, Any]:
        names = [len(sample["input_ids"]) % 2 for sample in samples]
        return {**pad(samples), "dataset_ids": torch.tensor(names)}

    samples = mixture()
    trainer = Own(
        model(),
        arguments(tmp_path, max_steps=2),
        data_collator=with_ids,
        train_dataset=samples[UNEVEN:],
        eval_dataset=samples[:UNEVEN],
    )
    trainer.accumulators = [DeviceAccumulator({"loss": "mean"}, ("even", "odd"))]
    output = trainer.train()
    assert trainer.state.log_history[-1]["train_even/loss"] > 0
    theirs = make(tmp_path, max_steps=2, logging_steps=2)
    theirs.train()
    # Older Trainers log four digits.
    logged = theirs.state.log_history[0]["loss"]
    assert output.training_loss == pytest.approx(logged, rel=1e-6, abs=5e-5)
    ledgers: list[dict[str, float]] = [{}, {}]
    for sample in samples[:UNEVEN]:
        reference(trainer.model, [sample], ledgers[len(sample["input_ids"]) % 2])
    evaluated = trainer.evaluate()
    for name, ledger in zip(("even", "odd"), ledgers, strict=True):
        truth = ledger["all/loss_sum"] / ledger["all/loss_count"]
        assert evaluated[f"eval_{name}/loss"] == pytest.approx(truth, rel=1e-6)


def test_the_example_shows_the_truth_for_each_dataset(tmp_path: Path) -> None:
    example = runpy.run_path(str(Path(__file__).parent.parent / "examples/transformers_mixture.py"))
    main = example["main"]
    main.__globals__.update(STEPS=4, EVERY=2)
    _, rows = main(str(tmp_path))
    assert [name for name, *_ in rows] == [
        f"{phase}, {name}/loss"
        for phase in ("training", "evaluation")
        for name in ("all", "code", "docs")
    ]
    for name, theirs, ours, truth in rows:
        assert ours == pytest.approx(truth, rel=1e-6), name
        assert (theirs is not None) == ("all" in name)
    assert len(example["table"](rows).splitlines()) == 7


def test_gpt2_which_has_no_loss_type_is_a_causal_language_model_too(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

    losses = []
    for loss_per_dataset in (True, False):
        torch.manual_seed(0)
        small = {"vocab_size": 257, "n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2}
        config = GPT2Config(**small, embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0)
        trainer = plain_class()(
            GPT2LMHeadModel(config),
            arguments(tmp_path, max_steps=2, logging_steps=1),
            data_collator=pad,
            train_dataset=mixture(),
            loss_per_dataset=loss_per_dataset,
        )
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history[:-1]])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)

    masked = BertForMaskedLM(
        BertConfig(vocab_size=257, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(ValueError, match="does not go with a model whose loss is not that of"):
        plain_class()(masked, arguments(tmp_path), data_collator=pad, loss_per_dataset=True)


def test_what_would_lose_metrics_is_refused_with_what_to_set(tmp_path: Path) -> None:
    lost = arrow_mixture().select_columns(["input_ids"])
    with pytest.raises(
        ValueError, match=r"train_dataset has lost the column 'metrics'.*'docs', 'code'"
    ):
        make(tmp_path, train_dataset=lost)
    unknown = arrow_mixture()
    for number in {row["metrics"] for row in unknown}:
        del ORIGINS._transforms[number]
    with pytest.raises(
        ValueError, match=r"of dataset 'docs', for which .* remember\(transform, name\)"
    ):
        make(tmp_path, train_dataset=unknown)
    set_it = r'accelerator_config={"dispatch_batches": False}'
    with pytest.raises(ValueError, match=set_it):
        make(tmp_path, accelerator_config={"dispatch_batches": True})
    with pytest.raises(ValueError, match=f"default for iterable datasets.*{set_it}"):
        make(tmp_path, train_dataset=Stream())
    with pytest.raises(ValueError, match=set_it):
        make(tmp_path).evaluate(Stream())


def test_columns_that_the_model_does_not_take_are_removed_after_metrics_are_made(
    tmp_path: Path,
) -> None:
    """`remove_unused_columns=True`, the default, was refused, for it would have removed them as well."""
    from datasets import Dataset

    from metricfold.integrations.datasets import with_metrics

    class Letters(MetricTransform):
        def _generate_metrics(self, sample: Any) -> list[Metric]:
            return [Metric(self.dataset_name, "letters", len(sample["text"]), "sum")]

    class Trainer(plain_class()):  # type: ignore[misc]
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            assert inputs.keys() == {"input_ids", "attention_mask", "labels", "metrics"}
            return super().training_step(model, inputs, *args, **kwargs)

    rows = Dataset.from_dict({"input_ids": [[1, 2, 3]] * 8, "text": ["four"] * 8})
    for train in (
        with_metrics(rows, Letters(), "docs"),
        with_metrics(rows.to_iterable_dataset(), Letters(), "docs"),
        [{**row, "metrics": [Metric("docs", "letters", 4, "sum")]} for row in rows],
    ):
        trainer = make(
            tmp_path,
            of=Trainer,
            train_dataset=train,
            remove_unused_columns=True,
            max_steps=1,
            logging_steps=1,
            accelerator_config={"dispatch_batches": False},
        )
        trainer.train()
        assert trainer.state.log_history[0]["docs/letters"] == 4 * 4


class Widths(MetricTransform):
    def _generate_metrics(self, sample: Any) -> list[Metric]:
        return [Metric(self.dataset_name, "tokens", len(sample["input_ids"]), "sum")]


def three_datasets(*, stream: bool) -> Any:
    from datasets import Dataset, concatenate_datasets

    from metricfold.integrations.datasets import with_metrics

    random_ = random.Random(0)
    parts = []
    for size, name in enumerate(("docs", "code", "chat"), start=3):
        rows = [
            {"input_ids": [random_.randrange(PAD) for _ in range(random_.randint(2, 9))]}
            for _ in range(size)
        ]
        part = Dataset.from_list(rows)
        part = part.to_iterable_dataset() if stream else part
        parts.append(with_metrics(part, Widths(), name))
    return concatenate_datasets(parts)


def first_log(folder: Path, train: Any, collate: Any, **changes: Any) -> dict[str, float]:
    """Return what is logged of all of `train`, by a model that stays as it is."""
    trainer = plain_class()(
        model().double(),
        arguments(
            folder,
            learning_rate=0.0,
            max_steps=4,
            logging_steps=4,
            gradient_accumulation_steps=1,
            per_device_train_batch_size=3,
            remove_unused_columns=True,
            accelerator_config={"dispatch_batches": False},
            **changes,
        ),
        data_collator=collate,
        train_dataset=train,
        loss_per_dataset=True,
    )
    trainer.train()
    return trainer.state.log_history[0]


@pytest.mark.parametrize("stream", [False, True])
def test_the_loss_of_samples_that_stand_in_one_row_is_that_of_each_by_itself(
    tmp_path: Path, stream: bool
) -> None:
    """It was refused, for a batch of one row did not say which samples it was of."""
    pytest.importorskip(
        "transformers", minversion="5", reason="before, samples of a row saw each other"
    )
    from transformers import DataCollatorWithFlattening

    logged = first_log(tmp_path, three_datasets(stream=stream), DataCollatorWithFlattening())
    sums: dict[str, list[float]] = {}
    for sample in three_datasets(stream=stream):
        ids = torch.tensor(sample["input_ids"])
        logits = model().double()(input_ids=ids[None]).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none").tolist()
        (own,) = metrics_of(sample)
        sums.setdefault(own.dataset_name, []).extend(losses)
        assert own.value == len(ids)
    for name, losses in {**sums, "all": [*chain.from_iterable(sums.values())]}.items():
        assert logged[f"{name}/loss"] == pytest.approx(np.mean(losses), rel=1e-6), name
        tokens = sum(
            metrics_of(one)[0].value
            for one in three_datasets(stream=stream)
            if name in ("all", metrics_of(one)[0].dataset_name)
        )
        assert logged[f"{name}/tokens"] == tokens


def test_the_loss_of_packed_rows_is_that_of_their_segments(tmp_path: Path) -> None:
    from metricfold.integrations.datasets import metrics_per_token

    def group(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        joined = {name: [*chain.from_iterable(rows)] for name, rows in batch.items()}
        return {
            name: [all_[i : i + 6] for i in range(0, len(joined["input_ids"]), 6)]
            for name, all_ in joined.items()
        }

    packed = metrics_per_token(three_datasets(stream=False)).map(group, batched=True)
    logged = first_log(tmp_path, packed, pad)
    names = {metric.dataset_name for row in packed for metric in metrics_of(row)}
    origin = {number: name for name in names for number in numbers_of(name)}
    sums: dict[str, list[float]] = {}
    for row in packed:
        ids = torch.tensor(row["input_ids"])
        logits = model().double()(input_ids=ids[None]).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none").tolist()
        for number, loss in zip(row["metrics"][1:], losses, strict=True):
            sums.setdefault(origin[number], []).append(loss)
    for name, losses in {**sums, "all": [*chain.from_iterable(sums.values())]}.items():
        assert logged[f"{name}/loss"] == pytest.approx(np.mean(losses), rel=1e-6), name


def numbers_of(name: str) -> tuple[int, int]:
    """Return what the tokens of a dataset carry."""
    parts = three_datasets(stream=False)
    (number,) = {one["metrics"] for one in parts if metrics_of(one)[0].dataset_name == name}
    return number, ~number


def test_what_does_not_say_the_loss_of_each_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not go with label_smoothing_factor: leave it out"):
        make(tmp_path, label_smoothing_factor=0.1)
    samples = mixture()
    with pytest.raises(ValueError, match=r"a sample carries no metrics, .* MetricTransform"):
        make(tmp_path, train_dataset=Unread(bare_mixture())).train()
    mixed = [{**one, "metrics": [*one["metrics"], *samples[0]["metrics"]]} for one in samples]
    with pytest.raises(ValueError, match=r"a sample carries metrics of 'code', 'docs'"):
        make(tmp_path, train_dataset=mixed).train()

    def cut(given: list[dict[str, Any]]) -> dict[str, Any]:
        return pad([{"input_ids": [id_ for one in given for id_ in one["input_ids"][:5]]}])

    with pytest.raises(ValueError, match=r"2 samples of \d+ tokens were collated to .* \(1, 10\)"):
        make(tmp_path, of=plain_class(), data_collator=cut).train()


def test_the_mixin_stands_before_the_trainer() -> None:
    from transformers import Trainer

    with pytest.raises(TypeError, match=r"write class Wrong\(MetricfoldMixin, Trainer\)"):

        class Wrong(Trainer, MetricfoldMixin):
            pass

    with pytest.raises(TypeError, match="no Trainer by itself"):
        MetricfoldMixin()
