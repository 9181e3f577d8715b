"""Where metrics begin: a transform that tags each sample with what is worth counting.

    transform = DefaultTrainingMetricTransform()
    transform.set_dataset_name("alpaca")
    sample = transform({"tokens": [1, 2, 3]})
    sample["metrics"]      # samples_seen, tokens_seen, seq_len

Subclass `MetricTransform` and return your own metrics from `_generate_metrics`.
"""

from __future__ import annotations

import reprlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence, Sized
from functools import lru_cache
from typing import Any, TypeVar

from metricfold.data.sample import with_metrics
from metricfold.metric import AggregationType, Metric, check_name

__all__ = ["DefaultTrainingMetricTransform", "MetricTransform"]

Sample = TypeVar("Sample", bound=Mapping[str, Any])


class MetricTransform(ABC):
    """Adds metrics to each sample of one dataset.

    The result is a shallow copy of the sample whose ``"metrics"`` list is extended. The caller's
    sample stays as it is, so a dataset that caches its samples does not collect metrics of
    earlier epochs.

    >>> class Words(MetricTransform):
    ...     def _generate_metrics(self, sample):
    ...         words = len(sample["text"].split())
    ...         return [Metric(self.dataset_name, "words", words, AggregationType.SUM)]
    >>> transform = Words()
    >>> transform.set_dataset_name("alpaca")
    >>> [metric.value for metric in transform({"text": "hello world"})["metrics"]]
    [2]
    """

    dataset_name: str | None = None

    def set_dataset_name(self, dataset_name: str) -> None:
        """Say which dataset the samples come from; call it once, before the first sample.

        Raises:
            ValueError: the name is empty, or another name was set before.
        """
        check_name(f"the dataset name of a {type(self).__name__}", dataset_name)
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
        if type(sample) is not dict and not isinstance(sample, Mapping):
            raise TypeError(
                f"{type(self).__name__} takes samples that are mappings, such as a dict, but "
                f"dataset {self.dataset_name!r} has a {type(sample).__name__}"
            )
        metrics = self._generate_metrics(sample)
        if not isinstance(metrics, list):
            raise TypeError(
                f"{type(self).__name__}._generate_metrics() returned a {type(metrics).__name__} "
                f"for a sample of dataset {self.dataset_name!r}: return a list of Metric"
            )
        return with_metrics(sample, metrics)


class DefaultTrainingMetricTransform(MetricTransform):
    """Counts samples and tokens, and watches sequence lengths.

    Reads ``"tokens"``, else ``"input_ids"``: the tokens of one sample, a flat sequence or an array
    of shape (n,). Emits ``samples_seen`` (SUM), ``tokens_seen`` (SUM) and ``seq_len``
    (DISTRIBUTION), lengths in tokens. Raises ValueError for a sample that has neither and for an
    array that is not 1-d, and TypeError for text, mappings, nested lists and what has no length.

    >>> transform = DefaultTrainingMetricTransform()
    >>> transform.set_dataset_name("alpaca")
    >>> [(metric.name, metric.value) for metric in transform({"tokens": [1, 2, 3]})["metrics"]]
    [('samples_seen', 1), ('tokens_seen', 3), ('seq_len', 3)]
    """

    def _generate_metrics(self, sample: Mapping[str, Any]) -> list[Metric]:
        dataset_name = self.dataset_name
        assert dataset_name is not None
        tokens = sample.get("tokens")
        if tokens is None:
            tokens = sample.get("input_ids")
        if tokens is None:
            raise ValueError(
                f"a sample of dataset {dataset_name!r} has neither 'tokens' nor 'input_ids'; its "
                f"keys are {sorted(map(str, sample))}"
            )
        # Nearly always, so that is worth a look before all the others.
        plain = type(tokens) in (list, tuple) and (not tokens or type(tokens[0]) is int)
        length = len(tokens) if plain else _length(dataset_name, tokens)
        return [*_counts(dataset_name, length)]


# Metrics are immutable and lengths recur, so most samples can share theirs.
@lru_cache(maxsize=4096)
def _counts(dataset_name: str, length: int) -> tuple[Metric, ...]:
    return (
        Metric(dataset_name, "samples_seen", 1, AggregationType.SUM),
        Metric(dataset_name, "tokens_seen", length, AggregationType.SUM),
        Metric(dataset_name, "seq_len", length, AggregationType.DISTRIBUTION),
    )


def _length(dataset_name: str, tokens: Any) -> int:
    # A tokenizer that returns tensors gives them a batch axis: its length is not the sample's.
    shape = getattr(tokens, "shape", None)
    if shape is not None:
        if len(shape) != 1:
            raise ValueError(
                f"the tokens of a sample of dataset {dataset_name!r} have the shape "
                f"{tuple(shape)}: give those of one sample, shape (n,)"
            )
        return int(shape[0])
    found = _other_than_tokens(tokens)
    if found:
        raise TypeError(
            f"the tokens of a sample of dataset {dataset_name!r} are {found}: give a flat sequence "
            "of token ids, or an array of shape (n,)"
        )
    return len(tokens)


def _other_than_tokens(tokens: Any) -> str:
    """Return what `tokens` is if its length, if any, is no number of tokens."""
    if isinstance(tokens, str):
        return f"text, {reprlib.repr(tokens)}"
    if isinstance(tokens, Mapping):
        return f"a {type(tokens).__name__}"
    if not isinstance(tokens, Sized):
        return f"of type {type(tokens).__name__}, which has no length"
    if isinstance(tokens, Sequence) and len(tokens):
        first = tokens[0]
        if isinstance(first, list | tuple | Mapping) or getattr(first, "shape", None):
            return f"nested, since the first is a {type(first).__name__}"
    return ""
