"""Worlds of ranks, for tests and benchmarks alike: processes joined by gloo, or threads.

    def total(rank):
        ...
        return aggregator.get_metrics_for_logging()

    results = run_ranks(total, 4)      # [result of rank 0, of rank 1, ...]

Processes are forked from a server that has torch loaded, so that starting one is cheap, and killed if
they hang. Threads need nothing.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from typing import Any

from metricfold.communicator.threads import thread_world

_context = multiprocessing.get_context("forkserver")
_preloaded = ["torch", "torch.distributed", "metricfold"]
_context.set_forkserver_preload(_preloaded)
# Ranks share few cores: more threads each would only wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")


class RankError(AssertionError):
    """A rank raised, died or hung; the message holds its traceback."""


def preload(*modules: str) -> None:
    """Load further modules before ranks are forked: ranks that start from now on find them there."""
    _preloaded.extend(modules)
    _context.set_forkserver_preload(_preloaded)
    # A server that has forked ranks already knows nothing of them; the next rank starts another.
    forkserver._forkserver._stop()


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 150.0,
    group_timeout: float = 60.0,
    dies: tuple[int, ...] = (),
) -> list[Any]:
    """Return what ``function(rank, *args)`` returned on each rank.

    Args:
        function: importable, so defined at the top of a module.
        world_size: how many ranks.
        args: passed to every rank.
        timeout: seconds until all ranks are killed.
        group_timeout: the process group's own timeout in seconds.
        dies: ranks that are meant to end without a result.
    """
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipes: list[Connection] = []
    processes = []
    try:
        for rank in range(world_size):
            receiver, sender = _context.Pipe(duplex=False)
            process = _context.Process(
                target=_run_rank,
                args=(function, rank, world_size, store.port, group_timeout, sender, args),
            )
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        return collected(pipes, time.monotonic() + timeout, dies)
    finally:
        for process in processes:
            process.kill()
            process.join()


def collected(pipes: list[Connection], deadline: float, dies: tuple[int, ...] = ()) -> list[Any]:
    """Return what each rank sends by its pipe: a pair of "result" or "error" and what that is.

    Raises:
        RankError: a rank has sent an error, has died though it is not of those that `dies` names, or
            sends nothing until the deadline on the monotonic clock.
    """
    results: dict[int, Any] = {}
    errors: dict[int, str] = {}
    open_pipes = {pipe: rank for rank, pipe in enumerate(pipes)}
    while open_pipes and not errors:
        ready = wait(list(open_pipes), timeout=max(deadline - time.monotonic(), 0))
        if not ready:
            raise RankError(f"ranks {sorted(open_pipes.values())} hang")
        for pipe in ready:
            rank = open_pipes.pop(pipe)
            try:
                kind, content = pipe.recv()
            except EOFError:
                if rank not in dies:
                    errors[rank] = "died"
                continue
            if kind == "result":
                results[rank] = content
            else:
                errors[rank] = content
    if errors:
        raise RankError("\n".join(f"rank {rank}: {text}" for rank, text in errors.items()))
    return [results.get(rank) for rank in range(len(pipes))]


def _run_rank(
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    port: int,
    group_timeout: float,
    sender: Connection,
    args: tuple[Any, ...],
) -> None:
    gc.freeze()  # what was imported stays: the collector need not look at it in each rank again
    # Data workers of this rank start as in any other process, not from a server of its own.
    multiprocessing.set_start_method(None, force=True)
    import torch.distributed as dist

    try:
        store = dist.TCPStore("127.0.0.1", port, is_master=False)
        dist.init_process_group(
            "gloo",
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=group_timeout),
        )
        sender.send(("result", function(rank, *args)))
    except BaseException:
        sender.send(("error", traceback.format_exc()))
        raise
    finally:
        # Ranks that still need this one's sockets or store must not find them gone.
        sender.close()
        time.sleep(0.05)


def run_threads(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 150.0
) -> list[Any]:
    """Return what ``function(communicator, *args)`` returned on each of `world_size` threads.

    The same protocol as over processes, without the price of starting them.
    """
    worlds = thread_world(world_size, timeout)
    with ThreadPoolExecutor(world_size) as pool:
        futures = [pool.submit(function, communicator, *args) for communicator in worlds]
        return [future.result(timeout) for future in futures]
