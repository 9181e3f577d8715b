"""Questions to the job's store, and what a stopped, gone or unreachable one does to a reduction."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from textwrap import dedent
from typing import Any

import pytest
import torch.distributed as dist
from ranks import run_ranks

from metricfold import MetricsAggregator, MissingRanksError
from metricfold.communicator.store import StoreClient, StoreGoneError

_PROGRAM = """
    import os, signal, sys, threading, time
    import torch.distributed as dist
    from metricfold.communicator.store import StoreClient, StoreGoneError

    ours, theirs = os.pipe()
    host = os.fork()
    if not host:
        store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
        os.write(theirs, str(store.port).encode())
        while True:
            time.sleep(1)
    job = dist.TCPStore("127.0.0.1", int(os.read(ours, 10)), None, False)
    client = StoreClient(job, "ours", 10.0)
    client.set("key", "value", seconds=10.0)
    os.kill(host, signal.SIGSTOP)
    time.sleep(0.2)

    def clone():
        StoreClient(job, "ours", 1.0)

    questions = {
        "get": lambda: client.get("key", seconds=0.5),
        "set_first": lambda: client.set_first("first", "me", seconds=0.5),
        "clone": clone,
    }
    try:
        questions[sys.argv[1]]()
        print("answered")
    except StoreGoneError as error:
        print(error)
    began = time.monotonic()
    try:
        sys.argv[1] != "clone" and client.get("key", seconds=60.0)
    except StoreGoneError:
        print("not asked again", time.monotonic() - began < 30)
    print([thread.name for thread in threading.enumerate() if thread.name == "metricfold-store"])
    os.kill(host, signal.SIGKILL)
"""


@pytest.mark.parametrize("question", ["get", "set_first", "clone"])
def test_a_question_to_a_stopped_store_ends_and_leaves_no_thread_that_aborts_the_exit(
    question: str,
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", dedent(_PROGRAM), question],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, *others = done.stdout.splitlines()
    assert first.startswith("the store at 127.0.0.1:")
    assert first.endswith("does not answer")
    if question == "clone":
        # The thread of the client that works is idle.
        assert others == ["['metricfold-store']"]
    else:
        assert others == ["not asked again True", "[]"]


def test_a_store_client_reads_writes_and_deletes_under_its_prefix_alone() -> None:
    job = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    job.set("theirs", "1")
    client = StoreClient(job, "ours", 10.0)
    assert client.get("key", seconds=5.0) is None
    client.set("key", "value", seconds=5.0)
    assert client.get("key", seconds=5.0) == b"value"
    assert client.set_first("first", "me", seconds=5.0) == b"me"
    assert client.set_first("first", "you", seconds=5.0) == b"me"
    assert client.add("number", 2, seconds=5.0) == 2
    client.delete_all(["key", "first", "number"], seconds=5.0)
    assert [client.get(key, seconds=5.0) for key in ("key", "first", "number")] == [None] * 3
    assert job.check(["theirs"])
    client.close()
    with pytest.raises(StoreGoneError, match="does not answer"):
        client.get("key", seconds=5.0)


def closed_by_all(rank: int) -> list[Any]:
    store = dist.distributed_c10d._get_default_store()
    before = store.num_keys()
    aggregator = MetricsAggregator(timeout=10)
    aggregator.record("x", 1, "sum")
    aggregator.reduce()
    during = store.num_keys()
    dist.barrier()
    aggregator.close()
    dist.barrier()
    return [during > before, store.num_keys() - before]


def test_keys_in_the_store_are_deleted_when_all_ranks_have_closed() -> None:
    for seen in run_ranks(closed_by_all, 2):
        # Until now all of them stayed, some for each aggregator.
        assert seen == [True, 0]


def host_stops(rank: int, port: int, *, first: bool) -> Any:
    """Rank 0 serves the store, and is stopped; rank 1 wakes it up when it has its error."""
    job = dist.distributed_c10d._get_default_store()
    if rank == 0:
        job.set("host", str(os.getpid()))
    host = int(job.get("host"))
    dist.barrier()
    dist.destroy_process_group()
    where = {"init_method": f"tcp://127.0.0.1:{port}", "timeout": timedelta(seconds=60)}
    dist.init_process_group("gloo", rank=rank, world_size=2, **where)
    aggregator = MetricsAggregator(timeout=1)
    if not first:
        aggregator.reduce()
    if rank == 0:
        os.kill(host, signal.SIGSTOP)
        return "woken up"
    time.sleep(0.5)
    try:
        aggregator.reduce()
    except MissingRanksError as error:
        return str(error), error.missing
    finally:
        os.kill(host, signal.SIGCONT)
    return "no error"


@pytest.mark.parametrize("first", [False, True])
def test_where_the_host_of_the_store_is_stopped_nobody_is_named_but_the_store(first: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    text, missing = run_ranks(_host_stops_first if first else _host_stops_later, 2, port)[1]
    # It waited for the store's own timeout, here 60 s, or for ever.
    assert f"the store at 127.0.0.1:{port}" in text
    assert "who is missing cannot be told" in text
    assert missing == ()


def _host_stops_first(rank: int, port: int) -> Any:
    return host_stops(rank, port, first=True)


def _host_stops_later(rank: int, port: int) -> Any:
    return host_stops(rank, port, first=False)
