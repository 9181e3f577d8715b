"""A state's merge is associative and has an identity, for each part, and so is that of wire vectors."""

from __future__ import annotations

import math
import pickle
from functools import reduce
from typing import Any

import numpy as np
from handlers_of_users import LaneRMS
from hypotheses import examples
from hypothesis import given
from hypothesis import strategies as st

from metricfold import (
    CategoricalCountAggHandler,
    DistributionAggHandler,
    LaneHandler,
    LastAggHandler,
    MaxAggHandler,
    MeanAggHandler,
    MinAggHandler,
    SumAggHandler,
)
from metricfold._core.fold.axes import axes_of, block_of
from metricfold._core.fold.columns import fold_cells, fold_read
from metricfold._core.fold.state import State
from metricfold._core.reduce.schema import Entry, Schema
from metricfold._core.reduce.wire import Outgoing, Wire

KEY = ("d", "x")
HANDLERS: dict[str, LaneHandler] = {
    "sum": SumAggHandler(),
    "mean": MeanAggHandler(),
    "max": MaxAggHandler(),
    "min": MinAggHandler(),
    "last": LastAggHandler(),
    "distribution": DistributionAggHandler(3),
    "all": DistributionAggHandler(None),
    "categories": CategoricalCountAggHandler(),
    "rms": LaneRMS(),
}
# Whole numbers, so that equal means equal: rounding has a test of its own.
numbers = st.one_of(st.integers(-1000, 1000), st.sampled_from([math.nan, math.inf, -math.inf]))
texts = st.sampled_from(["a", "b", "c"])


def pieces(name: str) -> st.SearchStrategy[list[list[Any]]]:
    values = texts if HANDLERS[name].takes is str else numbers
    return st.lists(st.lists(values, max_size=5), min_size=3, max_size=6)


some = st.sampled_from(sorted(HANDLERS)).flatmap(
    lambda name: st.tuples(st.just(name), pieces(name))
)


def folded(handler: LaneHandler, values: list[Any]) -> State:
    state = handler.empty()
    with np.errstate(invalid="ignore"):
        state.merge(fold_read(KEY, handler, values, [1.0] * len(values)))
    return state


def merged(one: State, other: State) -> State:
    both = one.copy()
    both.merge(other)
    return both


def shown(state: State) -> Any:
    """Return all that a state says: it is compared by its text, in which NaN equals itself."""
    sums, maxs, more = state.plain()
    if state.sample is not None:
        more = np.frombuffer(more[0]).tolist()
    return repr((sums, maxs, list(more.items()) if isinstance(more, dict) else more))


@examples(200)
@given(some)
def test_it_does_not_matter_how_pieces_are_bracketed_nor_where_nothing_stands(case: Any) -> None:
    name, parts = case
    handler = HANDLERS[name]
    states = [folded(handler, part) for part in parts]
    left = reduce(merged, states)
    right = reduce(lambda later, earlier: merged(earlier, later), reversed(states))
    assert shown(left) == shown(right)
    at_once = handler.empty()
    at_once.merge_all(states)
    assert shown(at_once) == shown(left)
    whole = folded(handler, [value for part in parts for value in part])
    assert shown(whole) == shown(left)
    for around in (merged(handler.empty(), left), merged(left, handler.empty())):
        assert shown(around) == shown(left)


@examples(100)
@given(some)
def test_a_copy_shares_nothing_that_changes_and_a_plain_form_says_all(case: Any) -> None:
    name, (first, *rest) = case
    handler = HANDLERS[name]
    state = folded(handler, first)
    before = shown(state)
    copy = state.copy()
    for part in rest:
        copy.merge(folded(handler, part))
    assert shown(state) == before
    sums, maxs, part = pickle.loads(pickle.dumps(state.plain()))
    back = handler.empty()
    back.sums, back.maxs = sums, maxs
    if part is not None:
        back.take_plain([part])
    assert shown(back) == before


def entry_of(name: str) -> Entry:
    handler = HANDLERS[name]
    return Entry(
        KEY,
        handler.kind_of(name),
        capacity=64 * handler.has_sample,
        condensed=handler.has_sample,
        categories=("a", "b", "c") if handler.has_counts else (),
        most=handler.most_categories,
    )


@examples(100)
@given(some, st.booleans())
def test_wire_vectors_come_to_what_the_states_on_the_host_come_to(case: Any, joining: bool) -> None:
    name, parts = case
    handler = HANDLERS[name]
    states = [folded(handler, part) for part in parts]
    wire = Wire(Schema([entry_of(name)]), len(states), joining=joining)
    vectors = []
    for rank, state in enumerate(states):
        vector, lacking = wire.pack(
            Outgoing({KEY: state}, {KEY: state.sample.window()} if state.sample else {}), rank
        )
        assert not lacking
        vectors.append(vector)
    totals = wire.totals(wire.merged(np.stack(vectors)[:, : None if joining else wire.lanes.stop]))
    # Of a LAST it is the lowest rank's over ranks, and the newest over time.
    whole = reduce(merged, reversed(states) if handler.is_last else states)
    counts = [] if whole.counts is None else [whole.counts.get(one, 0) for one in "abc"]
    assert np.array_equal(totals.sums, [*whole.sums, *counts], equal_nan=True)
    assert np.array_equal(totals.maxs, whole.maxs, equal_nan=True)


block = st.lists(st.sampled_from("abcd"), unique=True, max_size=4)


@given(
    st.sampled_from(["sum", "max", "min", "rms", "mean"]),
    st.lists(st.lists(st.tuples(block, block, numbers), max_size=3), min_size=2, max_size=4),
)
@examples(60)
def test_cells_merge_alike_however_they_are_split_and_whatever_cells_each_part_holds(
    name: str, parts: list[list[tuple[list[str], list[str], Any]]]
) -> None:
    handler = HANDLERS[name]

    def of(labels: list[str], ids: list[str], value: Any) -> State:
        axes = axes_of({"layer": 2, "p": sorted({*labels, *ids})})
        cells = block_of(axes, {"layer": 1, "p": ids})
        return fold_cells(KEY, handler, cells, np.full(len(ids), float(value)), 1.0)

    one_by_one, in_parts = handler.empty(), handler.empty()
    for part in parts:
        together = handler.empty()
        together.merge_all([of(*some) for some in part])
        before = together.copy()
        in_parts.merge(together)
        assert np.array_equal(together.sums, before.sums, equal_nan=True)
        for some in part:
            one_by_one.merge(of(*some))
    assert one_by_one.axes == in_parts.axes
    for own, other in zip(
        one_by_one.laid_out(one_by_one.axes), in_parts.laid_out(in_parts.axes), strict=True
    ):
        assert np.array_equal(own, other, equal_nan=True)
    wanted: dict[str, float] = {}
    for part in parts:
        for _, ids, _ in part:
            for label in ids:
                wanted[label] = wanted.get(label, 0.0) + 1.0
    if one_by_one.axes:
        counts = one_by_one.laid_out(one_by_one.axes)[0][:, 0].reshape(2, -1)
        assert counts[0].sum() == 0
        found = dict(zip(one_by_one.axes[1].labels, counts[1].tolist(), strict=True))
        assert {label: count for label, count in found.items() if count} == wanted
