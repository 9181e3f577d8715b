"""A subclass of a built-in handler may override any method of the contract, and is honoured."""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from ranks import run_threads
from ways_in import WAYS_IN, Take

from metricfold import (
    AggregationHandler,
    AggregationType,
    CategoricalCountAggHandler,
    DistributionAggHandler,
    MaxAggHandler,
    MeanAggHandler,
    Metric,
    MetricBatch,
    MetricsAggregator,
    MetricState,
    MinAggHandler,
    RateAggHandler,
    SumAggHandler,
    merge_state_dicts,
)
from metricfold.communicator import Communicator

Parts = list[list[Any]]
"""The values that each state has seen: one state a rank, and one a rank of the job before."""

NUMBERS: Parts = [[5.0, 50.0], [8.0], [-3.0, 20.0], [12.0, 7.0, 7.0]]
WORDS: Parts = [["a", "b"], ["a"], ["c", "b"], ["b", "a", "a"]]


def flat(parts: Parts) -> list[Any]:
    return [value for part in parts for value in part]


def capped(parts: Parts) -> Parts:
    return [[min(value, 10.0) for value in part] for part in parts]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def bonus(parts: Parts) -> float:
    """`finalize_dist_agg` is not called for a single result."""
    return 1000.0 if len(parts) > 1 else 0.0


def statistics(values: list[float]) -> dict[str, float]:
    return {
        "_stat_mean": mean(values),
        "_stat_min": min(values),
        "_stat_max": max(values),
        "_stat_p50": float(np.quantile(values, 0.5)),
        "_stat_count": float(len(values)),
    }


def counted(words: list[str]) -> dict[str, float]:
    return {f"_count_{word}": float(count) for word, count in Counter(words).items()}


# What the contract says, in plain Python: by handler and by the method that is overridden.
EXPECTED: dict[type[AggregationHandler], dict[str, Callable[[Parts], dict[str, float]]]] = {
    SumAggHandler: {
        "initialize_metric_state": lambda parts: {"": sum(flat(parts)) + 100 * len(parts)},
        "update": lambda parts: {"": sum(flat(capped(parts)))},
        "finalize_local_agg": lambda parts: {"": 2 * sum(flat(parts)), "_extra": 1.0},
        "finalize_dist_agg": lambda parts: {"": sum(flat(parts)) + bonus(parts)},
    },
    MeanAggHandler: {
        "initialize_metric_state": lambda parts: {
            "": (sum(flat(parts)) + 30 * len(parts)) / (len(flat(parts)) + 2 * len(parts))
        },
        "update": lambda parts: {"": mean(flat(capped(parts)))},
        "finalize_local_agg": lambda parts: {"": 2 * mean(flat(parts)), "_extra": 1.0},
        "finalize_dist_agg": lambda parts: {"": mean(flat(parts)) + bonus(parts)},
    },
    MaxAggHandler: {
        "initialize_metric_state": lambda parts: {"": max([*flat(parts), 30.0])},
        "update": lambda parts: {"": max(flat(capped(parts)))},
        "finalize_local_agg": lambda parts: {"": 2 * max(flat(parts)), "_extra": 1.0},
        "finalize_dist_agg": lambda parts: {"": max(flat(parts)) + bonus(parts)},
    },
    MinAggHandler: {
        "initialize_metric_state": lambda parts: {"": min([*flat(parts), 6.0])},
        "update": lambda parts: {"": min(flat(capped(parts)))},
        "finalize_local_agg": lambda parts: {"": 2 * min(flat(parts)), "_extra": 1.0},
        "finalize_dist_agg": lambda parts: {"": min(flat(parts)) + bonus(parts)},
    },
    DistributionAggHandler: {
        "initialize_metric_state": lambda parts: statistics(flat(parts) + [30.0] * len(parts)),
        "update": lambda parts: statistics(flat(capped(parts))),
        "finalize_local_agg": lambda parts: {
            **statistics([value for value in flat(parts) if value != 7.0]),
            "_extra": 1.0,
        },
        "finalize_dist_agg": lambda parts: {
            **statistics(flat(parts)),
            **({"": mean(flat(parts)) + bonus(parts)} if len(parts) > 1 else {}),
        },
    },
    CategoricalCountAggHandler: {
        "initialize_metric_state": lambda parts: counted(flat(parts) + ["a"] * len(parts)),
        "update": lambda parts: counted([word.upper() for word in flat(parts)]),
        "finalize_local_agg": lambda parts: {
            **counted([word for word in flat(parts) if word != "b"]),
            "_extra": 1.0,
        },
        "finalize_dist_agg": lambda parts: {
            **counted(flat(parts)),
            **({"": len(flat(parts)) + bonus(parts)} if len(parts) > 1 else {}),
        },
    },
    # Its value is the total, which is divided by the seconds where it is printed.
    RateAggHandler: {
        "initialize_metric_state": lambda parts: {"": sum(flat(parts)) + 100 * len(parts)},
        "update": lambda parts: {"": sum(flat(capped(parts)))},
        "finalize_local_agg": lambda parts: {"": 2 * sum(flat(parts)), "_extra": 1.0},
        "finalize_dist_agg": lambda parts: {"": sum(flat(parts)) + bonus(parts)},
    },
}
METHODS = list(EXPECTED[SumAggHandler])
MATRIX = [(kind, method) for kind in EXPECTED for method in METHODS]


def overriding(kind: type[AggregationHandler], method: str) -> AggregationHandler:
    """Return a handler of a subclass of `kind` that overrides one method, and calls what it had."""
    return type("Overriding", (kind,), {method: OVERRIDES[method]})()


def starting_elsewhere(
    self: Any, dataset_name: str, metric_name: str, agg_type: Any
) -> MetricState:
    state = super(type(self), self).initialize_metric_state(dataset_name, metric_name, agg_type)
    if isinstance(self, MeanAggHandler):
        state.metadata.update(sum=30.0, count=2)
    elif isinstance(self, DistributionAggHandler):
        state.metadata["values"] = [30.0]
    elif isinstance(self, CategoricalCountAggHandler):
        state.metadata["counts"]["a"] += 1
    else:
        state.value = {MaxAggHandler: 30.0, MinAggHandler: 6.0}.get(type(self).__mro__[1], 100.0)
    return state


def changing_what_comes_in(self: Any, local_agg_metric: MetricState, metric: Metric) -> None:
    value = metric.value.upper() if isinstance(metric.value, str) else min(metric.value, 10.0)
    super(type(self), self).update(local_agg_metric, metric._replace(value=value))


def changing_a_ranks_results(self: Any, local_agg_metric: MetricState) -> list[MetricState]:
    (state,) = super(type(self), self).finalize_local_agg(local_agg_metric)
    if isinstance(self, DistributionAggHandler):
        state.metadata["values"] = [value for value in state.metadata["values"] if value != 7.0]
    elif isinstance(self, CategoricalCountAggHandler):
        state.metadata["counts"].pop("b", None)
    else:
        state.value *= 2
    extra = MetricState(state.dataset_name, state.metric_name + "_extra", 1.0, AggregationType.MAX)
    return [state, extra]


def changing_the_result(self: Any, local_agg_metrics: list[MetricState]) -> MetricState:
    state = super(type(self), self).finalize_dist_agg(local_agg_metrics)
    state.value += 1000.0
    return state


OVERRIDES: dict[str, Callable[..., Any]] = {
    "initialize_metric_state": starting_elsewhere,
    "update": changing_what_comes_in,
    "finalize_local_agg": changing_a_ranks_results,
    "finalize_dist_agg": changing_the_result,
}


def given(values: list[Any]) -> list[Metric]:
    return [Metric("d", "x", value, "mine") for value in values]


def logged(
    communicator: Communicator,
    kind: type[AggregationHandler],
    method: str,
    parts: Parts,
    state: Any,
    take: Take,
) -> tuple[dict[str, float], Any]:
    aggregator = MetricsAggregator(communicator=communicator)
    aggregator.register_handler("mine", overriding(kind, method))
    if state is not None:
        aggregator.load_state_dict(state)
    take(aggregator, given(parts[communicator.rank]))
    saved = aggregator.state_dict()
    snapshot = aggregator.reduce()
    results = snapshot.as_dict("t", "run")
    assert snapshot.as_dict("t", "interval").keys() == results.keys()
    if issubclass(kind, RateAggHandler):
        results["t_d/x"] *= snapshot.run_seconds
    return {key.removeprefix("t_d/x"): value for key, value in results.items()}, saved


@pytest.mark.parametrize(("kind", "method"), MATRIX)
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("resumed", [None, 1, 2])
def test_each_method_is_honoured_on_any_number_of_ranks_and_through_a_checkpoint(
    kind: type[AggregationHandler], method: str, world_size: int, resumed: int | None
) -> None:
    parts = WORDS if kind is CategoricalCountAggHandler else NUMBERS
    take = WAYS_IN[(MATRIX.index((kind, method)) + world_size) % len(WAYS_IN)]
    seen = parts[:world_size]
    results = run_threads(logged, world_size, kind, method, seen, None, take)
    if resumed is not None:
        more = parts[2 : 2 + resumed]
        results = run_threads(logged, resumed, kind, method, more, results[0][1], take)
        seen = seen + more
    expected = EXPECTED[kind][method](seen)
    for found, _ in results:
        reported = {suffix: found[suffix] for suffix in expected}
        assert reported == pytest.approx(expected, rel=1e-12)
        if kind is not DistributionAggHandler:
            assert found.keys() == expected.keys()


def run_of(handler: AggregationHandler, values: list[Any], **metric: Any) -> dict[str, float]:
    """Return what one rank logs."""
    aggregator = MetricsAggregator()
    aggregator.register_handler("mine", handler)
    aggregator.update([Metric("d", "x", value, "mine", **metric) for value in values])
    logged = aggregator.get_metrics_for_logging("t")
    return {key.removeprefix("t_d/x"): value for key, value in logged.items()}


# -- What overrides do without calling what they override, as the metrics module's own do


class SumOfSquares(SumAggHandler):
    def update(self, local_agg_metric: MetricState, metric: Metric) -> None:
        local_agg_metric.value += metric.value**2


class LargestMagnitude(MaxAggHandler):
    def update(self, local_agg_metric: MetricState, metric: Metric) -> None:
        local_agg_metric.value = max(local_agg_metric.value, abs(metric.value))


class SmallestMagnitude(MinAggHandler):
    def update(self, local_agg_metric: MetricState, metric: Metric) -> None:
        local_agg_metric.value = min(local_agg_metric.value, abs(metric.value))


class MeanSquare(MeanAggHandler):
    def update(self, local_agg_metric: MetricState, metric: Metric) -> None:
        local_agg_metric.metadata["sum"] += metric.value**2
        local_agg_metric.metadata["count"] += 1


class ShortWindow(DistributionAggHandler):
    def initialize_metric_state(
        self, dataset_name: str, metric_name: str, agg_type: Any
    ) -> MetricState:
        values = deque([0.5], maxlen=3)
        return MetricState(dataset_name, metric_name, 0.0, agg_type, {"values": values})


class Magnitudes(DistributionAggHandler):
    def update(self, local_agg_metric: MetricState, metric: Metric) -> None:
        local_agg_metric.metadata["values"].append(abs(metric.value))


class GeometricMean(MeanAggHandler):
    """Has states of its own making in all four methods."""

    def initialize_metric_state(
        self, dataset_name: str, metric_name: str, agg_type: Any
    ) -> MetricState:
        metadata = {"sum": 0.0, "count": 0}
        return MetricState(dataset_name, metric_name, 0.0, agg_type, metadata)

    def update(self, local_agg_metric: MetricState, metric: Metric) -> None:
        local_agg_metric.metadata["sum"] += math.log2(metric.value)
        local_agg_metric.metadata["count"] += 1

    def finalize_local_agg(self, local_agg_metric: MetricState) -> list[MetricState]:
        metadata = local_agg_metric.metadata
        local_agg_metric.value = 2 ** (metadata["sum"] / metadata["count"])
        return [local_agg_metric]

    def finalize_dist_agg(self, local_agg_metrics: list[MetricState]) -> MetricState:
        first, second = local_agg_metrics
        for key in first.metadata:
            first.metadata[key] += second.metadata[key]
        return self.finalize_local_agg(first)[0]


class FirstLetters(CategoricalCountAggHandler):
    def update(self, local_agg_metric: MetricState, metric: Metric) -> None:
        local_agg_metric.metadata["counts"][metric.value[0]] += 1


def of_two_ranks(handler: type[AggregationHandler], values: list[list[Any]]) -> dict[str, float]:
    def rank(communicator: Communicator) -> dict[str, float]:
        aggregator = MetricsAggregator(communicator=communicator)
        aggregator.register_handler("mine", handler())
        aggregator.update(given(values[communicator.rank]))
        logged = aggregator.get_metrics_for_logging("t")
        return {key.removeprefix("t_d/x"): value for key, value in logged.items()}

    first, second = run_threads(rank, 2)
    assert first == second
    return first


@pytest.mark.parametrize(
    ("handler", "values", "expected"),
    [
        (SumOfSquares, [[1.0, -2.0], [3.0]], {"": 14.0}),
        (LargestMagnitude, [[1.0, -4.0], [3.0]], {"": 4.0}),
        (SmallestMagnitude, [[-1.0, 4.0], [3.0]], {"": 1.0}),
        (MeanSquare, [[1.0, -2.0], [3.0]], {"": 14 / 3}),
        (ShortWindow, [[1.0, 2.0, 3.0, 4.0], [5.0]], statistics([2.0, 3.0, 4.0, 0.5, 5.0])),
        (Magnitudes, [[1.0, -2.0], [3.0]], statistics([1.0, 2.0, 3.0])),
        (GeometricMean, [[1.0, 4.0], [16.0]], {"": 4.0}),
        (FirstLetters, [["ab", "ac"], ["b"]], {"_count_a": 2.0, "_count_b": 1.0}),
    ],
)
def test_an_update_of_ones_own_may_know_the_metrics_modules_states_alone(
    handler: type[AggregationHandler], values: list[list[Any]], expected: dict[str, float]
) -> None:
    found = of_two_ranks(handler, values)
    assert {suffix: found[suffix] for suffix in expected} == expected


def test_a_window_that_an_update_of_ones_own_lets_grow_is_bounded_all_the_same() -> None:
    aggregator = MetricsAggregator()
    aggregator.register_handler("mine", Magnitudes(window_size=3))
    aggregator.update(given([9.0, -1.0, 2.0, -3.0]))
    assert aggregator.get_metrics_for_logging("t")["t_d/x_stat_mean"] == 2.0


def test_a_value_that_an_override_sets_is_what_counts_from_then_on() -> None:
    class Floor(MaxAggHandler):
        def update(self, local_agg_metric: MetricState, metric: Metric) -> None:
            super().update(local_agg_metric, metric)
            local_agg_metric.value = max(local_agg_metric.value - 1.0, 0.0)

    class Smoothed(MeanAggHandler):
        def update(self, local_agg_metric: MetricState, metric: Metric) -> None:
            local_agg_metric.value = 0.5 * local_agg_metric.value + 0.5 * metric.value

    assert run_of(Floor(), [-5.0]) == {"": 0.0}
    assert run_of(Floor(), [5.0, 3.0]) == {"": 3.0}
    assert run_of(Smoothed(), [4.0, 8.0]) == {"": 5.0}
    # Each rank's value counts as one then.
    assert of_two_ranks(Smoothed, [[4.0, 8.0], [2.0]]) == {"": 3.0}


def test_a_value_that_fits_changed_metadata_is_not_printed_beside_them() -> None:
    class Trimmed(DistributionAggHandler):
        def finalize_local_agg(self, local_agg_metric: MetricState) -> list[MetricState]:
            values = [value for value in local_agg_metric.metadata["values"] if value < 10]
            local_agg_metric.metadata["values"] = values
            local_agg_metric.value = float(np.mean(values))
            return [local_agg_metric]

    assert "" not in run_of(Trimmed(), [0.1, 0.2, 0.6, 50.0])
    assert "" not in of_two_ranks(Trimmed, [[0.1, 0.7], [0.3, 50.0]])


def test_what_reports_a_result_may_be_overridden_too() -> None:
    class InPercent(MeanAggHandler):
        def report(self, local_agg_metric: MetricState) -> dict[str, float]:
            return {"_percent": 100 * super().report(local_agg_metric)[""]}

    assert run_of(InPercent(), [0.5, 0.25]) == {"_percent": 37.5}


def test_states_of_the_run_and_of_the_interval_share_nothing() -> None:
    class Shared(MeanAggHandler):
        metadata = {"sum": 0.0, "count": 0}  # noqa: RUF012 - the mistake

        def initialize_metric_state(
            self, dataset_name: str, metric_name: str, agg_type: Any
        ) -> MetricState:
            return MetricState(dataset_name, metric_name, 0.0, agg_type, self.metadata)

        def update(self, local_agg_metric: MetricState, metric: Metric) -> None:
            local_agg_metric.metadata["sum"] += metric.value
            local_agg_metric.metadata["count"] += 1

    class Total(Shared):
        def finalize_local_agg(self, local_agg_metric: MetricState) -> list[MetricState]:
            local_agg_metric.value = local_agg_metric.metadata["count"]
            return [local_agg_metric]

    assert run_of(Total(), [1.0, 2.0]) == {"": 2.0}


def test_a_state_that_says_another_type_is_saved_and_loaded_all_the_same() -> None:
    class Sums(SumAggHandler):
        def initialize_metric_state(
            self, dataset_name: str, metric_name: str, agg_type: Any
        ) -> MetricState:
            return MetricState(dataset_name, metric_name, 1.0, AggregationType.SUM)

    first, second = MetricsAggregator(), MetricsAggregator()
    for aggregator in (first, second):
        aggregator.register_handler("mine", Sums())
    first.update(given([1.0]))
    second.load_state_dict(first.state_dict())
    assert second.get_metrics_for_logging("t") == {"t_d/x": 2.0}


def test_a_handler_that_fails_to_finalise_is_named_with_its_metric() -> None:
    class Broken(SumAggHandler):
        def finalize_local_agg(self, local_agg_metric: MetricState) -> list[MetricState]:
            raise OSError("no")

    with pytest.raises(
        RuntimeError, match=r"Broken.finalize_local_agg failed for metric 'x' of .*OSError\('no'\)"
    ):
        run_of(Broken(), [1.0])


def test_a_state_of_ones_own_making_prints_its_value() -> None:
    class Tail(DistributionAggHandler):
        def finalize_local_agg(self, local_agg_metric: MetricState) -> list[MetricState]:
            values = list(local_agg_metric.metadata["values"])
            return [
                MetricState("d", "x", max(values), local_agg_metric.agg_type, {"values": values})
            ]

    assert run_of(GeometricMean(), [2.0, 8.0]) == {"": 4.0}
    found = run_of(Tail(), [2.0, 8.0])
    assert (found[""], found["_stat_mean"]) == (8.0, 5.0)


# -- What is an override, and what is not


class CappedMixin:
    def update(self, local_agg_metric: MetricState, metric: Metric) -> None:
        super().update(local_agg_metric, metric._replace(value=min(metric.value, 10.0)))  # type: ignore[misc]


class CappedByMixin(CappedMixin, SumAggHandler): ...


class CappedByDecorator(SumAggHandler):
    @functools.wraps(SumAggHandler.update)
    def update(self, local_agg_metric: MetricState, metric: Metric) -> None:
        super().update(local_agg_metric, metric._replace(value=min(metric.value, 10.0)))


class CappedTwice(CappedByMixin): ...


def capped_by_the_object() -> AggregationHandler:
    handler = SumAggHandler()

    def update(local_agg_metric: MetricState, metric: Metric) -> None:
        SumAggHandler.update(
            handler, local_agg_metric, metric._replace(value=min(metric.value, 10))
        )

    handler.update = update  # type: ignore[method-assign]
    return handler


@pytest.mark.parametrize(
    "make", [CappedByMixin, CappedByDecorator, CappedTwice, capped_by_the_object]
)
def test_an_override_is_found_wherever_it_comes_from(make: Any) -> None:
    assert run_of(make(), [5.0, 50.0]) == {"": 15.0}


def test_saved_metadata_of_ones_own_are_honoured() -> None:
    class Sealed(SumAggHandler):
        def serialize_metadata(self, metadata: dict[str, Any]) -> dict[str, Any]:
            return {"sealed": metadata}

        def deserialize_metadata(self, metadata: dict[str, Any]) -> dict[str, Any]:
            opened: dict[str, Any] = metadata["sealed"]
            return opened

    first, second = MetricsAggregator(), MetricsAggregator()
    for aggregator in (first, second):
        aggregator.register_handler("mine", Sealed())
    first.update(given([1.0, 2.0]))
    state = first.state_dict()
    assert "sealed" in state["payload"]
    second.load_state_dict(state)
    second.update(given([3.0]))
    assert second.get_metrics_for_logging("t") == {"t_d/x": 6.0}


def test_a_hook_of_the_lanes_leaves_the_lanes_as_they_are() -> None:
    class Doubled(SumAggHandler):
        def result(self, lanes: Any) -> float:
            return 2 * super().result(lanes)

    class Squares(MeanAggHandler):
        def sums_of(self, values: Any, weights: Any) -> tuple[float, ...]:
            return super().sums_of(values**2, weights)

    def rank(communicator: Communicator) -> tuple[dict[str, float], list[float | None], int]:
        aggregator = MetricsAggregator(communicator=communicator)
        aggregator.register_handler("doubled", Doubled())
        aggregator.register_handler("squares", Squares())
        for _ in range(2):
            aggregator.record("x", communicator.rank + 1.0, "doubled")
            aggregator.record("y", communicator.rank + 1.0, "squares")
            before = aggregator.collectives
            snapshot = aggregator.reduce()
        in_one = aggregator.collectives - before
        return snapshot.as_dict("t"), snapshot.per_rank(None, "x"), in_one

    assert run_threads(rank, 2) == [({"t/x": 12.0, "t/y": 2.5}, [2.0, 4.0], 1)] * 2


@pytest.mark.parametrize("hook", ["sums_of", "fold"])
def test_a_hook_of_the_lanes_may_be_replaced_on_the_object_too(hook: str) -> None:
    """It was honoured by arrays, but not by plain numbers of a known key, nor by batches."""
    handler = SumAggHandler()
    own = {
        "sums_of": lambda values, weights: (float(values @ values),),
        "fold": lambda values, weights: SumAggHandler.fold(handler, values**2, weights),
    }
    setattr(handler, hook, own[hook])
    aggregator = MetricsAggregator()
    aggregator.register_handler(AggregationType.SUM, handler)
    for value in (1.0, 2.0, np.float64(3.0)):
        aggregator.record("x", value, "sum")
        aggregator.record_all({"y": value}, "sum")
        aggregator.update([Metric("d", "z", value, AggregationType.SUM)] * 2)
    batch = MetricBatch.from_metrics([Metric("d", "z", 1.0, "sum")])
    with pytest.raises(ValueError, match=f"was folded by MetricsCollator.*{WHAT_TO_DO}"):
        aggregator.update(batch)
    assert aggregator.get_metrics_for_logging("t") == {"t/x": 14.0, "t/y": 14.0, "t_d/z": 28.0}


def test_a_sum_of_ones_own_is_a_total_of_the_run_in_the_default_window_too() -> None:
    """A handler without lanes was of the interval, whatever it was a subclass of."""
    aggregator = MetricsAggregator()
    aggregator.register_handler("capped", CappedByMixin())
    for _ in range(2):
        aggregator.record("x", 50.0, "capped")
        snapshot = aggregator.reduce()
    assert snapshot.as_dict("t", "auto") == {"t/x": 20.0}
    assert snapshot.as_dict("t", "interval") == {"t/x": 10.0}


# -- All ways in, and those that cannot be


def test_values_on_a_device_are_read_late_and_can_be_rolled_back() -> None:
    torch = pytest.importorskip("torch")
    aggregator = MetricsAggregator()
    aggregator.register_handler("capped", CappedByMixin())
    aggregator.record("x", 3.0, "capped")
    mark = aggregator.mark()
    aggregator.record("x", torch.tensor(4.0), "capped")
    aggregator.record("x", 100.0, "capped")
    aggregator.rollback(mark)
    aggregator.record("x", torch.tensor(50.0), "capped")
    aggregator.record("x", 2.0, "capped")
    assert aggregator.get_metrics_for_logging("t") == {"t/x": 15.0}


def test_a_failing_override_leaves_every_state_as_it_was() -> None:
    class Picky(SumAggHandler):
        def update(self, local_agg_metric: MetricState, metric: Metric) -> None:
            super().update(local_agg_metric, metric)
            if metric.value < 0:
                raise ValueError("negative")

    aggregator = MetricsAggregator()
    aggregator.register_handler("mine", Picky())
    aggregator.update(given([1.0]))
    for values in ([2.0, -1.0], ["three"], [None]):
        with pytest.raises((ValueError, TypeError)):
            aggregator.update(given(values))
    assert aggregator.get_metrics_for_logging("t") == {"t_d/x": 1.0}


def test_what_is_no_number_is_named() -> None:
    with pytest.raises(TypeError, match=r"metric 'x' of dataset 'd': '3' \(str\) is no number"):
        run_of(MeanSquareBySuper(), ["3"])


class MeanSquareBySuper(MeanAggHandler):
    def update(self, local_agg_metric: MetricState, metric: Metric) -> None:
        super().update(local_agg_metric, metric)


def test_weights_count_where_the_built_in_counts_them() -> None:
    class Weighted(DistributionAggHandler):
        def update(self, local_agg_metric: MetricState, metric: Metric) -> None:
            super().update(local_agg_metric, metric)

    metrics = [(1.0, 3.0), (4.0, 1.0), (float("nan"), 2.0), (float("inf"), 1.0)]
    aggregator = MetricsAggregator()
    aggregator.register_handler("mine", MeanSquareBySuper())
    aggregator.register_handler("mine too", Weighted())
    for value, weight in metrics[:2]:
        aggregator.record("mean", value, "mine", weight=weight)
        aggregator.record("built-in mean", value, weight=weight)
    for value, weight in metrics:
        aggregator.record("x", value, "mine too", weight=weight)
        aggregator.record("built-in", value, "distribution", weight=weight)
    logged = aggregator.get_metrics_for_logging("t")
    assert logged["t/mean"] == logged["t/built-in mean"] == 1.75
    for statistic in ("mean", "std", "p05", "p50", "count", "nan_count", "inf_count"):
        assert logged[f"t/x_stat_{statistic}"] == logged[f"t/built-in_stat_{statistic}"]


def test_a_built_in_type_may_be_given_to_an_override_where_values_come_one_by_one() -> None:
    aggregator = MetricsAggregator()
    aggregator.register_handler(AggregationType.SUM, CappedByMixin())
    aggregator.update([Metric("d", "x", 50.0, AggregationType.SUM)])
    aggregator.record("y", 50.0, "sum")
    assert aggregator.get_metrics_for_logging("t") == {"t_d/x": 10.0, "t/y": 10.0}


WHAT_TO_DO = r"register yours for a type of its own \(AggregationType.CUSTOM, your own Enum member or a string\)"


def test_what_was_folded_elsewhere_says_which_type_to_use_instead() -> None:
    torch = pytest.importorskip("torch")
    from metricfold.torch import DeviceAccumulator

    aggregator = MetricsAggregator()
    aggregator.register_handler(AggregationType.SUM, CappedByMixin())
    batch = MetricBatch.from_metrics([Metric("d", "x", 50.0, AggregationType.SUM)])
    with pytest.raises(ValueError, match=f"metric 'x' of dataset 'd' was folded.*{WHAT_TO_DO}"):
        aggregator.update(batch)
    accumulator = DeviceAccumulator({"x": "sum"})
    accumulator.update("x", torch.tensor(50.0))
    with pytest.raises(ValueError, match=f"metric 'x' was folded on a device.*{WHAT_TO_DO}"):
        aggregator.drain(accumulator)
    aggregator.register_handler(AggregationType.MAX, overriding(MaxAggHandler, "update"))
    with pytest.raises(ValueError, match=f"timer 'data' needs.*{WHAT_TO_DO}"):
        aggregator.timer("data")
    assert aggregator.get_metrics_for_logging("t") == {}


def test_a_checkpoint_from_when_the_override_was_ignored_says_so() -> None:
    before, after = MetricsAggregator(), MetricsAggregator()
    before.register_handler("mine", SumAggHandler())
    before.update(given([1.0]))
    after.register_handler("mine", CappedByMixin())
    with pytest.raises(ValueError, match="3 SUM and 0 MAX lanes, but CappedByMixin has no lanes"):
        after.load_state_dict(before.state_dict())
    # And the other way round, where nothing would be added up.
    saved, other = MetricsAggregator(), MetricsAggregator()
    saved.register_handler("mine", CappedByMixin())
    saved.update(given([1.0]))
    other.register_handler("mine", SumAggHandler())
    with pytest.raises(ValueError, match="with no lanes, but SumAggHandler has 3 SUM"):
        other.load_state_dict(saved.state_dict())


def test_ranks_with_and_without_the_override_are_told_so() -> None:
    """They were told that the type was registered with the type that it had."""

    def rank(communicator: Communicator) -> str:
        aggregator = MetricsAggregator(communicator=communicator)
        aggregator.register_handler(
            "mine", CappedByMixin() if communicator.rank else SumAggHandler()
        )
        aggregator.update(given([1.0]))
        with pytest.raises(ValueError, match="rank 1 held metric 'x' of dataset 'd'") as raised:
            aggregator.reduce()
        return str(raised.value)

    first, second = run_threads(rank, 2)
    assert first == second
    assert "with no lanes, but the other ranks hold it with 3 SUM and 0 MAX lanes" in first
    assert "register the same handler for type mine on every rank" in first


# -- An override that changes nothing changes nothing


def passing_on(kind: type[AggregationHandler], **options: Any) -> AggregationHandler:
    """Return a handler without lanes that does what `kind` does."""

    def update(self: Any, local_agg_metric: MetricState, metric: Metric) -> None:
        super(type(self), self).update(local_agg_metric, metric)

    return type("PassingOn", (kind,), {"update": update})(**options)


KINDS: dict[str, type[AggregationHandler]] = {
    "sum": SumAggHandler,
    "mean": MeanAggHandler,
    "max": MaxAggHandler,
    "min": MinAggHandler,
    "distribution": DistributionAggHandler,
    "rate": RateAggHandler,
}


def side_by_side(logged: dict[str, float]) -> tuple[dict[str, float], dict[str, float]]:
    """Return what metrics of overrides give, and what the same of built-in types give."""
    mine = {key.replace("/mine_", "/"): v for key, v in logged.items() if "/mine_" in key}
    theirs = {key.replace("/theirs_", "/"): v for key, v in logged.items() if "/theirs_" in key}
    assert len(mine) + len(theirs) == len(logged) > 0
    return mine, theirs


def test_it_gives_what_the_built_in_gives_over_intervals_restarts_and_jobs() -> None:
    def new(communicator: Communicator | None = None) -> MetricsAggregator:
        aggregator = MetricsAggregator(communicator=communicator)
        for name, kind in KINDS.items():
            aggregator.register_handler(f"my {name}", passing_on(kind))
        return aggregator

    def take(aggregator: MetricsAggregator, random: Any, size: int) -> None:
        for name in KINDS:
            for value in random.normal(size=size).tolist():
                aggregator.record(f"mine_{name}", value, f"my {name}")
                aggregator.record(f"theirs_{name}", value, name)

    def rank(communicator: Communicator) -> Any:
        aggregator, random = new(communicator), np.random.default_rng(communicator.rank)
        for interval in range(4):
            take(aggregator, random, 2 + communicator.rank)
            state = aggregator.state_dict(sync=interval != 3)
            if interval == 2:
                aggregator = new(communicator)
                aggregator.load_state_dict(state)
            take(aggregator, random, 3)
            snapshot = aggregator.reduce_async().result() if interval == 1 else aggregator.reduce()
            for window in ("run", "interval", "auto"):
                mine, theirs = side_by_side(snapshot.as_dict("t", window))
                assert mine == pytest.approx(theirs, rel=1e-9)
        return state

    states = run_threads(rank, 2)
    assert states[0] == states[1]
    merged = new()
    merged.load_state_dict(merge_state_dicts([states[0], states[0]], parallel=True))
    mine, theirs = side_by_side(merged.get_metrics_for_logging("t"))
    assert mine == pytest.approx(theirs, rel=1e-9)


@pytest.mark.parametrize("on_nan", ["skip", "propagate"])
@pytest.mark.parametrize("kind", ["sum", "mean", "max", "min"])
def test_it_takes_nan_and_infinities_as_the_built_in_does(kind: str, on_nan: str) -> None:
    aggregator = MetricsAggregator(on_nan=on_nan)
    aggregator.register_handler("mine", passing_on(KINDS[kind], on_nan=on_nan))
    inf, nan = float("inf"), float("nan")
    for name, values in {"a": [1.0, nan, 3.0], "b": [nan], "c": [inf, -inf], "d": [inf]}.items():
        for value in values:
            aggregator.record(f"mine_{name}", value, "mine")
            aggregator.record(f"theirs_{name}", value, kind)
    mine, theirs = side_by_side(aggregator.get_metrics_for_logging("t"))
    assert mine == pytest.approx(theirs, nan_ok=True)


@pytest.mark.parametrize("window", [None, 50])
def test_it_keeps_the_window_that_the_built_in_keeps(window: int | None) -> None:
    aggregator = MetricsAggregator(dist_window_size=window)
    handler = passing_on(DistributionAggHandler, window_size=window)
    aggregator.register_handler("mine", handler)
    random = np.random.default_rng(0)
    # So many that those beyond the recent ones are folded into a histogram.
    for value, weight in zip(
        random.lognormal(size=4_500 if window is None else 120).tolist(),
        itertools.cycle([1.0, 1.0, 3.0]),
    ):
        metric = Metric("d", "mine_x", value, "mine", weight)
        aggregator.update([metric, metric._replace(name="theirs_x", agg_type="distribution")])
    mine, theirs = side_by_side(aggregator.get_metrics_for_logging("t"))
    assert mine == pytest.approx(theirs, rel=1e-6)
    assert theirs["t_d/x_stat_count"] == (window or 4_500)


def test_it_tells_as_many_categories_apart() -> None:
    aggregator = MetricsAggregator(max_categories=3)
    handler = passing_on(CategoricalCountAggHandler, max_categories=3)
    aggregator.register_handler("mine", handler)
    for category in "abcdeabz":
        aggregator.record("mine_x", category, "mine")
        aggregator.record("theirs_x", category, "categorical_count")
    mine, theirs = side_by_side(aggregator.get_metrics_for_logging("t"))
    assert mine == theirs
    assert mine["t/x_count___other__"] == 3.0
