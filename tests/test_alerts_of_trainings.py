"""What goes wrong on one rank of a real training stops all of them, at the same step, and is named."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
import torch
from ranks import preload, run_ranks
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from metricfold import (
    Alert,
    MetricsAggregator,
    MetricsLogger,
    NonFinite,
    Snapshot,
    Spike,
)
from metricfold.torch import DeviceAccumulator

preload("torch.distributed.fsdp", "metricfold.torch")

DATASETS = ("web", "code")
ROWS = 8  # of a step, dealt out in blocks; every second one is code
LAYOUTS = ("ddp", "fsdp")
Found = tuple[Any, ...]


def batch(step: int, bad: tuple[str, int] | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a step's rows; of one of them the features are NaN, or far too large."""
    generator = torch.Generator().manual_seed(step)
    features, targets = torch.randn(2, ROWS, 4, generator=generator)
    if bad is not None:
        features[bad[1]] *= float("nan") if bad[0] == "nan" else 40.0
    return features, targets


def late(snapshot: Snapshot, memory: dict[str, Any]) -> None:
    """A rule that keeps the thread of the last rank busy, so that it learns of everything late."""
    if torch.distributed.is_initialized() and torch.distributed.get_rank():
        time.sleep(0.01)


def said(alerts: Iterable[Alert]) -> list[Found]:
    return [(one.step, one.rule.split("(")[0], one.dataset, one.rank) for one in alerts]


def train(
    layout: str,
    ranks: tuple[int, int],
    steps: range,
    bad: Mapping[int, tuple[str, int]],
    *,
    stops: bool = True,
    state: Any = None,
) -> tuple[int, list[Found], dict[str, Any]]:
    """Train, and return the last step, what was found, and the state of the metrics."""
    rank, world_size = ranks
    torch.manual_seed(0)
    model: Any = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 4))
    if layout == "ddp":
        model = DistributedDataParallel(model)
    elif layout == "fsdp":
        fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    aggregator = MetricsAggregator()
    aggregator.alert_on(NonFinite("*/loss"), Spike("*/loss", least=6), late)
    if state is not None:
        aggregator.load_state_dict(state)
    losses = DeviceAccumulator({"loss": "mean"}, DATASETS)
    mine = slice(ROWS * rank // world_size, ROWS * (rank + 1) // world_size)
    ids = torch.arange(ROWS)[mine] % 2
    found: list[Found] = []
    with MetricsLogger([]) as logger:
        for step in steps:
            features, targets = (rows[mine] for rows in batch(step, bad.get(step)))
            each = (model(features) - targets).square().mean(-1)
            losses.update("loss", each.detach(), dataset_ids=ids)
            each.mean().backward()
            # A step that is too large would move all that follows, in the one that is not to stop.
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            aggregator.drain(losses)
            alerts = logger.log(step, aggregator, prefix="train")
            found += said(alerts)
            if stops and alerts:
                break
        if not stops:
            found += said(logger.alerts())
        return step, found, aggregator.state_dict()


def differ(rank: int) -> str:
    """Return what a rank is told when one of them has a rule of its own."""
    aggregator = MetricsAggregator()
    aggregator.alert_on(NonFinite("*/loss"), *([Spike("*/loss")] if rank == 1 else []))
    with MetricsLogger([]) as logger:
        logger.log(0, aggregator, prefix="train")
        with pytest.raises(RuntimeError, match="different alerts") as raised:
            logger.log(1, aggregator, prefix="train")
    return str(raised.value)


BURSTS = {12: ("spike", 5), 14: ("spike", 2), 22: ("spike", 7)}
CUT = 13


def on_ranks(rank: int, world_size: int, state: Any) -> dict[str, Any]:
    ranks = (rank, world_size)
    results: dict[str, Any] = {}
    for layout in LAYOUTS:
        for kind in ("nan", "spike"):
            step, found, _ = train(layout, ranks, range(15), {9: (kind, 5)})
            results[f"{layout} {kind}"] = (step, found)
    steps = range(CUT) if state is None else range(CUT, 25)
    _, *results["bursts"] = train("ddp", ranks, steps, BURSTS, stops=False, state=state)
    results["differ"] = differ(rank)
    return results


@pytest.fixture(scope="module")
def four() -> list[dict[str, Any]]:
    return run_ranks(on_ranks, 4, 4, None, timeout=120)


@pytest.fixture(scope="module")
def two(four: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Two ranks, which go on from what four have saved."""
    return run_ranks(on_ranks, 2, 2, four[0]["bursts"][1], timeout=120)


@pytest.mark.parametrize("world_size", ["two", "four"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_goes_wrong_on_one_rank_stops_all_at_the_same_step_and_is_named(
    layout: str, world_size: str, request: pytest.FixtureRequest
) -> None:
    ranks = request.getfixturevalue(world_size)
    wrong = 5 * len(ranks) // ROWS  # has row 5, which is code
    for kind, rule in (("nan", "NonFinite"), ("spike", "Spike")):
        expected = (10, [(9, rule, "code", wrong)])
        assert [one[f"{layout} {kind}"] for one in ranks] == [expected] * len(ranks)


@pytest.mark.parametrize("world_size", ["two", "four"])
def test_rules_that_differ_are_one_error(world_size: str, request: pytest.FixtureRequest) -> None:
    ranks = request.getfixturevalue(world_size)
    (text,) = {one["differ"] for one in ranks}
    assert "rank 1 with rules" in text


def test_verdicts_after_a_resume_on_other_ranks_are_those_of_one_process_without_a_break(
    two: list[dict[str, Any]], four: list[dict[str, Any]]
) -> None:
    _, whole, _ = train("alone", (0, 1), range(25), BURSTS, stops=False)
    resumed = [*four[0]["bursts"][0], *two[0]["bursts"][0]]
    assert [one[:3] for one in resumed] == [one[:3] for one in whole]
    assert [(step, name) for step, _, name, _ in whole] == [(12, "code"), (14, "web"), (22, "code")]
    # The rank is that of the training that found it: row 5 of four ranks, 2 and 7 of two.
    assert [rank for *_, rank in resumed] == [2, 0, 1]
    for ranks in (two, four):
        assert all(one["bursts"] == ranks[0]["bursts"] for one in ranks)
