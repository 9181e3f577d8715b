"""What each library makes of ranks that differ: a few small cases with a known answer.

Metrics are made when a rank first has something to say about them, as a training loop over several
datasets does. Where a library would be right had every rank declared every metric beforehand, that
is for the page to say.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch.distributed as dist

from benchmarks.meter import Meter
from benchmarks.peers.libraries import Library
from benchmarks.peers.run import as_launched
from benchmarks.ranks import RankError, run_ranks
from benchmarks.workloads import Column, Workload

_PATIENCE = 5.0
"""So many seconds a rank waits for the others before that is called hanging."""
_TOLERANCE = 1e-3
_FAILURES = {"aborts the process": ("died",), "hangs": ("timed out", "timeout", "hang")}
"""How it goes wrong, by what the error says."""


@dataclass(frozen=True, eq=False)
class Case(Workload):
    """One interval on two ranks: what differs, the metrics of each, and what all should see."""

    title: str
    columns: tuple[list[Column], ...]
    wanted: dict[str, float]
    window: int | None = 1000
    repeats: int = 1

    @property
    def truth(self) -> str:
        return self.shown(self.wanted)

    def interval(self, rank: int, number: int) -> Iterator[list[Column]]:
        yield self.columns[rank]

    def shown(self, logged: Mapping[str, float]) -> str:
        """Return the values that this is about; more than one with their datasets."""
        values = {key: f"{logged[key]:.4g}" if key in logged else "missing" for key in self.wanted}
        if len(values) == 1:
            return "".join(values.values())
        datasets = {key.removeprefix("train_").partition("/")[0]: key for key in values}
        return ", ".join(f"{dataset} {values[key]}" for dataset, key in datasets.items())


def _loss(value: float, count: int, dataset: str = "alpaca") -> Column:
    return Column(dataset, "loss", "mean", np.full(count, value))


def _lengths(first: float, last: float, count: int) -> Column:
    return Column("alpaca", "length", "distribution", np.linspace(first, last, count))


_FEW, _MANY = _lengths(1000, 3000, 100), _lengths(50, 150, 900)
_P50, _P95 = np.percentile(np.append(_FEW.values, _MANY.values), (50, 95)).tolist()

_MEAN = {"train_alpaca/loss": 2.8}
_ONE = {"train_alpaca/loss": 1.0}
_LOSS, _LENGTHS = [_loss(1.0, 1)], ([_MANY], [_FEW])
CASES = (
    Case("mean loss: 10 values of 1 and 90 of 3", ([_loss(1.0, 10)], [_loss(3.0, 90)]), _MEAN),
    Case(
        "median length: 900 around 100 and 100 around 2000",
        _LENGTHS,
        {"train_alpaca/length_stat_p50": _P50},
    ),
    Case("95th percentile of these", _LENGTHS, {"train_alpaca/length_stat_p95": _P95}),
    Case(
        "loss: alpaca's on one, orca's on the other",
        (_LOSS, [_loss(3.0, 1, "orca")]),
        {**_ONE, "train_orca/loss": 3.0},
    ),
    Case("loss: on one rank only", (_LOSS, []), _ONE),
)


class _Once(Meter):
    """Wants one log, and only what it returned; ranks come as they are."""

    def wants_more(self) -> bool:
        first, self._logs = self._logs == 0, 1
        return first

    def take(self, log: Callable[[], Mapping[str, float]]) -> None:
        self.values = log()


def outcome(library: Library, case: Case) -> str:
    """Return what comes out on rank 0, in a few words."""
    try:
        logged = run_ranks(_log, len(case.columns), library, case, group_timeout=_PATIENCE)[0]
    except RankError as error:
        reason = str(error).lower()
        for failure, signs in _FAILURES.items():
            if any(sign in reason for sign in signs):
                return failure
        return "raises an error"
    right = all(
        key in logged and abs(logged[key] - value) <= _TOLERANCE * abs(value)
        for key, value in case.wanted.items()
    )
    return "right" if right else case.shown(logged)


def _log(rank: int, library: Library, case: Case) -> Mapping[str, float]:
    """Run on each rank."""
    as_launched(rank)
    # What goes wrong here ends up in the table; torch and gloo need not say so as well.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    meter = _Once(0, 1)
    library.load()(case, rank, 0).run(meter)
    # A rank that has nothing to log trains on and meets the others in no collective.
    store = dist.distributed_c10d._get_default_store()
    store.set(f"logged/{rank}", "")
    others = [f"logged/{other}" for other in range(dist.get_world_size())]
    store.wait(others, timedelta(seconds=_PATIENCE))
    return meter.values
