"""Ports for ranks to meet at."""

from __future__ import annotations

import secrets
import socket
from contextlib import suppress

__all__ = ["free_port"]


def free_port() -> int:
    """Return a port on which nobody listens.

    It is not one of those that the system chooses: until a program listens there, another could get it.
    """
    while True:
        port = 10_000 + secrets.randbelow(20_000)
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
