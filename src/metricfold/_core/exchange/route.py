"""How vectors travel between ranks: two ways to the same result.

*Gather*: one all-gather; all see what each rank has sent, and merge it where it arrives. *Tree*: merged
pairwise on the way, so that what a rank sends and receives hardly grows with their number; no rank ends
a round early, so whether all agree is seen when everything has been merged. Which one is taken follows
from the agreed schema and the world size alone, so that all ranks take the same.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from metricfold._core.fold.sample import FloatArray
from metricfold._core.reduce.header import HEADER_SIZE, RouteChoice, name_ranks
from metricfold._core.reduce.schema import Schema
from metricfold._core.reduce.wire import Merged, Wire
from metricfold.communicator.base import Communicator

__all__ = ["Arrived", "Exchange"]

_MOST_GATHERED = 4 * 2**20
"""Bytes of all ranks together, beyond which they are merged on the way."""
_WRONG_SOMEWHERE = (
    "a rank sent numbers that no rank sends, or that contradict its header; where they are merged on "
    "the way nobody knows which. Nothing was reduced; route='gather' names it"
)
_WRONG = (
    "{} sent numbers that no rank sends: counts that are none, or values that are no numbers. Nothing "
    "was reduced; look after that rank's machine"
)


class Arrived(NamedTuple):
    """What an exchange came to.

    Args:
        headers: everyone's, shape (world_size, HEADER_SIZE), if they have been gathered.
        merged: what has been merged; None if some rank has failed or has new entries, or they do not agree.
        wrong: what no rank sends among what has arrived, which all ranks see alike.
    """

    headers: FloatArray | None
    merged: Merged | None
    wrong: str = ""


class Exchange:
    """Carries what a reduction sends, each call in the same order on all ranks.

    Args:
        communicator: connects the ranks.
        wanted: the route that the caller wants.
    """

    def __init__(self, communicator: Communicator, wanted: RouteChoice) -> None:
        self.rank, self.world_size = communicator.rank, communicator.world_size
        self.wanted = wanted
        self.gathered = communicator.all_gather_bytes
        self._communicator = communicator
        self._wire: Wire | None = None

    def wire(self, schema: Schema) -> Wire:
        """Return how a rank's vector is laid out now, the same on all ranks."""
        if self._wire is None or self._wire.schema is not schema:
            wire = Wire(schema, self.world_size, joining=False)
            # Before they have agreed on anything, ranks do not know what the others want either.
            if schema.entries and self.wanted is not RouteChoice.GATHER:
                small = 8 * wire.size * self.world_size <= _MOST_GATHERED
                if self.wanted is RouteChoice.TREE or not (small or self.world_size == 1):
                    wire = Wire(schema, self.world_size, joining=True)
            self._wire = wire  # not before it is the one: an error in between would leave another
        return self._wire

    def vectors(self, schema: Schema, header: FloatArray, vector: FloatArray) -> Arrived:
        """Send this rank's vector, of which this writes the head."""
        wire = self.wire(schema)
        wire.head(vector, header)
        if wire.joining:
            rows = self._communicator.tree(vector, wire.pair)[np.newaxis]
            whole = rows[0]
        else:
            rows = np.require(self._communicator.all_gather(vector), requirements="W")
            wire.sign(rows)
            whole = wire.merged(rows[:, wire.lanes])
        agreed = wire.agreed(whole)
        headers = None if wire.joining else rows[:, :HEADER_SIZE]
        # Who objects, and how large everyone's results without lanes are, all have to be told.
        if headers is None and (not agreed or schema.has_custom):
            headers = self._communicator.all_gather(header)
        if not agreed:
            return Arrived(headers, None)
        bad = np.flatnonzero(wire.wrong(rows)).tolist()
        if bad:
            wrong = _WRONG_SOMEWHERE if wire.joining else _WRONG.format(name_ranks(bad))
            return Arrived(headers, None, wrong)
        return Arrived(headers, wire.read(rows, whole))
