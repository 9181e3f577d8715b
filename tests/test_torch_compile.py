"""A compiled step costs one break for a metric on the host, and none for one on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from metricfold import (
    AggregationType,
    JSONLSink,
    Metric,
    MetricBatch,
    MetricsAggregator,
    MetricsLogger,
    read_jsonl,
)
from metricfold._core.runtime.uncompiled import uncompiled
from metricfold.torch import DeviceAccumulator

SEEN = [Metric("docs", "seen", 1, AggregationType.SUM)]
BATCH = MetricBatch.from_metrics(SEEN)
ACC = DeviceAccumulator({"on_device": "mean"})


@pytest.fixture(autouse=True)
def dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def traced(method: Callable[..., Any], args: Callable[[Any], tuple[Any, ...]]) -> dict[str, int]:
    """Return what it takes to compile a step that calls `method` in its midst."""
    torch._dynamo.reset()
    counters.clear()

    @torch.compile(backend="eager")
    def step(x: torch.Tensor) -> torch.Tensor:
        loss = (x * 2).sum()
        method(*args(loss))
        return loss * 2

    for number in range(6):
        assert step(torch.full((3,), float(number))) == 12 * number
    return {
        "breaks": sum(counters["graph_break"].values()),
        "graphs": counters["stats"]["unique_graphs"],
        "frames": counters["frames"]["total"],
    }


@pytest.mark.filterwarnings("ignore:the interval is empty:RuntimeWarning")
@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("record", lambda loss: ("n", 1.0)),
        ("record", lambda loss: ("loss", loss)),
        ("update", lambda loss: (SEEN,)),
        ("update", lambda loss: (BATCH,)),
        ("drain", lambda loss: (ACC,)),
        ("mark", lambda loss: ()),
        ("reduce", lambda loss: ()),
        ("state_dict", lambda loss: ()),
    ],
)
def test_a_call_on_the_host_costs_a_compiled_step_what_a_disabled_function_does(
    name: str, args: Callable[[Any], tuple[Any, ...]]
) -> None:
    method = getattr(MetricsAggregator(), name)
    expected = {"breaks": 1, "graphs": 2, "frames": 2}
    assert traced(torch.compiler.disable(method), args) == expected
    assert traced(method, args) == expected


def test_what_a_compiled_step_records_is_what_it_records_without() -> None:
    aggregator = MetricsAggregator()

    def step(x: torch.Tensor) -> torch.Tensor:
        for part in x:  # so Dynamo gives the loop up, and meets `record` as a frame of its own
            aggregator.record("loss", part.sum(), weight=part.max())
        aggregator.update(SEEN)
        return x.sum()

    compiled = torch.compile(step, backend="eager")
    batches = [torch.arange(6.0).reshape(2, 3) + number for number in range(4)]
    for batch in batches:
        step(batch)
    plainly = aggregator.get_metrics_for_logging()
    aggregator.reset()
    for batch in batches:
        compiled(batch)
    assert aggregator.get_metrics_for_logging() == plainly


def test_a_log_in_a_compiled_function_is_a_log(tmp_path: Path) -> None:
    # Before, Dynamo took the NumPy of a reduction for torch's, which ended in a KeyError.
    aggregator = MetricsAggregator()
    with MetricsLogger([JSONLSink(tmp_path / "log.jsonl")]) as logger:

        @torch.compile(backend="eager")
        def step(x: torch.Tensor, number: int) -> torch.Tensor:
            aggregator.record("loss", x.mean())
            logger.log(number, aggregator, prefix="train")
            return x * 2

        for number in range(3):
            step(torch.full((2,), float(number)), number)
    records = read_jsonl(tmp_path / "log.jsonl")
    assert [record.metrics["train/loss"] for record in records] == [0.0, 1.0, 2.0]


def test_a_full_graph_refuses_a_call_on_the_host_and_says_why() -> None:
    aggregator = MetricsAggregator()
    step = torch.compile(
        lambda x: aggregator.record("loss", x.sum()), backend="eager", fullgraph=True
    )
    with pytest.raises(torch._dynamo.exc.Unsupported, match="update a DeviceAccumulator"):
        step(torch.ones(3))
    assert aggregator.reduce().empty


def test_an_accumulator_is_part_of_one_graph_for_good() -> None:
    aggregator, acc = (
        MetricsAggregator(),
        DeviceAccumulator({"loss": "mean", "n": "sum"}, ("a", "b")),
    )
    ids = torch.tensor([0, 1, 1])

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(x: torch.Tensor) -> torch.Tensor:
        mark = acc.mark()
        acc.update("loss", x, dataset_ids=ids)
        acc.update_all({"n": x > 0}, weights=x.abs(), dataset_ids=ids)
        acc.rollback(mark, where=x.isnan().any())
        return x * 2

    for number in range(12):  # more often than Dynamo makes new graphs
        step(torch.arange(3.0) + number)
        step(torch.full((3,), float("nan")))
        aggregator.drain(acc)
    logged = aggregator.get_metrics_for_logging("t")
    assert logged == {"t_a/loss": 5.5, "t_b/loss": 7.0, "t_a/n": 11.0, "t_b/n": 24.0}
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_one_graph_does_for_batches_of_all_sizes() -> None:
    kinds = {"loss": "mean", "most": "max"}
    compiled, plain = (DeviceAccumulator(kinds, ("a", "b")) for _ in range(2))

    def step(
        acc: DeviceAccumulator, x: torch.Tensor, mask: torch.Tensor, ids: torch.Tensor
    ) -> None:
        acc.update_all(dict.fromkeys(kinds, x), weights=mask, dataset_ids=ids)
        acc.update("loss", x, weights=x.abs(), dataset_ids=ids)
        acc.update("loss", x[0, 0], dataset_ids=ids[0])

    quick = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    for n, m in ((6, 7), (11, 8), (9, 13)):
        torch.manual_seed(n)
        x = torch.randn(n, m)
        given = x, x > 0, torch.randint(0, 2, (n,))
        for run, acc in ((quick, compiled), (step, plain)):
            run(acc, *given)
    logged = []
    for acc in (compiled, plain):
        aggregator = MetricsAggregator()
        aggregator.drain(acc)
        logged.append(aggregator.get_metrics_for_logging("t"))
    assert logged[0] == pytest.approx(logged[1], rel=1e-12)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_what_was_marked_before_torch_was_there_is_left_alone_once_an_aggregator_is_made() -> None:
    seen: list[Any] = []

    @uncompiled
    def take(loss: torch.Tensor) -> None:
        with np.errstate(all="ignore"):  # at which Dynamo would break
            seen.append(loss)

    MetricsAggregator()
    assert traced(take, lambda loss: (loss,)) == {"breaks": 1, "graphs": 2, "frames": 2}
    assert len(seen) == 6
