"""Which metrics of a run are one metric with numbers in its name, such as ``step_seconds/rank_3``.

    step_seconds/rank_0 … rank_7            a member for each of eight ranks
    layer_00/expert_00 … layer_23/expert_63 a cell for each of 24 by 64

A curve for each of 1,536 names cannot be looked at; a map of them can.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

__all__ = ["Family", "families"]

_NUMBER = re.compile(r"\d+")
_FEWEST = 3
"""So many members make a family."""

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Family(Generic[K]):
    """Metrics whose names differ in one or two numbers.

    Args:
        name: what they have in common, with ``*`` in place of the numbers.
        axes: for each number that differs, what stands before it, and what it is, ascending.
        members: the places along `axes` of each metric.
    """

    name: str
    axes: list[tuple[str, list[int]]]
    members: dict[K, tuple[int, ...]]


def families(named: Iterable[tuple[K, Hashable, str]]) -> list[Family[K]]:
    """Return the families among metrics, each given as itself, what they must share, and its name.

    >>> found = families((f"rank_{n}", "train", f"loss/rank_{n}") for n in (0, 1, 2, 10))
    >>> [(family.name, family.axes) for family in found]
    [('loss/rank_*', [('rank', [0, 1, 2, 10])])]
    """
    alike: dict[tuple[Hashable, str], dict[K, tuple[int, ...]]] = {}
    for key, shared, name in named:
        numbers = _NUMBER.findall(name)
        # `p50` and `p95` are no places along an axis, and older files have them in the name.
        if numbers and "_stat_" not in name:
            found = alike.setdefault((shared, _NUMBER.sub("*", name)), {})
            found[key] = tuple(map(int, numbers))
    results = []
    for (_, pattern), numbers_of in alike.items():
        if len(numbers_of) < _FEWEST:
            continue
        family = _family(pattern, numbers_of)
        if family is not None:
            results.append(family)
    return results


def _family(pattern: str, numbers: dict[K, tuple[int, ...]]) -> Family[K] | None:
    columns = list(zip(*numbers.values(), strict=True))
    varied = [i for i, column in enumerate(columns) if len(set(column)) > 1]
    places = {key: tuple(own[i] for i in varied) for key, own in numbers.items()}
    # Names such as `a_1` and `a_01` would be one cell.
    if not 1 <= len(varied) <= 2 or len(set(places.values())) < len(places):
        return None
    axes = [(_title(pattern, i), sorted(set(columns[i]))) for i in varied]
    cells = 1
    for _, values in axes:
        cells *= len(values)
    if 2 * len(places) < cells:  # mostly holes: the numbers are no coordinates
        return None
    index = [{value: at for at, value in enumerate(values)} for _, values in axes]
    members = {
        key: tuple(index[axis][value] for axis, value in enumerate(own))
        for key, own in places.items()
    }
    # What does not vary is written as it is.
    first = next(iter(numbers.values()))
    parts = pattern.split("*")
    name = parts[0] + "".join(
        ("*" if i in varied else str(first[i])) + part for i, part in enumerate(parts[1:])
    )
    return Family(name, axes, members)


def _title(pattern: str, number: int) -> str:
    """Return the word before the `number`-th number: ``rank`` of ``step_seconds/rank_*``."""
    before = pattern.split("*")[number]
    words = re.findall(r"[^\W\d_]+", before)
    return words[-1] if words else f"number {number + 1}"
