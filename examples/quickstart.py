"""The ten lines of the README, with a real model and two real datasets.

    python examples/quickstart.py
    torchrun --nproc-per-node 2 examples/quickstart.py

The model learns to guess the next byte of Python's own documentation and of its sources.
"""

import os
import pydoc_data.topics
import random
import textwrap
from pathlib import Path

import torch
import torch.distributed as dist

from metricfold import (
    ConsoleSink,
    DefaultTrainingMetricTransform,
    JSONLSink,
    MetricsAggregator,
    MetricsCollator,
    MetricsLogger,
    TensorBoardSink,
)

if "RANK" in os.environ:
    dist.init_process_group("gloo")
rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


# -- Two datasets, tagged -------------------------------------------------------------------------


def tagged(texts, name):
    transform = DefaultTrainingMetricTransform()
    transform.set_dataset_name(name)
    return [transform({"tokens": list(text.encode()[:400])}) for text in texts if len(text) > 20]


docs = [part for topic in pydoc_data.topics.topics.values() for part in topic.split("\n\n")]
code = Path(textwrap.__file__).read_text().split("\n\n")
samples = tagged(docs, "docs") + tagged(code, "code") * 20
random.Random(rank).shuffle(samples)


def pad(batch):
    tokens = [torch.tensor(sample["tokens"]) for sample in batch]
    return {"tokens": torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=-1)}


# -- A model --------------------------------------------------------------------------------------

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Embedding(256, 64), torch.nn.ReLU(), torch.nn.Linear(64, 256))
optimizer = torch.optim.Adam(model.parameters(), 1e-2)


def train_step(batch):
    inputs, targets = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
    logits = model(inputs.clamp(min=0))
    loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, ignore_index=-1)
    optimizer.zero_grad()
    loss.backward()
    for parameter in model.parameters() if world_size > 1 else ():
        dist.all_reduce(parameter.grad)
    optimizer.step()
    return loss, (targets >= 0).sum()


# -- The ten lines --------------------------------------------------------------------------------

loader = torch.utils.data.DataLoader(samples, batch_size=8, collate_fn=MetricsCollator(pad))
aggregator = MetricsAggregator()
sinks = [ConsoleSink(), JSONLSink("runs/quickstart.jsonl"), TensorBoardSink("runs/quickstart")]
with MetricsLogger(sinks) as logger:
    for step, batch in enumerate(loader):
        aggregator.update(batch.pop("metrics"))  # per-sample metrics, tagged by dataset
        loss, num_tokens = train_step(batch)
        aggregator.record("loss", loss, weight=num_tokens)  # both stay on the device
        if step % 50 == 0:
            logger.log(step, aggregator, prefix="train")  # every rank calls it; rank 0 writes
        if step == 100:
            break

if world_size > 1:
    dist.destroy_process_group()
