"""Axes: the names and sizes of a metric that has many cells, such as layer x expert.

    axes_of({"layer": 24, "expert": 64})                24 x 64 cells, in C order: the last axis is the fastest
    axes_of({"parameter": ["head.weight", "norm.bias"]})

An axis of a *size* is part of the kind: it is the same on all ranks. One of *labels* is united over
ranks, sorted: each rank names the labels that it has. Each cell has lanes of its own, which merge as
those of a metric without axes do; only what a cell's place is has to be known here.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, SupportsIndex, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from metricfold.metric import check_name

__all__ = [
    "RANK",
    "Axes",
    "Axis",
    "Block",
    "axes_of",
    "block_of",
    "cells",
    "described",
    "moved",
    "place_on",
    "united",
]

RANK = "rank"
"""The axis over ranks, which no metric can declare: what each rank had of the interval."""
_MOST_CELLS = 2**20
"""More cells than that are a mistake: each takes its lanes in every vector of every rank."""
_IN_KINDS = frozenset("/[]=,")
"""What `described`, and a kind, tell axes apart by."""

IndexArray: TypeAlias = npt.NDArray[np.intp]


class Axis(NamedTuple):
    """One axis.

    Args:
        name: such as ``"layer"``.
        size: how many cells it has along it; 0: it has labels.
        labels: sorted; of an axis without a size.
    """

    name: str
    size: int
    labels: tuple[str, ...] = ()

    @property
    def length(self) -> int:
        return self.size or len(self.labels)

    def names(self) -> tuple[str, ...]:
        """Return what each cell along it is called: a label, or its number, padded to sort well.

        >>> Axis("layer", 12).names()[:3]
        ('00', '01', '02')
        """
        if not self.size:
            return self.labels
        digits = len(str(self.size - 1))
        return tuple(f"{number:0{digits}}" for number in range(self.size))


Axes: TypeAlias = tuple[Axis, ...]


def axes_of(declared: Mapping[str, int | Sequence[str]]) -> Axes:
    """Return the axes that a user declares: names with sizes, or with lists of labels.

    Raises:
        ValueError: a name is none, a size is below 1, a label comes twice, or there are too many cells.
        TypeError: it is no mapping of these.

    >>> axes_of({"layer": 2, "expert": 4})
    (Axis(name='layer', size=2, labels=()), Axis(name='expert', size=4, labels=()))
    """
    if not isinstance(declared, Mapping):
        raise TypeError(
            f"axes={declared!r:.80}: give names with sizes, such as {{'layer': 24, 'expert': 64}}"
        )
    axes = tuple(_axis(name, size) for name, size in declared.items())
    if cells(axes) > _MOST_CELLS:
        raise ValueError(f"axes {described(axes)} have more than {_MOST_CELLS} cells")
    return axes


def _axis(name: str, size: Any) -> Axis:
    check_name("an axis", name)
    if name == RANK:
        raise ValueError(f"the axis {name!r} is there for every metric: give it in by=")
    if wrong := _IN_KINDS.intersection(name):
        raise ValueError(
            f"the axis {name!r} has {' and '.join(map(repr, sorted(wrong)))} in its name"
        )
    if isinstance(size, str) or not isinstance(size, Sequence | np.ndarray):
        try:
            number = operator.index(cast("SupportsIndex", size))
        except TypeError:
            raise TypeError(
                f"axis {name!r} is {size!r:.80}: give its size, or a list of labels"
            ) from None
        if number < 1:
            raise ValueError(f"axis {name!r} has the size {number}, but needs 1 at least")
        return Axis(name, number)
    return Axis(name, 0, _sorted(name, tuple(map(str, size))))


@lru_cache(maxsize=256)
def _sorted(name: str, labels: tuple[str, ...]) -> tuple[str, ...]:
    """Return the labels of an axis in order; a step's are those of the step before."""
    for label in labels:
        check_name(f"a label of axis {name!r}", label)
    if len(set(labels)) < len(labels):
        twice = next(label for label in labels if labels.count(label) > 1)
        raise ValueError(f"axis {name!r} has the label {twice!r} twice")
    return tuple(sorted(labels))


def cells(axes: Axes) -> int:
    """Return how many cells there are; 1 without axes."""
    return math.prod(axis.length for axis in axes)


def described(axes: Axes) -> str:
    """Return what axes are, as part of a kind: labels are none of it."""
    return ",".join(f"{axis.name}={axis.size}" if axis.size else axis.name for axis in axes)


def united(one: Axes, other: Axes) -> Axes:
    """Return axes with the labels of both, which are of one kind.

    Associative and commutative.
    """
    if one == other:
        return one
    return tuple(
        mine if mine.size else mine._replace(labels=tuple(sorted({*mine.labels, *theirs.labels})))
        for mine, theirs in zip(one, other, strict=True)
    )


@lru_cache(maxsize=256)
def moved(part: Axes, whole: Axes) -> IndexArray | None:
    """Return where each cell of `part` stands in `whole`, which has all its labels; None: it is whole.

    Raises:
        KeyError: a label of `part` is not in `whole`.
    """
    if part == whole:
        return None
    along = []
    for mine, all_of in zip(part, whole, strict=True):
        places = _places(all_of.labels)
        along.append(
            [places[label] for label in mine.labels] if not mine.size else range(mine.size)
        )
    return _flat(along, whole)


def _flat(along: Sequence[Iterable[int]], axes: Axes) -> IndexArray:
    """Return the places of all cells with these places along each axis, in C order."""
    found: IndexArray = np.zeros(1, dtype=np.intp)
    for places, axis in zip(along, axes, strict=True):
        each = np.fromiter(places, dtype=np.intp)
        found = (found[:, np.newaxis] * axis.length + each).reshape(-1)
    return found


class Block(NamedTuple):
    """The cells that an array holds.

    Args:
        axes: of the metric; of labels those that the array has.
        shape: of the array.
        places: of its cells among those of the axes, flat; None: it holds all, in order.
    """

    axes: Axes
    shape: tuple[int, ...]
    places: IndexArray | None


def block_of(axes: Axes, ids: Mapping[str, Any] | None) -> Block:
    """Return which cells an array holds.

    Args:
        axes: of the metric.
        ids: of some axes the cells that the array has along them: an int or label, which takes no
            dimension of the array, or several of them, in its order.

    Raises:
        ValueError: there is no such axis or cell, or one comes twice.
        TypeError: an id is neither.
    """
    if not ids:
        return Block(axes, tuple(axis.length for axis in axes), None)
    unknown = [name for name in ids if name not in {axis.name for axis in axes}]
    if unknown:
        raise ValueError(f"ids= names {unknown[0]!r}, but the axes are {described(axes) or 'none'}")
    along: list[list[int]] = []
    shape: list[int] = []
    for axis in axes:
        if axis.name not in ids:
            along.append(list(range(axis.length)))
            shape.append(axis.length)
            continue
        given = ids[axis.name]
        several = not isinstance(given, str) and (
            isinstance(given, Sequence) or (hasattr(given, "__len__") and np.ndim(given) == 1)
        )
        places = places_on(axis, given if several else [given])
        if len(set(places)) < len(places):
            raise ValueError(f"ids= of axis {axis.name!r} name a cell twice")
        along.append(places)
        shape += [len(places)] if several else []
    return Block(axes, tuple(shape), _flat(along, axes))


@lru_cache(maxsize=256)
def _places(labels: tuple[str, ...]) -> dict[str, int]:
    return {label: place for place, label in enumerate(labels)}


def place_on(axis: Axis, given: Any) -> int:
    """Return the place along an axis of a cell that is named by its number or label; raises if there is none."""
    return places_on(axis, [given])[0]


def places_on(axis: Axis, given: Iterable[Any]) -> list[int]:
    """Return the same of several."""
    if axis.size:
        return [_number(axis, one) for one in given]
    places = _places(axis.labels)
    try:
        return [places[str(one)] for one in given]
    except KeyError as error:
        raise ValueError(f"axis {axis.name!r} has no label {error.args[0]!r}") from None


def _number(axis: Axis, given: Any) -> int:
    try:
        place = operator.index(given)
    except TypeError:
        raise TypeError(
            f"ids= of axis {axis.name!r} are whole numbers, not {given!r:.80}"
        ) from None
    if not 0 <= place < axis.size:
        raise ValueError(f"axis {axis.name!r} has the cells 0 to {axis.size - 1}, but not {place}")
    return place
