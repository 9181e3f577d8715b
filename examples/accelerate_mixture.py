"""The loss of each dataset of a mixture, in a training loop with Hugging Face Accelerate.

    python examples/accelerate_mixture.py
    torchrun --nproc-per-node 2 examples/accelerate_mixture.py [folder] [--resume]

A small network learns to guess the next byte of Python's own documentation and of its sources, from
Hugging Face datasets, with gradient accumulation, TensorBoard as Accelerate's tracker, and a
checkpoint half-way that ``--resume`` goes on from. At the end the loss over held-out texts is
computed in the two ways that are common with Accelerate, with metricfold, and text by text.
"""

import pydoc_data.topics
import sys
import textwrap
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import Dataset, concatenate_datasets
from torch.utils.data import DataLoader

from metricfold import (
    ConsoleSink,
    DefaultTrainingMetricTransform,
    JSONLSink,
    MetricsAggregator,
    MetricsCollator,
    MetricsLogger,
)
from metricfold.integrations.accelerate import TrackerSink, register, sample_weights
from metricfold.integrations.datasets import with_metrics
from metricfold.torch import DeviceAccumulator

NAMES = ("docs", "code")
PAD = -100
UPDATES, EVERY, HALF = 30, 10, 15
BATCH, ACCUMULATION = 8, 2
HELD_OUT = 77  # two ranks of 8 a batch need 80

# -- Two datasets, tagged --------------------------------------------------------------------------


def tagged(texts, name):
    tokens = [list(text.encode()[:64]) for text in texts if len(text) > 8]
    dataset = Dataset.from_dict({"tokens": tokens, "source": [NAMES.index(name)] * len(tokens)})
    return with_metrics(dataset, DefaultTrainingMetricTransform(), name)


docs = [part for topic in pydoc_data.topics.topics.values() for part in topic.split("\n\n")]
code = Path(textwrap.__file__).read_text().split("\n    def ")
mixture = concatenate_datasets([tagged(docs[:1400], "docs"), tagged(code * 20, "code")])
mixture = mixture.shuffle(seed=0)
held_out, seen = mixture.select(range(HELD_OUT)), mixture.select(range(HELD_OUT, len(mixture)))


def pad(samples):
    tokens = [torch.tensor(sample["tokens"]) for sample in samples]
    return {
        "tokens": torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=PAD),
        "source": torch.tensor([sample["source"] for sample in samples]),
    }


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(256, 48)
        self.memory = torch.nn.GRU(48, 64, batch_first=True)
        self.head = torch.nn.Linear(64, 256)

    def forward(self, tokens):
        return self.head(self.memory(self.embedding(tokens.clamp(min=0)))[0])


# -- The training ----------------------------------------------------------------------------------


def train(accelerator, folder, *, resume):
    set_seed(0)
    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    loader = DataLoader(seen, batch_size=BATCH, collate_fn=MetricsCollator(pad))
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    aggregator = MetricsAggregator()
    accumulator = DeviceAccumulator({"loss": "mean"}, NAMES, device=accelerator.device)
    register(accelerator, aggregator, accumulator)  # save_state() and load_state() have them
    update = 0
    if resume:
        accelerator.load_state(folder / "half")
        update = HALF
        loader = accelerator.skip_first_batches(loader, HALF * ACCUMULATION)

    accelerator.init_trackers("mixture")
    sinks = [
        ConsoleSink(select=["*/loss", "*_seen"]),
        JSONLSink(folder / "log.jsonl"),
        TrackerSink(accelerator),
    ]
    with MetricsLogger(sinks) as logger:
        if resume:
            logger.rewind(update)
        for batch in loader:
            aggregator.update(batch.pop("metrics"))  # what this rank's samples have to say
            with accelerator.accumulate(model):
                logits = model(batch["tokens"][:, :-1])
                labels = batch["tokens"][:, 1:]
                loss = accumulator.token_loss(logits, labels, batch["source"])  # stays there
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue
            update += 1
            if update % EVERY == 0:
                aggregator.drain(accumulator)
                logger.log(update, aggregator, prefix="train")  # every rank calls it
            if update == HALF:
                accelerator.save_state(folder / "half")
            if update == UPDATES:
                break
    return model


# -- The loss over held-out texts, in four ways -----------------------------------------------------


@torch.no_grad()
def evaluate(accelerator, model):
    loader = DataLoader(held_out, batch_size=BATCH, collate_fn=MetricsCollator(pad))
    loader = accelerator.prepare(loader)
    aggregator = MetricsAggregator(name="evaluation")
    accumulator = DeviceAccumulator({"loss": "mean"}, NAMES, device=accelerator.device)
    gathered, repeated = [], []
    model.eval()
    for batch in loader:
        metrics = batch.pop("metrics")
        aggregator.update(metrics)  # of each sample that was read, also a second time
        labels = batch["tokens"][:, 1:]
        losses = token_losses(model, batch["tokens"])

        loss = losses.sum() / (labels != PAD).sum()  # of the batch, as a model returns it
        gathered.append(accelerator.gather(loss).mean())
        repeated.append(accelerator.gather_for_metrics(loss.repeat(len(labels))))

        weights = sample_weights(accelerator, len(labels))[:, None] * (labels != PAD)
        accumulator.update("loss", losses, weights=weights, dataset_ids=batch["source"])
    aggregator.drain(accumulator)
    ours = aggregator.reduce().as_dict("eval", rollup=True)

    losses = torch.zeros(2)
    for tokens in held_out["tokens"]:
        one = token_losses(model, torch.tensor([tokens], device=accelerator.device))
        losses += torch.tensor([one.sum().item(), one.numel()])
    return {
        "theirs: gather(loss).mean()": torch.stack(gathered).mean().item(),
        "theirs: gather_for_metrics(loss.repeat(n))": torch.cat(repeated).mean().item(),
        "ours": ours["eval/loss"],
        "the truth, text by text": (losses[0] / losses[1]).item(),
        "samples read": ours["eval/samples_seen"],
        "samples held out": HELD_OUT,
    }


def token_losses(model, tokens):
    logits = model(tokens[:, :-1]).transpose(1, 2)
    return torch.nn.functional.cross_entropy(
        logits, tokens[:, 1:], reduction="none", ignore_index=PAD
    )


def main(folder, *, resume):
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        gradient_accumulation_steps=ACCUMULATION,
        log_with="tensorboard",
        project_dir=folder,
    )
    model = train(accelerator, folder, resume=resume)
    results = evaluate(accelerator, model)
    accelerator.print(f"\nranks: {accelerator.num_processes}, the loss over held-out texts")
    for what, value in results.items():
        accelerator.print(f"{what:44}{value:10.5f}" if value % 1 else f"{what:44}{value:10.0f}")
    accelerator.end_training()


if __name__ == "__main__":
    given = [argument for argument in sys.argv[1:] if argument != "--resume"]
    main(Path(given[0] if given else "runs/accelerate"), resume="--resume" in sys.argv)
