"""The usual design of a metrics module, written as plainly and as fast as the idea allows.

One state object per metric, which a handler updates one value at a time; at a log the states of all
ranks are gathered, and merged on each. A distribution's state carries its recent values, so that they
can be pooled and percentiles come out right.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np

__all__ = ["PERCENTILES", "Aggregation", "FrozenMetric", "MetricStates", "State", "percentiles"]

PERCENTILES = (5, 50, 95)


class Aggregation(Enum):
    SUM = "sum"
    MEAN = "mean"
    MAX = "max"
    MIN = "min"
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

    dataset_name: str
    metric_name: str
    value: Any
    agg_type: Aggregation
    metadata: dict[str, Any] = field(default_factory=dict)


class Sum:
    """One aggregation: begin, take a value, combine the states of ranks, report."""

    def begin(self) -> dict[str, Any]:
        return {"value": 0.0}

    def update(self, state: State, metric: FrozenMetric) -> None:
        state.value += metric.value

    def combine(self, states: list[State]) -> dict[str, Any]:
        return {"value": sum(state.value for state in states)}

    def report(self, state: State) -> Mapping[str, float]:
        return {"": float(state.value)}


class Mean(Sum):
    def begin(self) -> dict[str, Any]:
        return {"value": 0.0, "metadata": {"sum": 0.0, "count": 0}}

    def update(self, state: State, metric: FrozenMetric) -> None:
        metadata = state.metadata
        metadata["sum"] += metric.value
        metadata["count"] += 1

    def combine(self, states: list[State]) -> dict[str, Any]:
        total = sum(state.metadata["sum"] for state in states)
        count = sum(state.metadata["count"] for state in states)
        return {"value": total / count, "metadata": {"sum": total, "count": count}}

    def report(self, state: State) -> Mapping[str, float]:
        return {"": state.metadata["sum"] / state.metadata["count"]}


class Extremum(Sum):
    def __init__(self, start: float, choose: Callable[..., float]) -> None:
        self._start, self._choose = start, choose

    def begin(self) -> dict[str, Any]:
        return {"value": self._start}

    def update(self, state: State, metric: FrozenMetric) -> None:
        state.value = self._choose(state.value, metric.value)

    def combine(self, states: list[State]) -> dict[str, Any]:
        return {"value": self._choose(state.value for state in states)}


class Recent(Sum):
    def __init__(self, window: int | None) -> None:
        self._window = window

    def begin(self) -> dict[str, Any]:
        return {"value": deque(maxlen=self._window)}

    def update(self, state: State, metric: FrozenMetric) -> None:
        state.value.append(metric.value)

    def combine(self, states: list[State]) -> dict[str, Any]:
        return {"value": [value for state in states for value in state.value]}

    def report(self, state: State) -> Mapping[str, float]:
        values = np.array(state.value)
        return {
            "_stat_mean": float(values.mean()),
            "_stat_min": float(values.min()),
            "_stat_max": float(values.max()),
            "_stat_std": float(values.std(ddof=1)) if values.size > 1 else 0.0,
            **percentiles("", values),
        }


def percentiles(key: str, values: Any) -> Mapping[str, float]:
    """Return the percentiles of `values` as a log calls them."""
    found = np.percentile(values, PERCENTILES).tolist()
    return {f"{key}_stat_p{p:02d}": value for p, value in zip(PERCENTILES, found, strict=True)}


class MetricStates:
    """One state object per metric, in a dict."""

    def __init__(self, window: int | None) -> None:
        self.states: dict[tuple[str, str], State] = {}
        self.handlers: dict[Aggregation, Sum] = {
            Aggregation.SUM: Sum(),
            Aggregation.MEAN: Mean(),
            Aggregation.MAX: Extremum(-math.inf, max),
            Aggregation.MIN: Extremum(math.inf, min),
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
                state = states[key] = State(*key, agg_type=metric.agg_type, **handler.begin())
            handler.update(state, metric)

    def combine(self, of_ranks: Iterable[Iterable[State]]) -> list[State]:
        """Return one state per metric out of those of all ranks."""
        groups: dict[tuple[str, str], list[State]] = {}
        for states in of_ranks:
            for state in states:
                groups.setdefault((state.dataset_name, state.metric_name), []).append(state)
        return [
            State(
                *key, agg_type=group[0].agg_type, **self.handlers[group[0].agg_type].combine(group)
            )
            for key, group in groups.items()
        ]

    def report(self, states: Iterable[State], prefix: str) -> dict[str, float]:
        """Return the value of each metric."""
        return {
            f"{prefix}_{state.dataset_name}/{state.metric_name}{suffix}": value
            for state in states
            for suffix, value in self.handlers[state.agg_type].report(state).items()
        }
