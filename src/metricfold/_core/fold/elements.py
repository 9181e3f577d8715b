"""Statistics of tensors, over their elements, however often the elements are held.

A parameter may lie whole on one rank, in shards on several, or be replicated on some of them, and what
is true of a mesh differs from parameter to parameter. So each rank counts what it holds, replicas too;
how many elements the whole tensor has is known beforehand:

    size / count     1 / (replicas x collections that all counted)

A cell of such a metric is one tensor. Its lanes are multiplied by that before cells are merged with one
another, so that a replicated bias weighs no more than a sharded matrix in the norm of all.

None of these types folds values: `metricfold.torch.ModelWatch` and the like bring states.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from metricfold._core.fold.handlers import LaneHandler
from metricfold._core.fold.state import COUNT

if TYPE_CHECKING:
    from metricfold._core.fold.sample import FloatArray
    from metricfold.metric import TypeLike

__all__ = ["ELEMENT_TYPES", "EVERY_ELEMENT", "element_handlers"]

EVERY_ELEMENT = 0.0
"""As the size of a tensor: it has none of its own, and all that was counted is all there is."""


class ElementHandler(LaneHandler):
    """What of each tensor adds up over its elements.

    ``count`` is of elements, as often as they were counted, and ``nans`` of those that are not finite,
    if that spoils the result; ``amount`` is what adds up, and ``size`` how many elements the whole
    tensor has.
    """

    takes_values = False
    sum_lanes: ClassVar[tuple[str, ...]] = ("amount",)
    max_lanes: ClassVar[tuple[str, ...]] = ("size",)

    def settled(self, sums: FloatArray, maxs: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Divide replicas and collections out: what is left is of each element once, on average."""
        count, size = sums[..., COUNT], maxs[..., 0]
        counted = (count > 0) & (size > EVERY_ELEMENT)
        once = np.divide(size, count, out=np.ones_like(count), where=counted)
        return sums * once[..., np.newaxis], maxs

    def result(self, lanes: Mapping[str, float]) -> float:
        each = {name: np.array([lane]) for name, lane in lanes.items()}
        return float(self.results(each)[0])


class NormHandler(ElementHandler):
    """Root of the sum of squares."""

    def results(self, lanes: Mapping[str, Any]) -> FloatArray:
        norms: FloatArray = np.sqrt(lanes["amount"])
        return norms


class NumberHandler(ElementHandler):
    """How many elements are so."""

    def results(self, lanes: Mapping[str, Any]) -> FloatArray:
        return np.asarray(lanes["amount"])


class MeanHandler(ElementHandler):
    """Mean over the elements that count, NaN if there are none."""

    sum_lanes = ("amount", "of")

    def results(self, lanes: Mapping[str, Any]) -> FloatArray:
        amount, of = lanes["amount"], lanes["of"]
        means: FloatArray = np.divide(amount, of, out=np.full(amount.shape, np.nan), where=of > 0)
        return means


class RootMeanSquareHandler(MeanHandler):
    """Root of the mean of squares: a norm of what has no number of elements of its own."""

    def results(self, lanes: Mapping[str, Any]) -> FloatArray:
        roots: FloatArray = np.sqrt(super().results(lanes))
        return roots


ELEMENT_TYPES: Mapping[TypeLike, type[ElementHandler]] = {
    "tensor_norm": NormHandler,
    "tensor_mean": MeanHandler,
    "tensor_rms": RootMeanSquareHandler,
    "tensor_number": NumberHandler,
}
"""Under these types every aggregator knows them, for a rank that watches nothing merges them too."""


def element_handlers(on_nan: str) -> dict[TypeLike, ElementHandler]:
    """Return a handler for each type."""
    return {label: kind(on_nan=on_nan) for label, kind in ELEMENT_TYPES.items()}
