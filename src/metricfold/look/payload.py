"""The data of a page: what was logged in one or several runs, in as few bytes as can be drawn from.

    4 bytes            the length of the header (little-endian)
    the header         JSON: runs, columns, maps, alerts; and where in the rest their numbers are
    the rest           numbers, one block after another

A number of a curve is a float32 whose last 8 bits are zero (5 digits), and the first bytes of all numbers of a
block stand together, then the second ones, … : so a block takes 2 bytes a number when it is packed by gzip.
`export` has all digits.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from metricfold.look.families import Family, families
from metricfold.look.heat import Heat, over_time
from metricfold.look.reading import Column, Key, RunFile
from metricfold.look.thinning import thinned

__all__ = ["packed"]

Floats = npt.NDArray[np.float64]

_CURVES = 12
"""Families of at most so many members are drawn as curves, too."""
_FEWEST_POINTS, _MOST_POINTS, _POINTS = 1200, 4000, 1_000_000
"""Points of a curve, and of all together."""
_CELLS = 1 << 18
"""So many cells of arrays a page holds; of more, fewer logs are shown."""
_LEAST_LOGS, _MOST_LOGS = 2, 60
_RECENT = 50
_DRAWN = 1e-37, 3e38
"""What a float32 holds with all its digits."""


def packed(runs: Sequence[RunFile], points: int | None = None) -> bytes:
    """Return the data of a page about `runs`.

    Curves have about `points` points each, by default 4,000, and fewer where there are more than 250 of them.
    """
    blocks = _Blocks()
    parts = [_Parts.of(run) for run in runs]
    if points is None:
        curves = sum(len(part.curves) for part in parts)
        points = max(_FEWEST_POINTS, min(_MOST_POINTS, _POINTS // max(1, curves)))
    room = _CELLS // max(1, sum(len(part.run.arrays) + len(part.families) for part in parts))
    header = {"format": 1, "runs": [_run(part, blocks, points, room) for part in parts]}
    text = json.dumps(header, separators=(",", ":"), allow_nan=False).encode()
    return len(text).to_bytes(4, "little") + text + b"".join(blocks.parts)


@dataclass(frozen=True)
class _Parts:
    """A run, and which of its columns are drawn as curves and which as cells of a map."""

    run: RunFile
    columns: dict[Key, Column]
    families: list[Family[Key]]
    curves: list[Key]
    members: dict[Key, tuple[str, int]]  # of the curves: their family, and their place in it

    @classmethod
    def of(cls, run: RunFile) -> _Parts:
        columns = {key: column.ordered() for key, column in run.columns.items() if len(column)}
        found = families(
            (key, (key.prefix, key.dataset, key.statistic), key.name) for key in columns
        )
        large = [family for family in found if len(family.members) > _CURVES]
        hidden = {key for family in large for key in family.members}
        members = {
            key: (family.name, place[0])
            for family in found
            if len(family.members) <= _CURVES and len(family.axes) == 1
            for key, place in family.members.items()
        }
        return cls(run, columns, found, [key for key in columns if key not in hidden], members)


class _Blocks:
    """The numbers, and where they are: ``[kind, offset, count]``, with the first one of steps."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self._end = 0
        self._known: dict[bytes, list[Any]] = {}

    def numbers(self, values: Floats) -> list[Any]:
        small = np.abs(values[np.isfinite(values) & (values != 0)])
        if small.size and not (_DRAWN[0] < small.min() and small.max() < _DRAWN[1]):
            return self._add("d", values.astype("<f8").tobytes(), values.size)
        bits = values.astype("<f4").view("<u4")
        rounded = (bits + np.uint32(0x80)) & np.uint32(0xFFFFFF00)
        bits = np.where(np.isfinite(values), rounded, bits & np.uint32(0xFFFFFF00))
        return self._add("f", _planes(bits.astype("<u4")), values.size)

    def steps(self, steps: npt.NDArray[np.int64]) -> list[Any]:
        known = steps.tobytes()
        if known not in self._known:
            gaps = np.diff(steps)
            if steps.size and (gaps < 2**31).all() and abs(int(steps[0])) < 2**53:
                found = self._add("i", _planes(gaps.astype("<u4")), steps.size)
                found.append(int(steps[0]))
            else:
                found = self._add("d", steps.astype("<f8").tobytes(), steps.size)
            self._known[known] = found
        return self._known[known]

    def octets(self, numbers: npt.NDArray[np.uint8]) -> list[Any]:
        return self._add("b", numbers.tobytes(), numbers.size)

    def _add(self, kind: str, data: bytes, count: int) -> list[Any]:
        self.parts.append(data)
        self._end += len(data)
        return [kind, self._end - len(data), count]


def _planes(numbers: npt.NDArray[np.uint32]) -> bytes:
    return numbers.view(np.uint8).reshape(-1, 4).T.tobytes()


def _number(value: float) -> float | str:
    """Return what JSON has for a number; JavaScript makes a number of the text again."""
    if math.isfinite(value):
        return float(value)
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _run(part: _Parts, blocks: _Blocks, points: int, room: int) -> dict[str, Any]:
    run = part.run
    maps = [_map_of(part, family, blocks, room) for family in part.families]
    return {
        "label": run.label,
        "path": str(run.path),
        "header": _json(run.header),
        "records": run.records,
        "lastStep": run.last_step,
        "lastTime": run.last_time,
        "secondsPerStep": _pace(part.columns.values()),
        "columns": [_column(part, key, blocks, points) for key in part.curves],
        "maps": maps + _arrays(run, blocks, room),
        "heats": [
            _heat(key, heat, blocks)
            for key, histograms in run.histograms.items()
            if (heat := over_time(histograms)) is not None
        ],
        "alerts": [_json(alert) for alert in run.alerts],
    }


def _pace(columns: Iterable[Column]) -> float | None:
    """Return the seconds of a step, over the last logs of what was logged most often."""
    longest = max(columns, key=lambda column: column.steps.size, default=None)
    if longest is None or longest.steps.size < 2:
        return None
    steps, times = longest.steps[-_RECENT:], longest.wall_times[-_RECENT:]
    # A median, as a pause between two logs is none of a step's time.
    pace = float(np.median(np.diff(times) / np.diff(steps)))
    return pace if pace > 0 else None


def _json(value: Any) -> Any:
    """Return `value` as JSON has it: what is not finite as a text."""
    if isinstance(value, dict):
        return {str(name): _json(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_json(one) for one in value]
    if isinstance(value, float):
        return _number(value)
    return value if isinstance(value, str | int | bool | None) else str(value)


def _column(part: _Parts, key: Key, blocks: _Blocks, points: int) -> dict[str, Any]:
    column = part.columns[key]
    steps, values = column.steps, column.values
    bad = ~np.isfinite(values)
    fewer = thinned(values, points)
    kept = slice(None) if fewer is None else fewer.points
    entry: dict[str, Any] = {
        **_called(key),
        "printed": column.printed,
        "aggregation": column.aggregation,
        "better": part.run.better(key),
        "count": int(values.size),
        "x": blocks.steps(steps[kept]),
        "y": blocks.numbers(values[kept]),
    }
    if fewer is not None:
        entry["means"] = {
            "x": blocks.steps(steps[fewer.middles]),
            "y": blocks.numbers(fewer.means),
            "length": fewer.length,
        }
        # What is left of a curve is no sample of its values.
        entry["last"] = {
            "x": blocks.steps(steps[-_RECENT:]),
            "y": blocks.numbers(values[-_RECENT:]),
        }
    if bad.any():
        where = steps[bad]
        entry["bad"] = [int(where.size), int(where[0]), int(where[-1])]
    if key in part.members:
        entry["family"] = list(part.members[key])
    return entry


def _called(key: Key) -> dict[str, str]:
    return {
        "prefix": key.prefix,
        "dataset": key.dataset,
        "name": key.name,
        "statistic": key.statistic,
    }


def _heat(key: Key, heat: Heat, blocks: _Blocks) -> dict[str, Any]:
    return {
        **_called(key),
        "edges": [float(f"{edge:.6g}") for edge in heat.edges],
        "log": heat.log,
        "x": blocks.steps(heat.steps),
        "most": heat.most,
        "shares": blocks.octets(heat.shares),
        "logs": heat.logs,
    }


def _map_of(part: _Parts, family: Family[Key], blocks: _Blocks, room: int) -> dict[str, Any]:
    columns = part.columns
    grids = {columns[key].steps.tobytes(): columns[key].steps for key in family.members}
    steps = max(grids.values(), key=len)
    shape = [len(values) for _, values in family.axes]
    chosen = _chosen(len(steps), int(np.prod(shape)), room, flat=len(shape) == 1)
    cells = np.full([len(chosen), *shape], np.nan)
    holes = np.ones(cells.shape, dtype=np.uint8)  # where nothing was logged
    for key, place in family.members.items():
        column = columns[key]
        at = np.searchsorted(column.steps, steps[chosen])
        at = np.minimum(at, column.steps.size - 1)
        same = column.steps[at] == steps[chosen]
        cell = np.ravel_multi_index(place, shape)
        cells.reshape(len(chosen), -1)[:, cell] = np.where(same, column.values[at], np.nan)
        holes.reshape(len(chosen), -1)[:, cell] = ~same
    key = next(iter(family.members))
    return {
        **_called(key._replace(name=family.name)),
        "better": part.run.better(key),
        "axes": [[title, [str(value) for value in values]] for title, values in family.axes],
        "x": blocks.steps(steps[chosen]),
        "y": blocks.numbers(cells.reshape(-1)),
        "holes": blocks.octets(holes.reshape(-1)),
        "logs": len(steps),
    }


def _arrays(run: RunFile, blocks: _Blocks, room: int) -> list[dict[str, Any]]:
    results = []
    for key, arrays in run.arrays.items():
        if not len(arrays):
            continue
        axes, last = arrays[len(arrays) - 1]
        chosen = _chosen(len(arrays), last.size, room, flat=last.ndim == 1)
        steps, cells = [], []
        for at in chosen.tolist():
            its_axes, values = arrays[at]
            # An axis may have grown since.
            if its_axes == axes:
                steps.append(int(arrays.steps[at]))
                cells.append(np.asarray(values, dtype=np.float64).reshape(-1))
        order = np.argsort(steps, kind="stable")
        results.append(
            {
                **_called(key),
                "better": run.better(key),
                "axes": [
                    [str(title), [str(n) for n in (range(of) if isinstance(of, int) else of)]]
                    for title, of in axes
                ],
                "x": blocks.steps(np.asarray(steps, dtype=np.int64)[order]),
                "y": blocks.numbers(np.concatenate([cells[at] for at in order])),
                "logs": len(arrays),
            }
        )
    return results


def _chosen(logs: int, cells: int, room: int, *, flat: bool) -> npt.NDArray[np.int64]:
    """Return which logs of an array are shown, evenly and with the last one."""
    most = 8 * _MOST_LOGS if flat else _MOST_LOGS
    count = min(logs, most, max(_LEAST_LOGS, room // max(cells, 1)))
    return np.unique(np.linspace(logs - 1, 0, count).round().astype(np.int64))
