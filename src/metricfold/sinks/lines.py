"""What a line of a run file says: a record as JSON, and what a crash may have left of one.

    {"step": 50, "wall_time": 1760000000.0, "prefix": "train", "metrics": {"train_a/loss": 2.31},
     "histograms": {}}

``"arrays"``, ``"alerts"``, ``"keys"`` and ``"run"`` stand behind these where a record has them. An array
is that of a metric with axes, its values flat and in C order:

    {"axes": [["layer", 2], ["parameter", ["bias", "weight"]]], "values": [0.1, 0.2, 0.3, "NaN"]}

``"keys"`` says of each key that is new in the file the dataset, the metric, the statistic and the
aggregation, where that is known: ``{"train_a/loss": ["a", "loss", "", "mean"]}``.

JSON has no NaN and no infinity, so these are the strings ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt

from metricfold._core.sketch import Histogram
from metricfold.metric import check_name
from metricfold.sinks.files import HEAD
from metricfold.sinks.record import Meaning, Record

__all__ = [
    "BEGINNING",
    "HEAD",
    "LONGEST",
    "Line",
    "as_number",
    "began",
    "decoded",
    "encoded",
    "is_ours",
    "lines_of",
    "no_record",
    "parsed",
    "record_in",
    "to_cells",
    "to_histogram",
    "to_meaning",
    "to_number",
]

BEGINNING = b'{"step": '
_AFTER_STEP = b', "wall_time": '
LONGEST = 1 << 28  # bytes of a line; no record comes near


class Line(NamedTuple):
    """One line of a file."""

    number: int  # from 1 on
    start: int  # in bytes
    text: bytes  # with its line break, if it has one
    record: dict[str, Any] | None  # which may stand behind a torn one that nothing had closed
    torn: bool  # whether a crash has left this, or the beginning of this, of a record


def lines_of(path: Path) -> Iterator[Line]:
    """Yield the lines of a file; raises ValueError at one that no record is as long as."""
    start = 0
    with path.open("rb") as file:
        for number in itertools.count(1):
            text = file.readline(LONGEST + 1)
            if not text:
                return
            if len(text) > LONGEST:
                raise ValueError(
                    f"{path}, line {number} is longer than {LONGEST} bytes, which no record is: "
                    "give the path of a file that JSONLSink wrote"
                )
            yield Line(number, start, text, *record_in(text))
            start += len(text)


def record_in(text: bytes) -> tuple[dict[str, Any] | None, bool]:
    """Return what `Line` says of the record and of what is torn in a line."""
    record = parsed(text)
    if record is not None:
        return record, False
    another = max(text.rfind(BEGINNING), 0) or len(text)
    # A file system may have made room for more than it came to write.
    if began(text[:another].rstrip(b"\n")) or b"\0" in text:
        try:
            json.loads(text)
        except RecursionError:
            return None, False
        except ValueError:
            return parsed(text[another:]), True
    return None, False


def is_ours(start: bytes) -> bool:
    """Return whether a file that starts like this begins with a record, or with half of one.

    A machine that went down may have left halves of several, each of which a later start has closed.
    """
    # What nothing has closed runs into the next one.
    *closed, last = start.replace(BEGINNING, b"\n" + BEGINNING).split(b"\n")
    for line in closed:
        # No other program has written so much of one.
        if (began(line) and _AFTER_STEP in line) or parsed(line) is not None:
            return True
        # A file system may have made room for more than it came to write.
        if line and not began(line.rstrip(b"\0")):
            return False
    if not last:
        return any(line.startswith(b'{"s') for line in closed)
    return began(last) or parsed(last) is not None


def began(text: bytes) -> bool:
    """Return whether `text` is the beginning of a line that `JSONLSink` writes.

    Another one may follow on the same line, where nothing has closed this one.
    """
    another = text.find(BEGINNING, 1)
    text = text[:another] if another > 0 else text
    text = re.sub(rb'^(\{"step": )-?\d*', rb"\g<1>0", text)
    start = BEGINNING + b"0" + _AFTER_STEP
    return text != b"" and (start.startswith(text) or text.startswith(start))


# -- Writing -------------------------------------------------------------------------------------

_OPTIONAL = ("alerts", "keys", "run")
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
        "metrics": {key: as_number(value) for key, value in record.metrics.items()},
        "histograms": {key: _histogram(value) for key, value in record.histograms.items()},
    }
    if record.arrays:
        line["arrays"] = {key: _cells(value) for key, value in record.arrays.items()}
    line |= {name: found for name in _OPTIONAL if (found := getattr(record, name))}
    return json.dumps(line, allow_nan=False, separators=(", ", ": ")).encode() + b"\n"


def as_number(value: float) -> float | str:
    """Return a number as JSON has it, or as the text that stands for what JSON has not."""
    if math.isfinite(value):
        return float(value)
    if math.isnan(value):
        return "NaN"
    return "Infinity" if value > 0 else "-Infinity"


def _cells(array: dict[str, Any]) -> dict[str, object]:
    values = np.asarray(array["values"], dtype=np.float64).reshape(-1)
    listed: list[Any] = values.tolist()
    if not np.isfinite(values).all():
        listed = [as_number(value) for value in listed]
    return {"axes": array["axes"], "values": listed}


def _histogram(histogram: Histogram) -> dict[str, object]:
    return {
        "edges": histogram.edges.tolist(),
        "counts": histogram.counts.tolist(),
        **{name: as_number(getattr(histogram, name)) for name in _SCALARS},
    }


# -- Reading -------------------------------------------------------------------------------------

_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def parsed(text: bytes) -> dict[str, Any] | None:
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


def decoded(
    record: dict[str, Any], line: Line, path: Path, meanings: dict[str, dict[str, Meaning]]
) -> Record:
    """Return the record of a line of a file; raises ValueError where a part of it is none.

    What keys stand for, by prefix, is said once in a file: it is taken from `meanings`, and put there.
    """
    try:
        prefix = _to("text", str, record.get("prefix", ""))  # older lines have none
        known = meanings.setdefault(prefix, {})
        known |= {key: to_meaning(said) for key, said in record.get("keys", {}).items()}
        read = Record(
            step=record["step"],
            wall_time=_finite(to_number(record["wall_time"])),
            prefix=prefix,
            metrics={key: to_number(value) for key, value in record["metrics"].items()},
            histograms={key: to_histogram(value) for key, value in record["histograms"].items()},
            arrays={key: to_cells(value) for key, value in record.get("arrays", {}).items()},
            alerts=[_to_object(alert) for alert in record.get("alerts", [])],
            run=_to_object(record["run"]) if "run" in record else None,
        )
        # Refuse what no log has: it may be shown on a terminal next.
        if read.prefix:
            check_name("its prefix", read.prefix)
        for key in (*read.metrics, *read.histograms, *read.arrays):
            check_name("a key", key)
            if key in known:
                read.keys[key] = known[key]
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise no_record(line, path, f"{type(error).__name__}: {error}") from error
    return read


def no_record(line: Line, path: Path, why: str) -> ValueError:
    """Return the error that says which line of a file is no record."""
    return ValueError(
        f"{path}, line {line.number} is not a record of JSONLSink ({why}): {line.text[:60]!r}; remove "
        "the line, or give the path of a file that JSONLSink wrote"
    )


def to_histogram(value: dict[str, Any]) -> Histogram:
    """Return the histogram that JSON has."""
    edges, counts = _to_array(value["edges"]), _to_array(value["counts"])
    fits = edges.size == counts.size + 1 > 1
    if not fits or (np.diff(edges) < 0).any() or (counts < 0).any():
        raise ValueError(
            "the histogram does not fit: edges ascend, and there is one count, at least 0, from each "
            "to the next"
        )
    histogram = Histogram(edges, counts, *(to_number(value[name]) for name in _SCALARS))
    if _finite(histogram.minimum) > _finite(histogram.maximum):
        raise ValueError("the histogram does not fit: its minimum is above its maximum")
    return histogram


def to_meaning(said: object) -> Meaning:
    """Return what JSON says of a key."""
    dataset, name, statistic, aggregation = _to("list", list, said)
    texts = [_to("text", str, text) for text in (dataset, name, statistic)]
    for text in filter(None, texts):
        check_name("a part of a key", text)
    known = None if aggregation is None else _to("text", str, aggregation)
    return Meaning(texts[0], texts[1], texts[2], known)


def to_cells(array: object) -> dict[str, Any]:
    """Return the axes and the values that JSON has, as in `Record.arrays`."""
    known = _to("JSON object", dict, array)
    axes = [_to_axis(axis) for axis in _to("list", list, known["axes"])]
    values = [to_number(value) for value in _to("list", list, known["values"])]
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
    array = np.array([to_number(value) for value in _to("list", list, values)], np.float64)
    if not np.isfinite(array).all():
        raise ValueError("an edge or a count of the histogram is not finite")
    return array


def to_number(value: object) -> float:
    """Return the number that JSON has, be it a text for what is not finite."""
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
