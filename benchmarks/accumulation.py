"""What a step's loss costs on its way into a metric, without a log: JAX, one device, one process.

The step itself does next to nothing, so that what is added to it shows. In a process of its own,
because one that holds JAX must not fork.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

from benchmarks.sizes import FULL, QUICK, Sizes
from benchmarks.table import Section, cost
from benchmarks.timing import interleaved

__all__ = ["measure"]

_BARE = "the step alone"


def measure(sizes: Sizes) -> list[Section]:
    """Return what each way to keep the loss makes of the step's time; nothing without JAX."""
    if not all(map(find_spec, ("jax", "flax"))):
        return []
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.accumulation", *(["--quick"] if sizes is QUICK else [])],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        check=True,
        timeout=300,
    )
    times = json.loads(done.stdout)
    section = Section("JAX: a tiny step that keeps its loss for the next log")
    section.rows = [cost(way, times[way], _BARE, times[_BARE]) for way in times if way != _BARE]
    return [section]


# -- In the process with JAX ---------------------------------------------------------------------


def main() -> None:
    """Print the seconds of each way, round by round."""
    sizes = QUICK if "--quick" in sys.argv else FULL
    print(json.dumps(interleaved(_ways(), sizes.rounds)))


def _ways() -> dict[str, Callable[[], object]]:
    """Return the steps; each waits until its weight is there, as the next one would."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from metricfold import MetricsAggregator
    from metricfold.jax import DeviceAccumulator

    x, weight = jnp.ones(64), jnp.float32(1)

    def trained(weight: Any) -> tuple[Any, Any]:
        return weight + 1e-6, (x * weight).mean()

    step = jax.jit(trained)

    def kept(keep: Callable[[Any], object]) -> None:
        new, loss = step(weight)
        keep(loss)
        new.block_until_ready()

    def carrying(state: Any, add: Callable[[Any, Any], Any]) -> Callable[[], None]:
        """Return a step that carries `state`, to which `add` adds the loss inside."""

        @partial(jax.jit, donate_argnums=1)
        def carry(weight: Any, state: Any) -> tuple[Any, Any]:
            new, loss = trained(weight)
            return new, add(state, loss)

        carried = [state]

        def run() -> None:
            new, carried[0] = carry(weight, carried[0])
            new.block_until_ready()

        return run

    aggregator = MetricsAggregator()
    outside, inside, split = (nnx.MultiMetric(loss=nnx.metrics.Average("loss")) for _ in range(3))
    graph, state = nnx.split(split)

    def updated(state: Any, loss: Any) -> Any:
        metrics = nnx.merge(graph, state)
        metrics.update(loss=loss)
        return nnx.state(metrics)

    @nnx.jit
    def with_metrics(weight: Any, metrics: Any) -> Any:
        new, loss = trained(weight)
        metrics.update(loss=loss)
        return new

    ways: dict[str, Callable[[], object]] = {
        _BARE: lambda: kept(lambda loss: None),
        "aggregator.record of the array": lambda: kept(partial(aggregator.record, "loss")),
        "DeviceAccumulator inside": carrying(
            DeviceAccumulator({"loss": "mean"}), lambda acc, loss: acc.update("loss", loss)
        ),
        "nnx.MultiMetric inside, split and merged": carrying(state, updated),
        "nnx.MultiMetric inside nnx.jit": lambda: with_metrics(weight, inside).block_until_ready(),
        "nnx.MultiMetric outside": lambda: kept(lambda loss: outside.update(loss=loss)),
        "float(loss)": lambda: kept(float),
    }
    if find_spec("clu"):
        from clu import metrics as clu

        losses = clu.Collection.create(loss=clu.Average.from_output("loss"))
        ways["clu.metrics inside, merged"] = carrying(
            losses.empty(),
            lambda seen, loss: seen.merge(losses.single_from_model_output(loss=loss)),
        )
    return ways


if __name__ == "__main__":
    main()
