"""A log's numbers are computed by kind, many keys at once: each is what plain code says of its key."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
from handlers_of_users import LaneRMS, RMSHandler
from hypotheses import examples
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_threads

from metricfold import (
    DistributionAggHandler,
    MaxAggHandler,
    MeanAggHandler,
    MetricsAggregator,
    Snapshot,
    SumAggHandler,
)
from metricfold._core.fold.sample import Pool
from metricfold._core.fold.statistics import Pools, statistics

WINDOW = 6
"""Recent values that a rank keeps; no more come in between two reductions."""


class DoubledMean(MeanAggHandler):
    """Overrides the result of a built-in type."""

    def result(self, lanes: Mapping[str, float]) -> float:
        return 2.0 * super().result(lanes)


class SpreadHandler(DistributionAggHandler):
    """Overrides what is printed of a built-in type."""

    def suffixes(self) -> tuple[str, ...]:
        return ("_spread",)

    def finalize(self, state: Any) -> dict[str, float]:
        found = super().finalize(state)
        return {"_spread": found["_stat_max"] - found["_stat_min"]} if "_stat_max" in found else {}


class OwnMax(MaxAggHandler):
    """Overrides a method of the contract, and so has no lanes."""

    def initialize_metric_state(self, *args: Any) -> Any:
        return super().initialize_metric_state(*args)


HANDLERS = {
    "skipping mean": MeanAggHandler(on_nan="skip"),
    "skipping max": MaxAggHandler(on_nan="skip"),
    "counted sum": SumAggHandler(),
    "doubled": DoubledMean(),
    "rms": LaneRMS(),
    "spread": SpreadHandler(WINDOW),
    "own max": OwnMax(),
    "root": RMSHandler(),
}
TOTALS = {"sum", "counted sum", "categorical_count"}
WITHOUT_LANES = {"own max", "root"}
TYPES = ("sum", "mean", "max", "min", "rate", "distribution", "categorical_count", *HANDLERS)
DATASETS = ("", "a", "b/x", "b/y", "c")


class Came(NamedTuple):
    """A value that came in."""

    interval: int
    rank: int
    value: Any
    weight: float


def world(chance: random.Random) -> tuple[dict[tuple[str, str], list[Came]], int, int]:
    """Return what comes in, by dataset and name, in order; a metric is called as its type."""
    ranks, intervals = chance.randint(1, 8), chance.randint(1, 3)
    came: dict[tuple[str, str], list[Came]] = {}
    for kind in TYPES:
        datasets = chance.sample(DATASETS[1:], chance.randint(1, 4))
        for dataset in [""] if chance.random() < 0.2 else sorted(datasets):
            some = came.setdefault((dataset, kind), [])
            for interval in range(intervals):
                for rank in range(ranks):
                    for _ in range(chance.choice((0, 0, 1, 2, WINDOW))):
                        # Of such numbers sums are exact, in whichever order.
                        value: Any = chance.randint(-8, 8) / 4
                        if kind == "categorical_count":
                            value = f"kind_{chance.randint(0, 5)}"
                        elif chance.random() < 0.05 and kind not in WITHOUT_LANES:
                            value = chance.choice((math.nan, math.inf, -math.inf))
                        weighs = kind in ("mean", "skipping mean", "doubled")
                        weight = chance.choice((1.0, 2.0, 0.5)) if weighs else 1.0
                        some.append(Came(interval, rank, value, weight))
    return {key: some for key, some in came.items() if some}, ranks, intervals


def reduced(
    communicator: Any, came: Mapping[tuple[str, str], list[Came]], intervals: int
) -> Snapshot:
    aggregator = MetricsAggregator(dist_window_size=WINDOW, communicator=communicator)
    for label, handler in HANDLERS.items():
        aggregator.register_handler(label, handler)
    if any(kind == "max" for _, kind in came):
        aggregator.derive("twice", lambda values: 2.0 * values["max"], window="run")
    for interval in range(intervals):
        for (dataset, kind), some in came.items():
            for one in some:
                if (one.interval, one.rank) == (interval, communicator.rank):
                    where = {"dataset": dataset or None, "weight": one.weight}
                    aggregator.record(kind, one.value, kind, **where)
        snapshot = aggregator.reduce()
    return snapshot


# -- Plain code ----------------------------------------------------------------------------------


def plain(kind: str, some: list[Came], seconds: float) -> dict[str, float]:
    """Return what is printed of values of one type, by suffix."""
    if kind == "categorical_count":
        categories = [one.value for one in some]
        return {f"_count_{name}": float(categories.count(name)) for name in categories}
    values = np.array([one.value for one in some])
    weights = np.array([one.weight for one in some])
    if kind in ("distribution", "spread"):
        return spread_of(values) if kind == "distribution" else only_spread(values)
    nans = int(np.isnan(values).sum())
    if nans and not kind.startswith("skipping"):
        return {"": math.nan} if kind != "rate" or seconds else {}
    values, weights = values[~np.isnan(values)], weights[~np.isnan(values)]
    found = {"_nan_count": float(nans)} if nans else {}
    if values.size:
        with np.errstate(invalid="ignore"):
            found[""] = float(NUMBERS[kind](values, weights, seconds))
    return found


NUMBERS: dict[str, Any] = {
    "sum": lambda values, _, __: values.sum(),
    "counted sum": lambda values, _, __: values.sum(),
    "mean": lambda values, weights, _: (values * weights).sum() / weights.sum(),
    "skipping mean": lambda values, weights, _: (values * weights).sum() / weights.sum(),
    "doubled": lambda values, weights, _: 2 * ((values * weights).sum() / weights.sum()),
    "max": lambda values, _, __: values.max(),
    "skipping max": lambda values, _, __: values.max(),
    "min": lambda values, _, __: values.min(),
    "rate": lambda values, _, seconds: values.sum() / seconds,
    "rms": lambda values, _, __: ((values**2).sum() / values.size) ** 0.5,
}


def spread_of(values: npt.NDArray[np.float64]) -> dict[str, float]:
    finite = values[np.isfinite(values)]
    found = {}
    if finite.size:
        found = {"mean": finite.mean(), "min": finite.min(), "max": finite.max()}
        if finite.size > 1:
            found["std"] = finite.std(ddof=1)
        for name, q in (("p05", 0.05), ("p50", 0.5), ("p95", 0.95)):
            found[name] = np.quantile(finite, q)
        found["count"] = finite.size
    if np.isnan(values).any():
        found["nan_count"] = np.isnan(values).sum()
    if np.isinf(values).any():
        found["inf_count"] = np.isinf(values).sum()
    return {f"_stat_{name}": float(value) for name, value in found.items()}


def only_spread(values: npt.NDArray[np.float64]) -> dict[str, float]:
    finite = values[np.isfinite(values)]
    return {"_spread": float(finite.max() - finite.min())} if finite.size else {}


def in_view(kind: str, some: list[Came], view: str, last: int, ranks: int) -> list[Came]:
    """Return the values that a view speaks about; of a distribution's run the most recent."""
    if view == "interval":
        chosen = [one for one in some if one.interval == last]
        return sorted(chosen, key=lambda one: one.rank)
    if kind not in ("distribution", "spread"):
        return some
    recent: list[Came] = []
    for rank in range(ranks):
        own = [one for one in some if one.rank == rank and math.isfinite(one.value)]
        recent += own[-WINDOW:]
    # What is no number is counted all the same.
    return recent + [one for one in some if not math.isfinite(one.value)]


def expected(
    came: Mapping[tuple[str, str], list[Came]],
    snapshot: Snapshot,
    window: Any,
    last: int,
    **totals: Any,
) -> dict[str, float]:
    """Return the dict that plain code makes, one key at a time."""

    def results(kind: str, members: list[str], view: str = "") -> dict[str, float]:
        view = view or (window.get(kind, "auto") if isinstance(window, dict) else window)
        if view == "auto":
            view = "run" if kind in TOTALS else "interval"
        parts = (came[dataset, kind] for dataset in members)
        ranks = snapshot.world_size
        some = list(chain.from_iterable(in_view(kind, one, view, last, ranks) for one in parts))
        seconds = snapshot.run_seconds if view == "run" else snapshot.seconds
        return plain(kind, some, seconds) if some else {}

    found: dict[str, float] = {}

    def add(place: str, kind: str, values: Mapping[str, float]) -> None:
        found.update({f"{place}/{kind}{suffix}": value for suffix, value in values.items()})

    def derive(place: str, kind: str, members: list[str]) -> None:
        if kind == "max":
            values = results(kind, members, "run")
            add(place, "twice", {suffix: 2.0 * value for suffix, value in values.items()})

    for dataset, kind in came:
        if kind not in WITHOUT_LANES:
            place = f"t_{dataset}" if dataset else "t"
            add(place, kind, results(kind, [dataset]))
            derive(place, kind, [dataset])
    for kind in TYPES:
        datasets = [dataset for dataset, name in came if name == kind and dataset]
        if kind in WITHOUT_LANES or not datasets:
            continue
        if totals["rollup"]:
            add("t", kind, results(kind, datasets))
            derive("t", kind, datasets)
        below = [dataset for dataset in datasets if dataset.startswith("b/")]
        if totals["rollup"] == "levels" and below:
            add("t_b", kind, results(kind, below))
            derive("t_b", kind, below)
        if totals["macro"] and kind in ("mean", "skipping mean", "doubled"):
            each = [results(kind, [dataset]) for dataset in datasets]
            means = [one.get("", math.nan) for one in each if one]
            if means:
                with np.errstate(invalid="ignore"):
                    found[f"t/{kind}_macro"] = float(np.mean(means))
    return found


WINDOWS = ("run", "interval", "auto", {"mean": "run", "distribution": "run", "sum": "interval"})


@given(seed=st.integers(0, 2**32))
@examples(40)
def test_the_dict_of_a_log_is_bit_for_bit_what_plain_code_says_key_by_key(seed: int) -> None:
    chance = random.Random(seed)
    came, ranks, intervals = world(chance)
    snapshot = run_threads(reduced, ranks, came, intervals)[chance.randrange(ranks)]
    for window in WINDOWS:
        totals = {"rollup": chance.choice((False, True, "levels")), "macro": chance.random() < 0.5}
        found = snapshot.as_dict("t", window, **totals)
        lanes = {key: value for key, value in found.items() if not of_no_lanes(key)}
        wanted = expected(came, snapshot, window, intervals - 1, **totals)
        assert lanes.keys() == wanted.keys()
        for key, value in wanted.items():
            exact = "_stat_std" not in key and "_stat_mean" not in key
            assert lanes[key] == (
                pytest.approx(value, nan_ok=True, abs=0, rel=0 if exact else 1e-15)
            ), key
        for dataset, kind in came:
            place = f"t_{dataset}" if dataset else "t"
            own = [key for key in found if key.startswith(f"{place}/{kind}")]
            if found.get(f"{place}/{kind}") is not None and kind not in WITHOUT_LANES and own:
                alone = snapshot.value(dataset, kind, window=window)
                assert alone == pytest.approx(found[f"{place}/{kind}"], abs=0, rel=0, nan_ok=True)


def of_no_lanes(key: str) -> bool:
    return key.partition("/")[2].startswith(tuple(WITHOUT_LANES)) or key.endswith(
        tuple(f"/{kind}" for kind in WITHOUT_LANES)
    )


# -- Many pools at once --------------------------------------------------------------------------

PERCENTILES = (0.0, 5.0, 33.3, 50.0, 99.9, 100.0)
SHAPES: dict[str, Any] = {
    "lengths": lambda rng, n: rng.lognormal(6, 1, n).round(),
    "any sign": lambda rng, n: rng.normal(size=n),
    "negative": lambda rng, n: -rng.lognormal(0, 3, n),
    "300 +- 0.1": lambda rng, n: rng.normal(300, 0.1, n),
    "one far out": lambda rng, n: np.append(rng.normal(300, 0.1, n - 1), 1e30),
    "constant": lambda rng, n: np.full(n, 2.5),
    "zeros of both signs": lambda rng, n: rng.choice([0.0, -0.0, 1.0], n),
    "huge and tiny": lambda rng, n: rng.normal(size=n) * 1e306 * rng.choice([1.0, 1e-300], n),
    "below the least normal float": lambda rng, n: rng.normal(size=n) * 1e-310,
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [1, 2, 17, 1000, 2500, 4001])
def test_statistics_of_many_pools_at_once_are_those_of_each_by_numpy(shape: str, size: int) -> None:
    rng = np.random.default_rng(size)
    samples = [SHAPES[shape](rng, size) for _ in range(11)]
    # Weighted ones stand between them, and others of another size.
    others = [Pool(np.arange(1.0, 4.0), np.array([1.0, 2.0, 1.0])), Pool(np.arange(5.0))]
    pools = Pools.of([Pool(samples[0]), *others, *map(Pool, samples[1:])], PERCENTILES)
    found = {name: one.of(pools) for name, one in statistics(PERCENTILES).items()}
    for values, place in zip(samples, [0, *range(3, 13)], strict=True):
        quantiles = np.quantile(values, np.array(PERCENTILES) / 100.0)
        names = ("p00", "p05", "p33.3", "p50", "p99.9", "p100")
        wanted = dict(zip(names, quantiles.tolist(), strict=True))
        wanted |= {"min": values.min(), "max": values.max(), "count": values.size}
        for name, value in wanted.items():
            assert found[name][place] == value, name
        assert found["mean"][place] == pytest.approx(values.mean(), rel=1e-12, abs=5e-324)
        with np.errstate(over="ignore"):
            std = values.std(ddof=1) if size > 1 else 0.0
        if np.isfinite(std):
            assert found["std"][place] == pytest.approx(std, rel=1e-9, abs=1e-160)
    assert [found[name][1] for name in ("mean", "p50", "count")] == [2.0, 2.0, 3.0]
    assert [found[name][2] for name in ("mean", "p50", "count")] == [2.0, 2.0, 5.0]
