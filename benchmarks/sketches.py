"""How fast a sketch of a distribution is filled; docs/histograms.md says how right it is."""

from __future__ import annotations

import numpy as np

from benchmarks.table import Section, amount, at_least
from benchmarks.timing import taken
from metricfold import LogLinearHistogram

_BATCH = 4096
_COLD = 100_000
"""Values after which what a sketch learns of its stream has not paid yet."""


def measure(*, quick: bool) -> list[Section]:
    """Return millions of values a second of CPU time, from empty to a percentile: the best turn."""
    number, rounds = (_COLD // 10, 1) if quick else (1_000_000, 7)
    random = np.random.default_rng(0)
    wide, narrow = np.ceil(random.lognormal(6.0, 1.0, number)), random.normal(2.5, 0.01, number)
    rows = [
        amount(what, max(_speed(values) for _ in range(rounds)), "M/s", budget=at_least(limit))
        for what, values, limit in (
            ("warm, wide: log-normal lengths", wide, 60),
            ("warm, narrow: 2.5 ± 0.01", narrow, 70),
            (f"cold: the first {_COLD:,} lengths", wide[:_COLD], 35),
        )
    ]
    return [Section(f"Filling a sketch, batches of {_BATCH:,}", rows)]


def _speed(values: np.ndarray) -> float:
    def fill() -> None:
        sketch = LogLinearHistogram()
        for begin in range(0, values.size, _BATCH):
            sketch.update(values[begin : begin + _BATCH])
        sketch.quantile(0.5)

    return values.size / taken(fill) / 1e6
