"""Records as blocks of aligned lines, one for each metric, which ``grep`` finds.

    step 150  train            all   python_code   python_docs
    step 150  loss           2.310         2.104         2.512
    step 150  tokens_seen  120,000        80,000        40,000

One block per prefix, one column per dataset (``all`` for what has none), one row per name.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from metricfold.sinks.board import readings_of
from metricfold.sinks.drawing import number
from metricfold.sinks.record import Record

__all__ = ["Blocks"]


class Blocks:
    """Prints records as blocks, laid out as those before, so that nothing jumps."""

    def __init__(self) -> None:
        self._blocks: dict[str, _Block] = {}  # prefix -> the newest one
        self._widths: dict[str, dict[str, int]] = {}  # prefix -> column -> widest cell so far

    def lines(self, record: Record) -> list[str]:
        """Return the lines of a record."""
        found = []
        for block in _blocks_of(record):
            prefix, shown = block.prefix, self._blocks.get(block.prefix)
            laid_out = self._blocks[prefix] = block.over(shown) if shown else block
            printed = replace(block, columns=laid_out.columns).folded()
            found += _lines(printed, self._widths.setdefault(prefix, {}))
        return found


_ALL = "all"
_MISSING = "-"


@dataclass(slots=True)
class _Block:
    """What the table of one prefix shows: cells by (row, column)."""

    prefix: str
    step: int
    columns: list[str]
    rows: list[str]
    cells: dict[tuple[str, str], str]

    def row(self, name: str) -> list[str]:
        return [self.cells.get((name, column), _MISSING) for column in self.columns]

    def folded(self) -> _Block:
        """Return a block of one column if the totals of all datasets say what the only one says."""
        if len(self.columns) != 2 or _ALL not in self.columns:
            return self
        (only,) = (column for column in self.columns if column != _ALL)
        pairs = map(self.row, self.rows)
        both = {total == own for total, own in pairs if _MISSING not in (total, own)}
        if both != {True}:
            return self
        cells = {(row, only): cell for (row, _), cell in self.cells.items()}
        return replace(self, columns=[only], cells=cells)

    def over(self, shown: _Block) -> _Block:
        """Return this block laid out as the one `shown` before it, so that nothing jumps."""
        cells = {**shown.cells, **self.cells} if shown.step == self.step else self.cells
        rows = _inserted(shown.rows, self.rows)
        columns = _inserted(shown.columns, self.columns)
        return _Block(self.prefix, self.step, _ordered(columns), rows, cells)


def _inserted(shown: list[str], wanted: list[str]) -> list[str]:
    """Return `shown` with what is new in `wanted`, each behind the one that it follows there."""
    result, place = list(shown), 0
    for name in wanted:
        if name in result:
            place = result.index(name) + 1
        else:
            result.insert(place, name)
            place += 1
    return result


def _blocks_of(record: Record) -> list[_Block]:
    """Sort the numbers of `record` into one block per prefix."""
    blocks = []
    for prefix, readings in readings_of(record).items():
        metrics: dict[tuple[str, str], dict[str, float]] = {}
        for of, value in readings:
            counts = of.aggregation == "categorical_count"
            name = f"{of.name}_count_{of.statistic}" if counts else of.name
            statistic = "" if counts else of.statistic
            metrics.setdefault((name, of.dataset or _ALL), {})[statistic] = value
        cells = {
            (row, column): cell
            for (name, column), values in metrics.items()
            for row, cell in _rows(name, values)
        }
        rows = list(dict.fromkeys(row for row, _ in cells))
        columns = _ordered(dict.fromkeys(column for _, column in cells))
        blocks.append(_Block(prefix, record.step, columns, rows, cells))
    return [block for block in blocks if block.rows]


def _rows(name: str, values: dict[str, float]) -> Iterable[tuple[str, str]]:
    """Fold the statistics of one distribution into the few rows in which they are read."""
    if "" in values:
        yield name, number(values[""])
    if "mean" in values:
        spread = f" ± {number(values['std'])}" if "std" in values else ""
        yield f"{name} mean ± std", number(values["mean"]) + spread
    if "min" in values and "max" in values:
        yield f"{name} min … max", f"{number(values['min'])} … {number(values['max'])}"
    percentiles = [one for one in values if one.startswith("p")]
    if percentiles:
        numbers = " · ".join(number(values[one]) for one in percentiles)
        yield f"{name} {' · '.join(percentiles)}", numbers
    for statistic, value in values.items():
        if statistic not in ("", "mean", "std", "min", "max", *percentiles):
            row = f"{name} count" if statistic == "count" else f"{name}_{statistic}"
            yield row, number(value)


def _ordered(columns: Iterable[str]) -> list[str]:
    return sorted(columns, key=lambda column: column != _ALL)


def _lines(block: _Block, widths: dict[str, int]) -> list[str]:
    """Return a line per row; `widths` is kept from record to record, so that columns stay put."""
    step = f"step {block.step}"
    names = ["step", "row", *block.columns]
    grid = [
        [step, block.prefix, *block.columns],
        *([step, row, *block.row(row)] for row in block.rows),
    ]
    for name, cells in zip(names, zip(*grid, strict=True), strict=True):
        widths[name] = max(widths.get(name, 0), *map(len, cells))
    across = [widths[name] for name in names]
    return ["  ".join(_aligned(cells, across)) for cells in grid]


def _aligned(cells: list[str], widths: list[int]) -> Iterable[str]:
    for place, (cell, width) in enumerate(zip(cells, widths, strict=True)):
        yield cell.ljust(width) if place < 2 else cell.rjust(width)
