"""What metrics make of the demo's step with JAX: the loop as it is, without them, and with a wait.

The demo's own model, optimiser and compiled step, on as many virtual devices as the demo takes.
Batches are made beforehand: what transform and collator cost has a section of its own. In a process
of its own, because JAX learns the number of its devices before it starts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.sizes import FULL, QUICK, Sizes
from benchmarks.table import Section, cost
from benchmarks.timing import interleaved

__all__ = ["measure"]

_DEVICES = 4
_OFF, _ON, _WAITING = "metrics off", "metrics on", "float(loss) every step"


def measure(sizes: Sizes) -> list[Section]:
    """Return what metrics, and what waiting for the loss, make of a step; nothing without JAX."""
    if not all(map(find_spec, ("jax", "flax", "optax", "rich", "tensorboard"))):
        return []
    virtual = f"--xla_force_host_platform_device_count={_DEVICES}"
    if sizes is QUICK:  # which compiles, and hardly runs
        virtual += " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.demo_steps", *(["--quick"] if sizes is QUICK else [])],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": virtual},
        stdout=subprocess.PIPE,
        check=True,
        timeout=600,
    )
    times = json.loads(done.stdout)
    section = Section(f"JAX: a step of the demo on {_DEVICES} virtual CPU devices")
    section.notes.append(
        f"on: all that the demo records, and a log to JSONL every {sizes.demo_steps} steps"
    )
    section.rows = [cost(way, times[way], _OFF, times[_OFF]) for way in (_ON, _WAITING)]
    return [section]


# -- In the process with the devices -------------------------------------------------------------


def main() -> None:
    """Print the seconds that each way takes for a step, round by round."""
    sizes = QUICK if "--quick" in sys.argv else FULL
    with tempfile.TemporaryDirectory() as folder:
        times = interleaved(_ways(sizes, Path(folder)), sizes.demo_rounds, calls_per_turn=1)
    print(json.dumps({way: [t / sizes.demo_steps for t in each] for way, each in times.items()}))


def _ways(sizes: Sizes, folder: Path) -> dict[str, Callable[[], object]]:
    """Return loops of some steps, each of which ends when its last step has."""
    import jax
    import optax
    from flax import nnx
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from metricfold import JSONLSink, MetricsAggregator, MetricsLogger
    from metricfold.demo.jax.batches import training_batches
    from metricfold.demo.jax.model import ByteTransformer
    from metricfold.demo.jax.train import compiled_steps
    from metricfold.demo.mixture import Corpus, Mixture, cut_evenly
    from metricfold.demo.texts import Text
    from metricfold.jax import DataParallel, DeviceMeshManager

    longest = sizes.demo_tokens
    corpora = [
        Corpus.split(name, [Text(letter * (longest - 3 * n % 20), "any") for n in range(60)])
        for name, letter in (("one", "a"), ("other", "b"))
    ]
    mixture = Mixture(corpora, cut=cut_evenly)
    mesh = DeviceMeshManager().create_data_parallel_mesh()
    model = ByteTransformer(width=sizes.demo_width, rngs=nnx.Rngs(0))
    graph, state = nnx.split((model, nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)))
    everywhere = NamedSharding(mesh, P())
    sharding = DataParallel().create_data_parallel_sharding(mesh)
    batches = list(training_batches(mixture, range(1, 1 + sizes.demo_steps), _DEVICES))
    metrics_of = [batch.pop("metrics") for batch in batches]
    on, _ = compiled_steps(graph, mesh, mixture.names)
    off = _without_metrics(graph, mesh, len(mixture.names))
    states = {
        way: jax.device_put(jax.tree.map(lambda x: x + 0, state), everywhere) for way in (on, off)
    }
    aggregator = MetricsAggregator()
    logger = MetricsLogger([JSONLSink(folder / "metrics.jsonl")])
    logs = 0

    def placed(batch: dict[str, Any]) -> Any:
        return DataParallel().shard_batch(batch, sharding)

    def without(look: Callable[[Any], object]) -> None:
        for batch in batches:
            states[off], loss = off(states[off], placed(batch))
            look(loss)
        jax.block_until_ready(states[off])

    def recorded() -> None:
        nonlocal logs
        for batch, of_samples in zip(batches, metrics_of, strict=True):
            aggregator.update(of_samples)
            aggregator.record("tokens_per_second", batch["mask"].sum(), agg="rate")
            states[on], metrics, _ = on(states[on], placed(batch))
            for name in mixture.names:
                loss, tokens = metrics["loss"][name], metrics["tokens"][name]
                aggregator.record("loss", loss, weight=tokens, dataset=name)
            aggregator.record("grad_norm", metrics["grad_norm"], agg="max")
            for device, norm in enumerate(metrics["grad_norms"]):
                aggregator.record(f"grad_norm/device_{device}", norm, agg="max")
        logs += 1
        logger.log(logs, aggregator, prefix="train")
        jax.block_until_ready(states[on])

    ways: dict[str, Callable[[], object]] = {
        _OFF: lambda: without(lambda loss: None),
        _ON: recorded,
        _WAITING: lambda: without(float),
    }
    for way in ways.values():
        way()  # compiles
    return ways


def _without_metrics(graph: Any, mesh: Any, datasets: int) -> Any:
    """Return the demo's step, compiled, which gives back the state and the loss alone."""
    import jax
    from flax import nnx
    from jax import lax
    from jax.sharding import PartitionSpec as P

    from metricfold.demo.jax.train import losses_by_dataset
    from metricfold.jax import DataParallel

    def train_step(state: Any, batch: Any) -> Any:
        model, optimizer = nnx.merge(graph, state)
        all_tokens = lax.pmean(batch["mask"][:, 1:].sum(), "data")

        def scaled_loss(model: Any) -> Any:
            return losses_by_dataset(model, batch, datasets)[0].sum() / all_tokens

        loss, gradients = nnx.value_and_grad(scaled_loss)(model)
        optimizer.update(model, DataParallel().all_reduce_gradients(gradients, "mean", "data"))
        return nnx.state((model, optimizer)), lax.pmean(loss, "data")

    on_devices = jax.shard_map(
        train_step, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), check_vma=False
    )
    return jax.jit(on_devices, donate_argnums=0)


if __name__ == "__main__":
    main()
