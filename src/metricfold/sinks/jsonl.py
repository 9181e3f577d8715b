"""Records as JSON lines: a file that any tool reads, and that loses nothing.

    {"step": 50, "wall_time": 1760000000.0, "prefix": "train", "metrics": {"train/loss": 2.31},
     "histograms": {}}

Every line is valid JSON by itself. JSON has no NaN and no infinity, so these are written as the
strings ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``, and `read_jsonl` turns them back into floats.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from metricfold.histogram import Histogram
from metricfold.sinks.files import AppendFile
from metricfold.sinks.record import Record
from metricfold.sinks.selection import SelectiveSink

__all__ = ["JSONLSink", "read_jsonl"]


class JSONLSink(SelectiveSink):
    """Appends each record to a file as one line of JSON.

    A line is in the file, whole, as soon as it is written: a process that is killed loses none.
    An existing file is continued; after a resume, `MetricsLogger.rewind` takes away the lines of
    the steps that will be run again.

    Args:
        path: the file; made at the first record, with the folders above it.
        select: see `SelectiveSink`.
        key_format: see `SelectiveSink`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        select: str | Sequence[str] = "*",
        key_format: str | Callable[[str], str] = "{key}",
    ) -> None:
        super().__init__(select=select, key_format=key_format)
        self.path = Path(path)
        self._file: AppendFile | None = None

    def __repr__(self) -> str:
        return f"JSONLSink({str(self.path)!r})"

    def flush(self) -> None:
        """Do nothing: `write` holds nothing back."""

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def rewind(self, step: int) -> None:
        """Cut the lines of the steps after `step` out of the file."""
        if not self.path.exists():
            return
        file = self._opened()
        cut = None  # where the first line to take away starts
        kept = []  # lines after the cut that stay: someone logged steps out of order
        for number, start, line in _lines(self.path):
            if _parsed(line, self.path, number)["step"] > step:
                cut = start if cut is None else cut
            elif cut is not None:
                kept.append(line)
        if cut is not None:
            file.truncate(cut)
            file.write(b"".join(kept))

    def _write(self, record: Record) -> None:
        self._opened().write(_encoded(record))

    def _opened(self) -> AppendFile:
        if self._file is None:
            file = AppendFile(self.path)
            try:
                _mend_last_line(self.path, file)
            except BaseException:
                file.close()
                raise
            self._file = file
        return self._file


def read_jsonl(path: str | os.PathLike[str]) -> list[Record]:
    """Return the records of a file that `JSONLSink` wrote.

    A last line that breaks off in the middle is left out: that is what a machine that went down
    while writing leaves behind.

    Raises:
        ValueError: anything else that is not a record; names the file and the line.
    """
    path = Path(path)
    return [_decoded(_parsed(line, path, number), path, number) for number, _, line in _lines(path)]


def _lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Yield number, offset in bytes, and text of each line, but for a last one that breaks off."""
    start = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.endswith(b"\n") or _is_complete(line):
                yield number, start, line
            start += len(line)


def _is_complete(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _mend_last_line(path: Path, file: AppendFile) -> None:
    """Give the file an end that a line can follow: a broken last line would swallow the next."""
    size = path.stat().st_size
    start, last = size, b""
    with path.open("rb") as reader:
        while start > 0 and b"\n" not in last:
            begin = max(0, start - 65536)
            reader.seek(begin)
            last = reader.read(start - begin) + last
            start = begin
    last = last[last.rfind(b"\n") + 1 :]
    if not last:
        return
    if _is_complete(last):
        file.write(b"\n")
    else:
        file.truncate(size - len(last))


def _encoded(record: Record) -> bytes:
    line = {
        "step": record.step,
        "wall_time": record.wall_time,
        "prefix": record.prefix,
        "metrics": {key: _number(value) for key, value in record.metrics.items()},
        "histograms": {key: _histogram(value) for key, value in record.histograms.items()},
    }
    return json.dumps(line, allow_nan=False, separators=(", ", ": ")).encode() + b"\n"


def _number(value: float) -> float | str:
    if math.isfinite(value):
        return float(value)
    if math.isnan(value):
        return "NaN"
    return "Infinity" if value > 0 else "-Infinity"


def _histogram(histogram: Histogram) -> dict[str, object]:
    return {
        "edges": histogram.edges.tolist(),
        "counts": histogram.counts.tolist(),
        "minimum": _number(histogram.minimum),
        "maximum": _number(histogram.maximum),
        "total": _number(histogram.total),
        "total_squares": _number(histogram.total_squares),
    }


def _parsed(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        parsed = json.loads(line)
    except ValueError:
        parsed = None
    if not isinstance(parsed, dict) or not isinstance(parsed.get("step"), int):
        raise ValueError(
            f"{path}, line {number} is not a record of JSONLSink: {line[:60]!r}; "
            "remove the line, or give the path of a file that JSONLSink wrote"
        )
    return parsed


def _decoded(parsed: dict[str, Any], path: Path, number: int) -> Record:
    try:
        return Record(
            step=parsed["step"],
            wall_time=float(parsed["wall_time"]),
            prefix=str(parsed.get("prefix", "")),  # older lines have none
            metrics={key: float(value) for key, value in parsed["metrics"].items()},
            histograms={
                key: Histogram(
                    edges=np.array(value["edges"], dtype=np.float64),
                    counts=np.array(value["counts"], dtype=np.float64),
                    minimum=float(value["minimum"]),
                    maximum=float(value["maximum"]),
                    total=float(value["total"]),
                    total_squares=float(value["total_squares"]),
                )
                for key, value in parsed["histograms"].items()
            },
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}, line {number} is not a record of JSONLSink ({type(error).__name__}: {error}): "
            "remove the line, or give the path of a file that JSONLSink wrote"
        ) from error
