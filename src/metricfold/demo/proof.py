"""The proof at the end of the demo: what was logged, against the same numbers counted by hand.

*ours* is what the last log says in ``metrics.jsonl``. *truth* is counted from the texts and from
the ledger, with plain sums and NumPy. *average over ranks*, or devices, is what comes out when each
computes its own value and the mean of these is taken, as loops without metricfold often do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import median
from typing import NamedTuple

import numpy as np

from metricfold import read_jsonl
from metricfold.demo.folder import RunFolder
from metricfold.demo.ledger import Page, read_ledger
from metricfold.demo.mixture import Mixture
from metricfold.demo.texts import DemoError
from metricfold.sinks import Record

__all__ = ["Proof", "Row", "count", "prove"]


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


class Proof(NamedTuple):
    """What came of counting again what the last launch has logged."""

    interval: range  # the steps that the last log speaks about; it gives totals since the beginning
    rows: list[Row]
    sentences: list[str]  # what else there is to say of the launch

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
    logged, part = logs[-1].metrics, folder.framework.part
    owner, norm = logged[f"train/grad_norm_{part}"], logged["train/grad_norm"]
    sentences = [
        *_fall_of_the_loss(logs, mixture),
        *_costs(pages, len(steps), saves, on_ranks=part == "rank"),
        f"The largest gradient of these steps was {part} {owner:.0f}'s, of norm {norm:.3g}",
    ]
    return Proof(interval, _rows(mixture, pages, interval, logged), sentences)


def count(number: int, what: str) -> str:
    """Return "1 step" or "2,000 steps"."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def _fall_of_the_loss(logs: list[Record], mixture: Mixture) -> Iterator[str]:
    # There is a number over all datasets where there is more than one.
    loss = "train/loss" if len(mixture.names) > 1 else f"train_{mixture.names[0]}/loss"
    losses = [(log.metrics[loss], log.step) for log in logs if loss in log.metrics]
    if len(losses) > 1:
        yield "The loss went from {:.2f} at step {} to {:.2f} at step {}".format(
            *losses[0], *losses[-1]
        )


def _costs(pages: list[Page], logs: int, saves: int, *, on_ranks: bool) -> Iterator[str]:
    did = f"{count(logs, 'log')} and {count(saves, 'checkpoint')} took"
    holding = max(median(page.logging) for page in pages)
    shown = f"{1e3 * holding:.0f}" if holding >= 0.01 else f"{1e3 * holding:.2g}"
    held = f"logger.log() returned after {shown} ms (median"
    if on_ranks:
        agreeing = pages[0].collectives - logs - saves
        new = f", and {agreeing} for new keys and categories (in {pages[0].schema_rounds} of them)"
        yield f"{did} {count(pages[0].collectives, 'collective')}: one each{new if agreeing else ''}"
        yield f"{held} on the slowest rank)"
    else:
        yield f"{did} no collective: each step brings its metrics over the devices together"
        yield f"{held})"


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
