"""What taking metrics in costs at least in plain Python: frozen metrics, and a handler call for each.

One state object per metric, which a handler updates one value at a time: it adds or appends, and
checks nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np

PERCENTILES = (5, 50, 95)


class Aggregation(Enum):
    SUM = "sum"
    DISTRIBUTION = "distribution"


@dataclass(frozen=True)
class FrozenMetric:
    """A metric as an immutable dataclass."""

    dataset_name: str
    name: str
    value: Any
    agg_type: Aggregation


@dataclass
class State:
    """What one metric has accumulated."""

    value: Any


class Sum:
    def begin(self) -> Any:
        return 0.0

    def update(self, state: State, metric: FrozenMetric) -> None:
        state.value += metric.value


class Recent:
    def __init__(self, window: int) -> None:
        self._window = window

    def begin(self) -> Any:
        return deque(maxlen=self._window)

    def update(self, state: State, metric: FrozenMetric) -> None:
        state.value.append(metric.value)


class MetricStates:
    """One state object per metric, in a dict."""

    def __init__(self, window: int) -> None:
        self.states: dict[tuple[str, str], State] = {}
        self.handlers: dict[Aggregation, Sum | Recent] = {
            Aggregation.SUM: Sum(),
            Aggregation.DISTRIBUTION: Recent(window),
        }

    def update(self, metrics: Iterable[FrozenMetric]) -> None:
        """Call a handler for each metric."""
        states, handlers = self.states, self.handlers
        for metric in metrics:
            key = (metric.dataset_name, metric.name)
            handler = handlers[metric.agg_type]
            state = states.get(key)
            if state is None:
                state = states[key] = State(handler.begin())
            handler.update(state, metric)


def percentiles(key: str, values: Any) -> Mapping[str, float]:
    """Return the percentiles of `values` as a log calls them."""
    found = np.percentile(values, PERCENTILES).tolist()
    return {f"{key}_stat_p{p:02d}": value for p, value in zip(PERCENTILES, found, strict=True)}
