"""`python -m benchmarks.accuracy`: pooled percentiles of four sketches against NumPy's.

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

import argparse
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from importlib.util import find_spec
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from benchmarks.table import markdown
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


def speeds(kinds: list[type[Sketch]], values: FloatArray, rounds: int) -> list[float]:
    """Return values per second of each in batches of `BATCH`, from empty to a percentile.

    Contenders take turns, and the best turn of each counts: processor time, not the clock, since
    all of them run on one thread.
    """
    batches = [values[begin : begin + BATCH] for begin in range(0, values.size, BATCH)]
    best = [0.0] * len(kinds)
    for _ in range(rounds):
        for place, kind in enumerate(kinds):
            began = time.process_time()
            sketch = kind()
            for batch in batches:
                sketch.update(batch)
            sketch.quantiles(np.array([0.5]))
            best[place] = max(best[place], values.size / (time.process_time() - began))
    return best


def reproducible(kind: type[Sketch], values: FloatArray) -> str:
    once = sketched(kind, values).quantiles(PERCENTILES)
    again = sketched(kind, values).quantiles(PERCENTILES)
    if not (once == again).all():
        return "no"
    shuffled = np.random.default_rng(1).permutation(values)
    other = sketched(kind, shuffled).quantiles(PERCENTILES)
    same = np.allclose(once, other, rtol=1e-9, atol=0.0)
    return "in any order" if same else "in the same order"


# -- The table -----------------------------------------------------------------------------------


def percent(part: float) -> str:
    if part < 5e-6:
        return "< 0.001 %"
    return f"{100 * part:.2g} %" if part < 0.1 else f"{100 * part:.0f} %"


def main() -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", allow_abbrev=False)
    parser.add_argument("--values", type=int, default=1_000_000, help="values per stream")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each when timed")
    chosen = parser.parse_args()
    n, rounds = chosen.values, chosen.rounds
    kinds = [kind for kind in CONTENDERS if find_spec(kind.package)]
    for missing in sorted({kind.package for kind in CONTENDERS} - {kind.package for kind in kinds}):
        print(f"{missing} is not installed: pip install --group bench", file=sys.stderr)

    data = streams(n)
    found: dict[str, list[Errors]] = {}
    for name, values in data.items():
        print(f"sketching: {name}", file=sys.stderr, flush=True)
        found[name] = [errors(values, sketched(k, values).quantiles(PERCENTILES)) for k in kinds]

    head = [f"{n:,} values over {PARTS} parts", *(kind.name for kind in kinds)]
    measures: dict[str, Callable[[Errors], float]] = {
        "worst rank error, 0.1 to 99.9": lambda error: error.rank,
        "worst value error, 0.1 to 99.9": lambda error: error.value,
    }
    for title, measure in measures.items():
        rows = [[name, *(percent(measure(e)) for e in line)] for name, line in found.items()]
        print(f"\n{title}\n\n{markdown(head, rows)}")

    wide = data["log-normal lengths"]
    rows = [
        [f"M values/s, {name}", *(f"{s / 1e6:.1f}" for s in speeds(kinds, data[name], rounds))]
        for name in ("log-normal lengths", "normal around 0", "2.5 ± 0.01")
    ]
    rows += [
        ["bytes to send, lengths", *(f"{sketched(k, wide).size():,}" for k in kinds)],
        ["same result", *(reproducible(k, wide[:200_000]) for k in kinds)],
        ["merges by an all-reduce", *("yes" if issubclass(k, Ours) else "no" for k in kinds)],
    ]
    print(f"\nbatches of {BATCH}\n\n{markdown(['', *head[1:]], rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
