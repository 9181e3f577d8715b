"""The reduction: what every rank has accumulated becomes one result, the same on all.

An exchange carries everyone's vectors. The header at the front of each lets all ranks see, in that same
exchange, whether anybody disagrees, has failed, or holds something that the agreed schema has no
place for; then all take the same further steps. `README.md` in the folder `reduce` tells the protocol in
full.
"""

from __future__ import annotations

import contextlib
import enum
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from metricfold._core.exchange.route import Arrived, Exchange
from metricfold._core.fold.custom import CustomResults
from metricfold._core.fold.names import Claims, show
from metricfold._core.fold.sample import FloatArray, Pool, Window
from metricfold._core.fold.state import OTHER, State
from metricfold._core.reduce.agreement import Registry, agree, news, read
from metricfold._core.reduce.announced import encoded
from metricfold._core.reduce.header import (
    HEADER_SIZE,
    MOST_CUSTOM,
    MOST_ERROR,
    PROTOCOL,
    Field,
    Kind,
    check,
    check_whole,
    name_ranks,
)
from metricfold._core.reduce.schema import Entry, Key, Schema, digest
from metricfold._core.reduce.totals import Rows, Totals
from metricfold._core.reduce.values import Recent
from metricfold._core.reduce.wire import Attendance, Merged, Outgoing, Wire
from metricfold.metric import escaped

__all__ = ["Contribution", "Outcome", "Reduced", "Reducer"]

_logger = logging.getLogger("metricfold")
_NO_WINDOW = Window()


class Outcome(enum.Enum):
    """What has become of a contribution."""

    PENDING = "no exchange has begun"
    OPEN = "an exchange has begun; other ranks may merge what this rank does not"
    REFUSED = "no rank has merged it, and all know that"
    MERGED = "all ranks have merged it, or will raise at their next call"


@dataclass(slots=True)
class Contribution:
    """What one rank brings to one reduction.

    Args:
        kind: which call this is.
        states: what each key has accumulated.
        seconds: wall time since the last reduction.
        custom: results of handlers without lanes, as bytes, and the keys that they belong to.
        step: the caller's step.
        error: why this rank fails; it takes part all the same.
        sink_failed: whether a logger's sink has failed here, for all ranks to hear.
        rules: a hash of the rules that look for alerts.
        found: what a local rule has found here, for all ranks to hear.
        outcome: what has become of it.
        news: what it holds beyond the agreed keys.
        windows: what it holds of each DISTRIBUTION, the most recent values of earlier ones included.
    """

    kind: Kind
    states: dict[Key, State]
    seconds: float
    custom: bytes = b""
    custom_keys: tuple[Key, ...] = ()
    step: int | None = None
    error: str = ""
    sink_failed: bool = False
    rules: int = 0
    found: float = 0.0
    outcome: Outcome = Outcome.PENDING
    news: Sequence[Entry] = ()
    windows: dict[Key, Window] = field(default_factory=dict)


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
        sink_failed: whether a logger's sink had failed on any of them.
        reductions: how many there have been in the run.
        found: what a local rule had found on any of them.
    """

    schema: Schema
    run: Totals
    interval: Totals
    rows: Rows
    recent: Recent
    attendance: Attendance | None
    custom: CustomResults
    world_size: int
    sink_failed: bool = False
    reductions: int = 0
    found: float = 0.0

    def pool(self, entry: Entry, view: Literal["run", "interval"]) -> Pool:
        """Return the values that a view of a DISTRIBUTION speaks about."""
        if not entry.bounded:
            totals = self.run if view == "run" else self.interval
            return totals.pools.get(entry.key, Pool())
        return (self.recent.recent if view == "run" else self.recent.interval)(entry.key)


class Reducer:
    """Runs reductions, and keeps what goes on from one to the next.

    Attributes:
        exchange: carries what it sends.
        schema: the agreed schema; changes only in an exchange that all ranks take part in.
        run: the run total; may have keys, out of a checkpoint, that the schema still lacks.
        interval: what reductions have folded into the interval that is still open.
        windows: this rank's recent values of bounded DISTRIBUTIONs.
        generation: how often state was loaded or reset.
        schema_rounds: how often new keys were exchanged.
    """

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self.schema, self._claims = Schema(), Claims()
        self.run = self.interval = self._nothing = Totals.empty(self.schema)
        self.windows: dict[Key, Window] = {}
        self.generation = 0
        self.schema_rounds = 0
        self._sequence = 0
        self._reductions = self._loaded_after = 0
        self._close_interval()

    def replace_totals(self, run: Totals, interval: Totals, reductions: int) -> None:
        """Go on from other totals, of a run with so many reductions; what is agreed on stays."""
        self.run, self.interval = run, interval
        self._reductions = self._loaded_after = reductions
        self.windows = {}
        self._close_interval()
        self.generation += 1

    def bind(self, exchange: Exchange) -> None:
        """Begin among other ranks: agree on everything anew."""
        self.exchange = exchange
        self.schema, self._claims = Schema(), Claims()
        if self._sequence and not self.run.sums.any():
            # Nothing but this process's own clock, which is no reason for ranks to disagree.
            self.run = self.interval = self._nothing = Totals.empty(self.schema)
        self._close_interval()
        self._sequence = 0

    @property
    def _wire(self) -> Wire:
        return self.exchange.wire(self.schema)

    def _close_interval(self) -> None:
        """Forget who has had what in the interval."""
        self._rows: Rows | None = None
        self._rows_of = self.schema
        self._present: set[Key] = set()
        self._with_nan: set[Key] = set()

    def reduce(self, mine: Contribution, registry: Registry) -> Reduced:
        """Take part in one reduction.

        Raises on all ranks alike if one disagrees or has failed; then nothing is merged. What became
        of `mine` stands in its `outcome`, whatever is raised.
        """
        before = vars(self).copy()
        try:
            return self._reduced(mine, registry)
        except BaseException:
            if self.exchange.world_size == 1 and mine.outcome is Outcome.OPEN:
                # Nobody else can have merged it: it is as if nothing had been begun.
                vars(self).update(before)
                mine.outcome = Outcome.PENDING
            raise

    def _reduced(self, mine: Contribution, registry: Registry) -> Reduced:
        vector, blob = self._prepared(mine, registry)
        arrived = self._exchanged(mine, vector, blob)
        if arrived.merged is None:
            assert arrived.headers is not None
            self._agree(mine, registry, self._blobs(mine, arrived.headers, blob))
            vector, blob = self._packed_again(mine, registry)
            arrived = self._exchanged(mine, vector, blob)
        merged, custom = self._whole(mine, arrived)
        return self._accumulated(mine, merged, custom)

    # -- Pack

    def _prepared(self, mine: Contribution, registry: Registry) -> tuple[FloatArray, bytes]:
        """Return what this rank sends, and its news or its error, with which it sends identities."""
        if len(mine.custom) > MOST_CUSTOM:
            mine.error = mine.error or (
                f"the results and states of its handlers without lanes take {len(mine.custom)} "
                f"bytes, more than the {MOST_CUSTOM} that travel: keep less in them"
            )
        if not mine.error:
            with _said(mine, "prepare what it holds"):
                mine.windows = self._windows_with(mine.states, registry)
                vector, lacking = self._packed(mine, registry)
                lacking.update(
                    key
                    for key in mine.custom_keys
                    if key not in self.schema or key in registry.conflicting()
                )
                loaded: Iterable[Entry] = ()
                if self.run.schema is not self.schema:
                    loaded = (*self.run.schema, *self.interval.schema)
                found = news(self.schema, lacking, mine.states, mine.windows, loaded, registry)
                mine.news, blob = found, encoded(found)
                return (self._wire.identity() if blob else vector), blob
        return self._failed(mine)

    def _failed(self, mine: Contribution) -> tuple[FloatArray, bytes]:
        """Return what a rank sends that takes part though it has failed, and what it says of that."""
        mine.custom, said = b"", mine.error.encode("utf-8", "backslashreplace")
        if len(said) > MOST_ERROR:
            said = said[: MOST_ERROR - 3] + b"..."
        return self._wire.identity(), said

    def _windows_with(self, states: dict[Key, State], registry: Registry) -> dict[Key, Window]:
        windows = dict(self.windows)
        for key, state in states.items():
            if state.sample is not None:
                limit = registry.handler(key).laned().sample_limit
                known = windows.get(key, _NO_WINDOW)
                windows[key] = known.followed_by(state.sample.window(), limit)
        return windows

    def _packed(self, mine: Contribution, registry: Registry) -> tuple[FloatArray, set[Key]]:
        """Return what this rank sends, and the keys that the schema has no place for."""
        states, windows = mine.states, mine.windows
        conflicting = registry.conflicting() & states.keys()
        if conflicting:
            states = {key: state for key, state in states.items() if key not in conflicting}
            windows = {key: window for key, window in windows.items() if key not in conflicting}
        outgoing = Outgoing(states, windows, self._present, self._with_nan)
        vector, lacking = self._wire.pack(outgoing, self.exchange.rank)
        return vector, lacking | conflicting

    def _header(self, mine: Contribution, blob: bytes) -> FloatArray:
        header = np.zeros(HEADER_SIZE)
        header[Field.PROTOCOL] = PROTOCOL
        header[Field.KIND] = mine.kind
        header[Field.SEQUENCE] = self._sequence
        header[Field.STEP] = -1 if mine.step is None else mine.step
        header[Field.SCHEMA] = self.schema.hash
        header[Field.GENERATION] = self.generation
        # Two states may hold the same totals, and differ in the interval or in recent values.
        header[Field.RUN] = digest(f"{self.run.hash()} {self._loaded_after}".encode())
        header[Field.ROUTE] = self.exchange.wanted
        header[Field.PENDING] = bool(blob) and not mine.error
        header[Field.BLOB_HASH] = digest(blob) if blob else 0
        header[Field.BLOB_SIZE] = len(blob)
        header[Field.ERROR] = bool(mine.error)
        header[Field.SECONDS] = mine.seconds
        header[Field.CUSTOM_SIZE] = len(mine.custom)
        header[Field.SINK_FAILED] = mine.sink_failed
        header[Field.RULES] = mine.rules
        header[Field.ALERTS] = mine.found
        return header

    # -- Exchange

    def _exchanged(self, mine: Contribution, vector: FloatArray, blob: bytes) -> Arrived:
        """Send what this rank holds; raises on all ranks if one has failed or disagrees."""
        header = self._header(mine, blob)
        mine.outcome = Outcome.OPEN
        arrived = self.exchange.vectors(self.schema, header, vector)
        self._sequence += 1
        headers = arrived.headers
        if headers is not None and (arrived.merged is None or self.schema.has_custom):
            with _by_all(mine):
                check_whole(headers)
            if headers[:, Field.ERROR].any():
                texts = self._blobs(mine, headers, blob)
                failed = np.flatnonzero(headers[:, Field.ERROR]).tolist()
                said = dict.fromkeys(texts[rank].decode("utf-8", "replace") for rank in failed)
                raise _refused(
                    mine,
                    f"the reduction was given up, and nothing else is lost: {name_ranks(failed)} "
                    f"could not take part: {'; '.join(map(escaped, said))}",
                )
            with _by_all(mine):
                check(headers)
        if arrived.wrong:
            raise _refused(mine, arrived.wrong)
        return arrived

    def _blobs(self, mine: Contribution, headers: FloatArray, blob: bytes) -> list[bytes]:
        """Return everyone's blob; of equal ones, which the hash tells, only the first travels."""
        announced = headers[:, [Field.BLOB_HASH, Field.BLOB_SIZE]].astype(np.int64)
        hashes, sizes = announced.T.tolist()
        first: dict[int, int] = {}
        sender = [first.setdefault(number, rank) for rank, number in enumerate(hashes)]
        sent = [size if sender[rank] == rank else 0 for rank, size in enumerate(sizes)]
        received = self.exchange.gathered(blob, sent)
        damaged = [
            rank
            for rank, size in enumerate(sent)
            if (size and digest(received[rank]) != hashes[rank])
            or sizes[rank] != sizes[sender[rank]]
        ]
        if damaged:
            raise _refused(
                mine,
                f"what {name_ranks(damaged)} sent of new keys, or of a failure, did not arrive as "
                "its header announces it. Nothing was reduced; look after that rank's machine",
            )
        return [received[rank] for rank in sender]

    # -- Agree

    def _agree(self, mine: Contribution, registry: Registry, blobs: Sequence[bytes]) -> None:
        """Give the schema room for the news of all ranks.

        Raises:
            ValueError: ranks hold a key or name otherwise than others; on all ranks alike.
        """
        self.schema_rounds += 1
        with _by_all(mine):
            # Where there are others, all read the same bytes, each its own too: so all come to the same.
            told = [(mine.news, [0])] if self.exchange.world_size == 1 else read(blobs)
            agreed = agree(self.schema, self._claims, told)
        if self.exchange.rank == 0:
            for entry in agreed.overflowed(self.run.schema):
                _warn_of_categories(entry)
        self.schema = agreed.schema
        losers = {one.key: one.beside for one in agreed.lost if self.exchange.rank in one.ranks}
        with _said(mine, "take over the agreed keys"):
            mine.error = registry.adopt(agreed, losers)
        if agreed.lost:
            mine.outcome = Outcome.REFUSED
            raise ValueError("; ".join(map(str, agreed.lost)))

    def _packed_again(self, mine: Contribution, registry: Registry) -> tuple[FloatArray, bytes]:
        """Return what this rank sends once the keys are agreed on, or identities and its error."""
        with _said(mine, "pack what it holds"):
            vector, lacking = self._packed(mine, registry)
            if lacking and not mine.error:
                mine.error = f"the agreed keys lack places for {', '.join(map(show, lacking))}"
        return self._failed(mine) if mine.error else (vector, b"")

    # -- Merge

    def _whole(self, mine: Contribution, arrived: Arrived) -> tuple[Merged, CustomResults]:
        """Return what has been merged, with the values that accumulate, and results without lanes."""
        merged, custom = arrived.merged, CustomResults()
        if merged is None:
            raise _refused(mine, _contradicting(arrived.headers))
        if self.schema.has_custom:
            assert arrived.headers is not None
            sizes = arrived.headers[:, Field.CUSTOM_SIZE].astype(np.int64).tolist()
            gathered = self.exchange.gathered(mine.custom, sizes)
            with _by_all(mine):
                custom = CustomResults(gathered)
        with _by_all(mine):
            pools = {
                entry.key: merged.recent.interval(entry.key)
                for entry in self.schema.distributions
                if not entry.bounded
            }
        pools = {key: pool for key, pool in pools.items() if pool.count}
        if pools:
            merged = replace(merged, delta=replace(merged.delta, pools=pools))
        return merged, custom

    # -- Result

    def _accumulated(self, mine: Contribution, merged: Merged, custom: CustomResults) -> Reduced:
        """Add what has been merged to the run and the interval.

        From here on nothing fails, and every rank does the same.
        """
        schema = self.schema
        self.run = self.run.moved(schema).plus(merged.delta)
        interval = merged.delta
        if self.interval is not self._nothing:
            interval = self.interval.moved(schema).plus(interval)
        rows = self._with_earlier(merged.rows)
        windows = {key: one for key, one in mine.windows.items() if schema.entries[key].bounded}
        if mine.kind is Kind.REDUCE:
            self._close_interval()
            self.interval = self._nothing = Totals.empty(schema)
            self.windows = {key: window.closed() for key, window in windows.items()}
        else:
            self.interval, self.windows = interval, windows
            self._rows, self._rows_of = rows, schema
            self._present = self._present.union(k for k, one in mine.states.items() if one.count)
            self._with_nan = self._with_nan.union(k for k, one in mine.states.items() if one.nans)
        self._reductions += 1
        reduced = Reduced(
            schema,
            self.run,
            interval,
            rows,
            merged.recent,
            merged.attendance,
            custom,
            self.exchange.world_size,
            merged.sink_failed,
            self._reductions,
            merged.found,
        )
        mine.outcome = Outcome.MERGED
        return reduced

    def _with_earlier(self, rows: Rows) -> Rows:
        """Add what earlier reductions have brought to the open interval."""
        earlier, agreed = self._rows, self._rows_of
        if earlier is None:
            return rows
        # Of keys that were merged on the way nobody knows who had what.
        known = [
            entry for entry in rows.schema if entry.key in earlier.schema or entry.key not in agreed
        ]
        if len(known) < len(rows.schema.entries):
            rows = rows.moved(Schema(known))
        return earlier.moved(rows.schema).plus(rows)


@contextlib.contextmanager
def _by_all(mine: Contribution) -> Iterator[None]:
    """Take what is raised here for what all ranks raise, for all have received the same."""
    try:
        yield
    except MemoryError:
        raise
    except Exception:
        mine.outcome = Outcome.REFUSED
        raise


def _refused(mine: Contribution, why: str) -> RuntimeError:
    """Return what all ranks raise."""
    mine.outcome = Outcome.REFUSED
    return RuntimeError(why)


@contextlib.contextmanager
def _said(mine: Contribution, doing: str) -> Iterator[None]:
    """Let the others hear what is raised here: they go on, so join them."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - the user's handler, or a device
        mine.error = mine.error or f"it could not {doing}: {error!r}"


def _contradicting(headers: FloatArray | None) -> str:
    """Return what to say of ranks whose keys are agreed on, and which send no values for them."""
    pending = [] if headers is None else np.flatnonzero(headers[:, Field.PENDING]).tolist()
    who = f"{name_ranks(pending)} asked" if pending else "a rank asked"
    return (
        f"{who} for new keys again, right after all had agreed on them, or sent values that "
        "contradict its header. Nothing was reduced; look after that rank's machine"
    )


def _warn_of_categories(entry: Entry) -> None:
    _logger.warning(
        "%s has more than %d categories: those that the ranks came upon first are told apart, all "
        "others are counted as %r. For more of them, raise max_categories",
        show(entry.key),
        entry.most,
        OTHER,
    )
