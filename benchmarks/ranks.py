"""Real ranks: one process each, connected by gloo, killed if one of them fails or hangs.

Each finds itself in the environment that `torchrun` makes, for libraries that read it.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

__all__ = ["run_ranks"]


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 300.0,
    group_timeout: float = 300.0,
    preload: str = "metricfold",
) -> list[Any]:
    """Return what ``function(rank, *args)`` returned on each rank.

    Args:
        function: importable.
        world_size: how many ranks.
        args: passed to every rank.
        timeout: seconds until all ranks are killed.
        group_timeout: the process group's own timeout in seconds.
        preload: a module that ranks find imported; the first call in a process decides.
    """
    import torch.distributed as dist

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed", preload])
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipes: dict[Connection, int] = {}
    processes = []
    try:
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_run_rank,
                args=(function, rank, world_size, store.port, group_timeout, sender, args),
                daemon=True,
            )
            process.start()
            sender.close()
            pipes[receiver] = rank
            processes.append(process)
        return _collect(pipes, time.monotonic() + timeout)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _collect(pipes: dict[Connection, int], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    world_size = len(pipes)
    while pipes:
        ready = wait(list(pipes), timeout=max(deadline - time.monotonic(), 0))
        if not ready:
            raise RuntimeError(f"ranks {sorted(pipes.values())} did not finish in time")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = pipes.pop(pipe)
            try:
                failure, results[rank] = pipe.recv()
            except EOFError:
                failure = "it died"
            if failure:
                raise RuntimeError(f"rank {rank} failed: {failure}")
    return [results[rank] for rank in range(world_size)]


def _run_rank(
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    port: int,
    group_timeout: float,
    sender: Connection,
    args: tuple[Any, ...],
) -> None:
    import torch
    import torch.distributed as dist

    # Ranks share few cores: more threads each would only wait for one another.
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.update(_as_torchrun(rank, world_size, port))
    try:
        store = dist.TCPStore("127.0.0.1", port, is_master=False)
        dist.init_process_group(
            "gloo",
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=group_timeout),
        )
        result = function(rank, *args)
        dist.barrier()
        sender.send(("", result))
    except BaseException:  # noqa: BLE001 - it is told to whoever waits for the result
        sender.send((traceback.format_exc(), None))
        sys.exit(1)
    # Others may still read from this one's sockets.
    time.sleep(0.05)


def _as_torchrun(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "benchmarks",
    }
