"""One reduction of what a rank holds: cut off, sent, and put back if it fails."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Mapping
from typing import SupportsIndex

from metricfold._core.exchange.reduction import Contribution, Outcome
from metricfold._core.fold.state import quiet
from metricfold._core.intake.delta import CutDelta
from metricfold._core.intake.held import Held
from metricfold._core.intake.keys import KeyRegistry
from metricfold._core.reduce.header import Kind
from metricfold._core.reduce.schema import Key
from metricfold._core.view.report import Handlers
from metricfold._core.view.snapshot import Snapshot
from metricfold.communicator import Communicator
from metricfold.metric import MetricState

__all__ = ["Reduction"]

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
        # What has been cut off.
        self.cut: CutDelta | None = None
        self.seconds = 0.0
        self.closed: Mapping[Key, list[MetricState]] = {}

    @property
    def outcome(self) -> Outcome:
        """What has become of what was cut off."""
        return Outcome.PENDING if self._mine is None else self._mine.outcome

    def begin(self, communicator: Communicator) -> None:
        """Cut off what has accumulated, on the caller's thread."""
        held, self._communicator = self._held, communicator
        with held.lock:
            held.run.bind(communicator, held.custom, held.keys)
            shown = held.clock.now()
            times, untimed = held.timers.take(communicator.world_size, shown, held.inbox.cuts)
            held.let_go_of_mark()
            cut = held.inbox.cut(times, self)
            held.clock.cut(shown, self)
            # From here on the others are on their way: join them whatever happens, and say so there.
            number, wrong = _checked_step(self._step)
            error = wrong or untimed or held.read_late_custom() or held.keys.trouble()
            results = b""
            if held.custom and not error:
                try:
                    results = held.custom.results(held.keys.of_key, held.keys.by_label())
                except Exception as failure:  # noqa: BLE001 - the user's; raised on all ranks
                    error = f"a custom handler failed to finalise: {str(failure) or repr(failure)}"
            if self._kind is Kind.REDUCE and not error:
                held.custom.close_interval(self)
            self._mine = Contribution(
                self._kind,
                cut.states,
                self.seconds,
                results,
                tuple(held.custom.keys()),
                number,
                error,
                self._sink_failed,
            )

    def finish(self) -> Snapshot:
        """Take part in the reduction."""
        held, mine, cut, communicator = self._held, self._mine, self.cut, self._communicator
        assert mine is not None
        assert cut is not None
        assert communicator is not None
        with quiet():
            mine.error = "; ".join(filter(None, (mine.error, *self._settled(cut))))
            registry = KeyRegistry(held.keys, held.lock, held.forget)
            with communicator.interrupts_deferred():
                reduced = held.run.reducer.reduce(communicator, mine, registry)
                held.run.go_on(reduced, interval_open=self._kind is Kind.STATE_DICT)
        with held.lock:
            handlers = Handlers(
                dict(held.keys.of_key),
                held.keys.by_label(),
                dict(held.keys.derived),
                held.warned,
                held.keys.plans,
            )
        return Snapshot(reduced, handlers)

    def put_back(self) -> None:
        """Put back what was cut off; it comes before what has come since."""
        held = self._held
        with held.lock:
            if self.cut is not None:
                held.inbox.restore(self.cut)
                held.clock.restore(self.seconds)
                held.custom.reopen_interval(self.closed)

    def _settled(self, cut: CutDelta) -> list[str]:
        """Wait for values on devices; returns what went wrong, for all ranks to hear."""
        try:
            cut.settle(self._held.keys.of_key)
        except Exception as failure:  # noqa: BLE001 - such as an error of the device
            cut.errors.append(f"values could not be read from their device: {failure!r}")
        return cut.errors


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
