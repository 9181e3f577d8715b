"""Whether a run of everything has measured everything that is installed, which CI asks it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from benchmarks.own_process import installed
from benchmarks.table import Section

__all__ = ["complaints"]

_CONTENDERS: dict[str, tuple[str, ...]] = {
    "bare all_reduce": (),
    "bare all_gather": (),
    "pickled states": (),
    "a handler call each": (),
    "3 frozen dataclasses": (),
    "8 nnx Averages": ("jax", "flax"),
    "8 clu Averages": ("jax", "flax", "clu"),
}
"""What is compared with, and what must be installed for it."""


def complaints(sections: Sequence[Section]) -> list[str]:
    """Return what is wrong with the sections of a run of everything; empty if nothing is."""
    rows = [row for section in sections for row in section.rows]
    found = [
        f"{row.what}: the figure is {row.figure}"
        for row in rows
        if not (math.isfinite(row.figure) and row.figure > 0)
    ]
    found += [f"{section.title}: no rows" for section in sections if not section.rows]
    for contender, packages in _CONTENDERS.items():
        measured = any(contender in f"{row.what} {row.against}" for row in rows)
        if measured != installed(*packages):
            found.append(f"{contender}: {'measured' if measured else 'not measured'}")
    return found
