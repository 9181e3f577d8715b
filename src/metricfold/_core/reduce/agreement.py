"""What the ranks agree on: which keys there are, and what each rank has to say to that.

A rank that holds something that the agreed schema has no place for tells the others (`news`). All
come to the same new schema (`agree`), because it follows from what was exchanged alone: room is
joined in rank order, first come first kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Protocol

from metricfold._core.fold.handlers import AggregationHandler
from metricfold._core.fold.names import Claims, show
from metricfold._core.fold.sample import Window
from metricfold._core.fold.state import OTHER, State
from metricfold._core.reduce.announced import check_room, decoded
from metricfold._core.reduce.header import name_ranks
from metricfold._core.reduce.schema import Entry, Key, Schema

__all__ = ["Agreed", "Lost", "Registry", "agree", "news", "read"]

_SMALLEST_CAPACITY = 16


class Registry(Protocol):
    """What a reduction asks the aggregator about its keys."""

    def handler(self, key: Key) -> AggregationHandler: ...

    def entry(self, key: Key) -> Entry:
        """Return how `key` travels, as far as its handler decides it."""

    def per_rank(self) -> AbstractSet[Key]:
        """Return the keys of which each rank's values are wanted, whatever the route."""

    def conflicting(self) -> set[Key]:
        """Return the keys that this rank holds otherwise than the ranks have agreed."""

    def adopt(self, agreed: Agreed, losers: Mapping[Key, Key | None]) -> str:
        """Take over what the ranks have agreed on; returns what this rank cannot do with it.

        Args:
            agreed: the keys, and which of them are new.
            losers: keys that the others hold otherwise than this rank, with the key under which
                what it holds goes on; None: it is dropped.
        """


# -- What a rank has to tell -----------------------------------------------------------------------


def news(
    schema: Schema,
    lacking: Iterable[Key],
    states: Mapping[Key, State],
    windows: Mapping[Key, Window],
    loaded: Iterable[Entry],
    registry: Registry,
) -> list[Entry]:
    """Return what one rank holds beyond the agreed schema.

    Args:
        schema: the agreed keys.
        lacking: keys that lack a place in it.
        states: what each key has accumulated.
        windows: what the rank holds of each DISTRIBUTION.
        loaded: entries out of a checkpoint.
        registry: knows how the keys travel.
    """
    found = schema.beyond(_as_here(entry, registry) for entry in loaded)
    found += [
        _with_room(schema, key, states.get(key), windows.get(key), registry)
        for key in sorted(lacking)
    ]
    wanted = [
        key
        for key in sorted(registry.per_rank())
        if key in schema and not schema.entries[key].per_rank
    ]
    if wanted:
        found += [
            registry.entry(key)._replace(axes=schema.entries[key].axes)
            for key in sorted({*wanted} - registry.conflicting())
        ]
    joined: dict[Key, Entry] = {}
    for entry in found:
        joined[entry.key] = joined.get(entry.key, entry).joined(entry)
    return list(joined.values())


def _as_here(entry: Entry, registry: Registry) -> Entry:
    """Return a saved entry as this aggregator would have it: its bounds and capacities are here."""
    here = registry.entry(entry.key)
    return entry._replace(
        most=here.most,
        suffixes=here.suffixes,
        full=entry.full and len(entry.categories) > here.most,
        capacity=0,
        weighted=False,
        condensed=False,
    )


def _with_room(
    schema: Schema, key: Key, state: State | None, window: Window | None, registry: Registry
) -> Entry:
    """Return the entry of a key, with room for what a rank holds of it."""
    entry = registry.entry(key)
    if state is not None and state.axes:
        entry = entry._replace(axes=state.axes)
    if state is not None and state.counts is not None:
        grown = schema.entries.get(key, entry).with_categories(state.counts)
        kept = {*grown.categories}
        new = tuple(category for category in state.counts if category in kept)
        entry = entry._replace(categories=new, full=grown.full)
    if window is not None:
        doubled = 1 << (max(window.values.size, _SMALLEST_CAPACITY) - 1).bit_length()
        entry = entry._replace(
            capacity=min(doubled, registry.handler(key).laned().sample_limit),
            weighted=window.weights is not None,
            condensed=window.older is not None,
        )
    return entry


# -- What the ranks make of it ---------------------------------------------------------------------

Told = tuple[Sequence[Entry], Sequence[int]]
"""News, and the ranks that brought them."""


def read(blobs: Sequence[bytes]) -> list[Told]:
    """Return the news of all ranks: of equal ones, which add nothing, only the first.

    Args:
        blobs: everyone's.

    Raises:
        RuntimeError: what a rank sent is no news.
    """
    senders: dict[bytes, list[int]] = {}
    for rank, blob in enumerate(blobs):
        if blob:
            senders.setdefault(blob, []).append(rank)
    told: list[Told] = []
    for blob, ranks in senders.items():
        try:
            told.append((decoded(blob), ranks))
        except ValueError as error:
            raise RuntimeError(
                f"{name_ranks(ranks)} sent what is no news of keys: {error}. Nothing was reduced; "
                "install the same version of metricfold everywhere, and look after that rank's machine"
            ) from None
    return told


@dataclass(frozen=True, slots=True)
class Lost:
    """What some ranks brought that could not be agreed on.

    Args:
        key: which it is.
        ranks: who brought it.
        reason: how they hold it, and the others.
        beside: the key under which what they hold goes on, beside the one that was agreed on first;
            None: it does not.
    """

    key: Key
    ranks: list[int]
    reason: str
    beside: Key | None

    def __str__(self) -> str:
        if self.beside is None:
            return f"{name_ranks(self.ranks)} held {self.reason}; what they held of it is dropped"
        return (
            f"{name_ranks(self.ranks)} held {self.reason}; what they held goes on as "
            f"{self.beside[1]!r}, and the next value of that type is refused there"
        )


@dataclass(frozen=True, slots=True)
class Agreed:
    """What the ranks have come to.

    Args:
        before: the schema that they had.
        schema: has room for all that could be agreed on.
        changed: its entries that are new or have got more room.
        lost: what could not be agreed on.
    """

    before: Schema
    schema: Schema
    changed: list[Entry]
    lost: list[Lost]

    def overflowed(self, run: Schema) -> list[Entry]:
        """Return the entries that have just got more categories than are told apart.

        Args:
            run: of the run total, which may be out of a checkpoint.
        """
        return [
            entry
            for entry in self.changed
            if entry.full
            and not any(
                entry.key in known and OTHER in known.entries[entry.key].categories
                for known in (self.before, run)
            )
        ]


def agree(schema: Schema, claims: Claims, told: Iterable[Told]) -> Agreed:
    """Give the schema room for the news of all ranks, by rank.

    Args:
        schema: that all ranks have.
        claims: the names of its keys; gets those of the new ones.
        told: the news.
    """
    room = _Room(schema, claims)
    lost: dict[tuple[Key, str], Lost] = {}
    for entries, ranks in told:
        room.claim(entries)
        for entry in entries:
            reason = room.add(entry)
            if not reason:
                continue
            one = lost.get((entry.key, entry.kind))
            if one is None:
                one = lost[entry.key, entry.kind] = Lost(entry.key, [], reason, room.beside(entry))
            elif one.beside is not None:
                room.add(entry._replace(key=one.beside))
            one.ranks.extend(ranks)
    changed = room.changed.values()
    grown = schema.grown(changed)
    check_room(grown.sum_width + grown.max_width)
    return Agreed(schema, grown, list(changed), list(lost.values()))


class _Room:
    """The entries of a schema that are getting more room, and the new ones.

    Args:
        schema: that all ranks have.
        claims: the names of all these.
    """

    def __init__(self, schema: Schema, claims: Claims) -> None:
        self.changed: dict[Key, Entry] = {}
        self._schema, self._claims = schema, claims
        self._claimed: set[Key] = set()

    def _known(self, key: Key) -> Entry | None:
        return self.changed.get(key) or self._schema.entries.get(key)

    def claim(self, entries: Iterable[Entry]) -> None:
        """Claim the names of new keys all at once, unless one of them clashes."""
        new = {one.key: one.suffixes for one in entries if self._known(one.key) is None}
        try:
            self._claims.add(new.items())
            self._claimed.update(new)
        except ValueError:
            pass  # which of them it is, each one tells by itself

    def add(self, entry: Entry) -> str:
        """Make room for `entry`; returns why there can be none, or nothing."""
        known = self._known(entry.key)
        if known is None:
            if entry.key not in self._claimed:
                try:
                    self._claims.add([(entry.key, entry.suffixes)])
                except ValueError as error:
                    return f"{show(entry.key)} as {entry.type!r}, but {error}"
            full = entry.categories or entry.full
            known = entry._replace(categories=(), full=False) if full else entry
        elif known.joins_on_devices(entry):
            # Whichever was first says what the view of the run is about.
            entry = entry._replace(kind=known.kind, drained=known.drained or not known.bounded)
        if known.kind == entry.kind:
            self.changed[entry.key] = known.joined(entry)
            return ""
        if known.type != entry.type:
            return (
                f"{show(entry.key)} as {entry.type!r}, but it is already registered with aggregation "
                f"type {known.type} on the other ranks"
            )
        if known.axes != entry.axes:
            return (
                f"{show(entry.key)} as {entry.described}, but the other ranks as {known.described}"
            )
        if known.lanes != entry.lanes:
            return (
                f"{show(entry.key)} with {entry.lanes}, but the other ranks hold it with "
                f"{known.lanes}: register the same handler for type {entry.type} on every rank"
            )
        sizes = ("dist_window_size=None", "a window size")
        return (
            f"{show(entry.key)} with {sizes[entry.bounded]}, but the other ranks hold it with "
            f"{sizes[known.bounded]}"
        )

    def beside(self, entry: Entry) -> Key | None:
        """Make room under the name of its kind; returns what key that is, or None if it cannot be.

        The first kind that was agreed on has the name itself. So the schema has their order, too, and
        with it a checkpoint. One type whose handlers or windows differ is no other kind but a mistake:
        no rank could print both, nor load them.
        """
        dataset, name = entry.key
        known = self._known(entry.key)
        beside = (dataset, f"{name}[{entry.kind}]")
        if known is not None and known.type == entry.type:
            return None
        return None if self.add(entry._replace(key=beside)) else beside
