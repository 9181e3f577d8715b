"""Trainings by TRL, all in one process for their import takes seconds: ``python trl_trainings.py FOLDER``.

Prints what each scenario has found, as JSON. Each dataset has words of its own, so any token says of which
dataset it is; and nothing is learnt (the learning rate is 0), so that the truth can be looked up afterwards.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import re
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}  # asks the network nothing

import torch
import trl
from datasets import Dataset, concatenate_datasets, disable_progress_bars
from torch.nn.functional import cross_entropy
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from metricfold import DefaultTrainingMetricTransform, Metric, MetricTransform
from metricfold.integrations.datasets import with_metrics
from metricfold.integrations.transformers import MetricfoldMixin

NAMES = ("docs", "code", "web")
SPECIAL = ["<pad>", "<eos>", "<unk>", "<bos>", "user", "assistant", ":"]
WORDS = 12  # of each dataset
VOCABULARY = [*SPECIAL, *(f"{name}{i}" for name in NAMES for i in range(WORDS))]
FOLDER = Path(sys.argv[1] if len(sys.argv) > 1 else ".")


# -- Data, model, trainer --------------------------------------------------------------------------


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    ids = {word: place for place, word in enumerate(VOCABULARY)}
    words = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    made.chat_template = (
        "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}assistant : {% endif %}"
    )
    return made


def model(cls: Any = LlamaForCausalLM, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return cls(
        LlamaConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=128,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=3,
            num_labels=1,
            initializer_range=0.3,
        )
    )


def text(name: str, words: int, seed: int) -> str:
    draw = torch.randint(WORDS, (words,), generator=torch.Generator().manual_seed(seed))
    return " ".join(f"{name}{int(i)}" for i in draw)


def said(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def of_all(columns: Callable[[str, int], dict[str, Any]], stream: bool = False) -> Any:
    """Return 5, 6 and 7 samples of three datasets, put together, as samples with metrics."""
    parts = []
    for which, name in enumerate(NAMES):
        rows = Dataset.from_list([columns(name, 100 * which + i) for i in range(5 + which)])
        rows = rows.to_iterable_dataset() if stream else rows
        parts.append(with_metrics(rows, DefaultTrainingMetricTransform(), name))
    return concatenate_datasets(parts)


def length(seed: int, least: int = 3, most: int = 14) -> int:
    return least + seed * 7919 % (most - least)


FORMATS: dict[str, Callable[[str, int], dict[str, Any]]] = {
    "text": lambda name, i: {"text": text(name, length(i), i)},
    "messages": lambda name, i: {
        "messages": said("user", text(name, 2, i)) + said("assistant", text(name, length(i), i + 1))
    },
    "prompt_completion": lambda name, i: {
        "prompt": text(name, 3, i),
        "completion": " " + text(name, length(i), i + 1),
    },
    "tokenized": lambda name, i: {"input_ids": tokenizer()(text(name, length(i), i))["input_ids"]},
}


def config(cls: Any, **changes: Any) -> Any:
    return cls(
        **{
            "output_dir": str(FOLDER / "run"),
            "learning_rate": 0.0,
            "num_train_epochs": 1,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "logging_steps": 1,
            "report_to": "none",
            "use_cpu": True,
            "bf16": False,
            "save_strategy": "no",
            "disable_tqdm": True,
            "gradient_checkpointing": False,
            **changes,
        }
    )


class SFT(MetricfoldMixin, trl.SFTTrainer):
    pass


class DPO(MetricfoldMixin, trl.DPOTrainer):
    pass


class Reward(MetricfoldMixin, trl.RewardTrainer):
    pass


class KTO(MetricfoldMixin, trl.KTOTrainer):
    pass


class GRPO(MetricfoldMixin, trl.GRPOTrainer):
    pass


def sft(data: Any, cls: Any = SFT, ours: Any = None, **changes: Any) -> Any:
    ours = {"loss_per_dataset": True} if ours is None and cls is SFT else ours or {}
    args = config(trl.SFTConfig, **changes)
    return cls(model=model(), args=args, train_dataset=data, processing_class=tokenizer(), **ours)


def logs(trainer: Any) -> list[dict[str, float]]:
    trainer.train()
    return trainer.state.log_history


# -- The truth -------------------------------------------------------------------------------------


def dataset_of(token: int) -> str:
    return NAMES[(token - len(SPECIAL)) // WORDS]


Ledger = dict[str, float]


def add(ledger: Ledger, of: Any, tokens: list[int], labels: list[int], dft: bool = False) -> None:
    """Add the losses of tokens that the model sees together to those of their datasets."""
    with torch.no_grad():
        logits = of(input_ids=torch.tensor([tokens])).logits[0, :-1].double()
    targets = torch.tensor(labels[1:], dtype=torch.long)
    losses = cross_entropy(logits, targets, reduction="none", ignore_index=-100)
    if dft:
        losses = losses * (-losses).exp()
    name = ""
    for place, token in enumerate(tokens):
        name = dataset_of(token) if token >= len(SPECIAL) else name or first_of(tokens)
        if place and labels[place] != -100:
            for key in (name, "all"):
                ledger[f"{key}/sum"] = ledger.get(f"{key}/sum", 0.0) + losses[place - 1].item()
                ledger[f"{key}/count"] = ledger.get(f"{key}/count", 0.0) + 1


def first_of(tokens: list[int]) -> str:
    return dataset_of(next((token for token in tokens if token >= len(SPECIAL)), len(SPECIAL)))


def means(ledger: Ledger) -> dict[str, float]:
    return {
        key.removesuffix("/sum"): value / ledger[f"{key.removesuffix('/sum')}/count"]
        for key, value in ledger.items()
        if key.endswith("/sum")
    }


def truth(trainer: Any, apart: bool = True, dft: bool = False) -> dict[str, Any]:
    """Return the loss and tokens of each dataset, of the rows that the trainer was given."""
    ledger: Ledger = {}
    tokens: dict[str, int] = {}
    trainer.model.eval()
    for row in trainer.train_dataset:
        for token in row["input_ids"]:
            if token >= len(SPECIAL):
                tokens[dataset_of(token)] = tokens.get(dataset_of(token), 0) + 1
        lengths = row.get("seq_lengths") if apart else None
        begin = 0
        for count in lengths or [len(row["input_ids"])]:
            part = slice(begin, begin + count)
            add(ledger, trainer.model, row["input_ids"][part], row["labels"][part], dft)
            begin += count
    return {"loss": means(ledger), "words": tokens}


def compared(trainer: Any, **how: Any) -> dict[str, Any]:
    history = logs(trainer)
    steps = [log for log in history if "loss" in log]
    end = history[-1]
    return {
        "loss": {name: end[f"train_{name}/loss"] for name in (*NAMES, "all")},
        "tokens_seen": {name: end[f"train_{name}/tokens_seen"] for name in (*NAMES, "all")},
        "samples_seen": {name: end[f"train_{name}/samples_seen"] for name in NAMES},
        "num_tokens": steps[-1]["num_tokens"],
        "off": {  # of TRL's, in any step
            key: max(abs(log[key] - log[f"all/{key}"]) for log in steps)
            for key in ("loss", "entropy", "mean_token_accuracy")
        },
        "truth": truth(trainer, **how),
    }


# -- SFT -------------------------------------------------------------------------------------------


def sft_formats() -> dict[str, Any]:
    return {name: compared(sft(of_all(columns), max_length=8)) for name, columns in FORMATS.items()}


def sft_dft() -> dict[str, Any]:
    changes = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    return compared(sft(of_all(FORMATS["text"]), loss_type="dft", **changes), dft=True)


PACKINGS: dict[str, dict[str, Any]] = {
    "bfd": {"packing": True, "max_length": 12},
    "bfd_split": {"packing": True, "packing_strategy": "bfd_split", "max_length": 12},
    "wrapped": {"packing": True, "packing_strategy": "wrapped", "max_length": 12},
    "shuffled": {"packing": True, "max_length": 12, "shuffle_dataset": True},
    "padding_free": {"padding_free": True, "max_length": None},
}


def sft_packing() -> dict[str, Any]:
    found = {}
    for name, changes in PACKINGS.items():
        changes = {**changes, "per_device_train_batch_size": 2}
        ours = sft(of_all(FORMATS["tokenized"]), **changes)
        plain = sft(of_all(FORMATS["tokenized"]), cls=trl.SFTTrainer, **changes)
        found[name] = {
            **compared(ours, apart=name != "wrapped"),
            "rows": ours.train_dataset["input_ids"] == plain.train_dataset["input_ids"],
        }
    return found


def sft_streams() -> dict[str, Any]:
    found = {}
    for name, changes in (
        ("truncated", {"max_length": 6}),
        ("packed", {"packing": True, "max_length": 12}),
        ("wrapped", {"packing": True, "packing_strategy": "wrapped", "max_length": 13}),
    ):
        steps = 4 if name == "wrapped" else 5  # all of the stream, once
        trainer = sft(of_all(FORMATS["text"], stream=True), max_steps=steps, **changes)
        found[name] = compared(trainer, apart=name != "wrapped")
    return found


# -- Preferences -----------------------------------------------------------------------------------

PAIRS: dict[str, Callable[[str, int], dict[str, Any]]] = {
    "text": lambda name, i: {
        "prompt": text(name, 3, i),
        "chosen": " " + text(name, length(i), i + 1),
        "rejected": " " + text(name, length(i + 3), i + 2),
    },
    "messages": lambda name, i: {
        "prompt": said("user", text(name, 2, i)),
        "chosen": said("assistant", text(name, length(i), i + 1)),
        "rejected": said("assistant", text(name, length(i + 3), i + 2)),
    },
    "implicit": lambda name, i: {  # no prompt: what both sides begin with
        "chosen": text(name, 3, i) + " " + text(name, length(i), i + 1),
        "rejected": text(name, 3, i) + " " + text(name, length(i + 3), i + 2),
    },
}
LONGEST = 10  # of a sequence


def paired(trainer: Any) -> dict[str, Any]:
    steps = [log for log in logs(trainer) if "loss" in log]
    end = trainer.state.log_history[-1]
    own = {key.removeprefix("train_"): value for key, value in end.items() if "/" in key}
    theirs = {key: value for key, value in steps[-1].items() if "docs/" not in key}
    return {"ours": own, "last": theirs, "steps": steps}


def log_probability(of: Any, prompt: list[int], rest: list[int]) -> float:
    tokens = (prompt + rest)[:LONGEST]
    with torch.no_grad():
        logits = of(input_ids=torch.tensor([tokens])).logits[0].double().log_softmax(-1)
    return sum(logits[i - 1, tokens[i]].item() for i in range(len(prompt), len(tokens)))


def dpo() -> dict[str, Any]:
    found = {}
    for name, columns in PAIRS.items():
        args = config(trl.DPOConfig, max_length=LONGEST)
        own, other = model(), model(seed=1)
        trainer = DPO(
            model=own,
            ref_model=other,
            args=args,
            train_dataset=of_all(columns),
            processing_class=tokenizer(),
            loss_per_dataset=True,
        )
        found[name] = paired(trainer)
        own.eval()
        sums: dict[str, list[float]] = {}
        for row in trainer.train_dataset:
            ratio = [
                args.beta
                * (
                    log_probability(own, row["prompt_ids"], row[side])
                    - log_probability(other, row["prompt_ids"], row[side])
                )
                for side in ("chosen_ids", "rejected_ids")
            ]
            loss = -torch.nn.functional.logsigmoid(torch.tensor(ratio[0] - ratio[1])).item()
            sums.setdefault(first_of(row["chosen_ids"]), []).append((loss, *ratio))
        found[name]["truth"] = {
            f"{dataset}/{key}": sum(pair[place] for pair in pairs) / len(pairs)
            for dataset, pairs in sums.items()
            for place, key in enumerate(("loss", "rewards/chosen", "rewards/rejected"))
        }
    return found


def reward() -> dict[str, Any]:
    args = config(trl.RewardConfig, max_length=LONGEST + 8)
    own = model(LlamaForSequenceClassification)
    trainer = Reward(
        model=own,
        args=args,
        train_dataset=of_all(PAIRS["text"]),
        processing_class=tokenizer(),
        loss_per_dataset=True,
    )
    found = paired(trainer)
    own.eval()
    sums: dict[str, list[float]] = {}
    for row in trainer.train_dataset:
        with torch.no_grad():
            worth = [
                own(input_ids=torch.tensor([row[side]])).logits.item()
                for side in ("chosen_ids", "rejected_ids")
            ]
        loss = -torch.nn.functional.logsigmoid(torch.tensor(worth[0] - worth[1])).item()
        right = float(worth[0] > worth[1])
        sums.setdefault(first_of(row["chosen_ids"]), []).append((loss, right, max(worth)))
    found["truth"] = {
        f"{dataset}/{key}": fold([pair[place] for pair in pairs])
        for dataset, pairs in sums.items()
        for place, (key, fold) in enumerate(
            {"loss": mean, "accuracy": mean, "max_reward": max}.items()
        )
    }
    return found


def kto() -> dict[str, Any]:
    def unpaired(name: str, i: int) -> dict[str, Any]:
        return {
            "prompt": text(name, 3, i),
            "completion": " " + text(name, length(i), i + 1),
            "label": i % 3 != 0,
        }

    found = {}
    for name, (columns, loss_type) in {
        "unpaired": (unpaired, "apo_zero_unpaired"),
        "paired": (PAIRS["text"], "apo_zero_unpaired"),
        "divergence": (unpaired, "kto"),
    }.items():
        args = config(trl.KTOConfig, max_length=LONGEST, loss_type=loss_type)
        own, other = model(), model(seed=1)
        trainer = KTO(
            model=own,
            ref_model=other,
            args=args,
            train_dataset=of_all(columns),
            processing_class=tokenizer(),
            loss_per_dataset=True,
        )
        found[name] = paired(trainer)
        own.eval()
        worths: dict[str, list[float]] = {}
        for row in trainer.train_dataset:
            ratio = log_probability(own, row["prompt_ids"], row["completion_ids"])
            ratio -= log_probability(other, row["prompt_ids"], row["completion_ids"])
            worth = torch.tensor(args.beta * ratio)
            loss = (1 - worth.sigmoid() if row["label"] else worth.sigmoid()).item()
            dataset = first_of(row["completion_ids"])
            worths.setdefault(f"{dataset}/loss", []).append(loss)
            side = "chosen" if row["label"] else "rejected"
            worths.setdefault(f"{dataset}/rewards/{side}", []).append(worth.item())
        found[name]["truth"] = {key: mean(values) for key, values in worths.items()}
    return found


# -- Generation ------------------------------------------------------------------------------------


def grpo(data: Any, cls: Any = GRPO, **changes: Any) -> tuple[Any, list[dict[str, Any]]]:
    """Return a trainer of 8 prompts, 2 completions of each, each learnt from twice; and what is scored."""
    scored: list[dict[str, Any]] = []

    def brevity(prompts: Any, completion_ids: Any, **rest: Any) -> list[float]:
        scored.extend(
            {"prompt": prompt, "length": len(ids), "brevity": -float(len(ids))}
            for prompt, ids in zip(prompts, completion_ids, strict=True)
        )
        assert "metrics" not in rest
        return [one["brevity"] for one in scored[-len(prompts) :]]

    def first_word(prompts: Any, completion_ids: Any, **_: Any) -> list[float | None]:
        found = [
            float(ids[0]) if prompt.startswith("docs") else None
            for prompt, ids in zip(prompts, completion_ids, strict=True)
        ]
        for one, value in zip(scored[-len(prompts) :], found, strict=True):
            one["first_word"] = value
        return found

    args = config(
        trl.GRPOConfig,
        **{
            "num_generations": 2,
            "steps_per_generation": 2,
            "num_iterations": 2,
            "max_completion_length": 5,
            "max_steps": 8,
            **changes,
        },
    )
    trainer = cls(
        model=model(),
        reward_funcs=[brevity, first_word],
        args=args,
        train_dataset=data,
        eval_dataset=data.select(range(2, 6)) if isinstance(data, Dataset) else None,
        processing_class=tokenizer(),
    )
    return trainer, scored


def prompts(stream: bool = False) -> Any:
    parts = []
    for which, name in enumerate(NAMES[:2]):
        rows = Dataset.from_list([{"prompt": text(name, 2 + i, 10 * which + i)} for i in range(4)])
        rows = rows.to_iterable_dataset() if stream else rows
        parts.append(with_metrics(rows, DefaultTrainingMetricTransform(), name))
    return concatenate_datasets(parts)


def generated() -> dict[str, Any]:
    found = {}
    for name in ("map-style", "stream"):
        changes = {"accelerator_config": {"dispatch_batches": False}} if name == "stream" else {}
        trainer, scored = grpo(prompts(stream=name == "stream"), **changes)
        history = logs(trainer)
        found[name] = {
            "scored": [*scored],
            "end": history[-1],
            "num_tokens": [log["num_tokens"] for log in history if "num_tokens" in log][-1],
            "theirs": [log["reward"] for log in history if "reward" in log],
        }
        if name == "map-style":
            scored.clear()
            found["evaluation"] = {"end": trainer.evaluate(), "scored": [*scored]}
    return found


def reported() -> dict[str, Any]:
    """Rebuild what users of TRL have reported."""
    found: dict[str, Any] = {}
    # huggingface/trl#5352 (weights of rewards were not logged), #3384 (rewards choose no best model)
    trainer, scored = grpo(
        prompts(),
        reward_weights=[0.5, 2.0],
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        save_only_model=True,
        num_iterations=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_docs/reward_stat_mean",
    )
    history = logs(trainer)
    found["grpo"] = {
        "scored": scored[:8],
        "logged": history[0]["all/reward_stat_mean"],
        "evaluated": [x["eval_docs/reward_stat_mean"] for x in history if "eval_loss" in x],
        "best": trainer.state.best_metric,
    }
    # What is of conversations, and another trainer that generates.
    chat = Dataset.from_list([{"prompt": said("user", text("docs", 2, i))} for i in range(4)])
    args = config(trl.RLOOConfig, beta=0.0, num_generations=2, max_completion_length=4, max_steps=1)
    rloo = RLOO(
        model=model(),
        reward_funcs=lambda completion_ids, **_: [float(len(ids)) for ids in completion_ids],
        args=args,
        train_dataset=with_metrics(chat, DefaultTrainingMetricTransform(), "docs"),
        processing_class=tokenizer(),
    )
    found["rloo"] = logs(rloo)[0]
    # One that scores nothing, and one whose collator hands on any column that there is.
    for name, cls, settings, data, more in (
        (
            "distillation",
            Distillation,
            config(trl.DistillationConfig, max_completion_length=4, max_steps=1),
            prompts(),
            {"teacher_model": model(seed=1)},
        ),
        ("orpo", ORPO, config(ORPOConfig, max_length=64, max_steps=1), of_all(PAIRS["text"]), {}),
    ):
        tok = tokenizer()
        other = cls(model=model(), args=settings, train_dataset=data, processing_class=tok, **more)
        found[name] = logs(other)[0]
    # A dataset of a name that TRL's own metrics begin with.
    pairs = Dataset.from_list([PAIRS["text"]("docs", i) for i in range(8)])
    named = DPO(
        model=model(),
        ref_model=model(seed=1),
        args=config(trl.DPOConfig, max_steps=1),
        train_dataset=with_metrics(pairs, Chosen(), "rewards"),
        processing_class=tokenizer(),
    )
    with warnings.catch_warnings(record=True) as said_of_it:
        warnings.simplefilter("always")
        found["named"] = logs(named)[0]
    found["warned"] = [
        str(one.message) for one in said_of_it if "rewards/chosen" in str(one.message)
    ]
    return found


class RLOO(MetricfoldMixin, trl.RLOOTrainer):
    pass


class Distillation(MetricfoldMixin, trl.DistillationTrainer):
    pass


class ORPO(MetricfoldMixin, ORPOTrainer):
    pass


class Chosen(MetricTransform):
    def _generate_metrics(self, sample: Any) -> list[Metric]:
        return [Metric(str(self.dataset_name), "chosen", 1000, "sum")]


# -- What cannot be, and what need not be ----------------------------------------------------------


def refusals() -> dict[str, Any]:
    data = of_all(FORMATS["text"])
    pairs = of_all(PAIRS["text"])
    plain = Dataset.from_list([FORMATS["text"]("docs", i) for i in range(8)])

    def aot() -> Any:
        args = config(trl.DPOConfig, loss_type=["sigmoid", "aot"])
        return DPO(
            model=model(),
            ref_model=model(),
            args=args,
            train_dataset=pairs,
            processing_class=tokenizer(),
            loss_per_dataset=True,
        )

    def grpo_loss() -> Any:
        args = config(trl.GRPOConfig, num_generations=2)
        return GRPO(
            model=model(),
            reward_funcs=lambda **_: [],
            args=args,
            train_dataset=prompts(),
            processing_class=tokenizer(),
            loss_per_dataset=True,
        )

    def loss_func() -> Any:
        return SFT(
            model=model(),
            args=config(trl.SFTConfig),
            train_dataset=data,
            processing_class=tokenizer(),
            compute_loss_func=lambda *_, **__: None,
            loss_per_dataset=True,
        )

    tries: dict[str, Callable[[], Any]] = {
        "aot": aot,
        "grpo": grpo_loss,
        "compute_loss_func": loss_func,
        "smoothing": lambda: sft(data, label_smoothing_factor=0.1),
        "no metrics": lambda: logs(sft(plain, max_steps=1)),
        "some metrics": lambda: logs(
            sft(concatenate_datasets([plain, data.select(range(3))]), max_steps=3, packing=True)
        ),
        "lost": lambda: sft(
            data.map(lambda row: {"text": row["text"]}, remove_columns=["metrics"])
        ),
    }
    found = {}
    for name, attempt in tries.items():
        try:
            attempt()
            found[name] = "nothing"
        except (ValueError, TypeError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def without_metrics() -> dict[str, Any]:
    """Return the last logs of trainings whose samples have none."""
    found: dict[str, Any] = {}
    plain = Dataset.from_list([FORMATS["text"]("docs", i) for i in range(8)])
    packs = {"packing": True, "max_length": 12}
    found["packed"] = logs(sft(plain, ours={"rollup": True}, max_steps=2, **packs))[-2]
    plain = Dataset.from_list([PAIRS["text"]("docs", i) for i in range(8)])
    args = config(trl.DPOConfig, max_steps=2)
    tok = tokenizer()
    trainer = DPO(
        model=model(), ref_model=model(), args=args, train_dataset=plain, processing_class=tok
    )
    found["dpo"] = logs(trainer)[-2]
    plain = Dataset.from_list([{"prompt": text("docs", 2, i)} for i in range(8)])
    trainer, scored = grpo(plain, max_steps=4)
    found["grpo"] = {**logs(trainer)[0], "scored": scored}
    return found


def precomputed() -> dict[str, Any]:
    """Return what DPO finds where the reference's probabilities are looked up, and columns removed."""
    args = config(trl.DPOConfig, precompute_ref_log_probs=True, remove_unused_columns=True)
    tok = tokenizer()
    data = of_all(PAIRS["text"])
    trainer = DPO(
        model=model(),
        ref_model=model(seed=1),
        args=args,
        train_dataset=data,
        eval_dataset={"all": data, "docs": data.select(range(5))},
        processing_class=tok,
        loss_per_dataset=True,
    )
    return {**paired(trainer), "evaluation": trainer.evaluate()}


# -- The page --------------------------------------------------------------------------------------


def page() -> dict[str, Any]:
    """Run what docs/trl.md says, with what it takes for granted; return what has been trained."""
    given: dict[str, Any] = {
        "docs": Dataset.from_list([FORMATS["text"]("docs", i) for i in range(6)]),
        "code": Dataset.from_list([FORMATS["text"]("code", i) for i in range(6)]),
        "prompts": prompts(),
        "brevity": lambda completion_ids, **_: [-float(len(ids)) for ids in completion_ids],
        "accuracy": lambda completions, **_: [float("docs" in one) for one in completions],
        "tokenizer": tokenizer(),
    }
    small = {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no"}
    small |= {"gradient_checkpointing": False, "max_steps": 1, "logging_steps": 1}
    found = {}
    text = (Path(__file__).parent.parent / "docs/trl.md").read_text("utf-8")
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        # A short step on a CPU is enough.
        block = re.sub(r'Config\("run", ', 'Config(str(FOLDER / "run"), **small, ', block)
        block = block.replace("num_generations=8", "num_generations=8, max_completion_length=5")
        given |= {"model": model(), "small": small, "FOLDER": FOLDER}
        exec(block, given)
        found[type(given["trainer"]).__name__] = given["trainer"].state.log_history[0]
    return found


# -- Two ranks -------------------------------------------------------------------------------------


def rank(number: int, port: int) -> None:
    """Train and evaluate without padding on one of two ranks, and write down what has come of it."""
    os.environ |= {
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    data = of_all(FORMATS["tokenized"])
    args = config(
        trl.SFTConfig,
        padding_free=True,
        max_length=None,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        ddp_backend="gloo",
        ddp_find_unused_parameters=False,
    )
    trainer = SFT(
        model=model(),
        args=args,
        train_dataset=data.select([*range(16)]),
        eval_dataset=data.select([0, 1, 5, 6, 11, 12, 13]),  # 7, where two ranks of 2 need 8
        processing_class=tokenizer(),
        loss_per_dataset=True,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = compared(trainer)
        evaluated = trainer.evaluate()
        found["dpo"] = dpo_of_rank()
        found["grpo"] = grpo_of_rank()
    trainer.train_dataset = trainer.eval_dataset
    found["evaluation"] = {"end": evaluated, "truth": truth(trainer)}
    (FOLDER / f"rank{number}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def dpo_of_rank() -> dict[str, Any]:
    """Train on pairs, of which the ranks have unlike numbers of each dataset."""
    trainer = DPO(
        model=model(),
        ref_model=model(seed=1),
        args=config(
            trl.DPOConfig,
            max_length=LONGEST,
            per_device_train_batch_size=3,
            ddp_backend="gloo",
            ddp_find_unused_parameters=False,
        ),
        train_dataset=of_all(PAIRS["text"]),
        processing_class=tokenizer(),
        loss_per_dataset=True,
    )
    return paired(trainer)


def grpo_of_rank() -> dict[str, Any]:
    """Train on prompts each of which has two completions on each rank."""
    ddp = {"ddp_backend": "gloo", "ddp_find_unused_parameters": False}
    trainer, scored = grpo(
        prompts(),
        per_device_train_batch_size=2,
        num_generations=4,
        steps_per_generation=1,
        remove_unused_columns=True,
        max_steps=8,
        **ddp,
    )
    history = logs(trainer)
    return {"scored": scored, "end": history[-1]}


def two_ranks(begun: list[Any]) -> dict[str, Any]:
    for process in begun:
        process.join(timeout=120)
    found = [json.loads((FOLDER / f"rank{number}.json").read_text()) for number in range(2)]
    return {"ranks": found}


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def run(scenario: Callable[[], Any]) -> Any:
    began = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = scenario()
    except Exception:
        found = {"error": traceback.format_exc()}
    return {**found, "seconds": time.process_time() - began}


SCENARIOS = (
    sft_formats,
    sft_dft,
    sft_packing,
    sft_streams,
    dpo,
    reward,
    kto,
    generated,
    reported,
    refusals,
    without_metrics,
    precomputed,
    page,
)

if __name__ == "__main__":
    torch.set_num_threads(1)
    disable_progress_bars()
    gc.freeze()  # each training collects garbage, and would look at all that was imported
    wanted = sys.argv[2:]
    begun = []
    if not wanted or "two_ranks" in wanted:  # they share what has been imported
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        fork = multiprocessing.get_context("fork")
        begun = [fork.Process(target=rank, args=(number, port)) for number in range(2)]
        for process in begun:
            process.start()
    found = {one.__name__: run(one) for one in SCENARIOS if not wanted or one.__name__ in wanted}
    if begun:
        found["two_ranks"] = run(partial(two_ranks, begun))
    (FOLDER / "found.json").write_text(json.dumps(found, indent=1))
