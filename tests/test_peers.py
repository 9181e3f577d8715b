"""What a peer rank sends is held to what its schema can need, and refused on all ranks alike."""

from __future__ import annotations

import json
import math
import random
import resource
import zlib
from typing import Any

import numpy as np
import pytest
from campaign import peer
from campaign.table import Row, Trial
from ranks import run_threads

from metricfold import MetricsAggregator
from metricfold._core import sketch as sketches
from metricfold._core.reduce.announced import entries_from
from metricfold._core.reduce.header import MOST_CUSTOM, MOST_ERROR, Field
from metricfold._core.reduce.schema import Entry, Schema
from metricfold._core.sketch import LogLinearHistogram
from metricfold.communicator import Communicator

GOOD = {"key": ["", "x"], "kind": "mean"}


def attacked(attack: Any, *args: Any) -> Row:
    row = Row("attack", injected=1)
    attack(row, Trial(0, random.Random(str(args))), *args)
    return row


@pytest.mark.parametrize(
    "entries",
    [
        [{**GOOD, "key": ["", "\x1b[31mred"]}],
        [{**GOOD, "key": ["a\u202eb", "x"]}],
        [{**GOOD, "key": ["", 7]}],
        [{**GOOD, "key": ["", "\ud800"]}],
        [{**GOOD, "kind": "mine/1000000000+0"}],
        [{**GOOD, "kind": "mine/-1+0"}],
        [{**GOOD, "kind": "mine"}],
        [{**GOOD, "kind": "mine/3+131072"}],
        [{**GOOD, "kind": "mean/4+0"}],
        [{**GOOD, "kind": "mine/1+0"}],
        [{**GOOD, "kind": "mine/0+1"}],
        [{**GOOD, "kind": "mine/3+0/some"}],
        [{**GOOD, "kind": 3}],
        [{**GOOD, "capacity": 16}],
        [{**GOOD, "categories": ["a", "a"]}],
        [{**GOOD, "full": 1}],
        [{**GOOD, "suffixes": ["\x1b"]}],
        [{**GOOD, "colour": 1}],
        [{"key": ["", "x"]}],
        [GOOD, GOOD],
        [{**GOOD, "key": ["", f"x{place}"], "kind": "mine/3+65536"} for place in range(100)],
        {"a": 1},
    ],
    ids=str,
)
def test_news_that_are_none_are_refused_on_all_ranks_and_change_nothing(entries: Any) -> None:
    """Until now some raised a TypeError, and some were believed."""
    row = attacked(peer.attack_by_news, zlib.compress(json.dumps(entries).encode()))
    assert row.well(), row.notes


def test_what_decompresses_to_far_more_than_any_news_takes_no_such_memory() -> None:
    """Until now a megabyte on the wire took a gigabyte on every rank."""
    blob = peer._bomb(b" ", 2**28)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    row = attacked(peer.attack_by_news, blob)
    assert row.well(), row.notes
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024


@pytest.mark.parametrize("how", peer.WAYS)
@pytest.mark.parametrize("number", range(4))
def test_vectors_of_a_peer_end_in_one_error_or_in_the_same_numbers(how: str, number: int) -> None:
    row = Row("vectors", injected=1)
    peer.attack_by_vectors(row, Trial(number, random.Random(f"{how}/{number}")), how)
    assert row.well(), row.notes


@pytest.mark.parametrize(
    ("field", "number", "complaint"),
    [
        (Field.BLOB_SIZE, 1e12, "1e\\+12 as blob_size"),
        (Field.CUSTOM_SIZE, 2.0 * MOST_CUSTOM, "as custom_size"),
        (Field.CUSTOM_SIZE, math.nan, "nan as custom_size"),
        (Field.KIND, 7.0, "7 as kind"),
        (Field.PENDING, -1.0, "-1 as pending"),
        (Field.SECONDS, -1.0, "-1 as seconds"),
        (Field.SECONDS, math.inf, "inf as seconds"),
    ],
)
def test_a_header_that_no_rank_sends_names_its_rank(
    field: Field, number: float, complaint: str
) -> None:
    def change(collective: int, op: str, vector: Any) -> Any:
        if op == "gather" and collective == 1:
            vector[field] = number
        return vector

    outcomes = peer.world(2, change, lambda rank: peer.train(rank, 1, custom=True))
    for outcome in outcomes:
        with pytest.raises(RuntimeError, match=f"rank 1 sent what no rank sends.*{complaint}"):
            raise outcome


def fail(communicator: Communicator) -> str:
    aggregator = MetricsAggregator(communicator=communicator)
    aggregator.record("x", 1.0)
    bad = "\x1b[31m" + "x" * (2 * MOST_ERROR) if communicator.rank else None
    aggregator._held.keys.trouble = lambda: bad or ""
    with pytest.raises(RuntimeError) as caught:
        aggregator.reduce()
    return str(caught.value)


def test_what_a_rank_says_of_its_failure_is_of_bounded_length_and_printable() -> None:
    said = run_threads(fail, 2)
    assert said[0] == said[1]
    assert said[0].isprintable()
    assert len(said[0]) < 2 * MOST_ERROR


def test_results_of_custom_handlers_that_are_none_name_the_rank() -> None:
    for number in range(14):
        row = Row("results", injected=1)
        peer.attack_by_results(row, Trial(number, random.Random(number)))
        assert row.well(), row.notes


def test_every_entry_that_ranks_send_is_read_back() -> None:
    entries = [
        Entry(("", "lanes"), "mine/3+1", per_rank=True),
        Entry(("d", "window"), "distribution/recent", ("_stat_p50",), False, False, 16),
        Entry(("d", "all"), "distribution", drained=True),
        Entry(("größe", "kinds"), "counts", ("_count_\0",), categories=("b", "a")),
        Entry(("", "mine"), "mine/0+0"),
    ]
    text = Schema.entries_to_json(entries)
    assert entries_from(json.loads(text), settled=True) == entries


@pytest.mark.parametrize(
    "change",
    [
        {0: 1e300},
        {0: 0.5},
        {0: -3.0},
        {6: -5.0},  # the least value, its sign turned: it lies above the greatest
        {8: 17.0},
        {9: -1.0},
        {10: 2.0**60},
        {11: 0.0},
        {-1: math.nan},
        {-1: 1.0},
    ],
)
def test_a_sketch_on_the_wire_that_no_values_come_to_does_not_fit(change: dict[int, float]) -> None:
    histogram = LogLinearHistogram(512)
    histogram.update([1.0, 2.0, 3.0, -4.0])
    slot = sketches.pack(histogram)
    assert sketches.fitting(slot[np.newaxis]).tolist() == [True]
    for place, number in change.items():
        slot[place] = number
    assert sketches.fitting(slot[np.newaxis]).tolist() == [False]
