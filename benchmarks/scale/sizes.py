"""How much to simulate."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.scale.workloads import MEANS, MIXTURE, PERCENTILES
from benchmarks.workloads import Workload, large

__all__ = ["FULL", "QUICK", "Sizes"]


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many ranks, and how often.

    Args:
        workloads: what is logged.
        worlds: numbers of ranks.
        real: how many ranks of each have values of their own.
        logs: how many are measured on the wide route, whose cost is small.
        few_logs: how many on the narrow one.
        most_gathered: bytes that an all-gather may bring to one rank; beyond, there is none.
        different: numbers of different news in the first log.
        samples: values of each unbounded distribution on each rank.
        many_ranks: of the world that those are logged in.
    """

    workloads: tuple[Workload, ...]
    worlds: tuple[int, ...]
    real: int
    logs: int
    few_logs: int
    most_gathered: int
    different: tuple[int, ...]
    samples: tuple[int, ...]
    many_ranks: int


FULL = Sizes(
    workloads=(MEANS, PERCENTILES, MIXTURE),
    worlds=(16, 64, 256, 1024, 4096, 16_384),
    real=4,
    logs=9,
    few_logs=3,
    most_gathered=2**30,
    different=(1, 16),
    samples=(100, 1000, 10_000, 100_000),
    many_ranks=10_000,
)

QUICK = Sizes(
    workloads=(MEANS, large(datasets=3, window=50)),
    worlds=(16, 64),
    real=2,
    logs=1,
    few_logs=1,
    most_gathered=2**24,
    different=(1, 2),
    samples=(10, 100),
    many_ranks=64,
)
