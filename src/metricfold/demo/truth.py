"""Losses by plain sums: what the proof compares with. A training job needs no such thing."""

from __future__ import annotations

import torch
from torch.nn import functional as F  # noqa: N812 - its name everywhere

__all__ = ["sums_by_dataset"]


@torch.no_grad()
def sums_by_dataset(
    logits: torch.Tensor, labels: torch.Tensor, dataset: torch.Tensor, datasets: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each dataset's sum of losses and number of predicted tokens, both (datasets,).

    Args:
        logits: scores, shape (batch, length, classes).
        labels: what was to be predicted, shape (batch, length); -100 where nothing was.
        dataset: of each sample, shape (batch,).
        datasets: how many there are.
    """
    losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").double()
    tokens = (labels != -100).double()
    zeros = losses.new_zeros(datasets)
    return (
        zeros.index_add(0, dataset, losses.sum(1)),
        zeros.index_add(0, dataset, tokens.sum(1)),
    )
