"""A run file, read by byte offset into columns, while it is being written or after.

    run = read("runs/1")
    run.columns[Key("train", "web", "loss", "")].values
    run.update()                      # what was appended since

Records that hold the same keys are rows of one block, so that a line costs one look-up and one copy
of its numbers; a column is made when it is asked for. Histograms, which are the most of many a file,
stay text until then.

Only whole lines are taken in. A file that is shorter than what was read of it, that ends that with
another line, or that is another file by now, has been cut by `MetricsLogger.rewind` or begun anew:
then all of it is read again.
"""

from __future__ import annotations

import json
import math
import os
import re
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from metricfold._core.sketch import Histogram
from metricfold.look.place import LookError, find
from metricfold.metric import check_name, escaped
from metricfold.sinks.header import better
from metricfold.sinks.lines import (
    BEGINNING,
    HEAD,
    LONGEST,
    is_ours,
    record_in,
    to_cells,
    to_histogram,
    to_meaning,
    to_number,
)
from metricfold.sinks.record import Meaning

__all__ = ["Arrays", "Column", "Histograms", "Key", "RunFile", "Update", "read"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
T = TypeVar("T")

_WRONG = (ArithmeticError, AttributeError, KeyError, TypeError, ValueError)
"""What a part of a line raises that is something else than it should be."""
_CHUNK = 1 << 23
_MARK = 512
"""So many bytes before the offset are looked at again: they hold the last line's time."""
_TO_HISTOGRAMS = b'}, "histograms": '
_LAST_HISTOGRAM = re.compile(rb'"total_squares": "?[-+.\w]+"?\}\}\}\Z')
"""How a line ends that breaks off nowhere; in a name the quotes would be escaped."""
_BESIDE_HISTOGRAMS = (b'"arrays": {', b'"alerts": [', b'"keys": {', b'"run": {', BEGINNING, b"\0")


class Key(NamedTuple):
    """What a column is about.

    Args:
        prefix: what it was logged with, such as ``"train"``; empty if there was none.
        dataset: empty: of a metric without one, or of all of them together.
        name: of the metric.
        statistic: such as ``"p50"``, as `Snapshot.value` calls it; empty if it is one number.
    """

    prefix: str
    dataset: str
    name: str
    statistic: str = ""


class Update(NamedTuple):
    """What `RunFile.update` has found.

    Args:
        records: so many records are new; after a `reset` all that there are.
        reset: the file was cut, replaced or begun anew, and all of it was read again.
        gone: there is no file now; what was read of it stays.
    """

    records: int
    reset: bool = False
    gone: bool = False


@dataclass(frozen=True, eq=False)
class Column:
    """The values of one key, in the order of the file; nobody may change the arrays.

    Attributes:
        printed: the key as it is logged, such as ``"train_web/len_stat_p50"``.
        aggregation: the type, such as ``"mean"``; None where the file does not say it.
        steps: shape (n,).
        wall_times: in seconds since 1970, shape (n,).
        values: as they were logged, with NaN and infinities, shape (n,).
    """

    printed: str
    aggregation: str | None
    steps: IntArray
    wall_times: FloatArray
    values: FloatArray

    def __len__(self) -> int:
        return len(self.steps)

    def ordered(self) -> Column:
        """Return it with steps that ascend; of several values of one step the last one written."""
        if len(self) < 2 or (np.diff(self.steps) > 0).all():
            return self
        places = np.argsort(self.steps, kind="stable")
        steps = self.steps[places]
        places = places[np.append(steps[1:] != steps[:-1], True)]
        return Column(
            self.printed,
            self.aggregation,
            self.steps[places],
            self.wall_times[places],
            self.values[places],
        )


class _Parts:
    """What a key has besides numbers, at some steps."""

    def __init__(self, printed: str, run: RunFile) -> None:
        self.printed = printed
        self._run = run
        self._records: list[int] = []
        self._parts: list[Any] = []

    @property
    def steps(self) -> IntArray:
        return self._run._steps_of(self._records)  # noqa: SLF001 - they are one thing

    @property
    def wall_times(self) -> FloatArray:
        return self._run._times_of(self._records)  # noqa: SLF001

    def __len__(self) -> int:
        return len(self._records)


class Histograms(_Parts):
    """The histograms of a DISTRIBUTION, in the order of the file.

    Attributes:
        printed: the key as it is logged.
        steps: shape (n,).
        wall_times: in seconds since 1970, shape (n,).
    """

    def __getitem__(self, place: int) -> Histogram:
        try:
            return to_histogram(self._parts[place])
        except _WRONG as error:
            step = self.steps[place]
            raise LookError(
                f"{escaped(str(self._run.path))}: {self.printed!r} of step {step} is no histogram ({error})"
            ) from error

    def __iter__(self) -> Iterator[Histogram]:
        return (self[place] for place in range(len(self)))


class Arrays(_Parts):
    """The cells of a metric with axes, in the order of the file: pairs of axes and values.

    Axes are lists of a name and a size, or labels, as in `Record.arrays`; values have a dimension for
    each.
    """

    def __getitem__(self, place: int) -> tuple[list[Any], FloatArray]:
        axes, values = self._parts[place]
        return axes, values

    def __iter__(self) -> Iterator[tuple[list[Any], FloatArray]]:
        return (self[place] for place in range(len(self)))


def read(path: str | os.PathLike[str]) -> RunFile:
    """Return what is in a run file, or in the only one of a folder, so far.

    Raises:
        LookError: there is none, or it is something else than records of `JSONLSink`.
    """
    run = RunFile(find(path))
    if run.update().gone:
        raise LookError(f"{escaped(str(run.path))} does not exist any more")
    return run


class RunFile:
    """A run file and what was read of it.

    Attributes:
        path: the file.
        headers: what each process that wrote to it has said of the run, with the ``"step"`` and the
            ``"wall_time"`` of the record that brought it.
        alerts: what was found, as JSON objects have it, with ``"step"``, ``"wall_time"``, ``"prefix"``.
        torn: lines that break off, as a machine that goes down leaves them behind, and are left out.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._failed = False
        self._forget()

    def _forget(self) -> None:
        self.headers: list[dict[str, Any]] = []
        self.alerts: list[dict[str, Any]] = []
        self._alerts: dict[int, list[dict[str, Any]]] = {}  # of each record that has any
        self.torn = 0
        self._identity: tuple[int, int] | None = None
        self._offset = 0
        self._mark = b""  # what stands before the offset
        self._lines = 0
        self._steps, self._times = array("q"), array("d")
        self._of_block, self._rows = array("q"), array("q")  # where each record's numbers are
        self._blocks: dict[tuple[str, tuple[str, ...]], _Block] = {}
        self._all_blocks: list[_Block] = []
        self._places: dict[Key, list[tuple[_Block, int]]] = {}
        self._meanings: dict[tuple[str, str], Meaning] = {}
        self._datasets: dict[str, list[str]] = {}  # that were said, by prefix; the longest first
        self._histograms: dict[Key, Histograms] = {}
        self._arrays: dict[Key, Arrays] = {}
        # What is looked at when histograms are asked for: of which record, with which prefix.
        self._unread: list[tuple[int, str, bytes | dict[str, Any]]] = []
        self._columns: dict[Key, Column] = {}

    def __repr__(self) -> str:
        return f"<RunFile {str(self.path)!r}: {self.records} records, {len(self._places)} columns>"

    # -- What there is

    @property
    def records(self) -> int:
        return len(self._steps)

    @property
    def last_step(self) -> int | None:
        """The step of the newest record; None if there is none."""
        return self._steps[-1] if self._steps else None

    @property
    def last_time(self) -> float | None:
        """When that was logged, in seconds since 1970."""
        return self._times[-1] if self._times else None

    @property
    def header(self) -> dict[str, Any]:
        """What the newest process has said of the run; empty if the file is of an older version."""
        return self.headers[-1] if self.headers else {}

    @property
    def label(self) -> str:
        """The name of the run, or what its folder or file is called."""
        name = self.header.get("name")
        if isinstance(name, str) and name:
            return name
        usual = self.path.stem in ("metrics", "run", "log", "train")
        return self.path.absolute().parent.name if usual else self.path.stem

    @property
    def columns(self) -> Mapping[Key, Column]:
        """The numbers by key, in the order in which keys first came."""
        return _Columns(self)

    @property
    def histograms(self) -> Mapping[Key, Histograms]:
        """The histograms by key."""
        self._read_histograms()
        return self._histograms

    @property
    def arrays(self) -> Mapping[Key, Arrays]:
        """The cells of metrics with axes by key."""
        return self._arrays

    def record(self, number: int) -> tuple[int, float, str, dict[Key, float]]:
        """Return the step, the wall time, the prefix and the numbers of one record, from 0 on."""
        block = self._all_blocks[self._of_block[number]]
        start = self._rows[number] * block.width
        values = block.values[start : start + block.width].tolist()
        numbers = dict(zip(block.keys, values, strict=True))
        return self._steps[number], self._times[number], block.prefix, numbers

    def alerts_of(self, number: int) -> list[dict[str, Any]]:
        """Return the alerts of one record, from 0 on."""
        return self._alerts.get(number, [])

    def better(self, key: Key) -> str | None:
        """Return whether ``"lower"`` or ``"higher"`` values of a key are better; None: nobody knows.

        `MetricsLogger(better=)` says so; otherwise ``loss``, names that end in ``_loss``, and
        ``perplexity`` are lower. Counts beside a value, such as ``"nan_count"``, are neither.
        """
        return better(key.name, key.statistic, self.header)

    # -- Reading

    def update(self) -> Update:
        """Take in the whole lines that have been added, or all again if the file has been cut.

        Raises:
            LookError: the file cannot be read, or something in it is no record.
        """
        before = self.records
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return Update(0, gone=True)
        except OSError as error:
            raise self._unreadable(error) from error
        with file:
            try:
                status = os.fstat(file.fileno())
                identity = status.st_dev, status.st_ino
                file.seek(max(self._offset - len(self._mark), 0))
                same = (
                    self._identity in (None, identity) and file.read(len(self._mark)) == self._mark
                )
                reset = not same or self._failed
                if reset:
                    self._forget()
                    before = 0
                file.seek(self._offset)
                self._identity, self._failed = identity, True
                self._take_in(file)
                self._failed = False
            except OSError as error:
                raise self._unreadable(error) from error
        if self.records > before or reset:
            self._columns = {}
            for block in self._all_blocks:
                block.forget_table()
        return Update(self.records - before, reset)

    def _unreadable(self, error: OSError) -> LookError:
        return LookError(f"{escaped(str(self.path))} cannot be read ({error.strerror or error})")

    def _take_in(self, file: Any) -> None:
        rest = b""
        while True:
            new = file.read(_CHUNK)
            text = rest + new
            end = text.rfind(b"\n") + 1
            if not new:
                # A last line without its end is taken in if it is whole, or left for later.
                if text and record_in(text)[0] is not None and not text.endswith(b"\n"):
                    end = len(text)
                else:
                    end = 0
            if self._offset == 0 and text and not is_ours(text[:HEAD]):
                raise LookError(
                    f"{escaped(str(self.path))} is not a run: it begins with {text[:40]!r}, and not "
                    "with a record of JSONLSink"
                )
            whole = text[:end]
            for line in whole.split(b"\n"):
                if line:
                    self._lines += 1
                    self._add(line)
            if end:
                self._offset += end
                self._mark = (self._mark + whole[-_MARK:])[-_MARK:]
            rest = text[end:]
            if not new:
                return
            if len(rest) > LONGEST:
                raise LookError(
                    f"{escaped(str(self.path))}, line {self._lines + 1} is longer than {LONGEST} "
                    "bytes, which no record is"
                )

    def _add(self, line: bytes) -> None:
        at = line.find(_TO_HISTOGRAMS)
        if at > 0:
            tail = line[at + len(_TO_HISTOGRAMS) :]
            ended = tail == b"{}}" or _LAST_HISTOGRAM.search(tail, max(0, len(tail) - 64))
            if ended and not any(mark in tail for mark in _BESIDE_HISTOGRAMS):
                try:
                    head = json.loads(line[:at] + b"}}")
                    self._add_numbers(head)
                except _WRONG:
                    pass  # which the whole line explains
                else:
                    if tail != b"{}}":
                        self._unread.append((self.records - 1, head["prefix"], tail[:-1]))
                    return
        if line.isspace():
            return
        record, torn = record_in(line)
        self.torn += torn
        if record is None:
            if torn:
                return
            raise self._no_record("it has no whole number 'step', or no 'metrics'", line)
        try:
            self._add_record(record)
        except _WRONG as error:
            raise self._no_record(f"{type(error).__name__}: {error}", line) from error

    def _no_record(self, why: str, line: bytes) -> LookError:
        return LookError(
            f"{escaped(str(self.path))}, line {self._lines} is not a record of JSONLSink ({escaped(why)}): "
            f"{line[:60]!r}; remove the line, or give the path of a run"
        )

    def _add_record(self, record: dict[str, Any]) -> None:
        prefix = record.setdefault("prefix", "")  # older lines have none
        for printed, said in record.get("keys", {}).items():
            self._learn(prefix, printed, to_meaning(said))
        self._add_numbers(record)
        number, place = self.records - 1, {"step": record["step"], "wall_time": record["wall_time"]}
        if record["histograms"]:
            self._unread.append((number, prefix, record["histograms"]))
        for printed, cells in record.get("arrays", {}).items():
            found = to_cells(cells)
            both = found["axes"], found["values"]
            self._part(self._arrays, Arrays, number, prefix, printed, both)
        for alert in record.get("alerts", []):
            self.alerts.append({**place, "prefix": prefix, **alert})
            self._alerts.setdefault(number, []).append(self.alerts[-1])
        if "run" in record:
            self.headers.append({**record["run"], **place})

    def _add_numbers(self, record: dict[str, Any]) -> None:
        step, time, metrics = record["step"], record["wall_time"], record["metrics"]
        prefix = record["prefix"]
        if type(step) is not int or not isinstance(metrics, dict) or not isinstance(prefix, str):
            raise TypeError("it has no whole number 'step', or no 'metrics'")
        names = prefix, tuple(metrics)
        block = self._blocks.get(names) or self._new_block(*names)
        values = [*metrics.values()]
        if not _PLAIN.issuperset(map(type, values)):
            values = [to_number(value) for value in values]
        row, when = array("d", values), to_number(time)
        if not math.isfinite(when):
            raise ValueError("its time is not finite")
        self._of_block.append(block.number)
        self._rows.append(len(block.records))
        self._steps.append(step)
        self._times.append(when)
        block.records.append(len(self._steps) - 1)
        block.values.extend(row)

    def _new_block(self, prefix: str, names: tuple[str, ...]) -> _Block:
        if prefix:
            check_name("its prefix", prefix)
        for printed in names:
            check_name("a key", printed)
        block = _Block(len(self._all_blocks), prefix, len(names))
        self._blocks[prefix, names] = block
        self._all_blocks.append(block)
        for place, printed in enumerate(names):
            key, aggregation = self._key(prefix, printed)
            block.printed.append((printed, aggregation))
            block.keys.append(key)
            self._places.setdefault(key, []).append((block, place))
        return block

    # -- What keys mean

    def _learn(self, prefix: str, printed: str, said: Meaning) -> None:
        if self._meanings.get((prefix, printed)) == said:
            return
        self._meanings[prefix, printed] = said
        known = self._datasets.setdefault(prefix, [])
        if said.dataset and said.dataset not in known:
            known.append(said.dataset)
            known.sort(key=len, reverse=True)
        # Rows of the same keys may mean something else from now on.
        self._blocks = {}

    def _key(self, prefix: str, printed: str) -> tuple[Key, str | None]:
        """Return what a key is about, as it was said or, failing that, as keys are made."""
        said = self._meanings.get((prefix, printed))
        if said is not None:
            return Key(prefix, *said[:3]), said.aggregation
        if not prefix:
            group, slash, name = printed.partition("/")
            return (
                Key(group, "", name) if slash and group and name else Key("", "", printed)
            ), None
        text = printed.removeprefix(prefix)
        if text == printed or text[0] not in "/_" or "/" not in text:
            return Key(prefix, "", printed), None
        if text[0] == "/":
            return (Key(prefix, "", text[1:]) if text[1:] else Key(prefix, "", printed)), None
        for dataset in self._datasets.get(prefix, ()):
            if text.startswith(f"_{dataset}/") and len(text) > len(dataset) + 2:
                return Key(prefix, dataset, text[len(dataset) + 2 :]), None
        dataset, _, name = text[1:].partition("/")
        return (Key(prefix, dataset, name) if dataset and name else Key(prefix, "", printed)), None

    # -- Columns and parts, when they are asked for

    def _column(self, key: Key) -> Column:
        if key not in self._columns:
            places = self._places[key]
            printed, aggregation = places[-1][0].printed[places[-1][1]]
            records = np.concatenate([np.array(block.records, np.int64) for block, _ in places])
            values = np.concatenate([block.table()[:, place] for block, place in places])
            if len(places) > 1:
                order = np.argsort(records, kind="stable")
                records, values = records[order], values[order]
            steps, times = self._steps_of(records), self._times_of(records)
            for one in (values, steps, times):
                one.flags.writeable = False
            self._columns[key] = Column(printed, aggregation, steps, times, values)
        return self._columns[key]

    def _steps_of(self, records: Any) -> IntArray:
        found: IntArray = np.array(self._steps, np.int64)[records]
        return found

    def _times_of(self, records: Any) -> FloatArray:
        found: FloatArray = np.array(self._times, np.float64)[records]
        return found

    def _read_histograms(self) -> None:
        unread, self._unread = self._unread, []
        for number, prefix, text in unread:
            try:
                found = json.loads(text) if isinstance(text, bytes) else text
                for printed, histogram in found.items():
                    self._part(self._histograms, Histograms, number, prefix, printed, histogram)
            except _WRONG as error:
                raise LookError(
                    f"{escaped(str(self.path))}: the histograms of step {self._steps[number]} are none "
                    f"({escaped(str(error))})"
                ) from error

    def _part(
        self,
        parts: dict[Key, Any],
        kind: type[_Parts],
        number: int,
        prefix: str,
        printed: str,
        part: object,
    ) -> None:
        check_name("a key", printed)
        key, _ = self._key(prefix, printed)
        of_key = parts.get(key)
        if of_key is None:
            of_key = parts[key] = kind(printed, self)
        of_key._records.append(number)  # noqa: SLF001 - they are one thing
        of_key._parts.append(part)  # noqa: SLF001


_PLAIN = {float, int}


class _Block:
    """Rows of records that hold the same keys."""

    def __init__(self, number: int, prefix: str, width: int) -> None:
        self.number, self.prefix, self.width = number, prefix, width
        self.keys: list[Key] = []
        self.printed: list[tuple[str, str | None]] = []  # each key, and its aggregation
        self.records = array("q")  # the number of each row's record
        self.values = array("d")
        self._table: FloatArray | None = None

    def table(self) -> FloatArray:
        """Return the values, shape (rows, width)."""
        if self._table is None:
            self._table = np.array(self.values, np.float64).reshape(len(self.records), self.width)
        return self._table

    def forget_table(self) -> None:
        self._table = None


class _Columns(Mapping[Key, Column]):
    """The columns of a run, each made when it is asked for."""

    def __init__(self, run: RunFile) -> None:
        self._run = run

    def __getitem__(self, key: Key) -> Column:
        return self._run._column(key)  # noqa: SLF001 - they are one thing

    def __iter__(self) -> Iterator[Key]:
        return iter(self._run._places)  # noqa: SLF001

    def __len__(self) -> int:
        return len(self._run._places)  # noqa: SLF001
