"""Who is named when a collective fails: the rank that keeps the others waiting, and no other."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from textwrap import dedent
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from ranks import run_ranks

from metricfold import MetricsAggregator, MetricsLogger, MissingRanksError

pytestmark = pytest.mark.alone


def raised(aggregator: MetricsAggregator) -> tuple[str, tuple[int, ...]]:
    """Return what `reduce` raises, and whom that names."""
    try:
        aggregator.reduce()
    except MissingRanksError as error:
        return str(error), error.missing
    return "ok", ()


def one_is_killed_and_one_slow(rank: int) -> Any:
    aggregator = MetricsAggregator(timeout=20)
    aggregator.reduce()
    if rank == 1:
        os._exit(3)
    time.sleep(3.0 if rank == 2 else 0.5)  # well after the first reading of the roll
    return raised(aggregator)


def test_a_healthy_rank_that_is_slow_is_not_named_beside_one_that_was_killed() -> None:
    results = run_ranks(one_is_killed_and_one_slow, 3, dies=(1,))
    for text, missing in (results[0], results[2]):
        assert missing == (1,), text
        assert "rank(s) 1 of 3; the connection to them broke" in text


def one_breaks_its_connections(rank: int) -> Any:
    aggregator = MetricsAggregator(timeout=20)
    aggregator.reduce()
    if rank == 1:
        communicator: Any = aggregator._link.communicator
        communicator._close_pairs()
        return None
    future = aggregator.reduce_async()
    while not aggregator.has_failed():
        time.sleep(0.001)
    known = future.done()
    return known, isinstance(future.exception(), MissingRanksError)


def test_that_a_reduction_has_failed_is_known_before_it_is_known_why() -> None:
    # Who dies of a signal does not wait for that: it was a second for all ranks of a job.
    assert run_ranks(one_breaks_its_connections, 2)[0] == (False, True)


def one_never_comes_and_one_just_in_time(rank: int) -> Any:
    aggregator = MetricsAggregator(timeout=2)
    aggregator.reduce()
    if rank == 1:
        time.sleep(4)
    if rank == 2:
        time.sleep(1.5)
    return raised(aggregator)


def test_a_rank_that_comes_in_time_and_waits_itself_is_not_named() -> None:
    results = run_ranks(one_never_comes_and_one_just_in_time, 3)
    assert [missing for _, missing in results] == [(1,)] * 3
    assert {text for text, _ in results} == {results[0][0]}


def merged(communicator: Any) -> tuple[int, ...]:
    """Return whom a tree says is missing."""
    try:
        communicator.tree(np.ones(3), np.add)
    except MissingRanksError as error:
        return error.missing
    return ()


def one_is_held_up_in_a_tree(rank: int, goes_on: bool) -> Any:
    aggregator = MetricsAggregator(timeout=4 if rank == 2 and goes_on else 1)
    aggregator.reduce()
    communicator: Any = aggregator._link.communicator
    if rank == 0:
        # It stops once rank 1 has what it needs: ranks 1 and 3 have all; rank 2 waits.
        swap = communicator._swap

        def held_up(step: Any, *arrays: Any) -> None:
            if step.round == 2:
                time.sleep(5)
            swap(step, *arrays)

        communicator._swap = held_up
        return merged(communicator)
    first = merged(communicator)
    if rank != 2 and not goes_on:
        time.sleep(5)  # in a long step of its training
    return first if rank == 2 or not goes_on else merged(communicator)


def test_a_rank_that_still_waits_in_the_call_before_is_not_named() -> None:
    """Until now the rank that was through named it beside the one that both waited for."""
    results = run_ranks(one_is_held_up_in_a_tree, 4, True)
    assert results[1:] == [(0,)] * 3


def test_a_rank_that_is_through_with_a_tree_and_busy_is_not_named() -> None:
    """It has left no sign either, and would have been named beside the one that is held up."""
    assert run_ranks(one_is_held_up_in_a_tree, 4, False)[1:] == [(), (0,), ()]


def one_comes_alone(rank: int) -> Any:
    from metricfold.communicator import connect

    communicator = connect("alone", None, timedelta(seconds=1), 0)
    first = merged(communicator)
    if rank:
        time.sleep(3)
        return first
    return merged(communicator)


@pytest.mark.parametrize("world_size", [3, 4])
def test_all_that_do_not_come_to_a_tree_are_named(world_size: int) -> None:
    """Not only the one that the other waits for: nobody can have been through before it."""
    results = run_ranks(one_comes_alone, world_size)
    assert results == [tuple(range(1, world_size)), *[()] * (world_size - 1)]


def one_is_stopped_while_it_waits(rank: int) -> Any:
    job = dist.distributed_c10d._get_default_store()
    aggregator = MetricsAggregator(timeout=2)
    aggregator.reduce()
    if rank == 1:
        time.sleep(5.5)
    if rank == 2:
        job.set("stopped", str(os.getpid()))
        threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGSTOP)).start()
    seen = raised(aggregator)
    if rank == 0:
        os.kill(int(job.get("stopped")), signal.SIGCONT)
    return seen


def test_a_rank_that_is_stopped_in_the_call_is_named_and_that_it_was_there() -> None:
    text, missing = run_ranks(one_is_stopped_while_it_waits, 3)[0]
    assert missing == (1, 2)
    assert "rank 2 has stopped" in text


def one_has_logged_less(rank: int) -> Any:
    from metricfold.sinks import logger as module

    module._SAY_AFTER = 1.0
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("metricfold").addHandler(handler)
    aggregator = MetricsAggregator(timeout=20)
    with MetricsLogger([]) as logger:
        for step in range(2):
            aggregator.record("x", 1, "sum")
            if rank == 1 and step == 1:
                time.sleep(2.5)
            logger.log(step, aggregator, prefix="train")
    return said, aggregator.waits_for()


def test_a_close_that_waits_for_others_says_for_whom() -> None:
    said, after = run_ranks(one_has_logged_less, 3)[0]
    assert any("close() waits for rank(s) 1, not yet in the reduction" in text for text in said)
    assert after == ()


def one_closes(rank: int) -> Any:
    aggregator = MetricsAggregator(timeout=10)
    aggregator.reduce()
    if rank == 1:
        aggregator.close()
        time.sleep(2)
        return "closed"
    return raised(aggregator)


def test_a_rank_that_has_closed_its_aggregator_is_said_to_have() -> None:
    text, missing = run_ranks(one_closes, 2)[0]
    assert missing == (1,)
    assert "rank 1 had closed its aggregator" in text


_ENDS = """
    import os, sys
    import torch.distributed as dist
    from metricfold import MetricsAggregator, MissingRanksError

    other = os.fork()
    rank = 0 if other else 1
    store = dist.TCPStore("127.0.0.1", int(sys.argv[1]), is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    aggregator = MetricsAggregator(timeout=10)
    aggregator.reduce()
    if rank == 1:
        sys.exit()
    try:
        aggregator.reduce()
    except MissingRanksError as error:
        print(error)
    print(os.waitpid(other, 0)[1])
"""


def test_a_rank_that_has_ended_is_said_to_have() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = subprocess.run(
        [sys.executable, "-c", dedent(_ENDS), str(store.port)],
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
        check=True,
    )
    text, code = ranks.stdout.splitlines()
    assert "rank 1 has ended" in text
    assert code == "0"


def one_stops_as_it_comes(rank: int, at: int) -> Any:
    from metricfold.communicator import connect
    from metricfold.communicator.store import StoreClient

    communicator: Any = connect("stops", None, timedelta(seconds=2), 0)
    if rank == 1:
        said: list[str] = []

        def stopping(ask: Any) -> Any:
            def asked(client: Any, key: str, *args: Any, **options: Any) -> Any:
                if key.startswith(("met", "all")):
                    if len(said) == at:
                        time.sleep(6)
                    said.append(key)
                return ask(client, key, *args, **options)

            return asked

        StoreClient.set = stopping(StoreClient.set)  # type: ignore[method-assign]
        StoreClient.add = stopping(StoreClient.add)  # type: ignore[method-assign]
    return merged(communicator)


@pytest.mark.parametrize("at", [0, 1])
def test_a_rank_that_stops_as_it_comes_to_the_first_call_is_named(at: int) -> None:
    """The others waited for ever: it had said that it had come, but was not counted."""
    assert run_ranks(one_stops_as_it_comes, 2, at)[0] == (1,)


def one_does_not_connect(rank: int, why: str) -> Any:
    from torch.distributed import distributed_c10d as c10d

    aggregator = MetricsAggregator(timeout=2)
    if rank == 1 and why == "killed":
        c10d.ProcessGroupGloo = lambda *args: os._exit(3)
    if rank == 1 and why == "no such interface":
        os.environ["GLOO_SOCKET_IFNAME"] = "nope0"
    return raised(aggregator)


def test_a_rank_that_is_killed_between_meeting_and_connecting_is_named() -> None:
    text, missing = run_ranks(one_does_not_connect, 3, "killed", dies=(1,))[0]
    # "No rank is missing", it said.
    assert missing == (1,), text
    assert "rank 1 came, and has given no sign of life since" in text


def test_a_rank_whose_network_interface_does_not_exist_tells_all_at_once() -> None:
    results = run_ranks(one_does_not_connect, 2, "no such interface")
    assert [missing for _, missing in results] == [(), ()]
    for text, _ in results:
        # Only the one said so; the other waited for its timeout.
        assert "the connection between them failed on rank 1" in text
        assert "GLOO_SOCKET_IFNAME='nope0' must name network interfaces of" in text


def one_cannot_be_reached(rank: int, hosts: list[str]) -> Any:
    from torch.distributed import distributed_c10d as c10d

    from metricfold.communicator import torch as communicator

    communicator._CONNECT = 0.4  # gloo tries five times, each for so long
    if hosts:
        socket.gethostname = lambda: hosts[rank]
    aggregator = MetricsAggregator(timeout=2)
    if rank == 1:
        real = c10d.ProcessGroupGloo

        def publish_an_address_at_which_nobody_listens(store: Any, *args: Any) -> None:
            other = dist.PrefixStore("alone", store)
            group = real(other, 0, 1, *args[2:])
            published = other.get("0/0")
            del group
            store.set("0/1", published)
            time.sleep(3.5)
            os._exit(0)

        c10d.ProcessGroupGloo = publish_an_address_at_which_nobody_listens
    return raised(aggregator)


@pytest.mark.parametrize("hosts", [[], ["one", "another"]])
def test_a_connection_that_cannot_be_made_is_told_apart_from_a_missing_rank(
    hosts: list[str],
) -> None:
    text, missing = run_ranks(one_cannot_be_reached, 2, hosts, dies=(1,))[0]
    assert missing == ()
    assert "no rank is missing, but the connection between them failed" in text
    assert "127.0.0.1" in text
    # With all on one host a loopback address is right.
    assert ("a loopback address, which no other host can reach" in text) == bool(hosts)
    assert "GLOO_SOCKET_IFNAME" in text
