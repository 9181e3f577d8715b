"""How vectors travel between ranks: two ways to the same result.

`gather`: one all-gather, so that every rank sees what each rank sent. `tree`: merged pairwise on the
way, so that what a rank sends and receives hardly grows with their number. Which one is taken follows
from the agreed schema and the world size alone, so that all ranks take the same.
"""

from __future__ import annotations

from collections.abc import Sequence

from metricfold._core.exchange.gather import Gather
from metricfold._core.exchange.tree import Tree
from metricfold._core.fold.sample import FloatArray
from metricfold._core.reduce.header import RouteChoice
from metricfold._core.reduce.reducer import Arrived
from metricfold._core.reduce.schema import Schema
from metricfold._core.reduce.wire import Wire
from metricfold.communicator.base import Communicator

__all__ = ["Exchange", "Gather", "Tree"]

_MOST_GATHERED = 4 * 2**20
"""Bytes of all ranks together, beyond which they are merged on the way."""


class Exchange:
    """Carries what a reduction sends.

    Args:
        communicator: connects the ranks.
        wanted: the route that the caller wants.

    Attributes:
        rank: this rank.
        world_size: the number of ranks.
        wanted: the route that the caller wants.
    """

    def __init__(self, communicator: Communicator, wanted: RouteChoice) -> None:
        self.rank, self.world_size = communicator.rank, communicator.world_size
        self.wanted = wanted
        self._communicator = communicator
        self._route: Gather | Tree | None = None

    def wire(self, schema: Schema) -> Wire:
        """Return how a rank's vector is laid out now."""
        return self._taken(schema).wire

    def vectors(self, schema: Schema, header: FloatArray, vector: FloatArray) -> Arrived:
        """Take part in an exchange of vectors."""
        return self._taken(schema).exchange(self._communicator, header, vector)

    def gathered(self, data: bytes, sizes: Sequence[int]) -> list[bytes]:
        """Return everyone's bytes, of which all know how many there are."""
        return self._communicator.all_gather_bytes(data, sizes)

    def _taken(self, schema: Schema) -> Gather | Tree:
        if self._route is None or self._route.wire.schema is not schema:
            self._route = self._chosen(schema)
        return self._route

    def _chosen(self, schema: Schema) -> Gather | Tree:
        gather = Gather(schema, self.world_size)
        # Before they have agreed on anything, ranks do not know what the others want either.
        if self.wanted is RouteChoice.GATHER or not schema.entries:
            return gather
        small = self.world_size == 1 or 8 * gather.wire.size * self.world_size <= _MOST_GATHERED
        if self.wanted is RouteChoice.AUTO and small:
            return gather
        return Tree(schema, self.world_size)
