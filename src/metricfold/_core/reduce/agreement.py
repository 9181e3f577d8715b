"""What the ranks agree on: whether all are in the same call, and which keys there are.

A rank that holds something that the agreed schema has no place for tells the others (`news`). All
come to the same new schema (`agree`), because it follows from what was exchanged alone: room is
joined in rank order, first come first kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from operator import attrgetter
from types import MappingProxyType
from typing import Protocol

from metricfold._core.fold.handlers import AggregationHandler
from metricfold._core.fold.names import Claims, show
from metricfold._core.fold.sample import FloatArray, Window
from metricfold._core.fold.state import OTHER, State
from metricfold._core.reduce.announced import (
    MOST_ERROR,
    compressed,
    decompressed,
    entries_from,
    malformed,
)
from metricfold._core.reduce.header import AGREED, Field, Kind, RouteChoice
from metricfold._core.reduce.schema import Entry, Key, Schema
from metricfold.metric import escaped

__all__ = [
    "Agreed",
    "Lost",
    "Registry",
    "agree",
    "check",
    "check_whole",
    "encoded",
    "name_ranks",
    "news",
    "reason",
    "reasons",
]

_SMALLEST_CAPACITY = 16
_key_of = attrgetter("key")


class Registry(Protocol):
    """What a reduction asks the aggregator about its keys."""

    def handler(self, key: Key) -> AggregationHandler: ...

    def entry(self, key: Key) -> Entry:
        """Return how `key` travels, as far as its handler decides it."""
        ...

    def per_rank(self) -> AbstractSet[Key]:
        """Return the keys of which each rank's values are wanted, whatever the route."""
        ...

    def conflicting(self) -> set[Key]:
        """Return the keys that this rank holds otherwise than the ranks have agreed."""
        ...

    def adopt(self, agreed: Agreed, losers: Mapping[Key, Key | None]) -> str:
        """Take over what the ranks have agreed on; returns what this rank cannot do with it.

        Args:
            agreed: the keys, and which of them are new.
            losers: keys that the others hold otherwise than this rank, with the key under which
                what it holds goes on; None: it is dropped.
        """
        ...


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
    found: dict[Key, Entry] = {}

    def add(entry: Entry) -> None:
        earlier = found.get(entry.key)
        found[entry.key] = entry if earlier is None else earlier.joined(entry)

    for entry in schema.beyond(_as_here(entry, registry) for entry in loaded):
        add(entry)
    for key in sorted(lacking):
        add(_with_room(schema, key, states.get(key), windows.get(key), registry))
    for key in sorted(registry.per_rank()):
        agreed = schema.entries.get(key)
        if agreed is not None and not agreed.per_rank and key not in registry.conflicting():
            add(registry.entry(key))
    return list(found.values())


def encoded(entries: Sequence[Entry]) -> bytes:
    """Return news as they travel; nothing if there are none.

    Raises:
        ValueError: they are more than other ranks take.
    """
    return compressed(Schema.entries_to_json(entries)) if entries else b""


def _decoded(blob: bytes, ranks: Sequence[int]) -> list[Entry]:
    """Return the news that some ranks sent; raises RuntimeError if they are none."""
    try:
        return entries_from(decompressed(blob), settled=False)
    except ValueError as error:
        raise RuntimeError(
            f"{name_ranks(ranks)} sent what is no news of keys: {error}. Nothing was reduced; "
            f"{_SAME_VERSION}"
        ) from None


def _as_here(entry: Entry, registry: Registry) -> Entry:
    """Return a saved entry as this aggregator would have it: its bounds and capacities are here."""
    here = registry.entry(entry.key)
    most, suffixes = here.most, here.suffixes
    full = entry.full and len(entry.categories) > most
    return entry._replace(
        most=most, suffixes=suffixes, full=full, capacity=0, weighted=False, condensed=False
    )


def _with_room(
    schema: Schema, key: Key, state: State | None, window: Window | None, registry: Registry
) -> Entry:
    """Return the entry of a key, with room for what a rank holds of it."""
    entry = registry.entry(key)
    if state is not None and state.counts is not None:
        known = schema.entries.get(key, entry)
        grown = known.with_categories(state.counts)
        kept = set(grown.categories)
        new = tuple(category for category in state.counts if category in kept)
        entry = entry._replace(categories=new, full=grown.full)
    if window is not None:
        limit = registry.handler(key).laned().sample_limit
        capacity = _SMALLEST_CAPACITY
        while capacity < window.values.size:
            capacity *= 2
        entry = entry._replace(
            capacity=min(capacity, limit),
            weighted=window.weights is not None,
            condensed=window.older is not None,
        )
    return entry


# -- What the ranks make of it ---------------------------------------------------------------------


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
                OTHER in known.entries[entry.key].categories
                for known in (self.before, run)
                if entry.key in known
            )
        ]


def agree(
    schema: Schema,
    claims: Claims,
    blobs: Sequence[bytes],
    known: Mapping[bytes, Sequence[Entry]] = MappingProxyType({}),
) -> Agreed:
    """Give the schema room for the news of all ranks, by rank.

    Args:
        schema: that all ranks have.
        claims: the names of its keys; gets those of the new ones.
        blobs: everyone's news.
        known: what some of these say; most ranks have the same news as this one.

    Raises:
        RuntimeError: what a rank sent is no news; then nothing has changed.
    """
    senders: dict[bytes, list[int]] = {}
    for rank, blob in enumerate(blobs):
        if blob:
            senders.setdefault(blob, []).append(rank)
    # Of equal news, in the order of the first who brought them, the others add nothing.
    news_of = [(known.get(blob) or _decoded(blob, ranks), ranks) for blob, ranks in senders.items()]
    changed: dict[Key, Entry] = {}
    lost: dict[tuple[Key, str], Lost] = {}
    for entries, ranks in news_of:
        new = [one for one in entries if one.key not in schema and one.key not in changed]
        free = set(map(_key_of, new)) if _claim(claims, new) else set()
        for entry in entries:
            reason = _join(schema, changed, claims, entry, free)
            if reason:
                one = lost.get((entry.key, entry.kind))
                if one is None:
                    beside = _join_beside(schema, changed, claims, entry)
                    one = lost[entry.key, entry.kind] = Lost(entry.key, [], reason, beside)
                elif one.beside is not None:
                    _join(schema, changed, claims, entry._replace(key=one.beside), set())
                one.ranks.extend(ranks)
    return Agreed(
        schema, schema.grown(changed.values()), list(changed.values()), list(lost.values())
    )


def _join_beside(
    schema: Schema, changed: dict[Key, Entry], claims: Claims, entry: Entry
) -> Key | None:
    """Add `entry` under the name of its kind; returns what key that is, or None if it cannot be.

    The first kind that was agreed on has the name itself. So the schema has their order, too, and
    with it a checkpoint. One type whose handlers or windows differ is no other kind but a mistake:
    no rank could print both, nor load them.
    """
    dataset, name = entry.key
    known = changed.get(entry.key) or schema.entries.get(entry.key)
    if known is not None and known.type == entry.type:
        return None
    beside = (dataset, f"{name}[{entry.kind}]")
    return None if _join(schema, changed, claims, entry._replace(key=beside), set()) else beside


def _claim(claims: Claims, entries: Iterable[Entry]) -> bool:
    """Claim the names of all `entries`; returns False, and claims none, if one of them clashes."""
    try:
        claims.add((entry.key, entry.suffixes) for entry in entries)
    except ValueError:
        return False
    return True


def _join(
    schema: Schema,
    changed: dict[Key, Entry],
    claims: Claims,
    entry: Entry,
    claimed: AbstractSet[Key],
) -> str:
    """Add `entry` to the changed ones; returns why it cannot be, or nothing.

    Args:
        schema: that all ranks have.
        changed: its entries that are new or have got more room.
        claims: the names of all these; gets those of `entry`.
        entry: what a rank has brought.
        claimed: new keys whose names have been claimed already.
    """
    known = changed.get(entry.key) or schema.entries.get(entry.key)
    if known is not None:
        if known.joins_on_devices(entry):
            # Whichever was first says what the view of the run is about.
            entry = entry._replace(kind=known.kind, drained=known.drained or not known.bounded)
        if known.kind == entry.kind:
            changed[entry.key] = known.joined(entry)
            return ""
        if known.type == entry.type and known.lanes != entry.lanes:
            return (
                f"{show(entry.key)} with {entry.lanes}, but the other ranks hold it with "
                f"{known.lanes}: register the same handler for type {entry.type} on every rank"
            )
        if known.type == entry.type:
            sizes = ("dist_window_size=None", "a window size")
            return (
                f"{show(entry.key)} with {sizes[entry.bounded]}, but the other ranks hold it with "
                f"{sizes[known.bounded]}"
            )
        return (
            f"{show(entry.key)} as {entry.type!r}, but it is already registered with aggregation "
            f"type {known.type} on the other ranks"
        )
    if entry.key not in claimed:
        try:
            claims.add([(entry.key, entry.suffixes)])
        except ValueError as error:
            return f"{show(entry.key)} as {entry.type!r}, but {error}"
    if entry.categories or entry.full:
        entry = entry._replace(categories=(), full=False).joined(entry)
    changed[entry.key] = entry
    return ""


# -- Whether all are where the others are ----------------------------------------------------------


def check_whole(headers: FloatArray) -> None:
    """Raise, on all ranks alike, if what a rank sent is no header, or that of another version."""
    if len(set(headers[:, Field.PROTOCOL].tolist())) > 1:
        check(headers)
    wrong = malformed(headers)
    if wrong:
        first = min(wrong)
        raise RuntimeError(
            f"{name_ranks(wrong)} sent what no rank sends: of rank {first}, {wrong[first]}. Nothing "
            f"was reduced; {_SAME_VERSION}"
        )


def check(headers: FloatArray) -> None:
    """Raise, on all ranks alike, if the ranks are not in the same call with the same state."""
    agreed = headers[:, :AGREED]
    if (agreed == agreed[0]).all():
        return
    for field, beginning, say, end in _COMPLAINTS:
        numbers = headers[:, field].tolist()
        groups = {
            number: [rank for rank, other in enumerate(numbers) if other == number]
            for number in dict.fromkeys(numbers)
        }
        if len(groups) > 1:
            who = ", ".join(
                f"{name_ranks(ranks)} {say(number)}" for number, ranks in groups.items()
            )
            raise RuntimeError(beginning + who + end)


_SAME_VERSION = (
    "install the same version of metricfold everywhere, and look after that rank's machine"
)

# What must be the same on all ranks: how the complaint begins, what it says of each group of ranks,
# and how it ends.
_COMPLAINTS: tuple[tuple[Field, str, Callable[[float], str], str], ...] = (
    (
        Field.PROTOCOL,
        "the ranks run different versions of metricfold: ",
        lambda number: f"with protocol {number:.0f}",
        ". Install the same version everywhere",
    ),
    (
        Field.SEQUENCE,
        "the ranks are not in step: ",
        lambda number: f"after {number:.0f} exchanges",
        ". Make a new aggregator on all ranks and load the last checkpoint",
    ),
    (
        Field.KIND,
        "the ranks are in different calls: ",
        lambda number: f"called {Kind(int(number)).label}",
        (
            ". Nothing was reduced and nothing is lost; every rank must make the same calls in "
            "the same order"
        ),
    ),
    (
        Field.GENERATION,
        "load_state_dict() or reset() was not called alike on all ranks: ",
        lambda number: f"have done it {number:.0f}x",
        ". Call it on every rank",
    ),
    (
        Field.SCHEMA,
        "the ranks have agreed on different keys: ",
        lambda number: f"with schema {int(number):x}",
        ". Make a new aggregator on all ranks and load the last checkpoint",
    ),
    (
        Field.STEP,
        "the ranks report different steps: ",
        lambda number: "gave no step" if number < 0 else f"gave {number:.0f}",
        ". Nothing was reduced and nothing is lost; log the same step on every rank",
    ),
    (
        Field.RUN,
        "the ranks hold different run totals, or go on from states of different reductions: ",
        lambda number: f"with state {int(number):x}",
        ". Load the same checkpoint on every rank",
    ),
    (
        Field.ROUTE,
        "the ranks were told different routes: ",
        lambda number: f"with route={RouteChoice(int(number)).name.lower()!r}",
        ". Make the aggregator with the same route on every rank",
    ),
    (
        Field.RULES,
        "the ranks look for different alerts: ",
        lambda number: f"with rules {int(number):x}" if number else "without a rule",
        ". Nothing was reduced and nothing is lost; call alert_on() alike on every rank",
    ),
)


def reason(text: str) -> bytes:
    """Return what a rank says of its failure, as it travels: not at any length."""
    data = text.encode("utf-8", "backslashreplace")
    return data if len(data) <= MOST_ERROR else data[: MOST_ERROR - 3] + b"..."


def reasons(texts: Iterable[bytes]) -> str:
    """Return what ranks said of their failures, each thing once, on one line."""
    said = dict.fromkeys(text.decode("utf-8", "replace") for text in texts)
    return "; ".join(map(escaped, said))


def name_ranks(ranks: Iterable[int]) -> str:
    """Return ``rank 3``, or ``ranks 0-2, 5``."""
    numbers = sorted(int(rank) for rank in ranks)
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
    return f"rank {text}" if len(numbers) == 1 else f"ranks {text}"
