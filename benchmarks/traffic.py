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
from pathlib import Path

from torch._C._profiler import _ExperimentalConfig
from torch.autograd.profiler import profile

_PREFIX = "gloo:"
_SETTLE = 0.05
"""After so many seconds the kernel has sent what it was given."""
_BYTES_SENT = 200
"""Where `struct tcp_info` has `tcpi_bytes_sent`, a 64-bit number."""


class Traffic:
    """Counts what this rank does between `begin` and `end`.

    Attributes:
        kinds: name of each collective, in order.
        sent: bytes sent.
    """

    def __init__(self) -> None:
        self.kinds: list[str] = []
        self.sent = 0
        self._profile = profile(
            use_kineto=True, experimental_config=_ExperimentalConfig(profile_all_threads=True)
        )

    def begin(self) -> None:
        time.sleep(_SETTLE)
        self._sent_before = bytes_sent()
        self._profile.__enter__()

    def end(self) -> None:
        self._profile.__exit__(None, None, None)
        time.sleep(_SETTLE)
        self.sent = bytes_sent() - self._sent_before
        self.kinds = [
            event.name.removeprefix(_PREFIX)
            for event in self._profile.function_events
            if event.name.startswith(_PREFIX)
        ]


def bytes_sent() -> int:
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
