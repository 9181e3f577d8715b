"""The reduction: what every rank has accumulated becomes one result, the same on all.

A route carries everyone's vectors. The header at the front of each lets all ranks see, in that same
collective, whether anybody disagrees, has failed, or holds something that the agreed schema has no
place for; then all take the same further steps. `README.md` in the folder `communicator` tells the
protocol in full.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np

from metricfold.checkpoint import Saved
from metricfold.communicator.base import Communicator
from metricfold.custom import CustomResults
from metricfold.handlers import (
    COUNT,
    OTHER,
    CategoryState,
    DistributionAggHandler,
    State,
    WindowState,
)
from metricfold.naming import Claims, show
from metricfold.pool import FloatArray, Pool, Window
from metricfold.routes import (
    Attendance,
    Exchanged,
    Outgoing,
    Recent,
    Route,
    RouteChoice,
    choose,
)
from metricfold.schema import (
    AGREED,
    HEADER_SIZE,
    PROTOCOL,
    Entry,
    Field,
    Key,
    Kind,
    Schema,
    digest,
)
from metricfold.totals import Rows, Totals

__all__ = ["Contribution", "Reduced", "Reducer", "Registry"]

_logger = logging.getLogger("metricfold")
_SMALLEST_CAPACITY = 16
_NO_WINDOW = Window()


class Registry(Protocol):
    """What a reduction asks the aggregator about its keys."""

    def handler(self, key: Key) -> object: ...

    def entry(self, key: Key) -> Entry:
        """Return how `key` travels, as far as its handler decides it."""
        ...

    def per_rank(self) -> AbstractSet[Key]:
        """Return the keys of which each rank's values are wanted, whatever the route."""
        ...

    def odd(self) -> set[Key]:
        """Return the keys that this rank holds otherwise than the ranks have agreed."""
        ...

    def adopt(self, schema: Schema, losers: Mapping[Key, int]) -> str:
        """Take over what the ranks have agreed on; returns what this rank cannot do with it.

        Args:
            schema: the agreed keys.
            losers: keys that this rank must forget, and how many values of each have gone.
        """
        ...


@dataclass(slots=True)
class Contribution:
    """What one rank brings to one reduction.

    Args:
        kind: which call this is.
        states: what each key has accumulated.
        seconds: wall time since the last reduction.
        custom: results of handlers without lanes, as bytes.
        custom_keys: the keys that those belong to.
        step: the caller's step, or None.
        error: why this rank fails; it takes part all the same.
    """

    kind: Kind
    states: dict[Key, State]
    seconds: float
    custom: bytes = b""
    custom_keys: tuple[Key, ...] = ()
    step: int | None = None
    error: str = ""


@dataclass(frozen=True, slots=True)
class Reduced:
    """What came out of one reduction, the same on all ranks.

    Args:
        schema: the keys.
        run: everything since the start.
        interval: what came in since the last reduction that closed an interval.
        rows: the same, per rank, of the keys that are known per rank.
        recent: values of DISTRIBUTIONs, as this reduction brought them.
        attendance: what is known of the ranks otherwise; None if all keys are known per rank.
        custom: results of handlers without lanes.
        world_size: the number of ranks.
    """

    schema: Schema
    run: Totals
    interval: Totals
    rows: Rows
    recent: Recent
    attendance: Attendance | None
    custom: CustomResults
    world_size: int

    def pool(self, entry: Entry, view: Literal["run", "interval"]) -> Pool:
        """Return the values that a view of a DISTRIBUTION speaks about."""
        if not entry.bounded:
            totals = self.run if view == "run" else self.interval
            return totals.pools.get(entry.key, Pool())
        return (self.recent.recent if view == "run" else self.recent.interval)(entry.key)

    def saved(self, *, interval_open: bool) -> Saved:
        """Return what a checkpoint holds after this reduction."""
        windows = {}
        for entry in self.schema.distributions:
            if entry.bounded:
                found = self.recent.windows(entry.key)
                windows[entry.key] = (
                    found if interval_open else [window.closed() for window in found]
                )
        if self.custom.unsaved:
            raise TypeError(self.custom.unsaved)
        interval = self.interval if interval_open else Totals.empty(self.schema)
        custom = {
            "run": self.custom.saved["run"],
            "interval": self.custom.saved["interval"] if interval_open else [],
        }
        return Saved(self.run, interval, windows, custom)


class Reducer:
    """Runs reductions, and keeps what goes on from one to the next.

    Args:
        wanted: the route that the caller wants.

    Attributes:
        schema: the agreed schema; changes only in an exchange that all ranks take part in.
        run: the run total; may have keys, out of a checkpoint, that the schema still lacks.
        interval: what reductions have folded into the interval that is still open.
        windows: this rank's recent values of bounded DISTRIBUTIONs.
        generation: how often state was loaded or reset.
        schema_rounds: how often new keys were exchanged.
    """

    def __init__(self, wanted: RouteChoice = RouteChoice.AUTO) -> None:
        self.schema = Schema()
        self.run = Totals.empty(self.schema)
        self.interval = Totals.empty(self.schema)
        self.windows: dict[Key, Window] = {}
        self.generation = 0
        self.schema_rounds = 0
        self._wanted = wanted
        self._route: Route | None = None
        self._rows: Rows | None = None
        self._present: set[Key] = set()
        self._sequence = 0

    def replace_totals(self, run: Totals, interval: Totals) -> None:
        """Go on from other totals; what the ranks have agreed on stays."""
        self.run, self.interval = run, interval
        self.windows = {}
        self._close_interval()
        self.generation += 1

    def rebind(self) -> None:
        """Begin on a new communicator, whose ranks may be others: agree on everything anew."""
        self.schema = Schema()
        if not self.run.sums.any():
            # Nothing but this process's own clock, which is no reason for ranks to disagree.
            self.run = self.interval = Totals.empty(self.schema)
        self._route = None
        self._close_interval()
        self._sequence = 0

    def _close_interval(self) -> None:
        self._rows, self._present = None, set()

    def reduce(self, communicator: Communicator, mine: Contribution, registry: Registry) -> Reduced:
        """Take part in one reduction.

        Raises on all ranks alike if one disagrees or has failed; then nothing is merged.
        """
        windows, payload, pending = self.windows, None, []
        if not mine.error:
            try:
                windows = self._windows_with(mine.states, registry)
                payload, lacking = self._pack(communicator, mine, windows, registry)
                pending = self._pending(lacking, mine, windows, registry)
            except Exception as error:  # noqa: BLE001 - the others go on: join them, and say so
                mine.error = f"it could not prepare what it holds: {error!r}"
        blob = Schema(pending).to_json().encode() if pending else b""
        headers, merged, _ = self._exchange(communicator, mine, payload, blob)
        if merged is None:
            assert headers is not None
            self._agree_on_news(communicator, headers, blob, mine, windows, registry)
            payload, lacking = self._pack(communicator, mine, windows, registry)
            if lacking and not mine.error:
                mine.error = f"the agreed keys lack places for {', '.join(map(show, lacking))}"
            headers, merged, _ = self._exchange(communicator, mine, payload, b"")
            assert merged is not None
        schema = self.schema
        custom = CustomResults()
        if schema.has_custom:
            assert headers is not None
            sizes = headers[:, Field.CUSTOM_SIZE].astype(np.int64).tolist()
            custom = CustomResults(communicator.all_gather_bytes(mine.custom, sizes))
        pools = {
            entry.key: merged.recent.interval(entry.key)
            for entry in schema.distributions
            if not entry.bounded
        }
        delta = replace(merged.delta, pools={k: pool for k, pool in pools.items() if pool.count})
        # From here on nothing fails, and every rank does the same.
        self.run = self.run.moved(schema).plus(delta)
        interval = self.interval.moved(schema).plus(delta)
        rows = merged.rows
        if self._rows is not None:
            rows = self._rows.moved(rows.schema).plus(rows)
        windows = {key: one for key, one in windows.items() if schema.entries[key].bounded}
        if mine.kind is Kind.REDUCE:
            self._close_interval()
            self.interval = Totals.empty(schema)
            self.windows = {key: window.closed() for key, window in windows.items()}
        else:
            self.interval, self._rows, self.windows = interval, rows, windows
            self._present.update(key for key, state in mine.states.items() if state.sums[COUNT])
        return Reduced(
            schema,
            self.run,
            interval,
            rows,
            merged.recent,
            merged.attendance,
            custom,
            communicator.world_size,
        )

    # -- Exchanging

    def _exchange(
        self, communicator: Communicator, mine: Contribution, payload: Any, blob: bytes
    ) -> Exchanged:
        """Send what this rank holds, or identities if it has news or has failed.

        Raises on all ranks if one has failed or disagrees.
        """
        if mine.error:
            blob = mine.error.encode()
        header = self._header(mine, blob)
        # With news there is no place yet for what this rank holds.
        payload = None if blob else payload
        route = self._taken(communicator)
        headers, merged, failure = route.exchange(communicator, header, payload)
        if headers is None and (merged is None or self.schema.has_custom):
            if failure:
                mine.error, blob = failure, failure.encode()
                header = self._header(mine, blob)
            headers = communicator.all_gather(header)
        self._sequence += 1
        if headers is not None:
            if headers[:, Field.ERROR].any():
                texts = self._exchange_blobs(communicator, headers, blob)
                failed = np.flatnonzero(headers[:, Field.ERROR]).tolist()
                reasons = dict.fromkeys(texts[rank].decode() for rank in failed)
                raise RuntimeError(
                    f"the reduction was given up, and nothing else is lost: {_ranks(failed)} "
                    f"could not take part: {'; '.join(reasons)}"
                )
            _check_agreement(headers)
        return Exchanged(headers, merged)

    def _header(self, mine: Contribution, blob: bytes) -> FloatArray:
        header = np.zeros(HEADER_SIZE)
        header[Field.PROTOCOL] = PROTOCOL
        header[Field.KIND] = mine.kind
        header[Field.SEQUENCE] = self._sequence
        header[Field.STEP] = -1 if mine.step is None else mine.step
        header[Field.SCHEMA] = self.schema.hash
        header[Field.GENERATION] = self.generation
        header[Field.RUN] = self.run.hash()
        header[Field.ROUTE] = self._wanted
        header[Field.PENDING] = bool(blob) and not mine.error
        header[Field.BLOB_HASH] = digest(blob) if blob else 0
        header[Field.BLOB_SIZE] = len(blob)
        header[Field.ERROR] = bool(mine.error)
        header[Field.SECONDS] = mine.seconds
        header[Field.CUSTOM_SIZE] = len(mine.custom)
        return header

    @staticmethod
    def _exchange_blobs(
        communicator: Communicator, headers: FloatArray, blob: bytes
    ) -> list[bytes]:
        """Return everyone's blob; of equal ones, which the hash tells, only the first travels."""
        hashes = headers[:, Field.BLOB_HASH].astype(np.int64)
        sizes = headers[:, Field.BLOB_SIZE].astype(np.int64)
        first = {int(hashes[rank]): rank for rank in reversed(range(len(hashes)))}
        sender = [first[int(number)] for number in hashes]
        sent = [int(size) if sender[rank] == rank else 0 for rank, size in enumerate(sizes)]
        mine = blob if sent[communicator.rank] else b""
        received = communicator.all_gather_bytes(mine, sent)
        return [received[sender[rank]] for rank in range(len(hashes))]

    def _taken(self, communicator: Communicator) -> Route:
        """Return the route that all ranks take now."""
        if self._route is None or self._route.schema is not self.schema:
            self._route = choose(self.schema, communicator.world_size, self._wanted)
        return self._route

    def _pack(
        self,
        communicator: Communicator,
        mine: Contribution,
        windows: Mapping[Key, Window],
        registry: Registry,
    ) -> tuple[Any, set[Key]]:
        """Return what this rank sends, and the keys that the schema has no place for."""
        states = mine.states
        odd = registry.odd() & states.keys()
        if odd:
            states = {key: state for key, state in states.items() if key not in odd}
            windows = {key: window for key, window in windows.items() if key not in odd}
        outgoing = Outgoing(mine.kind, states, windows, self._present)
        payload, lacking = self._taken(communicator).pack(outgoing)
        return payload, lacking | odd

    # -- Agreeing on keys

    def _windows_with(self, states: Mapping[Key, State], registry: Registry) -> dict[Key, Window]:
        windows = dict(self.windows)
        for key, state in states.items():
            if isinstance(state, WindowState):
                handler = registry.handler(key)
                assert isinstance(handler, DistributionAggHandler)
                window = windows.get(key, _NO_WINDOW)
                windows[key] = window.followed_by(state.window(), handler.limit)
        return windows

    def _pending(
        self,
        lacking: set[Key],
        mine: Contribution,
        windows: Mapping[Key, Window],
        registry: Registry,
    ) -> list[Entry]:
        """Return what this rank holds beyond the schema: the keys that lack a place, and others."""
        pending: dict[Key, Entry] = {}

        def add(entry: Entry) -> None:
            earlier = pending.get(entry.key)
            pending[entry.key] = entry if earlier is None else earlier.joined(entry)

        if self.run.schema is not self.schema:
            for entry in self.schema.beyond((*self.run.schema, *self.interval.schema)):
                add(entry)
        for key in sorted(lacking):
            add(self._wanting(key, mine.states.get(key), windows.get(key), registry))
        for key in sorted(registry.per_rank()):
            agreed = self.schema.entries.get(key)
            if agreed is not None and not agreed.per_rank and key not in registry.odd():
                add(registry.entry(key))
        for key in mine.custom_keys:
            if key not in self.schema or key in registry.odd():
                add(registry.entry(key))
        return list(pending.values())

    def _wanting(
        self, key: Key, state: State | None, window: Window | None, registry: Registry
    ) -> Entry:
        """Return the entry of a key, with room for what this rank holds of it."""
        entry = registry.entry(key)
        if isinstance(state, CategoryState):
            known = self.schema.entries.get(key, entry)
            grown = known.with_categories(state.counts)
            kept = set(grown.categories)
            new = tuple(category for category in state.counts if category in kept)
            entry = replace(entry, categories=new, full=grown.full)
        if window is not None:
            handler = registry.handler(key)
            assert isinstance(handler, DistributionAggHandler)
            capacity = _SMALLEST_CAPACITY
            while capacity < window.values.size:
                capacity *= 2
            entry = replace(
                entry,
                capacity=min(capacity, handler.limit),
                weighted=window.weights is not None,
                condensed=window.older is not None,
            )
        return entry

    def _agree_on_news(
        self,
        communicator: Communicator,
        headers: FloatArray,
        blob: bytes,
        mine: Contribution,
        windows: dict[Key, Window],
        registry: Registry,
    ) -> None:
        """Exchange the news, and give the schema room for all of them.

        Raises:
            ValueError: ranks hold a key or name otherwise than others; on all ranks alike.
        """
        blobs = self._exchange_blobs(communicator, headers, blob)
        self.schema_rounds += 1
        conflicts = self._agree(blobs, communicator.rank, mine, windows, registry)
        if conflicts:
            raise ValueError("; ".join(conflicts))

    def _agree(
        self,
        blobs: Sequence[bytes],
        rank: int,
        mine: Contribution,
        windows: dict[Key, Window],
        registry: Registry,
    ) -> list[str]:
        """Give the schema room for what all ranks bring, in rank order, first come first kept.

        Every rank comes to the same schema, because it follows from what was exchanged alone.
        Returns what could not be agreed on.
        """
        claims = Claims()
        agreed = dict(self.schema.entries)
        for entry in agreed.values():
            claims.add(entry.key, entry.suffixes)
        parsed = {blob: Schema.entries_from_json(blob.decode()) for blob in set(blobs) if blob}
        lost: dict[tuple[Key, str], tuple[list[int], str]] = {}
        for sender, blob in enumerate(blobs):
            for entry in parsed.get(blob, ()):
                reason = _join(agreed, claims, entry)
                if reason:
                    ranks, _ = lost.setdefault((entry.key, entry.type), ([], reason))
                    ranks.append(sender)
        if rank == 0:
            self._warn_of_categories(agreed)
        self.schema = Schema(agreed.values())
        losers = {}
        for (key, _), (ranks, _) in lost.items():
            if rank in ranks:
                state = mine.states.pop(key, None)
                losers[key] = 0 if state is None else int(state.sums[0])
                windows.pop(key, None)
        try:
            mine.error = registry.adopt(self.schema, losers)
        except Exception as error:  # noqa: BLE001 - the others go on: join them, and say so
            mine.error = f"it could not take over the agreed keys: {error!r}"
        return [
            f"{_ranks(ranks)} held {reason}; what they held of it is dropped"
            for ranks, reason in lost.values()
        ]

    def _warn_of_categories(self, agreed: Mapping[Key, Entry]) -> None:
        """Say which keys have just got more categories than are told apart."""
        known = (*self.schema, *self.run.schema)
        full = {entry.key for entry in known if entry.full}
        for key, entry in agreed.items():
            if entry.full and key not in full:
                _logger.warning(
                    "%s has more than %d categories: those that the ranks came upon first are "
                    "told apart, all others are counted as %r. For more of them, raise "
                    "max_categories",
                    show(key),
                    entry.most,
                    OTHER,
                )


def _join(agreed: dict[Key, Entry], claims: Claims, entry: Entry) -> str:
    """Add `entry` to the agreed ones; returns why it cannot be, or nothing."""
    known = agreed.get(entry.key)
    if known is not None:
        if known.compatible(entry):
            agreed[entry.key] = known.joined(entry)
            return ""
        if known.bounded != entry.bounded:
            sizes = ("dist_window_size=None", "a window size")
            return (
                f"{show(entry.key)} with {sizes[entry.bounded]}, but the other ranks hold it with "
                f"{sizes[known.bounded]}"
            )
        return (
            f"{show(entry.key)} as {entry.type!r}, but it is already registered with aggregation "
            f"type {known.type!r} on the other ranks"
        )
    try:
        claims.add(entry.key, entry.suffixes)
    except ValueError as error:
        return f"{show(entry.key)} as {entry.type!r}, but {error}"
    agreed[entry.key] = replace(entry, categories=(), full=False).joined(entry)
    return ""


def _check_agreement(headers: FloatArray) -> None:
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
            who = ", ".join(f"{_ranks(ranks)} {say(number)}" for number, ranks in groups.items())
            raise RuntimeError(beginning + who + end)


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
        "the ranks hold different run totals: ",
        lambda number: f"with total {int(number):x}",
        ". Load the same checkpoint on every rank",
    ),
    (
        Field.ROUTE,
        "the ranks were told different routes: ",
        lambda number: f"with route={RouteChoice(int(number)).name.lower()!r}",
        ". Make the aggregator with the same route on every rank",
    ),
)


def _ranks(ranks: Iterable[int]) -> str:
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
