"""The proof at the end of the demo: what was logged, against the same numbers counted by hand.

*ours* is what the last log says in ``metrics.jsonl``. *truth* is counted from the texts and from
the ledger, with plain sums and NumPy. *average over ranks*, or devices, is what comes out when each
computes its own value and the mean of these is taken, as loops without metricfold often do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from metricfold import read_jsonl
from metricfold.demo.folder import RunFolder
from metricfold.demo.framework import Framework
from metricfold.demo.ledger import Page, read_ledger
from metricfold.demo.mixture import SAMPLES_PER_STEP, Mixture
from metricfold.demo.texts import DemoError

__all__ = ["Proof", "Row", "prove"]

_LOSS_TOLERANCE = 1e-6
"""Losses are sums of float32, in another order than the ledger's."""


@dataclass(frozen=True, slots=True)
class Row:
    """One number, three times."""

    metric: str
    dataset: str
    ours: float
    averaged: float
    truth: float

    @property
    def holds(self) -> bool:
        """Whether ours is the truth; exactly, but for rounding in a loss."""
        tolerance = _LOSS_TOLERANCE if self.metric == "loss" else 1e-12
        return math.isclose(self.ours, self.truth, rel_tol=tolerance)


@dataclass(frozen=True, slots=True)
class Proof:
    """What came of counting again what the last launch has logged.

    Args:
        framework: what the run is trained with; it says whether it is ranks or devices below.
        interval: the steps that the last log speaks about; it gives totals since the beginning.
        rows: the numbers.
        logs: how many logs of the training metrics there were in this launch.
        saves: how many checkpoints.
        collectives: how many collectives the training metrics took for both.
        schema_rounds: in how many of them the ranks had to agree on new keys or categories.
        holding: how long a log held up its step on the slowest rank: the median, in seconds.
        gradient_norm: the largest norm of one rank's gradient in the interval.
        gradient_owner: the rank that it was on.
        losses: the logged loss over all datasets, by step, over the whole run.
    """

    framework: Framework
    interval: range
    rows: list[Row]
    logs: int
    saves: int
    collectives: int
    schema_rounds: int
    holding: float
    gradient_norm: float
    gradient_owner: int
    losses: dict[int, float]

    def check(self) -> None:
        """Raise `DemoError` if anything that was logged is not what the data say."""
        for row in self.rows:
            if not row.holds:
                raise DemoError(
                    f"{row.metric} of {row.dataset} was logged as {row.ours!r}, but the data say "
                    f"{row.truth!r}: please report this as a bug in metricfold"
                )


def prove(folder: RunFolder) -> Proof:
    """Count again what the last log in `folder` says."""
    mixture, pages = folder.read_mixture(), read_ledger(folder.ledger)
    first = pages[0].first_step
    step = first - 1 + len(pages[0].losses)
    records = read_jsonl(folder.metrics)
    logs = [record for record in records if "train/grad_norm" in record.metrics]
    if not logs or logs[-1].step != step:
        raise DemoError(
            f"{folder.metrics} has no log of step {step}, the last one: please report this as a bug "
            "in metricfold"
        )
    steps = [record.step for record in logs if record.step >= first]
    # A checkpoint follows right after a log, so a launch begins with a new interval.
    interval = range(max(steps[:-1], default=first - 1) + 1, step + 1)
    # A validation pass comes before every checkpoint.
    saves = sum(one.prefix == "val" and one.step >= first for one in records)
    logged = logs[-1].metrics
    # There is a number over all datasets where there is more than one.
    loss = "train/loss" if len(mixture.names) > 1 else f"train_{mixture.names[0]}/loss"
    return Proof(
        folder.framework,
        interval,
        _rows(mixture, pages, interval, logged),
        len(steps),
        saves,
        pages[0].collectives,
        pages[0].schema_rounds,
        max(median(page.logging) for page in pages),
        logged["train/grad_norm"],
        int(logged[f"train/grad_norm_{folder.framework.part}"]),
        {log.step: log.metrics[loss] for log in logs if loss in log.metrics},
    )


def _rows(
    mixture: Mixture, pages: Sequence[Page], interval: range, logged: dict[str, float]
) -> list[Row]:
    lengths = _lengths(mixture, interval, len(pages))
    tokens = _tokens_seen(mixture, interval.stop - 1)
    steps = slice(interval.start - pages[0].first_step, None)
    losses = np.array([page.losses[steps] for page in pages]).sum(1)  # (parts, datasets)
    weights = np.array([page.tokens[steps] for page in pages]).sum(1)

    groups = [(f"train_{name}", name, [i]) for i, name in enumerate(mixture.names)]
    if len(groups) > 1:
        groups.append(("train", "all", list(range(len(groups)))))
    rows = []
    for prefix, name, datasets in groups:
        by_part = [np.concatenate([mine[i] for i in datasets]) for mine in lengths]
        loss, weight = losses[:, datasets].sum(1), weights[:, datasets].sum(1)
        total = int(tokens[datasets].sum())
        if not weight.any():
            continue  # a dataset that is small enough not to be drawn in these steps
        rows += [
            Row(
                "seq_len p50",
                name,
                logged[f"{prefix}/seq_len_stat_p50"],
                float(np.mean([np.median(mine) for mine in by_part if mine.size])),
                float(np.median(np.concatenate(by_part))),
            ),
            Row(
                "loss",
                name,
                logged[f"{prefix}/loss"],
                float(np.mean(loss[weight > 0] / weight[weight > 0])),
                float(loss.sum() / weight.sum()),
            ),
            # Each token is on one of them, so the mean of their totals is this.
            Row("tokens_seen", name, logged[f"{prefix}/tokens_seen"], total / len(pages), total),
        ]
    return sorted(rows, key=lambda row: [other.metric for other in rows].index(row.metric))


def _lengths(mixture: Mixture, steps: range, parts: int) -> list[list[np.ndarray]]:
    """Return the lengths of the texts of `steps`, for each rank or device and each dataset."""
    found: list[list[list[int]]] = [[[] for _ in mixture.names] for _ in range(parts)]
    for step in steps:
        for part, share in enumerate(mixture.shares(step, parts)):
            for sample in map(mixture.draw, share):
                found[part][sample.dataset].append(sample.length)
    return [[np.array(lengths) for lengths in mine] for mine in found]


def _tokens_seen(mixture: Mixture, steps: int) -> np.ndarray:
    """Return each dataset's tokens in the first `steps` steps, whoever trained on them."""
    totals = np.zeros(len(mixture.names), dtype=np.int64)
    for number in range(steps * SAMPLES_PER_STEP):
        sample = mixture.draw(number)
        totals[sample.dataset] += sample.length
    return totals
