"""Checkpoints: every total counts once, on any number of ranks."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
from handlers_of_users import LaneRMS, MyTypes, ProductHandler, RMSHandler
from ranks import run_ranks, run_threads

from metricfold import AggregationType, Metric, MetricsAggregator, MissingRanksError
from metricfold.communicator import Communicator, LocalCommunicator

DISTRIBUTION = AggregationType.DISTRIBUTION


def new_aggregator(**options: Any) -> MetricsAggregator:
    aggregator = MetricsAggregator(**options)
    aggregator.register_handler(MyTypes.RMS, RMSHandler())
    aggregator.register_handler(MyTypes.PRODUCT, ProductHandler())
    aggregator.register_handler("lane rms", LaneRMS())
    return aggregator


def feed(aggregator: MetricsAggregator, values: list[int]) -> None:
    for value in values:
        aggregator.update(
            [
                Metric("d", "sum", value, AggregationType.SUM),
                Metric("d", "mean", value, AggregationType.MEAN, value),
                Metric("d", "max", value, AggregationType.MAX),
                Metric("d", "min", value, AggregationType.MIN),
                Metric("d", "len", value, DISTRIBUTION),
                Metric("d", "weighted", value, DISTRIBUTION, value),
                Metric("d", "kind", "even" if value % 2 == 0 else "odd", "categorical_count"),
                Metric("d", "rms", value, MyTypes.RMS),
                Metric("d", "lane", value, "lane rms"),
                Metric("d", "product", 2, MyTypes.PRODUCT),
                Metric("d", "rate", value, AggregationType.RATE),
            ]
        )


def truth(values: list[int]) -> dict[str, float]:
    alone = new_aggregator()
    feed(alone, values)
    logged = alone.get_metrics_for_logging("t")
    del logged["t_d/rate"]
    return logged


def save_on(rank: int, world_size: int, path: str) -> tuple[dict[str, Any], dict[str, float]]:
    import torch

    aggregator = new_aggregator()
    feed(aggregator, list(range(1 + rank, 41, world_size)))
    aggregator.reduce()
    feed(aggregator, list(range(41 + rank, 61, world_size)))
    time.sleep(0.05)
    state = aggregator.state_dict()
    feed(aggregator, list(range(61 + rank, 81, world_size)))
    snapshot = aggregator.reduce()
    if rank == 0:
        torch.save({"aggregator": state, "model": torch.ones(2)}, path)
    return state, snapshot.as_dict("t", "interval")


def load_on(rank: int, world_size: int, path: str) -> list[dict[str, float]]:
    import torch

    aggregator = new_aggregator()
    feed(aggregator, [1000])
    aggregator.load_state_dict(torch.load(path, weights_only=True)["aggregator"])
    seconds_before = json.loads(aggregator.state_dict(sync=False)["payload"])["content"]["run"]
    feed(aggregator, list(range(61 + rank, 81, world_size)))
    again = aggregator.state_dict()
    snapshot = aggregator.reduce()
    late = new_aggregator()
    late.load_state_dict(again)
    return [
        snapshot.as_dict("t", "run"),
        snapshot.as_dict("t", "interval"),
        late.get_metrics_for_logging("t", "run"),
        {"before": seconds_before["seconds"], "after": snapshot.run_seconds},
    ]


def test_saved_on_4_ranks_loads_on_1_2_3_and_8_and_each_total_counts_once(tmp_path: Path) -> None:
    path = str(tmp_path / "checkpoint.pt")
    saved = run_ranks(save_on, 4, 4, path)
    assert all(state == saved[0][0] for state, _ in saved)
    run, interval = truth(list(range(1, 81))), truth(list(range(41, 81)))
    _check(saved[0][1], interval)
    for world_size in (1, 2, 3, 8):
        results = run_ranks(load_on, world_size, world_size, path)
        for seen in results:
            # The clock goes on from where it was saved; downtime does not count.
            seconds = seen.pop()
            assert seconds["before"] >= 0.05
            assert seconds["before"] < seconds["after"] < seconds["before"] + 20
            assert seen[0].pop("t_d/rate") == pytest.approx(3240 / seconds["after"])
            assert seen[0] == results[0][0]
            _check(seen[0], run)
            _check(seen[1], interval)
            _check(seen[2], run)


def _check(ours: dict[str, float], expected: dict[str, float]) -> None:
    ours = {key: value for key, value in ours.items() if key != "t_d/rate"}
    assert ours.keys() == expected.keys()
    for key, value in expected.items():
        assert ours[key] == pytest.approx(value, rel=1e-12), key


def rank_zero_only(rank: int) -> list[Any]:
    aggregator = MetricsAggregator(timeout=2)
    aggregator.record("x", 1, "sum")
    aggregator.update([Metric("d", "len", rank, DISTRIBUTION)])
    aggregator.reduce()
    aggregator.record("x", 100, "sum")
    if rank != 0:
        time.sleep(4)
        return []
    local = aggregator.state_dict(sync=False)
    try:
        aggregator.state_dict()
    except MissingRanksError as error:
        missing: Any = error.missing
    alone = MetricsAggregator(communicator=LocalCommunicator())
    alone.load_state_dict(local)
    return [missing, aggregator.state_dict(sync=False) == local, alone.reduce().as_dict("t")]


def test_on_rank_0_only_it_raises_instead_of_hanging_and_without_sync_it_is_right() -> None:
    missing, same, logged = run_ranks(rank_zero_only, 2)[0]
    assert missing == (1,)
    assert same
    assert logged["t/x"] == 2.0
    assert logged["t_d/len_stat_count"] == 2.0
    assert logged["t_d/len_stat_mean"] == 0.5


def distributed_checkpoint(rank: int, folder: str) -> dict[str, float]:
    import torch.distributed.checkpoint as dcp

    aggregator = MetricsAggregator()
    feed_plain = [Metric("d", "sum", rank + 1, AggregationType.SUM)]
    aggregator.update(feed_plain)
    dcp.save({"metrics": aggregator.state_dict()}, checkpoint_id=folder)
    restored = {"metrics": MetricsAggregator(name="empty").state_dict(sync=False)}
    dcp.load(restored, checkpoint_id=folder)
    resumed = MetricsAggregator(name="resumed")
    resumed.load_state_dict(restored["metrics"])
    resumed.update(feed_plain)
    return resumed.get_metrics_for_logging("t")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_it_passes_through_torch_distributed_checkpoint(tmp_path: Path) -> None:
    results = run_ranks(distributed_checkpoint, 2, str(tmp_path))
    assert results == [{"t_d/sum": 6.0}] * 2


def test_it_passes_through_json_and_weights_only_pickle() -> None:
    torch = pytest.importorskip("torch")
    aggregator = new_aggregator()
    feed(aggregator, [1, 2, 3])
    aggregator.record("nothing finite", float("inf"), "max")
    aggregator.record("weird/name é", float("nan"))
    state = aggregator.state_dict()
    assert {key: type(value) for key, value in state.items()} == {
        "format": str,
        "version": int,
        "payload": str,
    }
    json.loads(state["payload"])
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    expected = aggregator.reduce().as_dict("t")
    for loaded in (torch.load(buffer, weights_only=True), json.loads(json.dumps(state))):
        resumed = new_aggregator()
        resumed.load_state_dict(loaded)
        logged = resumed.get_metrics_for_logging("t")
        del logged["t_d/rate"]
        # As text, because NaN is not equal to itself.
        assert repr(logged) == repr({k: v for k, v in expected.items() if k != "t_d/rate"})


def test_saving_between_logs_loses_nothing_from_the_run_or_the_interval() -> None:
    aggregator = MetricsAggregator()
    seen = []
    for step in range(1, 601):
        aggregator.record("loss", step)
        aggregator.record("tokens", 1, "sum")
        if step % 150 == 0:
            aggregator.state_dict()
        if step % 100 == 0:
            snapshot = aggregator.reduce()
            seen.append((snapshot.as_dict("t", "interval"), snapshot.as_dict("t", "run")))
    for index, (interval, run) in enumerate(seen):
        assert interval == {"t/loss": 100 * index + 50.5, "t/tokens": 100.0}
        assert run["t/tokens"] == 100.0 * (index + 1)


def test_the_open_interval_survives_a_restart() -> None:
    aggregator = MetricsAggregator()
    aggregator.update([Metric("d", "len", 1, DISTRIBUTION), Metric("d", "len", 2, DISTRIBUTION)])
    aggregator.reduce()
    aggregator.update([Metric("d", "len", 30, DISTRIBUTION)])
    aggregator.record("loss", 1.0)
    resumed = MetricsAggregator()
    resumed.load_state_dict(aggregator.state_dict())
    resumed.update([Metric("d", "len", 40, DISTRIBUTION)])
    resumed.record("loss", 3.0)
    snapshot = resumed.reduce()
    interval = snapshot.as_dict("t", "interval")
    assert interval["t/loss"] == 2.0
    assert interval["t_d/len_stat_mean"] == 35.0
    assert interval["t_d/len_stat_count"] == 2.0
    assert snapshot.as_dict("t", "run")["t_d/len_stat_count"] == 4.0


def test_loaded_windows_are_the_oldest_in_their_rings() -> None:
    aggregator = MetricsAggregator(dist_window_size=4)
    aggregator.update([Metric("d", "len", value, DISTRIBUTION) for value in (1, 2, 3, 4)])
    resumed = MetricsAggregator(dist_window_size=4)
    resumed.load_state_dict(aggregator.state_dict())
    resumed.update([Metric("d", "len", value, DISTRIBUTION) for value in (5, 6, 7)])
    logged = resumed.get_metrics_for_logging("t")
    assert logged["t_d/len_stat_min"] == 4.0
    assert logged["t_d/len_stat_count"] == 4.0


def test_large_windows_are_thinned_evenly_to_65536_values_in_all() -> None:
    def save(communicator: Communicator) -> dict[str, Any]:
        aggregator = MetricsAggregator(50_000, communicator=communicator)
        aggregator.update([Metric("d", "len", v, DISTRIBUTION) for v in range(50_000)])
        return aggregator.state_dict()

    states = run_threads(save, 2)
    assert states[0] == states[1]
    resumed = MetricsAggregator(100_000)
    resumed.load_state_dict(states[0])
    logged = resumed.get_metrics_for_logging("t")
    assert logged["t_d/len_stat_count"] == 65_536
    assert logged["t_d/len_stat_p50"] == pytest.approx(24_999.5, rel=1e-4)
    assert logged["t_d/len_stat_max"] == 49_999


# -- Bad input -----------------------------------------------------------------------------------


def good_state() -> dict[str, Any]:
    aggregator = new_aggregator()
    feed(aggregator, [1, 2])
    return aggregator.state_dict()


def with_payload(change: Any) -> dict[str, Any]:
    state = good_state()
    return {**state, "payload": change(state["payload"])}


@pytest.mark.parametrize(
    ("state", "complaint"),
    [
        ({}, "must have the keys 'format', 'version' and 'payload'"),
        (None, "but it has NoneType"),
        ({"model": 1}, r"but it has \['model'\]"),
        ({**good_state(), "format": "torchmetrics"}, "written by 'torchmetrics'"),
        ({**good_state(), "version": 99}, "version 99.*install a newer metricfold"),
        ({**good_state(), "version": "x"}, "has version 'x'"),
        (
            {**good_state(), "version": 0},
            "has version 0, and this metricfold reads versions 1 to 2",
        ),
        (with_payload(lambda text: text[: len(text) // 2]), "truncated or damaged"),
        (with_payload(lambda text: text.replace('"seconds":', '"seconds":1', 1)), "damaged"),
        (with_payload(lambda text: ""), "truncated or damaged"),
        (with_payload(lambda text: text.encode()), "payload is bytes"),
    ],
)
def test_a_bad_state_is_refused_and_changes_nothing(state: Any, complaint: str) -> None:
    aggregator = MetricsAggregator()
    aggregator.record("x", 1, "sum")
    aggregator.reduce()
    aggregator.record("x", 2, "sum")
    with pytest.raises(ValueError, match=complaint):
        aggregator.load_state_dict(state)
    assert aggregator.get_metrics_for_logging("t") == {"t/x": 3.0}


def test_a_custom_type_without_its_handler_is_refused_and_changes_nothing() -> None:
    aggregator = MetricsAggregator()
    aggregator.record("x", 1, "sum")
    with pytest.raises(
        ValueError, match=r"of type 'lane rms', for which no handler.*register_handler"
    ):
        aggregator.load_state_dict(good_state())
    assert aggregator.get_metrics_for_logging("t") == {"t/x": 1.0}


def test_a_type_that_differs_from_the_registered_one_is_refused_and_changes_nothing() -> None:
    aggregator = new_aggregator()
    aggregator.update([Metric("d", "sum", 5, AggregationType.MAX)])
    with pytest.raises(ValueError, match="is already registered with aggregation type max"):
        aggregator.load_state_dict(good_state())
    assert aggregator.get_metrics_for_logging("t") == {"t_d/sum": 5.0}


def test_a_handler_with_other_lanes_than_the_saved_one_is_refused() -> None:
    class Wider(LaneRMS):
        sum_lanes = ("squares", "more")

    aggregator = new_aggregator()
    aggregator.register_handler("lane rms", Wider())
    with pytest.raises(ValueError, match=r"3 SUM and 0 MAX lanes, but Wider has 4 SUM and 0 MAX"):
        aggregator.load_state_dict(good_state())


def test_a_state_that_json_cannot_hold_says_what_to_override() -> None:
    class Unserialisable(RMSHandler):
        def update(self, local_agg_metric: Any, metric: Metric) -> None:
            super().update(local_agg_metric, metric)
            local_agg_metric.metadata["seen"] = {metric.value}

        def finalize_local_agg(self, local_agg_metric: Any) -> Any:
            del local_agg_metric.metadata["seen"]
            return super().finalize_local_agg(local_agg_metric)

    aggregator = MetricsAggregator()
    aggregator.register_handler(MyTypes.RMS, Unserialisable())
    aggregator.update([Metric("d", "rms", 3, MyTypes.RMS)])
    assert aggregator.get_metrics_for_logging("t") == {"t_d/rms": 3.0}
    with pytest.raises(TypeError, match=r"override serialize_metadata .* in Unserialisable"):
        aggregator.state_dict()


def test_a_custom_state_that_cannot_be_restored_is_refused_and_changes_nothing() -> None:
    class Forgetful(ProductHandler):
        def deserialize_metadata(self, metadata: dict[str, Any]) -> dict[str, Any]:
            raise OSError("boom")

    aggregator = new_aggregator()
    aggregator.register_handler(MyTypes.PRODUCT, Forgetful())
    aggregator.record("x", 1, "sum")
    with pytest.raises(ValueError, match=r"cannot be restored by Forgetful.*boom"):
        aggregator.load_state_dict(good_state())
    assert aggregator.get_metrics_for_logging("t") == {"t/x": 1.0}


def save_without_the_others(communicator: Communicator, values: list[float]) -> dict[str, Any]:
    aggregator = MetricsAggregator(50, communicator=communicator, route="wide")
    mine = values[communicator.rank :: communicator.world_size]
    aggregator.update([Metric("d", "len", value, DISTRIBUTION) for value in mine])
    aggregator.reduce()
    return aggregator.state_dict(sync=False)


def test_recent_values_drawn_from_a_sketch_are_spread_like_all_on_however_many_ranks() -> None:
    """Until now they were loaded in ascending order, so that fewer ranks kept the largest."""
    values = [float(value) for value in range(1, 201)]
    state = run_threads(save_without_the_others, 4, values)[0]
    for ranks, count in ((1, 50), (2, 100), (4, 200)):
        logged = run_threads(recent_of, ranks, state)[0]
        assert logged["t_d/len_stat_count"] == count
        assert logged["t_d/len_stat_mean"] == pytest.approx(100.5, rel=0.02)
        assert logged["t_d/len_stat_p05"] == pytest.approx(10.95, abs=4)
        assert logged["t_d/len_stat_p95"] == pytest.approx(190.05, abs=4)


def recent_of(communicator: Communicator, state: dict[str, Any]) -> dict[str, float]:
    aggregator = MetricsAggregator(50, communicator=communicator)
    aggregator.load_state_dict(state)
    return aggregator.get_metrics_for_logging("t")
