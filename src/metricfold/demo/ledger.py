"""What the proof at the end is counted from: raw sums of every step, without metricfold.

Each rank keeps its own, or one process those of its devices, and writes them as JSON when training
is over. A training job needs no such
thing: it is here so that the demo can be checked against something other than itself.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from metricfold import MetricsAggregator

__all__ = ["Ledger", "Page", "read_ledger"]


@dataclass(frozen=True, slots=True)
class Page:
    """What was written down of one rank or device.

    Args:
        first_step: the first step of this launch.
        losses: per step and dataset, the sum of the losses of all predicted tokens.
        tokens: per step and dataset, how many tokens were predicted.
        logging: how long each log of the training metrics held up its step.
        collectives: how many collectives the training metrics took.
        schema_rounds: how many of the reductions had to agree on new keys or categories first.
    """

    first_step: int
    losses: list[list[float]]
    tokens: list[list[float]]
    logging: list[float]
    collectives: int
    schema_rounds: int


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
        shape = (2, len(self._steps), len(self._parts), -1)
        sums = np.array(
            [[np.asarray(one) for one in kind] for kind in zip(*self._steps, strict=True)]
        )
        losses, tokens = sums.reshape(shape)
        for i, part in enumerate(self._parts):
            page = Page(
                first_step=self._first_step,
                losses=losses[:, i].tolist(),
                tokens=tokens[:, i].tolist(),
                logging=self._logging,
                collectives=aggregator.collectives,
                schema_rounds=aggregator.schema_rounds,
            )
            path = self._folder / f"part-{part}.json"
            path.write_text(json.dumps(asdict(page)), encoding="utf-8")


def read_ledger(folder: Path) -> list[Page]:
    """Return the pages of the last launch, one for each rank or device."""
    parts = len(list(folder.glob("part-*.json")))
    return [
        Page(**json.loads((folder / f"part-{part}.json").read_text(encoding="utf-8")))
        for part in range(parts)
    ]
