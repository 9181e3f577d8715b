"""A file that grows by whole pieces: what sinks that write files build on."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["AppendFile"]


class AppendFile:
    """Appends byte strings, each of them whole or not at all.

    Nothing is held back in the process: once `write` returns, the piece survives the process's
    death, SIGKILL included (not the machine's). When `write` raises, as on a full disk, what it
    got to is cut off again, so that it can be retried and readers never meet half a piece.

    Args:
        path: the file; it and the folders above it are made when missing.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)

    def write(self, piece: bytes) -> int:
        """Append `piece` and return its length in bytes."""
        start = os.fstat(self._descriptor).st_size
        rest = memoryview(piece)
        try:
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError:
            os.ftruncate(self._descriptor, start)
            raise
        return len(piece)

    def truncate(self, size: int) -> None:
        """Cut everything after the first `size` bytes."""
        os.ftruncate(self._descriptor, size)

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)
