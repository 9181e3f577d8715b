"""Where metrics travel: under ``"metrics"`` of each sample, up to a `MetricsCollator`.

There is a list of `Metric`, or the number of an origin, of which metrics are made when they are taken: see
`metricfold.data.origin`.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any, NamedTuple, NoReturn, TypeVar

from metricfold.data.origin import ORIGINS, Segment, measured, number_of, segments, tokens_of
from metricfold.metric import METRICS, Metric

__all__ = ["METRICS", "Taken", "guard_default_collate", "metrics_of", "take", "with_metrics"]

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
        tagged, earlier, _ = take(sample)
        own = earlier + own
    tagged[METRICS] = own
    result: Sample = tagged
    return result


def metrics_of(sample: Mapping[str, Any]) -> list[Metric]:
    """Return the metrics of a sample, as they would count in a batch.

    Args:
        sample: with a list of `Metric` under ``"metrics"``, as a `MetricTransform` leaves it, or with
            what `metricfold.integrations.datasets.with_metrics` puts there, of which they are made.

    Raises:
        TypeError: what it has under ``"metrics"`` is something else.
        ValueError: this process does not know what the number there stands for.

    >>> from metricfold import DefaultTrainingMetricTransform
    >>> transform = DefaultTrainingMetricTransform()
    >>> transform.set_dataset_name("alpaca")
    >>> [metric.value for metric in metrics_of(transform({"tokens": [1, 2, 3]}))]
    [1, 3, 3]
    """
    return [*take(sample).metrics]


class Taken(NamedTuple):
    """A sample and its metrics, apart from each other.

    Args:
        bare: a shallow copy of the sample, without metrics.
        metrics: those that it had, the list itself, or that have been made of it.
        origin: the number that it had, or of what it is made, if it is packed; None: nobody has said.
    """

    bare: MutableMapping[str, Any]
    metrics: list[Metric]
    origin: int | list[Segment] | None

    @property
    def parts(self) -> list[tuple[str, int | None]]:
        """The dataset of each segment, and its length in tokens.

        Raises:
            ValueError: the sample is of no dataset, or its metrics are of several.
        """
        if isinstance(self.origin, int):
            return [(str(ORIGINS[self.origin].dataset_name), tokens_of(self.bare))]
        if self.origin or (self.origin is not None and not tokens_of(self.bare)):
            return [(str(ORIGINS[one.number].dataset_name), one.length) for one in self.origin]
        names = {metric.dataset_name for metric in self.metrics}
        if len(names) != 1:
            found = f"metrics of {', '.join(sorted(map(repr, names)))}" if names else "no metrics"
            raise ValueError(
                f"a sample carries {found}, so it does not say which dataset its tokens are of: give each "
                "sample the metrics of one dataset by a MetricTransform; a packed one needs a number per "
                "token, as of metricfold.integrations.datasets.metrics_per_token"
            )
        return [(names.pop(), tokens_of(self.bare))]


_made = tuple.__new__


def take(sample: Mapping[str, Any]) -> Taken:
    """Take a sample and its metrics apart; the sample stays as it is.

    Raises:
        TypeError: what it has under ``"metrics"`` is something else.
        ValueError: nobody knows what the number there stands for.
    """
    copied = sample.copy() if type(sample) is dict else _copy(sample)
    given = copied.pop(METRICS, None)
    if type(given) is list and (not given or type(given[0]) is Metric):  # nearly always
        return _made(
            Taken, (copied, given, None if given else [])
        )  # as Taken(...), in half of the time
    number = given if type(given) is int else number_of(given)
    if number is not None:
        return _made(Taken, (copied, measured(number, copied), number))
    found = segments(given, copied)
    if found is None:
        return Taken(copied, _listed(given), None)
    return Taken(
        copied, [one for part in found for one in measured(part.number, part.sample)], found
    )


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
        "the list of Metric that a MetricTransform adds, and to the number that with_metrics() of "
        "metricfold.integrations.datasets puts there: rename what the dataset has there"
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
