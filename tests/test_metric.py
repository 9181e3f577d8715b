"""`Metric`, its types, and its values: any one-element array, and nothing reads it before the log."""

from __future__ import annotations

import gc
import inspect
import math
import os
import pickle
import subprocess
import sys
import weakref
from collections import Counter
from collections.abc import Callable
from enum import Enum
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from handlers_of_users import LaneRMS, MyTypes, RMSHandler
from ranks import run_ranks, run_threads
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from ways_in import (
    CATEGORICAL,
    DISTRIBUTION,
    MAX,
    MEAN,
    MIN,
    RATE,
    SUM,
    WAYS_IN,
    Take,
    as_batch,
)

from metricfold import (
    AggregationType,
    Metric,
    MetricBatch,
    MetricsAggregator,
    MetricState,
    Snapshot,
)

NUMERIC = [SUM, MEAN, MAX, MIN, DISTRIBUTION, RATE]

every_way_in = pytest.mark.parametrize("take", WAYS_IN)


def logged(take: Take, *metrics: Metric) -> dict[str, float]:
    """Return what a new aggregator reports of `metrics`, without prefix and dataset."""
    aggregator = MetricsAggregator()
    take(aggregator, list(metrics))
    results = aggregator.get_metrics_for_logging()
    return {key.split("/", 1)[1]: value for key, value in results.items()}


# -- The record ----------------------------------------------------------------------------------


def test_a_metric_is_positional_immutable_and_has_weight_1() -> None:
    metric = Metric("alpaca", "loss", 2.5, MEAN)
    assert (metric.dataset_name, metric.name, metric.value) == ("alpaca", "loss", 2.5)
    assert (metric.agg_type, metric.weight) == (MEAN, 1.0)
    assert Metric("alpaca", "loss", 2.5, MEAN, 3).weight == 3
    assert metric == Metric(
        dataset_name="alpaca", name="loss", value=2.5, agg_type=MEAN, weight=1.0
    )
    assert len({metric, Metric("alpaca", "loss", 2.5, MEAN)}) == 1
    with pytest.raises(AttributeError):
        metric.value = 3.0  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(metric)) == metric


def test_a_metric_state_is_what_the_contract_names() -> None:
    state = MetricState(
        dataset_name="d", metric_name="m", value=0, agg_type=AggregationType.CUSTOM, metadata={}
    )
    state.value += 1
    assert state == MetricState("d", "m", 1, AggregationType.CUSTOM)
    assert MetricState("d", "m", 1, SUM).metadata is not MetricState("d", "m", 1, SUM).metadata


def test_the_aggregation_types_are_those_of_the_specification_and_rate_and_last() -> None:
    names = "SUM MEAN MAX MIN DISTRIBUTION CATEGORICAL_COUNT CUSTOM RATE LAST"
    assert {member.name for member in AggregationType} == set(names.split())
    assert all(pickle.loads(pickle.dumps(member)) is member for member in AggregationType)


@every_way_in
@pytest.mark.parametrize("agg_type", [MyTypes.RMS, "rms", AggregationType.CUSTOM], ids=str)
@pytest.mark.parametrize("handler", [LaneRMS(), RMSHandler()], ids=["lanes", "state"])
def test_a_users_own_enum_member_or_string_is_as_good_a_type(
    take: Take, agg_type: Any, handler: Any
) -> None:
    aggregator = MetricsAggregator()
    aggregator.register_handler(agg_type, handler)
    take(aggregator, [Metric("d", "m", value, agg_type) for value in (3, 4)])
    assert aggregator.get_metrics_for_logging() == {"data_d/m": pytest.approx(12.5**0.5)}


class Equal(str, Enum):
    """What a StrEnum is: its members equal their texts."""

    RMS = "rms"


@pytest.mark.parametrize("handler", [LaneRMS(), RMSHandler()], ids=["lanes", "state"])
@pytest.mark.parametrize("registered", ["rms", Equal.RMS], ids=["text", "member"])
def test_a_text_and_the_member_of_a_strenum_that_equals_it_are_one_type(
    registered: Any, handler: Any
) -> None:
    """Each went by its own name: ranks could not agree, and a saved state could not be loaded."""

    def train(communicator: Any) -> tuple[dict[str, float], dict[str, float]]:
        aggregator = MetricsAggregator(communicator=communicator)
        aggregator.register_handler(registered, handler)
        one, other = (Equal.RMS, "rms") if communicator.rank else ("rms", Equal.RMS)
        aggregator.record("m", 3, one)
        aggregator.record("m", 4, other)
        aggregator.update([Metric("d", "x", 2, other)])
        as_batch(aggregator, [Metric("d", "x", 2, one)])
        aggregator.record("late", torch.tensor(2.0), one)
        logged = aggregator.reduce().as_dict("t")
        aggregator.load_state_dict(aggregator.state_dict())
        return logged, aggregator.reduce().as_dict("t")

    found = [{"t/m": 12.5**0.5, "t_d/x": 2.0, "t/late": 2.0}] * 2
    assert run_threads(train, 2) == [tuple(map(pytest.approx, found))] * 2


@every_way_in
@pytest.mark.parametrize("agg_type", [SUM, MEAN, MAX, MIN, DISTRIBUTION, CATEGORICAL], ids=str)
def test_a_built_in_type_may_be_given_as_text(take: Take, agg_type: AggregationType) -> None:
    values = [Metric("d", "m", 2, agg_type.value), Metric("d", "m", 4, agg_type)]
    assert logged(take, *values) == logged(
        take, *[metric._replace(agg_type=agg_type) for metric in values]
    )


PROGRAM = """
import enum, json, multiprocessing, pathlib, sys
from metricfold import LaneHandler, MetricsAggregator

class Outer:
    class Own(enum.Enum):
        TOTAL = 1

class Total(LaneHandler):
    sum_lanes = ("total",)

    def sums_of(self, values, weights):
        return (float(values.sum()),)

    def result(self, lanes):
        return lanes["total"]

def work(paths):
    first, *others = map(pathlib.Path, paths)
    aggregator = MetricsAggregator()
    aggregator.register_handler(Outer.Own.TOTAL, Total())
    for path in others:
        aggregator.load_state_dict(json.loads(path.read_text()))
        aggregator.record("x", 2, Outer.Own.TOTAL)
        assert aggregator.get_metrics_for_logging("t") == {"t/x": 5.0}, path
    if not others:
        aggregator.record("x", 3, Outer.Own.TOTAL)
        first.write_text(json.dumps(aggregator.state_dict()))

if __name__ == "__main__":
    if sys.argv[1] == "--spawn":
        child = multiprocessing.get_context("spawn").Process(target=work, args=(sys.argv[2:],))
        child.start()
        child.join()
        sys.exit(child.exitcode)
    work(sys.argv[1:])
"""
LAUNCHERS = {
    "script": ["pkg/train.py"],
    "module": ["-m", "pkg.train"],
    "profiler": ["-m", "cProfile", "-o", os.devnull, "pkg/train.py"],
    "script that spawns": ["pkg/train.py", "--spawn"],
    "module that spawns": ["-m", "pkg.train", "--spawn"],
}


def test_an_enum_of_the_script_is_the_same_type_however_the_script_is_launched(
    tmp_path: Path,
) -> None:
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "__init__.py").touch()
    (tmp_path / "pkg" / "train.py").write_text(PROGRAM)

    def launch_all(arguments: Callable[[str], list[str]]) -> None:
        running = {
            name: subprocess.Popen(
                [sys.executable, *command, *arguments(name)],
                cwd=tmp_path,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for name, command in LAUNCHERS.items()
        }
        try:
            for name, process in running.items():
                output, _ = process.communicate(timeout=60)
                assert process.returncode == 0, (name, output)
        finally:
            for process in running.values():
                process.kill()
                process.communicate()

    launch_all(lambda name: [f"saved by {name}"])
    launch_all(lambda name: ["", *(f"saved by {saver}" for saver in LAUNCHERS)])


# -- Values of any kind --------------------------------------------------------------------------

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


@every_way_in
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
@pytest.mark.parametrize(
    ("dtype", "requires_grad"),
    [(dtype, grad) for dtype in DTYPES for grad in (False, True)[: 1 + dtype.is_floating_point]],
    ids=str,
)
def test_any_one_element_tensor_is_a_value_and_a_weight(
    take: Take, shape: tuple[int, ...], dtype: torch.dtype, requires_grad: bool
) -> None:
    one = torch.ones(shape, dtype=dtype).requires_grad_(requires_grad)
    assert logged(take, Metric("d", "m", one, MEAN, one), Metric("d", "m", 4, MEAN, 2)) == {
        "m": 3.0
    }


@every_way_in
@pytest.mark.parametrize("agg_type", [SUM, MEAN, MAX, MIN, DISTRIBUTION, CATEGORICAL], ids=str)
@pytest.mark.parametrize(
    "convert", [torch.tensor, np.float32, np.array, np.int64], ids=lambda one: one.__name__
)
def test_an_array_value_gives_what_the_number_gives(
    take: Take, agg_type: AggregationType, convert: Callable[[int], Any]
) -> None:
    values = [3, 1, 2]
    if agg_type is CATEGORICAL and convert is np.float32:
        values = [3.0, 1.0, 2.0]  # counted under the text that the array's own number has
    weight = 0.5 if agg_type in (MEAN, DISTRIBUTION) else 1
    plain = [Metric("d", "m", value, agg_type, weight) for value in values]
    arrays = [metric._replace(value=convert(metric.value)) for metric in plain]
    assert logged(take, *arrays) == logged(take, *plain)


@every_way_in
@pytest.mark.parametrize(
    "weight",
    [np.float64(3), np.array([[3]]), torch.tensor(3), torch.tensor([3.0]), True + 2, np.uint8(3)],
    ids=lambda weight: type(weight).__name__,
)
def test_an_array_weight_gives_what_the_number_gives(take: Take, weight: Any) -> None:
    metrics = [Metric("d", "m", 2.0, MEAN, weight), Metric("d", "m", 6.0, MEAN)]
    assert logged(take, *metrics) == {"m": 3.0}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("prose", "prose"),
        (3, "3"),
        (2.5, "2.5"),
        (True, "True"),
        (MyTypes.RMS, "MyTypes.RMS"),
        (np.int64(3), "3"),
        (np.str_("prose"), "prose"),
        (np.array([3]), "3"),
        (np.bool_(True), "True"),
        (torch.tensor(3), "3"),
        (torch.tensor([True]), "True"),
        (torch.tensor(2.5), "2.5"),
    ],
    ids=repr,
)
@every_way_in
def test_a_category_counts_under_its_text(take: Take, value: Any, text: str) -> None:
    assert logged(take, Metric("d", "kind", value, CATEGORICAL)) == {f"kind_count_{text}": 1.0}


@every_way_in
def test_a_custom_handler_gets_numbers_in_the_order_they_came(take: Take) -> None:
    class Keeper(RMSHandler):
        seen: list[Any]

        def update(self, local_agg_metric: MetricState, metric: Metric) -> None:
            local_agg_metric.metadata.setdefault("seen", []).append((metric.value, metric.weight))

        def finalize_local_agg(self, local_agg_metric: MetricState) -> list[MetricState]:
            Keeper.seen = local_agg_metric.metadata["seen"]
            local_agg_metric.value = 0.0
            return [local_agg_metric]

    aggregator = MetricsAggregator()
    aggregator.register_handler("keep", Keeper())
    values = [
        (1, 1.0),
        (torch.tensor([2.5]), 1.0),
        (3, torch.tensor(7)),
        (np.float32(4), np.int64(2)),
        ("text", 1.0),
    ]
    take(aggregator, [Metric("d", "m", value, "keep", weight) for value, weight in values])
    aggregator.update([Metric("d", "m", 6, "keep")])
    aggregator.reduce()
    assert Keeper.seen == [(1, 1.0), (2.5, 1.0), (3, 7), (4.0, 2), ("text", 1.0), (6, 1.0)]


def test_a_window_is_in_the_order_of_arrival_wherever_its_values_lie() -> None:
    for lies in range(8):
        aggregator = MetricsAggregator(dist_window_size=2)
        values = [torch.tensor(i) if lies >> i & 1 else i for i in range(3)]
        aggregator.update([Metric("d", "m", value, DISTRIBUTION) for value in values])
        results = aggregator.get_metrics_for_logging()
        assert (results["data_d/m_stat_min"], results["data_d/m_stat_max"]) == (1.0, 2.0), values


def test_nan_and_infinities_are_counted_wherever_the_values_lie() -> None:
    values = [1.0, math.nan, math.inf, 2.0]
    for lies in range(16):
        aggregator = MetricsAggregator()
        for i, value in enumerate(values):
            held = torch.tensor(value) if lies >> i & 1 else value
            aggregator.update([Metric("d", "m", held, DISTRIBUTION)])
        results = aggregator.get_metrics_for_logging()
        found = [results[f"data_d/m_stat_{name}"] for name in ("count", "nan_count", "inf_count")]
        assert found == [2.0, 1.0, 1.0]


# -- On a device: no wait, no graph, no buffer ---------------------------------------------------

READS = Counter[str]()


class Far(torch.Tensor):
    """A tensor on a device of its own, which writes down what is done with it."""

    @staticmethod
    def __new__(cls, near: torch.Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(
            cls, near.shape, dtype=near.dtype, device="hpu", requires_grad=near.requires_grad
        )

    def __init__(self, near: torch.Tensor) -> None:
        self.near = near

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        target = options.pop("device", None)
        READS[func.overloadpacket.__name__] += 1
        result = func(
            *tree_map(lambda item: item.near if isinstance(item, Far) else item, args), **options
        )
        if target is not None and torch.device(target).type == "cpu":
            READS["transfer"] += 1
            return result
        return tree_map(lambda item: Far(item) if isinstance(item, torch.Tensor) else item, result)


WAITS = {"_local_scalar_dense", "item", "is_nonzero", "equal", "transfer", "copy_", "_to_copy"}
"""What makes the host wait for a device."""


def test_update_reads_nothing_and_the_reduction_transfers_once() -> None:
    READS.clear()
    aggregator = MetricsAggregator()
    for step in range(5):
        loss = Far(torch.tensor([float(step)], requires_grad=True))
        aggregator.record("loss", loss, weight=Far(torch.tensor(step + 1)))
        aggregator.record("finite", Far(torch.tensor(True)), "min")
        aggregator.record("expert", Far(torch.tensor(step % 2)), CATEGORICAL)
        each = torch.tensor([[step, 1.0], [2.0, 9.0]], requires_grad=True)
        aggregator.record("each", Far(each), "max", weight=Far(each < 5))
        aggregator.record("experts", Far(torch.tensor([step, 0])), CATEGORICAL, each=True)
        aggregator.update(
            [
                Metric("d", "len", Far(torch.tensor(step, dtype=torch.bfloat16)), DISTRIBUTION),
                Metric("d", "tokens", 3, SUM, 1.0),
            ]
        )
    assert READS["clone"] == 40
    assert WAITS.isdisjoint(READS)
    results = aggregator.get_metrics_for_logging()
    assert READS["transfer"] == 1
    assert READS["_local_scalar_dense"] == 0
    assert results["data/loss"] == pytest.approx((0 * 1 + 1 * 2 + 2 * 3 + 3 * 4 + 4 * 5) / 15)
    assert results["data/finite"] == 1.0
    assert results["data/expert_count_0"] == 3.0
    assert results["data_d/len_stat_p50"] == 2.0
    assert results["data_d/tokens"] == 15.0
    assert (results["data/each"], results["data/experts_count_0"]) == (4.0, 6.0)


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("agg_type", [*NUMERIC, CATEGORICAL, "custom"], ids=str)
def test_update_only_clones(agg_type: Any) -> None:
    aggregator = MetricsAggregator()
    aggregator.register_handler("custom", RMSHandler())
    value, weight = torch.ones(1, 1, requires_grad=True), torch.ones(())
    with Operations() as operations:
        aggregator.update([Metric("d", "m", value, agg_type, weight)])
        aggregator.record("m", value, agg_type, dataset="d", weight=weight)
    assert set(operations.seen) <= {"detach", "clone", "view", "_unsafe_view", "alias"}
    assert operations.seen["clone"] >= 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_update_does_not_wait_for_a_gpu() -> None:
    aggregator = MetricsAggregator()
    loss = torch.full((1,), 2.0, device="cuda", requires_grad=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        aggregator.record("loss", loss, weight=loss)
        aggregator.update(
            [Metric("d", "len", loss, DISTRIBUTION), Metric("d", "kind", loss, CATEGORICAL)]
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    results = aggregator.get_metrics_for_logging()
    assert (results["data/loss"], results["data_d/kind_count_2.0"]) == (2.0, 1.0)


def test_a_thousand_values_cost_one_transfer_per_device() -> None:
    READS.clear()
    aggregator = MetricsAggregator()
    for step in range(1000):
        aggregator.record("near", torch.tensor(step), "sum")
        aggregator.record("far", Far(torch.tensor(step)), "sum")
    results = aggregator.get_metrics_for_logging()
    assert results == {"data/near": 499500.0, "data/far": 499500.0}
    assert READS["transfer"] == 1


def test_a_buffer_that_the_caller_reuses_is_not_kept() -> None:
    for agg_type in ("sum", "distribution", "max"):
        aggregator = MetricsAggregator()
        buffer = torch.zeros(())
        for value in (1.0, 3.0, 6.0):
            buffer.fill_(value)
            aggregator.record("m", buffer, agg_type)
            aggregator.record("w", value, "mean", weight=buffer)
            buffer.zero_()
        results = aggregator.get_metrics_for_logging()
        found = {key: results.get(key) for key in ("data/m", "data/m_stat_max", "data/w")}
        assert found["data/m"] in (10.0, 6.0, None)
        assert found == {
            "data/m": {"sum": 10.0, "max": 6.0}.get(agg_type),
            "data/m_stat_max": 6.0 if agg_type == "distribution" else None,
            "data/w": pytest.approx((1 + 9 + 36) / 10),
        }


@pytest.mark.parametrize("reuse", [np.zeros(()), np.zeros(1), np.zeros((1, 1))], ids=str)
def test_a_numpy_buffer_that_the_caller_reuses_is_not_kept(reuse: Any) -> None:
    aggregator = MetricsAggregator()
    for value in (1.0, 3.0, 6.0):
        reuse[...] = value
        aggregator.record("m", reuse, "distribution")
        reuse[...] = 0
    results = aggregator.get_metrics_for_logging()
    assert (results["data/m_stat_min"], results["data/m_stat_p50"]) == (1.0, 3.0)


@pytest.mark.parametrize("as_weight", [False, True], ids=["value", "weight"])
def test_the_graph_is_not_retained(as_weight: bool) -> None:
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.activation = Activation()
            nonlocal seen
            seen = weakref.ref(ctx.activation)
            return x * x

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            return gradient

    class Activation:
        """What a step keeps for its backward pass."""

    seen: weakref.ref[Activation] = weakref.ref(Activation())
    loss = Square.apply(torch.ones((), requires_grad=True))
    aggregator = MetricsAggregator()
    if as_weight:
        aggregator.record("loss", 1.0, weight=loss)
    else:
        aggregator.record("loss", loss)
    gc.collect()
    assert seen() is not None
    del loss
    gc.collect()
    assert seen() is None
    assert aggregator.get_metrics_for_logging() == {"data/loss": 1.0}


def test_one_array_that_cannot_be_read_is_named_and_the_others_are_kept() -> None:
    class Broken(Far):
        @classmethod
        def __torch_dispatch__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func.overloadpacket.__name__ in ("detach", "clone", "view"):
                return Broken(torch.zeros(()))
            raise RuntimeError("the device fell off the bus")

    for broken in (
        {"value": Broken(torch.zeros(()))},
        {"value": 1.0, "weight": Broken(torch.zeros(()))},
    ):
        aggregator = MetricsAggregator()
        aggregator.register_handler("custom", RMSHandler())
        aggregator.record("bad", **broken)
        aggregator.record("custom", 3, "custom")
        aggregator.record("custom", agg="custom", **broken)
        aggregator.record("custom", torch.tensor(4), "custom")
        aggregator.record("good", torch.tensor(2.0))
        aggregator.record("host", 3.0)
        with pytest.raises(RuntimeError, match=r"'bad'.*fell off the bus") as caught:
            aggregator.reduce()
        assert "metric 'custom'" in str(caught.value)
        results = aggregator.get_metrics_for_logging()
        assert results.pop("data/custom") == pytest.approx(12.5**0.5)
        assert results == {"data/good": 2.0, "data/host": 3.0}


def test_a_bad_weight_on_a_device_is_named_at_the_reduction_and_the_others_are_kept() -> None:
    aggregator = MetricsAggregator()
    aggregator.record("bad", 1.0, weight=torch.tensor(-1.0))
    aggregator.record("bad", 5.0, weight=torch.tensor(1.0))
    with pytest.raises(RuntimeError, match=r"'bad': the weight -1.0 is not a finite number"):
        aggregator.reduce()
    assert aggregator.get_metrics_for_logging() == {"data/bad": 5.0}


# -- DTensor -------------------------------------------------------------------------------------


def _distributed_values(rank: int) -> tuple[dict[str, float], str]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    mesh = init_device_mesh("cpu", (2,))
    aggregator = MetricsAggregator()
    whole = DTensor.from_local(torch.tensor(3.0), mesh, [Replicate()], run_check=False)
    aggregator.record("norm", whole, "max")
    aggregator.record("plain", torch.tensor(1.0 + rank))
    part = DTensor.from_local(torch.tensor(3.0), mesh, [Partial()], run_check=False)
    try:
        aggregator.record("part", part)
        complaint = ""
    except ValueError as error:
        complaint = str(error)
    shard = DTensor.from_local(torch.arange(2.0) + rank, mesh, [Shard(0)], run_check=False)
    try:
        aggregator.record("shard", shard, each=True)
    except ValueError as error:
        complaint += str(error)
    aggregator.record("shard", shard.to_local(), "sum", each=True)
    wholes = DTensor.from_local(torch.arange(3.0), mesh, [Replicate()], run_check=False)
    aggregator.record("wholes", wholes, each=True)
    aggregator.record("full", part.full_tensor())
    return aggregator.get_metrics_for_logging(), complaint


def test_a_dtensor_is_a_value_where_reading_it_is_no_collective() -> None:
    for results, complaint in run_ranks(_distributed_values, 2):
        assert results == {
            "data/norm": 3.0,
            "data/plain": 1.5,
            "data/full": 6.0,
            "data/shard": 4.0,
            "data/wholes": 1.0,
        }
        assert "metric 'shard': a DTensor placed as (Shard(dim=0),)" in complaint
        assert "metric 'part': a DTensor placed as (Partial(sum),)" in complaint
        assert "full_tensor()" in complaint


# -- What bad input gets -------------------------------------------------------------------------


class Colour(Enum):
    RED = 1


def bad(value: Any = 1.0, agg_type: Any = MEAN, weight: Any = 1.0, **names: Any) -> Metric:
    return Metric(
        names.get("dataset", "alpaca"), names.get("name", "loss"), value, agg_type, weight
    )


NO_NUMBER = "metric 'loss' of dataset 'alpaca': the value {} is no number: give an int, a float"
NOT_ONE = "metric 'loss' of dataset 'alpaca': .* is not one value: reduce it first"
NO_CATEGORY = "metric 'loss' of dataset 'alpaca': the value {} is no category: give a text"
NO_WEIGHT = "metric 'loss' of dataset 'alpaca': the weight {} is not a finite number of 0 or more"

BAD_VALUES = [
    (bad(value, agg_type), NO_NUMBER.format(shown))
    for value, shown in [
        (None, r"None \(NoneType\)"),
        ([], r"\[\] \(list\)"),
        ([1.0], r"\[1.0\] \(list\)"),
        ("2.5", r"'2.5' \(str\)"),
        (b"2", r"b'2' \(bytes\)"),
        (1j, r"1j \(complex\)"),
        (np.complex128(1), r".*\(complex128\)"),
        (np.array(None), r".*\(ndarray\)"),
        (np.array(["2.5"]), r"\(ndarray of shape \(1,\)\)"),
        (np.datetime64("2025-01-01"), r".*\(datetime64\)"),
        ({"a": 1}, r"\{'a': 1\} \(dict\)"),
        (Fraction(1, 2), r"Fraction\(1, 2\) \(Fraction\)"),
        (Colour.RED, r".*\(Colour\)"),
        (object(), r".*\(object\)"),
        ("many words " * 1000, r"'many .*\.\.\..* \(str\)"),
    ]
    for agg_type in (MEAN, SUM)
]
BAD_VALUES += [
    (bad(torch.zeros(2)), NOT_ONE),
    (bad(torch.zeros(0)), NOT_ONE),
    (bad(np.zeros(2), SUM), NOT_ONE),
    (bad(np.zeros((0,))), NOT_ONE),
    (bad(torch.zeros((), dtype=torch.complex64)), "'alpaca': a complex tensor is no number"),
    (bad(torch.zeros((), device="meta")), "'alpaca': a tensor on the meta device has no number"),
    (bad(torch.zeros(1).to_sparse()), "'alpaca': the array cannot be taken as a value"),
    (bad(10**400), "'alpaca': a value is too large for a 64-bit float"),
    (bad(np.array(10**400, dtype=object)), "'alpaca': the value is too large for a 64-bit float"),
    *[
        (bad(value, CATEGORICAL), NO_CATEGORY.format(shown))
        for value, shown in [
            (None, r"None \(NoneType\)"),
            ([], r"\[\] \(list\)"),
            (("a", "b"), r"\('a', 'b'\) \(tuple\)"),
            (b"prose", r"b'prose' \(bytes\)"),
            (object(), r".*\(object\)"),
        ]
    ],
    (bad(torch.zeros(2), CATEGORICAL), NOT_ONE),
    (bad(np.array(["a", "b"]), CATEGORICAL), NOT_ONE),
]
BAD_WEIGHTS = [
    (bad(2.0, agg_type, weight), complaint)
    for agg_type in (MEAN, DISTRIBUTION, SUM, CATEGORICAL, "rms")
    for weight, complaint in [
        (-1, NO_WEIGHT.format("-1")),
        (-0.5, NO_WEIGHT.format("-0.5")),
        (float("nan"), NO_WEIGHT.format("nan")),
        (float("inf"), NO_WEIGHT.format("inf")),
        (np.float32(-2), NO_WEIGHT.format("-2.0")),
        (10**400, "'alpaca': a weight is too large for a 64-bit float"),
        (None, r"'alpaca': the weight None \(NoneType\) is no number"),
        ("3", r"'alpaca': the weight '3' \(str\) is no number"),
        (np.ones(2), r"'alpaca': the weight \(ndarray of shape \(2,\)\) is no number"),
    ]
]
BAD_TYPES = [
    (bad(agg_type=None), "'alpaca': None is not an aggregation type: use an AggregationType"),
    (bad(agg_type=sum), "'alpaca': <built-in function sum> is not an aggregation type"),
    (bad(agg_type=["sum"]), r"'alpaca': \['sum'\] is not an aggregation type"),
    (bad(agg_type=""), "'alpaca': the aggregation type is an empty string"),
]
UNREGISTERED = [
    (
        bad(agg_type=agg_type),
        f"'alpaca' has the aggregation type '{label}', for which no handler is registered: call",
    )
    for agg_type, label in [
        (AggregationType.CUSTOM, "custom"),
        ("median", "median"),
        (MyTypes.RMS, "handlers_of_users.MyTypes.RMS"),
    ]
]
BAD_NAMES = [
    (bad(name=""), "the name of a metric of dataset 'alpaca' is empty"),
    (bad(name="a\nb"), r"the name of a metric of dataset 'alpaca' 'a\\nb' holds a line break"),
    (bad(name=None), "the name of a metric of dataset 'alpaca' must be a string, but is None"),
    (bad(name=["a"]), r"the name of a metric of dataset 'alpaca' must be a string, but is \['a'\]"),
    (bad(dataset=""), "the dataset name of metric 'loss' is empty"),
    (bad(dataset="a\tb"), r"the dataset name of metric 'loss' 'a\\tb' holds a line break"),
    (bad(dataset=None), r"the dataset name of metric 'loss' is None: call set_dataset_name\(\)"),
    (bad(dataset=3), "the dataset name of metric 'loss' must be a string, but is 3"),
    (bad(dataset=["a"]), r"the dataset name of metric 'loss' must be a string, but is \['a'\]"),
]
NOT_METRICS = [
    (item, rf"item 1 of the metrics is {shown}, which is no Metric: give Metric\(dataset_name")
    for item, shown in [
        (None, r"None \(NoneType\)"),
        (5, r"5 \(int\)"),
        ("abcde", r"'abcde' \(str\)"),
        (("d", "n", 1.0, SUM), r"\(.*\) \(tuple\)"),
        (("d", "n", 1.0, SUM, 1.0), r"\(.*\) \(tuple\)"),
        ({"name": "loss"}, r"\{.*\} \(dict\)"),
        ([bad()], r"\[.*\] \(list\)"),
    ]
]


@pytest.fixture
def aggregator() -> MetricsAggregator:
    """An aggregator in the middle of a run."""
    aggregator = MetricsAggregator()
    aggregator.register_handler("rms", RMSHandler())
    aggregator.update(
        [Metric("alpaca", "tokens", 7, SUM), Metric("alpaca", "len", torch.tensor(3), DISTRIBUTION)]
    )
    aggregator.record("state", 3, "rms")
    aggregator.reduce()
    aggregator.update([Metric("alpaca", "tokens", 5, SUM)])
    return aggregator


BEFORE = {
    "data_alpaca/tokens": 12.0,
    **{f"data_alpaca/len_stat_{name}": 3.0 for name in ("mean", "min", "max", "p05", "p50", "p95")},
    "data_alpaca/len_stat_count": 1.0,
    "data/state": 3.0,
}


def unchanged(snapshot: Snapshot) -> bool:
    interval = {"data_alpaca/tokens": 5.0}
    return snapshot.as_dict() == BEFORE and snapshot.as_dict(window="interval") == interval


def assert_clear(error: BaseException) -> None:
    text = str(error)
    assert "\n" not in text
    assert len(text) < 400


@pytest.mark.parametrize(
    ("metric", "complaint"),
    [*BAD_VALUES, *BAD_WEIGHTS, *BAD_TYPES, *UNREGISTERED, *BAD_NAMES, *NOT_METRICS],
    ids=lambda case: "" if isinstance(case, str) else repr(case)[:60],
)
def test_a_bad_metric_is_refused_and_nothing_has_changed_not_even_for_those_before_it(
    aggregator: MetricsAggregator, metric: Any, complaint: str
) -> None:
    good = Metric("alpaca", "tokens", 100, SUM)
    for metrics in ([good, metric], [good, metric, Metric("orca", "new", torch.tensor(1), MEAN)]):
        with pytest.raises((TypeError, ValueError), match=complaint) as caught:
            aggregator.update(metrics)
        assert_clear(caught.value)
    assert unchanged(aggregator.reduce())


@pytest.mark.parametrize(
    ("metric", "complaint"),
    [*BAD_VALUES, *BAD_WEIGHTS, *BAD_TYPES, *BAD_NAMES, *NOT_METRICS],
    ids=lambda case: "" if isinstance(case, str) else repr(case)[:60],
)
def test_a_bad_metric_is_refused_where_its_batch_is_made(metric: Any, complaint: str) -> None:
    good = Metric("alpaca", "tokens", 100, SUM)
    with pytest.raises((TypeError, ValueError), match=complaint) as caught:
        MetricBatch.from_metrics([good, metric])
    assert_clear(caught.value)


@pytest.mark.parametrize(
    ("metric", "complaint"),
    [*BAD_VALUES, *BAD_WEIGHTS],
    ids=lambda case: "" if isinstance(case, str) else repr(case)[:60],
)
def test_a_bad_record_is_refused_and_nothing_has_changed(
    aggregator: MetricsAggregator, metric: Metric, complaint: str
) -> None:
    dataset, name, value, agg_type, weight = metric
    with pytest.raises((TypeError, ValueError), match=complaint) as caught:
        aggregator.record(name, value, agg_type, dataset=dataset, weight=weight)
    assert_clear(caught.value)
    assert unchanged(aggregator.reduce())


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"name": ""}, "the name of a metric is empty"),
        ({"name": "a\nb"}, "holds a line break"),
        ({"name": 3}, "must be a string, but is 3"),
        ({"dataset": ""}, "the dataset of metric 'loss' is empty"),
        ({"dataset": "a\nb"}, "the dataset of metric 'loss'.*holds a line break"),
        ({"agg": None}, "None is not an aggregation type"),
        (
            {"agg": "median"},
            "metric 'loss' has the aggregation type 'median', for which no handler",
        ),
    ],
    ids=str,
)
def test_a_record_with_bad_names_is_refused(
    aggregator: MetricsAggregator, arguments: dict[str, Any], complaint: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=complaint) as caught:
        aggregator.record(**{"name": "loss", "value": 1.0, **arguments})
    assert_clear(caught.value)
    assert unchanged(aggregator.reduce())


@pytest.mark.parametrize(
    "argument",
    [None, Metric("d", "n", 1, SUM), "loss", {"loss": 1.0}, 3, iter([])],
    ids=lambda argument: type(argument).__name__,
)
def test_update_takes_a_list_or_a_batch(aggregator: MetricsAggregator, argument: Any) -> None:
    kind = type(argument).__name__
    with pytest.raises(TypeError, match=f"takes a list of Metric or a MetricBatch, not {kind}"):
        aggregator.update(argument)
    assert unchanged(aggregator.reduce())


@pytest.mark.parametrize("nothing", [[], (), MetricBatch()], ids=repr)
def test_an_empty_update_is_welcome_and_changes_nothing(
    aggregator: MetricsAggregator, nothing: Any
) -> None:
    aggregator.update(nothing)
    assert unchanged(aggregator.reduce())


def test_errors_in_a_long_list_name_the_position() -> None:
    metrics: list[Any] = [Metric("d", "n", 1, SUM)] * 500
    metrics[321] = ("d", "n", 1, SUM)
    with pytest.raises(TypeError, match="item 321 of the metrics"):
        MetricsAggregator().update(metrics)


def test_update_and_record_say_in_their_docstrings_what_they_raise() -> None:
    for method in (MetricsAggregator.update, MetricsAggregator.record):
        assert "Raises" in (inspect.getdoc(method) or "")
