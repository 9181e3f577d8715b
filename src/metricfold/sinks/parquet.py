"""Records as a Parquet table: a row for each value.

    step  wall_time     prefix  key           dataset  name  statistic  value
    50    1760000000.0  train   train_a/loss  a        loss             2.5

A Parquet file cannot grow. So the table is a folder of parts, which pandas, Polars, DuckDB and Arrow
read as one: the newest is written anew with each `flush`, beside the old one, and takes its place once
it is whole; when it is large enough, another one is begun.
"""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from metricfold.sinks.record import Meaning, Record
from metricfold.sinks.selection import SelectiveSink, require

__all__ = ["ParquetSink"]

_PARTS = "metrics-*.parquet"
_TEXTS = ("prefix", "key", "dataset", "name", "statistic")
_COLUMNS = ("step", "wall_time", *_TEXTS, "value")


class ParquetSink(SelectiveSink):
    """Writes each record's scalars to a folder of Parquet files, one row for each value.

    What was logged is in the folder within a second, and a process that is killed leaves whole files.
    ``dataset``, ``name`` and ``statistic`` are empty for what was logged in a dict or as ``extra=``. A
    new process adds files to those that are there; `MetricsLogger.rewind` takes away the rows of the
    steps that will be run again.

    Args:
        folder: a local path, made at the first record; a relative one is meant from the folder that is
            current when the sink is made. Give each run a folder of its own.
        rows: so many make a file.
        select: see `SelectiveSink`.
        key_format: see `SelectiveSink`.

    Raises:
        ImportError: the ``pyarrow`` package is not installed.
        ValueError: `rows` is below 1.
    """

    arrays = False

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        rows: int = 50_000,
        select: str | Sequence[str] = "*",
        key_format: str | Callable[[str], str] = "{key}",
    ) -> None:
        super().__init__(select=select, key_format=key_format)
        require("pyarrow", sink="ParquetSink", extra="parquet")
        if rows < 1:
            raise ValueError(f"rows={rows}, but a file has at least one")
        self.folder = Path(os.path.abspath(folder))  # noqa: PTH100 - resolve() would follow links
        self._most = rows
        self._number = 0  # of the newest part; 0 before the first
        # No other process writes to files of this name.
        self._token = uuid.uuid4().hex[:8]
        self._begin()

    def _begin(self) -> None:
        self._new: list[tuple[Any, ...]] = []  # rows of the newest part that its file does not have
        self._table: Any = None  # the others

    def __repr__(self) -> str:
        return f"ParquetSink({str(self.folder)!r})"

    def close(self) -> None:
        self.flush()

    def flush(self) -> None:
        """Write the newest part anew, if there is something new."""
        if not self._new:
            return
        import pyarrow as pa  # noqa: PLC0415

        self._number = self._number or self._next_number()
        name = f"metrics-{self._number:05d}-{self._token}.parquet"
        tables = [one for one in (self._table, _table(self._new)) if one is not None]
        table = pa.concat_tables(tables).unify_dictionaries().combine_chunks()
        _replace(self.folder / name, table)
        self._table, self._new = table, []

    def rewind(self, step: int) -> None:
        """Take the rows of the steps after `step` out of all parts."""
        import pyarrow.compute as pc  # noqa: PLC0415
        import pyarrow.parquet as pq  # noqa: PLC0415

        self.flush()
        self._begin()
        self._number = 0  # what comes now is a part of its own
        for path in self._parts():
            table = pq.read_table(path, partitioning=None)
            kept = table.filter(pc.less_equal(table["step"], step))
            if not len(kept):
                path.unlink()
            elif len(kept) < len(table):
                _replace(path, kept)

    def _write(self, record: Record) -> None:
        if not -(2**63) <= record.step < 2**63:
            raise OverflowError(f"step {record.step} is beyond the 64 bits that Parquet has for it")
        if len(self._new) + (0 if self._table is None else len(self._table)) >= self._most:
            self.flush()
            self._begin()
            self._number += 1
        if not self._number:
            self._refuse_others()
        for key, value in record.metrics.items():
            meaning = record.keys.get(key, Meaning("", ""))
            of = record.step, record.wall_time, record.prefix, key, *meaning[:3]
            self._new.append((*of, value))

    def _parts(self) -> Iterator[Path]:
        return iter(sorted(self.folder.glob(_PARTS)))

    def _next_number(self) -> int:
        numbers = (path.name.split("-")[1] for path in self._parts())
        return max((int(one) for one in numbers if one.isdecimal()), default=0) + 1

    def _refuse_others(self) -> None:
        """Raise an error if the folder has files that would be read as parts of the table."""
        others = {*self.folder.glob("*.parquet")} - {*self._parts()}
        if others:
            raise FileExistsError(
                errno.EEXIST,
                f"holds other Parquet files, such as {min(others).name!r}, and is left as it is: give "
                "ParquetSink a folder of its own",
                str(self.folder),
            )


def _table(rows: Sequence[tuple[Any, ...]]) -> Any:
    import pyarrow as pa  # noqa: PLC0415

    text = pa.dictionary(pa.int32(), pa.string())
    kinds = [pa.int64(), pa.float64(), *[text] * len(_TEXTS), pa.float64()]
    columns = zip(*rows, strict=True)
    arrays = [pa.array(one, type=kind) for one, kind in zip(columns, kinds, strict=True)]
    return pa.table(dict(zip(_COLUMNS, arrays, strict=True)))


def _replace(path: Path, table: Any) -> None:
    """Put a file in place once it is whole: readers see this one or the one before."""
    import pyarrow.parquet as pq  # noqa: PLC0415

    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.writing")  # which readers leave out
    try:
        pq.write_table(table, beside, compression="zstd")
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
