"""Ranks that merge pairwise: every rank's vector goes in once, in rank order, and all get the same bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ranks import run_threads

from metricfold.communicator import Communicator, LocalCommunicator
from metricfold.communicator.tree import rounds_of, senders, steps


def block(rank: int, world_size: int) -> Any:
    """Return a vector that holds a number, which ranks it is made of, and how they were joined."""
    vector = np.full(3 + 2 * world_size, -1.0)
    vector[:4] = 10.0 ** (7 * (rank % 5)) / 3.0, 1.0, 1.0, rank
    return vector


def joined(lower: Any, upper: Any) -> Any:
    """Append the upper block's ranks and brackets to the lower one's; add the numbers, which rounds."""
    world_size = (lower.size - 3) // 2
    result = np.full(lower.size, -1.0)
    ranks = [v[3 : 3 + int(v[1])] for v in (lower, upper)]
    brackets = [v[3 + world_size : 2 + world_size + int(v[1])] for v in (lower, upper)]
    result[0] = lower[0] + upper[0]
    result[1] = lower[1] + upper[1]
    result[2] = 0.5 * lower[2] + 0.25 * upper[2]
    result[3 : 3 + int(result[1])] = np.concatenate(ranks)
    # Between any two neighbours: how many ranks had come together when these were joined.
    both = [*brackets[0], result[1], *brackets[1]]
    result[3 + world_size : 3 + world_size + len(both)] = both
    return result


def bracketed(rows: list[Any], merge: Any) -> Any:
    """Merge rows as a gather does: neighbours among the first until a power of two is left."""
    extra = len(rows) - (1 << (len(rows).bit_length() - 1))
    rows = [merge(*rows[at : at + 2]) for at in range(0, 2 * extra, 2)] + rows[2 * extra :]
    while len(rows) > 1:
        rows = [merge(*rows[at : at + 2]) for at in range(0, len(rows), 2)]
    return rows[0]


@pytest.mark.parametrize("world_size", range(1, 41))
def test_every_vector_goes_in_once_in_rank_order_and_everybody_gets_the_result(
    world_size: int,
) -> None:
    held = [(rank,) for rank in range(world_size)]
    whole = tuple(range(world_size))
    todo = [{step.round: step for step in steps(rank, world_size)} for rank in range(world_size)]
    for number in rounds_of(world_size):
        sent = {
            (rank, todo[rank][number].partner): held[rank]
            for rank, _ in senders(world_size)[number]
        }
        assert set(sent) == set(senders(world_size)[number])
        for rank in range(world_size):
            step = todo[rank].pop(number, None)
            if step is None or not step.receives:
                continue
            got = sent.pop((step.partner, rank))
            held[rank] = step.after(held[rank], got, lambda lower, upper: lower + upper)  # type: ignore[arg-type, return-value, assignment]
            assert held[rank] == whole[held[rank][0] : held[rank][-1] + 1]
        assert not sent, "what is sent is received in the same round"
    assert held == [whole] * world_size
    assert not any(todo)


@pytest.mark.parametrize("world_size", [1, 2, 4, 8, 1024])
def test_a_power_of_two_takes_log2_rounds(world_size: int) -> None:
    assert len(rounds_of(world_size)) == world_size.bit_length() - 1


@pytest.mark.parametrize("world_size", [3, 5, 6, 7, 12, 1000])
def test_other_worlds_take_two_rounds_more(world_size: int) -> None:
    assert len(rounds_of(world_size)) == world_size.bit_length() + 1
    assert max(step.round for step in steps(0, world_size)) < 64


@pytest.mark.parametrize("world_size", range(1, 18))
def test_threads_get_the_bits_that_a_gather_merges(world_size: int) -> None:
    def both(communicator: Communicator) -> tuple[bytes, bytes]:
        mine = block(communicator.rank, world_size)
        gathered = bracketed(list(communicator.all_gather(mine)), joined)
        return communicator.tree(mine, joined).tobytes(), gathered.tobytes()

    results = run_threads(both, world_size)
    assert {bits for pair in results for bits in pair} == {results[0][0]}
    merged = np.frombuffer(results[0][0])
    assert merged[3 : 3 + world_size].tolist() == list(range(world_size))


def test_a_tree_is_one_collective_and_none_in_a_world_of_one() -> None:
    def count(communicator: Communicator) -> int:
        communicator.tree(np.ones(3), np.add)
        return communicator.collectives

    assert run_threads(count, 3) == [1] * 3
    local = LocalCommunicator()
    vector = np.ones(3)
    assert local.tree(vector, np.add) is vector
    assert local.collectives == 0
