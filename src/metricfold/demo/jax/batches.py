"""Batches for all devices of a process: samples with their metrics, all of one shape.

A compiled step is compiled anew for each shape that comes in, so every batch has the same: as many
rows for each device as the largest share has, and as many tokens as the longest text. What is
added is masked, and counts for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any

import numpy as np

from metricfold import MetricsCollator
from metricfold.demo.mixture import SAMPLES_PER_STEP, Mixture
from metricfold.demo.samples import TaggedSamples, held_out

__all__ = ["pad", "training_batches", "validation_batches"]


def pad(samples: list[dict[str, Any]], devices: int, longest: int) -> dict[str, Any]:
    """Collate samples into ``tokens`` and ``mask`` (rows, longest), and ``dataset`` (rows,).

    The rows are those of the first device, then those of the second, and so on.
    """
    rows = -(-SAMPLES_PER_STEP // devices)
    tokens = np.zeros((devices, rows, longest), np.int32)
    mask = np.zeros(tokens.shape, np.bool_)
    dataset = np.zeros((devices, rows), np.int32)
    for device, share in enumerate(np.array_split(np.arange(len(samples)), devices)):
        for row, sample in enumerate(samples[i] for i in share):
            length = len(sample["tokens"])
            tokens[device, row, :length] = sample["tokens"]
            mask[device, row, :length] = True
            dataset[device, row] = sample["dataset"]
    batch = {"tokens": tokens, "mask": mask, "dataset": dataset}
    return {name: array.reshape(devices * rows, *array.shape[2:]) for name, array in batch.items()}


def training_batches(mixture: Mixture, steps: range, devices: int) -> Iterator[dict[str, Any]]:
    """Yield the batch of each of `steps`, with its metrics."""
    samples = TaggedSamples(mixture)
    collate = MetricsCollator(partial(pad, devices=devices, longest=mixture.longest))
    for step in steps:
        shares = mixture.shares(step, devices)
        yield collate([samples[number] for share in shares for number in share])


def validation_batches(mixture: Mixture, devices: int) -> Iterator[dict[str, Any]]:
    """Yield the texts that were held out, the longest first."""
    samples, longest = held_out(mixture), mixture.longest
    while batch := list(islice(samples, SAMPLES_PER_STEP)):
        yield pad(batch, devices, longest)
