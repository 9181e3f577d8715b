"""Statistics over the elements of tensors, a row for each, and trees of arrays of which an accumulator holds them.

What has been collected of a tensor is a few sums and a largest magnitude, whatever the framework; here it
becomes the states of metrics with an axis `PARAMETER`, such as ``grad/norm``.

An accumulator whose rows are those of `rows` has two for each leaf of a tree, or for each layer of a leaf in
which layers are stacked. All their sums are over its elements; those of squares are three, for a float32
does not hold the square of each float32:

    first    counts: collections, -, -, -    sums: squares of tiny · SCALE², usual, huge / SCALE²    extrema: |x|, -
    second   the same counts                 sums: x, number of zeros, number of NaN and infinities  extrema: -, -

and, where octaves are counted, 43 more, whose sums are the numbers of magnitudes in each, three to a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from metricfold._core.fold.axes import Axes, Axis, described
from metricfold._core.fold.names import Key
from metricfold._core.fold.state import State
from metricfold.metric import AggregationType, TypeLike, check_name

__all__ = [
    "HUGE",
    "LAYER",
    "OCTAVE",
    "OCTAVES",
    "OF_PARAMETERS",
    "OUTSIDE",
    "PARAMETER",
    "SCALE",
    "TINY",
    "Watched",
    "element_states",
    "matches",
    "octave_state",
]

Array = npt.NDArray[Any]

PARAMETER, LAYER, OCTAVE = "parameter", "layer", "octave"
OCTAVES = 128
"""Octave k holds magnitudes from 2^(k - 64) on; the first all that are smaller, the last all that are larger."""
_OCTAVE_ROWS = -(-OCTAVES // 3)
OUTSIDE = "outside"
"""As a label of the axis `LAYER`: leaves in which no layers are stacked."""

SEEN, NONFINITE, ZEROS, FINITE, TOTAL, SQUARES = range(6)
"""Sums of a tensor: elements, those that are NaN or infinite, that are 0, that are finite; their sum, and that of squares."""

OF_PARAMETERS: Mapping[str, TypeLike] = {
    "norm": "tensor_norm",
    "mean": "tensor_mean",
    "abs_max": AggregationType.MAX,
    "zeros": "tensor_mean",
    "nonfinite": "tensor_number",
}
"""What is reported of each parameter, and its type."""

TINY, HUGE, SCALE = 2.0**-60, 2.0**40, 2.0**80
"""Magnitudes below the first are tiny, those above the second huge; what is squared is scaled by the third."""


def element_states(
    types: Mapping[str, TypeLike], sums: Array, largest: Array, sizes: Array, axes: Axes
) -> Iterator[tuple[str, State]]:
    """Yield the states of what was collected of some tensors, each of which is a cell.

    Args:
        types: by name, as of `OF_PARAMETERS`.
        sums: of each cell, shape (cells, 6); all 0 where nothing was collected.
        largest: of finite magnitudes, shape (cells,).
        sizes: how many elements the whole tensor has.
        axes: of the cells.
    """
    seen, bad, zero = sums[:, SEEN], sums[:, NONFINITE], np.zeros(len(sums))
    lanes = {
        "norm": (bad, SQUARES),
        "rms": (bad, SQUARES, FINITE),
        "mean": (bad, TOTAL, FINITE),
        "abs_max": (bad,),
        "zeros": (zero, ZEROS, SEEN),
        "nonfinite": (zero, NONFINITE),
    }
    for name in types:
        nans, *others = lanes[name]
        of_cells = np.stack([seen, nans, *(sums[:, lane] for lane in others)], axis=1)
        tops = np.where(seen > 0, largest if name == "abs_max" else sizes, -np.inf)
        yield name, State.of_cells(of_cells, tops[:, np.newaxis], axes)


def octave_state(octaves: Array, seen: Array, sizes: Array, axes: Axes) -> State:
    """Return the state of how many magnitudes lie in each octave, shape (cells, OCTAVES), from as many elements."""
    of_cells = np.stack(np.broadcast_arrays(seen[:, np.newaxis], 0.0, octaves), axis=-1)
    tops = np.repeat(np.where(seen > 0, sizes, -np.inf), OCTAVES)
    whole = (*axes, Axis(OCTAVE, OCTAVES))
    return State.of_cells(of_cells.reshape(len(tops), -1), tops[:, np.newaxis], whole)


class Watched(NamedTuple):
    """A tree of arrays.

    Args:
        name: such as ``"grad"``.
        labels: the way to each leaf, as ``"layers/mlp/kernel"``.
        shapes: of each leaf.
        layers: how many layers are stacked in each, along its first dimension; 0: none are.
        octaves: whether magnitudes are counted by power of two.
    """

    name: str
    labels: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    layers: tuple[int, ...]
    octaves: bool = False

    @classmethod
    def of(
        cls,
        name: str,
        shapes: Mapping[str, tuple[int, ...]],
        stacked: Sequence[str],
        *,
        octaves: bool = False,
    ) -> Watched:
        """Return the tree of leaves with these labels and shapes, of which `stacked` have layers in them.

        Raises:
            ValueError: a name is none, there is no leaf, or a stacked one has no dimension.
        """
        check_name("the name of a tree", name)
        for label in shapes:
            check_name(f"a leaf of the tree {name!r}", label)
        if not shapes:
            raise ValueError(
                f"the tree {name!r} has no leaf that holds floating-point numbers: leave it out"
            )
        for label in stacked:
            if not shapes[label]:
                raise ValueError(
                    f"stacked= names the leaf {label!r} of the tree {name!r}, which is one number and has "
                    "no layers along its first dimension: name those that have, as in stacked='layers/*'"
                )
        layers = tuple(shape[0] if label in stacked else 0 for label, shape in shapes.items())
        return cls(name, tuple(shapes), tuple(shapes.values()), layers, octaves)

    @property
    def cells(self) -> tuple[int, ...]:
        """How many cells each leaf has."""
        return tuple(layers or 1 for layers in self.layers)

    @property
    def rows(self) -> int:
        return (2 + (_OCTAVE_ROWS if self.octaves else 0)) * sum(self.cells)

    @property
    def axes(self) -> Axes:
        """Of its metrics: parameters, and layers if any are stacked."""
        parameters = Axis(PARAMETER, 0, tuple(sorted(self.labels)))
        most = max(self.layers)
        if not most:
            return (parameters,)
        outside = () if all(self.layers) else (OUTSIDE,)
        return parameters, Axis(LAYER, 0, (*Axis(LAYER, most).names(), *outside))

    def keys(self) -> Iterator[tuple[Key, TypeLike, str]]:
        """Yield the key of each of its metrics, the type and the axes."""
        axes = self.axes
        for end, agg_type in OF_PARAMETERS.items():
            yield ("", f"{self.name}/{end}"), agg_type, described(axes)
        if self.octaves:
            whole = (*axes, Axis(OCTAVE, OCTAVES))
            yield ("", f"{self.name}/octaves"), "tensor_number", described(whole)

    def states(self, counts: Array, sums: Array, extrema: Array) -> Iterator[tuple[Key, State]]:
        """Yield the state of each metric, if anything was collected, from the rows of this tree."""
        number = sum(self.cells)
        collections = counts[:number, 0].astype(np.float64)
        if not collections.any():
            return
        elements = [
            math.prod(shape) / cells for shape, cells in zip(self.shapes, self.cells, strict=True)
        ]
        sizes = np.repeat(elements, self.cells)
        tiny, usual, huge = sums[:number].T
        total, zeros, bad = sums[number : 2 * number].T
        seen = collections * sizes
        squares = tiny / SCALE**2 + usual + huge * SCALE**2
        of_rows = np.stack([seen, bad, zeros, seen - bad, total, squares], axis=1)
        axes, places = self.axes, self._places()

        def among_all(rows: Array) -> Array:
            cells = np.zeros((math.prod(axis.length for axis in axes), *rows.shape[1:]))
            cells[places] = rows
            return cells

        of_cells, of_sizes = among_all(of_rows), among_all(sizes)
        largest = among_all(extrema[:number, 0])
        for end, state in element_states(OF_PARAMETERS, of_cells, largest, of_sizes, axes):
            yield ("", f"{self.name}/{end}"), state
        if self.octaves:
            octaves = among_all(sums[2 * number :].reshape(number, -1)[:, :OCTAVES])
            state = octave_state(octaves, of_cells[:, SEEN], of_sizes, axes)
            yield ("", f"{self.name}/octaves"), state

    def _places(self) -> Array:
        """Return the cell of each of the first rows."""
        parameters, *layers = self.axes
        width = layers[0].length if layers else 1
        first_of = {label: place * width for place, label in enumerate(parameters.labels)}
        found = []
        for label, stacked in zip(self.labels, self.layers, strict=True):
            first = first_of[label]
            found.append(first + (np.arange(stacked) if stacked else np.array([width - 1])))
        return np.concatenate(found)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Return whether one of the patterns, as a shell has them, matches a name."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)
