"""The samples of a run, each with its metrics: as any dataset gives them that has a transform."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from metricfold import AggregationType, DefaultTrainingMetricTransform, Metric
from metricfold.demo.mixture import Mixture, Sample

__all__ = ["TaggedSamples", "TextMetrics", "held_out"]


class TextMetrics(DefaultTrainingMetricTransform):
    """Counts samples, tokens and lengths, and how many texts there were of each kind."""

    def _generate_metrics(self, sample: Mapping[str, Any]) -> list[Metric]:
        counts = super()._generate_metrics(sample)
        dataset = counts[0].dataset_name
        kind = Metric(dataset, "kind", sample["kind"], AggregationType.CATEGORICAL_COUNT)
        return [*counts, kind]


class TaggedSamples:
    """The samples of the run by their numbers, each with the metrics of its dataset."""

    def __init__(self, mixture: Mixture) -> None:
        self.mixture = mixture
        self.transforms = [TextMetrics() for _ in mixture.names]
        for transform, name in zip(self.transforms, mixture.names, strict=True):
            transform.set_dataset_name(name)

    def __getitem__(self, number: int) -> dict[str, Any]:
        sample = self.mixture.draw(number)
        return self.transforms[sample.dataset](_encoded(sample))


def held_out(mixture: Mixture) -> Iterator[dict[str, Any]]:
    """Yield the texts that are not trained on, without metrics, the longest first."""
    samples = [
        Sample(dataset, text)
        for dataset, corpus in enumerate(mixture.corpora)
        for text in corpus.validation
    ]
    samples.sort(key=lambda sample: sample.length, reverse=True)
    return map(_encoded, samples)


def _encoded(sample: Sample) -> dict[str, Any]:
    tokens = np.frombuffer(sample.text.text.encode(), np.uint8).astype(np.int64)
    return {"tokens": tokens, "dataset": sample.dataset, "kind": sample.text.kind}
