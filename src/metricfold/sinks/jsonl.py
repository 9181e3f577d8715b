"""Records as JSON lines: a file that any tool reads, and that loses nothing.

    {"step": 50, "wall_time": 1760000000.0, "prefix": "train", "metrics": {"train/loss": 2.31},
     "histograms": {}}

`metricfold.sinks.lines` says what a line holds; `metricfold.look` reads whole runs fast.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from metricfold.sinks.files import AppendFile, FileSink
from metricfold.sinks.lines import (
    HEAD,
    began,
    decoded,
    encoded,
    is_ours,
    lines_of,
    no_record,
    parsed,
)
from metricfold.sinks.loud import mention
from metricfold.sinks.record import Meaning, Record

__all__ = ["JSONLSink", "read_jsonl"]


class JSONLSink(FileSink):
    """Appends each record to a file as one line of JSON.

    A line is in the file, whole, as soon as it is written: a process that is killed loses none.
    An existing file of records is continued; any other file is left as it is, and nothing is
    written. After a resume, `MetricsLogger.rewind` takes away the lines of the steps that will be
    run again. One process at a time writes to a file: a second one waits, and writes once the first
    has closed it. If the file is moved or removed, a new one is begun.

    Args:
        path: the file; made at the first record, with the folders above it. A relative one is meant
            from the folder that is current when the sink is made.
        select: see `SelectiveSink`.
        key_format: see `SelectiveSink`.
        arrays: whether to write the cells of metrics with axes, which may be many.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        select: str | Sequence[str] = "*",
        key_format: str | Callable[[str], str] = "{key}",
        arrays: bool = True,
    ) -> None:
        super().__init__(select=select, key_format=key_format)
        self.arrays = arrays
        self.path = Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would follow links
        self._end = 0  # where the file ended when this sink last saw it
        self._header: dict[str, Any] | None = None  # what is known of the run
        self._begin_telling()

    def __repr__(self) -> str:
        return f"JSONLSink({str(self.path)!r})"

    def rewind(self, step: int) -> None:
        """Cut the lines of the steps after `step` out of the file."""
        if not self.path.exists():
            return
        self._begin_telling()
        with self._held() as file:
            if not file.regular:
                raise ValueError(f"{self.path} is a terminal or a pipe, which cannot be rewound")
            cut, scattered = None, False  # where the first line to take away starts
            for line in lines_of(self.path):
                if line.is_later(step):
                    cut = line.start if cut is None else cut
                elif cut is not None:
                    scattered = True
            if scattered:  # someone logged steps out of order
                lines = lines_of(self.path)
                file.replace(line.text for line in lines if not line.is_later(step))
            elif cut is not None:
                # At once, and without room on the disk.
                file.truncate(cut)

    def _write(self, record: Record) -> None:
        with self._held() as file:
            if record.run is not None:
                self._header, self._headed = record.run, False
            # Each once, and again in another file and after a `rewind`, which may have cut them.
            told = self._told.setdefault(record.prefix, set())
            keys = {key: said for key, said in record.keys.items() if key not in told}
            run = None if self._headed else self._header
            file.write(encoded(replace(record, keys=keys, run=run)))
            told.update(keys)
            self._headed = True

    def _begin_telling(self) -> None:
        """Take it that the file has been told nothing: it is new, or what told it may have been cut."""
        self._told: dict[str, set[str]] = {}  # the keys whose meaning it knows, by prefix
        self._headed = False  # whether it knows what is known of the run

    @contextmanager
    def _held(self) -> Iterator[AppendFile]:
        """Keep those away who share the file, whose last line is whole, until all is done."""
        file = self._opened()
        with file.guard:
            if file.size != self._end and file.regular:  # somebody has cut it, or written to it
                if file.size < self._end:
                    self._begin_telling()
                _mend_last_line(file)
            yield file
            self._end = file.size

    def _new_file(self) -> AppendFile:
        file = AppendFile.shared(self.path)
        with ExitStack() as undo:
            undo.callback(file.close)
            start = file.read(HEAD, 0) if file.regular else b""
            if start and not is_ours(start):
                first = start.partition(b"\n")[0][:40]
                raise FileExistsError(
                    errno.EEXIST,
                    f"holds something else than records of JSONLSink ({first!r}), and is left as it "
                    "is: give another path, or move the file away",
                    str(self.path),
                )
            undo.pop_all()
        self._end = -1
        self._begin_telling()
        return file


def read_jsonl(path: str | os.PathLike[str]) -> list[Record]:
    """Return the records of a file that `JSONLSink` wrote.

    Lines that break off, as a machine that goes down leaves them behind, are left out. How many they
    are is logged as a warning; of the last line that goes without saying, as it does of empty ones.

    Raises:
        ValueError: anything else that is not a record; names the file and the line.
    """
    path = Path(path)
    records: list[Record] = []
    torn: list[int] = []
    meanings: dict[str, dict[str, Meaning]] = {}  # of keys, by prefix; each is said once
    for line in lines_of(path):
        if line.text.isspace():
            continue
        if line.record is not None:
            records.append(decoded(line.record, line, path, meanings))
        elif not line.torn:
            raise no_record(line, path, "it has no whole number 'step', or no 'metrics'")
        elif line.text.endswith(b"\n"):
            torn.append(line.number)
    if torn:
        mention(
            f"{path}: {len(torn)} lines break off in the middle and are left out; the first of them "
            f"is line {torn[0]}"
        )
    return records


def _mend_last_line(file: AppendFile) -> None:
    """Give the file an end that a line can follow: a broken last line would swallow the next."""
    last = file.last_line()
    # Without a lock it may be what another process is about to finish.
    if last and file.locked and began(last) and parsed(last) is None:
        file.truncate(file.size - len(last))
    elif last:
        file.write(b"\n")
