"""A snapshot as a notebook shows it: a table with a row for each metric and a column for each dataset."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from metricfold._core.fold.names import Meaning

__all__ = ["as_table"]

_MOST_ROWS = 200
_ALL = "all"


def as_table(title: str, values: Mapping[str, float], meanings: Mapping[str, Meaning]) -> str:
    """Return numbers as an HTML table; names are text, whatever they hold.

    Args:
        title: what it is about.
        values: by key.
        meanings: what each key stands for.
    """
    rows: dict[tuple[str, str], dict[str, float]] = {}
    columns: dict[str, None] = {}
    for key, value in values.items():
        of = meanings[key]
        rows.setdefault((of.name, of.statistic), {})[of.dataset] = value
        columns.setdefault(of.dataset)
    ordered = sorted(columns, key=lambda dataset: (dataset != "", dataset))
    head = "".join(f"<th>{escape(dataset or _ALL)}</th>" for dataset in ordered)
    body = "".join(
        f'<tr><th style="text-align:left">{escape(" ".join(filter(None, row)))}</th>'
        + "".join(f"<td>{_shown(cells.get(dataset))}</td>" for dataset in ordered)
        + "</tr>"
        for row, cells in [*rows.items()][:_MOST_ROWS]
    )
    more = len(rows) - _MOST_ROWS
    foot = f"<p>{more:,} more rows: as_dict() has them</p>" if more > 0 else ""
    return (
        f"<p>{escape(title)}</p><table><thead><tr><th></th>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table>{foot}"
    )


def _shown(value: float | None) -> str:
    return "" if value is None else escape(f"{value:,.6g}")
