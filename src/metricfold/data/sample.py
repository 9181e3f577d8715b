"""Where metrics travel: in a list under ``"metrics"`` of each sample."""

from __future__ import annotations

import copy
from collections.abc import Mapping, MutableMapping
from typing import Any, TypeVar

from metricfold.metric import Metric

__all__ = ["METRICS", "take_metrics", "with_metrics"]

METRICS = "metrics"

Sample = TypeVar("Sample", bound=Mapping[str, Any])


def with_metrics(sample: Sample, metrics: list[Metric]) -> Sample:
    """Return a shallow copy of `sample` in which `metrics` follow those that it has.

    Raises:
        TypeError: what it has under ``"metrics"`` is something else.
    """
    tagged: Any
    if type(sample) is dict and METRICS not in sample:  # nearly always
        tagged = {**sample, METRICS: [*metrics]}
    else:
        tagged, earlier = take_metrics(sample)
        tagged[METRICS] = [*earlier, *metrics]
    result: Sample = tagged
    return result


def take_metrics(sample: Mapping[str, Any]) -> tuple[MutableMapping[str, Any], list[Metric]]:
    """Return a shallow copy of `sample` that carries no metrics, and those that it had.

    Raises:
        TypeError: what it has under ``"metrics"`` is something else.
    """
    copied = sample.copy() if type(sample) is dict else _copy(sample)
    metrics = copied.pop(METRICS, None)
    return copied, metrics if type(metrics) is list else _listed(metrics)


def _copy(sample: Mapping[str, Any]) -> MutableMapping[str, Any]:
    """Return a shallow copy, of the same type if that type knows how to copy itself.

    What `copy.copy` makes of any other mapping may share the storage of the original, and what
    is then done to the copy is done to the caller's sample too.
    """
    if isinstance(sample, dict):
        return copy.copy(sample)
    if isinstance(sample, MutableMapping) and hasattr(sample, "__copy__"):
        copied: MutableMapping[str, Any] = copy.copy(sample)
        return copied
    return dict(sample)


def _listed(metrics: object) -> list[Metric]:
    if metrics is None:
        return []
    if isinstance(metrics, list | tuple) and not isinstance(metrics, Metric):
        return list(metrics)
    raise TypeError(
        f"the entry 'metrics' of a sample is a {type(metrics).__name__}, but that name belongs to "
        "the list of Metric that a MetricTransform adds: rename what the dataset has there; or, if "
        "it came from with_metrics() of metricfold.integrations.datasets, let with_format() and "
        "with_transform() come before it, the same for all datasets that are put together"
    )
