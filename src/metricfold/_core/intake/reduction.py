"""One reduction of what a rank holds: cut off, sent, and put back if it fails."""

from __future__ import annotations

import contextlib
import logging
import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import SupportsIndex

from metricfold._core.exchange.reducer import Contribution, Outcome, Reduced
from metricfold._core.fold.handlers import AggregationHandler
from metricfold._core.fold.names import show
from metricfold._core.fold.state import quiet
from metricfold._core.intake.held import Held
from metricfold._core.intake.layers import Arriving, Layer, arriving
from metricfold._core.reduce.agreement import Agreed
from metricfold._core.reduce.header import Kind
from metricfold._core.reduce.schema import Entry, Key
from metricfold._core.view.alert import Alerts
from metricfold._core.view.report import Handlers
from metricfold._core.view.rules import Chosen
from metricfold._core.view.snapshot import Snapshot
from metricfold.communicator import Communicator
from metricfold.metric import MetricState

__all__ = ["Reduction"]

_logger = logging.getLogger("metricfold")

_LARGEST_STEP = 2**53  # what a float64 holds exactly


class Reduction:
    """A reduction, from the moment on in which what has accumulated is cut off (`link.Task`).

    Each part stands here as soon as there is one, so that an interrupt between two lines loses none.

    Args:
        held: what is reduced.
        kind: which call it is.
        step: the caller's step.
        sink_failed: what all ranks are to hear of a logger's sinks.
    """

    def __init__(
        self, held: Held, kind: Kind, step: int | None, *, sink_failed: bool = False
    ) -> None:
        self._held = held
        self._kind = kind
        self._step = step
        self._sink_failed = sink_failed
        self._communicator: Communicator | None = None
        self._mine: Contribution | None = None
        self._pending: Arriving = arriving(())
        self._rules = Chosen()
        # What has been cut off.
        self.layer: Layer | None = None
        self.seconds = 0.0
        self.closed: Mapping[Key, list[MetricState]] = {}

    @property
    def outcome(self) -> Outcome:
        return Outcome.PENDING if self._mine is None else self._mine.outcome

    def begin(self, communicator: Communicator) -> None:
        """Cut off what has accumulated, on the caller's thread."""
        held, self._communicator = self._held, communicator
        with held.lock:
            inbox, keys = held.inbox, held.keys
            held.run.bind(communicator, inbox.custom, keys)
            shown = held.clock.now()
            times, untimed = held.timers.take(communicator.world_size, shown, inbox.cuts)
            inbox.cut(times, self)
            held.clock.cut(shown, self)
            # From here on the others are on their way: join them whatever happens, and say so there.
            number, wrong = _checked_step(self._step)
            self._rules = held.rules.chosen
            error = wrong or untimed or self._handed_over() or keys.trouble()
            assert self.layer is not None
            self._pending = arriving(self.layer.pending)
            results = b""
            if inbox.custom and not error:
                try:
                    results = inbox.custom.results(keys.by_key(), keys.by_label())
                except Exception as failure:  # noqa: BLE001 - the user's; raised on all ranks
                    error = f"a custom handler failed to finalise: {str(failure) or repr(failure)}"
            if self._kind is Kind.REDUCE and not error:
                inbox.custom.close_interval(self)
            self._mine = Contribution(
                self._kind,
                {},
                self.seconds,
                results,
                tuple(inbox.custom.keys()),
                number,
                error,
                self._sink_failed,
                self._rules.hash,
                held.rules.to_tell(self._rules, communicator.rank)
                if self._kind is Kind.REDUCE
                else 0.0,
            )

    def finish(self) -> Snapshot:
        held, mine, communicator = self._held, self._mine, self._communicator
        assert mine is not None
        assert communicator is not None
        with quiet():
            errors = dict.fromkeys([mine.error, *self._settled()])
            mine.error = "; ".join(filter(None, errors))
            mine.states = dict(self.layer.states) if self.layer is not None else {}
            with communicator.interrupts_deferred():
                reduced = held.run.reducer.reduce(mine, self)
                with held.rules.lock:
                    held.run.go_on(reduced, interval_open=self._kind is Kind.STATE_DICT)
                    return self._shown(reduced, communicator.rank)

    def _shown(self, reduced: Reduced, rank: int) -> Snapshot:
        """Return the result, with what the rules find in it."""
        held = self._held
        with held.lock:
            handlers = Handlers(
                held.keys.by_key(),
                held.keys.by_label(),
                dict(held.keys.derived),
                held.warned,
                held.keys.plans,
                held.by,
            )
        alerts = Alerts()
        if self._rules.rules and self._kind is Kind.REDUCE:
            assert self._mine is not None
            # What is derived is the user's to compute, and need not be the same on all ranks.
            seen = Snapshot(reduced, replace(handlers, derived={}, by=()))
            alerts = held.rules.look(self._rules, seen, self._mine.step, rank, reduced.found)
        return Snapshot(reduced, handlers, alerts)

    def put_back(self) -> None:
        """Put back what was cut off; it comes before what has come since."""
        held = self._held
        with held.lock:
            if self.layer is not None:
                held.inbox.put_back(self.layer)
                held.clock.restore(self.seconds)
                held.inbox.custom.inherit("interval", self.closed)

    # -- What is asked about keys meanwhile, on whatever thread (`agreement.Registry`)

    def entry(self, key: Key) -> Entry:
        return self._held.keys.entry(key)

    def handler(self, key: Key) -> AggregationHandler:
        return self._held.keys.records[key].handler

    def per_rank(self) -> set[Key]:
        return self._held.keys.those("per_rank")

    def conflicting(self) -> set[Key]:
        return self._held.keys.those("conflicting")

    def adopt(self, agreed: Agreed, losers: Mapping[Key, Key | None]) -> str:
        with self._held.lock:
            before = self._held.keys.by_key()
            trouble = self._held.keys.adopt(agreed, losers)
            after = self._held.keys.records
            for entry in agreed.changed:
                key = entry.key
                if key in before and key not in losers and after[key].handler is not before[key]:
                    self._rename(key, key)  # what comes is to be folded by the other handler
            for key, name in losers.items():
                self._rename(key, name)
                if name is None:
                    _logger.warning(
                        "dropped what came in of %s: the other ranks hold that name otherwise",
                        show(key),
                    )
            return trouble

    # -- Parts of a reduction

    def _keep(self, layer: Layer) -> None:
        self.layer = layer

    def _handed_over(self) -> str:
        """Let handlers without lanes have what lay on a device; returns what went wrong."""
        assert self.layer is not None
        self._held.inbox.hand_over(self.layer, self._keep)
        return "; ".join(self.layer.errors)

    def _settled(self) -> Sequence[str]:
        """Wait for values on devices; returns what went wrong, for all ranks to hear, once."""
        assert self.layer is not None
        try:
            layer = self.layer.settled(self._held.keys.records, self._pending)
        except Exception as failure:  # noqa: BLE001 - such as an error of the device
            return [f"values could not be read from their device: {failure!r}"]
        self.layer = replace(layer, errors=())
        return layer.errors

    def _rename(self, key: Key, name: Key | None) -> None:
        """Let what has been cut off of `key`, and what has come since, go by another name."""
        records = self._held.keys.records
        if self.layer is not None:
            self.layer = self.layer.renamed(key, name, records)
        self._held.rename(key, name)
        closed = {known: states for known, states in self.closed.items() if known != key}
        if name is not None and key in self.closed:
            closed[name] = self.closed[key]
            for state in closed[name]:
                state.dataset_name, state.metric_name = name
        self.closed = closed


def _checked_step(step: object) -> tuple[int | None, str]:
    """Return the step, and what is wrong with it."""
    if step is None:
        return None, ""
    number = -1
    if isinstance(step, SupportsIndex) and not isinstance(step, bool):
        # An array has this method too, and may refuse.
        with contextlib.suppress(Exception):
            number = operator.index(step)
    if 0 <= number < _LARGEST_STEP:
        return number, ""
    return None, f"step={step!r:.80}: give the training step as an int, 0 or more"
