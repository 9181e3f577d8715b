"""Starts the ranks of a training job as processes of their own, and sees to it that none is left.

Each rank is told who it is by the environment, as torchrun does it. Rank 0 has the terminal; the
others write to files.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from metricfold.demo.texts import DemoError

__all__ = ["arguments_of_rank", "run_ranks"]

_GRACE = 5.0  # seconds to end in after SIGTERM


def run_ranks(
    module: str,
    arguments: Sequence[str],
    *,
    ranks: int,
    logs: Path,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Run ``python -m module arguments`` as `ranks` ranks, and return when all are done.

    When one rank fails, and on whatever ends this function early (Ctrl-C, SIGTERM), all others are
    ended too. Raises `DemoError` that says which rank failed, and why.
    """
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    # A machine whose own name does not resolve, as in many containers, still has a loopback.
    loopback = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    variables = {
        **loopback,
        **os.environ,
        **(environment or {}),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        # The ranks import what this process imports, and not what lies in the current folder.
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "PYTHONSAFEPATH": "1",
    }
    command = [sys.executable, "-m", module, *arguments]
    processes: list[subprocess.Popen[bytes]] = []
    with _signals(signal.default_int_handler, signal.SIGTERM, signal.SIGHUP):
        try:
            # The ranks ignore Ctrl-C, too: this process ends them in order.
            with _signals(signal.SIG_IGN, signal.SIGINT):
                processes.extend(_start(command, variables, rank, logs) for rank in range(ranks))
            _wait_for_all(processes, logs)
        finally:
            _end(processes)


def arguments_of_rank(module: str) -> argparse.Namespace:
    """Return what one rank's process was given: ``folder``, ``steps`` and ``resume``.

    From here on SIGTERM is an exit in order: workers stop, files are closed, the cursor comes back.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    parser = argparse.ArgumentParser(prog=f"python -m {module}")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--resume", action="store_true")
    return parser.parse_args()


def _start(
    command: list[str], environment: dict[str, str], rank: int, logs: Path
) -> subprocess.Popen[bytes]:
    mine = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
    if rank == 0:
        return subprocess.Popen(command, env=mine)  # noqa: S603 - this Python, this package
    with _log_of(rank, logs).open("wb") as log:
        return subprocess.Popen(command, env=mine, stdout=log, stderr=subprocess.STDOUT)  # noqa: S603


def _log_of(rank: int, logs: Path) -> Path:
    return logs / f"rank-{rank}.log"


def _wait_for_all(processes: list[subprocess.Popen[bytes]], logs: Path) -> None:
    while None in (codes := [process.poll() for process in processes]) or any(codes):
        for rank, code in enumerate(codes):
            if code:
                raise DemoError(_reason(rank, code, logs))
        time.sleep(0.05)


def _reason(rank: int, code: int, logs: Path) -> str:
    if code < 0:
        memory = " (as the system does when memory runs out)" if -code == signal.SIGKILL else ""
        return f"rank {rank} was killed by {signal.Signals(-code).name}{memory}"
    if rank == 0:
        return f"rank 0 failed with exit code {code}: see what it printed above"
    log = _log_of(rank, logs)
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no message"]
    return f"rank {rank} failed with exit code {code}: {lines[-1].strip()} (all of it: {log})"


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    """End what still runs: politely, so that logs are written, then by force."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + _GRACE
    for process in processes:
        try:
            process.wait(max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def _signals(handler: Any, *numbers: signal.Signals) -> Iterator[None]:
    """Handle signals so inside; Python's handler of Ctrl-C raises KeyboardInterrupt on any."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, one in before.items():
            signal.signal(number, one)
