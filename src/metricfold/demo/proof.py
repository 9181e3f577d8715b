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
from typing import NamedTuple

import numpy as np

from metricfold import read_jsonl
from metricfold.demo.folder import RunFolder
from metricfold.demo.framework import Framework
from metricfold.demo.ledger import Page, read_ledger
from metricfold.demo.mixture import Mixture
from metricfold.demo.texts import DemoError

__all__ = ["Proof", "Row", "prove"]


class Row(NamedTuple):
    """One number, three times."""

    metric: str
    dataset: str
    ours: float
    averaged: float
    truth: float

    @property
    def holds(self) -> bool:
        """Whether ours is the truth; exactly, but for rounding in a loss."""
        # Losses are sums of float32, in another order than the ledger's.
        tolerance = 1e-6 if self.metric == "loss" else 1e-12
        return math.isclose(self.ours, self.truth, rel_tol=tolerance)


@dataclass(frozen=True, slots=True)
class Proof:
    """What came of counting again what the last launch has logged."""

    framework: Framework  # says whether it is ranks or devices below
    interval: range  # the steps that the last log speaks about; it gives totals since the beginning
    rows: list[Row]
    logs: int  # of the training metrics in this launch
    saves: int  # checkpoints
    collectives: int  # that the training metrics took for both
    schema_rounds: int  # of them, those in which the ranks had to agree on new keys or categories
    holding: float  # seconds that a log held up its step on the slowest rank: the median
    gradient_norm: float  # the largest of one rank's gradient in the interval
    gradient_owner: int  # the rank that it was on
    losses: dict[int, float]  # over all datasets, by step, over the whole run

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
    logged = logs[-1].metrics
    # There is a number over all datasets where there is more than one.
    loss = "train/loss" if len(mixture.names) > 1 else f"train_{mixture.names[0]}/loss"
    return Proof(
        framework=folder.framework,
        interval=interval,
        rows=_rows(mixture, pages, interval, logged),
        logs=len(steps),
        # A validation pass comes before every checkpoint.
        saves=sum(one.prefix == "val" and one.step >= first for one in records),
        collectives=pages[0].collectives,
        schema_rounds=pages[0].schema_rounds,
        holding=max(median(page.logging) for page in pages),
        gradient_norm=logged["train/grad_norm"],
        gradient_owner=int(logged[f"train/grad_norm_{folder.framework.part}"]),
        losses={log.step: log.metrics[loss] for log in logs if loss in log.metrics},
    )


def _rows(
    mixture: Mixture, pages: Sequence[Page], interval: range, logged: dict[str, float]
) -> list[Row]:
    parts = range(len(pages))
    samples = [
        (step, part, sample.dataset, sample.length)
        for step in range(1, interval.stop)
        for part, share in enumerate(mixture.shares(step, len(pages)))
        for sample in map(mixture.draw, share)
    ]
    step, part, dataset, length = np.array(samples).T
    steps = slice(interval.start - pages[0].first_step, None)
    losses = np.array([page.losses[steps] for page in pages]).sum(1)  # (parts, datasets)
    tokens = np.array([page.tokens[steps] for page in pages]).sum(1)

    groups = [(f"train_{name}", name, [i]) for i, name in enumerate(mixture.names)]
    if len(groups) > 1:
        groups.append(("train", "all", list(range(len(groups)))))
    rows = []
    for prefix, name, datasets in groups:
        loss, weight = losses[:, datasets].sum(1), tokens[:, datasets].sum(1)
        if not weight.any():
            continue  # a dataset that is small enough not to be drawn in these steps
        mine = np.isin(dataset, datasets)
        total = int(length[mine].sum())
        lately = mine & (step >= interval.start)
        by_part = [length[lately & (part == one)] for one in parts]
        rows += [
            Row(
                "seq_len p50",
                name,
                logged[f"{prefix}/seq_len_stat_p50"],
                float(np.mean([np.median(one) for one in by_part if one.size])),
                float(np.median(length[lately])),
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
    return [*rows[0::3], *rows[1::3], *rows[2::3]]
