"""Forks, pickles and exits: what becomes of an aggregator when processes come and go."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
from ranks import free_port, run_ranks
from torch.utils.data import DataLoader, Dataset

from metricfold import (
    DefaultTrainingMetricTransform,
    MetricsAggregator,
    MetricsCollator,
)


def test_pickling_or_copying_an_aggregator_raises() -> None:
    aggregator = MetricsAggregator()
    for duplicate in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match=r"save or send its state_dict\(\)"):
            duplicate(aggregator)


class Lengths(Dataset[dict[str, Any]]):
    def __init__(self) -> None:
        self.transform = DefaultTrainingMetricTransform()
        self.transform.set_dataset_name("d")

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict(self.transform({"tokens": torch.arange(4)}))


class Misused(Lengths):
    def __init__(self, aggregator: MetricsAggregator) -> None:
        super().__init__()
        self.aggregator = aggregator

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.aggregator.record("x", 1)
        return super().__getitem__(index)


def fork_workers(rank: int) -> list[Any]:
    aggregator = MetricsAggregator()
    aggregator.record("before", 1, "sum")
    aggregator.reduce()
    pending = aggregator.reduce_async()
    loader = DataLoader(
        Lengths(),
        batch_size=2,
        num_workers=2,
        collate_fn=MetricsCollator(),
        multiprocessing_context="fork",
    )
    for batch in loader:
        aggregator.update(batch.pop("metrics"))
        aggregator.reduce()
    pending.result()
    misused = DataLoader(
        Misused(aggregator),
        batch_size=2,
        num_workers=1,
        collate_fn=MetricsCollator(),
        multiprocessing_context="fork",
    )
    try:
        next(iter(misused))
        error = ""
    except RuntimeError as raised:
        error = str(raised)
    pid = os.fork()
    if pid == 0:
        # The child of a thread-laden parent: it must neither hang nor take part.
        try:
            aggregator.reduce()
        except RuntimeError as raised:
            os._exit(7 if "inherited by a forked process" in str(raised) else 1)
        os._exit(2)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return [aggregator.get_metrics_for_logging("t"), error, status]


def test_workers_may_fork_and_using_the_aggregator_there_is_an_error() -> None:
    for logged, error, status in run_ranks(fork_workers, 2):
        assert logged["t_d/samples_seen"] == 16.0
        assert logged["t_d/tokens_seen"] == 64.0
        assert logged["t/before"] == 2.0
        assert "inherited by a forked process" in error
        assert "MetricsCollator" in error
        assert status == 7


EXIT = """
import atexit, os, sys, time, weakref
import torch.distributed as dist
last = []
atexit.register(lambda: [hook() for hook in last])  # before metricfold's own, so it runs after them
from metricfold import MetricsAggregator
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="tcp://127.0.0.1:" + sys.argv[2], rank=rank,
                        world_size=2)
aggregator = MetricsAggregator(timeout=20)
aggregator.record("x", 1, "sum")
aggregator.reduce()
aggregator.record("x", 1, "sum")
{body}
"""


def run_script(body: str, wait_for: int = 2) -> list[tuple[int, str]]:
    """Run two ranks of a script; returns exit status and output of the first `wait_for`."""

    port = free_port()
    script = EXIT.format(body=textwrap.dedent(body))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(rank), str(port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    ended = []
    try:
        for process in processes[:wait_for]:
            output, _ = process.communicate(timeout=150)
            ended.append((process.returncode, output))
    finally:
        for process in processes:
            process.kill()
            process.wait()
            process.stdout.close()
    return ended


def test_a_clean_exit_lets_the_reduction_under_way_finish_and_ends_its_connection() -> None:
    ended = run_script(
        """
        if rank == 1:
            time.sleep(2)
        future = aggregator.reduce_async()
        future.add_done_callback(lambda f: print("total", f.result().as_dict("t"), flush=True))
        # A thread of gloo's that is still busy when the interpreter is torn down aborts the process,
        # but seldom: this tells each time whether it is gone by then.
        group = weakref.ref(aggregator._link.communicator._group)
        def check():
            print("ended", group() is None, flush=True)
            try:
                aggregator.reduce()
            except RuntimeError as error:
                print("too late:", error, flush=True)
        last.append(check)
        """
    )
    for status, output in ended:
        assert status == 0, output
        assert "total {'t/x': 4.0}" in output
        assert "ended True" in output
        assert "too late: aggregator '0' has given its connection back" in output


def test_an_exit_after_an_error_does_not_wait_for_missing_ranks() -> None:
    ((status, output),) = run_script(
        """
        if rank == 1:
            time.sleep(120)
        future = aggregator.reduce_async()
        import threading
        threading.Thread(target=lambda: (time.sleep(15), print("still here", flush=True)),
                         daemon=True).start()
        raise SystemError("training failed")
        """,
        wait_for=1,
    )
    assert status == 1
    # It was gone before the other rank, and before its own timeout.
    assert "still here" not in output
