"""The reduction: what every rank has accumulated becomes one result, the same on all.

In the steady state this is one all-gather. The header at the front of each rank's vector lets all
ranks see, in that same collective, whether anybody disagrees, has failed, or holds something that
the agreed schema has no place for; then all take the same further steps. `README.md` in the folder
`communicator` tells the protocol in full.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from metricfold.checkpoint import Saved
from metricfold.communicator.base import Communicator
from metricfold.custom import CustomResults
from metricfold.handlers import (
    CategoryState,
    DistributionAggHandler,
    FloatArray,
    State,
    WindowState,
)
from metricfold.naming import Claims, show
from metricfold.packing import (
    PROTOCOL,
    Entry,
    Field,
    Key,
    Kind,
    Schema,
    Window,
    digest,
)
from metricfold.totals import Rows, Totals

__all__ = ["Contribution", "Reduced", "Reducer", "Registry"]

_SMALLEST_CAPACITY = 16


class Registry(Protocol):
    """What a reduction asks the aggregator about its keys."""

    def handler(self, key: Key) -> object: ...

    def entry(self, key: Key) -> Entry:
        """Return how `key` travels, as far as its handler decides it."""
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
        rows: the same, per rank.
        windows: recent values, per rank: shape (world_size, schema.window_width).
        custom: results of handlers without lanes.
        world_size: the number of ranks.
    """

    schema: Schema
    run: Totals
    interval: Totals
    rows: Rows
    windows: FloatArray
    custom: CustomResults
    world_size: int

    def saved(self, *, interval_open: bool) -> Saved:
        """Return what a checkpoint holds after this reduction."""
        windows = {}
        for entry in self.schema:
            if entry.capacity:
                found = [self.schema.window_of(row, entry.key) for row in self.windows]
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

    Attributes:
        schema: the agreed schema; changes only in an exchange that all ranks take part in.
        run: the run total; may have keys, out of a checkpoint, that the schema still lacks.
        interval: what reductions have folded into the interval that is still open.
        windows: this rank's recent values.
        generation: how often state was loaded or reset.
        schema_rounds: how often new keys were exchanged.
    """

    def __init__(self) -> None:
        self.schema = Schema()
        self.run = Totals.empty(self.schema)
        self.interval = Totals.empty(self.schema)
        self.windows: dict[Key, Window] = {}
        self.generation = 0
        self.schema_rounds = 0
        self._rows: Rows | None = None
        self._sequence = 0

    def replace_totals(self, run: Totals, interval: Totals) -> None:
        """Go on from other totals; what the ranks have agreed on stays."""
        self.run, self.interval = run, interval
        self.windows = {}
        self._rows = None
        self.generation += 1

    def rebind(self) -> None:
        """Begin on a new communicator, whose ranks may be others: agree on everything anew."""
        self.schema = Schema()
        if not self.run.sums.any():
            # Nothing but this process's own clock, which is no reason for ranks to disagree.
            self.run = self.interval = Totals.empty(self.schema)
        self._rows = None
        self._sequence = 0

    def reduce(self, communicator: Communicator, mine: Contribution, registry: Registry) -> Reduced:
        """Take part in one reduction.

        Raises on all ranks alike if one disagrees or has failed; then nothing is merged.
        """
        vector, windows, pending = None, self.windows, []
        if not mine.error:
            try:
                windows = self._windows_with(mine.states, registry)
                vector, lacking = self._pack(mine.states, windows, registry)
                pending = self._pending(lacking, mine, windows, registry)
            except Exception as error:  # noqa: BLE001 - the others go on: join them, and say so
                mine.error = f"it could not prepare what it holds: {error!r}"
        rows, sizes = self._gather(communicator, mine, vector, windows, pending, registry)
        schema = self.schema
        sums, maxs, window_rows = schema.split(rows)
        custom = CustomResults()
        if schema.has_custom:
            custom = CustomResults(communicator.all_gather_bytes(mine.custom, sizes))
        seconds = float(rows[:, Field.SECONDS].max())
        delta = Rows(schema, sums, maxs)
        # From here on nothing fails, and every rank does the same.
        merged = delta.merged(seconds)
        self.run = self.run.moved(schema).plus(merged)
        interval = self.interval.moved(schema).plus(merged)
        interval_rows = delta if self._rows is None else self._rows.moved(schema).plus(delta)
        if mine.kind is Kind.REDUCE:
            self.interval, self._rows = Totals.empty(schema), None
            windows = {key: window.closed() for key, window in windows.items()}
        else:
            self.interval, self._rows = interval, interval_rows
        self.windows = windows
        return Reduced(
            schema,
            self.run,
            interval,
            interval_rows,
            window_rows,
            custom,
            communicator.world_size,
        )

    # -- Gathering

    def _gather(
        self,
        communicator: Communicator,
        mine: Contribution,
        vector: FloatArray | None,
        windows: dict[Key, Window],
        pending: Sequence[Entry],
        registry: Registry,
    ) -> tuple[FloatArray, list[int]]:
        """Return everyone's vectors, once the schema has room for all that they bring."""
        blob = Schema(pending).to_json().encode() if pending else b""
        rows = self._all_gather(communicator, mine, vector, blob)
        if rows[:, Field.PENDING].any():
            blobs = self._exchange_blobs(communicator, rows, blob)
            self.schema_rounds += 1
            conflicts = self._agree(blobs, communicator.rank, mine, windows, registry)
            if conflicts:
                raise ValueError("; ".join(conflicts))
            vector, lacking = self._pack(mine.states, windows, registry)
            if lacking and not mine.error:
                mine.error = f"the agreed keys lack places for {', '.join(map(show, lacking))}"
            rows = self._all_gather(communicator, mine, vector, b"")
        return rows, [int(size) for size in rows[:, Field.CUSTOM_SIZE]]

    def _all_gather(
        self,
        communicator: Communicator,
        mine: Contribution,
        vector: FloatArray | None,
        blob: bytes,
    ) -> FloatArray:
        if mine.error:
            blob = mine.error.encode()
        header = {
            Field.PROTOCOL: PROTOCOL,
            Field.KIND: mine.kind,
            Field.SEQUENCE: self._sequence,
            Field.STEP: -1 if mine.step is None else mine.step,
            Field.SCHEMA: self.schema.hash,
            Field.GENERATION: self.generation,
            Field.RUN: self.run.hash(),
            Field.PENDING: bool(blob) and not mine.error,
            Field.BLOB_HASH: digest(blob) if blob else 0,
            Field.BLOB_SIZE: len(blob),
            Field.ERROR: bool(mine.error),
            Field.SECONDS: mine.seconds,
            Field.CUSTOM_SIZE: len(mine.custom),
        }
        if vector is None or blob:
            # There is nothing to send, or no place for it yet.
            vector, _ = self.schema.pack({}, {})
        for name, number in header.items():
            vector[name] = number
        rows = communicator.all_gather(vector)
        self._sequence += 1
        if rows[:, Field.ERROR].any():
            texts = self._exchange_blobs(communicator, rows, blob)
            failed = np.flatnonzero(rows[:, Field.ERROR]).tolist()
            raise RuntimeError(
                f"the reduction was given up, and nothing else is lost: {_ranks(failed)} could "
                f"not take part: {'; '.join(dict.fromkeys(texts[rank].decode() for rank in failed))}"
            )
        _check_agreement(rows)
        return rows

    @staticmethod
    def _exchange_blobs(communicator: Communicator, rows: FloatArray, blob: bytes) -> list[bytes]:
        """Return everyone's blob; of equal ones, which the hash tells, only the first travels."""
        hashes = rows[:, Field.BLOB_HASH].astype(np.int64)
        sizes = rows[:, Field.BLOB_SIZE].astype(np.int64)
        first = {int(hashes[rank]): rank for rank in reversed(range(len(hashes)))}
        sender = [first[int(number)] for number in hashes]
        sent = [int(size) if sender[rank] == rank else 0 for rank, size in enumerate(sizes)]
        mine = blob if sent[communicator.rank] else b""
        received = communicator.all_gather_bytes(mine, sent)
        return [received[sender[rank]] for rank in range(len(hashes))]

    def _pack(
        self, states: Mapping[Key, State], windows: Mapping[Key, Window], registry: Registry
    ) -> tuple[FloatArray, set[Key]]:
        """Return this rank's vector, and the keys that the schema has no place for."""
        odd = registry.odd() & states.keys()
        if odd:
            states = {key: state for key, state in states.items() if key not in odd}
        vector, lacking = self.schema.pack(states, windows)
        return vector, lacking | odd

    # -- Agreeing on keys

    def _windows_with(self, states: Mapping[Key, State], registry: Registry) -> dict[Key, Window]:
        windows = dict(self.windows)
        for key, state in states.items():
            if isinstance(state, WindowState):
                handler = registry.handler(key)
                assert isinstance(handler, DistributionAggHandler)
                window = windows.get(key, Window.empty())
                windows[key] = window.followed_by(state, handler.window_size)
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
            entry = registry.entry(key)
            state, window = mine.states.get(key), windows.get(key)
            if isinstance(state, CategoryState):
                entry = replace(entry, categories=tuple(sorted(state.counts)))
            if window is not None:
                handler = registry.handler(key)
                assert isinstance(handler, DistributionAggHandler)
                capacity = _SMALLEST_CAPACITY
                while capacity < window.values.size:
                    capacity *= 2
                capacity = min(capacity, handler.window_size)
                entry = replace(entry, capacity=capacity, weighted=window.weights is not None)
            add(entry)
        for key in mine.custom_keys:
            if key not in self.schema or key in registry.odd():
                add(registry.entry(key))
        return list(pending.values())

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


def _join(agreed: dict[Key, Entry], claims: Claims, entry: Entry) -> str:
    """Add `entry` to the agreed ones; returns why it cannot be, or nothing."""
    known = agreed.get(entry.key)
    if known is not None:
        if known.compatible(entry):
            agreed[entry.key] = known.joined(entry)
            return ""
        return (
            f"{show(entry.key)} as {entry.type!r}, but it is already registered with aggregation "
            f"type {known.type!r} on the other ranks"
        )
    try:
        claims.add(entry.key, entry.suffixes)
    except ValueError as error:
        return f"{show(entry.key)} as {entry.type!r}, but {error}"
    agreed[entry.key] = entry
    return ""


def _check_agreement(rows: FloatArray) -> None:
    """Raise, on all ranks alike, if the ranks are not in the same call with the same state."""
    headers = rows[:, : Field.RUN + 1]
    if (headers == headers[0]).all():
        return
    for field, beginning, say, end in _COMPLAINTS:
        numbers = rows[:, field].tolist()
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
