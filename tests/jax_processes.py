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
import inspect
import multiprocessing
import os
import time
import traceback
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from multiprocessing.connection import Connection
from typing import Any

import pytest
from benchmarks.ranks import collected
from ports import free_port

_context = multiprocessing.get_context("spawn")


class World:
    """So many JAX processes, which run one function after another.

    Args:
        size: how many.
        begin: called first in each, with its number and `args`; returns what functions are given first.
        args: for `begin`.
    """

    def __init__(self, size: int, begin: Callable[..., tuple[Any, ...]], *args: Any) -> None:
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(size):
            ours, theirs = _context.Pipe()
            # No daemon: data loaders in it have workers of their own.
            process = _context.Process(target=_serve, args=(theirs, begin, rank, *args))
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    @classmethod
    def connected(cls, size: int) -> World:
        """Return processes that a coordinator connects."""
        port = free_port()
        return cls(size, _connected, size, port)

    def run(
        self,
        function: Callable[..., Any],
        *args: Any,
        timeout: float,
        dies: tuple[int, ...] = (),
        **kwargs: Any,
    ) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((function.__module__, function.__qualname__, args, kwargs))
        results = collected(self.pipes, time.monotonic() + timeout, dies)
        for result in results:
            if isinstance(result, _Skipped):
                pytest.skip(str(result))
        return results

    def kill(self) -> None:
        # The coordinator last, for the others make a noise when they lose it.
        for process in reversed(self.processes):
            process.kill()  # JAX catches SIGTERM
            process.join()


class _Skipped(str):
    """Why a test cannot be run there."""

    __slots__ = ()


_worlds: dict[Any, World] = {}


def run_in(
    make: Callable[[int], World],
    size: int,
    function: Callable[..., Any],
    /,
    *args: Any,
    dies: tuple[int, ...] = (),
    **options: Any,
) -> list[Any]:
    """Return what each process of the world that `make` makes for `size` returned.

    The world is there for the next call, unless something went wrong in it.
    """
    world = _worlds.pop((make, size), None) or make(size)
    try:
        results = world.run(function, *args, dies=dies, **options)
    except pytest.skip.Exception:
        _worlds[make, size] = world
        raise
    except BaseException:
        world.kill()  # what went wrong there must not reach the next test
        raise
    if dies:
        world.kill()
    else:
        _worlds[make, size] = world
    return results


def run_processes(
    function: Callable[..., Any],
    size: int,
    *args: Any,
    timeout: float = 150.0,
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
    return run_in(World.connected, size, function, *args, timeout=timeout, dies=dies)


@atexit.register
def end_processes() -> None:
    while _worlds:
        _worlds.popitem()[1].kill()


def _connected(rank: int, size: int, port: int) -> tuple[int]:
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["OMP_NUM_THREADS"] = "1"
    import jax

    jax.distributed.initialize(f"127.0.0.1:{port}", size, rank)
    return (rank,)


def _serve(pipe: Connection, begin: Callable[..., tuple[Any, ...]], rank: int, *args: Any) -> None:
    warnings.simplefilter("error")
    leading = begin(rank, *args)
    while True:
        try:
            module, name, given, kwargs = pipe.recv()
        except EOFError:
            os._exit(0)  # a polite goodbye would wait for the others
        try:
            function: Any = importlib.import_module(module)
            for part in name.split("."):
                function = getattr(function, part)
            answer = "result", inspect.unwrap(function)(*leading, *given, **kwargs)
        except pytest.skip.Exception as reason:
            answer = "result", _Skipped(reason)
        except BaseException:
            answer = "error", traceback.format_exc()
        pipe.send(answer)
