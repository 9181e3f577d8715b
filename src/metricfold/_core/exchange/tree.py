"""The tree: vectors are merged pairwise on the way, in rounds of which no rank ends one early.

So whether all agree is seen when everything has been merged, never between; what no rank sends is
merged too, and judged then.
"""

from __future__ import annotations

import numpy as np

from metricfold._core.fold.sample import FloatArray
from metricfold._core.reduce.header import Field
from metricfold._core.reduce.reducer import Arrived, Merged
from metricfold._core.reduce.schema import Schema
from metricfold._core.reduce.wire import Wire
from metricfold.communicator.base import Communicator

__all__ = ["Tree"]

_WRONG = (
    "a rank sent numbers that no rank sends, or that contradict its header; where they are merged on "
    "the way nobody knows which. Nothing was reduced; route='gather' names it"
)


class Tree:
    """One merge on the way; what a rank sends hardly grows with the number of ranks."""

    def __init__(self, schema: Schema, world_size: int) -> None:
        self.wire = Wire(schema, world_size, joining=True)

    def exchange(
        self, communicator: Communicator, header: FloatArray, vector: FloatArray
    ) -> Arrived:
        """Send `vector`, of which this writes the head."""
        wire = self.wire
        wire.head(vector, header)
        vector = communicator.tree(vector, self._merge)
        agreed = wire.agreed(vector)
        # Who objects, and how large everyone's results without lanes are, all have to be told.
        headers = None
        if not agreed or wire.schema.has_custom:
            headers = communicator.all_gather(header)
        if not agreed:
            return Arrived(headers, None)
        whole = vector[np.newaxis]
        if wire.wrong(whole, np.array([0]), np.array([communicator.world_size])).any():
            return Arrived(headers, None, _WRONG)
        merged = Merged(
            wire.totals(vector),
            wire.own(vector),
            wire.recent(whole),
            wire.attendance(vector),
            sink_failed=bool(vector[Field.SINK_FAILED]),
            found=float(vector[Field.ALERTS]),
        )
        return Arrived(headers, merged)

    def _merge(self, lower: FloatArray, upper: FloatArray) -> FloatArray:
        merged: FloatArray = self.wire.pairs(lower[np.newaxis], upper[np.newaxis])[0]
        return merged
