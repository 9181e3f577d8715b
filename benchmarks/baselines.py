"""What metricfold is compared with, written as plainly and as fast as each idea allows.

The usual design of a metrics module keeps one state object per metric, lets a handler update it
one value at a time, and gathers the pickled states of all ranks at every log. It comes here in two
kinds. *Windows*: a distribution's state carries its recent values, so that they can be pooled and
the result is right. *Finalised*: each rank turns its distributions into percentiles first and
everyone averages those, which moves less and is wrong.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np

__all__ = ["Aggregation", "FrozenMetric", "MetricStates", "State"]


class Aggregation(Enum):
    SUM = "sum"
    MEAN = "mean"
    MAX = "max"
    MIN = "min"
    DISTRIBUTION = "distribution"
    CATEGORICAL_COUNT = "categorical_count"


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

    dataset_name: str
    metric_name: str
    value: Any
    agg_type: Aggregation
    metadata: dict[str, Any] = field(default_factory=dict)


Update = Callable[[State, Any], None]


class Handler:
    """One aggregation: begin, take a value, split into results of this rank, combine ranks."""

    def begin(self, dataset: str, name: str, agg_type: Aggregation) -> State:
        return State(dataset, name, 0.0, agg_type)

    def update(self, state: State, metric: FrozenMetric) -> None:
        state.value += metric.value

    def local(self, state: State) -> list[State]:
        return [state]

    def combine(self, states: list[State]) -> State:
        first = states[0]
        total = sum(state.value for state in states)
        return State(first.dataset_name, first.metric_name, total, first.agg_type)

    def report(self, state: State) -> dict[str, float]:
        return {"": float(state.value)}


class Mean(Handler):
    def begin(self, dataset: str, name: str, agg_type: Aggregation) -> State:
        return State(dataset, name, 0.0, agg_type, {"sum": 0.0, "count": 0})

    def update(self, state: State, metric: FrozenMetric) -> None:
        metadata = state.metadata
        metadata["sum"] += metric.value
        metadata["count"] += 1

    def combine(self, states: list[State]) -> State:
        first = states[0]
        total = sum(state.metadata["sum"] for state in states)
        count = sum(state.metadata["count"] for state in states)
        metadata = {"sum": total, "count": count}
        return State(first.dataset_name, first.metric_name, total / count, first.agg_type, metadata)

    def report(self, state: State) -> dict[str, float]:
        return {"": state.metadata["sum"] / state.metadata["count"]}


class Max(Handler):
    def begin(self, dataset: str, name: str, agg_type: Aggregation) -> State:
        return State(dataset, name, -math.inf, agg_type)

    def update(self, state: State, metric: FrozenMetric) -> None:
        state.value = max(state.value, metric.value)

    def combine(self, states: list[State]) -> State:
        first = states[0]
        largest = max(state.value for state in states)
        return State(first.dataset_name, first.metric_name, largest, first.agg_type)


class Min(Handler):
    def begin(self, dataset: str, name: str, agg_type: Aggregation) -> State:
        return State(dataset, name, math.inf, agg_type)

    def update(self, state: State, metric: FrozenMetric) -> None:
        state.value = min(state.value, metric.value)

    def combine(self, states: list[State]) -> State:
        first = states[0]
        smallest = min(state.value for state in states)
        return State(first.dataset_name, first.metric_name, smallest, first.agg_type)


class Windows(Handler):
    """A distribution whose recent values travel."""

    def __init__(self, window: int | None) -> None:
        self._window = window

    def begin(self, dataset: str, name: str, agg_type: Aggregation) -> State:
        return State(dataset, name, deque(maxlen=self._window), agg_type)

    def update(self, state: State, metric: FrozenMetric) -> None:
        state.value.append(metric.value)

    def combine(self, states: list[State]) -> State:
        first = states[0]
        pooled = [value for state in states for value in state.value]
        return State(first.dataset_name, first.metric_name, pooled, first.agg_type)

    def report(self, state: State) -> dict[str, float]:
        return _statistics(np.array(state.value))


class Finalised(Windows):
    """A distribution that each rank turns into statistics, which are then averaged."""

    def local(self, state: State) -> list[State]:
        statistics = _statistics(np.array(state.value))
        return [
            State(
                state.dataset_name,
                state.metric_name + suffix,
                value,
                _KIND_OF_STATISTIC.get(suffix, Aggregation.MEAN),
                {"sum": value, "count": 1},
            )
            for suffix, value in statistics.items()
        ]


_KIND_OF_STATISTIC = {"_stat_min": Aggregation.MIN, "_stat_max": Aggregation.MAX}


class Categories(Handler):
    def begin(self, dataset: str, name: str, agg_type: Aggregation) -> State:
        return State(dataset, name, Counter(), agg_type)

    def update(self, state: State, metric: FrozenMetric) -> None:
        state.value[metric.value] += 1

    def local(self, state: State) -> list[State]:
        return [
            State(
                state.dataset_name, f"{state.metric_name}_count_{category}", count, Aggregation.SUM
            )
            for category, count in state.value.items()
        ]


def _statistics(values: Any) -> dict[str, float]:
    percentiles = np.percentile(values, (5, 50, 95)).tolist()
    return {
        "_stat_mean": float(values.mean()),
        "_stat_min": float(values.min()),
        "_stat_max": float(values.max()),
        "_stat_std": float(values.std(ddof=1)) if values.size > 1 else 0.0,
        **dict(zip(("_stat_p05", "_stat_p50", "_stat_p95"), percentiles, strict=True)),
    }


class MetricStates:
    """One state object per metric, in a dict."""

    def __init__(self, window: int | None, *, finalise: bool = False) -> None:
        self.states: dict[tuple[str, str], State] = {}
        self.handlers: dict[Aggregation, Handler] = {
            Aggregation.SUM: Handler(),
            Aggregation.MEAN: Mean(),
            Aggregation.MAX: Max(),
            Aggregation.MIN: Min(),
            Aggregation.DISTRIBUTION: Finalised(window) if finalise else Windows(window),
            Aggregation.CATEGORICAL_COUNT: Categories(),
        }

    def update(self, metrics: Iterable[FrozenMetric]) -> None:
        """Call a handler for each metric."""
        states, handlers = self.states, self.handlers
        for metric in metrics:
            key = (metric.dataset_name, metric.name)
            handler = handlers[metric.agg_type]
            state = states.get(key)
            if state is None:
                state = states[key] = handler.begin(*key, metric.agg_type)
            handler.update(state, metric)

    def local(self) -> list[State]:
        """Return what this rank has to tell the others."""
        handlers = self.handlers
        return [
            result
            for state in self.states.values()
            for result in handlers[state.agg_type].local(state)
        ]

    def combine(self, of_ranks: list[list[State]]) -> list[State]:
        """Return one state per metric out of those of all ranks."""
        groups: dict[tuple[str, str], list[State]] = {}
        for states in of_ranks:
            for state in states:
                groups.setdefault((state.dataset_name, state.metric_name), []).append(state)
        return [self.handlers[group[0].agg_type].combine(group) for group in groups.values()]

    def report(self, states: list[State], prefix: str) -> dict[str, float]:
        """Return the value of each metric."""
        return {
            f"{prefix}_{state.dataset_name}/{state.metric_name}{suffix}": value
            for state in states
            for suffix, value in self.handlers[state.agg_type].report(state).items()
        }
