"""Puts what was measured into docs/scale.md: the tables between its markers, and the plots."""

from __future__ import annotations

from pathlib import Path

from benchmarks.scale.model import Network
from benchmarks.scale.plots import plots, save
from benchmarks.scale.results import Results
from benchmarks.scale.tables import tables

__all__ = ["write"]

_PAGE = Path("docs/scale.md")
_IMAGES = Path("docs/images")


def write(results: Results, network: Network) -> None:
    """Write the page and its plots; raises ValueError if a table has no place there."""
    page = _PAGE.read_text()
    for name, table in {"machine": results.machine, **tables(results, network)}.items():
        begin, end = f"<!-- {name}: generated -->", f"<!-- {name}: end -->"
        if page.count(begin) != 1 or page.count(end) != 1:
            raise ValueError(f"{_PAGE} needs one line {begin!r} and, below it, one {end!r}")
        before, _, rest = page.partition(begin)
        _, _, after = rest.partition(end)
        page = f"{before}{begin}\n\n{table}\n\n{end}{after}"
    for name, figure in plots(results, network).items():
        save(figure, _IMAGES / f"scale-{name}.png")
    _PAGE.write_text(page)
