"""Simulated worlds of ranks are what real ones are, and the model of the network is its formulae."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmarks.scale.answers import NARROW, WIDE, cost, crossing, wide_from
from benchmarks.scale.measure import Simulation, first_log, samples_log, steady_log
from benchmarks.scale.model import Algorithm, Collective, Kind, Network, seconds
from benchmarks.scale.results import Results, Steady
from benchmarks.scale.workloads import MEANS, feed
from benchmarks.scale.world import World
from benchmarks.workloads import large
from ranks import run_threads

from metricfold import MetricsAggregator
from metricfold.communicator import Communicator

ROOT = Path(__file__).parents[1]
REAL = 3
MIXTURE = large(datasets=2, window=8)

# -- Simulated worlds are what real ones are -----------------------------------------------------


def logged_by_threads(communicator: Communicator, workload: Any, route: str) -> Any:
    """Log three times where every rank is a thread that has the values of rank % REAL."""
    aggregator = MetricsAggregator(workload.window, communicator=communicator, route=route)
    for number in range(1, 4):
        feed(aggregator, workload, communicator.rank % REAL, number)
        snapshot = aggregator.reduce()
    return aggregator.collectives, [snapshot.as_dict("t", window) for window in ("run", "interval")]


@pytest.mark.parametrize("ranks", [16, 64])
@pytest.mark.parametrize("route", [NARROW, WIDE])
@pytest.mark.parametrize("workload", [MEANS, MIXTURE], ids=["means", "mixture"])
def test_a_simulated_world_gives_what_threads_give(workload: Any, route: str, ranks: int) -> None:
    simulation = Simulation(workload, route, ranks, REAL)
    for _ in range(3):
        snapshot, _, _ = simulation.log()
    collectives, real = run_threads(logged_by_threads, ranks, workload, route)[0]
    assert simulation.aggregators[0].collectives == collectives
    for ours, theirs in zip(
        [snapshot.as_dict("t", window) for window in ("run", "interval")], real, strict=True
    ):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert ours[key] == pytest.approx(value, rel=1e-12), key


def test_news_of_real_ranks_alone_reach_everyone() -> None:
    simulation = Simulation(MIXTURE, "auto", 64, 5, own=True)
    snapshot, _, _ = simulation.log()
    values = snapshot.as_dict("t", "run")
    own = {key: value for key, value in values.items() if "t_own/kind_count_rank" in key}
    # 64 ranks repeat 5: rank 0 is there 13 times, rank 4 is there 12 times.
    assert own == {f"t_own/kind_count_rank {rank}": 13.0 - (rank == 4) for rank in range(5)}


def test_all_gather_and_all_reduce_speak_of_the_whole_world() -> None:
    def on_rank(communicator: Communicator) -> list[Any]:
        vector = np.array([communicator.rank + 1.0, -communicator.rank])
        return [
            communicator.all_gather(vector).tolist(),
            communicator.all_reduce(vector, "sum").tolist(),
            communicator.all_reduce(vector, "max").tolist(),
            communicator.all_gather_bytes(b"ab"[: communicator.rank + 1], [1, 2, 0, 0, 0]),
        ]

    for rows, total, largest, texts in World(5, real=2).run(on_rank):
        assert rows == [[1, 0], [2, -1], [1, 0], [2, -1], [1, 0]]
        assert total == [7, -2]
        assert largest == [2, 0]
        assert texts == [b"a", b"ab", b"", b"", b""]


def test_what_a_rank_raises_and_ranks_that_part_end_the_world() -> None:
    def fails(communicator: Communicator) -> None:
        if communicator.rank == 1:
            raise ValueError("rank 1 is at its end")
        communicator.all_gather(np.zeros(1))

    with pytest.raises(ValueError, match="rank 1 is at its end"):
        World(4, real=2).run(fails)

    def parts(communicator: Communicator) -> None:
        if communicator.rank:
            communicator.all_gather(np.zeros(1))

    with pytest.raises(AssertionError, match="some ranks are done"):
        World(4, real=2).run(parts)
    with pytest.raises(ValueError, match="real=5"):
        World(4, real=5)


# -- What a rank sends ---------------------------------------------------------------------------


def test_what_a_rank_sends_depends_on_the_metrics_alone() -> None:
    for route, collectives in ((NARROW, 1), (WIDE, 2)):
        small, large_world = (steady_log(MIXTURE, route, ranks, REAL, 1) for ranks in (16, 64))
        assert len(small.collectives) == collectives
        assert [one.sent for one in small.collectives] == [
            one.sent for one in large_world.collectives
        ]
    assert large_world.collectives == small.collectives  # wide: it gets back no more either
    narrow = steady_log(MIXTURE, NARROW, 64, REAL, 1)
    assert [one.received for one in narrow.collectives] == [64 * narrow.collectives[0].sent]
    # The rows themselves stay until the next log; on the wide route there are none.
    assert narrow.kept >= narrow.collectives[0].received
    assert abs(large_world.kept - small.kept) < 10_000


def test_a_hundred_means_are_as_many_bytes_as_the_page_says() -> None:
    row = steady_log(MEANS, NARROW, 16, REAL, 1)
    # A header of 16 numbers and four lanes for each of the means.
    assert [one.sent for one in row.collectives] == [8 * (16 + 4 * 100)]
    for phase in (row.pack, row.merge, row.report):
        assert phase > 0


def test_equal_news_travel_once_and_different_ones_each() -> None:
    one = first_log(MIXTURE, 16, 1)
    header, news, *_ = one.collectives
    assert header == Collective(Kind.GATHER, 128, 16 * 128)
    assert news.kind is Kind.REDUCE
    assert first_log(MIXTURE, 64, 1).collectives[1] == news
    four = first_log(MIXTURE, 16, 4)
    assert 3.9 * news.sent < four.collectives[1].sent < 4.5 * news.sent


def test_unbounded_distributions_send_the_same_however_many_values_came_in() -> None:
    few, many = (samples_log(samples, WIDE, 1000, REAL, 1) for samples in (100, 3000))
    assert many.collectives == few.collectives
    assert (few.counted, many.counted) == (100_000, 3_000_000)


# -- The model -----------------------------------------------------------------------------------

# A message takes a second, and a byte of it another; adding two bytes takes a second.
SLOW = Network(latency=1.0, bandwidth=1.0, arithmetic=2.0)


@pytest.mark.parametrize(
    ("kind", "algorithm", "ranks", "size", "expected"),
    [
        (Kind.GATHER, Algorithm.RING, 4, 10, 3 * (1 + 10)),
        (Kind.GATHER, Algorithm.TREE, 4, 10, 2 * 1 + 3 * 10),
        (Kind.GATHER, Algorithm.TREE, 5, 10, 3 * 1 + 4 * 10),
        (Kind.REDUCE, Algorithm.RING, 4, 8, 6 * 1 + 2 * 6 + 3),
        # Long vectors: halving, then doubling.
        (Kind.REDUCE, Algorithm.TREE, 4, 8, 4 * 1 + 2 * 6 + 3),
        # Short ones: doubling alone, 2 (1 + 1 + 1/2) against 4 + 1.5 + 3/8.
        (Kind.REDUCE, Algorithm.TREE, 4, 1, 5),
        (Kind.GATHER, Algorithm.RING, 1, 10, 0),
        (Kind.REDUCE, Algorithm.TREE, 1, 10, 0),
    ],
)
def test_collectives_last_as_long_as_the_formulae_say(
    kind: Kind, algorithm: Algorithm, ranks: int, size: int, expected: float
) -> None:
    one = Collective(kind, size, size)
    assert seconds([one], ranks, algorithm, SLOW) == pytest.approx(expected)
    assert seconds([one, one], ranks, algorithm, SLOW) == pytest.approx(2 * expected)


def made_up() -> Results:
    """Return results in which a row costs 1 s to merge and 1 s to report, and all else nothing."""
    results = Results("nowhere", REAL, 0)
    for ranks in (10, 100):
        gather = [Collective(Kind.GATHER, 1000, 1000 * ranks)]
        reduces = [Collective(Kind.REDUCE, 1000, 1000)] * 2
        results.steady += [
            Steady("it", NARROW, ranks, gather, 0.0, 0.0, 1.0 * ranks, 1.0 * ranks, 0, 0, 0),
            Steady("it", WIDE, ranks, reduces, 20.0, 10.0, 10.0, 60.0, 0, 0, 0),
        ]
    return results


def test_a_log_costs_what_was_measured_of_a_rank_and_the_model_of_the_network() -> None:
    at_once = Network(latency=1.0, bandwidth=math.inf)
    log = cost(made_up(), "it", NARROW, 10, Algorithm.RING, at_once)
    assert log.rank.measured
    assert (log.rank.reduce, log.network, log.total) == (10.0, 9.0, 29.0)
    log = cost(made_up(), "it", NARROW, 1000, Algorithm.RING, at_once)
    assert not log.rank.measured
    assert (log.reduce, log.total) == pytest.approx((1000 + 999, 2000 + 999))
    log = cost(made_up(), "it", WIDE, 1024, Algorithm.TREE, at_once)
    assert (log.reduce, log.total) == pytest.approx((40 + 20, 100 + 20), rel=1e-6)


def test_the_routes_cross_where_a_log_begins_to_cost_more_on_the_narrow_one() -> None:
    free = Network(latency=0.0, bandwidth=math.inf, arithmetic=math.inf)
    # The narrow one takes ranks (reduction) and 2 ranks (with the dict) seconds, the wide one 40
    # and 100.
    assert crossing(made_up(), "it", Algorithm.RING, free, report=False) == 41
    assert crossing(made_up(), "it", Algorithm.TREE, free, report=True) == 51
    # Four times as many messages around a ring never pay where one takes longer than a row.
    slow = Network(latency=1.0, bandwidth=math.inf)
    assert crossing(made_up(), "it", Algorithm.RING, slow, report=False) is None
    assert crossing(made_up(), "it", Algorithm.TREE, slow, report=False) is not None
    assert wide_from(made_up(), "it") == 4 * 2**20 // 1000 + 1


# -- The command ---------------------------------------------------------------------------------


def scale(*args: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "benchmarks.scale", *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_quick_run_prints_tables_and_can_be_asked_again_about_another_network(
    tmp_path: Path,
) -> None:
    kept = tmp_path / "measured.json"
    printed = scale("--quick", "--json", str(kept))
    for words in ("| 64 |", "100 means", "1,024", "16,384", "ring", "tree"):
        assert words in printed
    results = Results.load(kept)
    assert {row.ranks for row in results.steady} == {16, 64}
    copy = tmp_path / "copy.json"
    again = scale("--from", str(kept), "--latency", "1", "--bandwidth", "400", "--json", str(copy))
    assert "1 µs, 400 Gbit/s" in again
    assert json.loads(copy.read_text()) == json.loads(kept.read_text())
