"""The gather: one all-gather of everyone's vectors, which are merged where they arrive."""

from __future__ import annotations

import numpy as np

from metricfold._core.fold.sample import FloatArray
from metricfold._core.reduce.header import HEADER_SIZE, Field
from metricfold._core.reduce.reducer import Arrived, Merged
from metricfold._core.reduce.schema import Schema
from metricfold._core.reduce.wire import Wire
from metricfold.communicator.base import Communicator

__all__ = ["Gather"]


class Gather:
    """One collective; all see what each rank has sent."""

    def __init__(self, schema: Schema, world_size: int) -> None:
        self.wire = Wire(schema, world_size, joining=False)

    def exchange(
        self, communicator: Communicator, header: FloatArray, vector: FloatArray
    ) -> Arrived:
        """Send `vector`, of which this writes the head."""
        wire = self.wire
        wire.head(vector, header)
        rows = np.require(communicator.all_gather(vector), requirements="W")
        wire.sign(rows)
        headers, ranks = rows[:, :HEADER_SIZE], np.arange(len(rows))
        vector = wire.merged(rows[:, wire.lanes])
        if not wire.agreed(vector):
            return Arrived(headers, None)
        bad = wire.wrong(rows, ranks, ranks + 1)
        if bad.any():
            return Arrived(headers, None, _wrong(np.flatnonzero(bad).tolist()))
        merged = Merged(
            wire.totals(vector),
            wire.rows(rows),
            wire.recent(rows),
            sink_failed=bool(vector[Field.SINK_FAILED]),
            found=float(vector[Field.ALERTS]),
        )
        return Arrived(headers, merged)


def _wrong(ranks: list[int]) -> str:
    return (
        f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))} sent numbers that no rank "
        "sends: counts that are none, or values that are no numbers. Nothing was reduced; look after "
        "that rank's machine"
    )
