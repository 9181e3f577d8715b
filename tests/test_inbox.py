"""What is known is taken in fast, and nothing else about it is different.

NumPy's scalars mean what Python's numbers do and take the other way in, on which every value is looked
at and folded by itself. So one aggregator gets these, another the plain numbers, and both must agree.
"""

from __future__ import annotations

import gc
import math
import os
import signal
import sys
import threading
from collections.abc import Iterator
from enum import Enum
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
from handlers_of_users import MyTypes, ProductHandler
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ranks import run_threads
from work import interrupted, lines_run

from metricfold import AggregationType, Metric, MetricBatch, MetricsAggregator
from metricfold._core.fold.builtin import MaxAggHandler
from metricfold._core.fold.handlers import LaneHandler
from metricfold._core.intake import aggregator as calls
from metricfold._core.intake import held, inbox
from metricfold.communicator import Communicator

TYPES = ("sum", "mean", "max", "min", "rate", "distribution", "categorical_count")
WEIGHTED = ("mean", "distribution")
VALUES = (0, 1, -3, 1000, 0.5, -1.25, 1e-3, 7.75, math.nan, math.inf, -math.inf, True)
WEIGHTS = (1, 1.0, 1, 0, 0.0, 0.5, 3, 1e-3)


class Story:
    """What comes in at one aggregator, as plain numbers or as NumPy's."""

    def __init__(self, plain: bool, **options: Any) -> None:
        self.plain = plain
        self.aggregator = MetricsAggregator(5, max_categories=3, **options)
        self.mark: Any = None
        self.saved: Any = None
        self.seen: list[dict[str, float]] = []

    def metric(self, event: Any) -> tuple[str, Any, str, str | None, Any]:
        agg, dataset, value, weight = event
        if agg not in WEIGHTED:
            weight = min(math.ceil(weight), 1)
        if not self.plain:
            number = type(value) in (float, int)
            value = np.float64(value) if number else value
            weight = np.float64(weight)
        if agg == "categorical_count":
            value = f"kind {value:g}" if self.plain else np.str_(f"kind {value:g}")
        # A metric without a dataset has a name of its own, for the total over datasets has the other.
        return f"{'a' if dataset else 'lone'} {agg}", value, agg, dataset, weight

    def take(self, event: tuple[str, Any]) -> None:
        call, content = event
        aggregator = self.aggregator
        if call == "record":
            name, value, agg, dataset, weight = self.metric(content)
            aggregator.record(name, value, agg, dataset=dataset, weight=weight)
        elif call == "late":
            import torch

            name, value, agg, dataset, weight = self.metric(content)
            if agg != "categorical_count":
                value = torch.tensor(float(value), dtype=torch.float64)
            aggregator.record(name, value, agg, dataset=dataset, weight=weight)
        elif call == "update":
            metrics = [self.metric(one) for one in content]
            listed = [Metric(d or "e", n, v, AggregationType(a), w) for n, v, a, d, w in metrics]
            aggregator.update(listed if self.plain else tuple(listed))
        elif call == "batch":
            plain = Story(plain=True)
            metrics = [plain.metric(one) for one in content]
            batch = [Metric(d or "e", n, v, a, w) for n, v, a, d, w in metrics]
            if self.plain:
                aggregator.update(MetricBatch.from_metrics(batch))
            else:
                for one in batch:
                    aggregator.update(MetricBatch.from_metrics([one]))
        elif call == "together":
            dataset, weight, values = content
            step = [self.metric((agg, dataset, value, 1)) for agg, value in values.items()]
            aggregator.record_all(
                {name: value for name, value, *_ in step},
                {name: agg for name, _, agg, *_ in step},
                dataset=dataset,
                weight=weight if self.plain else np.float64(weight),
            )
        elif call == "mark":
            self.mark = aggregator.mark()
        elif call == "rollback" and self.mark is not None:
            aggregator.rollback(self.mark)
        elif call == "fail":
            with pytest.raises(RuntimeError, match="step"):
                aggregator.reduce(step=-1)
            self.mark = None
        elif call == "save":
            self.saved, self.mark = aggregator.state_dict(), None
        elif call == "load" and self.saved is not None:
            aggregator.load_state_dict(self.saved)
            self.mark = None
        elif call == "fold":
            if self.plain:
                aggregator._held.inbox._piece = 1  # as after interrupts
            aggregator._held.inbox._fold()
        elif call == "reduce":
            self.look()

    def look(self) -> None:
        self.mark = None
        snapshot = self.aggregator.reduce()
        self.seen += [snapshot.as_dict("t", view) for view in ("run", "interval")]


def stories_of(types: list[str]) -> Any:
    """Return stories about few keys, so that more than one thing happens to each."""

    def metrics_of(*datasets: str | None) -> Any:
        choices = (types, datasets, VALUES, WEIGHTS)
        return st.tuples(*map(st.sampled_from, choices))

    metrics, of_samples = metrics_of(None, "d"), metrics_of("d")
    values = st.dictionaries(st.sampled_from(types), st.sampled_from(VALUES))
    together = st.tuples(st.sampled_from([None, "d"]), st.sampled_from(WEIGHTS), values)
    calls = ["reduce", "reduce", "fail", "save", "load", "fold", "fold"]
    events = st.one_of(
        st.tuples(st.just("record"), metrics),
        st.tuples(st.just("late" if find_spec("torch") else "record"), metrics),
        st.tuples(st.sampled_from(["update", "batch"]), st.lists(of_samples, max_size=7)),
        st.tuples(st.just("together"), together),
        st.tuples(st.sampled_from(["mark", "rollback"]), st.none()),
        st.tuples(st.sampled_from(calls), st.none()),
    )
    return st.lists(events, min_size=15, max_size=40)


stories = st.lists(st.sampled_from(TYPES), min_size=1, max_size=2).flatmap(stories_of)


class Truth:
    """All that has counted, in order of arrival, and what that comes to."""

    def __init__(self, on_nan: str) -> None:
        self.skips = on_nan == "skip"
        self.run: list[Any] = []
        self.closed = 0  # so many of them came in before the open interval
        self.mark: int | None = None
        self.saved: Any = None
        self.seen: list[dict[str, float]] = []

    def take(self, event: tuple[str, Any]) -> None:
        call, content = event
        if call in ("record", "late"):
            self.run.append(content)
        elif call in ("update", "batch"):
            self.run += content
        elif call == "together":
            dataset, weight, values = content
            self.run += [(agg, dataset, value, weight) for agg, value in values.items()]
        elif call == "mark":
            self.mark = len(self.run)
        elif call == "rollback" and self.mark is not None:
            del self.run[self.mark :]
        elif call == "load" and self.saved is not None:
            run, self.closed = self.saved
            self.run, self.mark = [*run], None
        elif call in ("fail", "save", "reduce"):
            self.mark = None
            if call == "save":
                self.saved = ([*self.run], self.closed)
            if call == "reduce":
                self.seen += [self.told(self.run, 5), self.told(self.run[self.closed :], 10**9)]
                self.closed = len(self.run)

    def told(self, taken: list[Any], window: int) -> dict[str, float]:
        by_key: dict[Any, list[Any]] = {}
        for agg, dataset, value, weight in taken:
            if weight:
                by_key.setdefault((agg, dataset), []).append((value, weight))
        found: dict[str, float] = {}
        for (agg, dataset), pairs in by_key.items():
            name = f"t_{dataset}/a {agg}" if dataset else f"t/lone {agg}"
            found |= {f"{name}{end}": x for end, x in self.result(agg, pairs, window).items()}
        return found

    def result(self, agg: str, pairs: list[Any], window: int) -> dict[str, float]:
        if agg == "categorical_count":
            return {"_count": float(len(pairs))}
        finite = [pair for pair in pairs if math.isfinite(pair[0])]
        if agg == "distribution":
            recent = [value for value, _ in finite[-window:]]
            return {"_stat_min": min(recent), "_stat_max": max(recent)} if recent else {}
        kept = [(value, weight) for value, weight in pairs if not math.isnan(value)]
        result = {"_nan_count": float(len(pairs) - len(kept))} if self.skips else {}
        if len(kept) < len(pairs) and not self.skips:
            return {"": math.nan}
        if not kept:
            return result
        infinite = {value for value, _ in kept if math.isinf(value)}
        if agg in ("max", "min"):
            return {"": float({"max": max, "min": min}[agg](x for x, _ in kept)), **result}
        if agg == "rate":
            return result
        if infinite:
            return {"": math.nan if len(infinite) > 1 else infinite.pop(), **result}
        weighed = [w if agg == "mean" else 1 for _, w in kept]
        total = math.fsum(x * w for (x, _), w in zip(kept, weighed, strict=True))
        return {"": total / math.fsum(weighed) if agg == "mean" else total, **result}


def agree(logged: dict[str, float], truth: dict[str, float]) -> bool:
    """Return whether what was logged has all of the truth, categories together."""
    counts: dict[str, float] = {}
    for name, value in logged.items():
        counted = name.partition("_count_kind ")[0].partition("_count___")[0] + "_count"
        counts[counted] = counts.get(counted, 0.0) + value
    found = {**counts, **logged}
    return all(
        (math.isnan(value) and math.isnan(found.get(name, 0.0)))
        or math.isclose(value, found.get(name, 0.0), rel_tol=1e-12, abs_tol=1e-12)
        for name, value in truth.items()
        if value or name in found
    )


def same(one: dict[str, float], other: dict[str, float]) -> bool:
    return one.keys() == other.keys() and all(
        (math.isnan(value) and math.isnan(other[name]))
        or math.isclose(value, other[name], rel_tol=1e-12, abs_tol=1e-9)
        for name, value in one.items()
        if "rate" not in name
    )


@pytest.mark.filterwarnings("ignore:the interval is empty:RuntimeWarning")
@pytest.mark.parametrize("on_nan", ["propagate", "skip"])
@given(stories)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.data_too_large])
def test_both_ways_in_give_the_same_and_it_is_the_truth(on_nan: str, story: Any) -> None:
    fast, slow = Story(plain=True, on_nan=on_nan), Story(plain=False, on_nan=on_nan)
    truth = Truth(on_nan)
    for event in [*story, ("reduce", None)]:
        for one in (fast, slow, truth):
            one.take(event)
    for quickly, slowly, expected in zip(fast.seen, slow.seen, truth.seen, strict=True):
        assert same(quickly, slowly)
        assert agree(quickly, expected)


def known(*types: Any, **options: Any) -> MetricsAggregator:
    """Return an aggregator that has seen a value of each type, of a step and of a dataset."""
    aggregator = MetricsAggregator(**options)
    for agg in types or TYPES:
        value = "kind 1" if agg == "categorical_count" else 1.0
        aggregator.record(f"lone {agg}", value, agg)
        aggregator.record(f"a {agg}", value, agg, dataset="d")
    aggregator.reduce()
    return aggregator


def of_interval(aggregator: MetricsAggregator) -> dict[str, float]:
    return aggregator.reduce().as_dict("t", "interval")


# -- What is told apart ----------------------------------------------------------------------------


class Text(str, Enum):
    """Equal to the texts, and no plain ones; what a StrEnum is."""

    MEAN = "mean"
    NAME = "lone mean"
    DATASET = "d"


class Mine(Enum):
    MEAN = "mean"


class Tagged(Metric):
    """A subclass, of which nobody knows what it does."""

    __slots__ = ()


@pytest.mark.parametrize("agg", [Text.MEAN, Mine.MEAN, "MEAN", 1, None, ["mean"]], ids=repr)
def test_a_type_that_merely_equals_a_known_one_is_refused_as_ever(agg: Any) -> None:
    fresh, aggregator = MetricsAggregator(), known("mean")
    errors = []
    for one in (fresh, aggregator):
        for call in (
            lambda one=one: one.record("lone mean", 1.0, agg),
            lambda one=one: one.update([Metric("d", "a mean", 1.0, agg)]),
        ):
            with pytest.raises((TypeError, ValueError)) as error:
                call()
            errors.append(type(error.value))
    assert errors[:2] == errors[2:] or agg is Text.MEAN or agg is Mine.MEAN or agg == "MEAN"
    with pytest.warns(RuntimeWarning, match="empty"):
        assert of_interval(aggregator) == {}


@pytest.mark.parametrize("types", [("mean", Text.MEAN), (Text.MEAN, "mean")])
def test_a_text_and_what_merely_equals_it_are_two_types_of_one_list(types: Any) -> None:
    """All of them counted as of the first one's type."""
    aggregator = MetricsAggregator()
    metrics = [Metric("d", "m", 1.0, agg) for agg in types]
    for batch in (metrics, MetricBatch.from_metrics(metrics)):
        with pytest.raises(ValueError, match="'m' of dataset 'd' is already registered with"):
            aggregator.update(batch)
    assert aggregator.get_metrics_for_logging("t") == {}


def test_names_that_equal_known_ones_are_the_same_names() -> None:
    aggregator = known("mean", "sum")
    aggregator.record(Text.NAME, 3.0)
    aggregator.record(np.str_("lone mean"), 5)
    aggregator.record("a sum", 2, AggregationType.SUM, dataset=Text.DATASET)
    aggregator.update([Metric(np.str_("d"), "a sum", 5, "sum")])
    assert of_interval(aggregator) == {"t/lone mean": 4.0, "t_d/a sum": 7.0}


@pytest.mark.parametrize(
    "bad",
    [
        Metric(None, "lone sum", 1, "sum"),  # type: ignore[arg-type]
        Metric("", "lone sum", 1, "sum"),
        Metric("d", "a sum", "text", "sum"),
        Metric("d", "a sum", None, "sum"),
        Metric("d", "a sum", 10**400, "sum"),
        Metric("d", "a sum", 1, "mean"),
        Metric("d", "a sum", 1, "sum", 2),
        Metric("d", "a mean", 1.0, "mean", -1),
        Metric("d", "a mean", 1.0, "mean", math.nan),
        Metric("d", "a mean", 1.0, "mean", math.inf),
        Metric("d", "a distribution", 1.0, "distribution", 1e200),
        Metric("d", "a categorical_count", "two\nlines", "categorical_count"),
        Metric("d", "a categorical_count", "", "categorical_count"),
        Metric("d", "a categorical_count", "kind", "categorical_count", 0.5),
        Metric(["d"], "a sum", 1, "sum"),  # type: ignore[arg-type]
        ("d", "a sum", 1, "sum", 1.0),
        1.0,
    ],
    ids=repr,
)
def test_of_a_list_with_one_bad_metric_nothing_counts(bad: Any) -> None:
    aggregator = known(on_bad_name="refuse")
    good = [
        Metric("d", "a sum", 1, "sum"),
        Metric("d", "a distribution", 0.5, "distribution", 2.0),
        Metric("d", "a categorical_count", "kind", "categorical_count"),
    ]
    aggregator.update(good)
    for metrics in ([bad], [*good, bad], [bad, *good], (*good, bad)):
        with pytest.raises((TypeError, ValueError, OverflowError)):
            aggregator.update(metrics)
    assert aggregator.reduce().as_dict("t", "interval") == pytest.approx(
        {
            "t_d/a sum": 1.0,
            "t_d/a categorical_count_count_kind": 1.0,
            "t_d/a distribution_stat_mean": 0.5,
            "t_d/a distribution_stat_min": 0.5,
            "t_d/a distribution_stat_max": 0.5,
            "t_d/a distribution_stat_p05": 0.5,
            "t_d/a distribution_stat_p50": 0.5,
            "t_d/a distribution_stat_p95": 0.5,
            "t_d/a distribution_stat_count": 1.0,
        }
    )


def test_lists_tuples_and_subclasses_of_what_is_expected_are_welcome() -> None:
    class Metrics(list[Metric]):
        pass

    aggregator = known("sum")
    for metrics in (
        [Metric("d", "a sum", 1, "sum")],
        (Metric("d", "a sum", 1, "sum"),),
        Metrics([Metric("d", "a sum", 1, "sum")]),
        [Tagged("d", "a sum", 1, "sum")],
        [Metric("d", "a sum", True, "sum"), Metric("d", "a sum", np.float32(1), "sum")],
        [],
        (),
    ):
        aggregator.update(metrics)
    assert of_interval(aggregator) == {"t_d/a sum": 6.0}


def test_handlers_of_ones_own_get_their_values_as_these_come() -> None:
    class Last(LaneHandler):
        max_lanes = ("last",)
        calls = 0

        def maxs_of(self, values: Any) -> tuple[float, ...]:
            Last.calls += 1
            if (values < 0).any():
                raise ValueError("less than nothing")
            return (float(values.max()),)

        def result(self, lanes: Any) -> float:
            return float(lanes["last"])

    class Doubled(MaxAggHandler):
        def maxs_of(self, values: Any) -> tuple[float, ...]:
            return (2 * float(values.max()),)

    aggregator = MetricsAggregator()
    aggregator.register_handler("last", Last())
    aggregator.register_handler("max", Doubled())
    aggregator.register_handler(MyTypes.PRODUCT, ProductHandler())
    for _ in range(3):
        aggregator.record("x", 2.0, "last")
        aggregator.record("top", 3.0, "max")
        aggregator.update([Metric("d", "product", 2.0, MyTypes.PRODUCT)])
    assert Last.calls == 3
    with pytest.raises(ValueError, match="metric 'x': less than nothing"):
        aggregator.record("x", -1.0, "last")
    assert of_interval(aggregator) == {"t/x": 2.0, "t/top": 6.0, "t_d/product": 8.0}


# -- Numbers ---------------------------------------------------------------------------------------


def test_a_million_values_add_up_exactly() -> None:
    aggregator = known("sum", "mean")
    metrics = [Metric("d", "a sum", 0.1, "sum"), Metric("d", "a mean", 0.1, "mean", 3)] * 500
    for _ in range(1000):
        aggregator.update(metrics)
    for _ in range(100_000):
        aggregator.record("lone sum", 0.1, "sum")
    logged = of_interval(aggregator)
    assert abs(logged["t_d/a sum"] - 50_000) <= 1e-12 * 50_000
    assert abs(logged["t_d/a mean"] - 0.1) <= 1e-12 * 0.1
    assert abs(logged["t/lone sum"] - 10_000) <= 1e-12 * 10_000


def test_integers_are_exact_up_to_2_to_the_53() -> None:
    aggregator = known("sum", "max")
    whole = np.random.default_rng(0).integers(0, 2**42, 2000).tolist()
    for value in whole:
        aggregator.record("lone sum", value, "sum")
        aggregator.update([Metric("d", "a sum", value, "sum"), Metric("d", "a max", value, "max")])
    logged = of_interval(aggregator)
    assert logged == {"t/lone sum": sum(whole), "t_d/a sum": sum(whole), "t_d/a max": max(whole)}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("agg", ["max", "min"])
def test_integers_whose_sum_no_float_holds_have_an_extremum(agg: str) -> None:
    # Each call was fine alone; the fold of all raised, at this log and at every later one.
    aggregator = MetricsAggregator()
    for number in (10**308, 10**308, 10**307):
        aggregator.update([Metric("d", "m", number, agg)])
    expected = {"max": 1e308, "min": 1e307}[agg]
    assert aggregator.get_metrics_for_logging("t") == {"t_d/m": expected}


def test_sums_that_overflow_or_cancel_infinities_do_so_in_silence() -> None:
    aggregator = known("sum", "mean", "max", "distribution")
    for value in (1e308, 1e308, 1e308):
        aggregator.record("lone sum", value, "sum")
        aggregator.record("lone max", value, "max")
        aggregator.record("lone mean", value, weight=1e10)
        aggregator.record("lone distribution", value, "distribution")
    aggregator.update([Metric("d", "a sum", value, "sum") for value in (math.inf, 1, -math.inf)])
    logged = of_interval(aggregator)
    assert logged["t/lone sum"] == logged["t/lone mean"] == math.inf
    assert logged["t/lone max"] == logged["t/lone distribution_stat_max"] == 1e308
    assert math.isnan(logged["t_d/a sum"])


# -- Threads, signals, forks -----------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:the interval is empty:RuntimeWarning")
def test_nothing_is_lost_or_counted_twice_while_threads_take_in_and_others_reduce() -> None:
    aggregator = known("sum", "distribution")
    metrics = [Metric("d", "a sum", 1, "sum"), Metric("d", "a distribution", 1, "distribution")]
    batch = MetricBatch.from_metrics(metrics)

    def feed() -> None:
        for number in range(2000):
            aggregator.update(metrics)
            aggregator.update(batch)
            aggregator.record("lone sum", 1.0, "sum")
            if number % 500 == 0:
                aggregator.record(f"new {threading.get_ident()} {number}", 1.0)

    threads = [threading.Thread(target=feed) for _ in range(4)]
    for thread in threads:
        thread.start()
    counted = 0.0
    while any(thread.is_alive() for thread in threads):
        counted += aggregator.reduce().as_dict("t", "interval").get("t_d/a sum", 0.0)
    for thread in threads:
        thread.join()
    logged = aggregator.reduce().as_dict("t", {"a sum": "interval", "lone sum": "run"})
    assert counted + logged.get("t_d/a sum", 0.0) == 16_000
    assert logged["t/lone sum"] == 8001


class Interrupted(Exception):
    """What a signal's handler raises, as ctrl-C does."""


@pytest.fixture
def uncollected() -> Iterator[None]:
    """Keep the garbage collector away while signals come by the hundred.

    CPython 3.11 keeps a pointer to what it has freed where a context variable is taken back, which
    NumPy does at the end of `errstate`, if meanwhile the collector calls Python code, as Hypothesis
    has it do, and a signal's handler runs there that uses NumPy as well.
    """
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("uncollected")
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="has no timers")
def test_a_call_that_a_signal_interrupts_counts_as_a_whole_or_not_at_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(inbox, "_MOST", 50)  # folds are where an interrupt could do harm
    aggregator = known("sum", "max", "distribution")
    metrics = [
        Metric("d", "a sum", 1, "sum"),
        Metric("d", "a distribution", 1, "distribution"),
        Metric("d", "a max", 1, "max"),
    ] * 3
    done, interrupts = 0, 0

    def interrupt(number: int, frame: object) -> None:
        # Of the calls alone: the counters here are not to be interrupted.
        if frame is not None and "metricfold" in frame.f_code.co_filename:  # type: ignore[attr-defined]
            raise Interrupted
        signal.setitimer(signal.ITIMER_REAL, 0.0002)

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        while interrupts < 200:
            # Some come before a fold is done, and some let many be done.
            signal.setitimer(signal.ITIMER_REAL, 0.0003 * (1 + interrupts % 20))
            try:
                while True:
                    aggregator.update(metrics)
                    done += 1
            except Interrupted:
                interrupts += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    logged = of_interval(aggregator)
    counted = logged["t_d/a sum"] / 3
    assert counted == int(counted)
    assert done <= counted <= done + interrupts
    assert logged["t_d/a distribution_stat_count"] == logged["t_d/a sum"]


def test_what_waits_is_folded_however_fast_interrupts_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each fold began anew with all that had piled up meanwhile, and never ended."""
    monkeypatch.setattr(inbox, "_MOST", 50)
    aggregator = known("distribution")

    def record(number: int) -> None:
        # Of two kinds in turn, so that a fold takes longer the more there are.
        aggregator.record("lone distribution", 1.0, "distribution", weight=1 + number % 2)

    for number in range(40):
        record(number)
    few = lines_run(aggregator._held.inbox._fold, inbox) // 4
    interrupts = 0
    for number in range(2000):
        interrupts += interrupted(lambda number=number: record(number), few, inbox)
        assert len(aggregator._held.inbox._log) < 150
    assert interrupts > 40
    assert of_interval(aggregator)["t/lone distribution_stat_count"] == 2040


@pytest.mark.usefixtures("uncollected")
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="has no timers")
def test_what_a_signals_handler_takes_in_counts_like_everything_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(inbox, "_MOST", 50)
    aggregator = known("sum", "distribution")
    handled = done = 0

    def handle(number: int, frame: object) -> None:
        nonlocal handled
        for _ in range(30):
            aggregator.record("lone sum", 1, "sum")
        aggregator.update([Metric("d", "a distribution", 2.0, "distribution")])
        handled += 1
        signal.setitimer(signal.ITIMER_REAL, 0.001)

    before = signal.signal(signal.SIGALRM, handle)
    signal.setitimer(signal.ITIMER_REAL, 0.001)
    try:
        while handled < 200:
            aggregator.update([Metric("d", "a sum", 1, "sum")] * 5)
            aggregator.record("lone distribution", 1.0, "distribution")
            done += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    logged = of_interval(aggregator)
    assert logged["t/lone sum"] == 30 * handled
    assert logged["t_d/a sum"] == 5 * done
    assert logged["t_d/a distribution_stat_count"] == handled
    assert logged["t/lone distribution_stat_count"] == done


@pytest.mark.skipif(not hasattr(os, "fork"), reason="has no forks")
@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")  # after tests of JAX
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_is_told_though_it_knows_the_keys() -> None:
    aggregator = known("sum")
    batch = MetricBatch.from_metrics([Metric("d", "a sum", 1, "sum")])
    aggregator.record("lone sum", 1, "sum")
    child = os.fork()
    if child == 0:
        refused = 0
        for call in (
            lambda: aggregator.record("lone sum", 1, "sum"),
            lambda: aggregator.update([Metric("d", "a sum", 1, "sum")]),
            lambda: aggregator.update(batch),
        ):
            try:
                call()
            except RuntimeError as error:
                refused += "inherited by a forked process" in str(error)
        os._exit(refused)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    assert of_interval(aggregator) == {"t/lone sum": 1.0}


def test_a_closed_aggregator_takes_nothing_in_though_it_knows_the_keys() -> None:
    aggregator = known("sum")
    aggregator.close()
    batch = MetricBatch.from_metrics([Metric("d", "a sum", 1, "sum")])
    for call in (
        lambda: aggregator.record("lone sum", 1, "sum"),
        lambda: aggregator.update([Metric("d", "a sum", 1, "sum")]),
        lambda: aggregator.update(batch),
    ):
        with pytest.raises(RuntimeError, match="is closed"):
            call()


# -- Between ranks, and the price ------------------------------------------------------------------


def test_a_key_that_other_ranks_hold_otherwise_goes_on_beside_it_with_all_that_waits() -> None:
    """All of it was dropped."""

    def disagree(communicator: Communicator) -> list[dict[str, float]]:
        aggregator = MetricsAggregator(communicator=communicator)
        agg = "sum" if communicator.rank == 0 else "max"
        seen = []
        for _ in range(2):
            aggregator.record("x", 1.0, agg)
            mark = aggregator.mark()
            aggregator.record("x", 2.0, agg)
            aggregator.record("n", 1.0, "sum")
        with pytest.raises(ValueError, match="rank 1 held metric 'x' as 'max'"):
            aggregator.reduce()
        mark = aggregator.mark()
        aggregator.record("x", 4.0, "sum")
        aggregator.rollback(mark)
        aggregator.record("x", 8.0, "sum")
        seen.append(aggregator.reduce().as_dict("t"))
        return seen

    first, second = run_threads(disagree, 2)
    assert first == second == [{"t/n": 4.0, "t/x": 6.0 + 8.0 + 8.0, "t/x[max]": 2.0}]


@pytest.mark.parametrize("agg", ["mean", "distribution", "categorical_count"])
def test_a_known_metric_is_taken_in_by_a_few_lines(agg: str) -> None:
    aggregator = known(agg)
    value = "kind 1" if agg == "categorical_count" else 1.5
    metrics = [Metric("d", f"a {agg}", value, agg)] * 1000
    batch = MetricBatch.from_metrics(metrics)
    for once in (batch, metrics[:1]):  # after which it is known how this spells them
        aggregator.update(once)
    aggregator.record(f"lone {agg}", value, agg)
    assert (
        0
        < lines_run(lambda: aggregator.record(f"lone {agg}", value, agg), calls, held, inbox)
        <= 40
    )
    assert 0 < lines_run(lambda: aggregator.update(batch), calls, held, inbox) <= 25
    if agg != "categorical_count":
        assert 0 < lines_run(lambda: aggregator.update(metrics), calls, held, inbox) <= 40
    assert not aggregator._held.inbox._stage.below.states


def test_what_waits_to_be_folded_is_bounded() -> None:
    aggregator = known("sum", "distribution")
    values = [Metric("d", "a distribution", float(v), "distribution") for v in range(3000)]
    batch = MetricBatch.from_metrics(values)
    for _ in range(50):
        aggregator.update(values)
        aggregator.update(batch)
        aggregator.record("lone sum", 1, "sum")
        waiting = sum(len(items) for _, items in aggregator._held.inbox._log)
        assert waiting <= 4096
        assert sys.getsizeof(aggregator._held.inbox._log) < 100_000
