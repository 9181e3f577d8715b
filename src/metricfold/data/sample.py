"""Where metrics travel: in a list under ``"metrics"`` of each sample, up to a `MetricsCollator`."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any, NoReturn, TypeVar

from metricfold.metric import METRICS, Metric

__all__ = ["METRICS", "guard_default_collate", "take_metrics", "with_metrics"]

Sample = TypeVar("Sample", bound=Mapping[str, Any])


def with_metrics(sample: Sample, metrics: list[Metric]) -> Sample:
    """Return a shallow copy of `sample` in which `metrics` follow those that it has.

    Raises:
        TypeError: what it has under ``"metrics"`` is something else.
    """
    if not _guarded:
        guard_default_collate()
    tagged: Any = sample
    own = [*metrics]
    if type(sample) is dict and METRICS not in sample:  # nearly always
        tagged = tagged.copy()
    else:
        earlier: list[Metric] = []
        tagged = take_metrics(sample, earlier)
        own = earlier + own
    tagged[METRICS] = own
    result: Sample = tagged
    return result


def take_metrics(sample: Mapping[str, Any], into: list[Metric]) -> MutableMapping[str, Any]:
    """Return a shallow copy of `sample` that carries no metrics; those that it had join a list.

    Raises:
        TypeError: what it has under ``"metrics"`` is something else.
    """
    copied = sample.copy() if type(sample) is dict else _copy(sample)
    metrics = copied.pop(METRICS, None)
    into += metrics if type(metrics) is list else _listed(metrics)
    return copied


def _copy(sample: Mapping[str, Any]) -> MutableMapping[str, Any]:
    """Return a shallow copy, of the same type if that type knows how to copy itself.

    What `copy.copy` makes of any other mapping may share the storage of the caller's sample.
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


# -- Without a MetricsCollator -------------------------------------------------------------------

_guarded = False


def guard_default_collate() -> None:
    """Let torch's ``default_collate``, if torch is there, refuse metrics and say what takes them.

    Left to itself it takes each `Metric` apart and complains of one of its fields, or stacks the
    fields of several metrics. PyTorch documents this registry for types that it does not know.
    """
    global _guarded  # noqa: PLW0603 - torch's registry is global, too
    if _guarded:
        return
    module = sys.modules.get("torch.utils.data._utils.collate")
    registry = getattr(module, "default_collate_fn_map", None)
    if registry is not None:
        registry[_Metrics] = _refuse_to_stack
        _guarded = True


class _AreMetrics(type):
    def __instancecheck__(cls, value: object) -> bool:
        if isinstance(value, list) and value:
            value = value[0]
        return isinstance(value, Metric)


class _Metrics(metaclass=_AreMetrics):
    """A metric, or a list of them: lists of uneven lengths are refused as lists before all else."""


def _refuse_to_stack(batch: object, *, collate_fn_map: object = None) -> NoReturn:
    raise ValueError(
        "samples of this DataLoader carry metrics, which default_collate cannot make a batch of: "
        "give the DataLoader collate_fn=MetricsCollator(), which collates the rest by "
        "default_collate, or MetricsCollator(your_collate_fn), and hand what it makes to "
        "aggregator.update(batch.pop('metrics'))"
    )
