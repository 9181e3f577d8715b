"""Vectors that say how they were merged: which ranks are in them, in which order, and how joined."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

__all__ = ["block", "bracketed", "joined", "ranks_of"]


def block(rank: int, world_size: int) -> Any:
    """Return what one rank brings: a number, how many ranks, a number, the ranks, how joined."""
    vector = np.full(3 + 2 * world_size, -1.0)
    vector[:4] = 10.0 ** (7 * (rank % 5)) / 3.0, 1.0, 1.0, rank
    return vector


def joined(lower: Any, upper: Any) -> Any:
    """Append the upper block to the lower one; the numbers are added, which rounds, and weighed."""
    world_size = (lower.size - 3) // 2
    result = np.full(lower.size, -1.0)
    brackets = [v[3 + world_size : 2 + world_size + int(v[1])] for v in (lower, upper)]
    result[:2] = lower[:2] + upper[:2]
    result[2] = 0.5 * lower[2] + 0.25 * upper[2]
    ranks = [*ranks_of(lower), *ranks_of(upper)]
    result[3 : 3 + len(ranks)] = ranks
    # Between any two neighbours: how many ranks had come together when these were joined.
    between = [*brackets[0], result[1], *brackets[1]]
    result[3 + world_size : 3 + world_size + len(between)] = between
    return result


def ranks_of(vector: Any) -> list[int]:
    """Return the ranks that have been merged, in the order in which they were."""
    return [int(rank) for rank in vector[3 : 3 + int(vector[1])]]


def bracketed(rows: Sequence[Any], merge: Callable[[Any, Any], Any]) -> Any:
    """Merge rows as a gather does: neighbours among the first until a power of two is left."""
    rows = list(rows)
    extra = len(rows) - (1 << (len(rows).bit_length() - 1))
    rows = [merge(*rows[at : at + 2]) for at in range(0, 2 * extra, 2)] + rows[2 * extra :]
    while len(rows) > 1:
        rows = [merge(*rows[at : at + 2]) for at in range(0, len(rows), 2)]
    return rows[0]
