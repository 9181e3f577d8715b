"""What the proof at the end is counted from: raw sums of every step, without metricfold.

Each rank keeps its own, or one process those of its devices, and writes them as JSON when training
is over. A training job needs no such thing: it is here so that the demo can be checked against
something other than itself.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from metricfold import MetricsAggregator

__all__ = ["Ledger", "Page", "read_ledger"]


class Page(NamedTuple):
    """What was written down of one rank or device."""

    first_step: int  # of this launch
    losses: list[list[float]]  # per step and dataset, summed over all predicted tokens
    tokens: list[list[float]]  # per step and dataset, how many were predicted
    logging: list[float]  # seconds that each log of the training metrics held up its step
    collectives: int  # that the training metrics took
    schema_rounds: int  # reductions that had to agree on new keys or categories first


class Ledger:
    """Writes down the steps of one rank, or of several devices, beginning with `first_step`."""

    def __init__(self, folder: Path, parts: range, first_step: int) -> None:
        self._folder = folder
        self._parts = parts
        self._first_step = first_step
        self._steps: list[tuple[Any, Any]] = []
        self._logging: list[float] = []

    @contextmanager
    def logging(self) -> Iterator[None]:
        """Note how long a log takes."""
        began = time.perf_counter()
        yield
        self._logging.append(time.perf_counter() - began)

    def note(self, losses: Any, tokens: Any) -> None:
        """Keep one step's loss sums and token counts per dataset; they stay on the device.

        Arrays of shape (datasets,), or (parts, datasets) if there are several.
        """
        self._steps.append((losses, tokens))

    def close(self, aggregator: MetricsAggregator) -> None:
        """Write everything down, and what `aggregator` has cost."""
        sums = np.array([[np.asarray(one) for one in step] for step in self._steps])
        by_part = sums.reshape(len(self._steps), 2, len(self._parts), -1).transpose(2, 1, 0, 3)
        for part, (losses, tokens) in zip(self._parts, by_part.tolist(), strict=True):
            costs = self._logging, aggregator.collectives, aggregator.schema_rounds
            page = Page(self._first_step, losses, tokens, *costs)
            path = self._folder / f"part-{part}.json"
            path.write_text(json.dumps(page._asdict()), encoding="utf-8")


def read_ledger(folder: Path) -> list[Page]:
    """Return the pages of the last launch, one for each rank or device."""
    paths = [folder / f"part-{part}.json" for part in range(len([*folder.glob("part-*.json")]))]
    return [Page(**json.loads(path.read_text(encoding="utf-8"))) for path in paths]
