"""A metric with axes is as many metrics without, in one key: each cell merges as a plain metric does."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from handlers_of_users import LaneRMS
from ranks import run_threads

from metricfold import Metric, MetricsAggregator, MetricsCollator, merge_state_dicts
from metricfold._core.fold.state import State
from metricfold._core.intake.inbox import Inbox
from metricfold._core.reduce import announced

AXES = {"layer": 3, "expert": 2}
TYPES = ("sum", "mean", "max", "min", "rms")


def made(communicator: Any = None, route: str = "auto") -> MetricsAggregator:
    aggregator = MetricsAggregator(communicator=communicator, route=route)
    aggregator.register_handler("rms", LaneRMS())
    return aggregator


def cells_of(aggregator: MetricsAggregator, key: tuple[str, str], view: str) -> list[list[float]]:
    """Return the lanes of each cell, and of plain keys named like ``name.3``."""
    reduced = aggregator.reduce()._whole
    totals = getattr(reduced, view)
    entry = totals.schema.entries[key]
    sums = totals.exact_sums()[totals.schema.sums[key]].reshape(entry.cells, -1)
    maxs = totals.maxs[totals.schema.maxs[key]].reshape(entry.cells, -1)
    owners = totals.owners[totals.schema.maxs[key]].reshape(entry.cells, -1)
    plain = []
    for cell in range(entry.cells):
        own = (key[0], f"{key[1]}.{cell}")
        if own not in totals.schema:
            plain.append(None)
            continue
        at, top = totals.schema.sums[own], totals.schema.maxs[own]
        plain.append(
            [*totals.exact_sums()[at], *totals.maxs[top], *totals.owners[top].astype(float)]
        )
    for cell, found in enumerate(plain):
        mine = [*sums[cell], *maxs[cell], *owners[cell].astype(float)]
        if found is None:
            assert sums[cell, 0] == 0
        else:
            np.testing.assert_equal(mine, found)
    return sums.tolist()


@pytest.mark.parametrize("route", ["gather", "tree"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_each_cell_is_what_a_plain_metric_would_be(world_size: int, route: str) -> None:
    def rank(communicator: Any) -> None:
        aggregator = made(communicator, route)
        seeds = random.Random(communicator.rank)
        for step in range(4):
            for agg in TYPES:
                if seeds.random() < 0.3:
                    continue
                values = np.array(seeds.choices([1.5, -2.0, 0.0, np.nan, 7.0], k=6)).reshape(3, 2)
                weights = np.array(seeds.choices([0.0, 1.0, 2.0], k=6)).reshape(3, 2)
                if agg != "mean":
                    weights = np.minimum(weights, 1.0)
                key = f"{agg}_cells"
                aggregator.record(key, values, agg, axes=AXES, weight=weights, dataset="web")
                for cell, (value, weight) in enumerate(zip(values.flat, weights.flat, strict=True)):
                    aggregator.record(f"{key}.{cell}", value, agg, weight=weight, dataset="web")
            if step == 1:
                aggregator.state_dict()
            view = "interval" if step % 2 else "run"
            for agg in TYPES if step else ():
                if ("web", f"{agg}_cells") in aggregator._held.run.reducer.schema:
                    cells_of(aggregator, ("web", f"{agg}_cells"), view)
                else:
                    aggregator.reduce()

    run_threads(rank, world_size)


def sums_of(aggregator: MetricsAggregator, name: str) -> dict[str, float]:
    """Return the last SUM lane of each cell of the run, by label."""
    totals = aggregator.reduce()._whole.run
    entry = totals.schema.entries["", name]
    sums = totals.exact_sums()[totals.schema.sums["", name]].reshape(entry.cells, -1)
    return dict(zip(entry.axes[0].names(), sums[:, 2].tolist(), strict=True))


@pytest.mark.parametrize("route", ["gather", "tree"])
def test_ranks_hold_parts_of_an_axis_and_labels_unite(route: str) -> None:
    def rank(communicator: Any) -> tuple[dict[str, float], dict[str, float]]:
        aggregator = made(communicator, route)
        first = communicator.rank * 2
        aggregator.record(
            "tokens",
            np.array([1.0, 2.0]),
            "sum",
            axes={"layer": 6},
            ids={"layer": [first, first + 1]},
        )
        mine = ["shared", f"own_{communicator.rank}"]
        aggregator.record("norm", np.array([10.0, 1.0]), "sum", axes={"parameter": mine})
        before = sums_of(aggregator, "norm")
        # Later more labels come, on one rank alone.
        if communicator.rank == 1:
            aggregator.record(
                "norm", 5.0, "sum", axes={"parameter": ["a_new"]}, ids={"parameter": "a_new"}
            )
        aggregator.record("norm", np.array([10.0, 1.0]), "sum", axes={"parameter": mine})
        return before, sums_of(aggregator, "norm") | {
            f"layer {name}": value for name, value in sums_of(aggregator, "tokens").items()
        }

    everyone = run_threads(rank, 3)
    before, after = everyone[0]
    assert everyone == [(before, after)] * 3
    assert before == {"own_0": 1.0, "own_1": 1.0, "own_2": 1.0, "shared": 30.0}
    assert after == {
        "a_new": 5.0,
        "own_0": 2.0,
        "own_1": 2.0,
        "own_2": 2.0,
        "shared": 60.0,
        **{f"layer {layer}": 1.0 + layer % 2 for layer in range(6)},
    }


@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_checkpoint_goes_on_at_any_world_size(after: int) -> None:
    def begin(communicator: Any) -> dict[str, Any]:
        aggregator = made(communicator)
        labels = {"p": ["x", f"y{communicator.rank}"]}
        aggregator.record("n", np.array([1.0, 2.0]), "sum", axes=labels)
        return aggregator.state_dict()

    def go_on(communicator: Any) -> dict[str, float]:
        aggregator = made(communicator)
        aggregator.load_state_dict(state)
        aggregator.record("n", 100.0, "sum", axes={"p": ["z"]}, ids={"p": "z"})
        return sums_of(aggregator, "n")

    state = run_threads(begin, 2)[0]
    found = run_threads(go_on, after)
    assert found == [{"x": 2.0, "y0": 2.0, "y1": 2.0, "z": 100.0 * after}] * after
    both = made()
    both.load_state_dict(merge_state_dicts([state, state | {}], parallel=True))
    assert sums_of(both, "n") == {"x": 4.0, "y0": 4.0, "y1": 4.0}


def test_values_on_a_device_are_cells_too() -> None:
    torch = pytest.importorskip("torch")
    aggregator = made()
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    mask = torch.tensor([[True, True], [False, True]])
    aggregator.record("t", values, "sum", axes={"a": 2, "b": 2}, weight=mask.float())
    aggregator.record("t", values[0], "sum", axes={"a": 2, "b": 2}, ids={"a": 1})
    totals = aggregator.reduce()._whole.run
    assert totals.sums.reshape(4, 3).tolist() == [[1, 0, 1], [1, 0, 2], [1, 0, 1], [2, 0, 6]]


def test_what_a_mark_begins_is_rolled_back() -> None:
    aggregator = made()
    aggregator.record("t", np.ones(2), "sum", axes={"a": 2})
    mark = aggregator.mark()
    aggregator.record("t", np.ones(2), "sum", axes={"a": 2})
    aggregator.rollback(mark)
    assert sums_of(aggregator, "t") == {"0": 1.0, "1": 1.0}


def test_masked_cells_are_empty() -> None:
    aggregator = made()
    values = np.ma.MaskedArray([1.0, 2.0, 3.0], mask=[False, True, False])
    aggregator.record("t", values, "sum", axes={"a": 3})
    totals = aggregator.reduce()._whole.run
    assert totals.sums.reshape(3, 3).tolist() == [[1, 0, 1], [0, 0, 0], [1, 0, 3]]


def test_masked_cells_may_hold_what_no_value_may() -> None:
    aggregator = made()
    values = np.ma.MaskedArray([2**60 + 1, 2], mask=[True, False])
    aggregator.record("t", values, "sum", axes={"a": 2})
    assert sums_of(aggregator, "t") == {"0": 0.0, "1": 2.0}


@pytest.mark.parametrize("weight", [0.0, np.zeros(2)])
def test_what_has_weight_0_in_all_cells_is_nothing_and_no_mistake(weight: Any) -> None:
    """Until now a known metric refused it, as if it had come without axes."""
    aggregator = made()
    for _ in range(2):
        aggregator.record("t", np.ones(2), "sum", axes={"a": 2}, weight=weight)
        aggregator.record("t", np.ones(2), "sum", axes={"a": 2})
    assert sums_of(aggregator, "t") == {"0": 2.0, "1": 2.0}
    with pytest.raises(ValueError, match="has the axes a=2"):
        aggregator.record("t", 1.0, "sum", weight=0.0)


@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_an_axis_without_labels_yet_holds_nothing(framework: str) -> None:
    """Until now the next reduction failed."""
    array = pytest.importorskip(framework).ones(0)

    def rank(communicator: Any) -> dict[str, float]:
        aggregator = made(communicator)
        aggregator.record("t", array, "sum", axes={"p": []})
        if communicator.rank:
            aggregator.record("t", np.ones(1), "sum", axes={"p": ["x"]})
        return sums_of(aggregator, "t")

    assert run_threads(rank, 2) == [{"x": 1.0}] * 2


def test_collated_batches_of_a_metric_with_axes_are_refused() -> None:
    """Until now they came in, and what the metric held could not be folded any more."""

    def batch(name: str) -> Any:
        return MetricsCollator()([{"x": 1, "metrics": [Metric("web", name, 1.0, "sum")]}])[
            "metrics"
        ]

    aggregator = made()
    aggregator.update(batch("u"))
    aggregator.record("t", np.ones(2), "sum", axes={"a": 2}, dataset="web")
    with pytest.raises(ValueError, match="has the axes a=2"):
        aggregator.update(batch("t"))
    aggregator.update(batch("u"))
    assert aggregator.reduce().as_dict("n") == {"n_web/t": 2.0, "n_web/u": 2.0}


def test_cells_one_by_one_take_the_room_of_what_they_hold(monkeypatch: Any) -> None:
    """Until now each took that of all cells, before it was folded."""
    rows: list[int] = []
    real = State.of_cells.__func__  # type: ignore[attr-defined]

    def noted(cls: Any, sums: Any, *rest: Any) -> State:
        rows.append(len(sums))
        return real(cls, sums, *rest)  # type: ignore[no-any-return]

    torch = pytest.importorskip("torch")
    axes = {"layer": 60, "expert": 256}
    aggregator = made()
    with monkeypatch.context() as watching:
        watching.setattr(State, "of_cells", classmethod(noted))
        for value in (1.0, torch.tensor(1.0)):
            for layer in range(3):
                aggregator.record("t", value, "sum", axes=axes, ids={"layer": layer, "expert": 2})
    assert rows == [1, 1, 1, 0, 0, 0]
    values, _ = aggregator.reduce().array(None, "t")
    assert values[:4, 2].tolist()[:3] == [2.0] * 3
    assert np.nansum(values) == 6.0


class OnlySmall(LaneRMS):
    def sums_of(self, values: Any, weights: Any) -> tuple[float, ...]:
        if values.max(initial=0.0) > 100:
            raise self.error("too large for me")
        return super().sums_of(values, weights)

    error: type[Exception] = ValueError


@pytest.mark.parametrize("error", [ValueError, ZeroDivisionError])
def test_a_handler_that_fails_on_a_cell_names_the_metric_once(error: type[Exception]) -> None:
    torch = pytest.importorskip("torch")
    aggregator = MetricsAggregator()
    handler = OnlySmall()
    handler.error = error
    aggregator.register_handler("rms", handler)
    aggregator.record("t", np.array([3.0, 4.0]), "rms", axes={"a": 2})
    with pytest.raises(error, match=r"too large") as raised:
        aggregator.record("t", np.array([3.0, 400.0]), "rms", axes={"a": 2})
    assert error is not ValueError or str(raised.value) == "metric 't': too large for me"
    aggregator.record("t", torch.tensor([3.0, 400.0]), "rms", axes={"a": 2})
    with pytest.raises(RuntimeError, match="too large for me") as given_up:
        aggregator.reduce()
    assert str(given_up.value).count("metric 't'") == 1
    assert aggregator.reduce().array(None, "t")[0].tolist() == [3.0, 4.0]


def test_many_keys_are_not_folded_for_each_array_of_cells(monkeypatch: Any) -> None:
    """Until now they were, since the array filled the room of all that waits."""
    folds: list[int] = []
    real = Inbox._fold
    monkeypatch.setattr(Inbox, "_fold", lambda inbox: (folds.append(1), real(inbox))[1])
    aggregator = made()
    for _ in range(32):
        aggregator.record("t", np.ones((60, 256)), "sum", axes={"layer": 60, "expert": 256})
    assert 2 <= len(folds) <= 12
    assert aggregator.reduce().as_dict("n") == {"n/t": 32.0 * 60 * 256}


def test_more_lanes_than_ranks_and_checkpoints_take_are_said_and_nothing_is_lost(
    monkeypatch: Any,
) -> None:
    """Until now a checkpoint of them was written that could not be loaded."""
    monkeypatch.setattr(announced, "_MOST_LANES_IN_ALL", 64)

    def rank(communicator: Any) -> dict[str, float]:
        aggregator = made(communicator)
        for name in "abc":
            aggregator.record(name, np.ones(10), "sum", axes={"p": 10})
            if name != "c":
                aggregator.reduce()
        for _ in range(2):
            with pytest.raises(ValueError, match="need 90 lanes, more than 64"):
                aggregator.reduce()
        alone = made()
        alone.load_state_dict(aggregator.state_dict(sync=False))
        return alone.reduce().as_dict("n")

    assert run_threads(rank, 2) == [{"n/a": 20.0, "n/b": 20.0}] * 2


CLASHES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"axes": {"layer": 3}}, ValueError, "has the axes layer=2"),
    ({}, ValueError, "has the axes layer=2, so it cannot take a value with no axes"),
    ({"axes": {"layer": 2, "b": 1}}, ValueError, "has the axes layer=2"),
    ({"axes": {"layer": ["x", "y"]}}, ValueError, "has the axes layer=2"),
]


@pytest.mark.parametrize(("how", "error", "says"), CLASHES)
def test_other_axes_of_a_known_metric_are_refused(
    how: dict[str, Any], error: type[Exception], says: str
) -> None:
    aggregator = made()
    aggregator.record("t", np.ones(2), "sum", axes={"layer": 2})
    value = np.ones([n if isinstance(n, int) else len(n) for n in how.get("axes", {}).values()])
    with pytest.raises(error, match=says):
        aggregator.record("t", value if how else 1.0, "sum", **how)
    assert sums_of(aggregator, "t") == {"0": 1.0, "1": 1.0}


@pytest.mark.parametrize(
    ("value", "how", "error", "says"),
    [
        (np.ones(3), {"axes": {"a": 2}}, ValueError, r"shape \(3,\).*\(2,\)"),
        (1.0, {"axes": {"a": 2}}, ValueError, r"shape \(\).*\(2,\)"),
        ([1.0, 2.0], {"axes": {"a": 2}}, TypeError, r"give np.asarray"),
        (np.ma.masked, {"axes": {"a": 2}, "ids": {"a": 0}}, ValueError, "masked has no value"),
        (np.ones(2), {"ids": {"a": 1}}, ValueError, "axes are none"),
        (np.ones(2), {"axes": {"a": 0}}, ValueError, "metric 't'.*needs 1"),
        (np.ones(2), {"axes": {"a": 2}, "agg": "distribution"}, ValueError, "cannot have axes"),
        (
            np.ones(2),
            {"axes": {"a": 2}, "agg": "categorical_count"},
            ValueError,
            "cannot have axes",
        ),
        (np.ones(2), {"axes": {"a": 2}, "agg": "last"}, ValueError, "cannot have axes"),
        (np.array(["x", "y"]), {"axes": {"a": 2}}, TypeError, "no real numbers"),
        (np.ones(2), {"axes": {"a": 2}, "weight": 2.0}, ValueError, "would be ignored"),
        (np.ones(2), {"axes": {"a": 2}, "weight": np.ones(3)}, ValueError, "do not go with"),
    ],
)
def test_what_are_no_cells_is_refused_and_nothing_has_changed(
    value: Any, how: Mapping[str, Any], error: type[Exception], says: str
) -> None:
    aggregator = made()
    with pytest.raises(error, match=says):
        aggregator.record("t", value, **{"agg": "sum", **how})
    aggregator.record("t", 1.0, "sum")
    assert aggregator.reduce().as_dict("train") == {"train/t": 1.0}


@pytest.mark.parametrize("other", [{"layer": 3}, {"layer": 2, "b": 1}, None])
def test_another_size_on_another_rank_is_one_error_on_all(other: dict[str, int] | None) -> None:
    def rank(communicator: Any) -> str:
        aggregator = made(communicator)
        axes = {"layer": 2} if communicator.rank == 0 else other
        shape = () if axes is None else tuple(axes.values())
        aggregator.record("t", np.ones(shape), "sum", axes=axes)
        aggregator.record("loss", 1.0)
        with pytest.raises(ValueError, match="metric 't'") as raised:
            aggregator.reduce()
        assert aggregator.reduce().as_dict("train")["train/loss"] == 1.0
        return str(raised.value)

    texts = run_threads(rank, 2)
    assert texts[0] == texts[1]
    assert "layer=2" in texts[0]


def test_a_metric_with_axes_claims_the_names_of_its_cells() -> None:
    aggregator = made()
    aggregator.record("t", np.ones(2), "sum", axes={"layer": 2})
    with pytest.raises(ValueError, match="t/layer_0"):
        aggregator.record("t/layer_0", 1.0)
