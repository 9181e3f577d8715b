"""What the proof at the end is counted from: raw sums of every step, without metricfold.

Each rank keeps its own, and writes it as JSON when training is over. A training job needs no such
thing: it is here so that the demo can be checked against something other than itself.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from metricfold import MetricsAggregator

__all__ = ["Ledger", "Page", "read_ledger"]


@dataclass(frozen=True, slots=True)
class Page:
    """What one rank wrote down.

    Args:
        first_step: the first step of this launch.
        losses: per step and dataset, the sum of the losses of all predicted tokens.
        tokens: per step and dataset, how many tokens were predicted.
        seconds: how long the steps took, in all.
        reducing: how much of that went into reductions of the training metrics.
        collectives: how many collectives each of those took.
    """

    first_step: int
    losses: list[list[float]]
    tokens: list[list[float]]
    seconds: float
    reducing: float
    collectives: list[int]


class Ledger:
    """Writes down the steps of one rank, beginning with `first_step`."""

    def __init__(self, folder: Path, rank: int, first_step: int) -> None:
        self._path = folder / f"rank-{rank}.json"
        self._first_step = first_step
        self._began = time.perf_counter()
        self._steps: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._reducing = 0.0
        self._collectives: list[int] = []

    def note(self, losses: torch.Tensor, tokens: torch.Tensor) -> None:
        """Keep one step's loss sums and token counts per dataset; they stay on the device."""
        self._steps.append((losses.detach(), tokens))

    @contextmanager
    def reducing(self, aggregator: MetricsAggregator) -> Iterator[None]:
        """Note how long a reduction takes, and how many collectives."""
        began, before = time.perf_counter(), aggregator.collectives
        yield
        self._reducing += time.perf_counter() - began
        self._collectives.append(aggregator.collectives - before)

    def close(self) -> None:
        """Write everything down."""
        page = Page(
            first_step=self._first_step,
            losses=[losses.tolist() for losses, _ in self._steps],
            tokens=[tokens.tolist() for _, tokens in self._steps],
            seconds=time.perf_counter() - self._began,
            reducing=self._reducing,
            collectives=self._collectives,
        )
        self._path.write_text(json.dumps(asdict(page)), encoding="utf-8")


def read_ledger(folder: Path) -> list[Page]:
    """Return the page of each rank of the last launch."""
    world_size = len(list(folder.glob("rank-*.json")))
    return [
        Page(**json.loads((folder / f"rank-{rank}.json").read_text(encoding="utf-8")))
        for rank in range(world_size)
    ]
