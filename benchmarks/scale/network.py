"""How long collectives take on a network: a model, with latency, bandwidth and arithmetic.

A message of n bytes takes `latency + n * byte`, whoever sends it and whatever else is under way;
reducing n bytes takes `n * arithmetic`. With p ranks and n bytes handed in by each (Thakur,
Rabenseifner and Gropp, "Optimization of Collective Communication Operations in MPICH", IJHPCA 19,
2005; the ring all-reduce is Patarasuk and Yuan's, JPDC 69, 2009):

    ring  all-gather   (p - 1) (latency + n byte)
          all-reduce   2 (p - 1) latency + 2 (p - 1)/p n byte + (p - 1)/p n arithmetic
    tree  all-gather   lg p latency + (p - 1) n byte                      recursive doubling
          all-reduce   the lesser of
                       lg p (latency + n byte + n arithmetic)             recursive doubling
                       2 lg p latency + 2 (p - 1)/p n byte + (p - 1)/p n arithmetic    halving

lg p is rounded up: a number of ranks that is no power of two takes one more step.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

__all__ = ["TCP", "Algorithm", "Collective", "Network", "seconds"]


class Algorithm(str, Enum):
    """How a collective goes about it."""

    RING = "ring"
    TREE = "tree"


@dataclass(frozen=True, slots=True)
class Collective:
    """One collective, as a rank sees it: whether it gathers or reduces, bytes handed in and got back."""

    gathers: bool
    sent: int
    received: int


@dataclass(frozen=True, slots=True)
class Network:
    """Seconds of a message however short, and bytes a second that a rank sends and adds up."""

    latency: float
    bandwidth: float
    arithmetic: float = 10e9

    def __str__(self) -> str:
        return f"{self.latency * 1e6:g} µs, {self.bandwidth * 8 / 1e9:g} Gbit/s"


TCP = Network(30e-6, 25e9 / 8)


def seconds(
    collectives: Iterable[Collective], ranks: int, algorithm: Algorithm, network: Network
) -> float:
    """Return how long `collectives` take, one after the other."""
    return sum(_one(one.gathers, one.sent, ranks, algorithm, network) for one in collectives)


def _one(gathers: bool, size: int, ranks: int, algorithm: Algorithm, network: Network) -> float:
    latency, byte, add = network.latency, 1 / network.bandwidth, 1 / network.arithmetic
    ring, doublings = ranks - 1, (ranks - 1).bit_length()
    if gathers:
        steps = ring if algorithm is Algorithm.RING else doublings
        return steps * latency + ring * size * byte
    scattered = ring / ranks * size * (2 * byte + add)
    if algorithm is Algorithm.RING:
        return 2 * ring * latency + scattered
    return min(doublings * (latency + size * (byte + add)), 2 * doublings * latency + scattered)
