"""Statistics of tensors, over their elements, however often the elements are held.

A parameter may lie whole on one rank, in shards on several, or be replicated on some of them, and what
is true of a mesh differs from parameter to parameter. So each rank counts what it holds, replicas too;
how many elements the whole tensor has is known beforehand:

    size / count     1 / (replicas x collections that all counted)

A cell of such a metric is one tensor. Its lanes are divided by that before cells are merged with one
another, so that a replicated bias weighs no more than a sharded matrix in the norm of all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from metricfold._core.fold.handlers import LaneHandler
from metricfold._core.fold.sample import FloatArray
from metricfold._core.fold.state import COUNT

__all__ = ["ELEMENT_TYPES", "ElementHandler", "MeanHandler", "NormHandler", "NumberHandler"]

_AMOUNT = 2
"""The first SUM lane that a replica adds to."""


class ElementHandler(LaneHandler):
    """What of each tensor adds up over its elements.

    ``count`` is of elements, as often as they were counted; ``amount`` is what adds up, and ``size``
    how many elements the whole tensor has.
    """

    sum_lanes: ClassVar[tuple[str, ...]] = ("amount",)
    max_lanes = ("size",)

    def settled(self, sums: FloatArray, maxs: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Divide replicas and collections out: what is left is of each element once, on average."""
        count, size = sums[..., COUNT], maxs[..., 0]
        once = np.divide(size, count, out=np.zeros_like(count), where=count > 0)
        settled = sums.copy()
        settled[..., _AMOUNT:] *= once[..., np.newaxis]
        return settled, maxs


class NormHandler(ElementHandler):
    """Root of the sum of squares, of those elements that are finite."""

    def result(self, lanes: Mapping[str, float]) -> float:
        return float(np.sqrt(lanes["amount"]))

    def results(self, lanes: Mapping[str, Any]) -> FloatArray:
        norms: FloatArray = np.sqrt(lanes["amount"])
        return norms


class NumberHandler(ElementHandler):
    """How many elements are so."""

    def result(self, lanes: Mapping[str, float]) -> float:
        return lanes["amount"]

    def results(self, lanes: Mapping[str, Any]) -> FloatArray:
        return np.asarray(lanes["amount"])


class MeanHandler(ElementHandler):
    """Mean over elements; NaN where there is none to take it of."""

    sum_lanes = ("amount", "of")

    def result(self, lanes: Mapping[str, float]) -> float:
        return float(self.results(lanes))

    def results(self, lanes: Mapping[str, Any]) -> FloatArray:
        amount, of = np.asarray(lanes["amount"]), np.asarray(lanes["of"])
        means: FloatArray = np.divide(amount, of, out=np.full(amount.shape, np.nan), where=of > 0)
        return means


ELEMENT_TYPES: Mapping[str, type[ElementHandler]] = {
    "tensor_norm": NormHandler,
    "tensor_mean": MeanHandler,
    "tensor_number": NumberHandler,
}
"""Under these types every aggregator knows them, for a rank that watches nothing merges them too."""
