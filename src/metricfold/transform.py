"""Where metrics begin: a transform that tags each sample with what is worth counting.

    transform = DefaultTrainingMetricTransform()
    transform.set_dataset_name("alpaca")
    sample = transform({"tokens": [1, 2, 3]})
    sample["metrics"]      # samples_seen, tokens_seen, seq_len

Subclass `MetricTransform` and return your own metrics from `_generate_metrics`.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, TypeVar

from metricfold.metric import AggregationType, Metric, check_name

__all__ = ["DefaultTrainingMetricTransform", "MetricTransform"]

Sample = TypeVar("Sample", bound=Mapping[str, Any])


class MetricTransform(ABC):
    """Adds metrics to each sample of one dataset.

    The result is a shallow copy of the sample whose ``"metrics"`` list is extended. The caller's
    sample stays as it is, so a dataset that caches its samples does not collect metrics of
    earlier epochs.
    """

    dataset_name: str | None = None

    def set_dataset_name(self, dataset_name: str) -> None:
        """Say which dataset the samples come from; call it once, before the first sample.

        Raises:
            ValueError: the name is empty, or another name was set before.
        """
        check_name("the dataset name", dataset_name)
        if self.dataset_name not in (None, dataset_name):
            raise ValueError(
                f"this {type(self).__name__} already belongs to dataset {self.dataset_name!r}: "
                f"make another instance for {dataset_name!r}"
            )
        self.dataset_name = dataset_name

    @abstractmethod
    def _generate_metrics(self, sample: Mapping[str, Any]) -> list[Metric]:
        """Return the metrics of one sample; `self.dataset_name` is set."""

    def __call__(self, sample: Sample) -> Sample:
        if self.dataset_name is None:
            raise RuntimeError(
                f"{type(self).__name__} does not know its dataset: call set_dataset_name() before "
                "the first sample"
            )
        metrics = self._generate_metrics(sample)
        tagged: Any = copy.copy(sample)
        tagged["metrics"] = [*sample.get("metrics", ()), *metrics]
        result: Sample = tagged
        return result


class DefaultTrainingMetricTransform(MetricTransform):
    """Counts samples and tokens, and watches sequence lengths.

    Reads ``"tokens"``, else ``"input_ids"``: anything with a length. Emits ``samples_seen`` (SUM),
    ``tokens_seen`` (SUM) and ``seq_len`` (DISTRIBUTION), lengths in tokens.

    >>> transform = DefaultTrainingMetricTransform()
    >>> transform.set_dataset_name("alpaca")
    >>> [(metric.name, metric.value) for metric in transform({"tokens": [1, 2, 3]})["metrics"]]
    [('samples_seen', 1), ('tokens_seen', 3), ('seq_len', 3)]
    """

    def _generate_metrics(self, sample: Mapping[str, Any]) -> list[Metric]:
        tokens = sample.get("tokens")
        if tokens is None:
            tokens = sample.get("input_ids")
        if tokens is None:
            raise ValueError(
                f"a sample of dataset {self.dataset_name!r} has neither 'tokens' nor 'input_ids'; "
                f"its keys are {sorted(map(str, sample))}"
            )
        dataset_name = self.dataset_name
        assert dataset_name is not None
        length = len(tokens)
        return [
            Metric(dataset_name, "samples_seen", 1, AggregationType.SUM),
            Metric(dataset_name, "tokens_seen", length, AggregationType.SUM),
            Metric(dataset_name, "seq_len", length, AggregationType.DISTRIBUTION),
        ]
