"""A packed vector is a state: the same merge for host states, gathered rows and a tree of ranks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypotheses import examples
from hypothesis import given
from hypothesis import strategies as st

from metricfold._core.fold.sample import Window, new_histogram
from metricfold._core.fold.state import State
from metricfold._core.reduce.header import HEADER_SIZE
from metricfold._core.reduce.schema import Entry, Schema
from metricfold._core.reduce.sections import added, larger, owned
from metricfold._core.reduce.totals import Totals
from metricfold._core.reduce.wire import Outgoing, Wire
from metricfold.communicator.tree import rounds_of, steps

SUFFIX = ("",)
SCHEMA = Schema(
    [
        Entry(("a", f"extreme {number}"), "max of mine/3+1", SUFFIX, per_rank=number == 0)
        for number in range(8)
    ]
    + [
        Entry(("b", "points"), "distribution/recent", SUFFIX, capacity=16),
        Entry(("b", "many"), "distribution/recent", SUFFIX, capacity=512, weighted=True),
        Entry(("b", "sketched"), "distribution", SUFFIX, capacity=16, condensed=True),
    ]
)
EXTREMES = [key for key in SCHEMA.entries if key[0] == "a"]
NUMBERS = [1.0, 2.0, 3.0, 0.0, -0.0, math.inf, -math.inf]


def state_of(g: np.random.Generator) -> State:
    """Return a state with NaN of both signs, zeros of both signs and infinities."""
    total = float(g.normal()) * 10.0 ** int(g.integers(-8, 8))
    if g.random() < 0.1:
        total = float(g.choice([np.nan, -np.nan, np.inf, -np.inf, -0.0]))
    count, nans = float(g.integers(1, 4)), float(g.random() < 0.1)
    if count == nans:
        return State((count, nans, total), (-math.inf,))
    top = g.choice([np.nan, -np.nan]) if g.random() < 0.05 else g.choice(NUMBERS)
    return State((count, nans, total), (float(top),))


def outgoing(rank: int, seed: int) -> Outgoing:
    """Return what one rank holds; it lacks some keys."""
    g = np.random.default_rng([seed, rank])
    states = {key: state_of(g) for key in EXTREMES if g.random() < 0.7}
    windows: dict[Any, Window] = {}
    for name, most in (("points", 16), ("many", 512), ("sketched", 16)):
        if g.random() < 0.8:
            size = int(g.integers(1, most + 1))
            values = np.exp(g.normal(size=size) * g.choice([0.01, 1, 5])) * g.choice([-1, 1], size)
            values[g.random(size) < 0.1] = 0
            weights = g.integers(1, 4, size).astype(float) if name == "many" else None
            older = new_histogram((), g.lognormal(size=300)) if name == "sketched" else None
            fresh = int(g.choice([size, g.integers(0, size + 1)]))
            windows["b", name] = Window(values, weights, fresh, older)
    return Outgoing(states, windows)


def vectors(wire: Wire, world_size: int, seed: int) -> Any:
    rows = []
    for rank in range(world_size):
        vector, lacking = wire.pack(outgoing(rank, seed), rank)
        assert not lacking
        wire.head(vector, np.zeros(HEADER_SIZE))
        rows.append(vector)
    return np.stack(rows)


def by_tree(wire: Wire, rows: Any) -> list[Any]:
    """Return what each rank of a tree comes to, round by round."""
    held = [row[np.newaxis] for row in rows]
    todo = [{step.round: step for step in steps(rank, len(rows))} for rank in range(len(rows))]
    for number in rounds_of(len(rows)):
        before = list(held)
        for rank, mine in enumerate(todo):
            step = mine.get(number)
            if step is not None and step.receives:
                held[rank] = step.after(before[rank], before[step.partner], wire.pairs)
    return [one[0] for one in held]


@pytest.mark.parametrize("world_size", [*range(1, 18), 40])
def test_a_tree_comes_to_the_bits_of_rows_merged_where_they_arrive(world_size: int) -> None:
    wire = Wire(SCHEMA, world_size, joining=True)
    rows = vectors(wire, world_size, world_size)
    merged = wire.merged(rows)
    assert {one.tobytes() for one in by_tree(wire, rows)} == {merged.tobytes()}
    assert not wire.wrong(merged[np.newaxis]).any()


@pytest.mark.parametrize("seed", range(60))
def test_lanes_of_a_gather_have_the_bits_of_a_tree_and_their_lowest_owners(seed: int) -> None:
    """Owners were known where one rank alone had a maximum, on all but the smallest worlds."""
    world_size = seed % 40 + 1
    tree, gather = (Wire(SCHEMA, world_size, joining=joining) for joining in (True, False))
    rows = vectors(gather, world_size, seed)
    merged = gather.merged(rows[:, gather.lanes])
    on_the_way = tree.merged(vectors(tree, world_size, seed))
    one, other = gather.totals(merged), tree.totals(on_the_way)
    for name in ("sums", "maxs", "owners", "tied"):
        assert getattr(one, name).tobytes() == getattr(other, name).tobytes(), name
    attendance = tree.attendance(on_the_way)
    states = [outgoing(rank, seed).states for rank in range(world_size)]
    for key in EXTREMES:
        place = SCHEMA.maxs[key].start
        having = [r for r, held in enumerate(states) if key in held]
        numbers = [r for r in having if states[r][key].sums[0] > states[r][key].sums[1]]
        tops = {r: states[r][key].maxs[0] for r in numbers}
        top = math.nan if any(map(math.isnan, tops.values())) else max(tops.values(), default=None)
        if top is None:
            assert (one.owners[place], one.tied[place]) == (-1, 0)
            continue
        who = [r for r in numbers if tops[r] == top or (math.isnan(top) and math.isnan(tops[r]))]
        assert (one.owners[place], one.tied[place]) == (who[0], len(who))
        assert attendance.lacking(key) == [r for r in range(world_size) if r not in having]
        with_nan = [r for r in having if states[r][key].sums[1]]
        assert attendance.nan_owners.get(key, -1) == (with_nan[0] if with_nan else -1)


def test_folding_a_far_partner_in_first_would_name_other_owners() -> None:
    """Why neighbours merge first, the lower ranks first (`reference/tree/check_order.py`)."""
    wrong = 0
    for world_size in range(3, 17):
        wire = Wire(SCHEMA, world_size, joining=True)
        rows = vectors(wire, world_size, world_size)
        whole = 1 << (world_size.bit_length() - 1)
        far = [
            wire.merged(rows[[place, place + whole]]) if place + whole < world_size else rows[place]
            for place in range(whole)
        ]
        right, other = wire.totals(wire.merged(rows)), wire.totals(wire.merged(np.stack(far)))
        wrong += (right.owners != other.owners).any()
    assert wrong


numbers = st.one_of(
    st.sampled_from([0.0, -0.0, math.nan, -math.nan, math.inf, -math.inf, 1.0, 2.0]),
    st.floats(-1e9, 1e9),
)


@examples(300)
@given(a=numbers, b=numbers, c=numbers)
def test_the_larger_of_numbers_has_the_same_bits_in_any_order_and_bracketing(
    a: float, b: float, c: float
) -> None:
    x, y, z = (np.array([one]) for one in (a, b, c))
    bits = {
        larger(*pair).tobytes()
        for pair in ((larger(x, y), z), (x, larger(y, z)), (larger(z, y), x), (y, larger(z, x)))
    }
    assert len(bits) == 1
    assert larger(x, np.array([-math.inf])).tobytes() == larger(x, x).tobytes()
    assert added(x, y).tobytes() == added(y, x).tobytes()


@examples(300)
@given(top=st.lists(st.one_of(st.none(), numbers), min_size=1, max_size=9), cuts=st.randoms())
def test_owners_and_ties_are_the_same_in_any_bracketing(top: list[Any], cuts: Any) -> None:
    blocks = [
        np.array([[-math.inf], [-1.0], [0.0]] if one is None else [[one], [rank], [1.0]])
        for rank, one in enumerate(top)
    ]
    straight = blocks[0]
    for block in blocks[1:]:
        straight = owned(straight, block)
    while len(blocks) > 1:
        place = cuts.randrange(len(blocks) - 1)
        blocks[place : place + 2] = [owned(blocks[place], blocks[place + 1])]
    if len(top) > 1:
        assert blocks[0].tobytes() == straight.tobytes()


@examples(200)
@given(seed=st.integers(0, 2**32))
def test_states_of_the_host_merge_as_vectors_do(seed: int) -> None:
    g = np.random.default_rng(seed)
    entry = Entry(("", "x"), "mine/3+1")
    one, other = state_of(g), state_of(g)
    wire = Wire(Schema([entry]), 2, joining=False)
    rows = [
        wire.pack(Outgoing({entry.key: state}, {}), rank)[0]
        for rank, state in enumerate((one, other))
    ]
    merged = wire.totals(wire.merged(np.stack(rows)))
    one.merge(other)
    # What accumulates begins with 0, and 0 + -0 is 0.
    assert repr(merged.sums.tolist()) == repr([total + 0.0 for total in one.sums])
    assert repr(merged.maxs.tolist()) == repr(list(one.maxs))


@examples(100)
@given(tops=st.lists(st.one_of(st.none(), numbers), min_size=3, max_size=3))
def test_over_time_the_owner_of_the_first_of_equal_maxima_stays(tops: list[Any]) -> None:
    schema = Schema([Entry(("", "x"), "max")])
    found = []
    for when, top in enumerate(tops):
        one = Totals.empty(schema)
        if top is not None:
            one.sums[0], one.maxs[0], one.owners[0], one.tied[0] = 1.0, top, when, 1
        found.append(one)
    left = found[0].plus(found[1]).plus(found[2])
    right = found[0].plus(found[1].plus(found[2]))
    held = [(top, when) for when, top in enumerate(tops) if top is not None]
    best = -1
    if held:
        greatest = math.nan if any(t != t for t, _ in held) else max(t for t, _ in held)  # noqa: PLR0124
        best = next(w for t, w in held if t == greatest or (t != t and greatest != greatest))  # noqa: PLR0124
    for result in (left, right):
        assert (result.owners[0], result.tied[0]) == (best, int(best >= 0))
    assert left.maxs.tobytes() == right.maxs.tobytes()


def test_a_rank_that_nobody_lacks_is_one_bit_and_many_ranks_are_counted() -> None:
    entry = Entry(("", "x"), "sum")
    for world_size, told in ((40, True), (1000, False)):
        wire = Wire(Schema([entry]), world_size, joining=True)
        state = Outgoing({entry.key: State((1.0, 0.0, 2.0))}, {})
        rows = [
            wire.pack(state if rank % 3 else Outgoing({}, {}), rank)[0]
            for rank in range(world_size)
        ]
        attendance = wire.attendance(wire.merged(np.stack(rows)))
        lacking = list(range(0, world_size, 3))
        assert attendance.lacking(entry.key) == (lacking if told else None)
        assert world_size - attendance.present(entry.key) == len(lacking)


def test_what_no_rank_sends_is_merged_and_judged_at_the_end() -> None:
    wire = Wire(SCHEMA, 4, joining=True)
    rows = vectors(wire, 4, 1)
    for place in range(wire._values.start, wire.size, 61):
        for bad in (math.nan, math.inf, -3.0, 0.5, 1e300):
            damaged = rows.copy()
            damaged[2, place] = bad
            merged = wire.merged(damaged)
            assert merged.shape == (wire.size,)
    damaged = rows.copy()
    damaged[1, wire._values] = math.nan
    merged = wire.merged(damaged)
    assert wire.wrong(merged[np.newaxis]).any()
    damaged = rows.copy()
    damaged[3, wire._owned] = 7.0
    assert wire.wrong(wire.merged(damaged)[np.newaxis]).any()


@pytest.mark.parametrize("world_size", [1, 2, 5, 8])
def test_points_that_fit_into_a_tree_are_those_that_a_gather_brings(world_size: int) -> None:
    tree, gather = (Wire(SCHEMA, world_size, joining=joining) for joining in (True, False))
    joined = tree.recent(tree.merged(vectors(tree, world_size, 3))[np.newaxis])
    gathered = gather.recent(vectors(gather, world_size, 3))
    for key in (("b", "points"), ("b", "many"), ("b", "sketched")):
        views = [(joined.interval(key), gathered.interval(key))]
        if SCHEMA.entries[key].bounded:
            views.append((joined.recent(key), gathered.recent(key)))
        for one, other in views:
            assert one.count == other.count
            if one.count and one.histogram is None and other.histogram is None:
                assert one.values.tobytes() == other.values.tobytes()
            elif one.count:
                assert one.summary()[1] == other.summary()[1]
    assert joined.interval(("b", "points")).histogram is None
