"""Starts the ranks of a training job as processes of their own, and sees to it that none is left.

Each rank is told who it is by the environment, as torchrun does it. Rank 0 has the terminal; the
others write to files.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType

from metricfold.demo.texts import DemoError

__all__ = ["run_ranks"]

_GRACE = 5.0  # seconds to end in after SIGTERM


def run_ranks(
    module: str,
    arguments: Sequence[str],
    *,
    ranks: int,
    logs: Path,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Run ``python -m module arguments`` as `ranks` ranks, and return when all are done.

    When one rank fails, and on whatever ends this function early (Ctrl-C, SIGTERM), all others are
    ended too. Raises `DemoError` that says which rank failed, and why.
    """
    variables = {
        **os.environ,
        **environment,
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "OMP_NUM_THREADS": "1",
        # The ranks import what this process imports, and not what lies in the current folder.
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "PYTHONSAFEPATH": "1",
    }
    if sys.platform == "linux":
        # A machine whose own name does not resolve, as in many containers, still has a loopback.
        variables.setdefault("GLOO_SOCKET_IFNAME", "lo")
    command = [sys.executable, "-m", module, *arguments]
    processes: list[subprocess.Popen[bytes]] = []
    with _terminations_as_interrupts():
        try:
            with _interrupts_ignored():
                processes.extend(_start(command, variables, rank, logs) for rank in range(ranks))
            _wait_for_all(processes, logs)
        finally:
            _end(processes)


def _start(
    command: list[str], environment: dict[str, str], rank: int, logs: Path
) -> subprocess.Popen[bytes]:
    mine = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
    if rank == 0:
        return subprocess.Popen(command, env=mine)  # noqa: S603 - this Python, this package
    with (logs / f"rank-{rank}.log").open("wb") as log:
        return subprocess.Popen(command, env=mine, stdout=log, stderr=subprocess.STDOUT)  # noqa: S603


def _wait_for_all(processes: list[subprocess.Popen[bytes]], logs: Path) -> None:
    waiting = dict(enumerate(processes))
    while waiting:
        for rank, process in list(waiting.items()):
            code = process.poll()
            if code is not None:
                del waiting[rank]
            if code:
                raise DemoError(_reason(rank, code, logs))
        time.sleep(0.05)


def _reason(rank: int, code: int, logs: Path) -> str:
    if code < 0:
        memory = " (as the system does when memory runs out)" if -code == signal.SIGKILL else ""
        return f"rank {rank} was killed by {signal.Signals(-code).name}{memory}"
    if rank == 0:
        return f"rank 0 failed with exit code {code}: see what it printed above"
    log = logs / f"rank-{rank}.log"
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no message"]
    return f"rank {rank} failed with exit code {code}: {lines[-1].strip()} (all of it: {log})"


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    """End what still runs: politely, so that logs are written, then by force."""
    alive = [process for process in processes if process.poll() is None]
    for process in alive:
        process.terminate()
    deadline = time.monotonic() + _GRACE
    for process in alive:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(deadline - time.monotonic(), 0))
    for process in alive:
        if process.poll() is None:
            process.kill()
            process.wait()


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Let processes that are started inside ignore Ctrl-C: this process ends them in order."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _terminations_as_interrupts() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGTERM and on a closed terminal, so that ranks are ended."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = {
        number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
