"""Run functions on real JAX processes, connected by a coordinator, killed if they hang.

    def total(rank):
        ...
        return aggregator.get_metrics_for_logging()

    results = run_processes(total, 4)      # [result of process 0, of process 1, ...]

Starting JAX takes seconds, so the processes of one world serve one call after the other; a world in
which something went wrong is killed, and the next call starts another. JAX is never imported by
pytest's own process. Where JAX is not installed, the tests are skipped.
"""

from __future__ import annotations

import atexit
import importlib
import multiprocessing
import os
import socket
import time
import traceback
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from multiprocessing.connection import Connection, wait
from typing import Any

import pytest

_context = multiprocessing.get_context("spawn")


class ProcessError(AssertionError):
    """A process raised, died or hung; the message holds its traceback."""


class World:
    """So many JAX processes, which run one function after another."""

    def __init__(self, size: int) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(size):
            ours, theirs = _context.Pipe()
            # No daemon: data loaders in it have workers of their own.
            process = _context.Process(target=_serve, args=(rank, size, port, theirs))
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(
        self, function: Callable[..., Any], *args: Any, timeout: float, dies: tuple[int, ...] = ()
    ) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((function.__module__, function.__qualname__, args))
        deadline = time.monotonic() + timeout
        results: dict[int, Any] = {}
        waiting = {pipe: rank for rank, pipe in enumerate(self.pipes)}
        while waiting:
            ready = wait(list(waiting), timeout=max(deadline - time.monotonic(), 0))
            if not ready:
                raise ProcessError(f"processes {sorted(waiting.values())} hang")
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    kind, content = pipe.recv()
                except EOFError:
                    if rank in dies:
                        results[rank] = None
                        continue
                    raise ProcessError(f"process {rank} died") from None
                if kind == "error":
                    raise ProcessError(f"process {rank}: {content}")
                results[rank] = content
        return [results[rank] for rank in range(len(self.pipes))]

    def kill(self) -> None:
        # The coordinator last, for the others make a noise when they lose it.
        for process in reversed(self.processes):
            process.kill()  # JAX catches SIGTERM
            process.join()


_worlds: dict[int, World] = {}


def run_processes(
    function: Callable[..., Any],
    size: int,
    *args: Any,
    timeout: float = 60.0,
    dies: tuple[int, ...] = (),
) -> list[Any]:
    """Return what ``function(rank, *args)`` returned on each process.

    Args:
        function: importable, so defined at the top of a test module.
        size: how many processes.
        args: passed to every process.
        timeout: seconds until all are killed.
        dies: processes that are meant to end without a result.
    """
    if not find_spec("jax"):
        pytest.skip("needs JAX")
    world = _worlds.pop(size, None) or World(size)
    try:
        results = world.run(function, *args, timeout=timeout, dies=dies)
    except BaseException:
        world.kill()  # what went wrong there must not reach the next test
        raise
    if dies:
        world.kill()
    else:
        _worlds[size] = world
    return results


@atexit.register
def end_processes() -> None:
    while _worlds:
        _worlds.popitem()[1].kill()


def _serve(rank: int, size: int, port: int, pipe: Connection) -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["OMP_NUM_THREADS"] = "1"
    warnings.simplefilter("error")
    import jax

    jax.distributed.initialize(f"127.0.0.1:{port}", size, rank)
    while True:
        try:
            module, name, args = pipe.recv()
        except EOFError:
            os._exit(0)  # a polite goodbye would wait for the others
        try:
            function = getattr(importlib.import_module(module), name)
            answer = "result", function(rank, *args)
        except BaseException:
            answer = "error", traceback.format_exc()
        pipe.send(answer)
