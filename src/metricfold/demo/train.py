"""A training loop whose metrics are right on any number of ranks: the example to copy from.

    torchrun --nproc-per-node 2 -m metricfold.demo.train runs/demo --steps 200

trains in a folder that ``metricfold demo`` has made; that command runs this file in the same way.
metricfold asks six things of a loop, and offers `timer`, which tells what it waits for:

1. samples carry metrics (see `batches`), and `MetricsCollator` keeps them with their batch;
2. `aggregator.update` takes the metrics of each batch that is trained on;
3. `token_loss` of a `DeviceAccumulator` gives the loss to back-propagate, and folds that of each
   dataset on the device, until `aggregator.drain` takes it over before a log or checkpoint;
4. `aggregator.record` takes what else only the step knows: tensors, which stay on their device;
5. every rank calls `logger.log` at the same steps: it returns at once, and rank 0 alone writes;
6. every rank calls `state_dict`, and what it returns is good for any number of ranks.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import track
from torch import nn
from torch.nn import functional as F  # noqa: N812 - its name everywhere
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from metricfold import (
    ConsoleSink,
    JSONLSink,
    MetricsAggregator,
    MetricsCollator,
    MetricsLogger,
    Snapshot,
    TensorBoardSink,
)
from metricfold.demo.batches import TaggedSamples, held_out, pad
from metricfold.demo.folder import RunFolder
from metricfold.demo.framework import LOG_EVERY, ON_SCREEN, SAVE_EVERY
from metricfold.demo.gradients import LocalGradientNorm
from metricfold.demo.launch import arguments_of_rank
from metricfold.demo.ledger import Ledger
from metricfold.demo.mixture import Mixture
from metricfold.demo.model import ByteTransformer
from metricfold.torch import DeviceAccumulator

IGNORED = -100  # the label of what is not to be predicted


def train(folder: RunFolder, steps: int, *, resume: bool) -> None:
    """Train for `steps` steps, from the beginning or from the last checkpoint."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    settings = folder.settings
    torch.manual_seed(int(settings["seed"]))
    mixture = folder.read_mixture()
    model = DistributedDataParallel(ByteTransformer())
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings["learning_rate"], betas=(0.9, 0.95)
    )
    gradient_norm = LocalGradientNorm(model)

    accumulator = DeviceAccumulator({"loss": "mean"}, mixture.names)
    aggregator = MetricsAggregator(name="train")
    validation = MetricsAggregator(name="val")
    for metrics in (aggregator, validation):
        metrics.derive("perplexity", lambda values: math.exp(values["loss"]))

    parts = {"model": model.module, "optimizer": optimizer, "train": aggregator, "val": validation}
    start = load_checkpoint(folder.checkpoint, parts) if resume else 0
    stop = start + steps
    # For the demo's proof; your loop needs none.
    ledger = Ledger(folder.ledger, range(rank, rank + 1), start + 1)

    console = Console()
    sinks = [
        ConsoleSink(console, select=ON_SCREEN),
        JSONLSink(folder.metrics),
        TensorBoardSink(folder.tensorboard),
    ]
    loader = training_batches(mixture, range(start + 1, stop + 1), rank, world_size)
    batches = aggregator.timer("data").over(loader)
    progress = track(batches, "training", total=steps, console=console, disable=rank > 0)
    with MetricsLogger(sinks, config=settings, total_steps=stop) as logger:
        logger.rewind(start)
        for step, batch in enumerate(progress, start + 1):
            aggregator.update(batch.pop("metrics"))

            labels = next_tokens(batch)
            logits = model(batch["tokens"][:, :-1])
            # Ranks hold different numbers of tokens and their gradients will be averaged: divided
            # like this, the average is the gradient of the mean over all ranks' tokens.
            all_tokens = (labels != IGNORED).sum()
            dist.all_reduce(all_tokens)
            loss = accumulator.token_loss(
                logits, labels, batch["dataset"], num_items=all_tokens / world_size
            )
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

            aggregator.record("grad_norm", gradient_norm.pop(), agg="max")
            aggregator.record("tokens_per_second", batch["mask"].sum(), agg="rate")
            ledger.note(*sums_by_dataset(logits, labels, batch["dataset"], len(mixture.names)))

            if step % LOG_EVERY == 0 or step == stop:
                aggregator.drain(accumulator)
                with ledger.logging():
                    logger.log(step, aggregator, prefix="train", extra=ranks_apart)
            if step % SAVE_EVERY == 0 or step == stop:
                with aggregator.pause():  # no part of the tokens per second
                    validate(model, mixture, validation)
                    logger.log(step, validation, prefix="val")
                    save_checkpoint(folder.checkpoint, parts, step)
    ledger.close(aggregator)


def ranks_apart(snapshot: Snapshot) -> dict[str, float | None]:
    """Return whose gradient was the largest, the largest of each rank, and who waited for data."""
    norms = snapshot.per_rank(None, "grad_norm")
    return {
        "train/grad_norm_rank": snapshot.owner(None, "grad_norm"),
        **{f"train/grad_norm/rank_{rank}": norm for rank, norm in enumerate(norms)},
        "train/data_slowest_rank": snapshot.timing("data").slowest,
    }


def training_batches(
    mixture: Mixture, steps: range, rank: int, world_size: int
) -> DataLoader[dict[str, Any]]:
    """Load this rank's share of each of `steps`, in two worker processes."""
    samples: Any = TaggedSamples(mixture)
    return DataLoader(
        samples,
        batch_sampler=[mixture.shares(step, world_size)[rank] for step in steps],
        collate_fn=MetricsCollator(collate_fn=padded),
        num_workers=2,
        timeout=60,  # seconds; a worker that cannot send its batch would be waited for forever
    )


def padded(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Collate samples into tensors."""
    return {name: torch.from_numpy(array) for name, array in pad(samples).items()}


def next_tokens(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return what is to be predicted after each token but the last; IGNORED where nothing is."""
    return batch["tokens"].where(batch["mask"], IGNORED)[:, 1:]


@torch.no_grad()
def validate(
    model: DistributedDataParallel, mixture: Mixture, aggregator: MetricsAggregator
) -> None:
    """Take in the losses on this rank's share of the texts that are not trained on."""
    accumulator = DeviceAccumulator({"loss": "mean"}, mixture.names)
    for batch in map(padded, held_out(mixture, dist.get_rank(), dist.get_world_size())):
        logits = model.module(batch["tokens"][:, :-1])
        accumulator.token_loss(logits, next_tokens(batch), batch["dataset"])
    aggregator.drain(accumulator)


@torch.no_grad()
def sums_by_dataset(
    logits: torch.Tensor, labels: torch.Tensor, dataset: torch.Tensor, datasets: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each dataset's sum of losses and number of predicted tokens, for the demo's proof."""
    losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").double()
    tokens = (labels != IGNORED).double()
    zeros = losses.new_zeros(datasets)
    return (
        zeros.index_add(0, dataset, losses.sum(1)),
        zeros.index_add(0, dataset, tokens.sum(1)),
    )


def save_checkpoint(path: Path, parts: dict[str, Any], step: int) -> None:
    """Write all parts and the step; every rank calls it, since `state_dict` folds over ranks."""
    state = {"step": step, **{name: part.state_dict() for name, part in parts.items()}}
    if dist.get_rank() == 0:
        unfinished = path.with_suffix(".unfinished")
        torch.save(state, unfinished)
        unfinished.replace(path)


def load_checkpoint(path: Path, parts: dict[str, Any]) -> int:
    """Load all parts, on every rank alike, and return the step that they were saved at."""
    state = torch.load(path, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    step: int = state["step"]
    return step


def main() -> None:
    """Run one rank."""
    arguments = arguments_of_rank("metricfold.demo.train")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    train(RunFolder(arguments.folder), arguments.steps, resume=arguments.resume)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
