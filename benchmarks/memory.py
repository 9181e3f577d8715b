"""How much memory this process holds, by the kernel's account: Python's, torch's and all other."""

from __future__ import annotations

from pathlib import Path

__all__ = ["forget_peak", "held", "peak"]

_STATUS = Path("/proc/self/status")


def held() -> int:
    """Return the bytes that the process holds now."""
    return _read("VmRSS")


def peak() -> int:
    """Return the most bytes that the process has ever held, or has since `forget_peak`."""
    return _read("VmHWM")


def forget_peak() -> None:
    """Let the peak begin anew, at what is held now."""
    Path("/proc/self/clear_refs").write_text("5")


def _read(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{_STATUS} has no {field}: memory is read from the Linux kernel's account")
