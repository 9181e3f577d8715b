"""All numbers of runs for other programs, as a long table: nothing is sampled or rounded.

A number is a row: run, step, wall_time, prefix, dataset, name, statistic, value. NaN stays NaN and
infinities stay what they are. A number that was never logged has no row; in a wide table, which has a
column for each dataset, it is an empty cell in CSV and null in Parquet.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from metricfold.look.choosing import chosen
from metricfold.look.place import LookError
from metricfold.look.reading import read
from metricfold.metric import escaped

__all__ = ["export", "read_frame", "read_table"]

LONG = ("run", "step", "wall_time", "prefix", "dataset", "name", "statistic", "value")
_ROWS = 1 << 14  # of a CSV at a time


def read_table(path: str | os.PathLike[str], names: Sequence[str] = ()) -> dict[str, Any]:
    """Return all numbers of a run as a long table: a NumPy array for each column.

    Args:
        path: a run file or its folder.
        names: which metrics, as `metricfold show` takes them; all without any.

    Returns:
        ``run``, ``step`` (int64), ``wall_time`` (float64), ``prefix``, ``dataset``, ``name``, ``statistic``
        (of str objects) and ``value`` (float64); a metric's rows stand together, in the order of the file.

    Raises:
        LookError: there is no such run or metric.
    """
    run = read(path)
    keys = chosen([run], names)
    columns = [run.columns[key] for key in keys]
    lengths = [len(column) for column in columns]

    def texts(values: Sequence[str]) -> npt.NDArray[np.object_]:
        return np.repeat(np.array([*values, ""], object)[:-1], lengths)

    def numbers(parts: Sequence[Any], kind: Any) -> Any:
        return np.concatenate([np.zeros(0, kind), *parts])

    return {
        "run": texts([run.label] * len(keys)),
        "step": numbers([column.steps for column in columns], np.int64),
        "wall_time": numbers([column.wall_times for column in columns], np.float64),
        "prefix": texts([key.prefix for key in keys]),
        "dataset": texts([key.dataset for key in keys]),
        "name": texts([key.name for key in keys]),
        "statistic": texts([key.statistic for key in keys]),
        "value": numbers([column.values for column in columns], np.float64),
    }


def read_frame(path: str | os.PathLike[str], names: Sequence[str] = ()) -> Any:
    """Return all numbers of a run as a long `pandas.DataFrame`, with the columns of `read_table`.

    Raises:
        ImportError: pandas is not installed; `read_table` needs none.
        LookError: there is no such run or metric.
    """
    if find_spec("pandas") is None:
        raise ImportError(
            "read_frame needs pandas, which is not installed: pip install pandas, or use read_table, "
            "which returns NumPy arrays"
        )
    import pandas as pd  # noqa: PLC0415 - only for those who ask for it

    return pd.DataFrame(read_table(path, names))


def export(
    paths: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str] | IO[str],
    *,
    names: Sequence[str] = (),
    wide: bool = False,
    to: str = "csv",
) -> int:
    """Write the numbers of runs to a file, and return how many rows it has.

    Args:
        paths: run files or their folders.
        out: the file, which is replaced once all is written; or for CSV a stream.
        names: which metrics, as `metricfold show` takes them; all without any.
        wide: a row for each run and step, and a column for each key as it is logged; of several values of
            a step the last one.
        to: ``"csv"``, or ``"parquet"``, which needs pyarrow.

    Raises:
        LookError: there is no such run or metric, or no pyarrow.
    """
    if to not in ("csv", "parquet"):
        raise LookError(f"--to {escaped(to)}: use csv or parquet")
    if to == "parquet" and find_spec("pyarrow") is None:
        raise LookError("Parquet needs pyarrow, which is not installed: pip install pyarrow")
    if to == "parquet" and not isinstance(out, str | os.PathLike):
        raise LookError("Parquet is no text: give a file with -o")
    table = _wide(paths, names) if wide else _long(paths, names)
    if not isinstance(out, str | os.PathLike):
        try:
            _write_csv(table, out)
        except UnicodeEncodeError as error:
            raise LookError(
                f"{getattr(out, 'encoding', error.encoding)} has no {error.object[error.start : error.end]!r}, which is in a name: "
                "give a file with -o, or set PYTHONIOENCODING=utf-8"
            ) from error
    else:
        _replace(Path(out), table, to)
    return len(table["step"].values)


class _Cells(NamedTuple):
    """A column of a table."""

    values: Any
    there: npt.NDArray[np.bool_] | None = None  # None: each of them

    def rows(self, start: int, stop: int) -> Iterator[Any]:
        """Yield cells as CSV has them: numbers with all their digits, ``NaN``, ``inf`` and ``-inf``."""
        listed: list[Any] = self.values[start:stop].tolist()
        if self.values.dtype == np.float64:
            listed = [_number(value) for value in listed]
        if self.there is None:
            return iter(listed)
        there = self.there[start:stop].tolist()
        return (one if known else "" for one, known in zip(listed, there, strict=True))


def _long(paths: Sequence[Any], names: Sequence[str]) -> dict[str, _Cells]:
    tables = [read_table(path, names) for path in paths]
    return {name: _Cells(np.concatenate([table[name] for table in tables])) for name in LONG}


def _wide(paths: Sequence[Any], names: Sequence[str]) -> dict[str, _Cells]:
    runs = [read(path) for path in paths]
    keys = chosen(runs, names)
    printed = {run.columns[key].printed: None for key in keys for run in runs if key in run.columns}
    parts: dict[str, list[_Cells]] = {name: [] for name in ("run", "step", "wall_time", *printed)}
    for run in runs:
        columns = {
            run.columns[key].printed: run.columns[key].ordered()
            for key in keys
            if key in run.columns
        }
        of_all = [np.zeros(0, np.int64), *(column.steps for column in columns.values())]
        steps = np.unique(np.concatenate(of_all))
        times = np.full(len(steps), np.nan)
        for name in printed:
            values, there = np.zeros(len(steps)), np.zeros(len(steps), np.bool_)
            if name in columns:
                column = columns[name]
                places = np.searchsorted(steps, column.steps)
                values[places], there[places] = column.values, True  # noqa: PD011 - no frame
                times[places] = column.wall_times
            parts[name].append(_Cells(values, there))
        parts["run"].append(_Cells(np.full(len(steps), run.label, object)))
        parts["step"].append(_Cells(steps))
        parts["wall_time"].append(_Cells(times))
    return {name: _joined(some) for name, some in parts.items()}


def _joined(parts: Sequence[_Cells]) -> _Cells:
    values = np.concatenate([part.values for part in parts])  # noqa: PD011
    known = [part.there for part in parts if part.there is not None]
    return _Cells(values, np.concatenate(known) if known else None)


# -- Files -----------------------------------------------------------------------------------------


def _replace(out: Path, table: Mapping[str, _Cells], to: str) -> None:
    beside = out.with_name(f".{out.name}.writing")
    try:
        if to == "parquet":
            _write_parquet(table, beside)
        else:
            with beside.open("w", encoding="utf-8", newline="") as file:
                _write_csv(table, file)
        beside.replace(out)
    except BaseException as error:
        with suppress(OSError):  # what went wrong first is said
            beside.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise LookError(
            f"{escaped(str(out))} cannot be written ({error.strerror or error})"
        ) from error


def _write_csv(table: Mapping[str, _Cells], file: IO[str]) -> None:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(table)
    for start in range(0, len(table["step"].values), _ROWS):
        parts = [cells.rows(start, start + _ROWS) for cells in table.values()]
        writer.writerows(zip(*parts, strict=True))


def _number(value: float) -> str:
    # What pandas, polars, DuckDB, R and spreadsheets take for it.
    return "NaN" if math.isnan(value) else repr(value)


def _write_parquet(table: Mapping[str, _Cells], path: Path) -> None:
    import pyarrow as pa  # noqa: PLC0415 - only for those who ask for it
    import pyarrow.parquet as pq  # noqa: PLC0415

    columns: dict[str, Any] = {}
    for name, (values, there) in table.items():
        if values.dtype == object:
            columns[name] = pa.array(values.tolist(), pa.string()).dictionary_encode()
        else:
            # NaN is a value, and not null, as it would be from pandas.
            mask = None if there is None else ~there
            columns[name] = pa.array(values, mask=mask, from_pandas=False)
    pq.write_table(pa.table(columns), path)
