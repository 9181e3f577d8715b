"""A kind: the text that says what a state is made of, and so which of two states merge.

    mean                        what the built-in type of that name is made of
    distribution/recent         a sample of the most recent values; `distribution`: of all
    counts                      counts of categories
    myapp.Kinds.RMS/3+0         a type of your own: three SUM lanes and no MAX lanes
    mine/0+0                    a type whose handler has no lanes: its states do not merge
    sum[layer=24,expert=64]     many cells of a kind, along axes (`axes.described`)

The window's size, percentiles and `on_nan` are settings: states merge whatever these are.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple


class Parts(NamedTuple):
    """What a state is made of.

    Args:
        label: of the aggregation type.
        sums: SUM lanes, without those of categories; 0 for a handler without lanes.
        maxs: MAX lanes.
        sample: which values it keeps as they are: the most ``"recent"``, ``"all"``, or none.
        counts: whether it counts categories.
        last: whether its MAX lanes hold what came last, rather than the largest.
        axes: which cells it has; empty: one.
    """

    label: str
    sums: int
    maxs: int
    sample: str = ""
    counts: bool = False
    last: bool = False
    axes: str = ""


_SHORT = {
    "sum/3+0": "sum",
    "rate/3+0": "rate",
    "mean/4+0": "mean",
    "max/2+1": "max",
    "min/2+1": "min",
    "distribution/5+0/recent": "distribution/recent",
    "distribution/5+0/all": "distribution",
    "categorical_count/2+0/counts": "counts",
    "last/2+1/last": "last",
}
"""What is made as the built-in type of that name is."""
_LONG = {short: long for long, short in _SHORT.items()}
_FORM = re.compile(
    r"(?s)(.+)/(0|[1-9]\d{0,9})\+(0|[1-9]\d{0,9})(?:/(recent|all))?(/counts)?(/last)?"
)
_CELLS = re.compile(r"(?s)(.+)\[([^\[\]]+)\]")


def kind_of_parts(parts: Parts) -> str:
    """Return the kind of states that are made so.

    >>> kind_of_parts(Parts("sum", 3, 0)), kind_of_parts(Parts("tokens", 3, 0))
    ('sum', 'tokens/3+0')
    """
    more = (parts.sample, "counts" * parts.counts, "last" * parts.last)
    text = "/".join([parts.label, f"{parts.sums}+{parts.maxs}", *filter(None, more)])
    text = _SHORT.get(text, text)
    return f"{text}[{parts.axes}]" if parts.axes else text


@lru_cache(maxsize=1024)
def parts_of(kind: str) -> Parts:
    """Return what states of a kind are made of; raises ValueError if it is none.

    >>> parts_of("distribution/recent")
    Parts(label='distribution', sums=5, maxs=0, sample='recent', counts=False, last=False, axes='')
    """
    cells = _CELLS.fullmatch(kind)
    kind, axes = (kind, "") if cells is None else cells.groups()
    found = _FORM.fullmatch(_LONG.get(kind, kind))
    if found is None or (_SHORT.get(kind) is not None):
        raise ValueError("it does not say what a state is made of")
    label, sums, maxs, sample, *others = found.groups()
    counts, last = (one is not None for one in others)
    return Parts(label, int(sums), int(maxs), sample or "", counts, last, axes)
