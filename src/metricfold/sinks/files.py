"""A file that grows by whole pieces: what sinks that write files build on."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
import weakref
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from metricfold.sinks.loud import mention
from metricfold.sinks.selection import SelectiveSink

try:
    import fcntl
except ImportError:  # not POSIX
    fcntl = None  # type: ignore[assignment]

__all__ = ["HEAD", "AppendFile", "FileSink", "LinesSink"]

HEAD = 1 << 20
"""So many bytes of a file show whose it is."""
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
"""What file systems without locks answer, such as some of networks."""


class AppendFile:
    """Appends byte strings, each of them whole or not at all.

    Nothing is held back in the process: once `write` returns, the piece survives the process's
    death, SIGKILL included (not the machine's). When `write` raises, as on a full disk, what it
    got to is cut off again, so that it can be retried and readers never meet half a piece. The file
    and the folders above it are made when missing.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        self.identity = _identity(os.fstat(self._descriptor))
        self.locked = False  # True: no other process can write to the file
        self._process = os.getpid()
        self._users = 1
        # For one who does several things that belong together to a file that is shared.
        self.guard = threading.RLock()

    @classmethod
    def shared(cls, path: Path) -> AppendFile:
        """Return the one file that all in this process share, locked against other processes."""
        file = cls(path)
        with _sharing, contextlib.ExitStack() as undo:
            undo.callback(file.close)
            for other in _shared:
                # Before the guard: a write to another file, whose server is away, may hold that.
                if other.identity == file.identity and other.join(file.identity):
                    return other
            if file.regular:
                file.locked = _lock(file._descriptor, path)
            _shared.add(file)
            undo.pop_all()
        return file

    def join(self, identity: tuple[int, int]) -> bool:
        with self.guard:
            is_open = self._descriptor >= 0 and self._process == os.getpid()
            joined = is_open and self.identity == identity
            self._users += joined
            return joined

    @property
    def regular(self) -> bool:
        """Whether it can be read and cut: not a terminal, a pipe or another device."""
        return stat.S_ISREG(os.fstat(self._descriptor).st_mode)

    @property
    def size(self) -> int:
        return os.fstat(self._descriptor).st_size

    def current(self) -> bool:
        """Return whether the path still names the open file, which may have been moved or removed."""
        try:
            # Both are asked: the server may have forgotten the open one.
            return _identity(self.path.stat()) == _identity(os.fstat(self._descriptor))
        except OSError:
            return False

    def write(self, piece: bytes) -> int:
        """Append `piece` and return its length in bytes."""
        with self.guard:
            start = self.size
            rest = memoryview(piece)
            try:
                while rest:
                    rest = rest[os.write(self._descriptor, rest) :]
            except OSError:
                # What another process may have written behind it is not cut off with it.
                alone = self.locked or self.size == start + len(piece) - len(rest)
                if alone and self.regular:
                    os.ftruncate(self._descriptor, start)
                raise
            return len(piece)

    def read(self, size: int, offset: int) -> bytes:
        """Return up to `size` bytes from `offset` on."""
        return os.pread(self._descriptor, size, offset)

    def last_line(self) -> bytes:
        """Return what follows the last line break."""
        whole, count = self.size, 1 << 16
        while True:
            text = self.read(min(count, whole), max(0, whole - count))
            if b"\n" in text or count >= whole:
                return text.rpartition(b"\n")[2]
            count *= 2

    def truncate(self, size: int) -> None:
        os.ftruncate(self._descriptor, size)

    def replace(self, pieces: Iterable[bytes]) -> None:
        """Put `pieces` in the place of all that the file holds: all of them, or it stays as it was.

        A symbolic link stays one.
        """
        target = Path(os.path.realpath(self.path))
        beside = target.with_name(f"{target.name}.rewinding")
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC
        new = os.open(beside, flags, 0o600)
        try:
            os.fchmod(new, stat.S_IMODE(os.fstat(self._descriptor).st_mode))
            with os.fdopen(os.dup(new), "wb") as file:
                file.writelines(pieces)
                file.flush()
                os.fsync(new)
            if self.locked:
                _lock(new, beside)
            beside.replace(target)
        except BaseException:
            os.close(new)
            beside.unlink(missing_ok=True)
            raise
        old, self._descriptor = self._descriptor, new
        self.identity = _identity(os.fstat(new))
        os.close(old)
        # Not all file systems let a folder be opened and synced.
        with contextlib.suppress(OSError), contextlib.ExitStack() as after:
            folder = os.open(target.parent, os.O_RDONLY)
            after.callback(os.close, folder)
            os.fsync(folder)

    def close(self) -> None:
        """Close the file, if nobody shares it any more."""
        with self.guard:
            self._users -= 1
            if self._users or self._descriptor < 0:
                return
            descriptor, self._descriptor = self._descriptor, -1
            if self.locked:
                # A fork, such as a data worker, shares the lock and would keep it.
                with contextlib.suppress(OSError):
                    fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)


class FileSink(SelectiveSink):
    """A sink that writes to one file at a time, and holds nothing back."""

    _file: AppendFile | None = None

    @abstractmethod
    def _new_file(self) -> AppendFile: ...

    def _opened(self) -> AppendFile:
        """Return the file, a new one if its path does not name the open one any more."""
        if self._file is not None and not self._file.current():
            mention(
                f"{self._file.path} has been moved or removed while {self!r} was writing to it, or its server "
                "was away: a new one is begun"
            )
            self.close()
        if self._file is None:
            self._file = self._new_file()
        return self._file

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class LinesSink(FileSink):
    """A sink that appends lines to a file, and cuts those of later steps out of it.

    An existing file of its own lines is continued, any other is left as it is. One process at a time
    writes to a file; sinks of one process share it.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        select: str | Sequence[str] = "*",
        key_format: str | Callable[[str], str] = "{key}",
    ) -> None:
        super().__init__(select=select, key_format=key_format)
        self.path = Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would follow links
        self._end = 0  # where the file ended when this sink last saw it
        self._forget(cut=True)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r})"

    @abstractmethod
    def _is_ours(self, start: bytes) -> bool:
        """Return whether a file that starts like this is one of this sink, or was to become one."""

    @abstractmethod
    def _is_half(self, last: bytes) -> bool:
        """Return whether `last`, behind which no line ends, is what a crash has left of a line."""

    @abstractmethod
    def _lines(self) -> Iterator[tuple[int, bytes, int | None]]:
        """Yield where each line starts, its text with its line break, and the step of its record."""

    @abstractmethod
    def _forget(self, *, cut: bool) -> None:
        """Forget what the file said: others have added lines to it, or it is new or was `cut`."""

    def rewind(self, step: int) -> None:
        """Cut the lines of the steps after `step` out of the file."""
        if not self.path.exists():
            return
        self._forget(cut=True)
        with self._held() as file:
            if not file.regular:
                raise ValueError(f"{self.path} is a terminal or a pipe, which cannot be rewound")
            cut, scattered = None, False  # where the first line to take away starts
            for start, _, at in self._lines():
                if at is not None and at > step:
                    cut = start if cut is None else cut
                elif cut is not None:
                    scattered = True
            if scattered:  # someone logged steps out of order
                lines = self._lines()
                file.replace(text for _, text, at in lines if at is None or at <= step)
            elif cut is not None:
                # At once, and without room on the disk.
                file.truncate(cut)

    @contextlib.contextmanager
    def _held(self) -> Iterator[AppendFile]:
        """Keep those away who share the file, whose last line is whole, until all is done."""
        file = self._opened()
        with file.guard:
            if file.size != self._end and file.regular:  # somebody has cut it, or written to it
                self._forget(cut=file.size < self._end)
                self._mend_last_line(file)
            yield file
            self._end = file.size

    def _mend_last_line(self, file: AppendFile) -> None:
        """Give the file an end that a line can follow: a broken last line would swallow the next."""
        last = file.last_line()
        # Without a lock it may be what another process is about to finish.
        if last and file.locked and self._is_half(last):
            file.truncate(file.size - len(last))
        elif last:
            file.write(b"\n")

    def _new_file(self) -> AppendFile:
        file = AppendFile.shared(self.path)
        with contextlib.ExitStack() as undo:
            undo.callback(file.close)
            start = file.read(HEAD, 0) if file.regular else b""
            if start and not self._is_ours(start):
                first = start.partition(b"\n")[0][:40]
                raise FileExistsError(
                    errno.EEXIST,
                    f"holds something else than records of {type(self).__name__} ({first!r}), and is "
                    "left as it is: give another path, or move the file away",
                    str(self.path),
                )
            undo.pop_all()
        self._end = -1
        self._forget(cut=True)
        return file


_shared: weakref.WeakSet[AppendFile] = weakref.WeakSet()
_sharing = threading.Lock()


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _lock(descriptor: int, path: Path) -> bool:
    """Lock the file against other processes; return whether that is possible here."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BlockingIOError(
            errno.EWOULDBLOCK,
            "another process writes to this file, and two would cut each other's lines: give "
            "each one its own, or end the other",
            str(path),
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True
