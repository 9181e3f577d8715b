"""What training has to say between two logs, in terms that belong to no library."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from metricfold import Metric, MetricBatch

INTERVALS = 3
"""So many different intervals are prepared, and fed in turn."""

Values: TypeAlias = "npt.NDArray[np.float64] | list[str]"


@dataclass(frozen=True, slots=True)
class Column:
    """Values of one metric, in order of arrival; categories are texts."""

    dataset: str
    name: str
    aggregation: str
    values: Values

    @property
    def key(self) -> str:
        """How a log calls the metric."""
        return f"train_{self.dataset}/{self.name}"


class Workload(ABC):
    """What the ranks have to say.

    Args:
        title: how the table calls it.
        window: how many recent values of a distribution a rank keeps; None: all.
        repeats: so many times over an interval's batches come in.
    """

    title: str
    window: int | None
    repeats: int

    @abstractmethod
    def interval(self, rank: int, number: int) -> Iterator[list[Column]]:
        """Yield the batches of one interval."""


def batches(workload: Workload, rank: int, number: int) -> list[MetricBatch]:
    """Return an interval as data workers hand it over."""
    return _prepared(workload, rank, number % INTERVALS)


@cache
def _prepared(workload: Workload, rank: int, number: int) -> list[MetricBatch]:
    return [
        MetricBatch.from_metrics(
            Metric(column.dataset, column.name, value, column.aggregation)
            for column in columns
            for value in np.asarray(column.values).tolist()
        )
        for columns in workload.interval(rank, number)
    ] * workload.repeats


@dataclass(frozen=True, slots=True)
class Kind:
    """A metric that each dataset has, `size` values in a batch, or so many categories.

    A distribution is of any sign if it is `signed`, or else of lengths.
    """

    name: str
    aggregation: str
    size: int
    signed: bool = False

    def values(self, random: np.random.Generator) -> Values:
        if self.aggregation == "categorical_count":
            # Each category occurs, so that the schema is complete after the first log.
            return [f"kind_{number:02d}" for number in range(self.size)] * 2
        if self.aggregation == "distribution" and not self.signed:
            return random.lognormal(6.0, 1.0, self.size)
        return random.normal(0.0 if self.signed else 3.0, 1.0, self.size)


@dataclass(frozen=True)
class Mixture(Workload):
    """A training run on some datasets; every rank and every interval has other values.

    Args:
        datasets: how many; each has all `kinds`.
        kinds: the metrics.
        pieces: in how many different batches an interval comes in.
    """

    title: str
    datasets: int
    kinds: tuple[Kind, ...]
    window: int | None = 1000
    pieces: int = 1
    repeats: int = 1

    def interval(self, rank: int, number: int) -> Iterator[list[Column]]:
        random = np.random.default_rng((rank, number))
        for _ in range(self.pieces):
            yield [
                Column(f"dataset_{index:02d}", kind.name, kind.aggregation, kind.values(random))
                for index in range(self.datasets)
                for kind in self.kinds
            ]


_SCALARS = (
    ("tokens_seen", "sum"),
    ("samples_seen", "sum"),
    ("loss", "mean"),
    ("grad_norm", "max"),
    ("shortest", "min"),
)


def large(datasets: int, window: int, *, signed: bool = False) -> Mixture:
    """Return 5 scalars, a distribution and 20 categories per dataset."""
    pieces = 4
    kinds = (
        *(Kind(name, aggregation, 16) for name, aggregation in _SCALARS),
        Kind("value" if signed else "length", "distribution", max(window // pieces, 1), signed),
        Kind("kind", "categorical_count", 20),
    )
    of = "values of any sign" if signed else "lengths"
    title = f"{datasets} datasets x (5 scalars + distribution of {window} {of} + 20 categories)"
    return Mixture(title, datasets, kinds, window, pieces)


def small(means: int) -> Mixture:
    """Return means alone, without a dataset worth speaking of."""
    kinds = tuple(Kind(f"mean_{number:03d}", "mean", 16) for number in range(means))
    return Mixture(f"{means} means", 1, kinds)


def mixed(scalars: int, distributions: int, samples: int, window: int | None) -> Mixture:
    """Return sums, means, maxima and minima in equal parts, and distributions beside them.

    Args:
        scalars: how many metrics that are one number each.
        distributions: how many metrics whose percentiles are asked for.
        samples: values of each distribution that come in between two logs on each rank; of a
            scalar there is one value in ten samples, as of a step that has so many.
        window: recent values that a distribution keeps; None: all.
    """
    aggregations = ("sum", "mean", "max", "min")
    # Few samples still come in several batches; many come in large ones, over and over.
    size = min(max(samples // 10, 1), 10_000)
    kinds = (
        *(Kind(f"scalar_{n:04d}", aggregations[n % 4], max(size // 10, 1)) for n in range(scalars)),
        *(Kind(f"length_{n:02d}", "distribution", size) for n in range(distributions)),
    )
    pieces = min(samples // size, 10)
    title = f"{scalars} scalars, {distributions} distributions, {samples:,} samples"
    return Mixture(title, 1, kinds, window, pieces, samples // (size * pieces))
