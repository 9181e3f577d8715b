"""What metrics cost on their way into an accumulator, without a log: JAX, one device, one process.

The compiled steps themselves do next to nothing, so that what is added to them shows; each waits until
its weight is there, as the next one would.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

from benchmarks.own_process import found_in_own_process, print_found
from benchmarks.table import Section, at_most, cost, seconds_of, speedup
from benchmarks.timing import interleaved

_DATASETS, _SAMPLES = 8, 32
_BARE = "the step alone"
_OURS = "DeviceAccumulator inside"
_BY_HAND = "sums and counts by segment_sum"
_CLU = f"{_DATASETS} clu Averages, masked and merged inside"
_NNX = f"{_DATASETS} nnx Averages, masked, split and merged inside"


def measure(*, quick: bool) -> list[Section]:
    """Return what each way to keep losses makes of the step's time; nothing without JAX."""
    if not (find_spec("jax") and find_spec("flax")):
        return []
    found = found_in_own_process("benchmarks.accumulation_jax", quick=quick)
    each, eager = found["each"], found["eager"]
    datasets = Section(
        f"JAX: a tiny step that keeps the loss of each of {_DATASETS} datasets, {_SAMPLES} samples"
    )
    datasets.rows = [cost(way, each[way], _BARE, each[_BARE]) for way in each if way != _BARE]
    datasets.rows += [
        speedup(_OURS, each[_OURS], other, each[other]) for other in (_CLU, _NNX) if other in each
    ]
    outside = [
        seconds_of("the first", found["first"], "s", at_most(1)),
        cost("another", eager[_OURS], "an nnx Average", eager[_NNX], at_most(5)),
    ]
    return [Section("JAX: update outside of jit, a loss of one dataset", outside), datasets]


# -- In the process with JAX ---------------------------------------------------------------------


def _found(quick: bool) -> dict[str, Any]:
    """Return the seconds of each way, round by round."""
    rounds = 3 if quick else 25
    first, eager = _eager()
    return {
        "first": [first],
        "eager": interleaved(eager, rounds),
        "each": interleaved(_with_a_loss_each(), rounds),
    }


def _eager() -> tuple[float, dict[str, Callable[[], object]]]:
    """Return the seconds of the first update, and what the further ones are."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from metricfold.jax import DeviceAccumulator

    losses = jnp.linspace(0.5, 1.5, _SAMPLES)
    kept = [DeviceAccumulator({"loss": "mean"})]
    average = nnx.metrics.Average("loss")

    def ours() -> None:
        kept[0] = jax.block_until_ready(kept[0].update("loss", losses))

    def theirs() -> None:
        average.update(loss=losses)
        jax.block_until_ready((average.total[...], average.count[...]))

    began = time.perf_counter()
    ours()
    return time.perf_counter() - began, {_OURS: ours, _NNX: theirs}


def _with_a_loss_each() -> dict[str, Callable[[], object]]:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from metricfold.jax import DeviceAccumulator

    x, weight = jnp.linspace(0.5, 1.5, _SAMPLES), jnp.float32(1)
    ids = jnp.arange(_SAMPLES) % _DATASETS

    def trained(weight: Any) -> tuple[Any, Any]:
        return weight + 1e-6, x * weight

    step = jax.jit(trained)
    names = [f"dataset_{i}" for i in range(_DATASETS)]
    graph, state = nnx.split(
        nnx.MultiMetric(**{name: nnx.metrics.Average("loss") for name in names})
    )

    def updated(state: Any, losses: Any, ids: Any) -> Any:
        metrics = nnx.merge(graph, state)
        metrics.update(loss=losses, mask={name: ids == i for i, name in enumerate(names)})
        return nnx.state(metrics)

    def added(state: Any, losses: Any, ids: Any) -> Any:
        sums, counts = state
        return (
            sums + jax.ops.segment_sum(losses, ids, _DATASETS),
            counts + jax.ops.segment_sum(jnp.ones_like(ids), ids, _DATASETS),
        )

    def with_ids(state: Any, add: Callable[[Any, Any, Any], Any]) -> Callable[[], None]:
        return _carrying(trained, weight, state, add, ids)

    ways: dict[str, Callable[[], object]] = {
        _BARE: lambda: jax.block_until_ready(step(weight)[0]),
        _OURS: with_ids(
            DeviceAccumulator({"loss": "mean"}, datasets=names),
            lambda acc, losses, ids: acc.update("loss", losses, dataset_ids=ids),
        ),
        _BY_HAND: with_ids((jnp.zeros(_DATASETS), jnp.zeros(_DATASETS, jnp.int32)), added),
        _NNX: with_ids(state, updated),
    }
    if find_spec("clu"):
        from clu.metrics import Average

        ways[_CLU] = with_ids(
            [Average.empty() for _ in names],
            lambda averages, losses, ids: [
                average.merge(Average.from_model_output(losses, mask=ids == i))
                for i, average in enumerate(averages)
            ],
        )
    return ways


def _carrying(
    trained: Callable[[Any], tuple[Any, Any]],
    weight: Any,
    state: Any,
    add: Callable[..., Any],
    *others: Any,
) -> Callable[[], None]:
    """Return a step that carries `state`, to which `add` adds the loss inside, given `others` too."""
    import jax

    @partial(jax.jit, donate_argnums=1)
    def carry(weight: Any, state: Any, *others: Any) -> tuple[Any, Any]:
        new, loss = trained(weight)
        return new, add(state, loss, *others)

    carried = [state]

    def run() -> None:
        new, carried[0] = carry(weight, carried[0], *others)
        new.block_until_ready()

    return run


if __name__ == "__main__":
    print_found(_found)
