"""Batches of one rank: samples tagged with their metrics, padded, and collated with them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from metricfold import MetricsCollator
from metricfold.demo.mixture import Mixture
from metricfold.demo.samples import TaggedSamples, held_out

__all__ = ["pad", "training_batches", "validation_batches"]

_VALIDATION_BATCH = 16


def pad(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Collate samples into ``tokens`` and ``mask`` (batch, longest), and ``dataset`` (batch,)."""
    tokens = [torch.from_numpy(sample["tokens"]) for sample in samples]
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
        _Samples(mixture),
        batch_sampler=[mixture.shares(step, world_size)[rank] for step in steps],
        collate_fn=MetricsCollator(collate_fn=pad),
        num_workers=2,
        timeout=60,  # seconds; a worker that cannot send its batch would be waited for forever
    )


def validation_batches(
    mixture: Mixture, rank: int, world_size: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield this rank's share of the texts that were held out, the longest first."""
    mine = islice(held_out(mixture), rank, None, world_size)
    while samples := list(islice(mine, _VALIDATION_BATCH)):
        yield pad(samples)


class _Samples(TaggedSamples, Dataset[dict[str, Any]]):
    """The samples as a dataset of torch's."""
