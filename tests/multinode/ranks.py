"""Ranks on the two hosts: forked, as all of the tests' ranks, and moved there before they meet."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ranks import run_ranks

from multinode.hosts import NAMES, Hosts

__all__ = ["enter", "run_on"]

_PORT = 29_500
_MOUNTS, _NAMES, _NETWORK = 0x00020000, 0x04000000, 0x40000000  # CLONE_NEWNS, _NEWUTS, _NEWNET
_BIND, _ALL_PRIVATE = 0x1000, 0x44000  # MS_BIND, MS_REC | MS_PRIVATE


def run_on(
    hosts: Hosts, function: Callable[..., Any], per_host: int, *args: Any, **limits: Any
) -> list[Any]:
    """Return what ``function(rank, *args)`` returned on each rank, of which each host has so many.

    The job itself has been told which interface to take, and nobody else, as where NCCL joins it.
    """
    places = [(host.pid, host.names) for host in hosts for _ in range(per_host)]
    return run_ranks(_there, len(places), function, places, *args, **limits)


def _there(
    rank: int, function: Callable[..., Any], places: list[tuple[int, Path]], *args: Any
) -> Any:
    import torch.distributed as dist

    dist.destroy_process_group()
    enter(*places[rank])
    os.environ["GLOO_SOCKET_IFNAME"] = "eth0"
    at = f"tcp://{NAMES[0]}:{_PORT}"
    dist.init_process_group("gloo", init_method=at, rank=rank, world_size=len(places))
    del os.environ["GLOO_SOCKET_IFNAME"]
    return function(rank, *args)


def enter(pid: int, names: Path) -> None:
    """Move this process to the host of that one: its network, its name, its `/etc/hosts`.

    Its `/proc` is no use to a process that was born elsewhere, so mounts are this process's own.
    """
    libc = ctypes.CDLL(None, use_errno=True)

    def call(function: Any, *args: Any) -> None:
        if function(*args):
            raise OSError(ctypes.get_errno(), f"the host of {pid} cannot be entered")

    for kind, what in (("net", _NETWORK), ("uts", _NAMES)):
        with Path(f"/proc/{pid}/ns/{kind}").open("rb") as space:
            call(libc.setns, space.fileno(), what)
    call(libc.unshare, _MOUNTS)
    call(libc.mount, None, b"/", None, _ALL_PRIVATE, None)
    call(libc.mount, os.fsencode(names), b"/etc/hosts", None, _BIND, None)
