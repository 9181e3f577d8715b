"""The reduction: what every rank has accumulated becomes one result, the same on all.

A route carries everyone's vectors. The header at the front of each lets all ranks see, in that same
collective, whether anybody disagrees, has failed, or holds something that the agreed schema has no
place for; then all take the same further steps. `README.md` in the folder `reduce` tells the
protocol in full.
"""

from __future__ import annotations

import contextlib
import enum
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from metricfold._core.exchange import Attendance, Exchanged, Outgoing, Recent, Route, choose
from metricfold._core.fold.custom import CustomResults
from metricfold._core.fold.names import Claims, show
from metricfold._core.fold.sample import FloatArray, Pool, Window
from metricfold._core.fold.state import COUNT, OTHER, State
from metricfold._core.reduce.agreement import (
    Registry,
    agree,
    check,
    check_whole,
    encoded,
    name_ranks,
    news,
    reason,
    reasons,
)
from metricfold._core.reduce.announced import MOST_CUSTOM
from metricfold._core.reduce.header import HEADER_SIZE, PROTOCOL, Field, Kind, RouteChoice
from metricfold._core.reduce.schema import Entry, Key, Schema, digest
from metricfold._core.reduce.totals import Rows, Totals
from metricfold.communicator.base import Communicator

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
        custom: results of handlers without lanes, as bytes.
        custom_keys: the keys that those belong to.
        step: the caller's step, or None.
        error: why this rank fails; it takes part all the same.
        sink_failed: whether a logger's sink has failed here, for all ranks to hear.
        outcome: what has become of it.
        news: what it holds beyond the agreed keys.
    """

    kind: Kind
    states: dict[Key, State]
    seconds: float
    custom: bytes = b""
    custom_keys: tuple[Key, ...] = ()
    step: int | None = None
    error: str = ""
    sink_failed: bool = False
    outcome: Outcome = Outcome.PENDING
    news: Sequence[Entry] = ()


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

    def pool(self, entry: Entry, view: Literal["run", "interval"]) -> Pool:
        """Return the values that a view of a DISTRIBUTION speaks about."""
        if not entry.bounded:
            totals = self.run if view == "run" else self.interval
            return totals.pools.get(entry.key, Pool())
        return (self.recent.recent if view == "run" else self.recent.interval)(entry.key)


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
        self.schema, self._claims = Schema(), Claims()
        self.run = Totals.empty(self.schema)
        self.interval = Totals.empty(self.schema)
        self.windows: dict[Key, Window] = {}
        self.generation = 0
        self.schema_rounds = 0
        self._wanted = wanted
        self._route: Route | None = None
        self._rows: Rows | None = None
        self._rows_of = self.schema
        self._present: set[Key] = set()
        self._sequence = 0
        self._reductions = self._loaded_after = 0

    def replace_totals(self, run: Totals, interval: Totals, reductions: int) -> None:
        """Go on from other totals, of a run with so many reductions; what is agreed on stays."""
        self.run, self.interval = run, interval
        self._reductions = self._loaded_after = reductions
        self.windows = {}
        self._close_interval()
        self.generation += 1

    def rebind(self) -> None:
        """Begin on a new communicator, whose ranks may be others: agree on everything anew."""
        self.schema, self._claims = Schema(), Claims()
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

        Raises on all ranks alike if one disagrees or has failed; then nothing is merged. What became
        of `mine` stands in its `outcome`, whatever is raised.
        """
        before = vars(self).copy()
        try:
            return self._reduced(communicator, mine, registry)
        except BaseException:
            if communicator.world_size == 1 and mine.outcome is Outcome.OPEN:
                # Nobody else can have merged it: it is as if nothing had been begun.
                vars(self).update(before)
                mine.outcome = Outcome.PENDING
            raise

    def _reduced(
        self, communicator: Communicator, mine: Contribution, registry: Registry
    ) -> Reduced:
        windows, payload, blob = self._prepared(communicator, mine, registry)
        mine.outcome = Outcome.OPEN
        headers, merged, *_ = self._exchange(communicator, mine, payload, blob)
        if merged is None:
            assert headers is not None
            self._take_in_news(communicator, headers, mine, windows, blob, registry)
            payload = self._packed_again(communicator, mine, windows, registry)
            headers, merged, *_ = self._exchange(communicator, mine, payload, b"")
            if merged is None:
                with _by_all(mine):
                    raise RuntimeError(_contradicting(headers))
        schema = self.schema
        custom = CustomResults()
        if schema.has_custom:
            assert headers is not None
            sizes = headers[:, Field.CUSTOM_SIZE].astype(np.int64).tolist()
            gathered = communicator.all_gather_bytes(mine.custom, sizes)
            with _by_all(mine):
                custom = CustomResults(gathered)
        with _by_all(mine):
            pools = {
                entry.key: merged.recent.interval(entry.key)
                for entry in schema.distributions
                if not entry.bounded
            }
        delta = replace(merged.delta, pools={k: pool for k, pool in pools.items() if pool.count})
        # From here on nothing fails, and every rank does the same.
        self.run = self.run.moved(schema).plus(delta)
        interval = self.interval.moved(schema).plus(delta)
        rows = self._with_earlier(merged.rows)
        windows = {key: one for key, one in windows.items() if schema.entries[key].bounded}
        if mine.kind is Kind.REDUCE:
            self._close_interval()
            self.interval = Totals.empty(schema)
            self.windows = {key: window.closed() for key, window in windows.items()}
        else:
            self.interval, self.windows = interval, windows
            self._rows, self._rows_of = rows, schema
            present = {key for key, state in mine.states.items() if state.sums[COUNT]}
            self._present = self._present | present
        self._reductions += 1
        reduced = Reduced(
            schema,
            self.run,
            interval,
            rows,
            merged.recent,
            merged.attendance,
            custom,
            communicator.world_size,
            merged.sink_failed,
            self._reductions,
        )
        mine.outcome = Outcome.MERGED
        return reduced

    def _with_earlier(self, rows: Rows) -> Rows:
        """Add what earlier reductions have brought to the open interval."""
        earlier, agreed = self._rows, self._rows_of
        if earlier is None:
            return rows
        # Of keys that were added up on the way nobody knows who had what.
        known = [
            entry for entry in rows.schema if entry.key in earlier.schema or entry.key not in agreed
        ]
        if len(known) < len(rows.schema.entries):
            rows = rows.moved(Schema(known))
        return earlier.moved(rows.schema).plus(rows)

    # -- What this rank sends

    def _prepared(
        self, communicator: Communicator, mine: Contribution, registry: Registry
    ) -> tuple[dict[Key, Window], Any, bytes]:
        """Return this rank's windows, what it sends, and its news."""
        if len(mine.custom) > MOST_CUSTOM:
            mine.error = mine.error or (
                f"the results and states of its handlers without lanes take {len(mine.custom)} "
                f"bytes, more than the {MOST_CUSTOM} that travel: keep less in them"
            )
        if mine.error:
            mine.custom = b""
            return self.windows, None, b""
        try:
            windows = self._windows_with(mine.states, registry)
            payload, lacking = self._packed(communicator, mine, windows, registry)
            lacking.update(
                key for key in mine.custom_keys if key not in self.schema or key in registry.odd()
            )
            loaded: Iterable[Entry] = ()
            if self.run.schema is not self.schema:
                loaded = (*self.run.schema, *self.interval.schema)
            mine.news = news(self.schema, lacking, mine.states, windows, loaded, registry)
        except Exception as error:  # noqa: BLE001 - the others go on: join them, and say so
            mine.error = f"it could not prepare what it holds: {error!r}"
            return self.windows, None, b""
        return windows, payload, encoded(mine.news)

    def _packed_again(
        self,
        communicator: Communicator,
        mine: Contribution,
        windows: Mapping[Key, Window],
        registry: Registry,
    ) -> Any:
        """Return what this rank sends once the keys are agreed on."""
        try:
            payload, lacking = self._packed(communicator, mine, windows, registry)
        except Exception as error:  # noqa: BLE001 - the others go on: join them, and say so
            mine.error = mine.error or f"it could not pack what it holds: {error!r}"
            return None
        if lacking and not mine.error:
            mine.error = f"the agreed keys lack places for {', '.join(map(show, lacking))}"
        return payload

    def _windows_with(self, states: Mapping[Key, State], registry: Registry) -> dict[Key, Window]:
        windows = dict(self.windows)
        for key, state in states.items():
            newer = state.window()
            if newer is not None:
                limit = registry.handler(key).laned().sample_limit
                windows[key] = windows.get(key, _NO_WINDOW).followed_by(newer, limit)
        return windows

    def _packed(
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

    # -- Exchanging

    def _exchange(
        self, communicator: Communicator, mine: Contribution, payload: Any, blob: bytes
    ) -> Exchanged:
        """Send what this rank holds, or identities if it has news or has failed.

        Raises on all ranks if one has failed or disagrees.
        """
        if mine.error:
            blob = reason(mine.error)
        header = self._header(mine, blob)
        # With news there is no place yet for what this rank holds.
        payload = None if blob else payload
        route = self._taken(communicator)
        headers, merged, failure, wrong = route.exchange(communicator, header, payload)
        if headers is None and (merged is None or self.schema.has_custom):
            if failure:
                mine.error, blob = failure, reason(failure)
                header = self._header(mine, blob)
            headers = communicator.all_gather(header)
        self._sequence += 1
        if headers is not None:
            with _by_all(mine):
                check_whole(headers)
            if headers[:, Field.ERROR].any():
                texts = self._exchange_blobs(communicator, headers, mine, blob)
                failed = np.flatnonzero(headers[:, Field.ERROR]).tolist()
                with _by_all(mine):
                    raise RuntimeError(
                        f"the reduction was given up, and nothing else is lost: {name_ranks(failed)} "
                        f"could not take part: {reasons(texts[rank] for rank in failed)}"
                    )
            with _by_all(mine):
                check(headers)
        if wrong:
            with _by_all(mine):
                raise RuntimeError(wrong)
        return Exchanged(headers, merged)

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
        header[Field.ROUTE] = self._wanted
        header[Field.PENDING] = bool(blob) and not mine.error
        header[Field.BLOB_HASH] = digest(blob) if blob else 0
        header[Field.BLOB_SIZE] = len(blob)
        header[Field.ERROR] = bool(mine.error)
        header[Field.SECONDS] = mine.seconds
        header[Field.CUSTOM_SIZE] = len(mine.custom)
        header[Field.SINK_FAILED] = mine.sink_failed
        return header

    @staticmethod
    def _exchange_blobs(
        communicator: Communicator, headers: FloatArray, mine: Contribution, blob: bytes
    ) -> list[bytes]:
        """Return everyone's blob; of equal ones, which the hash tells, only the first travels."""
        hashes = headers[:, Field.BLOB_HASH].astype(np.int64)
        sizes = headers[:, Field.BLOB_SIZE].astype(np.int64)
        first = {int(hashes[rank]): rank for rank in reversed(range(len(hashes)))}
        sender = [first[int(number)] for number in hashes]
        sent = [int(size) if sender[rank] == rank else 0 for rank, size in enumerate(sizes)]
        own = blob if sent[communicator.rank] else b""
        received = communicator.all_gather_bytes(own, sent)
        damaged = [
            rank
            for rank, size in enumerate(sent)
            if (size and digest(received[rank]) != int(hashes[rank]))
            or sizes[rank] != sizes[sender[rank]]
        ]
        if damaged:
            with _by_all(mine):
                raise RuntimeError(
                    f"what {name_ranks(damaged)} sent of new keys, or of a failure, did not arrive as "
                    "its header announces it. Nothing was reduced; look after that rank's machine"
                )
        return [received[sender[rank]] for rank in range(len(hashes))]

    def _taken(self, communicator: Communicator) -> Route:
        """Return the route that all ranks take now."""
        if self._route is None or self._route.schema is not self.schema:
            self._route = choose(self.schema, communicator.world_size, self._wanted)
        return self._route

    # -- News

    def _take_in_news(
        self,
        communicator: Communicator,
        headers: FloatArray,
        mine: Contribution,
        windows: dict[Key, Window],
        blob: bytes,
        registry: Registry,
    ) -> None:
        """Exchange the news, and give the schema room for all of them.

        Raises:
            ValueError: ranks hold a key or name otherwise than others; on all ranks alike.
        """
        blobs = self._exchange_blobs(communicator, headers, mine, blob)
        self.schema_rounds += 1
        # Where there are others, all read the same bytes, each its own too: so all come to the same.
        own = {blob: mine.news} if communicator.world_size == 1 else {}
        with _by_all(mine):
            agreed = agree(self.schema, self._claims, blobs, own)
        if communicator.rank == 0:
            for entry in agreed.overflowed(self.run.schema):
                _warn_of_categories(entry)
        self.schema = agreed.schema
        losers = {}
        for lost in agreed.lost:
            if communicator.rank in lost.ranks:
                state = mine.states.pop(lost.key, None)
                losers[lost.key] = 0 if state is None else int(state.sums[COUNT])
                windows.pop(lost.key, None)
        try:
            mine.error = registry.adopt(agreed, losers)
        except Exception as error:  # noqa: BLE001 - the others go on: join them, and say so
            mine.error = f"it could not take over the agreed keys: {error!r}"
        if agreed.lost:
            with _by_all(mine):
                raise ValueError("; ".join(map(str, agreed.lost)))


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
