"""MetricsLogger over real ranks: every rank logs, global rank 0 writes, errors reach all."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from ranks import run_ranks

from metricfold import MetricsAggregator
from metricfold.sinks import JSONLSink, MetricsLogger, TensorBoardSink, WandbSink, read_jsonl


class Calls:
    """A user's own sink that tells which of its methods were called."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def write(self, record: Any) -> None:
        self.calls.append("write")

    def flush(self) -> None:
        self.calls.append("flush")

    def close(self) -> None:
        self.calls.append("close")

    def rewind(self, step: int) -> None:
        self.calls.append("rewind")


def raised(call: Any) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def train(rank: int, folder: Path) -> dict[str, Any]:
    own = folder / str(rank)
    calls = Calls()
    sinks = [JSONLSink(own / "x.jsonl"), TensorBoardSink(own / "tb"), WandbSink(dir=own), calls]
    aggregator, validation = MetricsAggregator(), MetricsAggregator(name="val")
    with MetricsLogger(sinks) as logger:
        logger.rewind(0)
        for step in range(1, 4):
            # Uneven: a mean of the ranks' means would be wrong.
            for number in range(1 + 2 * rank):
                aggregator.record("loss", float(10 * rank + number), dataset="a")
            aggregator.record("seen", 1, "sum", dataset=f"only {rank}")
            logger.log(step, aggregator, prefix="train", extra={"lr": 0.5, "rank": rank})
        validation.record("loss", float(rank))
        logger.log(3, validation, prefix="val")
        # Only rank 0's numbers are looked at: those of the others may even be none.
        logger.log(3, {"epoch": 1} if rank == 0 else {"epoch": None}, extra={"a": rank or 1})
        logger.log(3, validation.reduce(), prefix="again", window="run")
    return {
        "collectives": aggregator.collectives,
        "files": sorted(path.name for path in own.glob("*")),
        "calls": calls.calls,
    }


def test_every_rank_logs_and_rank_0_alone_writes(tmp_path):
    first, second = run_ranks(train, 2, tmp_path)
    assert first["collectives"] == second["collectives"]
    assert first["files"] == ["tb", "wandb", "x.jsonl"]
    assert second["files"] == []
    assert first["calls"].count("write") == 6
    assert (first["calls"][0], first["calls"][-1]) == ("rewind", "close")
    assert second["calls"] == ["close"]

    records = read_jsonl(tmp_path / "0" / "x.jsonl")
    assert [record.step for record in records] == [1, 2, 3, 3, 3, 3]
    for step, record in enumerate(records[:3], start=1):
        assert record.metrics["train_a/loss"] == (0 + 10 + 11 + 12) / 4
        assert record.metrics["train_only 0/seen"] == step
        assert record.metrics["train_only 1/seen"] == step
        assert (record.metrics["lr"], record.metrics["rank"]) == (0.5, 0.0)
    assert records[3].metrics == {"val/loss": 0.5}
    assert records[4].metrics == {"epoch": 1.0, "a": 1.0}
    assert records[5].metrics == {"again/loss": 0.5}


def log_with_different_steps(rank: int, folder: Path) -> dict[str, Any]:
    aggregator = MetricsAggregator()
    logger = MetricsLogger([JSONLSink(folder / "x.jsonl")])
    seen = {}
    aggregator.record("loss", 1.0)
    logger.log(1, aggregator, prefix="t")
    aggregator.record("loss", 3.0)
    seen["call itself"] = raised(lambda: logger.log(2 + rank, aggregator, prefix="t"))
    seen["next log"] = raised(lambda: logger.log(4, aggregator, prefix="t"))
    seen["log after"] = raised(lambda: logger.log(4, aggregator, prefix="t"))
    seen["last log"] = raised(lambda: logger.log(5 + rank, aggregator, prefix="t"))
    seen["close"] = raised(logger.close)
    return seen


def test_the_error_of_a_reduction_is_raised_by_the_next_log_or_by_close_on_every_rank(tmp_path):
    first, second = run_ranks(log_with_different_steps, 2, tmp_path)
    assert first == second
    assert first["call itself"] == first["log after"] == first["last log"] == "nothing"
    assert "step" in first["next log"]
    assert "step" in first["close"]
    records = read_jsonl(tmp_path / "x.jsonl")
    assert [record.step for record in records] == [1, 4]
    assert records[1].metrics == {"t/loss": 3.0}, "and the failed reduction lost nothing"


class Refusing(Calls):
    """Takes all steps but one."""

    def write(self, record: Any) -> None:
        if record.step == 1:
            raise ValueError("a row that the server does not take")
        super().write(record)


def log_to_a_sink_that_fails(rank: int, route: str, how: str) -> list[str]:
    aggregator = MetricsAggregator(route=route)
    logger = MetricsLogger([Refusing()], on_sink_error=how)
    said = []
    for step in range(6):
        aggregator.record("loss", 1.0)
        said.append(raised(lambda step=step: logger.log(step, aggregator, prefix="t")))
        # So that what rank 0 finds out, it has found out before the next log.
        logger.flush()
        dist.barrier()
    said.append(raised(logger.close))
    return said


@pytest.mark.parametrize("route", ["narrow", "wide"])
def test_a_sink_error_is_raised_on_all_ranks_in_the_same_log(route):
    first, second = run_ranks(log_to_a_sink_that_fails, 2, route, "raise")
    # Step 1 fails; the reduction of log 2 tells all ranks, and log 3 raises.
    assert [one.partition(":")[0] for one in first] == [
        *["nothing"] * 3,
        "SinkError",
        *["nothing"] * 3,
    ]
    assert "a row that the server does not take" in first[3]
    assert second == [*["nothing"] * 3, second[3], *["nothing"] * 3]
    assert second[3].startswith("SinkError: a sink has failed on rank 0")


def log_on_rank_0_alone(rank: int, folder: Path) -> Any:
    aggregator = MetricsAggregator(timeout=2)
    aggregator.record("loss", 1.0)
    logger = MetricsLogger([JSONLSink(folder / "x.jsonl")])
    logger.log(1, aggregator, prefix="t")
    if rank == 0:
        logger.log(2, aggregator, prefix="t")
        logger.log(
            2, {"mine": 1.0}
        )  # the training does not wait for the missing rank: it would raise
        return raised(lambda: logger.log(3, aggregator, prefix="t")), raised(logger.close)
    time.sleep(4)
    return None


def test_a_log_on_rank_0_alone_ends_in_an_error_that_names_the_missing_rank(tmp_path):
    (error, at_close), _ = run_ranks(log_on_rank_0_alone, 2, tmp_path)
    assert error.startswith("MissingRanksError")
    assert "1" in error
    assert at_close == "nothing", "it has been told"
    assert [record.step for record in read_jsonl(tmp_path / "x.jsonl")] == [1, 2]


def log_in_a_group_without_rank_0(rank: int, folder: Path) -> list[str]:
    group = dist.new_group([1, 2])
    with MetricsLogger([JSONLSink(folder / f"{rank}.jsonl")]) as logger:
        if rank:
            aggregator = MetricsAggregator(process_group=group)
            aggregator.record("loss", 1.0)
            logger.log(1, aggregator, prefix="t")
        else:
            logger.log(1, {"x": 1.0})
        dist.barrier()
        dist.destroy_process_group()
        # Every rank looks like the first now.
        logger.log(2, {"x": 2.0})
    return sorted(path.name for path in folder.glob(f"{rank}.jsonl"))


def test_only_the_first_rank_of_the_whole_job_writes_also_after_the_group_is_gone(tmp_path):
    assert run_ranks(log_in_a_group_without_rank_0, 3, tmp_path) == [["0.jsonl"], [], []]
    assert [record.step for record in read_jsonl(tmp_path / "0.jsonl")] == [1, 2]


def log_until_terminated(rank: int, folder: Path) -> None:
    aggregator = MetricsAggregator()
    logger = MetricsLogger([JSONLSink(folder / "x.jsonl")])
    for step in range(1, 21):
        aggregator.record("loss", float(rank))
        logger.log(step, aggregator, prefix="t")
        if step == 20:
            # Its reduction is under way; rank 1 must not die before it has taken part.
            os.kill(os.getpid(), signal.SIGTERM)
    raise AssertionError("still alive")


def test_sigterm_on_all_ranks_loses_no_log_that_all_ranks_made(tmp_path):
    run_ranks(log_until_terminated, 2, tmp_path, dies=(0, 1))
    records = read_jsonl(tmp_path / "x.jsonl")
    assert [record.step for record in records] == list(range(1, 21))
    assert records[-1].metrics == {"t/loss": 0.5}


def log_throw_away_aggregators(rank: int, folder: Path) -> int:
    aggregator = MetricsAggregator()
    with MetricsLogger([JSONLSink(folder / "x.jsonl")]) as logger:
        for step in range(1, 31):
            aggregator.record("loss", 1.0)
            logger.log(step, aggregator, prefix="train")
            validation = MetricsAggregator()
            validation.record("loss", float(step + rank))
            logger.log(step, validation, prefix="val")
        del validation
        assert logger.flush()
        deadline = time.monotonic() + 10
        # Of the training's aggregator: one that reduces, and one that asks the store.
        while threads_named("metricfold-") > 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        return threads_named("metricfold-")


def threads_named(start: str) -> int:
    return sum(thread.name.startswith(start) for thread in threading.enumerate())


def test_aggregators_that_are_logged_once_and_dropped_leave_no_thread_behind(tmp_path):
    assert run_ranks(log_throw_away_aggregators, 2, tmp_path) == [2, 2]
    records = read_jsonl(tmp_path / "x.jsonl")
    assert [record.metrics for record in records if "val/loss" in record.metrics] == [
        {"val/loss": step + 0.5} for step in range(1, 31)
    ]
