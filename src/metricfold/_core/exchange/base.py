"""What both routes take and give."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from metricfold._core.fold.names import Key
from metricfold._core.fold.sample import FloatArray, Pool, Window
from metricfold._core.fold.state import State
from metricfold._core.reduce.header import AGREED, Field, Kind
from metricfold._core.reduce.schema import Schema
from metricfold._core.reduce.totals import IntArray, Rows, Totals
from metricfold.communicator.base import Communicator

__all__ = [
    "Attendance",
    "Exchanged",
    "Merged",
    "Outgoing",
    "Recent",
    "Route",
    "objections",
    "uncounted",
]


@dataclass(frozen=True, slots=True)
class Outgoing:
    """What one rank sends.

    Args:
        kind: which call this is.
        states: what each key has accumulated.
        windows: what it holds of each DISTRIBUTION.
        present: keys of which it has sent values already during the open interval.
    """

    kind: Kind
    states: Mapping[Key, State]
    windows: Mapping[Key, Window]
    present: AbstractSet[Key]


class Recent(ABC):
    """The values of DISTRIBUTIONs, as one reduction brought them; merged when asked for."""

    def __init__(self) -> None:
        self._pools: dict[tuple[Key, bool], Pool] = {}

    def interval(self, key: Key) -> Pool:
        """Return what came in during the open interval."""
        return self._pool(key, of_interval=True)

    def recent(self, key: Key) -> Pool:
        """Return each rank's most recent values."""
        return self._pool(key, of_interval=False)

    def _pool(self, key: Key, *, of_interval: bool) -> Pool:
        known = self._pools.get((key, of_interval))
        if known is None:
            known = self._pools[key, of_interval] = self.pooled(key, of_interval=of_interval)
        return known

    @abstractmethod
    def pooled(self, key: Key, *, of_interval: bool) -> Pool:
        """Return the values of all ranks."""

    @abstractmethod
    def windows(self, key: Key) -> list[Window]:
        """Return what a checkpoint keeps: most recent values, and those of the open interval."""


@dataclass(frozen=True, slots=True)
class Attendance:
    """What is known about ranks where they cannot be told apart.

    Args:
        keys: which these are.
        counts: how many ranks had values of each in the open interval.
        nan_owners: the only rank that had NaN among those of this reduction, or -1.
    """

    keys: Sequence[Key]
    counts: IntArray
    nan_owners: IntArray

    def present(self, key: Key) -> int:
        """Return how many ranks had values of `key`."""
        return int(self.counts[self.keys.index(key)])

    def nan_owner(self, key: Key) -> int:
        """Return the rank that had NaN, or -1."""
        return int(self.nan_owners[self.keys.index(key)])


@dataclass(frozen=True, slots=True)
class Merged:
    """What all ranks sent, merged.

    Args:
        delta: lanes and accumulating pools.
        rows: each rank's lanes; of the keys in `rows.schema` alone.
        recent: values of DISTRIBUTIONs.
        attendance: of the other keys; None if there are none.
        sink_failed: whether a logger's sink had failed on any rank.
    """

    delta: Totals
    rows: Rows
    recent: Recent
    attendance: Attendance | None = None
    sink_failed: bool = False


class Exchanged(NamedTuple):
    """What the collectives of a route came to.

    Args:
        headers: everyone's, shape (world_size, HEADER_SIZE), if they have been gathered.
        merged: what has been merged; None if some rank objects or has news.
        failure: why this rank could not go on.
        wrong: what no rank sends among what has arrived, which all ranks see alike.
    """

    headers: FloatArray | None
    merged: Merged | None
    failure: str = ""
    wrong: str = ""


class Route(ABC):
    """One way for ranks to merge what they hold, for one schema.

    Attributes:
        schema: the agreed keys.
    """

    schema: Schema

    @abstractmethod
    def pack(self, outgoing: Outgoing) -> tuple[Any, set[Key]]:
        """Return what to send, and the keys that the schema has no place for.

        What lacks places is not to be sent.
        """

    @abstractmethod
    def exchange(self, communicator: Communicator, header: FloatArray, payload: Any) -> Exchanged:
        """Take part in the collectives of this route, which all ranks do alike.

        Args:
            communicator: connects the ranks.
            header: of this rank, shape (HEADER_SIZE,).
            payload: what `pack` returned, or None to send identities.
        """


_LARGEST = 2.0**53


def uncounted(numbers: FloatArray) -> npt.NDArray[np.bool_]:
    """Return where numbers are no counts."""
    counts = (numbers >= 0.0) & (numbers <= _LARGEST) & (numbers == np.floor(numbers))
    return ~counts  # type: ignore[no-any-return]


def objections(headers: FloatArray) -> bool:
    """Return whether a rank has news, has failed, or is not where the others are."""
    alarms = headers[:, [Field.PENDING, Field.ERROR]].any()
    return bool(alarms or (headers[:, :AGREED] != headers[0, :AGREED]).any())
