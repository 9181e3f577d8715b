"""Random programs of public calls come to what a few lists of values say that they come to.

A program puts values in by every way there is, on one to three ranks, with marks, mistakes, reductions
that succeed or fail while more comes in, checkpoints, restarts with other ranks and merges with other jobs.
The model keeps, for each rank, what waits, what the open interval has and what the run has, as plain
lists. Where the two differ, the seed is the program.
"""

from __future__ import annotations

import math
import pickle
import random
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from handlers_of_users import LaneRMS

from metricfold import (
    MeanAggHandler,
    Metric,
    MetricBatch,
    MetricsAggregator,
    MetricState,
    Snapshot,
    merge_state_dicts,
)
from metricfold.communicator.threads import thread_world

WEIGHTED = ("mean", "contract", "distribution")
TYPES = (*WEIGHTED, "sum", "max", "min", "categorical_count", "lanes")
TOTALS = ("sum", "categorical_count")
WITHOUT_LANES = ("contract",)
WITH_AXES = ("mean", "sum", "max", "min", "lanes")
BY = ("layer", "part")
DATASETS = ("code/python", "code/rust", "web", "")
NUMBERS = (0.0, 1.0, -3.0, 1000.0, 0.5, -1.25, 7.75, math.nan, math.inf)
CATEGORIES = ("a", "b c", "é")


class Value(NamedTuple):
    """One value that counts, as the model has it."""

    dataset: str
    agg: str
    value: Any
    weight: float
    cell: str = ""  # what is printed of it with all axes, behind the name

    @property
    def name(self) -> str:
        # A metric without a dataset has a name of its own, for totals over datasets have the other.
        return f"{'m' if self.dataset else 'lone'} {self.agg}" + " cells" * bool(self.cell)


class ByContract(MeanAggHandler):
    """A mean again, which its override of a method makes a handler without lanes."""

    def update(self, local_agg_metric: MetricState, metric: Metric) -> None:
        super().update(local_agg_metric, metric)


def come_to(agg: str, values: list[Value], on_nan: str) -> dict[str, float]:
    """Return what values print, by suffix."""
    if agg == "categorical_count":
        counts: dict[str, float] = {}
        for one in values:
            counts[f"_count_{one.value}"] = counts.get(f"_count_{one.value}", 0.0) + 1.0
        return counts
    numbers = np.array([one.value for one in values])
    weights = np.array([one.weight for one in values])
    nans = int(np.isnan(numbers).sum())
    if agg == "distribution":
        finite = np.isfinite(numbers)
        infinities = len(values) - int(finite.sum()) - nans
        numbers, weights = numbers[finite], weights[finite]
        found = {"_stat_nan_count": float(nans), "_stat_inf_count": float(infinities)}
        if len(numbers):
            found["_stat_mean"] = float(numbers @ weights / weights.sum())
            found |= {"_stat_min": float(numbers.min()), "_stat_max": float(numbers.max())}
            found["_stat_count"] = float(len(numbers))
        return {suffix: value for suffix, value in found.items() if value or "_inf" not in suffix}
    skips = on_nan == "skip" and agg not in ("lanes", "contract")
    if nans and not skips:
        return {"": math.nan}
    numbers, weights = numbers[~np.isnan(numbers)], weights[~np.isnan(numbers)]
    found = {"_nan_count": float(nans)} if nans else {}
    if len(numbers):
        results: dict[str, Callable[[], Any]] = {
            "sum": numbers.sum,
            "max": numbers.max,
            "min": numbers.min,
            "lanes": lambda: math.sqrt((numbers**2).mean()),
        }
        found[""] = float(results.get(agg, lambda: numbers @ weights / weights.sum())())
    return found


class Job:
    """The aggregators of some ranks, and the model of what they hold."""

    def __init__(self, chance: random.Random, world_size: int, route: str, **options: Any) -> None:
        self.chance, self.ranks, self.options = chance, range(world_size), options
        self.on_nan = options["on_nan"]
        self.aggregators = [
            MetricsAggregator(communicator=communicator, route=route, **options)
            for communicator in thread_world(world_size)
        ]
        for aggregator in self.aggregators:
            aggregator.register_handler("lanes", LaneRMS())
            aggregator.register_handler("contract", ByContract())
        self.pool = ThreadPoolExecutor(world_size)
        self.start([], [])

    def start(self, run: list[Value], interval: list[Value]) -> None:
        self.waits: list[list[Value]] = [[] for _ in self.ranks]
        self.marks: list[Any] = [None for _ in self.ranks]
        self.run, self.interval = run, interval

    # -- On one rank

    def act(self) -> None:
        """Let something happen on some rank."""
        rank = self.chance.choice(self.ranks)
        ways = (self.record, self.each, self.together, self.listed, self.batch, self.go_back)
        way = self.chance.choice((*ways, self.cells, self.mistake))
        way(rank, self.aggregators[rank])

    def some(self, most: int = 4, *, datasets: tuple[str, ...] = DATASETS) -> list[Value]:
        return [
            self.one(self.chance.choice(datasets), self.chance.choice(TYPES))
            for _ in range(self.chance.randint(1, most))
        ]

    def one(self, dataset: str, agg: str) -> Value:
        number = self.chance.choice(CATEGORIES if agg == "categorical_count" else NUMBERS)
        weights = (1.0, 1.0, 0.0, 0.5, 3.0) if agg in WEIGHTED else (1.0, 1.0, 0.0)
        return Value(dataset, agg, number, self.chance.choice(weights))

    def dressed(self, value: Any) -> Any:
        """Return a value as what users have it in."""
        if isinstance(value, str):
            return self.chance.choice((value, np.str_(value)))
        whole = math.isfinite(value) and value == int(value)
        return self.chance.choice(
            (
                value,
                int(value) if whole else value,
                np.float32(value),
                np.array([value]),
                torch.tensor(value),
                torch.tensor([[value]], dtype=torch.float64),
            )
        )

    def put(self, rank: int, values: list[Value]) -> None:
        self.waits[rank] += [one for one in values if one.weight]

    def record(self, rank: int, aggregator: MetricsAggregator) -> None:
        (one,) = self.some(1)
        where, value, weight = (
            one.dataset or None,
            self.dressed(one.value),
            self.dressed(one.weight),
        )
        aggregator.record(one.name, value, one.agg, dataset=where, weight=weight)
        self.put(rank, [one])
        if isinstance(value, torch.Tensor):
            value.fill_(12345.0)  # its owner uses it again

    def each(self, rank: int, aggregator: MetricsAggregator) -> None:
        agg = self.chance.choice([one for one in TYPES if one != "categorical_count"])
        values = [self.one("web", agg) for _ in range(self.chance.randint(0, 4))]
        mask = [self.chance.random() < 0.3 for _ in values]
        numbers = np.array([one.value for one in values], dtype=np.float64)
        weights = np.array([one.weight for one in values], dtype=np.float64)
        choice = self.chance.choice(("plain", "torch", "values", "weights"))
        given = {
            "plain": (numbers, weights),
            "torch": (torch.tensor(numbers), weights),
            "values": (np.ma.MaskedArray(numbers, mask=mask), weights),
            "weights": (numbers, np.ma.MaskedArray(weights, mask=mask)),
        }[choice]
        aggregator.record(f"m {agg}", given[0], agg, dataset="web", weight=given[1], each=True)
        masked = choice in ("values", "weights")
        self.put(rank, [v for v, out in zip(values, mask, strict=True) if not (masked and out)])

    def cells(self, rank: int, aggregator: MetricsAggregator) -> None:
        agg, dataset = self.chance.choice(WITH_AXES), self.chance.choice(DATASETS)
        parts = self.chance.sample("abc", self.chance.randint(0, 3))
        layers: list[int] = self.chance.choice(([0, 1], [1, 0], [1]))
        values = [
            self.one(dataset, agg)._replace(cell=f"/layer_{layer}/part_{part}")
            for layer in layers
            for part in parts
        ]
        shape = len(layers), len(parts)
        numbers = np.array([one.value for one in values], dtype=np.float64).reshape(shape)
        weights = np.array([one.weight for one in values], dtype=np.float64).reshape(shape)
        masked = self.chance.random() < 0.3
        mask = np.array([masked and self.chance.random() < 0.5 for _ in values]).reshape(shape)
        aggregator.record(
            f"{'m' if dataset else 'lone'} {agg} cells",
            np.ma.MaskedArray(numbers, mask=mask)
            if masked
            else self.chance.choice((numbers, torch.tensor(numbers))),
            agg,
            dataset=dataset or None,
            weight=weights,
            axes={"layer": 2, "part": parts},
            ids={"layer": layers},
        )
        self.put(rank, [v for v, out in zip(values, mask.flat, strict=True) if not out])

    def together(self, rank: int, aggregator: MetricsAggregator) -> None:
        dataset, weight = self.chance.choice(DATASETS), self.chance.choice((1.0, 0.0, 0.5, 3.0))
        values = {one.agg: one for one in self.some(datasets=(dataset,))}.values()
        aggregator.record_all(
            {one.name: self.dressed(one.value) for one in values},
            {one.name: one.agg for one in values},
            dataset=dataset or None,
            weight=weight,
        )
        own = [weight if one.agg in WEIGHTED else float(weight > 0) for one in values]
        self.put(rank, [v._replace(weight=w) for v, w in zip(values, own, strict=True)])

    def listed(self, rank: int, aggregator: MetricsAggregator) -> None:
        values = self.some(8, datasets=DATASETS[:-1])
        aggregator.update(
            [Metric(v.dataset, v.name, self.dressed(v.value), v.agg, v.weight) for v in values]
        )
        self.put(rank, values)

    def batch(self, rank: int, aggregator: MetricsAggregator) -> None:
        values = self.some(8, datasets=DATASETS[:-1])
        batch = MetricBatch.from_metrics(
            [Metric(v.dataset, v.name, v.value, v.agg, v.weight) for v in values]
        )
        aggregator.update(pickle.loads(pickle.dumps(batch)))
        self.put(rank, values)

    def go_back(self, rank: int, aggregator: MetricsAggregator) -> None:
        if self.marks[rank] is None or self.chance.random() < 0.5:
            self.marks[rank] = aggregator.mark(), len(self.waits[rank])
        else:
            mark, size = self.marks[rank]
            aggregator.rollback(mark)
            del self.waits[rank][size:]

    def mistake(self, rank: int, aggregator: MetricsAggregator) -> None:
        good = Metric("web", "m sum", 1.0, "sum")
        calls: tuple[Callable[[], Any], ...] = (
            lambda: aggregator.record("new", 1.0, weight=-1.0),
            lambda: aggregator.record("new", np.zeros(3), weight=np.zeros(2)),
            lambda: aggregator.record_all({"new": 1.0, "other": "text"}),
            lambda: aggregator.update([good, Metric("web", "new", "text", "mean")]),
            lambda: aggregator.update([good, Metric("web", "new", 1.0, "max", 2.0)]),
            lambda: aggregator.update(
                MetricBatch.from_metrics([good, Metric("web", "new", 1.0, "sum", 2.0)])
            ),
            lambda: aggregator.update([good, Metric("web", "m sum", 1.0, "max")]),
        )
        with pytest.raises((TypeError, ValueError)):
            self.chance.choice(calls)()

    # -- On all ranks

    def on_all(self, call: Callable[[int], Any]) -> list[Any]:
        """Return what a call gives on each rank, be it an error."""
        return answers([self.pool.submit(call, rank) for rank in self.ranks])

    def talk(self) -> None:
        self.chance.choice((self.reduce, self.reduce_meanwhile, self.fail, self.save))()

    def cut(self) -> list[list[Value]]:
        taken, self.waits = self.waits, [[] for _ in self.ranks]
        self.marks = [None for _ in self.ranks]
        return taken

    def count(self, taken: list[list[Value]]) -> None:
        for values in taken:
            self.run, self.interval = self.run + values, self.interval + values

    def give_back(self, taken: list[list[Value]]) -> None:
        for rank in self.ranks:
            self.waits[rank] = taken[rank] + self.waits[rank]
            if self.marks[rank] is not None:
                mark, size = self.marks[rank]
                self.marks[rank] = mark, size + len(taken[rank])

    def reduce(self) -> None:
        self.count(self.cut())
        self.check(self.on_all(lambda rank: self.aggregators[rank].reduce(7)))

    def reduce_meanwhile(self) -> None:
        fails = len(self.ranks) > 1 and self.chance.random() < 0.4
        taken = self.cut()
        futures = [one.reduce_async(n if fails else 0) for n, one in enumerate(self.aggregators)]
        for _ in range(self.chance.randrange(5)):
            self.act()
        given = answers(futures)
        if fails:
            assert all(isinstance(one, RuntimeError) for one in given), given
            self.give_back(taken)
        else:
            self.count(taken)
            self.check(given)

    def fail(self) -> None:
        taken = self.cut()
        given = self.on_all(lambda rank: self.aggregators[rank].reduce(-1))
        assert all(isinstance(one, RuntimeError) for one in given), given
        self.give_back(taken)

    def save(self) -> Any:
        self.count(self.cut())
        first, *others = self.on_all(lambda rank: self.aggregators[rank].state_dict())
        assert all(one == first for one in others)
        return first

    # -- What they print

    def check(self, given: list[Any]) -> None:
        """Hold what a reduction has given to the model, and close the interval."""
        for window in ("run", "interval", "auto"):
            expected = self.expected(window)
            for snapshot in given:
                assert isinstance(snapshot, Snapshot), snapshot
                printed = snapshot.as_dict("t", window, rollup="levels", by=BY)
                # What percentiles and std are, and how well they are known, is told elsewhere.
                found = {k: v for k, v in printed.items() if not k.endswith(("std", "5", "50"))}
                assert found == pytest.approx(expected, rel=1e-9, abs=1e-9, nan_ok=True), window
        self.interval = []

    def expected(self, window: str) -> dict[str, float]:
        groups: dict[tuple[str, str, str], list[Value]] = {}
        for view, values in (("run", self.run), ("interval", self.interval)):
            for one in values:
                chosen = (
                    ("run" if one.agg in TOTALS else "interval") if window == "auto" else window
                )
                if chosen == view:
                    for level in self.levels(one):
                        for name in dict.fromkeys((one.name, one.name + one.cell)):
                            groups.setdefault((level, name, one.agg), []).append(one)
        return {
            (f"t_{level}/" if level else "t/") + name + suffix: value
            for (level, name, agg), values in groups.items()
            for suffix, value in come_to(agg, values, self.on_nan).items()
            if value or "nan_count" not in suffix
        }

    @staticmethod
    def levels(one: Value) -> list[str]:
        if not one.dataset or one.agg in WITHOUT_LANES:
            return [one.dataset]
        head, slash, _ = one.dataset.partition("/")
        return [one.dataset, "", *([head] if slash else [])]


def answers(futures: list[Future[Any]]) -> list[Any]:
    return [future.exception(60) or future.result() for future in futures]


@pytest.mark.filterwarnings("ignore:the interval is empty:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:by= names:RuntimeWarning")
@pytest.mark.parametrize("seed", range(20))
def test_a_program_comes_to_what_its_values_say(seed: int) -> None:
    chance = random.Random(seed)
    options = {
        "on_nan": chance.choice(("propagate", "skip")),
        "dist_window_size": chance.choice((1000, None)),
    }

    def job(most: int) -> Job:
        return Job(chance, chance.randint(1, most), chance.choice(("narrow", "wide")), **options)

    def live(one: Job, calls: int) -> None:
        for _ in range(calls):
            one.act() if chance.random() < 0.8 else one.talk()

    current = job(3)
    for _ in range(3):
        live(current, 15)
        saved, run, interval = current.save(), current.run, current.interval
        if chance.random() < 0.4:
            other = job(2)
            live(other, 5)
            saved = merge_state_dicts([saved, other.save()], parallel=chance.random() < 0.5)
            run, interval = run + other.run, []
        current = job(3)
        for aggregator in current.aggregators:
            aggregator.load_state_dict(saved)
        current.start(run, interval)
    current.reduce()
