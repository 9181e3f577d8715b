"""Records as JSON lines: a file that any tool reads, and that loses nothing.

    {"step": 50, "wall_time": 1760000000.0, "prefix": "train", "metrics": {"train/loss": 2.31},
     "histograms": {}}

What has axes, what alerts have found and what the run is stand behind these where a record has them
(``"arrays"``, ``"alerts"``, ``"run"``). A reader leaves what it does not know.

Every line is valid JSON by itself. JSON has no NaN and no infinity, so these are written as the
strings ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``, and `read_jsonl` turns them back into floats.
"""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt

from metricfold._core.sketch import Histogram
from metricfold.metric import check_name
from metricfold.sinks.files import AppendFile, FileSink
from metricfold.sinks.loud import mention
from metricfold.sinks.record import Record

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

    def __repr__(self) -> str:
        return f"JSONLSink({str(self.path)!r})"

    def rewind(self, step: int) -> None:
        """Cut the lines of the steps after `step` out of the file."""
        if not self.path.exists():
            return
        file = self._opened()
        if not file.regular:
            raise ValueError(f"{self.path} is a terminal or a pipe, which cannot be rewound")
        with file.guard:
            cut, scattered = None, False  # where the first line to take away starts
            for line in _lines(self.path):
                if line.is_later(step):
                    cut = line.start if cut is None else cut
                elif cut is not None:
                    scattered = True
            if scattered:  # someone logged steps out of order
                lines = _lines(self.path)
                file.replace(line.text for line in lines if not line.is_later(step))
            elif cut is not None:
                # At once, and without room on the disk.
                file.truncate(cut)
            self._end = file.size

    def _write(self, record: Record) -> None:
        file = self._opened()
        with file.guard:
            file.write(_encoded(record))
            self._end = file.size

    def _opened(self) -> AppendFile:
        file = self._current()
        if file is None:
            file = AppendFile.shared(self.path)
            try:
                self._check_ours(file)
            except BaseException:
                file.close()
                raise
            self._file, self._end = file, -1
        with file.guard:
            if file.size != self._end and file.regular:  # somebody has cut it, or written to it
                _mend_last_line(file)
        return file

    def _check_ours(self, file: AppendFile) -> None:
        """Refuse a file that holds anything but records, or half of one."""
        if not file.regular:
            return
        start = file.read(_HEAD, 0)
        first = start.partition(b"\n")[0]
        if not start or _is_ours(start):
            return
        raise FileExistsError(
            errno.EEXIST,
            f"holds something else than records of JSONLSink ({first[:40]!r}), and is left as it "
            "is: give another path, or move the file away",
            str(self.path),
        )


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
    for line in _lines(path):
        record = line.record()
        if line.text.isspace():
            continue
        if record is not None:
            records.append(_decoded(record, line, path))
        elif not line.is_torn():
            raise _no_record(line, path, "it has no whole number 'step', or no 'metrics'")
        elif line.text.endswith(b"\n"):
            torn.append(line.number)
    if torn:
        mention(
            f"{path}: {len(torn)} lines break off in the middle and are left out; the first of them "
            f"is line {torn[0]}"
        )
    return records


# -- Lines ---------------------------------------------------------------------------------------

_BEGINNING = b'{"step": '
_AFTER_STEP = b', "wall_time": '
_HEAD = 1 << 20  # so much of a file shows whose it is
_LONGEST = 1 << 28  # bytes of a line; no record comes near


class _Line(NamedTuple):
    """One line of a file.

    Args:
        number: from 1 on.
        start: its offset in bytes.
        text: with its line break, if it has one.
    """

    number: int
    start: int
    text: bytes

    def is_torn(self) -> bool:
        """Return whether this is what a crash leaves of a record."""
        # A file system may have made room for more than it came to write.
        if not _began(self._torn_part().rstrip(b"\n")) and b"\0" not in self.text:
            return False
        try:
            json.loads(self.text)
        except RecursionError:
            return False
        except ValueError:
            return True
        return False

    def _torn_part(self) -> bytes:
        """Return the line up to where another record begins in it."""
        at = self.text.rfind(_BEGINNING)
        return self.text[:at] if at > 0 else self.text

    def record(self) -> dict[str, Any] | None:
        """Return the record of this line, or that behind a torn one that nothing had closed."""
        parsed = _parsed(self.text)
        if parsed is None and self.is_torn():
            parsed = _parsed(self.text[len(self._torn_part()) :])
        return parsed

    def is_later(self, step: int) -> bool:
        """Return whether this is a record of a step after `step`."""
        record = self.record()
        return record is not None and record["step"] > step


def _lines(path: Path) -> Iterator[_Line]:
    start = 0
    with path.open("rb") as file:
        for number in itertools.count(1):
            text = file.readline(_LONGEST + 1)
            if not text:
                return
            if len(text) > _LONGEST:
                raise ValueError(
                    f"{path}, line {number} is longer than {_LONGEST} bytes, which no record is: "
                    "give the path of a file that JSONLSink wrote"
                )
            yield _Line(number, start, text)
            start += len(text)


_STARTED = re.compile(rb'\{"step": -?\d+' + re.escape(_AFTER_STEP))
"""What half a line holds at least, if no other program is to have written it."""


def _is_ours(start: bytes) -> bool:
    """Return whether a file that starts like this begins with a record, or with half of one.

    A machine that went down may have left halves of several, each of which a later start has closed.
    """
    # What nothing has closed runs into the next one.
    *closed, last = start.replace(_BEGINNING, b"\n" + _BEGINNING).split(b"\n")
    for line in closed:
        if _STARTED.match(line) or _parsed(line) is not None:
            return True
        # A file system may have made room for more than it came to write.
        if line and not _began(line.rstrip(b"\0")):
            return False
    if not last:
        return any(line.startswith(b'{"s') for line in closed)
    return _began(last) or _parsed(last) is not None


def _began(text: bytes) -> bool:
    """Return whether `text` is the beginning of a line that `JSONLSink` writes.

    Another one may follow on the same line, where nothing has closed this one.
    """
    another = text.find(_BEGINNING, 1)
    text = text[:another] if another > 0 else text
    match = re.match(rb'\{"step": -?\d*', text)
    if match is None:
        return text != b"" and _BEGINNING.startswith(text)
    rest = text[match.end() :]
    return rest.startswith(_AFTER_STEP) or _AFTER_STEP.startswith(rest)


def _mend_last_line(file: AppendFile) -> None:
    """Give the file an end that a line can follow: a broken last line would swallow the next."""
    blocks: list[bytes] = []
    start = file.size
    while start > 0:
        begin = max(0, start - 65536)
        block = file.read(start - begin, begin)
        cut = block.rfind(b"\n") + 1
        blocks.append(block[cut:])
        start = begin + cut
        if cut:
            break
    last = b"".join(reversed(blocks))
    if not last:
        return
    # Without a lock it may be what another process is about to finish.
    if file.locked and _began(last) and _parsed(last) is None:
        file.truncate(start)
    else:
        file.write(b"\n")


# -- Writing -------------------------------------------------------------------------------------

_OPTIONAL = ("arrays", "alerts", "run")
"""Fields of a record that are written where there is something in them."""


def _encoded(record: Record) -> bytes:
    line = {
        "step": record.step,
        "wall_time": record.wall_time,
        "prefix": record.prefix,
        "metrics": {key: _number(value) for key, value in record.metrics.items()},
        "histograms": {key: _histogram(value) for key, value in record.histograms.items()},
    }
    line |= {name: found for name in _OPTIONAL if (found := getattr(record, name))}
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


# -- Reading -------------------------------------------------------------------------------------

_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _parsed(text: bytes) -> dict[str, Any] | None:
    """Return what a line holds if that is a record, as far as its keys tell."""
    try:
        parsed = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):  # the latter: it nests deeper than any record
        return None
    is_record = (
        isinstance(parsed, dict)
        and type(parsed.get("step")) is int
        and isinstance(parsed.get("metrics"), dict)
    )
    return parsed if is_record else None


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _decoded(record: dict[str, Any], line: _Line, path: Path) -> Record:
    try:
        read = Record(
            step=record["step"],
            wall_time=_to_finite(record["wall_time"]),
            prefix=_to_text(record.get("prefix", "")),  # older lines have none
            metrics={key: _to_number(value) for key, value in record["metrics"].items()},
            histograms={key: _to_histogram(value) for key, value in record["histograms"].items()},
            arrays={key: _to_object(value) for key, value in record.get("arrays", {}).items()},
            alerts=[_to_object(alert) for alert in record.get("alerts", [])],
            run=_to_object(record["run"]) if "run" in record else None,
        )
        _check_printable(read)
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise _no_record(line, path, f"{type(error).__name__}: {error}") from error
    return read


def _check_printable(record: Record) -> None:
    """Refuse what no log has: it may be shown on a terminal next."""
    if record.prefix:
        check_name("its prefix", record.prefix)
    for key in (*record.metrics, *record.histograms, *record.arrays):
        check_name("a key", key)


def _no_record(line: _Line, path: Path, why: str) -> ValueError:
    return ValueError(
        f"{path}, line {line.number} is not a record of JSONLSink ({why}): {line.text[:60]!r}; remove "
        "the line, or give the path of a file that JSONLSink wrote"
    )


def _to_number(value: object) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return _finite(float(value))
    if isinstance(value, str) and value in _NOT_FINITE:
        return _NOT_FINITE[value]
    raise TypeError(f"{value!r:.60} is no number")


def _to_finite(value: object) -> float:
    return _finite(_to_number(value))


def _finite(number: float) -> float:
    if not math.isfinite(number):
        raise ValueError("a number is not finite, or too large for a float")
    return number


def _to_text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.60} is no text")
    return value


def _to_object(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{value!r:.60} is no JSON object")
    return value


def _to_histogram(value: dict[str, Any]) -> Histogram:
    edges, counts = _to_array(value["edges"]), _to_array(value["counts"])
    if (
        edges.size != counts.size + 1
        or not counts.size
        or (np.diff(edges) < 0).any()
        or (counts < 0).any()
    ):
        raise ValueError(
            "the histogram does not fit: edges ascend, and there is one count, at least 0, from each "
            "to the next"
        )
    least, greatest = _to_finite(value["minimum"]), _to_finite(value["maximum"])
    if least > greatest:
        raise ValueError("the histogram does not fit: its minimum is above its maximum")
    return Histogram(
        edges,
        counts,
        least,
        greatest,
        _to_number(value["total"]),
        _to_number(value["total_squares"]),
    )


def _to_array(values: object) -> npt.NDArray[np.float64]:
    if not isinstance(values, list):
        raise TypeError(f"{values!r:.60} is no list")
    array = np.array([_to_number(value) for value in values], dtype=np.float64)
    if not np.isfinite(array).all():
        raise ValueError("an edge or a count of the histogram is not finite")
    return array
