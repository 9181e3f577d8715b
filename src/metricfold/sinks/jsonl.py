"""Records as JSON lines: a file that any tool reads, and that loses nothing.

    {"step": 50, "wall_time": 1760000000.0, "prefix": "train", "metrics": {"train/loss": 2.31},
     "histograms": {}}

`metricfold.sinks.lines` says what a line holds; `metricfold.look` reads whole runs fast.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from metricfold.sinks.files import LinesSink
from metricfold.sinks.lines import (
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


class JSONLSink(LinesSink):
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
        super().__init__(path, select=select, key_format=key_format)
        self.arrays = arrays
        self._header: dict[str, Any] | None = None  # what is known of the run

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

    def _forget(self, *, cut: bool) -> None:
        if cut:
            self._told: dict[str, set[str]] = {}  # the keys whose meaning it knows, by prefix
            self._headed = False  # whether it knows what is known of the run

    def _is_ours(self, start: bytes) -> bool:
        return is_ours(start)

    def _is_half(self, last: bytes) -> bool:
        return began(last) and parsed(last) is None

    def _lines(self) -> Iterator[tuple[int, bytes, int | None]]:
        for line in lines_of(self.path):
            yield line.start, line.text, None if line.record is None else line.record["step"]


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
