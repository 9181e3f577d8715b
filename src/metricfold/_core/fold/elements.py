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

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from metricfold._core.fold.handlers import LaneHandler
from metricfold._core.fold.state import COMMON_LANES, COUNT

if TYPE_CHECKING:
    from metricfold._core.fold.sample import FloatArray
    from metricfold.metric import TypeLike

__all__ = ["ELEMENT_TYPES", "EVERY_ELEMENT", "checksum_lanes", "dissenting", "element_handlers"]

EVERY_ELEMENT = 0.0
"""As the size of a tensor: it has none of its own, and all that was counted is all there is."""


_HALF = 1 << 26
"""Half of a checksum is below that, and so are numbers of checks: a float64 holds both."""
_DIFFERING = len(COMMON_LANES)


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


class ReplicasHandler(LaneHandler):
    """How many tensors are not the same, bit for bit, wherever they should be.

    Of each there is a checksum of 52 bits. Its MAX lanes are the upper and the lower half of that, each
    as it is and subtracted from its largest; so the sum of both lanes says whether all were the same.
    Before each half stands when it was made, so that of several checks the newest counts.
    """

    takes_values = False
    sum_lanes = ("differing",)
    max_lanes = ("upper", "upper_left", "lower", "lower_left")

    def settled(self, sums: FloatArray, maxs: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Compare the two lanes of each half."""
        there = sums[..., COUNT] > 0
        both = np.where(there[..., np.newaxis], maxs[..., ::2] + maxs[..., 1::2], _HALF - 1)
        differing = (both % (2 * _HALF) != _HALF - 1).any(axis=-1)
        return np.concatenate([sums[..., :_DIFFERING], differing[..., np.newaxis]], axis=-1), maxs

    def result(self, lanes: Mapping[str, Any]) -> Any:
        return lanes["differing"]

    results = result


def checksum_lanes(checksums: Sequence[int], number: int) -> FloatArray:
    """Return the MAX lanes of checksums, shape (n, 4).

    Args:
        checksums: of which 52 bits count.
        number: of the check; later ones have larger ones.
    """
    halves = np.array([divmod(one & (_HALF**2 - 1), _HALF) for one in checksums], dtype=np.int64)
    upper, lower = halves.reshape(-1, 2).T
    lanes = np.stack([upper, _HALF - 1 - upper, lower, _HALF - 1 - lower], axis=1)
    return (lanes + number % _HALF * _HALF).astype(np.float64)


def dissenting(maxs: FloatArray) -> dict[int, list[int]]:
    """Return for each cell the ranks whose checksum is not that of most, or all of them if none is.

    Args:
        maxs: shape (ranks, cells, 4); -inf where a rank has none.
    """
    found: dict[int, list[int]] = {}
    for cell in range(maxs.shape[1]):
        lanes = maxs[:, cell, ::2]
        having = np.flatnonzero(np.isfinite(lanes[:, 0]))
        checks = dict(zip(having.tolist(), lanes[having, 0] // _HALF, strict=True))
        by_checksum: dict[tuple[float, ...], list[int]] = {}
        for rank, check in checks.items():
            if check == max(checks.values()):
                by_checksum.setdefault(tuple(lanes[rank].tolist()), []).append(rank)
        sizes = sorted(map(len, by_checksum.values()))
        if len(sizes) > 1:
            most = sizes[-1] if sizes[-1] > sizes[-2] else 0
            apart = (ranks for ranks in by_checksum.values() if len(ranks) != most)
            found[cell] = sorted(rank for ranks in apart for rank in ranks)
    return found


ELEMENT_TYPES: Mapping[TypeLike, type[LaneHandler]] = {
    "tensor_norm": NormHandler,
    "tensor_mean": MeanHandler,
    "tensor_rms": RootMeanSquareHandler,
    "tensor_number": NumberHandler,
    "tensor_replicas": ReplicasHandler,
}
"""Under these types every aggregator knows them, for a rank that watches nothing merges them too."""


def element_handlers(on_nan: str) -> dict[TypeLike, LaneHandler]:
    """Return a handler for each type."""
    return {label: kind(on_nan=on_nan) for label, kind in ELEMENT_TYPES.items()}
