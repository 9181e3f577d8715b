"""Records as JSON lines: a file that any tool reads, and that loses nothing.

    {"step": 50, "wall_time": 1760000000.0, "prefix": "train", "metrics": {"train/loss": 2.31},
     "histograms": {}}

``"arrays"``, ``"alerts"`` and ``"run"`` stand behind these where a record has them. An array is that of a
metric with axes, its values flat and in C order:

    {"axes": [["layer", 2], ["parameter", ["bias", "weight"]]], "values": [0.1, 0.2, 0.3, "NaN"]}

JSON has no NaN and no infinity, so these are the strings ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``.
"""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
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

    def __repr__(self) -> str:
        return f"JSONLSink({str(self.path)!r})"

    def rewind(self, step: int) -> None:
        """Cut the lines of the steps after `step` out of the file."""
        if not self.path.exists():
            return
        with self._held() as file:
            if not file.regular:
                raise ValueError(f"{self.path} is a terminal or a pipe, which cannot be rewound")
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

    def _write(self, record: Record) -> None:
        with self._held() as file:
            file.write(encoded(record))

    @contextmanager
    def _held(self) -> Iterator[AppendFile]:
        """Keep those away who share the file, whose last line is whole, until all is done."""
        file = self._opened()
        with file.guard:
            if file.size != self._end and file.regular:  # somebody has cut it, or written to it
                _mend_last_line(file)
            yield file
            self._end = file.size

    def _new_file(self) -> AppendFile:
        file = AppendFile.shared(self.path)
        with ExitStack() as undo:
            undo.callback(file.close)
            start = file.read(_HEAD, 0) if file.regular else b""
            if start and not _is_ours(start):
                first = start.partition(b"\n")[0][:40]
                raise FileExistsError(
                    errno.EEXIST,
                    f"holds something else than records of JSONLSink ({first!r}), and is left as it "
                    "is: give another path, or move the file away",
                    str(self.path),
                )
            undo.pop_all()
        self._end = -1
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
    for line in _lines(path):
        if line.text.isspace():
            continue
        if line.record is not None:
            records.append(_decoded(line.record, line, path))
        elif not line.torn:
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
    """One line of a file."""

    number: int  # from 1 on
    start: int  # in bytes
    text: bytes  # with its line break, if it has one
    record: dict[str, Any] | None  # which may stand behind a torn one that nothing had closed
    torn: bool  # whether a crash has left this, or the beginning of this, of a record

    def is_later(self, step: int) -> bool:
        return self.record is not None and self.record["step"] > step


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
            yield _Line(number, start, text, *_record_in(text))
            start += len(text)


def _record_in(text: bytes) -> tuple[dict[str, Any] | None, bool]:
    """Return what `_Line` says of the record and of what is torn in a line."""
    record = _parsed(text)
    if record is not None:
        return record, False
    another = max(text.rfind(_BEGINNING), 0) or len(text)
    # A file system may have made room for more than it came to write.
    if _began(text[:another].rstrip(b"\n")) or b"\0" in text:
        try:
            json.loads(text)
        except RecursionError:
            return None, False
        except ValueError:
            return _parsed(text[another:]), True
    return None, False


def _is_ours(start: bytes) -> bool:
    """Return whether a file that starts like this begins with a record, or with half of one.

    A machine that went down may have left halves of several, each of which a later start has closed.
    """
    # What nothing has closed runs into the next one.
    *closed, last = start.replace(_BEGINNING, b"\n" + _BEGINNING).split(b"\n")
    for line in closed:
        # No other program has written so much of one.
        if (_began(line) and _AFTER_STEP in line) or _parsed(line) is not None:
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
    text = re.sub(rb'^(\{"step": )-?\d*', rb"\g<1>0", text)
    start = _BEGINNING + b"0" + _AFTER_STEP
    return text != b"" and (start.startswith(text) or text.startswith(start))


def _mend_last_line(file: AppendFile) -> None:
    """Give the file an end that a line can follow: a broken last line would swallow the next."""
    last = file.last_line()
    # Without a lock it may be what another process is about to finish.
    if last and file.locked and _began(last) and _parsed(last) is None:
        file.truncate(file.size - len(last))
    elif last:
        file.write(b"\n")


# -- Writing -------------------------------------------------------------------------------------

_OPTIONAL = ("alerts", "run")
"""Fields of a record that are written where there is something in them."""
_MOST_AXES = 32
"""NumPy has no arrays of more dimensions, or not of many more."""
_SCALARS = ("minimum", "maximum", "total", "total_squares")
"""Fields of a histogram that are numbers."""


def encoded(record: Record) -> bytes:
    """Return the line of a record."""
    line = {
        "step": record.step,
        "wall_time": record.wall_time,
        "prefix": record.prefix,
        "metrics": {key: _number(value) for key, value in record.metrics.items()},
        "histograms": {key: _histogram(value) for key, value in record.histograms.items()},
    }
    if record.arrays:
        line["arrays"] = {key: _cells(value) for key, value in record.arrays.items()}
    line |= {name: found for name in _OPTIONAL if (found := getattr(record, name))}
    return json.dumps(line, allow_nan=False, separators=(", ", ": ")).encode() + b"\n"


def _number(value: float) -> float | str:
    if math.isfinite(value):
        return float(value)
    if math.isnan(value):
        return "NaN"
    return "Infinity" if value > 0 else "-Infinity"


def _cells(array: dict[str, Any]) -> dict[str, object]:
    values = np.asarray(array["values"], dtype=np.float64).reshape(-1)
    listed: list[Any] = values.tolist()
    if not np.isfinite(values).all():
        listed = [_number(value) for value in listed]
    return {"axes": array["axes"], "values": listed}


def _histogram(histogram: Histogram) -> dict[str, object]:
    return {
        "edges": histogram.edges.tolist(),
        "counts": histogram.counts.tolist(),
        **{name: _number(getattr(histogram, name)) for name in _SCALARS},
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
            wall_time=_finite(_to_number(record["wall_time"])),
            prefix=_to("text", str, record.get("prefix", "")),  # older lines have none
            metrics={key: _to_number(value) for key, value in record["metrics"].items()},
            histograms={key: _to_histogram(value) for key, value in record["histograms"].items()},
            arrays={key: _to_cells(value) for key, value in record.get("arrays", {}).items()},
            alerts=[_to_object(alert) for alert in record.get("alerts", [])],
            run=_to_object(record["run"]) if "run" in record else None,
        )
        # Refuse what no log has: it may be shown on a terminal next.
        if read.prefix:
            check_name("its prefix", read.prefix)
        for key in (*read.metrics, *read.histograms, *read.arrays):
            check_name("a key", key)
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise _no_record(line, path, f"{type(error).__name__}: {error}") from error
    return read


def _no_record(line: _Line, path: Path, why: str) -> ValueError:
    return ValueError(
        f"{path}, line {line.number} is not a record of JSONLSink ({why}): {line.text[:60]!r}; remove "
        "the line, or give the path of a file that JSONLSink wrote"
    )


def _to_histogram(value: dict[str, Any]) -> Histogram:
    edges, counts = _to_array(value["edges"]), _to_array(value["counts"])
    fits = edges.size == counts.size + 1 > 1
    if not fits or (np.diff(edges) < 0).any() or (counts < 0).any():
        raise ValueError(
            "the histogram does not fit: edges ascend, and there is one count, at least 0, from each "
            "to the next"
        )
    histogram = Histogram(edges, counts, *(_to_number(value[name]) for name in _SCALARS))
    if _finite(histogram.minimum) > _finite(histogram.maximum):
        raise ValueError("the histogram does not fit: its minimum is above its maximum")
    return histogram


def _to_cells(array: object) -> dict[str, Any]:
    known = _to("JSON object", dict, array)
    axes = [_to_axis(axis) for axis in _to("list", list, known["axes"])]
    values = [_to_number(value) for value in _to("list", list, known["values"])]
    shape = [size if isinstance(size, int) else len(size) for _, size in axes]
    # Before memory is taken: what is there says how much.
    if not axes or len(axes) > _MOST_AXES or math.prod(shape) != len(values):
        raise ValueError(
            f"the array does not fit: {len(values)} values are not one for each cell along its "
            f"{len(axes)} axes, up to {_MOST_AXES}"
        )
    return {"axes": axes, "values": np.array(values, np.float64).reshape(shape)}


def _to_axis(axis: object) -> list[Any]:
    name, size = _to("list", list, axis)
    check_name("an axis", name)
    if isinstance(size, list):
        for label in size:
            check_name("a label", label)
        if len(set(size)) < len(size):
            raise ValueError(f"axis {name!r} has a label twice")
    elif _to("whole number", int, size) < 1:
        raise ValueError(f"axis {name!r} has the size {size}")
    return [name, size]


def _to_array(values: object) -> npt.NDArray[np.float64]:
    array = np.array([_to_number(value) for value in _to("list", list, values)], np.float64)
    if not np.isfinite(array).all():
        raise ValueError("an edge or a count of the histogram is not finite")
    return array


def _to_number(value: object) -> float:
    if isinstance(value, str) and value in _NOT_FINITE:
        return _NOT_FINITE[value]
    return _finite(float(_to("number", (int, float), value)))


def _finite(number: float) -> float:
    if not math.isfinite(number):
        raise ValueError("a number is not finite, or too large for a float")
    return number


def _to(name: str, kind: Any, value: object) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{value!r:.60} is no {name}")
    return value


_to_object = partial(_to, "JSON object", dict)
