"""What metrics make of a training step: the demo's with JAX, on as many virtual devices as it takes.

The compiled step, the model, the optimiser and the batches are the demo's; only the texts are those
of 64 bytes at most, not of 512, so that a step takes tens of milliseconds. Metrics cost the same
then, and weigh several times as much as in the demo. Batches are made beforehand: what transform
and collator cost has a section of its own.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from io import StringIO
from pathlib import Path
from typing import Any

from benchmarks.own_process import found_in_own_process, installed, print_found
from benchmarks.sizes import Sizes
from benchmarks.table import Section, cost
from benchmarks.timing import interleaved
from metricfold.demo.framework import FRAMEWORKS

__all__ = ["measure"]

_DEVICES = FRAMEWORKS["jax"].parts
_OFF, _WAITING = "metrics off", "float(loss) every step"
_RECORDED, _DRAINED = "metrics on, as in the demo", "metrics on, in DeviceAccumulators"


def measure(sizes: Sizes) -> list[Section]:
    """Return what metrics, and what waiting for the loss, make of a step; nothing without JAX."""
    if not installed(*FRAMEWORKS["jax"].packages):
        return []
    times = found_in_own_process("benchmarks.demo_steps", sizes, _DEVICES)
    section = Section(
        f"JAX: a step of the demo on {_DEVICES} virtual CPU devices, texts of {sizes.demo_tokens} bytes"
    )
    section.rows = [
        cost(way, times[way], _OFF, times[_OFF]) for way in (_RECORDED, _DRAINED, _WAITING)
    ]
    section.notes.append(
        f"on: with a log every {sizes.demo_steps} steps, and the wait until all sinks have it"
    )
    return [section]


# -- In the process with the devices -------------------------------------------------------------


def _found(sizes: Sizes) -> dict[str, list[float]]:
    """Return the seconds that each way takes for a step, turn by turn."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        ways = _ways(sizes, Path(folder), stack)
        for way in ways.values():
            way()  # compiles
        times = interleaved(ways, sizes.demo_rounds, calls_per_turn=1)
    return {name: [turn / sizes.demo_steps for turn in turns] for name, turns in times.items()}


def _ways(sizes: Sizes, folder: Path, stack: ExitStack) -> dict[str, Callable[[], None]]:
    """Return loops of some steps, each of which ends when its last step and its log have."""
    import jax
    import jax.numpy as jnp

    from metricfold.demo.jax.train import compiled_steps, dp
    from metricfold.jax import DeviceAccumulator, DeviceMeshManager

    mesh = DeviceMeshManager().create_data_parallel_mesh()
    mixture = _mixture(sizes.demo_tokens)
    names = mixture.names
    graph, begun = _begun(sizes.demo_blocks)
    train_step, _ = compiled_steps(graph, mesh, names)
    sharding = dp.create_data_parallel_sharding(mesh)
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    batches = _batches(mixture, sizes.demo_steps, mesh.size)

    def looping(
        state: Any,
        train: Callable[[Any, Any, Any], Any],
        log: Callable[[Any], Any] = lambda state: state,
        over: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    ) -> Callable[[], None]:
        """Return a loop whose state `train` takes through a step, and `log` through a log."""
        carried = [jax.device_put(jax.tree.map(jnp.copy, state), everywhere)]

        def run() -> None:
            for samples, batch in over(batches):
                carried[0] = train(carried[0], samples, dp.shard_batch(batch, sharding))
            carried[0] = log(carried[0])
            jax.block_until_ready(carried[0])

        return run

    def with_loss_alone(state: Any, batch: Any) -> Any:
        # What else the step returns is computed for nobody here, so JAX leaves it out.
        state, _, (losses, tokens) = train_step(state, batch)
        return state, losses.sum() / tokens.sum()

    bare_step = jax.jit(with_loss_alone, donate_argnums=0)

    def bare(state: Any, samples: Any, batch: Any) -> Any:
        return bare_step(state, batch)[0]

    def waiting(state: Any, samples: Any, batch: Any) -> Any:
        state, loss = bare_step(state, batch)
        float(loss)
        return state

    recorder = _Logs(folder / "recorded", stack, sizes.demo_steps)

    def recorded(state: Any, samples: Any, batch: Any) -> Any:
        recorder.take(samples, batch)
        state, metrics, _ = train_step(state, batch)
        for name in names:
            loss, tokens = metrics["loss"][name], metrics["tokens"][name]
            recorder.aggregator.record("loss", loss, weight=tokens, dataset=name)
        recorder.aggregator.record("grad_norm", metrics["grad_norm"], agg="max")
        for device, norm in enumerate(metrics["grad_norms"]):
            recorder.aggregator.record(f"grad_norm/device_{device}", norm, agg="max")
        return state

    def log_recorded(state: Any) -> Any:
        recorder.log()
        return state

    drainer = _Logs(folder / "drained", stack, sizes.demo_steps)
    of_devices = [f"grad_norm/device_{device}" for device in range(mesh.size)]
    accumulators = (
        DeviceAccumulator({"loss": "mean"}, datasets=names),
        DeviceAccumulator(dict.fromkeys(["grad_norm", *of_devices], "max")),
    )

    def with_accumulators(carried: Any, batch: Any) -> Any:
        state, losses, norms = carried
        state, metrics, _ = train_step(state, batch)
        losses = losses.update(
            "loss",
            jnp.stack([metrics["loss"][name] for name in names]),
            weights=jnp.stack([metrics["tokens"][name] for name in names]),
            dataset_ids=jnp.arange(len(names)),
        )
        found = dict(zip(of_devices, metrics["grad_norms"], strict=True))
        return state, losses, norms.update_all({"grad_norm": metrics["grad_norm"], **found})

    accumulating_step = jax.jit(with_accumulators, donate_argnums=0)

    def accumulated(carried: Any, samples: Any, batch: Any) -> Any:
        drainer.take(samples, batch)
        return accumulating_step(carried, batch)

    def log_drained(carried: Any) -> Any:
        state, losses, norms = carried
        losses, norms = drainer.aggregator.drain(losses), drainer.aggregator.drain(norms)
        drainer.log()
        return state, losses, norms

    return {
        _OFF: looping(begun, bare),
        _RECORDED: looping(begun, recorded, log_recorded, recorder.waits.over),
        _DRAINED: looping((begun, *accumulators), accumulated, log_drained, drainer.waits.over),
        _WAITING: looping(begun, waiting),
    }


class _Logs:
    """An aggregator, and a logger with the demo's sinks."""

    def __init__(self, folder: Path, stack: ExitStack, steps: int) -> None:
        from rich.console import Console

        from metricfold import (
            ConsoleSink,
            JSONLSink,
            MetricsAggregator,
            MetricsLogger,
            TensorBoardSink,
        )
        from metricfold.demo.jax.train import ON_SCREEN

        self.aggregator = MetricsAggregator()
        self.aggregator.derive("perplexity", lambda values: math.exp(values["loss"]))
        self.waits = self.aggregator.timer("data")
        sinks = [
            ConsoleSink(Console(file=StringIO()), select=ON_SCREEN),
            JSONLSink(folder / "metrics.jsonl"),
            TensorBoardSink(folder / "tensorboard"),
        ]
        self._logger = stack.enter_context(MetricsLogger(sinks))
        self._steps = steps
        self._logged = 0

    def take(self, samples: Any, batch: Any) -> None:
        """Take the metrics of a batch's samples, and its tokens."""
        self.aggregator.update(samples)
        self.aggregator.record("tokens_per_second", batch["mask"].sum(), agg="rate")

    def log(self) -> None:
        """Log, and wait until it is written: else another way's turn would pay for it."""
        from metricfold.demo.jax.train import owner_of_gradient

        self._logged += self._steps
        self._logger.log(self._logged, self.aggregator, prefix="train", extra=owner_of_gradient)
        assert self._logger.flush()


def _mixture(longest: int) -> Any:
    """Return two datasets of texts of at most so many bytes."""
    from metricfold.demo.mixture import Corpus, Mixture, cut_evenly
    from metricfold.demo.texts import read_python_docs

    short = [text for text in read_python_docs() if len(text.text.encode()) <= longest]
    prose = [text for text in short if text.kind == "prose"]
    others = [text for text in short if text.kind != "prose"]
    corpora = [Corpus.split("prose", prose), Corpus.split("others", others)]
    return Mixture(corpora, cut=cut_evenly)


def _batches(mixture: Any, number: int, devices: int) -> list[tuple[Any, dict[str, Any]]]:
    """Return batches, each with the metrics of its samples before it."""
    from metricfold.demo.jax.batches import training_batches

    batches = training_batches(mixture, range(1, number + 1), devices)
    return [(batch.pop("metrics"), batch) for batch in batches]


def _begun(blocks: int) -> tuple[Any, Any]:
    """Return the graph and the state of the demo's model and optimiser."""
    import optax
    from flax import nnx

    from metricfold.demo.jax.model import ByteTransformer

    model = ByteTransformer(depth=blocks, rngs=nnx.Rngs(0))
    adam = optax.adamw(8e-3, b2=0.95, weight_decay=0.01)
    clipped = optax.chain(optax.clip_by_global_norm(1.0), adam)
    return nnx.split((model, nnx.Optimizer(model, clipped, wrt=nnx.Param)))


if __name__ == "__main__":
    print_found(_found)
