"""The loss of each dataset of a mixture, inside the Trainer of HF Transformers.

    python examples/transformers_mixture.py
    torchrun --nproc-per-node 2 examples/transformers_mixture.py

A small Llama learns to guess the next byte of Python's own documentation and of its sources. At the
end the losses that were logged are held against the truth, which is counted sample by sample.
"""

import os
import pydoc_data.topics
import random
import sys
import textwrap
from collections import defaultdict
from pathlib import Path

import torch
import torch.distributed as dist
import transformers

from metricfold import AggregationType, Metric, MetricTransform
from metricfold.integrations.transformers import MetricfoldMixin

PAD = 256
STEPS, EVERY = 40, 20


# -- Two datasets, tagged --------------------------------------------------------------------------


class Counted(MetricTransform):
    def _generate_metrics(self, sample):
        tokens = len(sample["input_ids"])
        return [Metric(self.dataset_name, "tokens_seen", tokens, AggregationType.SUM)]


def tagged(texts, name):
    transform = Counted()
    transform.set_dataset_name(name)
    return [transform({"input_ids": list(text.encode()[:256])}) for text in texts if len(text) > 8]


docs = [part for topic in pydoc_data.topics.topics.values() for part in topic.split("\n\n")]
code = Path(textwrap.__file__).read_text().split("\n    def ")
mixture = tagged(docs, "docs")[:900] + tagged(code, "code") * 20
random.Random(0).shuffle(mixture)


def pad(samples):
    ids = [torch.tensor(sample["input_ids"]) for sample in samples]
    ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=PAD)
    return {"input_ids": ids, "attention_mask": ids.ne(PAD), "labels": ids.where(ids.ne(PAD), -100)}


# -- What metricfold asks for ----------------------------------------------------------------------


class Trainer(MetricfoldMixin, transformers.Trainer):
    pass


# -- The truth: every sample by itself, with the model as it is at that step -----------------------


class Truth:
    """Sums of losses and numbers of tokens, by dataset."""

    def __init__(self):
        self.sums = defaultdict(float)
        self.counts = defaultdict(int)

    @torch.no_grad()
    def add(self, model, samples):
        for sample in samples:
            ids = torch.tensor(sample["input_ids"])
            logits = model(input_ids=ids[None, :-1], use_cache=False).logits[0]
            losses = torch.nn.functional.cross_entropy(logits.double(), ids[1:], reduction="sum")
            name = sample["metrics"][0].dataset_name
            for key in (f"{name}/loss", "all/loss"):
                self.sums[key] += losses.item()
                self.counts[key] += len(ids) - 1

    def means(self):
        return {key: self.sums[key] / self.counts[key] for key in self.sums}

    def over_ranks(self):
        """Return the mean loss per token, over all ranks."""
        everyone = [self] * (dist.get_world_size() if dist.is_initialized() else 1)
        if dist.is_initialized():
            dist.all_gather_object(everyone, self)
        whole = Truth()
        for rank in everyone:
            for key in rank.sums:
                whole.sums[key] += rank.sums[key]
                whole.counts[key] += rank.counts[key]
        return whole.means()


class CheckedTrainer(Trainer):
    """Looks at the samples of each batch again. A training has no need of this."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.truths = defaultdict(Truth)  # one for each interval between two logs

    def training_step(self, model, inputs, *args, **kwargs):
        texts = [bytes(row[row < PAD].tolist()) for row in inputs["input_ids"]]
        interval = self.state.global_step // EVERY
        self.truths[interval].add(self.model, [SAMPLE_OF[text] for text in texts])
        return super().training_step(model, inputs, *args, **kwargs)


SAMPLE_OF = {bytes(sample["input_ids"]): sample for sample in mixture}


# -- The training ----------------------------------------------------------------------------------


def main(folder):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=257,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            pad_token_id=PAD,
            use_cache=False,
        )
    )
    held_out, seen = mixture[:75], mixture[75:]
    trainer = CheckedTrainer(
        model,
        transformers.TrainingArguments(
            folder,
            remove_unused_columns=False,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=3e-3,
            max_steps=STEPS,
            logging_steps=EVERY,
            eval_strategy="steps",
            eval_steps=STEPS,
            save_strategy="no",
            report_to="tensorboard",
            use_cpu=True,
            ddp_find_unused_parameters=False,
            disable_tqdm=True,
        ),
        data_collator=pad,
        train_dataset=seen,
        eval_dataset=held_out,
        loss_per_dataset=True,
    )
    trainer.train()

    *_, last, evaluation, _ = trainer.state.log_history
    rows = compare("training", "", last, trainer.truths[STEPS // EVERY - 1].over_ranks())
    truth = Truth()
    truth.add(model, held_out)  # which every rank has
    return trainer, rows + compare("evaluation", "eval_", evaluation, truth.means())


def compare(what, prefix, logs, truth):
    """Return (name, theirs, ours, the truth) of each loss; theirs has no loss per dataset."""
    return [
        (
            f"{what}, {key}",
            logs[f"{prefix}loss"] if key == "all/loss" else None,
            logs[f"{prefix}{key}"],
            truth[key],
        )
        for key in sorted(truth)
    ]


def table(rows):
    lines = [f"{'':22}{'theirs':>10}{'ours':>10}{'the truth':>11}"]
    for name, theirs, ours, truth in rows:
        shown = "-" if theirs is None else f"{theirs:.5f}"
        lines.append(f"{name:22}{shown:>10}{ours:10.5f}{truth:11.5f}")
    return "\n".join(lines)


if __name__ == "__main__":
    trainer, rows = main(sys.argv[1] if len(sys.argv) > 1 else "runs/transformers")
    if trainer.is_world_process_zero():
        print(f"\nranks: {os.environ.get('WORLD_SIZE', '1')}\n{table(rows)}")
    trainer.end()
