"""What is shown of cells is what Python's own arithmetic makes of all that came in, whichever way it went."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypotheses import examples
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_threads

from metricfold import MetricsAggregator

LAYERS, LABELS = 2, ("a", "b/c", "b.c")
DATASETS = ("", "web", "code/x")
"""A metric without a dataset has a name of its own, for the total over datasets has the other."""


class Took(NamedTuple):
    """What one rank recorded: a value and a weight for some cells."""

    phase: int  # between two reductions; the last is the interval that is shown
    rank: int
    dataset: str
    agg: str
    labels: tuple[str, ...]
    layer: int | None
    values: tuple[float, ...]
    weights: tuple[float, ...]

    @property
    def name(self) -> str:
        return f"{self.agg}{'' if self.dataset else '_alone'}"

    def cells(self) -> list[tuple[int, str]]:
        layers = range(LAYERS) if self.layer is None else [self.layer]
        return [*itertools.product(layers, self.labels)]


@st.composite
def taken(draw: Any, ranks: int) -> Took:
    labels = tuple(draw(st.lists(st.sampled_from(LABELS), unique=True, min_size=1)))
    layer = draw(st.none() | st.integers(0, LAYERS - 1))
    size = len(labels) * (LAYERS if layer is None else 1)
    agg = draw(st.sampled_from(["sum", "mean", "max", "min"]))
    weights = (0.0, 1.0, 3.0) if agg == "mean" else (0.0, 1.0)
    # Small whole numbers: sums of them are exact in any order.
    numbers = st.sampled_from([0.0, 1.0, -2.0, 5.0, 64.0, math.nan])
    return Took(
        draw(st.integers(0, 2)),
        draw(st.integers(0, ranks - 1)),
        draw(st.sampled_from(DATASETS)),
        agg,
        labels,
        layer,
        tuple(draw(st.lists(numbers, min_size=size, max_size=size))),
        tuple(draw(st.lists(st.sampled_from(weights), min_size=size, max_size=size))),
    )


def result(agg: str, numbers: Sequence[tuple[float, float]]) -> float | None:
    """Return what values and weights come to; None without any."""
    counted = [(value, weight) for value, weight in numbers if weight]
    if not counted:
        return None
    values = [value for value, _ in counted]
    if any(map(math.isnan, values)):
        return math.nan
    if agg == "mean":
        return sum(value * weight for value, weight in counted) / sum(w for _, w in counted)
    of: dict[str, Callable[[list[float]], float]] = {"sum": sum, "max": max, "min": min}
    return of[agg](values)


BY: tuple[tuple[str, ...], ...] = (
    *((), ("layer",), ("p",), ("layer", "p"), ("p", "layer")),
    *(("rank",), ("rank", "layer"), ("p", "rank")),
)


def expected(
    history: Sequence[Took], window: str, by: tuple[str, ...], last: int, ranks: int
) -> dict[str, float]:
    """Return what a dict shows, computed cell by cell."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for one in history:
        view = window if window != "auto" else ("run" if one.agg == "sum" else "interval")
        if view == "interval" and one.phase != last:
            continue
        cells = zip(one.cells(), one.values, one.weights, strict=True)
        for (layer, label), value, weight in cells:
            place = {"layer": str(layer), "p": label, "rank": str(one.rank)}
            ends = ["", "".join(f"/{axis}_{place[axis]}" for axis in by)] if by else [""]
            if view == "run" and "rank" in by:
                ends = [""]
            for end, level in itertools.product(ends, {one.dataset, "", *levels(one.dataset)}):
                text = f"t_{level}/" if level else "t/"
                found.setdefault((f"{text}{one.name}{end}", one.agg), []).append((value, weight))
    shown = {text: result(agg, numbers) for (text, agg), numbers in found.items()}
    return {text: value for text, value in shown.items() if value is not None}


def levels(dataset: str) -> list[str]:
    return [dataset.partition("/")[0]] if "/" in dataset else []


def record(aggregator: MetricsAggregator, one: Took) -> None:
    shape = (LAYERS, len(one.labels)) if one.layer is None else (len(one.labels),)
    aggregator.record(
        one.name,
        np.array(one.values).reshape(shape),
        one.agg,
        dataset=one.dataset or None,
        weight=np.array(one.weights).reshape(shape),
        axes={"layer": LAYERS, "p": one.labels},
        ids=None if one.layer is None else {"layer": one.layer},
        per_rank=True,
    )


def run(
    communicator: Any, route: str, history: Sequence[Took], phases: Sequence[int], state: Any
) -> tuple[Any, Any]:
    """Take in some phases; return the last snapshot, and a state that goes on after it."""
    aggregator = MetricsAggregator(communicator=communicator, route=route)
    if state is not None:
        aggregator.load_state_dict(state)
    snapshot = None
    for phase in phases:
        for number, one in enumerate(history):
            if one.phase == phase and one.rank % communicator.world_size == communicator.rank:
                record(aggregator, one)
                if number % 3 == 2 and communicator.world_size == 1:
                    aggregator.state_dict()  # the interval stays open
        snapshot = aggregator.reduce()
    return snapshot, aggregator.state_dict()


@pytest.mark.filterwarnings("ignore:the interval is empty:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:by= names:RuntimeWarning")
@given(st.data())
@examples(60)
def test_dicts_and_arrays_are_what_came_in(data: Any) -> None:
    before, after = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    route = data.draw(st.sampled_from(["gather", "tree"]))
    history = data.draw(st.lists(taken(after), max_size=8))
    by = data.draw(st.sampled_from(BY))
    # Phase 0 with so many ranks, then out of a checkpoint with others.
    _, state = run_threads(run, before, route, history, [0], None)[0]
    snapshots = [one for one, _ in run_threads(run, after, route, history, [1, 2], state)]
    snapshot = snapshots[0]
    for window in ("run", "interval", "auto"):
        shown = snapshot.as_dict("t", window, rollup="levels", by=by)
        wanted = expected(history, window, by, 2, after)
        np.testing.assert_equal(shown, wanted)
        for other in snapshots[1:]:
            np.testing.assert_equal(other.as_dict("t", window, rollup="levels", by=by), shown)
        check_arrays(snapshot, shown, window, by)
    for key, array in snapshot.arrays("t", "auto", rollup="levels").items():
        shown = snapshot.as_dict("t", "auto", rollup="levels", by=("layer", "p"))
        for (layer, label), value in zip(
            cells_of(array["axes"]), array["values"].flat, strict=True
        ):
            none = 0.0 if "/sum" in key else math.nan
            np.testing.assert_equal(value, shown.get(f"{key}/layer_{layer}/p_{label}", none))


def cells_of(axes: Any) -> list[tuple[str, ...]]:
    return [*itertools.product(*(map(str, range(n)) if isinstance(n, int) else n for _, n in axes))]


def check_arrays(snapshot: Any, shown: dict[str, float], window: str, by: tuple[str, ...]) -> None:
    """Compare `array` with what is printed."""
    names = {name for _, name in snapshot.names()}
    for dataset, name in {*snapshot.names(), *((None, name) for name in names)}:
        if "rank" in by and window != "interval":
            continue
        values, labels = snapshot.array(dataset, name, by=by, window=window)
        text = f"t_{dataset}/{name}" if dataset else f"t/{name}"
        none = 0.0 if name.startswith("sum") and text in shown else math.nan
        for cell, value in zip(itertools.product(*labels), values.flat, strict=True):
            end = "".join(f"/{axis}_{one}" for axis, one in zip(by, cell, strict=True))
            np.testing.assert_equal(value, shown.get(text + end, none))
