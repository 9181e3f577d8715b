"""Questions to the job's store, and what a stopped, gone or unreachable one does to a reduction."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch.distributed as dist
from ranks import free_port, run_ranks

from metricfold import MetricsAggregator, MissingRanksError
from metricfold.communicator.store import StoreClient, StoreGoneError

_PROGRAM = """
    import os, signal, socket, sys, threading, time
    import torch.distributed as dist
    from metricfold.communicator.store import StoreClient, StoreGoneError

    ours, theirs = os.pipe()
    host = os.fork()
    if not host:
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1), os.dup2(silent, 2)  # else who reads these waits for this process too
        store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
        os.write(theirs, str(store.port).encode())
        while True:
            time.sleep(1)
    job = dist.TCPStore("127.0.0.1", int(os.read(ours, 10)), None, False)
    when = sys.argv[1]
    if when == "connected":
        client, other = (StoreClient(job, "ours", 60.0) for _ in range(2))
        client.set("key", "value", seconds=60.0)
    print(host)

    def stop_host():
        os.kill(host, signal.SIGSTOP)
        os.waitpid(host, os.WUNTRACED)

    def said(question):
        try:
            return question()
        except StoreGoneError as error:
            return error

    def connect_late(*args, connect=socket.create_connection, **limits):
        time.sleep(0.5)  # as on a busy machine: the client has got no further when its time is over
        return connect(*args, **limits)

    stop_host()
    if when == "connected":
        print(said(lambda: client.set_first("first", "me", seconds=0.5)))
        print(said(lambda: client.get("key", seconds=3600.0)))
        os.kill(host, signal.SIGCONT)
        print(other.get("key", seconds=60.0), client.get("first", seconds=60.0))
        stop_host()
        print(said(lambda: client.get("key", seconds=0.5)))
    else:
        if when == "connecting late":
            socket.create_connection = connect_late
        print(said(lambda: StoreClient(job, "ours", 0.4)))
        until = time.monotonic() + 30
        while left := [one.name for one in threading.enumerate() if "store" in one.name]:
            if time.monotonic() > until:
                break
            time.sleep(0.02)
        print(left)
"""


@pytest.mark.parametrize("when", ["connecting", "connecting late", "connected"])
def test_a_question_to_a_stopped_store_ends_and_leaves_no_thread_that_aborts_the_exit(
    when: str,
) -> None:
    """Until now a client that was late, or tried again, stayed: what it opened then was not cut off."""
    done = subprocess.run(
        [sys.executable, "-c", dedent(_PROGRAM), when],
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    host, first, *others = done.stdout.splitlines()
    os.kill(int(host), signal.SIGKILL)  # it was stopped until here, and the exit is over
    assert done.returncode == 0, done.stderr
    assert first.startswith("the store at 127.0.0.1:")
    assert first.endswith("does not answer")
    # It is not asked again until it has answered, and then it is.
    asked_again = [first, "b'value' b'me'", first]
    assert others == (asked_again if when == "connected" else ["[]"])


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


def connections(port: int) -> set[int]:
    """Return the sockets of this process that are connected to `port`."""
    found = set()
    for path in Path("/proc/self/fd").iterdir():
        with suppress(OSError), socket.socket(fileno=os.dup(int(path.name))) as one:
            if one.getpeername()[1] == port:
                found.add(os.fstat(one.fileno()).st_ino)
    return found


def many_aggregators(rank: int) -> list[Any]:
    job = dist.distributed_c10d._get_default_store()
    before = connections(job.underlying_store.port)
    aggregators = [MetricsAggregator(name=str(number), timeout=10) for number in range(6)]
    for aggregator in aggregators:
        aggregator.record("x", 1, "sum")
    # Their first reductions, which connect the ranks, wait for each other in opposite orders.
    order = aggregators if rank else aggregators[::-1]
    futures = [aggregator.reduce_async() for aggregator in order]
    totals = {future.result().as_dict("t")["t/x"] for future in futures}
    return [totals, len(connections(job.underlying_store.port) - before)]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="asks Linux what is open")
def test_a_process_connects_to_the_store_once_whatever_the_number_of_its_aggregators() -> None:
    # It did three times for each, and the store looks up the name of whoever comes: 33 of 200 took 5 s.
    assert run_ranks(many_aggregators, 2) == [[{2.0}, 1]] * 2


def closed_by_all(rank: int) -> list[Any]:
    store = dist.distributed_c10d._get_default_store()
    dist.barrier()
    before = store.num_keys()
    dist.barrier()  # else another rank's first keys may be there before this one has counted
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
    port = free_port()
    text, missing = run_ranks(_host_stops_first if first else _host_stops_later, 2, port)[1]
    # It waited for the store's own timeout, here 60 s, or for ever.
    assert f"the store at 127.0.0.1:{port}" in text
    assert "who is missing cannot be told" in text
    assert missing == ()


def _host_stops_first(rank: int, port: int) -> Any:
    return host_stops(rank, port, first=True)


def _host_stops_later(rank: int, port: int) -> Any:
    return host_stops(rank, port, first=False)


def test_a_store_whose_host_has_ended_is_told_nothing_that_torch_would_complain_of(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Until now each rank that ended after the first one printed stacks of C++."""
    ours, theirs = os.pipe()
    host = os.fork()
    if not host:
        store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
        os.write(theirs, str(store.port).encode())
        signal.pause()
    job = dist.TCPStore("127.0.0.1", int(os.read(ours, 10)), None, False)
    client = StoreClient(job, "ours", 10.0)
    client.set("key", "value", seconds=10.0)
    os.kill(host, signal.SIGKILL)
    os.waitpid(host, 0)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="its host has closed the connection"):
            client.set("key", "value", seconds=10.0)
    assert "sendBytes" not in capfd.readouterr().err
