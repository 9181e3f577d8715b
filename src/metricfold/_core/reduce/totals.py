"""Reduced results that go on accumulating: the run, and the interval that is still open.

All are values: adding to one gives a new one, so a `Snapshot` may keep what it was given.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from metricfold._core.fold.names import Key
from metricfold._core.fold.sample import EXACT_VALUES, FloatArray, Pool
from metricfold._core.fold.state import COUNT, NANS, ReducedState
from metricfold._core.reduce.schema import Schema, digest
from metricfold._core.reduce.sections import NOBODY, added_later, larger, owned_later

__all__ = ["NOBODY", "IntArray", "Rows", "Totals"]

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Rows:
    """What each rank contributed: one row a rank, in the lanes of a schema."""

    schema: Schema
    sums: FloatArray
    maxs: FloatArray

    def moved(self, schema: Schema) -> Rows:
        """Return the same in the lanes of another schema; keys that it lacks are left out."""
        if schema is self.schema:
            return self
        common = Schema(entry for entry in self.schema if entry.key in schema)
        old_sums, old_maxs = self.schema.lanes_from(common)
        new_sums, new_maxs = schema.lanes_from(common)
        world_size = len(self.sums)
        sums = np.zeros((world_size, schema.sum_width))
        maxs = np.full((world_size, schema.max_width), -np.inf)
        # Lanes may become one: transposed, they are the rows that are added.
        np.add.at(sums.T, new_sums, self.sums[:, old_sums].T)
        maxs[:, new_maxs] = self.maxs[:, old_maxs]
        return Rows(schema, sums, maxs)

    def plus(self, other: Rows) -> Rows:
        newest = self.schema.latest & _having(self.schema, other.sums)
        maxs = np.where(newest, other.maxs, larger(self.maxs, other.maxs))
        return Rows(self.schema, self.sums + other.sums, maxs)


@dataclass(frozen=True, slots=True)
class Totals:
    """Lanes merged over ranks and over reductions, the same on every rank.

    Args:
        schema: where each key's lanes stand.
        sums: SUM lanes.
        lost: what rounding has taken from `sums` so far (Neumaier's compensated sum).
        maxs: MAX lanes.
        owners: the rank that each MAX lane came from, or -1.
        tied: how many ranks had it.
        seconds: wall time, by the slowest rank's clock in each interval.
        pools: values of DISTRIBUTIONs that accumulate.
    """

    schema: Schema
    sums: FloatArray
    lost: FloatArray
    maxs: FloatArray
    owners: IntArray
    tied: IntArray
    seconds: float
    pools: Mapping[Key, Pool] = field(default_factory=dict)

    @classmethod
    def empty(cls, schema: Schema) -> Totals:
        return cls(
            schema,
            np.zeros(schema.sum_width),
            np.zeros(schema.sum_width),
            np.full(schema.max_width, -np.inf),
            np.full(schema.max_width, NOBODY, dtype=np.int64),
            np.zeros(schema.max_width, dtype=np.int64),
            0.0,
        )

    def moved(self, schema: Schema) -> Totals:
        """Return the same in the lanes of a larger schema."""
        if schema is self.schema:
            return self
        moved = Totals.empty(schema)
        sum_lanes, max_lanes = schema.lanes_from(self.schema)
        np.add.at(moved.sums, sum_lanes, self.sums)
        np.add.at(moved.lost, sum_lanes, self.lost)
        moved.maxs[max_lanes] = self.maxs
        moved.owners[max_lanes], moved.tied[max_lanes] = self.owners, self.tied
        return replace(moved, seconds=self.seconds, pools=self.pools)

    def fitted(self, schema: Schema) -> Totals:
        """Return the same where keys have more SUM lanes than before, or fewer: the first remain."""
        if schema is self.schema:
            return self
        fitted = Totals.empty(schema)
        for key, entry in schema.entries.items():
            known = self.schema.entries[key]
            here, there = schema.sums[key], self.schema.sums[key]
            for new, old in ((fitted.sums, self.sums), (fitted.lost, self.lost)):
                if entry.sums == known.sums:
                    new[here] = old[there]
                    continue
                width = min(entry.sums, known.sums)
                given = old[there].reshape(entry.cells, -1)
                new[here].reshape(entry.cells, -1)[:, :width] = given[:, :width]
        return replace(self, schema=schema, sums=fitted.sums, lost=fitted.lost)

    def plus(self, newer: Totals) -> Totals:
        """Add what came after: what one reduction has merged, or another job."""
        sums, lost = added_later(self.sums, self.lost + newer.lost, newer.sums)
        owned = (self.maxs, self.owners, self.tied)
        if self.maxs.size:
            having = _having(self.schema, newer.sums)
            # -inf may be a value, and stands for none.
            begins = having & ~_having(self.schema, self.sums)
            news = (newer.maxs, newer.owners, newer.tied)
            owned = owned_later(owned, news, begins, having & self.schema.latest)
        return Totals(
            self.schema,
            sums,
            lost,
            *owned,
            self.seconds + newer.seconds,
            _joined(self.pools, newer.pools),
        )

    def states(self) -> Iterator[tuple[Key, ReducedState]]:
        """Yield the state of each key with lanes that has values; of each of its cells, if it has any."""
        sums, maxs = self.exact_sums(), self.maxs
        for key, lanes in self.schema.sums.items():
            entry = self.schema.entries[key]
            if entry.custom:
                continue
            both = (sums[lanes], entry.cells), (maxs[self.schema.maxs[key]], entry.cells)
            for own, tops in zip(*(one.reshape(n, -1).tolist() for one, n in both), strict=True):
                if own[COUNT]:
                    pool = self.pools.get(key, Pool())
                    state = ReducedState(
                        tuple(own), tuple(tops), self.seconds, pool, entry.categories
                    )
                    yield key, state

    def exact_sums(self) -> FloatArray:
        return self.sums + self.lost

    def hash(self) -> int:
        # Two checksums, which read them where they lie, and together tell as many apart as the digest.
        lanes, more = 0, 1
        for part in (self.sums, self.lost, self.maxs, np.float64(self.seconds)):
            held = np.ascontiguousarray(part).data
            lanes, more = zlib.crc32(held, lanes), zlib.adler32(held, more)
        pools = [pool.fingerprint() for _, pool in sorted(self.pools.items())]
        return digest(b"".join([f"{self.schema.hash} {lanes} {more} ".encode(), *pools]))


def _having(schema: Schema, sums: FloatArray) -> npt.NDArray[np.bool_]:
    """Return of which MAX lanes there is a number, given the SUM lanes, shape (..., n)."""
    counts = schema.max_counts
    having: npt.NDArray[np.bool_] = sums[..., counts] > sums[..., counts + (NANS - COUNT)]
    return having


def _joined(older: Mapping[Key, Pool], newer: Mapping[Key, Pool]) -> Mapping[Key, Pool]:
    """Add pools; what one reduction has brought stays exact until there is more."""
    joined = {**older, **newer}
    for key in older.keys() & newer.keys():
        joined[key] = Pool.joined([older[key], newer[key]], most=EXACT_VALUES)
    return joined
