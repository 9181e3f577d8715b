"""Where the libraries are measured: a centre, and one axis at a time around it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from benchmarks.workloads import Workload, mixed

__all__ = ["FULL", "QUICK", "WINDOW", "Plan", "Point"]

WINDOW: int | None = 1000
"""Recent values that a distribution keeps where a library lets one choose; None: all of them."""


@dataclass(frozen=True, slots=True)
class Point:
    """One place at which every library is measured.

    Args:
        metrics: sums, means, maxima and minima, in equal parts.
        ranks: processes.
        samples: values of each metric on each rank between two logs.
        distributions: metrics whose percentiles are asked for, besides.
    """

    metrics: int
    ranks: int
    samples: int
    distributions: int

    def workload(self, window: int | None) -> Workload:
        return mixed(self.metrics, self.distributions, self.samples, window)

    def tiny(self, window: int | None) -> Workload:
        """Return a workload of the same kinds that is no work."""
        return mixed(4, min(self.distributions, 1), 10, window)

    def as_json(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure.

    Args:
        axes: points by the name of what differs between them, ascending.
        seconds: how long to time the logs of one library at one point, with their intervals.
        logs: how many are timed at most.
    """

    axes: Mapping[str, Sequence[Point]]
    seconds: float
    logs: int


def _around(centre: Point, axis: str, values: Sequence[int]) -> list[Point]:
    return [replace(centre, **{axis: value}) for value in values]


_CENTRE = Point(metrics=100, ranks=4, samples=1000, distributions=0)
# Libraries that keep every value of every metric would need a machine of its own at the centre.
_MANY_SAMPLES = Point(metrics=4, ranks=2, samples=1000, distributions=1)

FULL = Plan(
    {
        "metrics": _around(_CENTRE, "metrics", (10, 100, 1000)),
        "ranks": _around(_CENTRE, "ranks", (1, 2, 4, 8)),
        "distributions": _around(_CENTRE, "distributions", (0, 10, 50)),
        "samples": _around(_MANY_SAMPLES, "samples", (10**3, 10**4, 10**5, 10**6, 10**7)),
    },
    seconds=1.0,
    logs=40,
)

_SMALL_CENTRE = Point(metrics=8, ranks=2, samples=100, distributions=0)

QUICK = Plan(
    {
        "metrics": _around(_SMALL_CENTRE, "metrics", (4, 8)),
        "ranks": _around(_SMALL_CENTRE, "ranks", (1, 2)),
        "distributions": _around(_SMALL_CENTRE, "distributions", (0, 2)),
        "samples": _around(_MANY_SAMPLES, "samples", (10**2, 10**3)),
    },
    seconds=0.1,
    logs=3,
)
