"""Pooled percentiles of four sketches against NumPy's, and how fast ours are filled.

Every stream is split over eight parts, as over ranks; each part is sketched on its own and the
sketches are merged. Percentiles 0.1, 0.2, ..., 99.9 of the merged sketch are then compared with
those of the pooled values:

rank    how far the estimate's place among the sorted values is from the one asked for, at worst
value   how far the estimate is from NumPy's percentile, at worst, in parts of its magnitude or of
        the distance between the quartiles, whichever is greater

The other sketches come with `pip install --group bench`; those that are not installed are left
out. Ours travels as it would between ranks: extents by MAX, then contents by SUM.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import reduce
from importlib.util import find_spec
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from benchmarks.table import Section, amount, at_least
from metricfold import LogLinearHistogram
from metricfold.histogram import EXTENTS_WIDTH, slot_width

FloatArray = npt.NDArray[np.float64]

PARTS = 8
BATCH = 4096
PERCENTILES = np.arange(1, 1000) / 1000.0


# -- Contenders ----------------------------------------------------------------------------------


class Sketch(ABC):
    """One way to summarise values."""

    name: ClassVar[str]
    package: ClassVar[str]

    @abstractmethod
    def update(self, values: FloatArray) -> None: ...

    @abstractmethod
    def quantiles(self, q: FloatArray) -> FloatArray: ...

    @classmethod
    @abstractmethod
    def merged(cls, parts: list[Any]) -> Any: ...

    @abstractmethod
    def size(self) -> int:
        """Return how many bytes it takes to send it."""


class Ours(Sketch):
    name = "log-linear 2048"
    package = "metricfold"
    max_buckets = 2048

    def __init__(self) -> None:
        self.histogram = LogLinearHistogram(self.max_buckets)

    def update(self, values: FloatArray) -> None:
        self.histogram.update(values)

    def quantiles(self, q: FloatArray) -> FloatArray:
        return self.histogram.quantile(q)

    @classmethod
    def merged(cls, parts: list[Ours]) -> Ours:
        histograms = [part.histogram for part in parts]
        extents = reduce(np.maximum, [one.extents() for one in histograms])
        lanes = reduce(np.add, [one.pack(extents, cls.max_buckets) for one in histograms])
        whole = cls()
        whole.histogram = LogLinearHistogram.unpack(extents, lanes, cls.max_buckets)
        return whole

    def size(self) -> int:
        return 8 * (EXTENTS_WIDTH + slot_width(self.max_buckets))


class OursSmall(Ours):
    name = "log-linear 512"
    max_buckets = 512


class DDSketch(Sketch):
    name = "DDSketch 1 %"
    package = "ddsketch"

    def __init__(self) -> None:
        import ddsketch

        self.sketch = ddsketch.DDSketch(0.01)

    def update(self, values: FloatArray) -> None:
        add = self.sketch.add
        for value in values.tolist():
            add(value)

    def quantiles(self, q: FloatArray) -> FloatArray:
        return np.array([self.sketch.get_quantile_value(each) for each in q.tolist()])

    @classmethod
    def merged(cls, parts: list[DDSketch]) -> DDSketch:
        whole = cls()
        for part in parts:
            whole.sketch.merge(part.sketch)
        return whole

    def size(self) -> int:
        return 8 * (len(self.sketch._store.bins) + len(self.sketch._negative_store.bins))


class Datasketch(Sketch):
    """One of Apache DataSketches."""

    package = "datasketches"
    kind: ClassVar[str]

    def __init__(self) -> None:
        import datasketches

        self.sketch = getattr(datasketches, self.kind)(200)

    def update(self, values: FloatArray) -> None:
        self.sketch.update(values)

    @classmethod
    def merged(cls, parts: list[Datasketch]) -> Datasketch:
        whole = cls()
        for part in parts:
            whole.sketch.merge(part.sketch)
        return whole

    def size(self) -> int:
        return len(self.sketch.serialize())


class KLL(Datasketch):
    name = "KLL k=200"
    kind = "kll_doubles_sketch"

    def quantiles(self, q: FloatArray) -> FloatArray:
        return np.array(self.sketch.get_quantiles(q))


class TDigest(Datasketch):
    name = "t-digest k=200"
    kind = "tdigest_double"

    def quantiles(self, q: FloatArray) -> FloatArray:
        return np.array([self.sketch.get_quantile(each) for each in q.tolist()])


CONTENDERS: tuple[type[Sketch], ...] = (Ours, OursSmall, DDSketch, KLL, TDigest)


# -- Streams -------------------------------------------------------------------------------------


def streams(n: int) -> dict[str, FloatArray]:
    """Return `n` values of every kind."""
    rng = np.random.default_rng(0)
    loss, temperature = rng.normal(2.5, 0.01, n), rng.normal(300.0, 0.1, n)
    anywhere = np.exp2(rng.uniform(-30.0, 30.0, n // 1000))
    return {
        "log-normal lengths": np.ceil(rng.lognormal(6.0, 1.0, n)),
        "normal around 0": rng.normal(0.0, 1.0, n),
        "Pareto 1.5": rng.pareto(1.5, n) + 1.0,
        "bimodal": np.where(rng.random(n) < 0.3, rng.normal(-5, 0.1, n), rng.normal(20, 3, n)),
        "constant": np.full(n, 3.14),
        "2.5 ± 0.01": loss,
        "300 ± 0.1": temperature,
        "2.5 ± 0.01, one of 1e30": np.append(loss[1:], 1e30),
        "300 ± 0.1, one of 1e30": np.append(temperature[1:], 1e30),
        "2.5 ± 0.01, one of 1e-30": np.append(loss[1:], 1e-30),
        "300 ± 0.1, one of 1e-30": np.append(temperature[1:], 1e-30),
        "300 ± 0.1, 0.1 % anywhere": np.append(temperature[n // 1000 :], anywhere),
        "300 ± 0.1 after a rise": np.append(np.linspace(20, 300, n // 99), temperature[n // 99 :]),
    }


# -- Measures ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Errors:
    rank: float
    value: float


def sketched(kind: type[Sketch], values: FloatArray) -> Sketch:
    parts = []
    for part in np.array_split(values, PARTS):
        sketch = kind()
        for begin in range(0, part.size, BATCH):
            sketch.update(part[begin : begin + BATCH])
        parts.append(sketch)
    return kind.merged(parts)


def errors(values: FloatArray, estimates: FloatArray) -> Errors:
    ordered = np.sort(values)
    # Nobody is blamed for the last bits of a float.
    slack = 1e-12 * np.abs(estimates)
    least = np.searchsorted(ordered, estimates - slack, side="left") / values.size
    most = np.searchsorted(ordered, estimates + slack, side="right") / values.size
    rank = np.maximum(least - PERCENTILES, PERCENTILES - most)
    exact = np.quantile(ordered, PERCENTILES)
    quartiles = np.quantile(ordered, [0.25, 0.75])
    scale = np.maximum(np.abs(exact), quartiles[1] - quartiles[0])
    return Errors(max(float(rank.max()), 0.0), float((np.abs(estimates - exact) / scale).max()))


def speed(kind: type[Sketch], values: FloatArray) -> float:
    """Return values per second of CPU time in batches of `BATCH`, from empty to a percentile."""
    batches = [values[begin : begin + BATCH] for begin in range(0, values.size, BATCH)]
    began = time.process_time()
    sketch = kind()
    for batch in batches:
        sketch.update(batch)
    sketch.quantiles(np.array([0.5]))
    return values.size / (time.process_time() - began)


def speeds(kinds: list[type[Sketch]], values: FloatArray, rounds: int) -> list[float]:
    """Return the best turn of each; they take turns."""
    turns = [[speed(kind, values) for kind in kinds] for _ in range(rounds)]
    return [max(found) for found in zip(*turns, strict=True)]


# -- The tables ----------------------------------------------------------------------------------


def percent(part: float) -> str:
    if part < 5e-6:
        return "< 0.001 %"
    return f"{100 * part:.2g} %" if part < 0.1 else f"{100 * part:.0f} %"


WIDE, NARROW = "log-normal lengths", "2.5 ± 0.01"
_FILLING = ((WIDE, "wide", at_least(60)), (NARROW, "narrow", at_least(70)))


def measure(*, quick: bool) -> list[Section]:
    """Return how fast ours fill, and how right all are."""
    n, rounds = (10_000, 1) if quick else (1_000_000, 7)
    kinds = [kind for kind in CONTENDERS if find_spec(kind.package)]
    data = streams(n)
    found = {
        name: [errors(values, sketched(kind, values).quantiles(PERCENTILES)) for kind in kinds]
        for name, values in data.items()
    }
    head = [f"{n:,} values over {PARTS} parts", *(kind.name for kind in kinds)]
    sections = [
        Section(
            f"Worst {what} error, percentiles 0.1 to 99.9",
            head=head,
            lines=[
                [name, *(percent(getattr(e, what)) for e in line)] for name, line in found.items()
            ],
        )
        for what in ("rank", "value")
    ]
    lines = [
        [f"M values/s, {name}", *(f"{s / 1e6:.1f}" for s in speeds(kinds, data[name], rounds))]
        for name in (WIDE, "normal around 0", NARROW)
    ]
    lines.append(
        ["bytes to send, lengths", *(f"{sketched(k, data[WIDE]).size():,}" for k in kinds)]
    )
    sections.append(Section(f"Batches of {BATCH:,}", head=["", *head[1:]], lines=lines))
    return [_filling(data, rounds), *sections]


def _filling(data: dict[str, FloatArray], rounds: int) -> Section:
    cold = [_cold(data[WIDE][:BATCH]) for _ in range(rounds)]
    rows = [amount("cold, the first batch of a sketch", max(cold), "M/s", budget=at_least(35))]
    for stream, how, budget in _FILLING:
        (best,) = speeds([Ours], data[stream], rounds)
        rows.append(amount(f"warm, {how}", best / 1e6, "M/s", budget=budget))
    return Section(f"Filling a sketch, batches of {BATCH:,}", rows)


def _cold(values: FloatArray) -> float:
    """Return millions of values a second that a sketch takes in which has none yet."""
    sketches = [Ours() for _ in range(50)]
    began = time.process_time()
    for sketch in sketches:
        sketch.update(values)
    return len(sketches) * values.size / (time.process_time() - began) / 1e6
