"""Simulated worlds of ranks are what real ones are, and the model of the network is its formulae."""

from __future__ import annotations

from threading import Lock
from typing import Any

import numpy as np
import pytest
from benchmarks.__main__ import SUBJECTS, complaints
from benchmarks.ranks import run_threads
from benchmarks.scale import in_steady_state, lasts, measure, simulated
from benchmarks.scale.network import TCP, Algorithm, Collective, Network, seconds
from benchmarks.scale.world import Log, SimulatedCommunicator
from benchmarks.workloads import batches, large, mixed, small

from metricfold import Metric, MetricsAggregator
from metricfold.communicator import Communicator

REAL = 3
MEANS, MIXTURE = small(100), large(datasets=2, window=8)
NARROW, WIDE = "gather", "tree"

# -- Simulated worlds are what real ones are -----------------------------------------------------


def in_a_world(inner: Communicator, ranks: int, turn: Lock, function: Any, *args: Any) -> Any:
    with turn:
        return function(SimulatedCommunicator(inner, ranks, turn), *args)


def simulate(ranks: int, function: Any, *args: Any, real: int = REAL) -> list[Any]:
    return run_threads(in_a_world, real, ranks, Lock(), function, *args)


def logged(communicator: Communicator, workload: Any, route: str, own: bool = False) -> Any:
    """Log three times; every rank has the values of rank % REAL."""
    aggregator = MetricsAggregator(workload.window, communicator=communicator, route=route)
    for number in range(3):
        for batch in batches(workload, communicator.rank % REAL, number):
            aggregator.update(batch)
        if own:
            aggregator.update(
                [Metric("own", "kind", f"rank {communicator.rank}", "categorical_count")]
            )
        snapshot = aggregator.reduce()
    return aggregator.collectives, [snapshot.as_dict("t", window) for window in ("run", "interval")]


@pytest.mark.parametrize("ranks", [16, 64])
@pytest.mark.parametrize("route", [NARROW, WIDE])
@pytest.mark.parametrize("workload", [MEANS, MIXTURE], ids=["means", "mixture"])
def test_a_simulated_world_gives_what_threads_give(workload: Any, route: str, ranks: int) -> None:
    ours, values = simulate(ranks, logged, workload, route)[0]
    theirs, real = run_threads(logged, ranks, workload, route)[0]
    assert ours == theirs
    for simulated_values, real_values in zip(values, real, strict=True):
        assert simulated_values == pytest.approx(real_values, rel=1e-12)


def test_news_of_real_ranks_alone_reach_everyone() -> None:
    _, (values, _) = simulate(64, logged, MIXTURE, "auto", True, real=5)[0]
    own = {key: value for key, value in values.items() if "t_own/kind_count_rank" in key}
    # 64 ranks repeat 5: rank 0 is there 13 times, rank 4 is there 12 times; each logs three times.
    assert own == {f"t_own/kind_count_rank {rank}": 3 * (13.0 - (rank == 4)) for rank in range(5)}


def test_a_gather_and_a_tree_speak_of_the_whole_world() -> None:
    def on_rank(communicator: Communicator) -> list[Any]:
        vector = np.array([communicator.rank + 1.0, -communicator.rank])
        return [
            communicator.all_gather(vector).tolist(),
            communicator.tree(vector, np.add).tolist(),
            communicator.tree(vector, np.maximum).tolist(),
            communicator.all_gather_bytes(b"ab"[: communicator.rank + 1], [1, 2, 0, 0, 0]),
        ]

    for rows, total, largest, texts in simulate(5, on_rank, real=2):
        assert rows == [[1, 0], [2, -1], [1, 0], [2, -1], [1, 0]]
        assert total == [7, -2]
        assert largest == [2, 0]
        assert texts == [b"a", b"ab", b"", b"", b""]


def test_what_a_rank_raises_ends_the_world() -> None:
    def fails(communicator: Communicator) -> None:
        if communicator.rank == 1:
            raise ValueError("rank 1 is at its end")

    with pytest.raises(ValueError, match="rank 1 is at its end"):
        simulate(4, fails, real=2)


# -- What a rank sends ---------------------------------------------------------------------------


def logs(workload: Any, route: str, ranks: int) -> list[Log]:
    found = simulated(workload, route, ranks, 1)
    assert isinstance(found, list)
    return found


def test_what_a_rank_sends_depends_on_the_metrics_alone() -> None:
    for route in (NARROW, WIDE):
        few, many = (in_steady_state(logs(MIXTURE, route, ranks)) for ranks in (256, 512))
        assert len(few.collectives) == 1
        assert few.sent == pytest.approx(many.sent, rel=1e-2)  # bits of ranks are counts by then
    narrow = in_steady_state(logs(MIXTURE, NARROW, 64))
    assert narrow.received == 64 * narrow.sent
    assert narrow.memory >= narrow.received


def test_a_hundred_means_are_as_many_bytes_as_the_page_says() -> None:
    log = in_steady_state(logs(MEANS, NARROW, 16))
    # A header of 20 numbers, nine of them once more negated, and four lanes for each of the means.
    assert log.sent == 8 * (29 + 4 * 100)
    assert log.cpu > 0
    assert log.dict > 0


def test_what_would_be_too_much_to_gather_is_told_by_its_bytes() -> None:
    sent = logs(MIXTURE, NARROW, 16)[-1].sent
    assert simulated(MIXTURE, NARROW, 2**20, 1) == 2**20 * sent


def test_equal_news_travel_once() -> None:
    header, news, *_ = logs(MIXTURE, WIDE, 16)[0].collectives
    assert header == Collective(gathers=True, sent=8 * 29, received=16 * 8 * 29)
    assert not news.gathers
    assert logs(MIXTURE, WIDE, 64)[0].collectives[1] == news


def test_unbounded_distributions_send_the_same_however_many_values_came_in() -> None:
    few, many = (logs(mixed(4, 2, samples, None), WIDE, 16)[-1] for samples in (1100, 3000))
    assert many.collectives == few.collectives


# -- The model -----------------------------------------------------------------------------------

# A message takes a second, and a byte of it another; adding two bytes takes a second.
SLOW = Network(latency=1.0, bandwidth=1.0, arithmetic=2.0)


@pytest.mark.parametrize(
    ("gathers", "algorithm", "ranks", "size", "expected"),
    [
        (True, Algorithm.RING, 4, 10, 3 * (1 + 10)),
        (True, Algorithm.TREE, 4, 10, 2 * 1 + 3 * 10),
        (True, Algorithm.TREE, 5, 10, 3 * 1 + 4 * 10),
        (False, Algorithm.RING, 4, 8, 6 * 1 + 2 * 6 + 3),
        # Long vectors: halving, then doubling.
        (False, Algorithm.TREE, 4, 8, 4 * 1 + 2 * 6 + 3),
        # Short ones: doubling alone, 2 (1 + 1 + 1/2) against 4 + 1.5 + 3/8.
        (False, Algorithm.TREE, 4, 1, 5),
        (True, Algorithm.RING, 1, 10, 0),
        (False, Algorithm.TREE, 1, 10, 0),
    ],
)
def test_collectives_last_as_long_as_the_formulae_say(
    gathers: bool, algorithm: Algorithm, ranks: int, size: int, expected: float
) -> None:
    one = Collective(gathers, size, size)
    assert seconds([one], ranks, algorithm, SLOW) == pytest.approx(expected)
    assert seconds([one, one], ranks, algorithm, SLOW) == pytest.approx(2 * expected)


def test_a_log_lasts_what_was_measured_of_a_rank_and_the_model_of_the_network() -> None:
    gather = [Collective(True, 1000, 16_000)]
    timed = [Log(gather, cpu, 2.0, 0, 1) for cpu in (9.0, 9.0, 1.0, 5.0, 3.0)]
    steady = in_steady_state([*timed, Log(gather, 90.0, 90.0, 77, 1)])
    assert (steady.cpu, steady.dict, steady.memory) == (3.0, 2.0, 77)
    network = seconds(gather, 16, Algorithm.RING, TCP)
    assert lasts(steady, 16, Algorithm.RING) == pytest.approx(5.0 + network)


def test_a_quick_run_shows_both_routes_and_holds_the_largest_world_to_its_budget() -> None:
    sections = measure(quick=True)
    assert complaints(SUBJECTS["scale"], sections) == []
    budget, later, first = sections
    assert [row.budget is None for row in budget.rows] == [False, True, False, True]
    for section in (later, first):
        routes = {(line[0], line[1]) for line in section.lines if len(line) > 1}
        assert routes == {(ranks, route) for ranks in ("16", "64") for route in (NARROW, WIDE)}
