"""What a metric costs on its way into an accumulator outside of a compiled step: JAX, one device."""

from __future__ import annotations

import time
from importlib.util import find_spec
from typing import Any

from benchmarks.own_process import found_in_own_process, print_found
from benchmarks.table import Section, at_most, cost, seconds_of
from benchmarks.timing import interleaved

_SAMPLES = 32
_OURS, _NNX = "ours", "an nnx Average"


def measure(*, quick: bool) -> list[Section]:
    """Return what the first update and further ones take; nothing without JAX."""
    if not (find_spec("jax") and find_spec("flax")):
        return []
    first, further = found_in_own_process("benchmarks.accumulation_jax", quick=quick)
    rows = [
        seconds_of("the first", [first], "s", at_most(1)),
        cost("another", further[_OURS], _NNX, further[_NNX], at_most(5)),
    ]
    return [Section("JAX: update outside of jit, a loss of one dataset", rows)]


# -- In the process with JAX ---------------------------------------------------------------------


def _found(quick: bool) -> tuple[float, dict[str, list[float]]]:
    """Return the seconds of the first update, and of the further ones, round by round.

    Each waits until its numbers are there.
    """
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from metricfold.jax import DeviceAccumulator

    losses: Any = jnp.linspace(0.5, 1.5, _SAMPLES)
    kept = [DeviceAccumulator({"loss": "mean"})]
    average = nnx.metrics.Average("loss")

    def ours() -> None:
        kept[0] = jax.block_until_ready(kept[0].update("loss", losses))

    def theirs() -> None:
        average.update(loss=losses)
        jax.block_until_ready((average.total[...], average.count[...]))

    began = time.perf_counter()
    ours()
    first = time.perf_counter() - began
    return first, interleaved({_OURS: ours, _NNX: theirs}, 3 if quick else 25)


if __name__ == "__main__":
    print_found(_found)
