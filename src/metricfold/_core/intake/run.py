"""The run that the ranks add to together: its totals, and what of it a checkpoint has brought."""

from __future__ import annotations

from collections.abc import Callable

from metricfold._core.exchange.reducer import Reduced, Reducer
from metricfold._core.exchange.route import Exchange
from metricfold._core.fold.custom import CustomStates
from metricfold._core.intake.checkpoint import Restored, Saved, share
from metricfold._core.intake.keys import KeyTable
from metricfold._core.reduce.header import RouteChoice
from metricfold._core.reduce.schema import Key, Schema
from metricfold._core.reduce.totals import Totals
from metricfold.communicator import Communicator, LocalCommunicator
from metricfold.metric import MetricState

__all__ = ["Run"]


class Run:
    """What reductions have come to, the same on all ranks.

    Args:
        route: how vectors are to travel.

    Attributes:
        reducer: holds the totals.
        saved: returns what a checkpoint holds as of the last reduction.
    """

    def __init__(self, route: RouteChoice) -> None:
        self.reducer = Reducer(Exchange(LocalCommunicator(), route))
        self.saved: Callable[[], Saved] = _nothing
        self._bound: Communicator | None = None
        self._unclaimed: Restored | None = None

    def bind(self, communicator: Communicator, custom: CustomStates, keys: KeyTable) -> None:
        """Go on over `communicator`, with this rank's share of what a checkpoint held."""
        if communicator is not self._bound:
            self.reducer.bind(Exchange(communicator, self.reducer.exchange.wanted))
            self._bound = communicator
        restored = self._unclaimed
        if restored is None:
            return
        # Should an interrupt come in between, all of it is done again, to the same end.
        rank, world_size = communicator.rank, communicator.world_size
        for key, windows in restored.saved.windows.items():
            limit = keys.records[key].handler.laned().sample_limit
            self.reducer.windows[key] = share(windows, rank, world_size, limit)
        for view, states in restored.custom.items():
            mine: dict[Key, list[MetricState]] = {}
            for state in states[rank::world_size]:
                mine.setdefault((state.dataset_name, state.metric_name), []).append(state)
            custom.inherit(view, mine)
        self._unclaimed = None

    def go_on(self, reduced: Reduced, *, interval_open: bool) -> None:
        """Take note of what a reduction has come to."""
        self.saved = lambda: Saved.of(reduced, interval_open=interval_open)

    def begin_anew(self, restored: Restored | None) -> None:
        """Go on from what a checkpoint held, or from nothing; what the ranks have agreed on stays."""
        saved = _nothing() if restored is None else restored.saved
        self.saved = lambda: saved
        self._unclaimed = restored
        self.reducer.replace_totals(saved.run, saved.interval, saved.reductions)


def _nothing() -> Saved:
    empty = Totals.empty(Schema())
    return Saved(empty, empty, {}, {"run": [], "interval": []})
