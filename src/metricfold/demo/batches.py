"""Samples tagged with their metrics, and the batches that are padded of them, as NumPy arrays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from metricfold import AggregationType, DefaultTrainingMetricTransform, Metric
from metricfold.demo.mixture import Mixture, Sample

__all__ = ["TaggedSamples", "TextMetrics", "held_out", "pad"]


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


def held_out(
    mixture: Mixture, rank: int = 0, world_size: int = 1
) -> Iterator[list[dict[str, Any]]]:
    """Yield a rank's share of the texts that are not trained on, 16 at a time, without metrics."""
    mine = [_encoded(sample) for sample in mixture.held_out()[rank::world_size]]
    for start in range(0, len(mine), 16):
        yield mine[start : start + 16]


def _encoded(sample: Sample) -> dict[str, Any]:
    tokens = np.frombuffer(sample.text.text.encode(), np.uint8).astype(np.int64)
    return {"tokens": tokens, "dataset": sample.dataset, "kind": sample.text.kind}


def pad(samples: Sequence[dict[str, Any]], shape: tuple[int, ...] = ()) -> dict[str, np.ndarray]:
    """Collate samples into ``tokens`` and ``mask`` (rows, longest), and ``dataset`` (rows,).

    Args:
        samples: with their ``tokens``, of different lengths, and ``dataset``.
        shape: of what a compiled step takes, which is compiled anew for each that comes in:
            devices, rows of each and tokens. The samples are split over the devices evenly, and
            what is added counts for nothing. By default what the samples need.
    """
    lengths = [len(sample["tokens"]) for sample in samples]
    devices, rows, longest = shape or (1, len(samples), max(lengths))
    tokens = np.zeros((devices * rows, longest), np.int64)
    mask = np.zeros(tokens.shape, np.bool_)
    dataset = np.zeros(devices * rows, np.int64)
    # Each device's rows, but for those that it has no sample for.
    shares = np.array_split(np.arange(len(samples)), devices)
    places = [device * rows + i for device, share in enumerate(shares) for i in range(len(share))]
    for place, sample, length in zip(places, samples, lengths, strict=True):
        tokens[place, :length] = sample["tokens"]
        mask[place, :length] = True
        dataset[place] = sample["dataset"]
    return {"tokens": tokens, "mask": mask, "dataset": dataset}
