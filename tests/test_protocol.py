"""The wire protocol: vectors of one size on all ranks, whatever fails wherever."""

from __future__ import annotations

import importlib
import json
import math
from importlib.util import find_spec
from typing import Any

import numpy as np
from handlers_of_users import MyTypes, RMSHandler
from hypotheses import examples
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_threads

from metricfold import AggregationType, Metric, MetricsAggregator
from metricfold._core.exchange.route import Exchange
from metricfold._core.fold.sample import Window, new_histogram
from metricfold._core.fold.state import Sample, State
from metricfold._core.reduce.announced import entries_from
from metricfold._core.reduce.header import AGREED, HEADER_SIZE, RouteChoice
from metricfold._core.reduce.schema import Entry, Schema, digest
from metricfold._core.reduce.wire import Outgoing, Wire
from metricfold.communicator import Communicator, LocalCommunicator

torch: Any = importlib.import_module("torch") if find_spec("torch") else None

# -- Whatever happens ----------------------------------------------------------------------------

events = st.sampled_from(
    [
        "nothing",
        "number",
        "new key",
        "same key as sum",
        "same key as max",
        "category",
        "window",
        "weighted window",
        "long window",
        "custom",
        "per rank",
        *(["bad weight"] if torch else []),  # numbers of the host are refused before
        "names clash",
        "reset",
        "save instead",
        "another step",
    ]
)


def live(
    communicator: Communicator, story: list[list[str]], options: dict[str, Any]
) -> tuple[list[str], dict[str, float], float]:
    """Go through a story of events, some of which raise; then reduce cleanly."""
    rank = communicator.rank
    aggregator = MetricsAggregator(communicator=communicator, **options)
    aggregator.register_handler(MyTypes.RMS, RMSHandler())
    outcomes, recorded = [], 0.0
    for round_number, chosen in enumerate(story):
        event = chosen[rank]
        call: Any = lambda step=round_number: aggregator.reduce(step=step)  # noqa: E731
        try:
            aggregator.record("steps", 1, "sum")
            recorded += 1
            if event == "number":
                aggregator.record("loss", rank)
            elif event == "new key":
                aggregator.update([Metric(f"d{rank}", f"k{round_number}", 1, AggregationType.SUM)])
            elif event == "same key as sum":
                aggregator.update([Metric("d", f"either {round_number}", 1, AggregationType.SUM)])
            elif event == "same key as max":
                aggregator.update([Metric("d", f"either {round_number}", 1, AggregationType.MAX)])
            elif event == "category":
                aggregator.record("kind", f"{rank}-{round_number}", "categorical_count")
            elif event in ("window", "weighted window"):
                weight = 1.0 if event == "window" else 2.0
                for value in range(round_number + 2):
                    aggregator.record("len", value, "distribution", weight=weight)
            elif event == "long window":
                for value in range(40):
                    aggregator.record("len", value, "distribution")
            elif event == "per rank":
                aggregator.record("time", rank, per_rank=True)
            elif event == "custom":
                aggregator.update([Metric("d", "rms", rank + 1, MyTypes.RMS)])
            elif event == "bad weight":
                aggregator.record("loss", torch.tensor(1.0), weight=torch.tensor(-1.0))
            elif event == "names clash":
                name = "len_stat_p50" if rank else "late"
                aggregator.record(name, 1.0, "sum" if rank else "distribution")
            elif event == "reset":
                recorded = 0.0
                aggregator.reset()
            elif event == "save instead":
                call = aggregator.state_dict
            elif event == "another step":
                call = lambda: aggregator.reduce(step=-5)  # noqa: E731
        except ValueError:
            pass  # refused on this rank alone, which is as good as not having happened
        try:
            call()
            outcomes.append("ok")
        except (RuntimeError, ValueError) as error:
            outcomes.append(str(error))
    # Who has reset alone is told; once all have, everything works again.
    if any("reset" in chosen for chosen in story):
        for chosen in story:
            if "reset" in chosen and chosen[rank] != "reset":
                aggregator.reset()
                recorded = 0.0
    while True:
        try:
            snapshot = aggregator.reduce()
        except ValueError:
            continue
        return outcomes, snapshot.as_dict("t"), recorded


@examples(150)
@given(
    world_size=st.integers(2, 4),
    story=st.lists(st.lists(events, min_size=4, max_size=4), max_size=6),
    route=st.sampled_from(["gather", "tree"]),
    window=st.sampled_from([8, None]),
)
def test_whatever_fails_all_ranks_raise_alike_and_go_on(
    world_size: int, story: list[list[str]], route: str, window: int | None
) -> None:
    # A vector of another size on some rank would fail inside the communicator.
    options = {"route": route, "dist_window_size": window}
    results = run_threads(live, world_size, [chosen[:world_size] for chosen in story], options)
    for outcomes, logged, _ in results:
        assert outcomes == results[0][0]
        assert repr(logged) == repr(results[0][1])
    if not any("reset" in chosen for chosen in story):
        expected = sum(recorded for _, _, recorded in results)
        assert results[0][1].get("t/steps", 0) == expected


# -- The pieces ----------------------------------------------------------------------------------

lanes = Entry(("a", "lanes"), "x/3+1")
window = Entry(("b", "window"), "distribution/recent", capacity=4, weighted=True)
kinds = Entry(("c", "kinds"), "counts", categories=("x", "y"), most=2)
custom = Entry(("d", "custom"), "mine/0+0")


def outgoing(states: dict[Any, Any], windows: dict[Any, Window]) -> Outgoing:
    return Outgoing(states, windows)


def exchanged(schema: Schema, states: dict[Any, Any], windows: dict[Any, Window]) -> Any:
    """Return what comes out of a world of one rank."""
    exchange = Exchange(LocalCommunicator(), RouteChoice.GATHER)
    vector, lacking = exchange.wire(schema).pack(outgoing(states, windows), 0)
    assert not lacking
    assert vector.size == exchange.wire(schema).size
    merged = exchange.vectors(schema, np.zeros(HEADER_SIZE), vector).merged
    assert merged is not None
    return merged


def test_a_vector_holds_identities_where_a_rank_has_nothing() -> None:
    schema = Schema([kinds, window, lanes, custom])
    size = HEADER_SIZE + AGREED + 3 * 1 + (3 + 5 + 4) + (2 + 8)
    assert Wire(schema, 1, joining=False).size == size
    merged = exchanged(schema, {}, {})
    assert not merged.delta.sums.any()
    assert (merged.delta.maxs == -np.inf).all()
    assert merged.recent.recent(window.key).count == 0


def test_what_is_packed_comes_out_again() -> None:
    schema = Schema([lanes, window, kinds])
    states = {
        lanes.key: State((1.0, 2.0, 3.0), (9.0,)),
        window.key: State((2.0, 0.0, 0.0, 4.0, 2.0), sample=Sample()),
        kinds.key: State((5.0, 0.0), counts={"y": 5}),
    }
    older = new_histogram((), np.array([7.0]))
    kept = Window(np.array([1.5, 2.5]), np.array([1.0, 3.0]), fresh=1)
    merged = exchanged(schema, states, {window.key: kept})
    sums = merged.rows.sums
    assert sums[0, schema.sums[lanes.key]].tolist() == [1, 2, 3]
    assert merged.rows.maxs[0].tolist() == [9]
    assert sums[0, schema.sums[kinds.key]].tolist() == [5, 0, 0, 5]
    (out,) = merged.recent.windows(window.key)
    assert (out.values.tolist(), out.fresh, out.older) == ([1.5, 2.5], 1, None)
    assert out.weights is not None
    assert out.weights.tolist() == [1.0, 3.0]

    condensed = Schema([window._replace(condensed=True)])
    (out,) = exchanged(condensed, {}, {window.key: kept._replace(older=older)}).recent.windows(
        window.key
    )
    assert out.values.tolist() == [1.5, 2.5]
    assert (out.older.count, out.older.max) == (1, 7.0)
    assert out.interval().count == 2


def test_what_has_no_place_in_the_vector_is_named() -> None:
    def lacking(schema: Schema, states: dict[Any, Any], windows: dict[Any, Window]) -> set[Any]:
        gathered, merged = (
            Wire(schema, 2, joining=joining).pack(outgoing(states, windows), 1)[1]
            for joining in (False, True)
        )
        assert gathered == merged
        return gathered

    schema = Schema([lanes, window, kinds])
    new = ("not", "agreed")
    categories = State((5.0, 0.0), counts={"y": 4, "z": 1})
    long, weighted = Window(np.zeros(5)), Window(np.zeros(1), np.ones(1))
    older = Window(np.zeros(1), None, 1, new_histogram((), np.zeros(1)))
    assert lacking(schema, {new: State((1.0, 1.0, 1.0))}, {}) == {new}
    assert lacking(schema, {kinds.key: categories}, {}) == {kinds.key}
    assert lacking(schema, {}, {window.key: long, new: weighted}) == {window.key, new}
    assert lacking(schema, {}, {window.key: older}) == {window.key}
    unweighted = Schema([window._replace(weighted=False)])
    assert lacking(unweighted, {}, {window.key: weighted}) == {window.key}


entries = st.builds(
    lambda **found: Entry(("d", "x"), "distribution/3+0/recent", **found),
    per_rank=st.booleans(),
    capacity=st.sampled_from([0, 16, 32, 1000]),
    weighted=st.booleans(),
    condensed=st.booleans(),
    categories=st.lists(st.sampled_from("abcd"), unique=True).map(lambda c: tuple(sorted(c))),
    most=st.integers(4, 9),
)


@given(a=entries, b=entries, c=entries)
def test_joining_entries_is_associative_commutative_and_idempotent(
    a: Entry, b: Entry, c: Entry
) -> None:
    assert a.joined(b) == b.joined(a)
    assert a.joined(b).joined(c) == a.joined(b.joined(c))
    assert a.joined(b).joined(b) == a.joined(b)


def test_a_schema_survives_json_and_its_hash_tells_it_from_others() -> None:
    schema = Schema([lanes, window, kinds, custom])
    again = Schema(entries_from(json.loads(schema.to_json()), settled=True))
    assert again.entries == schema.entries
    assert again.hash == schema.hash
    assert Schema([lanes]).hash != schema.hash
    assert 0 <= schema.hash < 2**52
    assert float(schema.hash) == schema.hash


def test_a_digest_is_exact_in_a_float() -> None:
    assert int(float(digest(b"metricfold"))) == digest(b"metricfold")


@examples(50)
@given(blobs=st.lists(st.binary(max_size=40), min_size=1, max_size=4))
def test_bytes_of_any_length_reach_every_rank(blobs: list[bytes]) -> None:
    def gather(communicator: Communicator) -> list[bytes]:
        return communicator.all_gather_bytes(blobs[communicator.rank], [len(b) for b in blobs])

    assert run_threads(gather, len(blobs)) == [blobs] * len(blobs)


def test_one_rank_is_a_world_without_collectives() -> None:
    local = LocalCommunicator()
    vector = np.array([1.0, math.nan])
    assert local.all_gather(vector).shape == (1, 2)
    assert local.tree(vector, np.add) is vector
    assert local.collectives == 0


def test_identical_news_from_many_ranks_travel_once() -> None:
    sent: list[int] = []

    def reduce(communicator: Communicator) -> None:
        original = communicator.tree

        def watched(vector: Any, merge: Any) -> Any:
            sent.append(vector.size)
            return original(vector, merge)

        communicator.tree = watched  # type: ignore[method-assign]
        aggregator = MetricsAggregator(communicator=communicator)
        for index in range(50):
            aggregator.record(f"metric {index}", 1.0)
        aggregator.reduce()

    run_threads(reduce, 2)
    run_threads(reduce, 4)
    assert sent[0] > 10
    assert set(sent) == {sent[0]}
