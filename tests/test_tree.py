"""Ranks that merge pairwise: every rank's vector goes in once, in rank order, and all get the same bits."""

from __future__ import annotations

import numpy as np
import pytest
from blocks import block, bracketed, joined, ranks_of
from ranks import run_threads

from metricfold.communicator import Communicator, LocalCommunicator
from metricfold.communicator.tree import rounds_of, senders, steps


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
    assert ranks_of(np.frombuffer(results[0][0])) == list(range(world_size))


def test_a_tree_is_one_collective_and_none_in_a_world_of_one() -> None:
    def count(communicator: Communicator) -> int:
        communicator.tree(np.ones(3), np.add)
        return communicator.collectives

    assert run_threads(count, 3) == [1] * 3
    local = LocalCommunicator()
    vector = np.ones(3)
    assert local.tree(vector, np.add) is vector
    assert local.collectives == 0
