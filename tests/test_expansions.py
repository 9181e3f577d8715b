"""A custom handler may finalise into other types, under other names, with metadata of its own."""

from __future__ import annotations

import enum
import os
import warnings
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from handlers_of_users import LaneRMS
from ranks import run_ranks, run_threads

from metricfold import (
    AggregationHandler,
    AggregationType,
    Metric,
    MetricsAggregator,
    MetricState,
    Snapshot,
)
from metricfold.communicator import Communicator


class Expanding(AggregationHandler):
    """Finalises the sum of its values to whatever `results` makes of its state."""

    def __init__(self, results: Callable[[MetricState], Any]) -> None:
        self.results = results

    def initialize_metric_state(
        self, dataset_name: str, metric_name: str, agg_type: Any
    ) -> MetricState:
        return MetricState(dataset_name, metric_name, 0.0, agg_type)

    def update(self, local_agg_metric: MetricState, metric: Metric) -> None:
        local_agg_metric.value += metric.value

    def finalize_local_agg(self, local_agg_metric: MetricState) -> Any:
        return self.results(local_agg_metric)

    def finalize_dist_agg(self, local_agg_metrics: list[MetricState]) -> MetricState:
        first = local_agg_metrics[0]
        total = sum(state.value for state in local_agg_metrics)
        return MetricState(first.dataset_name, first.metric_name, total, first.agg_type)


def logged(results: Callable[[MetricState], Any], world_size: int = 1) -> dict[str, float]:
    """Return what ranks log that have recorded 2, 3, ... and 10.0 as a metric of another type."""

    def rank(communicator: Communicator) -> Snapshot:
        aggregator = MetricsAggregator(communicator=communicator)
        aggregator.register_handler("mine", Expanding(results))
        aggregator.register_handler("lane rms", LaneRMS())
        aggregator.record("x", communicator.rank + 2.0, "mine", dataset="d")
        aggregator.record("other", 10.0, "sum", dataset="d")
        return aggregator.reduce()

    def shown(snapshot: Snapshot) -> dict[str, float]:
        found = snapshot.as_dict("t")
        for name in found.keys() & {"t_d/rate"}:
            found[name] *= snapshot.run_seconds
        assert found.pop("t_d/other") == 10.0 * world_size
        return found

    found, *others = map(shown, run_threads(rank, world_size))
    assert all(str(other) == str(found) for other in others)  # NaN is equal to NaN here
    return {key.removeprefix("t_d/"): value for key, value in found.items()}


class Colour(enum.Enum):
    RED = 1


FOREIGN: list[Any] = [
    {},
    {"count": 3},
    {"count": 3, "seen": [1, 2]},
    {"nans": 2.0},
    {"count": None, "sum": None},
    {"count": [3], "sum": [9.0]},
    {"count": "3", "sum": "9"},
    {"count": -3, "sum": 9.0},
    {"values": 3},
    {"values": ["a", "b"]},
    {"values": [[1.0]]},
    {"counts": [1, 2]},
    {"counts": {"a": None}},
    {"max": 100.0, "seconds": 4.0},
    {"weights": [1.0], "older": 3, "statistics": {"mean": 9.0}},
    {"state": {"deep": [{"deeper": (1, 2)}]}},
    {Colour.RED: 1, 3: "three"},
    {"seen": {1, 2}, "open": object()},
]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("metadata", FOREIGN, ids=lambda one: ", ".join(map(str, one)) or "none")
def test_metadata_of_ones_own_change_nothing_about_a_result_of_a_built_in_type(
    metadata: Any, world_size: int
) -> None:
    """A key "count" was enough to be taken for ours: a KeyError, or another number."""

    def results(state: MetricState) -> list[MetricState]:
        types = {**{agg.value: agg for agg in AggregationType}, "lane": "lane rms"}
        del types["custom"]
        return [
            MetricState("d", name, state.value, agg_type, dict(metadata))
            for name, agg_type in types.items()
        ]

    found = logged(results, world_size)
    values = [2.0, 3.0][:world_size]
    assert {name: found[name] for name in ("sum", "mean", "max", "min")} == {
        "sum": sum(values),
        "mean": sum(values) / world_size,
        "max": max(values),
        "min": 2.0,
    }
    assert found["rate"] == pytest.approx(sum(values))
    assert found["lane"] == (sum(value**2 for value in values) / world_size) ** 0.5
    assert found["distribution_stat_mean"] == found["mean"]
    assert found["distribution_stat_count"] == world_size
    assert [found[f"categorical_count_count_{value}"] for value in values] == [1.0] * world_size


def test_a_sum_and_a_count_make_a_mean_weighted() -> None:
    def results(state: MetricState) -> list[MetricState]:
        # Rank 0 has seen 2 values of 5, rank 1 3 values of 1.
        total, count = {2.0: (10.0, 2), 3.0: (3.0, 3)}[state.value]
        metadata: dict[str, Any] = {"sum": total, "count": count}
        return [
            MetricState("d", "mean", total / count, "mean", metadata),
            MetricState("d", "no value", None, "mean", {**metadata, "seen": "more"}),
            MetricState(
                "d", "numpy", 0.0, "mean", {key: np.array(metadata[key]) for key in metadata}
            ),
            MetricState("d", "nothing", 0.0, "mean", {"sum": 0.0, "count": 0}),
        ]

    assert logged(results) == {"mean": 5.0, "no value": 5.0, "numpy": 5.0}
    assert logged(results, 2) == {"mean": 2.6, "no value": 2.6, "numpy": 2.6}


def test_a_rank_without_a_count_adds_nothing_to_a_mean() -> None:
    def results(state: MetricState) -> list[MetricState]:
        count = 0 if state.value == 2.0 else 4
        return [MetricState("d", "m", 0.0, "mean", {"sum": 1.0 * count, "count": count})]

    assert logged(results, 2) == {"m": 1.0}


def test_values_and_counts_of_the_metrics_modules_states_are_pooled() -> None:
    def results(state: MetricState) -> list[MetricState]:
        values = deque([state.value, 10.0, float("nan")], maxlen=9)
        counts = Counter({"a": 2, Colour.RED: 1})
        return [
            MetricState("d", "len", 0.0, "distribution", {"values": values}),
            MetricState("d", "kind", 0.0, "categorical_count", {"counts": counts}),
        ]

    found = logged(results, 2)
    assert (found["len_stat_mean"], found["len_stat_p50"]) == (6.25, 6.5)
    assert (found["len_stat_count"], found["len_stat_nan_count"]) == (4.0, 2.0)
    assert (found["kind_count_a"], found["kind_count_Colour.RED"]) == (4.0, 2.0)


def test_a_state_of_a_built_in_handler_may_be_kept_and_returned() -> None:
    from metricfold import DistributionAggHandler, MeanAggHandler

    class Keeping(AggregationHandler):
        inner = (("_mean", MeanAggHandler()), ("_len", DistributionAggHandler()))

        def initialize_metric_state(
            self, dataset_name: str, metric_name: str, agg_type: Any
        ) -> Any:
            state = MetricState(dataset_name, metric_name, 0.0, agg_type)
            for suffix, handler in self.inner:
                inner = handler.initialize_metric_state(dataset_name, metric_name, agg_type)
                state.metadata[suffix] = inner.metadata
            return state

        def update(self, local_agg_metric: MetricState, metric: Metric) -> None:
            for suffix, handler in self.inner:
                handler.update(self.part(local_agg_metric, suffix, "mine"), metric)

        def part(self, state: MetricState, suffix: str, agg_type: Any) -> MetricState:
            metadata = state.metadata[suffix]
            name = state.metric_name + suffix
            value = metadata["__value__"]
            return MetricState(state.dataset_name, name, value, agg_type, metadata)

        def finalize_local_agg(self, local_agg_metric: MetricState) -> list[MetricState]:
            types = {"_mean": "mean", "_len": "distribution"}
            return [self.part(local_agg_metric, suffix, types[suffix]) for suffix in types]

        def finalize_dist_agg(self, local_agg_metrics: list[MetricState]) -> MetricState:
            raise AssertionError

    def rank(communicator: Communicator) -> dict[str, float]:
        aggregator = MetricsAggregator(communicator=communicator)
        aggregator.register_handler("mine", Keeping())
        for value in range(2 + communicator.rank):
            aggregator.record("x", value, "mine", weight=1 + value)
        return aggregator.get_metrics_for_logging("t")

    (found, _) = run_threads(rank, 2)
    assert found["t/x_mean"] == (2 + 2 + 6) / (3 + 6)
    assert found["t/x_len_stat_count"] == 5.0


# -- Names


@pytest.mark.parametrize(
    ("dataset", "name", "why"),
    [
        ("d", "", "is empty"),
        ("d", "a\nb", "holds a line break"),
        ("d", "half \ud83d", "holds a line break"),
        ("d", None, "must be a string, but is None"),
        ("d", 3, "must be a string, but is 3"),
        ("d", ["a"], "must be a string"),
        ("d\u2028", "a", "holds a line break"),
        (None, "a", "must be a string, but is None"),
    ],
)
def test_a_result_whose_name_no_call_would_take_is_left_out_and_named(
    dataset: Any, name: Any, why: str
) -> None:
    def results(state: MetricState) -> list[MetricState]:
        return [state, MetricState(dataset, name, 1.0, "sum")]

    with pytest.warns(RuntimeWarning, match=f"metric 'x' of dataset 'd' is left out: .*{why}"):
        assert logged(results) == {"x": 2.0}


@pytest.mark.parametrize("dataset", ["", "another"])
def test_a_result_may_be_of_another_dataset_or_of_none(dataset: str) -> None:
    found = logged(lambda state: [MetricState(dataset, "損失　", 1.0, "sum")])
    assert found == {f"t{'_another' if dataset else ''}/損失　": 1.0}


def test_results_of_one_name_are_combined_and_no_results_are_none() -> None:
    assert logged(lambda state: [state, state]) == {"x": 4.0}
    assert logged(lambda state: []) == {}
    assert logged(lambda state: ()) == {}


def collided(
    name: str, dataset: str, setup: Callable[[MetricsAggregator], None]
) -> tuple[dict[str, float], list[str]]:
    """Return what is printed, and what is said, if a handler gives a result a name that is taken."""
    aggregator = MetricsAggregator()
    handler = Expanding(lambda state: [state, MetricState(dataset, name, 7.0, "sum")])
    aggregator.register_handler("mine", handler)
    other = Expanding(lambda state: [state])
    aggregator.register_handler("theirs", other)
    aggregator.record("x", 2.0, "mine", dataset="d")
    setup(aggregator)
    aggregator.reduce()
    # Taken, though nothing has come in since.
    aggregator.record("x", 2.0, "mine", dataset="d")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = aggregator.reduce().as_dict("t", "interval")
    return found, [str(one.message) for one in said]


@pytest.mark.parametrize(
    ("name", "dataset", "setup"),
    [
        ("loss", "d", lambda a: a.record("loss", 1.0, dataset="d")),
        ("loss", "d", lambda a: a.record("loss", 1.0, "theirs", dataset="d")),
        ("len_stat_p50", "d", lambda a: a.record("len", 1.0, "distribution", dataset="d")),
        ("kind_count_new", "d", lambda a: a.record("kind", "a", "categorical_count", dataset="d")),
        ("b/loss", "a", lambda a: a.record("loss", 1.0, dataset="a/b")),
        ("loss", "", lambda a: a.record("loss", 1.0, dataset="d")),
        ("ppl", "d", lambda a: a.derive("ppl", lambda m: m["x"])),
    ],
)
def test_a_result_never_prints_another_metrics_name_whether_that_has_values_or_not(
    name: str, dataset: str, setup: Any
) -> None:
    found, said = collided(name, dataset, setup)
    assert found.pop("t_d/ppl", 2.0) == 2.0
    assert found == {"t_d/x": 2.0}
    (message,) = said
    assert f"result {name!r} of metric 'x' of dataset 'd' is left out" in message


def test_of_two_handlers_that_give_one_name_the_first_is_kept_and_the_other_named() -> None:
    """They were combined, as if they were the results of two ranks."""
    aggregator = MetricsAggregator()
    extra = Expanding(lambda state: [MetricState("d", "extra", state.value, "sum")])
    aggregator.register_handler("mine", extra)
    aggregator.record("x", 2.0, "mine", dataset="d")
    aggregator.record("y", 3.0, "mine", dataset="d")
    with pytest.warns(RuntimeWarning, match="result 'extra' of metric 'y' of dataset 'd' is left"):
        assert aggregator.get_metrics_for_logging("t") == {"t_d/extra": 2.0}


# -- Values


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (True, 1.0),
        (np.float32(0.5), 0.5),
        (np.array(3.0), 3.0),
        (np.array([[3.0]]), 3.0),
        (float("nan"), float("nan")),
        (float("-inf"), float("-inf")),
    ],
    ids=repr,
)
@pytest.mark.parametrize("agg_type", ["mine", "mean", "sum"])
def test_a_value_may_be_whatever_holds_one_number(value: Any, number: float, agg_type: str) -> None:
    found = logged(lambda state: [MetricState("d", "x", value, agg_type)])
    assert found == {"x": pytest.approx(number, nan_ok=True)}


@pytest.mark.parametrize("agg_type", ["mine", "mean"])
def test_a_value_on_a_device_may_be_a_result(agg_type: str) -> None:
    torch = pytest.importorskip("torch")
    for world_size in (1, 2):
        found = logged(
            lambda state: [MetricState("d", "x", torch.tensor([state.value]), agg_type)], world_size
        )
        assert found == {"x": {1: 2.0, 2: 5.0 if agg_type == "mine" else 2.5}[world_size]}


@pytest.mark.parametrize("value", ["3", "three", None, [3.0], np.array([1.0, 2.0])], ids=repr)
@pytest.mark.parametrize("agg_type", ["mine", "mean", "distribution", "lane rms"])
def test_a_value_that_is_no_number_is_left_out_and_named(value: Any, agg_type: str) -> None:
    """A text that spells one was taken for it."""

    def results(state: MetricState) -> list[MetricState]:
        return [state, MetricState("d", "y", value, agg_type)]

    with pytest.warns(
        RuntimeWarning, match=f"type {agg_type!r} finalised metric 'y' .*not a number"
    ):
        assert logged(results) == {"x": 2.0}


# -- What is not what the contract says


@pytest.mark.parametrize(
    ("results", "shown"),
    [
        (lambda state: None, "None"),
        (lambda state: state, "MetricState"),
        (lambda state: [state.value], r"\[2.0\]"),
        (lambda state: {"x": state}, "dict"),
    ],
)
def test_what_is_no_list_of_states_is_named(results: Any, shown: str) -> None:
    with pytest.raises(
        RuntimeError, match=f"Expanding.finalize_local_agg returned .*{shown}.* for metric 'x'"
    ):
        logged(results)


def test_a_state_that_is_none_is_named_where_the_first_value_comes_in() -> None:
    class Forgetful(Expanding):
        def initialize_metric_state(
            self, dataset_name: str, metric_name: str, agg_type: Any
        ) -> Any:
            return None

    aggregator = MetricsAggregator()
    aggregator.register_handler("mine", Forgetful(lambda state: [state]))
    with pytest.raises(TypeError, match=r"Forgetful.initialize_metric_state returned None"):
        aggregator.record("x", 1.0, "mine")
    assert aggregator.get_metrics_for_logging() == {}


def test_a_combined_result_that_is_none_is_left_out_and_named() -> None:
    class Forgetful(Expanding):
        def finalize_dist_agg(self, local_agg_metrics: list[MetricState]) -> Any:
            return None

    def rank(communicator: Communicator) -> Snapshot:
        aggregator = MetricsAggregator(communicator=communicator)
        aggregator.register_handler("mine", Forgetful(lambda state: [state]))
        aggregator.record("x", 1.0, "mine")
        return aggregator.reduce()

    for snapshot in run_threads(rank, 2):
        with pytest.warns(RuntimeWarning, match="Forgetful.finalize_dist_agg returned None"):
            assert snapshot.as_dict("t") == {}


# -- Between ranks


class Marked:
    """Runs a command where it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize(
    ("spoil", "field"),
    [
        (lambda state, what: setattr(state, "value", what), "value is <"),
        (lambda state, what: state.metadata.update(a=[what]), r"metadata\['a'\]\[0\] is <"),
        (lambda state, what: setattr(state, "metric_name", what), "metric_name is <"),
        (lambda state, what: state.metadata.update({what: 1}), r"metadata \(a key\) is <"),
    ],
)
def test_what_is_no_plain_data_is_an_error_on_all_ranks_that_names_it_and_runs_nowhere(
    spoil: Any, field: str, tmp_path: Any
) -> None:
    """Results were pickled, so that a rank could run code on the others."""

    def rank(communicator: Communicator) -> dict[str, float]:
        spoils = communicator.rank == 1

        def results(state: MetricState) -> list[MetricState]:
            if spoils:
                spoil(state, Marked(str(tmp_path / "ran")))
            return [state]

        aggregator = MetricsAggregator(communicator=communicator)
        aggregator.register_handler("mine", Expanding(results))
        aggregator.record("x", 1.0, "mine", dataset="d")
        aggregator.record("y", 1.0, "sum")
        with pytest.raises(
            TypeError, match=f"Expanding finalised metric 'x' of dataset 'd' to .* {field}"
        ):
            aggregator.reduce()
        # Nothing is lost, and what can travel does so again.
        spoils = False
        aggregator.record("x", 10.0, "mine", dataset="d")
        return aggregator.get_metrics_for_logging("t")

    assert run_threads(rank, 2) == [{"t_d/x": 22.0, "t/y": 2.0}] * 2
    assert not (tmp_path / "ran").exists()


class Distinct(Expanding):
    """Counts different values: a set, which is no plain data, so that it says how it is saved."""

    def __init__(self) -> None:
        super().__init__(lambda state: [state])

    def update(self, local_agg_metric: MetricState, metric: Metric) -> None:
        local_agg_metric.metadata.setdefault("seen", set()).add(metric.value)
        local_agg_metric.value = float(len(local_agg_metric.metadata["seen"]))

    def finalize_dist_agg(self, local_agg_metrics: list[MetricState]) -> MetricState:
        first = local_agg_metrics[0]
        seen = set().union(*(state.metadata["seen"] for state in local_agg_metrics))
        return MetricState(first.dataset_name, first.metric_name, len(seen), first.agg_type)

    def serialize_metadata(self, metadata: dict[str, Any]) -> dict[str, Any]:
        return {"seen": tuple(metadata["seen"])}

    def deserialize_metadata(self, metadata: dict[str, Any]) -> dict[str, Any]:
        assert type(metadata["seen"]) is tuple
        return {"seen": set(metadata["seen"])}


def distinct(rank: int) -> tuple[dict[str, float], Any]:
    aggregator = MetricsAggregator()
    aggregator.register_handler("distinct", Distinct())
    for value in ("a", "b") if rank else ("b", "c", 3):
        aggregator.record("id", value, "distinct")
    return aggregator.get_metrics_for_logging("t"), aggregator.state_dict()


def test_what_says_how_it_is_saved_travels_so_too() -> None:
    first, second = run_ranks(distinct, 2)
    assert first == second
    logged, state = first
    assert logged == {"t/id": 4.0}
    resumed = MetricsAggregator()
    resumed.register_handler("distinct", Distinct())
    resumed.load_state_dict(state)
    resumed.record("id", "d", "distinct")
    assert resumed.get_metrics_for_logging("t") == {"t/id": 5.0}


def test_states_of_tuples_deques_and_counters_come_back_as_they_were() -> None:
    """Tuples, deques and Counters were lists and dicts after a resume, or refused."""

    class Picky(Expanding):
        def initialize_metric_state(
            self, dataset_name: str, metric_name: str, agg_type: Any
        ) -> Any:
            metadata = {"last": deque(maxlen=2), "counts": Counter(), "span": (0.0, 0.0), "of": {}}
            return MetricState(dataset_name, metric_name, 0.0, agg_type, metadata)

        def update(self, local_agg_metric: MetricState, metric: Metric) -> None:
            metadata = local_agg_metric.metadata
            metadata["last"].append(metric.value)
            metadata["counts"][metric.value] += 1
            metadata["span"] += (metric.value,)
            metadata["of"][metric.value] = np.arange(3)

        def finalize_dist_agg(self, local_agg_metrics: list[MetricState]) -> MetricState:
            for state in local_agg_metrics:
                assert type(state.metadata["last"]) is deque
                assert state.metadata["last"].maxlen == 2
                assert type(state.metadata["counts"]) is Counter
                assert type(state.metadata["span"]) is tuple
                assert all(type(key) is float for key in state.metadata["of"])
                assert all(type(array) is np.ndarray for array in state.metadata["of"].values())
            return super().finalize_dist_agg(local_agg_metrics)

    def rank(communicator: Communicator, state: Any) -> tuple[dict[str, float], Any]:
        aggregator = MetricsAggregator(communicator=communicator)
        aggregator.register_handler(
            "mine",
            Picky(lambda s: [MetricState("d", "x", len(s.metadata["span"]), "mine", s.metadata)]),
        )
        if state is not None:
            aggregator.load_state_dict(state)
        aggregator.record("x", 1.0, "mine", dataset="d")
        aggregator.record("x", 2.0, "mine", dataset="d")
        return aggregator.get_metrics_for_logging("t"), aggregator.state_dict()

    (found, state), _ = run_threads(rank, 2, None)
    assert found == {"t_d/x": 8.0}
    assert run_threads(rank, 1, state)[0][0] == {"t_d/x": 12.0}


# -- What users of other libraries reported


class Detections(Expanding):
    """Keeps, as detection metrics do, a dict of arrays and a tuple of texts per sample."""

    def __init__(self) -> None:
        super().__init__(lambda state: [state])

    def initialize_metric_state(self, dataset_name: str, metric_name: str, agg_type: Any) -> Any:
        return MetricState(dataset_name, metric_name, None, agg_type, {"found": [], "ids": []})

    def update(self, local_agg_metric: MetricState, metric: Metric) -> None:
        scores = np.linspace(0, 1, metric.value, dtype=np.float32)
        boxes = np.zeros((metric.value, 4), dtype=np.int64)
        local_agg_metric.metadata["found"].append({"scores": scores, "boxes": boxes})
        local_agg_metric.metadata["ids"] += [("image", str(metric.value))]

    def finalize_local_agg(self, local_agg_metric: MetricState) -> list[MetricState]:
        # In place, as a library's compute() may do: the next log must not see it.
        metadata = local_agg_metric.metadata
        metadata["found"] = sorted(metadata["found"], key=lambda one: -len(one["scores"]))
        local_agg_metric.value = self.number(local_agg_metric)
        return [local_agg_metric]

    def finalize_dist_agg(self, local_agg_metrics: list[MetricState]) -> MetricState:
        first, *others = local_agg_metrics
        for state in others:
            first.metadata["found"] += state.metadata.pop("found")
            first.metadata["ids"] += state.metadata.pop("ids")
        first.value = self.number(first)
        return first

    @staticmethod
    def number(state: MetricState) -> float:
        assert all(one["boxes"].shape == (one["scores"].size, 4) for one in state.metadata["found"])
        assert all(type(one) is tuple for one in state.metadata["ids"])
        total = np.concatenate([one["scores"] for one in state.metadata["found"]])
        return float(total.size + total.max() / 10)


def test_lists_of_dicts_of_arrays_are_pooled_over_uneven_ranks_at_every_log() -> None:
    """torchmetrics #190, #538 (states of lists of dicts and of tuples of texts are not gathered),
    #2170 (of uneven lengths: a crash), #2005 and ignite #2803 (a result changes what comes after)."""

    def rank(communicator: Communicator) -> list[dict[str, float]]:
        aggregator = MetricsAggregator(communicator=communicator)
        aggregator.register_handler("boxes", Detections())
        logged = []
        for _ in range(3):
            for sample in range(2 + communicator.rank):
                aggregator.record("map", sample + 1, "boxes")
            snapshot = aggregator.reduce()
            # Twice from one snapshot, too.
            assert snapshot.as_dict("t") == snapshot.as_dict("t")
            logged.append(snapshot.as_dict("t") | snapshot.as_dict("i", "interval"))
        return logged

    first, second = run_threads(rank, 2)
    # 1 + 2 of rank 0, and 1 + 2 + 3 of rank 1.
    expected = [{"t/map": 9.0 * log + 0.1, "i/map": 9.1} for log in (1, 2, 3)]
    assert first == second == [pytest.approx(one) for one in expected]
