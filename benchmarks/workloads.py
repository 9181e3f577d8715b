"""What training has to say between two logs, in terms that belong to no library."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["Column", "Workload", "large", "small"]

Values: TypeAlias = "npt.NDArray[np.float64] | list[str]"


@dataclass(frozen=True, slots=True)
class Column:
    """Values of one metric, in order of arrival; categories are texts."""

    dataset: str
    name: str
    aggregation: str
    values: Values

    def plain(self) -> list[float] | list[str]:
        return self.values if isinstance(self.values, list) else self.values.tolist()


@dataclass(frozen=True, slots=True)
class Workload:
    """Metrics of one kind of training run.

    Args:
        title: how the table calls it.
        datasets: how many datasets; each has all of the following.
        scalars: names and aggregations.
        window: values of one distribution that come in between two logs; 0 for no distribution.
        categories: how many categories the one categorical metric has; 0 for none.
        batches: in how many pieces an interval comes in.
    """

    title: str
    datasets: int
    scalars: tuple[tuple[str, str], ...]
    window: int = 0
    categories: int = 0
    batches: int = 4

    def interval(self, rank: int, number: int) -> Iterator[list[Column]]:
        """Yield the batches of one interval; every rank and every interval has other values."""
        random = np.random.default_rng((rank, number))
        for _ in range(self.batches):
            yield [column for index in range(self.datasets) for column in self._of(index, random)]

    def _of(self, index: int, random: np.random.Generator) -> Iterator[Column]:
        dataset = f"dataset_{index:02d}"
        for name, aggregation in self.scalars:
            yield Column(dataset, name, aggregation, random.normal(3.0, 1.0, 16))
        if self.window:
            values = random.lognormal(6.0, 1.0, max(self.window // self.batches, 1))
            yield Column(dataset, "seq_len", "distribution", values)
        if self.categories:
            # Each category occurs, so that the schema is complete after the first log.
            texts = [f"kind_{number:02d}" for number in range(self.categories)]
            yield Column(dataset, "kind", "categorical_count", texts * 2)


_SCALARS = (
    ("tokens_seen", "sum"),
    ("samples_seen", "sum"),
    ("loss", "mean"),
    ("grad_norm", "max"),
    ("shortest", "min"),
)


def large(datasets: int, window: int) -> Workload:
    """Return 5 scalars, a distribution and 20 categories per dataset."""
    title = f"{datasets} datasets x (5 scalars + {window}-value distribution + 20 categories)"
    return Workload(title, datasets, _SCALARS, window, 20)


def small(means: int) -> Workload:
    """Return means alone, without a dataset worth speaking of."""
    scalars = tuple((f"mean_{number:03d}", "mean") for number in range(means))
    return Workload(f"{means} means", 1, scalars, batches=1)
