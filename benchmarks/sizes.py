"""How much to measure."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FULL", "QUICK", "Sizes"]


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many rounds, ranks and samples a run takes.

    Args:
        rounds: turns of each contender in one process.
        logs: rounds of logs over ranks of the large workload.
        small_logs: the same of the small one, whose logs are quick and at the scheduler's mercy.
        slow_every: contenders that take long have a turn in every so many of those.
        world_sizes: numbers of ranks.
        datasets: datasets of the large workload.
        window: values of each of its distributions.
        means: metrics of the small workload.
        keys: metrics of a log that has very many.
        imports: interpreters started.
        device_metrics: numbers of metrics that a compiled step reduces over devices.
        compilations: how often each such step is compiled.
    """

    rounds: int
    logs: int
    small_logs: int
    slow_every: int
    world_sizes: tuple[int, ...]
    datasets: int
    window: int
    means: int
    keys: int
    imports: int
    device_metrics: tuple[int, ...]
    compilations: int


FULL = Sizes(
    rounds=25,
    logs=48,
    small_logs=240,
    slow_every=6,
    world_sizes=(1, 2, 4, 8),
    datasets=50,
    window=1000,
    means=100,
    keys=47_000,
    imports=11,
    device_metrics=(20, 100),
    compilations=5,
)

QUICK = Sizes(
    rounds=3,
    logs=4,
    small_logs=6,
    slow_every=2,
    world_sizes=(1, 2),
    datasets=3,
    window=50,
    means=10,
    keys=500,
    imports=1,
    device_metrics=(5,),
    compilations=1,
)
