"""Reduced results that go on accumulating: the run, and the interval that is still open.

Both are values: adding to one gives a new one, so a `Snapshot` may keep what it was given.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from metricfold.handlers import FloatArray
from metricfold.packing import Schema, digest

__all__ = ["Rows", "Totals"]

IntArray = npt.NDArray[np.int64]
NOBODY = -1


@dataclass(frozen=True, slots=True)
class Rows:
    """What each rank contributed: one row a rank, in the lanes of a schema."""

    schema: Schema
    sums: FloatArray
    maxs: FloatArray

    def moved(self, schema: Schema) -> Rows:
        """Return the same in the lanes of a larger schema."""
        if schema is self.schema:
            return self
        sums = np.zeros((self.sums.shape[0], schema.sum_width))
        maxs = np.full((self.maxs.shape[0], schema.max_width), -np.inf)
        sum_lanes, max_lanes = schema.lanes_from(self.schema)
        sums[:, sum_lanes], maxs[:, max_lanes] = self.sums, self.maxs
        return Rows(schema, sums, maxs)

    def plus(self, other: Rows) -> Rows:
        return Rows(self.schema, self.sums + other.sums, np.maximum(self.maxs, other.maxs))

    def merged(self, seconds: float) -> Totals:
        """Merge the rows, in rank order, so that every rank comes to the same bits."""
        sums: FloatArray = np.add.reduce(self.sums, axis=0)
        maxs: FloatArray = np.maximum.reduce(self.maxs, axis=0)
        owners = np.argmax(self.maxs, axis=0)
        return Totals(self.schema, sums, np.zeros(sums.size), maxs, owners, seconds)


@dataclass(frozen=True, slots=True)
class Totals:
    """Lanes merged over ranks and over reductions, the same on every rank.

    Args:
        schema: where each key's lanes stand.
        sums: SUM lanes.
        lost: what rounding has taken from `sums` so far (Neumaier's compensated sum).
        maxs: MAX lanes.
        owners: the rank that each MAX lane came from, or -1.
        seconds: wall time, by the slowest rank's clock in each interval.
    """

    schema: Schema
    sums: FloatArray
    lost: FloatArray
    maxs: FloatArray
    owners: IntArray
    seconds: float

    @classmethod
    def empty(cls, schema: Schema) -> Totals:
        return cls(
            schema,
            np.zeros(schema.sum_width),
            np.zeros(schema.sum_width),
            np.full(schema.max_width, -np.inf),
            np.full(schema.max_width, NOBODY, dtype=np.int64),
            0.0,
        )

    def moved(self, schema: Schema) -> Totals:
        """Return the same in the lanes of a larger schema."""
        if schema is self.schema:
            return self
        moved = Totals.empty(schema)
        sum_lanes, max_lanes = schema.lanes_from(self.schema)
        moved.sums[sum_lanes], moved.lost[sum_lanes] = self.sums, self.lost
        moved.maxs[max_lanes], moved.owners[max_lanes] = self.maxs, self.owners
        return Totals(schema, moved.sums, moved.lost, moved.maxs, moved.owners, self.seconds)

    def plus(self, newer: Totals) -> Totals:
        """Add what one reduction has merged."""
        added = newer.sums
        with np.errstate(invalid="ignore"):
            sums = self.sums + added
            small = np.where(
                np.abs(self.sums) >= np.abs(added),
                (self.sums - sums) + added,
                (added - sums) + self.sums,
            )
        return Totals(
            self.schema,
            sums,
            # Once a sum is infinite its rounding has no meaning.
            self.lost + np.where(np.isfinite(sums), small, 0.0),
            np.maximum(self.maxs, newer.maxs),
            np.where(newer.maxs > self.maxs, newer.owners, self.owners),
            self.seconds + newer.seconds,
        )

    def exact_sums(self) -> FloatArray:
        return self.sums + self.lost

    def hash(self) -> int:
        arrays = (self.sums, self.lost, self.maxs, np.float64(self.seconds))
        schema = self.schema.hash.to_bytes(8, "little")
        return digest(schema + b"".join(array.tobytes() for array in arrays))
