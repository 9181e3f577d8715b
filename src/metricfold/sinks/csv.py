"""Records as a table: a row for each log, a column for each key.

    step,wall_time,prefix,train/loss,train_a/loss,val/loss
    50,1760000000.0,train,2.31,2.5,
    50,1760000009.0,val,,,NaN

What was not logged is empty, and what was NaN says so. A key that comes up late gets a column at the
right: the file is written anew, beside the old one, and takes its place once it is whole.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator

from metricfold.sinks.files import AppendFile, LinesSink
from metricfold.sinks.lines import as_number
from metricfold.sinks.loud import mention
from metricfold.sinks.record import KeysRefused, Record

__all__ = ["CSVSink"]

_FIXED = ("step", "wall_time", "prefix")
_MARK = b"\xef\xbb\xbf"  # spreadsheets begin a file with it


class CSVSink(LinesSink):
    """Appends each record's scalars to a CSV file, which spreadsheets and pandas read, as one row.

    A row is in the file, whole, as soon as it is written. An existing file of this sink is continued,
    with its columns; any other file is left as it is, and nothing is written. After a resume,
    `MetricsLogger.rewind` takes away the rows of the steps that will be run again. A metric called
    ``step``, ``wall_time`` or ``prefix`` is left out and counted; `key_format` can give it another name.

    Args:
        path: the file; made at the first record, with the folders above it. A relative one is meant
            from the folder that is current when the sink is made.
        select: see `SelectiveSink`.
        key_format: see `SelectiveSink`.
    """

    arrays = False

    def _forget(self, *, cut: bool) -> None:
        self._columns: dict[str, int] | None = None  # what the file's first line says

    def _write(self, record: Record) -> None:
        clashing = {
            key: ValueError("a column of CSVSink's own is called so")
            for key in _FIXED
            if key in record.metrics
        }
        metrics = {key: one for key, one in record.metrics.items() if key not in clashing}
        if metrics:
            with self._held() as file:
                self._append(file, record, metrics)
        if clashing:
            raise KeysRefused(clashing)

    def _append(self, file: AppendFile, record: Record, metrics: dict[str, float]) -> None:
        columns = self._known(file)
        new = [key for key in metrics if key not in columns]
        wider = {key: place for place, key in enumerate([*(columns or _FIXED), *new])}
        cells: list[object] = [""] * len(wider)
        cells[:3] = record.step, record.wall_time, record.prefix
        for key, value in metrics.items():
            cells[wider[key]] = as_number(value)
        row = _line(cells)
        if not columns:
            file.write(_line(wider) + row)
        elif not new:
            file.write(row)
        else:
            file.replace(self._widened(_line(wider), len(new), row))
        self._columns = wider

    def _known(self, file: AppendFile) -> dict[str, int]:
        """Return the columns of the file, none if it is empty."""
        if self._columns is None:
            self._columns = {}
            if file.regular and file.size:
                with self.path.open("rb") as opened:
                    self._columns = _columns(opened.readline())
        return self._columns

    def _widened(self, header: bytes, count: int, row: bytes) -> Iterator[bytes]:
        """Yield the lines of the file with empty cells at the right, and one row more."""
        yield header
        for start, text, _ in self._lines():
            if start:
                yield text.rstrip(b"\r\n") + b"," * count + b"\n"
        yield row

    def _is_ours(self, start: bytes) -> bool:
        first, end, _ = start.removeprefix(_MARK).partition(b"\n")
        fixed = ",".join(_FIXED).encode()
        whole = first.rstrip(b"\r") == fixed or first.startswith(fixed + b",")
        return whole or (not end and fixed.startswith(first))

    def _is_half(self, last: bytes) -> bool:
        # A number may be cut anywhere, so that a row without an end is never known to be whole.
        mention(f"{self.path}: the last row breaks off, and is taken away: {last[:60]!r}")
        return True

    def _lines(self) -> Iterator[tuple[int, bytes, int | None]]:
        start = 0
        with self.path.open("rb") as file:
            for text in file:
                first = text.partition(b",")[0]
                yield start, text, int(first) if first.lstrip(b"-").isdigit() else None
                start += len(text)


def _line(cells: Iterable[object]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode()


def _columns(line: bytes) -> dict[str, int]:
    (names,) = csv.reader([line.decode("utf-8-sig").rstrip("\r\n")])
    return {name: place for place, name in enumerate(names)}
