"""A JAX training loop whose metrics are right on any number of devices: the example to copy from.

    python -m metricfold.demo.jax.train runs/demo --steps 200

trains on all devices that JAX finds, in a folder that ``metricfold demo --framework jax`` has made;
that command runs this file in the same way, with virtual devices. metricfold asks five things of a
loop:

1. samples carry metrics (see `batches`), and `MetricsCollator` keeps them with their batch;
2. `aggregator.update` takes the metrics of each batch that is trained on;
3. the compiled step brings what only its devices know together, by `DistributedMetrics`;
4. `aggregator.record` takes the arrays that the step returns; they are read when a log needs them;
5. `logger.log` and `state_dict` do the rest, on as many processes as there are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax  # type: ignore[import-untyped]
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.progress import track

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
from metricfold.demo.jax.model import ByteTransformer
from metricfold.demo.launch import arguments_of_rank
from metricfold.demo.ledger import Ledger
from metricfold.demo.mixture import SAMPLES_PER_STEP, Mixture
from metricfold.jax import DataParallel, DeviceMeshManager, DistributedMetrics

Step: TypeAlias = Callable[[Any, dict[str, Any]], Any]

dm, dp = DistributedMetrics(), DataParallel()


def train(folder: RunFolder, steps: int, *, resume: bool) -> None:
    """Train for `steps` steps, from the beginning or from the last checkpoint."""
    mesh = DeviceMeshManager().create_data_parallel_mesh()
    mixture, settings = folder.read_mixture(), folder.settings
    model = ByteTransformer(rngs=nnx.Rngs(int(settings["seed"])))
    adam = optax.adamw(settings["learning_rate"], b2=0.95, weight_decay=0.01)
    optimizer = nnx.Optimizer(
        model, optax.chain(optax.clip_by_global_norm(1.0), adam), wrt=nnx.Param
    )
    graph, state = nnx.split((model, optimizer))
    state = jax.device_put(state, NamedSharding(mesh, P()))
    train_step, eval_step = compiled_steps(graph, mesh, mixture.names)

    aggregator = MetricsAggregator(name="train")
    validation = MetricsAggregator(name="val")
    for metrics in (aggregator, validation):
        metrics.derive("perplexity", lambda values: math.exp(values["loss"]))

    aggregators = {"train": aggregator, "val": validation}
    start = 0
    if resume:
        start, state = load_checkpoint(folder.checkpoint, state, aggregators)
    stop = start + steps
    # For the demo's proof; your loop needs none.
    ledger = Ledger(folder.ledger, range(mesh.size), start + 1)

    console = Console()
    sinks = [
        ConsoleSink(console, select=ON_SCREEN),
        JSONLSink(folder.metrics),
        TensorBoardSink(folder.tensorboard),
    ]
    sharding = dp.create_data_parallel_sharding(mesh)
    loader = training_batches(mixture, range(start + 1, stop + 1), mesh.size)
    batches = aggregator.timer("data").over(loader)
    progress = track(batches, "training", total=steps, console=console)
    with MetricsLogger(sinks, config=settings, total_steps=stop) as logger:
        logger.rewind(start)
        for step, batch in enumerate(progress, start + 1):
            aggregator.update(batch.pop("metrics"))
            aggregator.record("tokens_per_second", batch["mask"].sum(), agg="rate")

            state, metrics, sums = train_step(state, dp.shard_batch(batch, sharding))

            # A dataset that is not in this batch has 0/0 as its loss, which counts with weight 0.
            for name, (loss, tokens) in metrics["losses"].items():
                aggregator.record("loss", loss, weight=tokens, dataset=name)
            aggregator.record("grad_norm", metrics["grad_norm"], agg="max")
            for device, norm in enumerate(metrics["grad_norms"]):
                aggregator.record(f"grad_norm/device_{device}", norm, agg="max")
            ledger.note(*sums)

            if step % LOG_EVERY == 0 or step == stop:
                with ledger.logging():
                    logger.log(step, aggregator, prefix="train", extra=owner_of_gradient)
            if step % SAVE_EVERY == 0 or step == stop:
                with aggregator.pause():  # no part of the tokens per second
                    for samples in held_out(mixture):
                        unseen = pad(samples, shape_of_batches(mixture, mesh.size))
                        losses = eval_step(state, dp.shard_batch(unseen, sharding))
                        for name, (loss, tokens) in losses.items():
                            validation.record("loss", loss, weight=tokens, dataset=name)
                    logger.log(step, validation, prefix="val")
                    save_checkpoint(folder.checkpoint, step, state, aggregators)
    ledger.close(aggregator)


def training_batches(mixture: Mixture, steps: range, devices: int) -> Iterator[dict[str, Any]]:
    """Yield the batch of each of `steps`, with its metrics."""
    samples = TaggedSamples(mixture)
    collate = MetricsCollator(partial(pad, shape=shape_of_batches(mixture, devices)))
    for step in steps:
        yield collate([samples[n] for share in mixture.shares(step, devices) for n in share])


def shape_of_batches(mixture: Mixture, devices: int) -> tuple[int, int, int]:
    """Return devices, rows of each and tokens of all batches: what the fullest one needs."""
    return devices, -(-SAMPLES_PER_STEP // devices), mixture.longest


def compiled_steps(graph: Any, mesh: Mesh, names: list[str]) -> tuple[Step, Step]:
    """Return the training step and the evaluation step, for batches split over `mesh`.

    Inside, the code is that of one device with its own part of the batch.
    """

    def train_step(state: Any, batch: dict[str, Any]) -> Any:
        model, optimizer = nnx.merge(graph, state)
        # Devices hold different numbers of tokens and their gradients will be averaged: scaled
        # like this, the average is the gradient of the mean over all devices' tokens.
        all_tokens = lax.pmean(batch["mask"][:, 1:].sum(), "data")

        def scaled_loss(model: ByteTransformer) -> Any:
            losses, tokens = losses_by_dataset(model, batch, len(names))
            return losses.sum() / all_tokens, (losses, tokens)

        gradients, (losses, tokens) = nnx.grad(scaled_loss, has_aux=True)(model)
        # Afterwards all devices hold the same gradient, and the one that spoiled it is not known.
        norms = dm.all_gather({"norm": optax.tree.norm(gradients)}, "data")["norm"]
        optimizer.update(model, dp.all_reduce_gradients(gradients, "mean", "data"))
        metrics = {
            "losses": reduced(losses, tokens, names),
            "grad_norm": norms.max(),
            "grad_norms": list(norms),
        }
        return nnx.state((model, optimizer)), metrics, (losses[None], tokens[None])

    def eval_step(state: Any, batch: dict[str, Any]) -> Any:
        model, _ = nnx.merge(graph, state)
        return reduced(*losses_by_dataset(model, batch, len(names)), names)

    def compiled(step: Step, out_specs: Any, **options: Any) -> Step:
        # Unchecked, gradients stay those of each device until they are averaged by name.
        on_devices = jax.shard_map(
            step, mesh=mesh, in_specs=(P(), P("data")), out_specs=out_specs, check_vma=False
        )
        return jax.jit(on_devices, **options)

    return (
        compiled(train_step, (P(), P(), P("data")), donate_argnums=0),
        compiled(eval_step, P()),
    )


def losses_by_dataset(
    model: ByteTransformer, batch: dict[str, Any], datasets: int
) -> tuple[jax.Array, jax.Array]:
    """Return each dataset's sum of losses and number of predicted tokens, both (datasets,)."""
    tokens, mask = batch["tokens"], batch["mask"][:, 1:]
    logits = model(tokens[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]) * mask
    zeros = jnp.zeros(datasets, losses.dtype)
    return (
        zeros.at[batch["dataset"]].add(losses.sum(1)),
        zeros.at[batch["dataset"]].add(mask.sum(1, dtype=zeros.dtype)),
    )


def reduced(losses: jax.Array, tokens: jax.Array, names: list[str]) -> dict[str, Any]:
    """Return each dataset's mean loss over all devices, and its number of tokens."""
    sums = dm.reduce_sum({"losses": losses, "tokens": tokens}, "data")
    means = sums["losses"] / sums["tokens"]
    return dict(zip(names, zip(means, sums["tokens"], strict=True), strict=True))


def owner_of_gradient(snapshot: Snapshot) -> dict[str, float]:
    """Return whose gradient was the largest of this interval."""
    logged = snapshot.as_dict("train", window="interval")
    norms = [value for key, value in logged.items() if key.startswith("train/grad_norm/device_")]
    return {"train/grad_norm_device": float(np.argmax(norms))}


def save_checkpoint(
    path: Path, step: int, state: Any, aggregators: dict[str, MetricsAggregator]
) -> None:
    """Write the step, the parameters with the optimiser's state, and the metrics."""
    unfinished = path.with_suffix(".unfinished")
    metrics: Any = {name: json.dumps(one.state_dict()) for name, one in aggregators.items()}
    with unfinished.open("wb") as file:
        np.savez(file, *jax.device_get(jax.tree.leaves(state)), step=step, **metrics)
    unfinished.replace(path)


def load_checkpoint(
    path: Path, state: Any, aggregators: dict[str, MetricsAggregator]
) -> tuple[int, Any]:
    """Load the metrics, and return the step and the state that were saved, placed like `state`."""
    with np.load(path) as saved:
        for name, aggregator in aggregators.items():
            aggregator.load_state_dict(json.loads(str(saved[name])))
        leaves, structure = jax.tree.flatten(state)
        restored = [jax.device_put(saved[f"arr_{i}"], one.sharding) for i, one in enumerate(leaves)]
        return int(saved["step"]), jax.tree.unflatten(structure, restored)


def main() -> None:
    """Train on all devices of this process."""
    arguments = arguments_of_rank("metricfold.demo.jax.train")
    train(RunFolder(arguments.folder), arguments.steps, resume=arguments.resume)


if __name__ == "__main__":
    main()
