"""Carry packets between the TUN devices of two hosts, each after a delay: `python wire.py PID PID`.

It says "ok" once both devices are there, and after each line that it reads: "carry SECONDS", "drop". It
ends with whoever wrote those.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import struct
import sys
import time
from collections import deque
from pathlib import Path

_TUN, _NO_HEADER = 0x0001, 0x1000  # linux/if_tun.h: IFF_TUN, IFF_NO_PI
_SET_INTERFACE = 0x400454CA  # TUNSETIFF
_NEW_NETWORK = 0x40000000  # CLONE_NEWNET
_MOST = 1 << 16  # bytes of a packet


def tun_of(pid: int) -> int:
    """Return a new device, "eth0", in the network of that process."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Path(f"/proc/{pid}/ns/net").open("rb") as network:
        if libc.setns(network.fileno(), _NEW_NETWORK):
            raise OSError(ctypes.get_errno(), "its network cannot be entered")
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, _SET_INTERFACE, struct.pack("16sH22x", b"eth0", _TUN | _NO_HEADER))
    return device


def carry(devices: list[int]) -> None:
    delay, carries = 0.0, False
    under_way: deque[tuple[float, int, bytes]] = deque()  # in order, for all take equally long
    while True:
        wait = max(under_way[0][0] - time.monotonic(), 0.0) if under_way else None
        ready, _, _ = select.select([*devices, 0], [], [], wait)
        if 0 in ready:
            if not (asked := os.read(0, 100)):
                return
            _, carries, seconds = asked.decode("ascii").partition("carry")
            delay = float(seconds or 0)
            under_way.clear()
            print("ok", flush=True)
        for number, device in enumerate(devices):
            if device in ready:
                packet = os.read(device, _MOST)
                if carries:
                    under_way.append((time.monotonic() + delay, devices[1 - number], packet))
        while under_way and under_way[0][0] <= time.monotonic():
            _, to, packet = under_way.popleft()
            os.write(to, packet)


if __name__ == "__main__":
    both = [tun_of(int(pid)) for pid in sys.argv[1:]]
    print("ok", flush=True)
    carry(both)
