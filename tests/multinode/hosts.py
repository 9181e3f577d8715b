"""Two hosts on one machine: namespaces of the kernel, joined by a link that can be slow, or cut.

    with Hosts(delay=0.01) as hosts:            # seconds, one way; None: as fast as it goes
        jobs = [host.start(["hostname", "-I"]) for host in hosts]
        hosts.cut()

A host has interfaces, a name, an `/etc/hosts` and processes of its own. Nothing of it has a name outside,
and its first process, and so all of them, ends with this one, whatever ends that: nothing is to be cleaned up.

Where there is no delay the link is a veth pair, and to cut it is to take it down. A kernel need not have
netem, so a link with a delay is a process that carries packets between two TUN devices: to cut it is to
drop them, of which neither host hears.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

__all__ = ["ADDRESSES", "NAMES", "Host", "Hosts", "why_not"]

ADDRESSES = ("10.77.0.1", "10.77.0.2")
NAMES = ("node-1", "node-2")
_TOOLS = ("ip", "unshare", "nsenter")
_NAMESPACES = ("--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child")
_SECONDS = 10.0


def why_not() -> str:
    """Return why there can be no hosts here, or nothing."""
    if os.geteuid():
        return "needs root, to make network namespaces"
    if lacking := [tool for tool in _TOOLS if shutil.which(tool) is None]:
        return f"needs {' and '.join(lacking)} (Debian packages iproute2 and util-linux)"
    link = ["ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth1"]
    tried = subprocess.run(
        ["unshare", *_NAMESPACES, *link], capture_output=True, text=True, check=False
    )
    return f"this kernel makes no hosts: {tried.stderr.strip()}" if tried.returncode else ""


class Host:
    """One of the two.

    Args:
        number: 0 or 1.
        names: what its `/etc/hosts` holds.
        name: its own.
    """

    def __init__(self, number: int, names: Path, name: str) -> None:
        self.number, self.address, self.names = number, ADDRESSES[number], names
        setup = (
            f"hostname {name} && mount --bind {names} /etc/hosts && ip link set lo up "
            "&& echo ready && exec cat"
        )
        self._first = subprocess.Popen(
            ["unshare", *_NAMESPACES, "sh", "-c", setup],
            stdin=subprocess.PIPE,  # which closes with this process, and with it the host ends
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._first.stdout is not None
        with self._first.stdout as said:
            if said.readline() != "ready\n":
                raise RuntimeError(f"{NAMES[number]} cannot be set up")
        children = Path(f"/proc/{self._first.pid}/task/{self._first.pid}/children")
        self.pid = int(children.read_text("ascii").split()[0])

    def start(self, command: Sequence[str], **given: Any) -> subprocess.Popen[str]:
        """Begin a command there; it ends with the host."""
        here = ["sh", "-c", 'cd "$0" && exec "$@"', os.fspath(Path.cwd())]
        return subprocess.Popen(
            ["nsenter", "--target", str(self.pid), "--all", *here, *command], text=True, **given
        )

    def run(self, *command: str) -> str:
        """Return what a command prints there."""
        job = self.start(command, stdout=subprocess.PIPE)
        said, _ = job.communicate(timeout=_SECONDS)
        if job.returncode:
            raise RuntimeError(f"{NAMES[self.number]}: {' '.join(command)} has failed")
        return said

    def bridge(self, name: str, address: str) -> None:
        """Add an interface that leads nowhere."""
        self.run("ip", "link", "add", name, "type", "bridge")
        self.run("ip", "address", "add", address, "dev", name)
        self.run("ip", "link", "set", name, "up")

    def kill_all(self) -> None:
        """Kill all that runs there, and leave the host itself: it is as new."""
        self.run("sh", "-c", "kill -9 -1")

    def kill(self) -> None:
        """Take the host away, with all that runs there."""
        self._first.kill()
        self._first.communicate()


class Hosts:
    """Two hosts and the link between them.

    Args:
        delay: seconds that a packet is under way; None: a link without delay.
        resolves: to which addresses the hosts' own names resolve; Debian writes 127.0.1.1.
        own_names: what they call themselves; those of copies are alike, and known to no one.
    """

    def __init__(
        self,
        delay: float | None = None,
        resolves: Sequence[str] | None = None,
        own_names: Sequence[str] = NAMES,
    ) -> None:
        self._delay, self._resolves, self._own_names = delay, resolves, own_names
        self._open = ExitStack()

    def __enter__(self) -> Hosts:  # noqa: PYI034 - Self is of Python 3.11
        with ExitStack() as opened:
            folder = Path(opened.enter_context(tempfile.TemporaryDirectory()))
            self._hosts = []
            for number in range(2):
                names = folder / f"hosts-{number}"
                names.write_text(self._names(number), "ascii")
                self._hosts.append(Host(number, names, self._own_names[number]))
                opened.callback(self._hosts[-1].kill)
            self._link: Any = (
                _Veth(self._hosts) if self._delay is None else _Wire(self._hosts, self._delay)
            )
            opened.callback(self._link.end)
            for host in self._hosts:
                host.run("ip", "address", "add", f"{host.address}/24", "dev", "eth0")
            self._link.up()
            self._open = opened.pop_all()
        return self

    def __exit__(self, *raised: object) -> None:
        self._open.close()

    def __iter__(self) -> Iterator[Host]:
        return iter(self._hosts)

    def __getitem__(self, number: int) -> Host:
        return self._hosts[number]

    def delay(self, seconds: float) -> None:
        """Let packets be under way for so long, on a link that has a delay."""
        self._link.delay(seconds)

    def cut(self) -> None:
        self._link.down()

    def mend(self) -> None:
        self._link.up()

    def _names(self, number: int) -> str:
        known = dict(zip(NAMES, ADDRESSES, strict=True))
        if self._resolves is not None:
            known[NAMES[number]] = self._resolves[number]
        lines = [f"{address} {name}" for name, address in known.items()]
        return "\n".join(["127.0.0.1 localhost", *lines, ""])


class _Veth:
    """A veth pair, one end on each host."""

    def __init__(self, hosts: Sequence[Host]) -> None:
        self._hosts = hosts
        peer = ["peer", "name", "eth0", "netns", str(hosts[1].pid)]
        # The first host sees no process of the second: it is told by whoever sees both.
        enter = ["nsenter", f"--net=/proc/{hosts[0].pid}/ns/net"]
        add = ["ip", "link", "add", "eth0", "type", "veth", *peer]
        subprocess.run([*enter, *add], check=True)

    def up(self) -> None:
        for host in self._hosts:
            host.run("ip", "link", "set", "eth0", "up")

    def down(self) -> None:
        self._hosts[1].run("ip", "link", "set", "eth0", "down")

    def end(self) -> None:
        """It ends with the hosts."""


class _Wire:
    """A process that carries packets."""

    def __init__(self, hosts: Sequence[Host], delay: float) -> None:
        program, self._seconds = os.fspath(Path(__file__).with_name("wire.py")), delay
        ends = [str(host.pid) for host in hosts]
        self._carrier = subprocess.Popen(
            [sys.executable, program, *ends],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answered()
        for host in hosts:
            host.run("ip", "link", "set", "eth0", "up")

    def delay(self, seconds: float) -> None:
        self._seconds = seconds
        self.up()

    def up(self) -> None:
        self._ask(f"carry {self._seconds}")

    def down(self) -> None:
        self._ask("drop")

    def _ask(self, what: str) -> None:
        assert self._carrier.stdin is not None
        self._carrier.stdin.write(f"{what}\n")
        self._carrier.stdin.flush()
        self._answered()

    def _answered(self) -> None:
        assert self._carrier.stdout is not None
        if not self._carrier.stdout.readline():
            raise RuntimeError("what carries packets between the hosts has ended")

    def end(self) -> None:
        self._carrier.kill()
        self._carrier.communicate()
