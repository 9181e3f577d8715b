"""What every trainer has: a training, evaluations in between, and metrics that either may fill."""

from __future__ import annotations

import logging
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

from metricfold._core.intake.aggregator import MetricsAggregator
from metricfold._core.view.alert import Alerts, Severity
from metricfold._core.view.snapshot import Snapshot

if TYPE_CHECKING:
    from metricfold._core.device.rows import Accumulator

__all__ = ["Phases", "Saved"]

_log = logging.getLogger("metricfold")


class Saved:
    """An aggregator and the accumulators that are drained into it, saved and loaded as one."""

    accumulators: list[Accumulator]
    _framework: str

    # An aggregator belongs to its process. Made when it is first asked for, it is made by the
    # processes that Lightning's `strategy="ddp_spawn"` and those of notebooks start.

    @cached_property
    def aggregator(self) -> MetricsAggregator:
        """What training has brought: add to it as you like, such as by `record` in a step."""
        return MetricsAggregator(name=f"{self._framework}-train")

    @property
    def _into(self) -> MetricsAggregator:
        return self.aggregator

    @property
    def _all_accumulators(self) -> list[Accumulator]:
        return self.accumulators

    def _drain(self) -> None:
        for accumulator in self._all_accumulators:
            self._into.drain(accumulator)

    def _state(self) -> dict[str, Any]:
        """Return the state of the run's metrics; on every rank."""
        self._drain()
        return self.aggregator.state_dict()

    def _load(self, state: dict[str, Any]) -> None:
        self._drain()  # which is then replaced, like all that has come in
        self.aggregator.load_state_dict(state)


class Phases(Saved, ABC):
    """Metrics of a training, and of the evaluation under way; part of what a trainer knows.

    Attributes:
        accumulators: accumulators on the device, and `ModelWatch`es, of your own, to be read when there is a log, a
            checkpoint or the end of an evaluation.
        alerts: what rules have found, in the last log in which they found something.
    """

    alerts = Alerts()
    _stop_on: Severity | None = None
    _so_that_they_count = ""
    _evaluating = False

    # -- What a trainer has to say

    @abstractmethod
    def _stop(self) -> None:
        """Let the trainer end the training after this step."""

    @abstractmethod
    def _is_first(self) -> bool:
        """Whether this rank warns for all."""

    # -- Phases

    @cached_property
    def eval_aggregator(self) -> MetricsAggregator:
        """What the evaluation under way has brought; each starts with none."""
        return MetricsAggregator(name=f"{self._framework}-eval")

    @property
    def _into(self) -> MetricsAggregator:
        return self.eval_aggregator if self._evaluating else self.aggregator

    def _reduced(self, step: int) -> Snapshot:
        """Reduce what the phase under way has brought; on every rank."""
        self._drain()
        snapshot = self._into.reduce(step)
        self._look_at(snapshot.alerts, step)
        if not self._evaluating and snapshot.empty and not snapshot.as_dict("train", "run"):
            self._warn(
                f"there are no metrics to log: let samples carry some{self._so_that_they_count}, or "
                "record() them in training_step",
                "no metrics",
            )
        return snapshot

    def _look_at(self, alerts: Alerts, step: int) -> None:
        """Say what rules have found, and stop where that was asked for; on every rank alike."""
        self.alerts = alerts or self.alerts
        if self._is_first():
            for alert in alerts:
                _log.warning("step %d: %s", step, alert.message)
        if self._stop_on and (alerts if self._stop_on == "warning" else alerts.severe):
            self._warn(f"training stops at step {step}, for stop_on={self._stop_on!r}")
            self._stop()

    @contextmanager
    def _evaluation(self) -> Iterator[None]:
        """Let all that comes in be an evaluation's, whose time is a pause in that of training."""
        self._drain()  # what accumulators hold by now is of training
        self.eval_aggregator.reset()
        self._evaluating = True
        try:
            with self.aggregator.pause():
                yield
        finally:
            try:
                self._drain()  # of an evaluation that has failed, or that nobody logs
            finally:
                self._evaluating = False

    @contextmanager
    def _uncounted(self) -> Iterator[None]:
        """Let nothing that comes in count, nor its time: of steps that nobody learns from."""
        self._drain()
        marks = [(one, one.mark()) for one in (self.aggregator, self.eval_aggregator)]
        try:
            with self.aggregator.pause():
                yield
        finally:
            for accumulator in self._all_accumulators:
                accumulator.empty()
            for one, mark in marks:
                try:
                    one.rollback(mark)
                except ValueError as error:
                    self._warn(f"steps that are only tried out count, too: {error}", "tried out")

    # -- What is said

    def _without_theirs(
        self, values: Mapping[str, float], theirs: AbstractSet[str], whose: str
    ) -> dict[str, float]:
        """Leave out what the trainer has under the same key, and say so once for each."""
        kept = theirs & values.keys()
        if new := sorted(kept - self._said):
            self._warn(
                f"{', '.join(map(repr, new))} is {whose}: its values are kept and ours left out; to "
                "have both, log it under another name",
                *new,
            )
        return {key: value for key, value in values.items() if key not in kept}

    @cached_property
    def _said(self) -> set[str]:
        return set()

    def _warn(self, message: str, *about: str) -> None:
        """Warn on the first rank; once, if all that it is about has been said before."""
        if about and self._said.issuperset(about):
            return
        self._said.update(about)
        if self._is_first():
            warnings.warn(message, RuntimeWarning, stacklevel=3)
