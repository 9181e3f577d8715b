"""The wire vector: one rank's state of all keys. A packed vector is a state itself.

It is a row of named sections, each of which has an identity and becomes one with that of the other
ranks in its own way (`sections`):

    head      the header, and what must be agreed on once more, negated     larger
    nans      of each key with maxima, the lowest rank that had NaN, negated  larger
    sums      SUM lanes                                                     added
    present   which ranks had values of each key, or how many               added
    own       each rank's own lanes of the keys recorded with per_rank      added
    owned     MAX lanes, with their owners and how many ranks have them     owned
    values    of DISTRIBUTIONs (`values`)                                   side by side, or joined

A number x that must be the same on all ranks travels as x and -x: the larger ones cancel only if it
is. Where vectors are gathered, all see whose each row is; `nans`, `present` and `own` are there only
where vectors are merged on the way. Both merge in the one order of `merged`, and so come to the
same bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from metricfold._core.fold.names import Key
from metricfold._core.fold.sample import FloatArray, Window
from metricfold._core.fold.state import COUNT, NANS, State
from metricfold._core.reduce.header import AGREED, HEADER_SIZE, Field
from metricfold._core.reduce.schema import Schema
from metricfold._core.reduce.sections import NOBODY, added, larger, latest, owned
from metricfold._core.reduce.totals import Rows, Totals
from metricfold._core.reduce.values import Pools, Recent, Values, Windows
from metricfold._core.sketch.weights import countable

__all__ = ["Attendance", "Merged", "Outgoing", "Wire"]

BoolArray = npt.NDArray[np.bool_]

_OBJECTIONS = slice(Field.PENDING, Field.ERROR + 1)
"""What is 0 of a rank that has no new entries and has not failed."""
_BITS = 52
"""Ranks that one number tells apart: each is a bit, and a float64 holds so many exactly."""


class Outgoing(NamedTuple):
    """What one rank holds; and of which keys it has sent values, or NaN, in the open interval."""

    states: Mapping[Key, State]
    windows: Mapping[Key, Window]
    present: AbstractSet[Key] = frozenset()
    with_nan: AbstractSet[Key] = frozenset()


@dataclass(frozen=True, slots=True)
class Merged:
    """What all ranks sent, merged.

    Args:
        delta: lanes.
        rows: each rank's lanes; of the keys in `rows.schema` alone.
        attendance: which ranks had what; None if all keys are known per rank.
        sink_failed, found: of any rank (`Field.SINK_FAILED`, `Field.ALERTS`).
    """

    delta: Totals
    rows: Rows
    recent: Recent
    attendance: Attendance | None
    sink_failed: bool
    found: float


class Wire:
    """Where each section stands, how it is filled, merged and read.

    Args:
        schema: the agreed keys.
        world_size: number of ranks.
        joining: whether vectors are merged on the way; else everyone's arrive.

    Attributes:
        size: numbers that each rank sends.
        lanes: all but the values.
    """

    def __init__(self, schema: Schema, world_size: int, *, joining: bool) -> None:
        self.schema, self.world_size, self.joining = schema, world_size, joining
        self._keys = schema.laned if joining else []
        self._owning = [entry.key for entry in schema if entry.maxs] if joining else []
        self._with_maxs = np.array([schema.entries[key].maxs > 0 for key in self._keys], np.bool_)
        self._own = schema.per_rank if joining else Schema()
        self._own_lanes = schema.lanes_from(self._own)
        each = self._own.sum_width + self._own.max_width
        head, lanes = HEADER_SIZE + AGREED, schema.sum_width + 3 * schema.max_width
        self._samples: Values = Pools(schema, world_size) if joining else Windows(schema)
        words = -(-world_size // _BITS)
        rest = head + lanes + world_size * each + self._samples.width
        # A bit for each rank, as long as that costs next to nothing.
        self._bits = words == 1 or 10 * len(self._keys) * words <= rest
        self._words = words if self._bits else 1
        present = len(self._keys) * self._words
        last = world_size - _BITS * np.arange(self._words)
        most = 2.0 ** np.minimum(last, _BITS) - 1 if self._bits else np.array([float(world_size)])
        self._most_present = np.tile(most, len(self._keys))
        widths = (
            *(head, len(self._owning), schema.sum_width, present),
            *(world_size * each, 3 * schema.max_width, self._samples.width),
        )
        ends = np.cumsum(widths).tolist()
        at = [slice(end - width, end) for end, width in zip(ends, widths, strict=True)]
        self._head, self._with_nan, self._sums, self._present, self._rows, self._owned, _ = at
        self._larger = slice(0, self._with_nan.stop)
        self._added = slice(self._sums.start, self._rows.stop)
        self.lanes = slice(0, self._owned.stop)
        self._values = slice(self._owned.stop, ends[-1])
        self.size: int = ends[-1]

    # -- A rank's vector

    def identity(self) -> FloatArray:
        """Return the vector of a rank that has nothing, shape (size,)."""
        vector = np.zeros(self.size)
        vector[self._larger] = -np.inf
        owned = vector[self._owned].reshape(3, -1)
        owned[0], owned[1] = -np.inf, NOBODY
        vector[self._rows] = -0.0  # to which each number may be added, -0.0 too: a MIN of 0
        return vector

    def pack(self, outgoing: Outgoing, rank: int) -> tuple[FloatArray, set[Key]]:
        """Return what a rank sends, but for its header, and the keys that there is no place for.

        What lacks places is not to be sent.
        """
        schema, vector = self.schema, self.identity()
        sums, owned = vector[self._sums], vector[self._owned].reshape(3, -1)
        lacking = schema.fill(sums, owned[0], outgoing.states) | schema.lacking(outgoing.windows)
        if lacking:
            return vector, lacking
        if schema.max_width:
            having = sums[schema.max_counts] > sums[schema.max_counts + (NANS - COUNT)]
            owned[1, having], owned[2, having] = rank, 1.0
        self._samples.pack(vector[self._values], outgoing.windows)
        if self.joining:
            self._pack_own(vector, sums, owned[0], outgoing, rank)
        return vector, lacking

    def _pack_own(
        self, vector: FloatArray, sums: FloatArray, maxs: FloatArray, outgoing: Outgoing, rank: int
    ) -> None:
        schema = self.schema
        present = schema.by_key(sums[schema.counts] > 0) | _among(self._keys, outgoing.present)
        nans = schema.by_key(sums[schema.counts + (NANS - COUNT)] > 0)[self._with_maxs]
        with_nan = nans | _among(self._owning, outgoing.with_nan)
        vector[self._with_nan][with_nan] = -rank
        word, bit = divmod(rank, _BITS) if self._bits else (0, 0)
        vector[self._present].reshape(-1, self._words)[:, word] = present * 2.0**bit
        if self._rows.stop > self._rows.start:
            rows = vector[self._rows].reshape(self.world_size, -1)
            sum_lanes, max_lanes = self._own_lanes
            rows[rank] = np.concatenate((sums[sum_lanes], maxs[max_lanes]))

    def head(self, vector: FloatArray, header: FloatArray) -> None:
        """Write a rank's header into its vector."""
        vector[:HEADER_SIZE] = header
        vector[HEADER_SIZE : self._head.stop] = -header[:AGREED]

    # -- Merging

    def pairs(self, lower: FloatArray, upper: FloatArray) -> FloatArray:
        """Merge each two vectors of neighbouring blocks of ranks, the lower ones first.

        Never raises for what ranks send: it is judged when all of it has been merged.

        Args:
            lower: shape (n, size), or (n, lanes.stop), of which the values have been left out.
            upper: of the same shape.
        """
        out = np.empty(lower.shape)
        out[:, self._larger] = larger(lower[:, self._larger], upper[:, self._larger])
        added(lower[:, self._added], upper[:, self._added], out[:, self._added])
        if self.schema.max_width:
            three = (len(lower), 3, self.schema.max_width)
            one, other = lower[:, self._owned].reshape(three), upper[:, self._owned].reshape(three)
            both, newest = owned(one, other), self.schema.latest
            if newest.any():
                both[..., newest] = latest(one[..., newest], other[..., newest])
            out[:, self._owned] = both.reshape(len(lower), -1)
        if self.joining:
            self._samples.join(lower[:, self._values], upper[:, self._values], out[:, self._values])
        return out

    def pair(self, lower: FloatArray, upper: FloatArray) -> FloatArray:
        """Merge two vectors as `pairs` does."""
        merged: FloatArray = self.pairs(lower[np.newaxis], upper[np.newaxis])[0]
        return merged

    def merged(self, rows: FloatArray) -> FloatArray:
        """Merge the vectors of all ranks, shape (k, n), in their order, as a tree of ranks does.

        Neighbours first, the lower ranks first: of the first 2 * extra ranks (0, 1), (2, 3), ...,
        where extra is what k is beyond a power of two; then, of what is left, neighbours again and
        again. n is as in `pairs`.
        """
        extra = len(rows) - (1 << len(rows).bit_length() - 1)
        if extra:
            first = self.pairs(rows[0 : 2 * extra : 2], rows[1 : 2 * extra : 2])
            rows = np.concatenate((first, rows[2 * extra :]))
        while len(rows) > 1:
            rows = self.pairs(rows[0::2], rows[1::2])
        whole: FloatArray = rows[0]
        return whole

    def sign(self, rows: FloatArray) -> None:
        """Let each gathered vector own its maxima as the rank whose row it is, whatever it says."""
        if not self.schema.max_width:
            return
        owned = rows[:, self._owned].reshape(len(rows), 3, -1)
        owned[:, 1] = np.where(owned[:, 2] > 0, np.arange(len(rows))[:, np.newaxis], NOBODY)
        rows[:, self._owned] = owned.reshape(len(rows), -1)

    # -- What has arrived

    def agreed(self, vector: FloatArray) -> bool:
        """Return whether all ranks of a merged vector agree, and none has new entries or has failed."""
        head = vector[self._head].tolist()
        same = head[:AGREED] == [-one for one in head[HEADER_SIZE:]] and not any(head[_OBJECTIONS])
        seconds, failed, found = head[Field.SECONDS], head[Field.SINK_FAILED], head[Field.ALERTS]
        return same and 0 <= seconds < np.inf and failed in (0.0, 1.0) and bool(countable(found))

    def wrong(self, rows: FloatArray) -> BoolArray:
        """Return which vectors, shape (k, size), hold what no ranks' come to.

        Args:
            rows: everyone's, or the merged one.
        """
        first = np.zeros((1, 1)) if self.joining else np.arange(len(rows))[:, np.newaxis]
        end = np.full((1, 1), self.world_size) if self.joining else first + 1
        bad = self._samples.wrong(rows[:, self._values])
        bad |= ~countable(rows[:, self._sums][:, self.schema.counting]).all(axis=1)
        if self.schema.max_width:
            owned = rows[:, self._owned].reshape(len(rows), 3, -1)
            owners, tied = owned[:, 1], owned[:, 2]
            nobody = (owners == NOBODY) & (tied == 0)
            somebody = countable(owners) & (owners >= first) & (owners < end)
            somebody &= countable(tied) & (tied > 0) & (tied <= end - first)
            bad |= ~(nobody | somebody).all(axis=1)
        if self.joining:
            present = rows[:, self._present]
            bad |= (~countable(present) | (present > self._most_present)).any(axis=1)
            with_nan = -rows[:, self._with_nan]
            nobody = with_nan == np.inf
            bad |= ~countable(np.where(nobody, 0.0, with_nan)).all(axis=1)
            bad |= ~(nobody | ((with_nan >= first) & (with_nan < end))).all(axis=1)
            own = rows[:, self._rows].reshape(len(rows), self.world_size, -1)
            bad |= ~countable(own[:, :, self._own.counting]).all(axis=(1, 2))
        return bad

    def read(self, rows: FloatArray, whole: FloatArray) -> Merged:
        """Return what has arrived, which is not wrong.

        Args:
            rows: everyone's vectors, or the merged one.
            whole: the merged one, which need not have the values.
        """
        return Merged(
            self.totals(whole),
            self.per_rank(rows),
            self.recent(rows),
            self.attendance(whole) if self.joining else None,
            bool(whole[Field.SINK_FAILED]),
            float(whole[Field.ALERTS]),
        )

    def totals(self, vector: FloatArray) -> Totals:
        """Return what the lanes of all ranks come to."""
        # A sum of nothing but -0 is 0, as that over time is; and copies let the vectors go.
        sums, owned = vector[self._sums] + 0.0, vector[self._owned].reshape(3, -1)
        return Totals(
            self.schema,
            sums,
            np.zeros(sums.size),
            owned[0].copy(),
            owned[1].astype(np.int64),
            owned[2].astype(np.int64),
            float(vector[Field.SECONDS]),
        )

    def per_rank(self, rows: FloatArray) -> Rows:
        """Return the lanes of each rank; of a merged vector those recorded with per_rank."""
        if self.joining:
            own, width = rows[0, self._rows].reshape(self.world_size, -1), self._own.sum_width
            return Rows(self._own, own[:, :width], own[:, width:])
        owned = rows[:, self._owned].reshape(len(rows), 3, -1)
        return Rows(self.schema, rows[:, self._sums], owned[:, 0])

    def recent(self, rows: FloatArray) -> Recent:
        """Return the values of DISTRIBUTIONs."""
        return Recent(self._samples, rows[:, self._values])

    def attendance(self, vector: FloatArray) -> Attendance:
        """Return which ranks had what, out of a merged vector."""
        present = vector[self._present].reshape(-1, self._words)
        nans = vector[self._with_nan]
        owners = np.where(nans == -np.inf, NOBODY, -nans).astype(np.int64)
        return Attendance(
            {key: place for place, key in enumerate(self._keys)},
            present.astype(np.int64),
            self._bits,
            self.world_size,
            dict(zip(self._owning, owners.tolist(), strict=True)),
        )


def _among(keys: Sequence[Key], some: AbstractSet[Key]) -> BoolArray:
    if not some:
        return np.zeros(len(keys), dtype=np.bool_)
    return np.fromiter((key in some for key in keys), np.bool_, len(keys))


@dataclass(frozen=True, slots=True)
class Attendance:
    """Which ranks had values of a key in the open interval, as far as that is told.

    Args:
        keys: the row of each.
        numbers: of each key a bit for each rank, 52 in a number, or how many ranks; shape (n, words).
        bits: which of the two.
        world_size: number of ranks.
        nan_owners: the lowest rank that had NaN, or -1, of each key with maxima.
    """

    keys: Mapping[Key, int]
    numbers: npt.NDArray[np.int64]
    bits: bool
    world_size: int
    nan_owners: Mapping[Key, int]

    def present(self, key: Key) -> int:
        """Return how many ranks had values of `key`."""
        numbers = self.numbers[self.keys[key]].tolist()
        return sum(number.bit_count() for number in numbers) if self.bits else int(numbers[0])

    def lacking(self, key: Key) -> list[int] | None:
        """Return the ranks that had no values of `key`; None if that is not told."""
        if self.bits:
            numbers = self.numbers[self.keys[key]].tolist()
            words = [divmod(rank, _BITS) for rank in range(self.world_size)]
            return [rank for rank, (word, bit) in enumerate(words) if not numbers[word] >> bit & 1]
        present = self.present(key)
        return [*range(self.world_size - present)] if present in (0, self.world_size) else None
