"""Batches of one rank: samples tagged with their metrics, padded, and collated with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from metricfold import (
    AggregationType,
    DefaultTrainingMetricTransform,
    Metric,
    MetricsCollator,
)
from metricfold.demo.mixture import Mixture, Sample
from metricfold.demo.texts import Text

__all__ = ["TextMetrics", "pad", "training_batches", "validation_batches"]

_VALIDATION_BATCH = 16


class TextMetrics(DefaultTrainingMetricTransform):
    """Counts samples, tokens and lengths, and how many texts there were of each kind."""

    def _generate_metrics(self, sample: Mapping[str, Any]) -> list[Metric]:
        counts = super()._generate_metrics(sample)
        dataset = counts[0].dataset_name
        kind = Metric(dataset, "kind", sample["kind"], AggregationType.CATEGORICAL_COUNT)
        return [*counts, kind]


def pad(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Collate samples into ``tokens`` and ``mask`` (batch, longest), and ``dataset`` (batch,)."""
    tokens = [sample["tokens"] for sample in samples]
    return {
        "tokens": pad_sequence(tokens, batch_first=True),
        "mask": pad_sequence([torch.ones_like(one, dtype=torch.bool) for one in tokens], True),
        "dataset": torch.tensor([sample["dataset"] for sample in samples]),
    }


def training_batches(
    mixture: Mixture, steps: range, rank: int, world_size: int
) -> DataLoader[dict[str, Any]]:
    """Load this rank's share of each of `steps`, in two worker processes."""
    return DataLoader(
        _TaggedSamples(mixture),
        batch_sampler=[mixture.shares(step, world_size)[rank] for step in steps],
        collate_fn=MetricsCollator(collate_fn=pad),
        num_workers=2,
        timeout=60,  # seconds; a worker that cannot send its batch would be waited for forever
    )


def validation_batches(
    mixture: Mixture, rank: int, world_size: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield this rank's share of the texts that were held out, the longest first."""
    held_out = [
        Sample(dataset, text)
        for dataset, corpus in enumerate(mixture.corpora)
        for text in corpus.validation
    ]
    held_out.sort(key=lambda sample: sample.length, reverse=True)
    mine = [_encoded(sample) for sample in held_out[rank::world_size]]
    for start in range(0, len(mine), _VALIDATION_BATCH):
        yield pad(mine[start : start + _VALIDATION_BATCH])


class _TaggedSamples(Dataset[dict[str, Any]]):
    """The samples of the run by their numbers, each with the metrics of its dataset."""

    def __init__(self, mixture: Mixture) -> None:
        self.mixture = mixture
        self.transforms = [TextMetrics() for _ in mixture.names]
        for transform, name in zip(self.transforms, mixture.names, strict=True):
            transform.set_dataset_name(name)

    def __getitem__(self, number: int) -> dict[str, Any]:
        sample = self.mixture.draw(number)
        return self.transforms[sample.dataset](_encoded(sample))


def _encoded(sample: Sample) -> dict[str, Any]:
    text: Text = sample.text
    tokens = torch.tensor(list(text.text.encode()))
    return {"tokens": tokens, "dataset": sample.dataset, "kind": text.kind}
