"""Who meets whom when ranks merge what they hold pairwise, in about log2 W rounds.

    round 0          where W is no power of two, 2^d + extra: among the first 2 * extra ranks the upper
                     one of each two neighbours hands in what it has; 2^d ranks go on
    rounds 1 ... d   partners swap, and both merge: neighbours first, then neighbouring pairs, ...
    round d + 1      those that handed in get the result

    5 ranks:    0 <- 1   2   3   4  |  0 - 2   3 - 4  |  0 - 3   2 - 4  |  0 -> 1

Every merge joins two neighbouring blocks of ranks, of which one holds the lower ranks. So whoever merges
the rows of a gather in the same bracketing gets the same bits, and "the first of equal ones" is the
lowest rank.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple, TypeAlias

from metricfold._core.fold.sample import FloatArray

__all__ = ["Merge", "Step", "first_sent", "rounds_of", "senders", "steps"]

Merge: TypeAlias = Callable[[FloatArray, FloatArray], FloatArray]
"""Merges the vectors of two neighbouring blocks of ranks, that of the lower ranks first."""


class Step(NamedTuple):
    """What one rank does in one round."""

    round: int
    partner: int
    lower: bool  # whether this rank holds the lower ranks of the two
    sends: bool = True
    receives: bool = True
    merges: bool = True  # else what it gets is the result

    def after(self, held: FloatArray, got: FloatArray, merge: Merge) -> FloatArray:
        """Return what this rank holds once it has received `got`."""
        if not self.merges:
            return got
        return merge(held, got) if self.lower else merge(got, held)


def rounds_of(world_size: int) -> range:
    """Return the numbers of the rounds."""
    depth = world_size.bit_length() - 1
    return range(1, depth + 1) if world_size == 1 << depth else range(depth + 2)


def steps(rank: int, world_size: int) -> list[Step]:
    """Return what `rank` does, round by round; in a round that is left out it has nothing to do."""
    depth = world_size.bit_length() - 1
    extra = world_size - (1 << depth)
    if rank < 2 * extra and rank % 2:
        hands_in = Step(0, rank - 1, lower=False, receives=False)
        return [hands_in, Step(depth + 1, rank - 1, lower=False, sends=False, merges=False)]
    joined = rank < 2 * extra
    place = rank // 2 if joined else rank - extra
    found = [Step(0, rank + 1, lower=True, sends=False)] if joined else []
    for bit in range(depth):
        other = place ^ (1 << bit)
        partner = 2 * other if other < extra else other + extra
        found.append(Step(bit + 1, partner, lower=place < other))
    if joined:
        found.append(Step(depth + 1, rank + 1, lower=True, receives=False))
    return found


@cache
def senders(world_size: int) -> dict[int, tuple[tuple[int, int], ...]]:
    """Return who sends to whom in each round, the same on all ranks."""
    found: dict[int, list[tuple[int, int]]] = {number: [] for number in rounds_of(world_size)}
    for rank in range(world_size):
        for step in steps(rank, world_size):
            if step.sends:
                found[step.round].append((rank, step.partner))
    return {number: tuple(pairs) for number, pairs in found.items()}


def first_sent(rank: int, world_size: int) -> int:
    """Return the round in which `rank` sends for the first time."""
    return next(step.round for step in steps(rank, world_size) if step.sends)
