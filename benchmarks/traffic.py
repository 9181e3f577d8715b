"""Counts the collectives that a rank issues and the bytes that it sends, whichever library it uses.

Collectives are what torch's profiler sees gloo start, on any thread, whether through
`torch.distributed` or on a group of a library's own. Bytes are what the kernel says it has sent on
the TCP sockets of this process: headers and all, by whatever algorithm gloo has chosen.
"""

from __future__ import annotations

import os
import socket
import stat
import struct
import time
from collections.abc import Callable
from pathlib import Path

from torch._C._profiler import _ExperimentalConfig
from torch.autograd.profiler import profile

_PREFIX = "gloo:"
_SETTLE = 0.05
"""After so many seconds the kernel has sent what it was given."""
_BYTES_SENT = 200
"""Where `struct tcp_info` has `tcpi_bytes_sent`, a 64-bit number."""


def traffic_of(call: Callable[[], object]) -> tuple[list[str], int]:
    """Return the name of each collective that `call` issues on this rank, in order, and bytes sent."""
    config = _ExperimentalConfig(profile_all_threads=True)
    time.sleep(_SETTLE)
    before = _bytes_sent()
    with profile(use_kineto=True, experimental_config=config) as profiled:
        call()
    time.sleep(_SETTLE)
    sent = _bytes_sent() - before
    names = [event.name for event in profiled.function_events]
    return [name.removeprefix(_PREFIX) for name in names if name.startswith(_PREFIX)], sent


def _bytes_sent() -> int:
    """Return how many bytes this process has sent on the TCP sockets that are open now."""
    return sum(_sent_on(int(entry.name)) for entry in Path("/proc/self/fd").iterdir())


def _sent_on(descriptor: int) -> int:
    try:
        if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            return 0
        duplicate = os.dup(descriptor)
    except OSError:
        return 0  # closed by now: it listed the others
    with socket.socket(fileno=duplicate) as connection:
        if connection.type != socket.SOCK_STREAM or connection.family == socket.AF_UNIX:
            return 0
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    if len(info) < _BYTES_SENT + 8:
        raise RuntimeError("this kernel does not count the bytes of a connection: Linux 4.19 does")
    return int(struct.unpack_from("=Q", info, _BYTES_SENT)[0])
