"""`python -m benchmarks.scale.page FILE`: put what was measured into docs/scale.md, with plots.

FILE is what `python -m benchmarks.scale --json FILE` wrote.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.scale.model import TCP
from benchmarks.scale.plots import plots, save
from benchmarks.scale.results import Results
from benchmarks.scale.tables import tables

_PAGE = Path("docs/scale.md")
_IMAGES = Path("docs/images")


def main() -> int:
    """Draw the plots and write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale.page", allow_abbrev=False)
    parser.add_argument("results", type=Path, metavar="FILE")
    results = Results.load(parser.parse_args().results)
    page = _PAGE.read_text()
    for name, table in {"machine": results.machine, **tables(results, TCP)}.items():
        begin, end = f"<!-- {name}: generated -->", f"<!-- {name}: end -->"
        if page.count(begin) != 1 or page.count(end) != 1:
            print(f"{_PAGE} needs one {begin!r} and, below it, one {end!r}", file=sys.stderr)
            return 1
        before, _, rest = page.partition(begin)
        _, _, after = rest.partition(end)
        page = f"{before}{begin}\n\n{table}\n\n{end}{after}"
    _PAGE.write_text(page)
    for name, figure in plots(results, TCP).items():
        save(figure, _IMAGES / f"scale-{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
