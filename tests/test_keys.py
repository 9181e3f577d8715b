"""Ranks come to one schema, at a price per key that does not grow with those they have agreed on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from handlers_of_users import LaneRMS
from hypotheses import examples
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_threads
from work import lines_run

from metricfold import Metric, MetricsAggregator
from metricfold._core.fold import names as naming
from metricfold._core.fold.builtin import built_in_handlers
from metricfold._core.fold.columns import Column
from metricfold._core.fold.names import Claims
from metricfold._core.intake import keys
from metricfold._core.intake.keys import KeyTable
from metricfold._core.reduce import agreement
from metricfold._core.reduce.agreement import Agreed, agree, read
from metricfold._core.reduce.announced import encoded
from metricfold._core.reduce.schema import Entry, Key, Schema
from metricfold.communicator import Communicator
from metricfold.metric import resolve_type

SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"on_nan": "skip"},
    {"percentiles": (50, 99)},
    {"window_size": None},
)
NAMES = ("a", "b", "a_nan_count", "a_stat_p99", "a_count_x", "x")
AGGREGATIONS = ("sum", "mean", "distribution", "categorical_count")

records = st.tuples(
    st.integers(0, 2),  # the rank
    st.tuples(st.sampled_from(["", "d", "e"]), st.sampled_from(NAMES)),
    st.sampled_from(AGGREGATIONS),
)
rounds = st.lists(st.lists(records, max_size=4), min_size=1, max_size=5)


class World:
    """The key tables of some ranks, and what these have agreed on."""

    def __init__(self, settings_of: Any, derived: Any) -> None:
        self.tables = [KeyTable(built_in_handlers(**one)) for one in settings_of]
        self.schema, self.claims = Schema(), Claims()
        for table, name in zip(self.tables, derived, strict=True):
            if name:
                table.derive(name, len)

    def record(self, rank: int, key: Key, agg: str) -> None:
        table = self.tables[rank]
        try:
            table.commit(table.admit([Column(key, resolve_type(agg), None)]))
        except ValueError:
            return  # a name that is taken on that rank

    def agree(self) -> Agreed:
        blobs = []
        for table in self.tables:
            unknown = [
                key
                for key, known in table.records.items()
                if key not in self.schema or known.conflicting
            ]
            blobs.append(encoded([table.entry(key) for key in sorted(unknown)]))
        agreed = agree(self.schema, self.claims, read(blobs))
        for rank, table in enumerate(self.tables):
            table.adopt(
                agreed, {lost.key: lost.beside for lost in agreed.lost if rank in lost.ranks}
            )
        self.schema = agreed.schema
        return agreed


def begun_anew(table: KeyTable, agreed: Schema) -> tuple[Claims, set[Key]]:
    """Return the names in use and the keys held otherwise, found out from all keys at once."""
    claims, otherwise = Claims(), set()
    claims.add((entry.key, entry.suffixes) for entry in agreed)
    for key in table.records:
        entry = agreed.entries.get(key)
        if entry is not None:
            if entry.kind != table.entry(key).kind:
                otherwise.add(key)
            continue
        try:
            claims.add([(key, table.entry(key).suffixes)])
        except ValueError:
            otherwise.add(key)
    return claims, otherwise


def answer(claims: Claims, key: Key, suffixes: tuple[str, ...]) -> str:
    try:
        claims.check([(key, suffixes)])
    except ValueError as error:
        return str(error)
    return ""


@given(
    rounds,
    st.tuples(*[st.sampled_from(SETTINGS)] * 3),
    st.tuples(*[st.sampled_from(["", "a", "x"])] * 3),
)
@examples(120)
def test_ranks_know_after_each_log_what_all_keys_at_once_would_tell(
    story: Any, settings_of: Any, derived: Any
) -> None:
    world = World(settings_of, derived)
    for batch in story:
        for record in batch:
            world.record(*record)
        agreed = world.agree()
        assert agreed.schema.entries == Schema(agreed.schema).entries
        assert agreed.schema.hash == Schema(agreed.schema).hash
        for table in world.tables:
            claims, otherwise = begun_anew(table, agreed.schema)
            assert table.those("conflicting") == otherwise
            for name in NAMES:
                for agg in AGGREGATIONS:
                    suffixes = table.handlers[resolve_type(agg)].suffixes()  # type: ignore[attr-defined]
                    for dataset in ("", "f"):
                        theirs = answer(table._claims, (dataset, name), suffixes)
                        if "derived" not in theirs:
                            assert bool(theirs) == bool(answer(claims, (dataset, name), suffixes))
                    for known in table.derived:
                        assert known not in table.records


lanes = st.builds(
    Entry,
    key=st.tuples(st.sampled_from("de"), st.sampled_from("abcdef")),
    kind=st.builds("x/{}+{}/counts".format, st.integers(2, 5), st.integers(0, 2)),
    categories=st.lists(st.sampled_from("pqr"), unique=True).map(lambda c: tuple(sorted(c))),
    most=st.just(9),
    axes=st.just(()),
)


@given(st.lists(lanes, unique_by=lambda entry: entry.key), st.lists(lanes))
def test_lanes_stand_where_their_keys_do_in_a_schema_that_has_grown(
    first: list[Entry], later: list[Entry]
) -> None:
    older, grown = Schema(first), dict(Schema(first).entries)
    for entry in later:
        known = grown.get(entry.key)
        grown[entry.key] = entry if known is None else known.with_categories(entry.categories)
    newer = older.grown(grown.values())
    assert newer.entries == Schema(grown.values()).entries
    sums, maxs = newer.lanes_from(older)
    for entry in older:
        place, there = older.sums[entry.key], newer.sums[entry.key]
        wide = newer.entries[entry.key]
        fixed = list(range(there.start, there.start + entry.sums))
        named = [there.start + wide.sums + wide.categories.index(c) for c in entry.categories]
        assert sums[place].tolist() == fixed + named
        there = newer.maxs[entry.key]
        assert maxs[older.maxs[entry.key]].tolist() == list(range(there.start, there.stop))
    assert (newer.sum_width, newer.max_width) == (
        sum(entry.sum_width for entry in newer),
        sum(entry.maxs for entry in newer),
    )


@pytest.mark.parametrize("agg", ["mean", "categorical_count"])
def test_what_one_more_key_takes_does_not_grow_with_those_agreed_on(agg: str) -> None:
    def lines(communicator: Communicator, known: int) -> int:
        aggregator = MetricsAggregator(communicator=communicator)
        for index in range(known):
            aggregator.record(f"layer{index}/load", 1.0, agg, dataset=f"set_{index % 3}")
        aggregator.reduce()

        def two_more(nth: str) -> None:
            if communicator.rank == 0:
                aggregator.record(f"{nth} of one rank", 1.0, agg, dataset="set_1")
            aggregator.derive(f"{nth} derived", len)
            aggregator.reduce()
            aggregator.record(f"{nth} of both", 1.0, agg)
            aggregator.reduce()

        two_more("first")  # derive() lists, once, the names that are there
        return lines_run(lambda: two_more("second"), agreement, keys, naming)

    few, many = (run_threads(lambda c, n=n: lines(c, n), 2) for n in (20, 400))
    for less, more in zip(few, many, strict=True):
        assert less > 50
        assert more <= less + 5


def test_a_rank_that_took_a_key_over_but_handles_it_otherwise_says_so_at_once() -> None:
    """Before, its next reduction could not pack what it held, on every try from then on."""

    def disagree(communicator: Communicator) -> str:
        bounded = None if communicator.rank == 0 else 10
        aggregator = MetricsAggregator(bounded, communicator=communicator)
        if communicator.rank == 0:
            aggregator.record("len", 1.0, "distribution")
        aggregator.reduce()
        aggregator.record("len", 2.0, "distribution")
        with pytest.raises(
            ValueError, match="rank 1 held metric 'len' with a window size"
        ) as error:
            aggregator.reduce()
        return str(error.value)

    first, second = run_threads(disagree, 2)
    assert first == second


class Word(str):
    """A text that says more of itself than its letters."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"Word({str(self)!r})"


@pytest.mark.parametrize("kind", [np.str_, Word])
def test_names_and_types_that_are_texts_of_another_class_are_the_same_on_all_ranks(kind):
    def say(communicator):
        aggregator = MetricsAggregator(communicator=communicator)
        aggregator.register_handler("lane rms", LaneRMS())
        mine = kind if communicator.rank else str
        for name in ("a", "b"):  # news of both ranks, in two reductions
            aggregator.record(mine(name), 1.0, mine("sum"), dataset=mine("d"))
            aggregator.update([Metric(mine("d"), mine(f"{name} rms"), 3.0, mine("lane rms"))])
            aggregator.reduce()
        return aggregator.get_metrics_for_logging("t")

    expected = {"t_d/a": 2, "t_d/b": 2, "t_d/a rms": 3, "t_d/b rms": 3}
    assert run_threads(say, 2) == [expected, expected]
