"""What each library makes of ranks that differ: a few small cases with a known answer.

Metrics are made when a rank first has something to say about them, as a training loop over several
datasets does. Where a library would be right had every rank declared every metric beforehand, that
is for the page to say.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch.distributed as dist

from benchmarks.meter import Meter
from benchmarks.peers.libraries import Library
from benchmarks.peers.run import PRELOAD
from benchmarks.ranks import run_ranks
from benchmarks.workloads import Column, Workload

__all__ = ["CASES", "Case", "outcome"]

_PATIENCE = 5.0
"""So many seconds a rank waits for the others before that is called hanging."""
_TOLERANCE = 1e-3
_FAILURES = {
    "aborts the process": ("it died",),
    "hangs": ("timed out", "timeout", "did not finish"),
}
"""How it goes wrong, by what the error says."""


@dataclass(frozen=True, eq=False)
class Case(Workload):
    """One interval on two ranks.

    Args:
        title: what differs between them.
        columns: the metrics of each rank.
        wanted: what everybody should see.
    """

    title: str
    columns: tuple[list[Column], ...]
    wanted: dict[str, float]
    window: int | None = 1000
    repeats: int = 1

    @property
    def truth(self) -> str:
        return _shown(self, self.wanted)

    def interval(self, rank: int, number: int) -> Iterator[list[Column]]:
        yield self.columns[rank]


def _loss(value: float, count: int, dataset: str = "alpaca") -> Column:
    return Column(dataset, "loss", "mean", np.full(count, value))


def _lengths(first: float, last: float, count: int) -> Column:
    return Column("alpaca", "length", "distribution", np.linspace(first, last, count))


_FEW, _MANY = _lengths(1000, 3000, 100), _lengths(50, 150, 900)
_P50, _P95 = np.percentile(np.append(_FEW.values, _MANY.values), (50, 95)).tolist()

CASES = (
    Case(
        "mean loss: 10 values of 1 and 90 of 3",
        ([_loss(1.0, 10)], [_loss(3.0, 90)]),
        {"train_alpaca/loss": 2.8},
    ),
    Case(
        "median length: 900 around 100 and 100 around 2000",
        ([_MANY], [_FEW]),
        {"train_alpaca/length_stat_p50": _P50},
    ),
    Case(
        "95th percentile of these",
        ([_MANY], [_FEW]),
        {"train_alpaca/length_stat_p95": _P95},
    ),
    Case(
        "loss: alpaca's on one, orca's on the other",
        ([_loss(1.0, 1)], [_loss(3.0, 1, "orca")]),
        {"train_alpaca/loss": 1.0, "train_orca/loss": 3.0},
    ),
    Case(
        "loss: on one rank only",
        ([_loss(1.0, 1)], []),
        {"train_alpaca/loss": 1.0},
    ),
)


class _Once(Meter):
    """Wants one log, and only what it returned."""

    def __init__(self) -> None:
        super().__init__(0, 1)
        self._asked = False

    def wants_more(self) -> bool:
        first, self._asked = not self._asked, True
        return first

    def begin(self) -> None:
        """Ranks come as they are."""

    def end(self, values: Mapping[str, float]) -> None:
        self.values = values


def outcome(library: Library, case: Case) -> str:
    """Return what comes out on rank 0, in a few words."""
    try:
        logged = run_ranks(
            _log,
            len(case.columns),
            library,
            case,
            timeout=60.0,
            group_timeout=_PATIENCE,
            preload=PRELOAD,
        )[0]
    except RuntimeError as error:
        return _failure(str(error).lower())
    right = all(
        key in logged and abs(logged[key] - value) <= _TOLERANCE * abs(value)
        for key, value in case.wanted.items()
    )
    return "right" if right else _shown(case, logged)


def _shown(case: Case, logged: Mapping[str, float]) -> str:
    """Return the values that `case` is about; more than one with their datasets."""
    values = {key: f"{logged[key]:.4g}" if key in logged else "missing" for key in case.wanted}
    if len(values) == 1:
        return "".join(values.values())
    return ", ".join(
        f"{key.removeprefix('train_').partition('/')[0]} {value}" for key, value in values.items()
    )


def _failure(reason: str) -> str:
    for failure, signs in _FAILURES.items():
        if any(sign in reason for sign in signs):
            return failure
    return "raises an error"


def _log(rank: int, library: Library, case: Case) -> Mapping[str, float]:
    """Run on each rank."""
    warnings.simplefilter("ignore")
    # What goes wrong here ends up in the table; torch and gloo need not say so as well.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    meter = _Once()
    library.load()(case, rank, 0).run(meter)
    # A rank that has nothing to log trains on and meets the others in no collective.
    store = dist.distributed_c10d._get_default_store()
    store.set(f"logged/{rank}", "")
    others = [f"logged/{other}" for other in range(dist.get_world_size())]
    store.wait(others, timedelta(seconds=_PATIENCE))
    return meter.values
