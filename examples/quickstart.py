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

import metricfold
from metricfold import DefaultTrainingMetricTransform, MetricsCollator
from metricfold.torch import DeviceAccumulator

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
    texts = [torch.tensor(sample["tokens"]) for sample in batch]
    tokens = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=-100)
    return {"tokens": tokens[:, :-1].clamp(min=0), "labels": tokens[:, 1:]}


# -- A model --------------------------------------------------------------------------------------

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Embedding(256, 64), torch.nn.ReLU(), torch.nn.Linear(64, 256))
optimizer = torch.optim.Adam(model.parameters(), 1e-2)


def train_step(loss):
    optimizer.zero_grad()
    loss.backward()
    for parameter in model.parameters() if world_size > 1 else ():
        dist.all_reduce(parameter.grad)
    optimizer.step()


collate = MetricsCollator(pad, dataset_ids=True)
loader = torch.utils.data.DataLoader(samples[:808], batch_size=8, collate_fn=collate)

# -- The ten lines --------------------------------------------------------------------------------

losses = DeviceAccumulator({"loss": "mean"}, datasets=16)  # learns their names as they come
with metricfold.Run("runs/quickstart") as run:  # a table, a JSONL file, TensorBoard
    for step, batch in enumerate(loader):
        run.aggregator.update(batch.pop("metrics"))  # per-sample metrics, tagged by dataset
        logits = model(batch["tokens"])
        loss = losses.token_loss(logits, batch["labels"], batch["dataset_ids"])  # of each, too
        train_step(loss)
        if step % 50 == 0:
            losses = run.aggregator.drain(losses)  # nothing has waited for the device
            run.log(step)  # every rank calls it; rank 0 writes

if world_size > 1:
    dist.destroy_process_group()
