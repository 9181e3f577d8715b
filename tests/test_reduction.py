"""Reductions over real ranks: processes connected by gloo."""

from __future__ import annotations

import logging
import os
import time
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from handlers_of_users import LaneRMS, MyTypes, ProductHandler, RMSHandler
from ranks import free_port, run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.profiler import ProfilerActivity, profile

from metricfold import AggregationType, Metric, MetricsAggregator, MissingRanksError

SUM, MEAN, MAX, MIN = (
    AggregationType.SUM,
    AggregationType.MEAN,
    AggregationType.MAX,
    AggregationType.MIN,
)
DISTRIBUTION, CATEGORICAL = AggregationType.DISTRIBUTION, AggregationType.CATEGORICAL_COUNT


def attempt(call: Any) -> str:
    """Return what `call` raises, as text, or "ok"."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "ok"


# -- Right whatever each rank holds --------------------------------------------------------------


def different_keys(rank: int) -> tuple[dict[str, float], list[int]]:
    aggregator = MetricsAggregator()
    if rank == 0:
        aggregator.update([Metric("alpaca", "tokens", 5, SUM), Metric("alpaca", "loss", 2, MEAN)])
    if rank == 1:
        aggregator.update(
            [
                Metric("orca", "tokens", 7, SUM),
                Metric("alpaca", "loss", 5, MEAN, 2),
                Metric("alpaca", "longest", 9, MAX),
                Metric("alpaca", "shortest", 3, MIN),
            ]
        )
    if rank == 3:
        aggregator.update(
            [Metric("orca", "kind", kind, CATEGORICAL) for kind in ("a", "b", "a", 3)]
        )
    snapshot = aggregator.reduce()
    return snapshot.as_dict("train"), snapshot.lacking("alpaca", "loss")


def test_ranks_with_different_keys_or_none_agree() -> None:
    results = run_ranks(different_keys, 4)
    expected = {
        "train_alpaca/tokens": 5.0,
        "train_alpaca/loss": 4.0,
        "train_alpaca/longest": 9.0,
        "train_alpaca/shortest": 3.0,
        "train_orca/tokens": 7.0,
        "train_orca/kind_count_3": 1.0,
        "train_orca/kind_count_a": 2.0,
        "train_orca/kind_count_b": 1.0,
    }
    assert [logged for logged, _ in results] == [expected] * 4
    assert [lacking for _, lacking in results] == [[2, 3]] * 4


def late_keys(rank: int) -> list[tuple[dict[str, float], int]]:
    aggregator = MetricsAggregator()
    seen = []
    for interval in range(1, 12):
        aggregator.record("loss", rank + interval)
        aggregator.update([Metric("d", "kind", "common", CATEGORICAL)])
        if interval == 10 and rank == 1:
            aggregator.update(
                [Metric("d", "new", 1, SUM), Metric("d", "kind", "rare", CATEGORICAL)]
            )
        before = aggregator.collectives
        logged = aggregator.get_metrics_for_logging("t", "auto")
        seen.append((logged, aggregator.collectives - before))
    return seen


def test_a_key_and_a_category_that_first_appear_in_the_tenth_interval_on_one_rank() -> None:
    results = run_ranks(late_keys, 2)
    assert results[0] == results[1]
    logged = [logged for logged, _ in results[0]]
    assert logged[8] == {"t/loss": 9.5, "t_d/kind_count_common": 18.0}
    assert logged[9] == {
        "t/loss": 10.5,
        "t_d/kind_count_common": 20.0,
        "t_d/kind_count_rare": 1.0,
        "t_d/new": 1.0,
    }
    assert logged[10]["t_d/kind_count_rare"] == 1.0
    # The rounds that agree on new keys are the first and the tenth; each costs two more.
    assert [collectives for _, collectives in results[0]] == [3, *[1] * 8, 3, 1]


def uneven(rank: int) -> dict[str, float]:
    aggregator = MetricsAggregator()
    values = [100] * 10 if rank == 3 else [1, 2]
    aggregator.update([Metric("d", "len", value, DISTRIBUTION) for value in values])
    aggregator.update([Metric("d", "mean", value, MEAN) for value in values])
    return aggregator.get_metrics_for_logging("t")


def test_percentiles_are_of_the_pooled_values_however_uneven_the_ranks() -> None:
    logged = run_ranks(uneven, 4)[0]
    pooled = [1, 2] * 3 + [100] * 10
    for percentile in (5, 50, 95):
        assert logged[f"t_d/len_stat_p{percentile:02d}"] == np.percentile(pooled, percentile)
    assert logged["t_d/len_stat_count"] == len(pooled)
    assert logged["t_d/len_stat_std"] == pytest.approx(np.std(pooled, ddof=1))
    assert logged["t_d/mean"] == pytest.approx(np.mean(pooled))


def nan_owner(rank: int) -> list[int | None]:
    aggregator = MetricsAggregator()
    aggregator.record("norm", float("nan") if rank == 2 else 5.0, "max")
    first = aggregator.reduce().owner(None, "norm")
    aggregator.record("norm", 5.0 + rank, "max")
    second = aggregator.reduce()
    resumed = MetricsAggregator()
    resumed.load_state_dict(aggregator.state_dict())
    resumed.record("norm", 1.0, "max")
    third = resumed.reduce()
    return [
        first,
        second.owner(None, "norm"),
        second.owner(None, "norm", "run"),
        third.owner(None, "norm", "run"),
    ]


def views_per_rank(rank: int) -> dict[str, Any]:
    aggregator = MetricsAggregator()
    for interval in range(2):
        aggregator.record("norm", [3.0, 9.0, 9.0, 1.0][rank] if interval else 20.0 - rank, "max")
        aggregator.record("fastest", 5 + rank, "min")
        if rank in (1, 2):
            aggregator.update([Metric("d", "loss", rank, MEAN)])
            aggregator.update([Metric("d", "len", 10 * rank, DISTRIBUTION)])
        if interval == 0:
            aggregator.reduce()
    aggregator.state_dict()
    if rank == 3:
        aggregator.record("norm", 30.0, "max")
    snapshot = aggregator.reduce()
    return {
        "owner": snapshot.owner(None, "norm"),
        "owner of the run": snapshot.owner(None, "norm", "run"),
        "owner of the minimum": snapshot.owner(None, "fastest"),
        "per rank": snapshot.per_rank(None, "norm"),
        "means per rank": snapshot.per_rank("d", "loss"),
        "lengths per rank": snapshot.per_rank("d", "len"),
        "lacking": snapshot.lacking("d", "loss"),
        "owner of a nan": nan_owner(rank),
        "no owner": attempt(lambda: snapshot.owner("d", "loss")),
        "unknown": attempt(lambda: snapshot.per_rank("d", "lost")),
    }


def test_a_snapshot_tells_owners_values_per_rank_and_ranks_that_lack_a_metric() -> None:
    results = run_ranks(views_per_rank, 4)
    assert all(result == results[0] for result in results)
    seen = results[0]
    assert seen["owner"] == 3
    assert seen["owner of the run"] == 3
    assert seen["owner of the minimum"] == 0
    assert seen["owner of a nan"] == [2, 3, None, None]
    assert seen["per rank"] == [3.0, 9.0, 9.0, 30.0]
    assert seen["means per rank"] == [None, 1.0, 2.0, None]
    assert seen["lengths per rank"] == [None, 10.0, 20.0, None]
    assert seen["lacking"] == [0, 3]
    assert "neither a MAX nor a MIN" in seen["no owner"]
    assert "there is no metric 'lost' of dataset 'd'; there are: " in seen["unknown"]


# -- One collective ------------------------------------------------------------------------------


def count_on_the_wire(rank: int) -> tuple[list[str], int]:
    aggregator = MetricsAggregator(dist_window_size=64)

    def feed() -> None:
        for dataset in ("a", "b", "c"):
            for name in range(20):
                aggregator.update([Metric(dataset, f"mean {name}", name, MEAN)])
            aggregator.update([Metric(dataset, "len", v, DISTRIBUTION) for v in range(64)])
            aggregator.update([Metric(dataset, "kind", "x", CATEGORICAL)])
        aggregator.record("norm", torch.tensor(1.0 + rank), "max")

    feed()
    aggregator.reduce()
    feed()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        aggregator.reduce()
    operations = [event.name for event in recorded.events() if event.name.startswith("gloo:")]
    return operations, aggregator.collectives


def test_the_steady_state_puts_exactly_one_collective_on_the_wire() -> None:
    for operations, collectives in run_ranks(count_on_the_wire, 2):
        assert len(operations) == 1, operations
        assert collectives == 4


# -- Disagreements: the same error on all, nothing lost ------------------------------------------


def disagree(rank: int) -> dict[str, str]:
    aggregator = MetricsAggregator()
    errors = {}
    aggregator.record("tokens", 1, "sum")
    aggregator.reduce()
    aggregator.record("tokens", 10, "sum")
    call = aggregator.state_dict if rank == 1 else aggregator.reduce
    errors["call"] = attempt(call)
    errors["step"] = attempt(lambda: aggregator.reduce(step=100 + (rank == 2)))
    errors["fine"] = attempt(lambda: aggregator.reduce(step=100))
    errors["total"] = str(aggregator.get_metrics_for_logging("t"))
    if rank == 0:
        aggregator.reset()
    aggregator.record("tokens", 5, "sum")
    errors["reset"] = attempt(aggregator.reduce)
    errors["reset again"] = attempt(aggregator.reduce)
    if rank != 0:
        aggregator.reset()
    aggregator.record("tokens", 7, "sum")
    errors["after reset"] = attempt(aggregator.reduce)
    state = aggregator.state_dict()
    other = MetricsAggregator()
    if rank == 1:
        aggregator.record("tokens", 1, "sum")
        state = aggregator.state_dict(sync=False)
        lonely = MetricsAggregator(name=f"alone-{rank}")
        lonely.record("tokens", 3, "sum")
    other.load_state_dict(state)
    errors["loaded alike"] = attempt(other.reduce)
    return errors


def test_ranks_that_disagree_get_the_same_error_and_lose_nothing() -> None:
    results = run_ranks(disagree, 3)
    assert all({**r, "x": ""} == {**results[0], "x": ""} for r in results)
    errors = results[0]
    assert "ranks 0, 2 called a reduction, rank 1 called state_dict()" in errors["call"]
    assert "different steps: ranks 0-1 gave 100, rank 2 gave 101" in errors["step"]
    assert errors["fine"] == "ok"
    assert errors["total"] == "{'t/tokens': 33.0}"
    assert "load_state_dict() or reset() was not called alike" in errors["reset"]
    assert "rank 0" in errors["reset"]
    assert errors["reset again"] == errors["reset"]
    assert errors["after reset"] == "ok"
    assert errors["loaded alike"] == "ok"


def load_different_states(rank: int) -> str:
    states = []
    for amount in (1, 2):
        alone = MetricsAggregator(communicator=None, name=f"source {amount}")
        alone.record("tokens", amount, "sum")
        states.append(alone.state_dict())
    aggregator = MetricsAggregator(name="loads")
    aggregator.load_state_dict(states[rank == 1])
    return attempt(aggregator.reduce)


def test_ranks_that_loaded_different_checkpoints_are_told() -> None:
    for error in run_ranks(load_different_states, 2):
        assert "the ranks hold different run totals" in error
        assert "Load the same checkpoint on every rank" in error


def load_states_of_one_total(rank: int) -> str:
    source = MetricsAggregator(name="source")
    source.record("tokens", 5, "sum")
    source.reduce()
    source.record("tokens", 0, "sum")
    states = [source.state_dict(sync=False), source.state_dict()]
    aggregator = MetricsAggregator(name="loads")
    aggregator.load_state_dict(states[rank])
    return attempt(aggregator.reduce)


def test_ranks_that_loaded_states_of_different_reductions_with_equal_totals_are_told() -> None:
    for error in run_ranks(load_states_of_one_total, 2):
        # They went on, one with an open interval that the other did not have.
        assert "go on from states of different reductions" in error
        assert "Load the same checkpoint on every rank" in error


def conflicting_types(rank: int) -> dict[str, Any]:
    aggregator = MetricsAggregator()
    aggregator.update([Metric("d", "x", 3, MEAN if rank == 1 else SUM)])
    aggregator.update([Metric("d", "len_stat_p50" if rank == 2 else "fine", 1, SUM)])
    if rank != 2:
        aggregator.update([Metric("d", "len", 4, DISTRIBUTION)])
    seen = {
        "first": attempt(aggregator.reduce),
        "second": attempt(aggregator.reduce),
        "logged": aggregator.get_metrics_for_logging("t"),
    }
    seen["local"] = attempt(lambda: aggregator.update([Metric("d", "x", 1, MEAN)]))
    aggregator.update([Metric("d", "x", 1, SUM)])
    seen["after"] = aggregator.get_metrics_for_logging("t")["t_d/x"]
    return seen


def test_conflicting_types_are_an_error_once_and_do_not_wedge_the_run() -> None:
    results = run_ranks(conflicting_types, 3)
    assert all(result == results[0] for result in results)
    seen = results[0]
    assert seen["first"].startswith("ValueError: ")
    assert "rank 1 held metric 'x' of dataset 'd' as 'mean'" in seen["first"]
    assert "is already registered with aggregation type sum" in seen["first"]
    assert "rank 2 held metric 'len_stat_p50' of dataset 'd'" in seen["first"]
    assert seen["second"] == "ok"
    assert seen["logged"]["t_d/x"] == 6.0
    # What rank 1 held was dropped.
    assert seen["logged"]["t_d/x[mean]"] == 3.0
    assert seen["logged"]["t_d/fine"] == 2.0
    assert seen["logged"]["t_d/len_stat_count"] == 2.0
    assert "is already registered with aggregation type sum" in seen["local"]
    assert seen["after"] == 9.0


def different_handlers(rank: int) -> list[Any]:
    """Ranks whose handlers claim different names: the schema must not depend on who is asked."""
    seen = []
    aggregator = MetricsAggregator(name="percentiles", percentiles=(5, 50) if rank else (50,))
    if rank == 0:
        aggregator.record("len_stat_p05", 1.0, "sum")
    else:
        aggregator.record("len", 1.0, "distribution")
    seen += [attempt(aggregator.reduce), attempt(aggregator.reduce)]
    other = MetricsAggregator(name="handlers")
    if rank == 1:
        other.register_handler("rms", LaneRMS(on_nan="skip"))
        other.record("act", 3.0, "rms")
    else:
        other.record("act_nan_count", 1.0, "sum")
    return [*seen, attempt(other.reduce), attempt(other.reduce)]


def test_ranks_with_different_handlers_come_to_the_same_schema() -> None:
    results = run_ranks(different_handlers, 2)
    assert results[0] == results[1]
    first, second, third, fourth = results[0]
    assert first.startswith("ValueError: rank 1 held metric 'len' as 'distribution', but")
    assert second == "ok"
    assert third.startswith("ValueError: rank 1 held metric 'act' as 'rms', but")
    # What rank 1 held was dropped; now it goes on, and needs its handler as any other metric does.
    assert (
        "'act[rms/3+0]' has the aggregation type 'rms', for which no handler is registered"
        in fourth
    )


def derived_on_one_rank(rank: int) -> list[Any]:
    aggregator = MetricsAggregator()
    if rank == 0:
        aggregator.derive("ppl", lambda m: m["loss"] * 2)
    else:
        aggregator.record("ppl", 5.0)
    aggregator.record("loss", 1.0)
    return [aggregator.get_metrics_for_logging("t"), attempt(aggregator.reduce)]


def test_a_derived_name_on_one_rank_yields_to_a_metric_of_the_others() -> None:
    for seen in run_ranks(derived_on_one_rank, 2):
        assert seen == [{"t/loss": 1.0, "t/ppl": 5.0}, "ok"]


def late_conflict(rank: int) -> list[Any]:
    aggregator = MetricsAggregator()
    aggregator.record("fine", 1, "sum")
    if rank == 0:
        aggregator.record("x", 2, "sum")
    future = aggregator.reduce_async()
    if rank == 1:
        # Taken in while the others agree that it is a sum.
        aggregator.record("x", 5.0, "mean")
    future.result()
    aggregator.record("fine", 1, "sum")
    seen = [attempt(aggregator.reduce), attempt(aggregator.reduce)]
    return [*seen, aggregator.get_metrics_for_logging("t")]


def test_a_conflict_that_arises_during_a_reduction_is_raised_by_the_next_on_all_ranks() -> None:
    results = run_ranks(late_conflict, 2)
    assert results[0] == results[1]
    assert "rank 1 held metric 'x' as 'mean', but it is already registered" in results[0][0]
    assert results[0][1] == "ok"
    # What rank 1 held was dropped.
    assert results[0][2] == {"t/fine": 4.0, "t/x": 2.0, "t/x[mean]": 5.0}


def bad_steps(rank: int) -> list[str]:
    aggregator = MetricsAggregator()
    aggregator.record("x", 1, "sum")
    steps: list[Any] = ["three", -1, True, 10**400, 2.0, np.array([1, 2]), torch.tensor(1.5)]
    said = [attempt(lambda step=step: aggregator.reduce(step if rank else 3)) for step in steps]
    logged = aggregator.reduce(np.int64(3) if rank else 3).as_dict("t")
    return [*said, logged["t/x"]]


def test_a_bad_step_on_one_rank_is_told_to_all_and_nothing_is_lost() -> None:
    first, second = run_ranks(bad_steps, 2)
    assert first == second
    *said, total = first
    assert total == 2.0
    for message in said:
        assert "rank 1 could not take part: step=" in message
        assert "give the training step as an int, 0 or more" in message
    assert max(map(len, said)) < 300


def failing_rank(rank: int) -> dict[str, Any]:
    aggregator = MetricsAggregator()
    aggregator.record("tokens", 1, "sum")
    aggregator.reduce()
    aggregator.record("tokens", 10, "sum")
    weight = torch.tensor(-1.0) if rank == 1 else torch.tensor(1.0)
    aggregator.record("loss", torch.tensor(2.0), weight=weight)
    return {
        "failed": attempt(aggregator.reduce),
        "next": attempt(aggregator.reduce),
        "logged": aggregator.get_metrics_for_logging("t"),
    }


def test_a_rank_that_fails_before_a_collective_makes_all_raise_and_loses_nothing_else() -> None:
    results = run_ranks(failing_rank, 3)
    assert all(result == results[0] for result in results)
    assert "rank 1 could not take part: metric 'loss': the weight -1.0" in results[0]["failed"]
    assert results[0]["next"] == "ok"
    assert results[0]["logged"] == {"t/loss": 2.0, "t/tokens": 33.0}


def unregistered_on_one_rank(rank: int) -> list[Any]:
    aggregator = MetricsAggregator()
    if rank == 0:
        aggregator.register_handler("rms", LaneRMS())
        aggregator.record("norm", 3.0, "rms")
    seen: list[Any] = [attempt(aggregator.reduce), attempt(aggregator.reduce)]
    if rank == 1:
        aggregator.register_handler("rms", LaneRMS())
    return [*seen, aggregator.get_metrics_for_logging("t")]


def test_a_handler_registered_on_some_ranks_only_is_named_on_all() -> None:
    results = run_ranks(unregistered_on_one_rank, 2)
    assert results[0] == results[1]
    for error in results[0][:2]:
        assert "rank 1 could not take part: metric 'norm' has the aggregation type 'rms'" in error
    assert results[0][2] == {"t/norm": 3.0}


# -- Custom handlers -----------------------------------------------------------------------------


def custom_handlers(rank: int) -> list[dict[str, float]]:
    aggregator = MetricsAggregator()
    aggregator.register_handler(MyTypes.RMS, RMSHandler())
    aggregator.register_handler(MyTypes.PRODUCT, ProductHandler())
    aggregator.register_handler("lane rms", LaneRMS())
    logs = []
    for interval in range(3):
        if interval != 1 or rank == 0:
            values = [rank + 1] * (rank + 1)
            aggregator.update([Metric("d", "rms", value, MyTypes.RMS) for value in values])
            aggregator.update([Metric("d", "lane", value, "lane rms") for value in values])
            aggregator.update([Metric("d", "product", 2 + rank, MyTypes.PRODUCT)])
        snapshot = aggregator.reduce()
        logs.append({**snapshot.as_dict("run"), **snapshot.as_dict("interval", "interval")})
    return logs


def test_handlers_without_a_merge_come_out_right_over_ranks_and_logs() -> None:
    results = run_ranks(custom_handlers, 3)
    assert all(result == results[0] for result in results)
    everyone = [1, 2, 2, 3, 3, 3]

    def rms(values: list[int]) -> float:
        return float(np.sqrt(np.mean(np.square(values))))

    history = [everyone, [1], everyone]
    products = [2 * 3 * 4, 2, 2 * 3 * 4]
    for index, logged in enumerate(results[0]):
        seen = [value for values in history[: index + 1] for value in values]
        assert logged["run_d/rms"] == pytest.approx(rms(seen))
        assert logged["run_d/lane"] == pytest.approx(rms(seen))
        assert logged["interval_d/rms"] == pytest.approx(rms(history[index]))
        assert logged["interval_d/lane"] == pytest.approx(rms(history[index]))
        assert logged["run_d/product"] == np.prod(products[: index + 1])
        assert logged["interval_d/product"] == products[index]


# -- Groups --------------------------------------------------------------------------------------


def own_group(rank: int) -> list[Any]:
    first, second = MetricsAggregator(), MetricsAggregator()
    first.record("x", 1, "sum")
    second.record("y", 100, "sum")
    order = (first, second) if rank == 0 else (second, first)
    futures = {aggregator: aggregator.reduce_async() for aggregator in order}
    tensor = torch.ones(1)
    dist.all_reduce(tensor)
    return [
        futures[first].result().as_dict("t"),
        futures[second].result().as_dict("t"),
        tensor.item(),
    ]


def test_aggregators_reduced_in_different_orders_on_different_ranks_stay_apart() -> None:
    for seen in run_ranks(own_group, 3):
        assert seen == [{"t/x": 3.0}, {"t/y": 300.0}, 3.0]


def by_name(rank: int) -> list[dict[str, float]]:
    if rank == 0:
        MetricsAggregator()
    aggregators = {name: MetricsAggregator(name=name) for name in ("val", "train")[:: 1 - 2 * rank]}
    aggregators["train"].record("x", 1, "sum")
    aggregators["val"].record("x", 10, "sum")
    return [aggregators[name].get_metrics_for_logging(name) for name in ("train", "val")]


def test_aggregators_pair_by_name() -> None:
    assert run_ranks(by_name, 2) == [[{"train/x": 2.0}, {"val/x": 20.0}]] * 2


def namesakes(rank: int) -> list[Any]:
    totals = []
    for _ in range(4):
        aggregator = MetricsAggregator(name="val", timeout=10)
        aggregator.record("x", rank + 1, "sum")
        totals.append(aggregator.get_metrics_for_logging("t")["t/x"])
    return totals


def test_aggregators_of_one_name_pair_in_the_order_in_which_they_are_made() -> None:
    assert run_ranks(namesakes, 2) == [[3.0] * 4] * 2


def before_and_after_the_job(rank: int, port: int) -> list[Any]:
    dist.barrier()  # a rank that leaves must not take the connection of one that still arrives
    dist.destroy_process_group()
    aggregator = MetricsAggregator()
    template = aggregator.state_dict()
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    aggregator.record("x", 1, "sum")
    seen: list[Any] = [sorted(template), aggregator.get_metrics_for_logging("t")]
    aggregator.record("x", 1, "sum")
    dist.barrier()
    dist.destroy_process_group()
    return [*seen, attempt(aggregator.reduce), sorted(aggregator.state_dict(sync=False))]


def test_an_aggregator_follows_the_job_and_never_answers_for_one_rank_alone() -> None:
    port = free_port()
    for seen in run_ranks(before_and_after_the_job, 2, port):
        assert seen[0] == seen[3] == ["format", "payload", "version"]
        assert seen[1] == {"t/x": 2.0}
        assert "reduce before destroy_process_group()" in seen[2]


def sub_groups(rank: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    group = dist.new_group([0, 3])
    seen: dict[str, Any] = {}
    for name, where in (("data", mesh["data"]), ("tensor", mesh["tensor"])):
        aggregator = MetricsAggregator(process_group=where, name=name)
        aggregator.record("x", 10**rank, "sum")
        seen[name] = aggregator.get_metrics_for_logging("t")["t/x"]
    pair = MetricsAggregator(process_group=group, name="pair")
    pair.record("x", 10**rank, "sum")
    seen["pair"] = (
        pair.get_metrics_for_logging("t")["t/x"] if rank in (0, 3) else attempt(pair.reduce)
    )
    seen["mesh"] = attempt(MetricsAggregator(process_group=mesh).reduce)
    seen["wrong"] = attempt(MetricsAggregator(process_group="data").reduce)
    return seen


def test_a_process_group_or_one_mesh_dimension_chooses_the_ranks() -> None:
    results = run_ranks(sub_groups, 4)
    assert [seen["data"] for seen in results] == [101.0, 1010.0, 101.0, 1010.0]
    assert [seen["tensor"] for seen in results] == [11.0, 11.0, 1100.0, 1100.0]
    assert results[0]["pair"] == results[3]["pair"] == 1001.0
    assert "rank 1 is not in the process_group" in results[1]["pair"]
    assert "mesh['data']" in results[0]["mesh"]
    assert "TypeError: process_group='data': pass a torch.distributed group" in results[0]["wrong"]


def replaced_group(rank: int, port: int) -> dict[str, Any]:
    aggregator = MetricsAggregator()
    aggregator.record("x", 1, "sum")
    seen: dict[str, Any] = {"before": aggregator.get_metrics_for_logging("t")}
    pending = aggregator.reduce_async()
    dist.barrier()
    dist.destroy_process_group()
    pending.result()
    aggregator.record("x", 10, "sum")
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=1 - rank, world_size=2
    )
    seen["after"] = aggregator.get_metrics_for_logging("t")
    aggregator.record("y", rank, "max")
    seen["more"] = aggregator.get_metrics_for_logging("t")
    aggregator.close()
    seen["closed"] = attempt(lambda: aggregator.record("x", 1))
    return seen


def test_a_replaced_default_group_is_bound_anew() -> None:
    port = free_port()
    results = run_ranks(replaced_group, 2, port)
    assert results[0] == results[1]
    assert results[0]["before"] == {"t/x": 2.0}
    assert results[0]["after"] == {"t/x": 22.0}
    assert results[0]["more"] == {"t/x": 22.0, "t/y": 1.0}
    assert "is closed: make a new one" in results[0]["closed"]


# -- Missing ranks -------------------------------------------------------------------------------


def rank_zero_only(rank: int, late_by: float) -> dict[str, Any]:
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("metricfold").addHandler(handler)
    logging.getLogger("metricfold").propagate = False
    aggregator = MetricsAggregator(timeout=2)
    aggregator.record("x", 1, "sum")
    aggregator.reduce()
    state = aggregator.state_dict()
    aggregator.record("x", 1, "sum")
    if rank == 1:
        time.sleep(late_by)
    seen: dict[str, Any] = {}
    for call in ("first", "second"):
        try:
            aggregator.reduce()
            seen[call] = "ok"
        except MissingRanksError as error:
            seen[call] = (str(error), error.missing, len(records))
    aggregator.record("x", 1, "sum")
    seen["kept"] = aggregator.state_dict(sync=False) == state
    tensor = torch.ones(1)
    dist.all_reduce(tensor)
    seen["own group"] = tensor.item()
    recovered = MetricsAggregator()
    recovered.load_state_dict(state)
    seen["recovered"] = recovered.get_metrics_for_logging("t")
    seen["warnings"] = records
    return seen


@pytest.mark.parametrize("late_by", [2.2, 5.0])
def test_missing_ranks_are_named_and_late_ones_get_the_same_error(late_by: float) -> None:
    results = run_ranks(rank_zero_only, 3, late_by)
    texts = {seen["first"][0] for seen in results}
    assert len(texts) == 1
    (text,) = texts
    assert "rank(s) 1 of 3; they did not come within 2 s" in text
    assert "if rank == 0:" in text
    for seen in results:
        assert seen["first"][1] == (1,)
        assert seen["second"][0] == text
        assert seen["second"][2] == seen["first"][2]  # it has not waited: that would be said
        assert seen["kept"]
        assert seen["own group"] == 3.0
        assert seen["recovered"] == {"t/x": 3.0}
    assert "rank 0 has waited 1 s in a collective call for rank(s) 1" in results[0]["warnings"][0]


def comes_late(rank: int) -> list[Any]:
    aggregator = MetricsAggregator(timeout=6)
    aggregator.record("x", 1, "sum")
    aggregator.reduce()
    if rank == 1:
        time.sleep(3.5)
    return [aggregator.get_metrics_for_logging("t"), attempt(aggregator.reduce)]


def test_a_rank_that_arrives_late_but_in_time_is_waited_for() -> None:
    assert run_ranks(comes_late, 2) == [[{"t/x": 2.0}, "ok"]] * 2


def dies_before_its_first_call(rank: int) -> str:
    aggregator = MetricsAggregator(timeout=2)
    if rank == 2:
        return "never calls"
    return attempt(aggregator.reduce)


def test_a_rank_that_never_makes_its_first_call_is_named() -> None:
    for error in run_ranks(dies_before_its_first_call, 3)[:2]:
        assert "rank(s) 2 of 3; they did not come within 2 s" in error


def killed(rank: int) -> str:
    aggregator = MetricsAggregator(timeout=30)
    aggregator.reduce()
    if rank == 1:
        os._exit(3)
    return attempt(aggregator.reduce)


def test_a_killed_rank_is_named_without_waiting_for_the_timeout() -> None:
    results = run_ranks(killed, 3, dies=(1,))
    for text in (results[0], results[2]):
        assert "rank(s) 1 of 3; the connection to them broke" in text


# -- In the background ---------------------------------------------------------------------------


def in_the_background(rank: int) -> list[Any]:
    aggregator = MetricsAggregator()
    aggregator.record("x", 1, "sum")
    if rank == 1:
        time.sleep(0.5)
    first = aggregator.reduce_async(step=1)
    done_at_once = first.done()
    # What comes in while the first is under way belongs to the next.
    aggregator.record("x", 10, "sum")
    aggregator.record("new", 1, "max")
    second = aggregator.reduce_async(step=2)
    seen = [done_at_once and rank == 0, first.done()]
    seen += [first.result().as_dict("t"), second.result().as_dict("t", "interval")]
    aggregator.record("x", 100, "sum")
    third = aggregator.reduce_async()
    aggregator.state_dict()
    seen.append(third.done())
    aggregator.reduce_async().cancel()
    aggregator.record("bad", torch.tensor(1.0), weight=torch.tensor(float("nan")))
    failed = aggregator.reduce_async()
    seen.append(type(failed.exception()).__name__)
    seen.append(aggregator.get_metrics_for_logging("t")["t/x"])
    return seen


def test_a_reduction_in_the_background_takes_what_was_there_when_it_began() -> None:
    for seen in run_ranks(in_the_background, 2):
        assert seen[:2] == [False, True]
        assert seen[2] == {"t/x": 2.0}
        assert seen[3] == {"t/new": 1.0, "t/x": 20.0}
        assert seen[4:] == [True, "RuntimeError", 222.0]
