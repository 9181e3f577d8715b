"""What a `ModelWatch` has collected, on its way to an aggregator.

grad/norm, grad/mean, ...     of `Statistics`, one cell for each parameter
param/replicas                of `Checksums`
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from metricfold._core.device.watched import (
    OCTAVE,
    OCTAVES,
    OF_PARAMETERS,
    SEEN,
    element_states,
    octave_state,
)
from metricfold._core.fold.axes import Axes, Axis, described
from metricfold._core.fold.elements import checksum_lanes
from metricfold._core.fold.names import Key
from metricfold._core.fold.sample import FloatArray
from metricfold._core.fold.state import COUNT, State
from metricfold.metric import TypeLike
from metricfold.torch.statistics import LARGEST, WIDTH

__all__ = [
    "MODULE",
    "OF_ACTIVATIONS",
    "OF_PARAMETERS_AND_OCTAVES",
    "Checked",
    "Collected",
    "Keys",
    "Read",
]

MODULE = "module"
"""The axis of activations."""

OF_PARAMETERS_AND_OCTAVES: Mapping[str, TypeLike] = {**OF_PARAMETERS, "octaves": "tensor_number"}
OF_ACTIVATIONS: Mapping[str, TypeLike] = {
    "rms": "tensor_rms",
    **{end: agg_type for end, agg_type in OF_PARAMETERS_AND_OCTAVES.items() if end != "norm"},
}
"""What is reported, and its type. An activation has no size, so no norm that could be told from how often it came."""


class Collected(NamedTuple):
    """What has been collected under one name, on one device.

    Args:
        name: such as ``"grad"``.
        axis: parameters, or modules.
        sizes: how many elements each has.
        types: what is reported of it, and the types of that.
        state: of `Statistics`.
    """

    name: str
    axis: Axis
    sizes: Sequence[float]
    types: Mapping[str, TypeLike]
    state: Tensor

    def keys(self) -> Iterable[tuple[Key, TypeLike, str]]:
        """Yield each metric, its aggregation and its axes."""
        for end, agg_type in self.types.items():
            if end != "octaves" or self.state.shape[1] > WIDTH:
                yield self._key(end), agg_type, described(self._axes(end))

    def states(self, read: FloatArray) -> Iterable[tuple[Key, State]]:
        """Yield the state of each metric that has something, of what lies on the host now."""
        sums, largest, octaves = np.split(read, (LARGEST, WIDTH), axis=1)
        seen, sizes = sums[:, SEEN], np.array(self.sizes)
        if not seen.any():
            return
        types = {end: agg_type for end, agg_type in self.types.items() if end != "octaves"}
        for end, state in element_states(types, sums, largest[:, 0], sizes, self._axes("")):
            yield self._key(end), state
        if octaves.shape[1]:
            yield self._key("octaves"), octave_state(octaves, seen, sizes, (self.axis,))

    def _key(self, end: str) -> Key:
        return "", f"{self.name}/{end}"

    def _axes(self, end: str) -> Axes:
        return (self.axis, Axis(OCTAVE, OCTAVES)) if end == "octaves" else (self.axis,)


class Checked(NamedTuple):
    """The newest checksums of one device.

    Args:
        name: ``"param"``, and what comes before.
        number: of the check; 0: there is none that has not been sent.
        axis: what has been checked.
        state: of `Checksums`.
    """

    name: str
    number: int
    axis: Axis
    state: Tensor

    def keys(self) -> Iterable[tuple[Key, TypeLike, str]]:
        """Yield the metric, its aggregation and its axis."""
        yield self._key, "tensor_replicas", described((self.axis,))

    def states(self, read: npt.NDArray[np.int64]) -> Iterable[tuple[Key, State]]:
        """Yield the state of the metric, of what lies on the host now."""
        if not self.number:
            return
        maxs = checksum_lanes(read.tolist(), self.number)
        sums = np.zeros((len(maxs), 3))
        sums[:, COUNT] = 1.0
        yield self._key, State.of_cells(sums, maxs, (self.axis,))

    @property
    def _key(self) -> Key:
        return "", f"{self.name}/replicas"


class Read(NamedTuple):
    """What has been read from the devices, each with what it is.

    Args:
        parts: in order.
        refused: nothing: what is left out is said where it is.
    """

    parts: Sequence[tuple[Collected | Checked, Any]]
    refused: None = None


class Keys:
    """What a watch says of itself to an aggregator."""

    def __init__(self, collected: Callable[[], Sequence[Collected | Checked]]) -> None:
        self._collected = collected

    def keys(self) -> Iterable[tuple[Key, TypeLike, str]]:
        """Yield each metric of which something may have come, its aggregation and its axes."""
        for one in self._collected():
            yield from one.keys()

    def states(self, arrays: Read) -> Iterable[tuple[Key, State]]:
        """Yield the state of each metric that has something."""
        for one, read in arrays.parts:
            yield from one.states(read)

    def complaints(self, _: object) -> Iterable[str]:
        """Return nothing: what is left out is said where it is."""
        return ()
