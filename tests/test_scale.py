"""Simulated worlds of ranks are what real ones are, and the model of the network is its formula."""

from __future__ import annotations

from threading import Lock
from typing import Any

import numpy as np
import pytest
from benchmarks.__main__ import SUBJECTS, complaints
from benchmarks.ranks import run_threads
from benchmarks.scale import in_steady_state, measure
from benchmarks.scale.world import (
    BANDWIDTH,
    LATENCY,
    Exchange,
    Log,
    SimulatedCommunicator,
    logs_of,
)
from benchmarks.workloads import batches, large, small

from metricfold import Metric, MetricsAggregator
from metricfold.communicator import Communicator
from metricfold.communicator.tree import rounds_of

REAL = 3
MEANS, MIXTURE = small(100), large(datasets=2, window=8)
GATHER, TREE = "gather", "tree"

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
@pytest.mark.parametrize("route", [GATHER, TREE])
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


@pytest.mark.parametrize("real", [1, 2, 3, 5])
def test_a_gather_and_a_tree_speak_of_the_whole_world_in_the_order_of_its_ranks(real: int) -> None:
    def on_rank(communicator: Communicator) -> list[Any]:
        vector = np.array([communicator.rank + 1.0, 1.0])
        return [
            communicator.all_gather(vector).tolist(),
            # The lowest rank's first number, and how many ranks there are.
            communicator.tree(vector, lambda low, high: np.array([low[0], low[1] + high[1]])),
            # Decimal digits, in order.
            communicator.tree(
                np.array([vector[0], 1.0]),
                lambda low, high: np.array([low[0] * 10 ** high[1] + high[0], low[1] + high[1]]),
            ),
            communicator.all_gather_bytes(
                b"ab"[: communicator.rank + 1], [1, *[2] * (real - 1), *[0] * (8 - real)]
            ),
        ]

    whose = [rank % real + 1 for rank in range(8)]
    for rows, counted, digits, texts in simulate(8, on_rank, real=real):
        assert rows == [[number, 1] for number in whose]
        assert counted.tolist() == [1, 8]
        assert digits.tolist() == [int("".join(map(str, whose))), 8]
        assert texts == [b"a", *[b"ab"] * (real - 1), *[b""] * (8 - real)]


def test_what_a_rank_raises_ends_the_world() -> None:
    def fails(communicator: Communicator) -> None:
        if communicator.rank == 1:
            raise ValueError("rank 1 is at its end")

    with pytest.raises(ValueError, match="rank 1 is at its end"):
        simulate(4, fails, real=2)


# -- What a rank sends ---------------------------------------------------------------------------


def first_log(workload: Any, route: str, ranks: int) -> Log:
    log: Log = run_threads(logs_of, 2, workload, route, ranks, 1, Lock())[0][0]
    return log


def test_what_a_rank_gathers_grows_with_the_ranks_and_what_a_tree_brings_with_its_rounds() -> None:
    few, many = (in_steady_state(MIXTURE, GATHER, ranks, 1).exchange for ranks in (16, 64))
    assert many == Exchange(63, few.size, 64 * few.size)
    # Points travel as points until a sketch takes fewer places: here it does.
    distributions = large(datasets=2, window=1000)
    few, many = (in_steady_state(distributions, TREE, ranks, 1).exchange for ranks in (16, 64))
    assert many == Exchange(len(rounds_of(64)), many.size, 6 * many.size)
    # But for the bits that say which ranks are there.
    assert few.size <= many.size <= 1.01 * few.size


def test_a_log_in_the_steady_state_is_one_exchange_and_takes_time() -> None:
    for route in (GATHER, TREE):
        log = in_steady_state(MEANS, route, 16, 2)
        assert len(log.exchanges) == 1
        assert log.cpu > 0
        assert log.dict > 0
        assert log.seconds == pytest.approx(log.cpu + log.dict + log.exchange.seconds)


def test_equal_news_travel_once() -> None:
    header, news, *_ = first_log(MIXTURE, TREE, 16).exchanges
    assert header.rounds == 15
    assert header.received == 16 * header.size
    assert header.size < 300
    assert news.rounds == 4
    assert first_log(MIXTURE, TREE, 64).exchanges[1].size == news.size


# -- The model -----------------------------------------------------------------------------------


def test_rounds_last_one_after_the_other_as_the_formula_says() -> None:
    one = Exchange(3, 1000, 4000)
    assert one.seconds == pytest.approx(3 * (LATENCY + 1000 / BANDWIDTH))
    log = Log([one, one], 2.0, 0.5, 1)
    assert log.seconds == pytest.approx(2.5 + 2 * one.seconds)
    with pytest.raises(ValueError, match="too many values"):
        log.exchange  # noqa: B018


def test_a_quick_run_shows_both_routes_and_holds_the_largest_world_to_its_budgets() -> None:
    sections = measure(quick=True)
    assert complaints(SUBJECTS["scale"], sections) == []
    budget, table = sections
    limits = [row.budget and row.budget.limit for row in budget.rows]
    assert limits == [100, 6, 100, 6, None]
    assert [row.figure for row in budget.rows if row.budget and row.budget.limit == 6] == [6, 6]
    routes = {(line[0], line[1]) for line in table.lines if len(line) > 1}
    assert routes == {(ranks, route) for ranks in ("16", "64") for route in (GATHER, TREE)}
