"""CATEGORICAL_COUNT stays bounded, whatever users count."""

from __future__ import annotations

import json
import logging
import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypotheses import examples
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_threads

from metricfold import (
    AggregationType,
    CategoricalCountAggHandler,
    Metric,
    MetricBatch,
    MetricsAggregator,
    MetricsCollator,
    MetricState,
)
from metricfold.communicator import Communicator

BOTH = pytest.mark.parametrize("route", ["narrow", "wide"])


def count(aggregator: MetricsAggregator, categories: Any) -> None:
    aggregator.update(
        [Metric("d", "id", name, AggregationType.CATEGORICAL_COUNT) for name in categories]
    )


def counted(logged: dict[str, float]) -> dict[str, float]:
    return {key.removeprefix("t_d/id_count_"): value for key, value in logged.items()}


def rising(communicator: Communicator, options: dict[str, Any]) -> list[dict[str, float]]:
    """Count 3, 6, 9... ids, of which the ranks share some; returns the run after each interval."""
    aggregator = MetricsAggregator(communicator=communicator, max_categories=5, **options)
    seen = []
    for interval in range(3):
        count(aggregator, range(communicator.rank, communicator.rank + 3 * (interval + 1)))
        seen.append(counted(aggregator.get_metrics_for_logging("t")))
    return seen


@BOTH
def test_the_first_are_told_apart_and_the_rest_is_exact_in_total(
    route: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "metricfold"):
        results = run_threads(rising, 3, {"route": route})
    assert results == [results[0]] * 3
    first, second, third = results[0]
    # 0, 1, 2 of rank 0, then 3 of rank 1 and 4 of rank 2.
    assert first == {"0": 1, "1": 2, "2": 3, "3": 2, "4": 1}
    assert set(second) == set(third) == {"0", "1", "2", "3", "4", "__other__"}
    assert sum(second.values()) == 9 + 18
    assert sum(third.values()) == 9 + 18 + 27
    assert third["4"] == 1 + 3 + 3
    (record,) = caplog.records
    assert "'id' of dataset 'd' has more than 5 categories" in record.getMessage()


def resumed(
    communicator: Communicator, state: Any, names: list[str], most: int
) -> tuple[dict[str, float], Any]:
    aggregator = MetricsAggregator(communicator=communicator, max_categories=most)
    if state is not None:
        aggregator.load_state_dict(state)
    count(aggregator, names[communicator.rank :: communicator.world_size])
    state = aggregator.state_dict()
    return counted(aggregator.get_metrics_for_logging("t")), state


def test_a_resumed_run_tells_the_same_ones_apart(caplog: pytest.LogCaptureFixture) -> None:
    before, state = run_threads(resumed, 2, None, list("abcdefgh"), 4)[0]
    assert set(before) == {"a", "c", "e", "g", "__other__"}
    caplog.clear()
    after, _ = run_threads(resumed, 3, state, list("zyxabcdefgh"), 4)[0]
    assert set(after) == set(before)
    assert sum(after.values()) == 8 + 11
    assert after["a"] == after["c"] == 2
    assert after["__other__"] == 4 + 7
    assert not caplog.records


def test_a_state_with_other_categories_than_the_ranks_have_agreed_on_loses_nothing() -> None:
    _, state = run_threads(resumed, 1, None, list("abcd"), 4)[0]
    aggregator = MetricsAggregator(max_categories=4)
    count(aggregator, "wxyz")
    aggregator.reduce()
    aggregator.load_state_dict(state)
    count(aggregator, "wwa")
    logged = counted(aggregator.get_metrics_for_logging("t"))
    assert logged == {"w": 2, "__other__": 5}


def test_a_category_of_that_name_is_one_like_any_other() -> None:
    aggregator = MetricsAggregator(max_categories=3)
    count(aggregator, ["__other__", "a"])
    aggregator.reduce()
    count(aggregator, ["b", "__other__"])
    assert counted(aggregator.get_metrics_for_logging("t")) == {"__other__": 2, "a": 1, "b": 1}
    count(aggregator, ["c", "d", "a"])
    logged = counted(aggregator.get_metrics_for_logging("t"))
    assert logged == {"__other__": 4, "a": 2, "b": 1}


def test_memory_does_not_grow_with_what_is_not_told_apart() -> None:
    aggregator = MetricsAggregator(max_categories=10)
    count(aggregator, range(20))
    aggregator.reduce()
    for number in range(5000):
        count(aggregator, [number])
    layer = aggregator._held.inbox._stage.below
    held: Any = layer.states["d", "id"]
    assert len(held.counts) <= 25
    assert held.sums[0] > 2000
    logged = counted(aggregator.get_metrics_for_logging("t"))
    assert logged == {**{str(n): 2 for n in range(10)}, "__other__": 10 + 4990}


def test_a_resumed_run_may_tell_more_apart(caplog: pytest.LogCaptureFixture) -> None:
    _, state = run_threads(resumed, 1, None, list("ab"), 1)[0]
    logged, state = run_threads(resumed, 1, state, list("abcd"), 10)[0]
    assert logged == {"a": 2, "__other__": 1, "b": 1, "c": 1, "d": 1}
    caplog.clear()
    logged, _ = run_threads(resumed, 1, state, list("ae"), 3)[0]
    assert logged["a"] == 3
    assert sum(logged.values()) == 8
    assert len(logged) <= 4
    assert len(caplog.records) == 0


@examples(60)
@given(
    story=st.lists(
        st.lists(st.lists(st.sampled_from("abcdefgh"), max_size=8), min_size=3, max_size=3),
        min_size=1,
        max_size=4,
    ),
    most=st.integers(1, 9),
    route=st.sampled_from(["narrow", "wide"]),
)
def test_every_value_counts_once(story: list[list[list[str]]], most: int, route: str) -> None:
    def live(communicator: Communicator) -> list[dict[str, float]]:
        aggregator = MetricsAggregator(communicator=communicator, max_categories=most, route=route)
        seen = []
        for ranks in story:
            count(aggregator, ranks[communicator.rank])
            seen.append(counted(aggregator.get_metrics_for_logging("t")))
        return seen

    first, *others = run_threads(live, 3)
    assert others == [first] * 2
    truth: Counter[str] = Counter()
    told_apart: set[str] = set()
    for ranks, logged in zip(story, first, strict=True):
        truth.update(name for names in ranks for name in names)
        assert sum(logged.values()) == truth.total()
        named = {name: value for name, value in logged.items() if name != "__other__"}
        assert all(value == truth[name] for name, value in named.items())
        assert told_apart <= set(named)
        told_apart = set(named)
        assert len(told_apart) <= most


@pytest.mark.parametrize("most", [0, -1, 2.5, True, None])
def test_a_bound_that_is_none_is_refused(most: Any) -> None:
    with pytest.raises(ValueError, match="give the number of categories to tell apart"):
        MetricsAggregator(max_categories=most)


# -- Categories out of data that are no names


Take = Callable[[MetricsAggregator, Any, str], None]


def take_list(aggregator: MetricsAggregator, categories: Any, choice: str) -> None:
    count(aggregator, categories)


def take_one_by_one(aggregator: MetricsAggregator, categories: Any, choice: str) -> None:
    for category in categories:
        aggregator.record("id", category, "categorical_count", dataset="d")


def take_collated(aggregator: MetricsAggregator, categories: Any, choice: str) -> None:
    collate = MetricsCollator(lambda samples: {"n": len(samples)}, on_bad_name=choice)
    samples = [
        {"metrics": [Metric("d", "id", category, AggregationType.CATEGORICAL_COUNT)]}
        for category in categories
    ]
    aggregator.update(pickle.loads(pickle.dumps(collate(samples)))["metrics"])


every_way_in = pytest.mark.parametrize("take", [take_list, take_one_by_one, take_collated])
BAD = {
    "": "__empty__",
    "a\nb": "a\\nb",
    "\x1b[0m": "\\x1b[0m",
    "\u2028": "\\u2028",
    "\u202eevil": "\\u202eevil",
    "half \ud83d": "half \\ud83d",
    np.str_("a\tb"): "a\\tb",
}


@every_way_in
def test_a_category_that_cannot_be_printed_counts_spelled_out_and_is_told_of_once(
    take: Take, caplog: pytest.LogCaptureFixture
) -> None:
    """It was refused, which ended the run from a data worker."""
    aggregator = MetricsAggregator()
    for _ in range(2):
        take(aggregator, ["prose", *BAD, "prose", "a\\nb"], "replace")
    logged = counted(aggregator.get_metrics_for_logging("t"))
    assert logged == {"prose": 4.0} | dict.fromkeys(BAD.values(), 2.0) | {"a\\nb": 4.0}
    (record,) = caplog.records
    assert "metric 'id' of dataset 'd' has a category that cannot be printed" in record.getMessage()
    assert "on_bad_name='refuse'" in record.getMessage()
    resumed = MetricsAggregator()
    resumed.load_state_dict(json.loads(json.dumps(aggregator.state_dict())))
    assert counted(resumed.get_metrics_for_logging("t")) == logged


@every_way_in
@pytest.mark.parametrize("category", BAD, ids=ascii)
def test_a_category_that_cannot_be_printed_may_be_refused(take: Take, category: str) -> None:
    aggregator = MetricsAggregator(on_bad_name="refuse")
    with pytest.raises(
        ValueError,
        match=r"metric 'id' of dataset 'd': the category .*(is empty|holds a line break)",
    ):
        take(aggregator, [category], "refuse")
    assert aggregator.get_metrics_for_logging() == {}


def test_a_category_that_waits_for_its_weight_is_replaced_or_refused_where_it_comes_in(
    caplog: pytest.LogCaptureFixture,
) -> None:
    torch = pytest.importorskip("torch")
    metric = Metric("d", "id", "", AggregationType.CATEGORICAL_COUNT, torch.tensor(1.0))
    aggregator = MetricsAggregator()
    aggregator.update([metric])
    assert len(caplog.records) == 1
    assert counted(aggregator.get_metrics_for_logging("t")) == {"__empty__": 1.0}
    with pytest.raises(ValueError, match="the category is empty"):
        MetricsAggregator(on_bad_name="refuse").update([metric])


def test_an_override_and_an_expansion_replace_it_too(caplog: pytest.LogCaptureFixture) -> None:
    class Upper(CategoricalCountAggHandler):
        def update(self, local_agg_metric: MetricState, metric: Metric) -> None:
            super().update(local_agg_metric, metric._replace(value=metric.value.upper()))

    class Expanding(Upper):
        def finalize_local_agg(self, local_agg_metric: MetricState) -> list[MetricState]:
            counts = {"a\rb": 2, "": 1}
            return [
                MetricState("d", "all", 0.0, AggregationType.CATEGORICAL_COUNT, {"counts": counts}),
                MetricState("d", "one", "\x00", AggregationType.CATEGORICAL_COUNT),
            ]

    aggregator = MetricsAggregator()
    aggregator.register_handler("upper", Upper())
    aggregator.register_handler("expanding", Expanding())
    for _ in range(2):
        aggregator.record("x", "a\nb", "upper", dataset="d")
    aggregator.record("y", "a", "expanding", dataset="d")
    assert aggregator.get_metrics_for_logging("t") == {
        "t_d/x_count_A\\nB": 2.0,
        "t_d/all_count_a\\rb": 2.0,
        "t_d/all_count___empty__": 1.0,
        "t_d/one_count_\\x00": 1.0,
    }
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    "call",
    [
        lambda choice: MetricsAggregator(on_bad_name=choice),
        lambda choice: MetricsCollator(on_bad_name=choice),
        lambda choice: MetricBatch.from_metrics([], on_bad_name=choice),
        lambda choice: CategoricalCountAggHandler(on_bad_name=choice),
    ],
)
def test_a_choice_that_is_none_is_refused(call: Any) -> None:
    for choice in ("skip", None, True):
        with pytest.raises(ValueError, match=r"on_bad_name=.*: use 'replace' or 'refuse'"):
            call(choice)


def test_names_that_the_program_makes_stay_errors() -> None:
    for metric in (Metric("d", "", 1, "sum"), Metric("a\nb", "x", 1, "sum")):
        with pytest.raises(ValueError, match=r"is empty|holds a line break"):
            MetricBatch.from_metrics([metric])
