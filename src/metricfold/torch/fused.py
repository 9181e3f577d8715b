"""An update as one kernel, where Triton is there to write it.

What `fold` does in a handful of kernels, the compiler of PyTorch makes into one: for each combination
of aggregations, types and numbers of dimensions once, when the first update of that kind comes, in a
few seconds. Whatever keeps it from that, the kernels of `fold` are there, and do the same.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Hashable
from types import FunctionType

import torch
from torch import Tensor

from metricfold.torch.folding import Part, Table, Where, fold

__all__ = ["FOLDS", "FusedFolds", "triton_for"]

_logger = logging.getLogger("metricfold")


@functools.cache
def triton_for(device_type: str) -> bool:
    """Return whether updates on such devices can be kernels of Triton's."""
    if device_type != "cuda":
        return False
    from torch.utils._triton import has_triton  # noqa: PLC0415 - loads what only a GPU needs

    return bool(has_triton())


_MOST_KINDS = 32
"""So that a program whose updates are ever different ones does not wait for a compiler for ever."""


class FusedFolds:
    """`fold`, compiled for each kind of update when the first of it comes."""

    def __init__(self) -> None:
        self.compiled: dict[Hashable, Callable[..., None]] = {}
        self.failed = False
        """Whether something could not be compiled; then nothing is any more."""

    def __call__(
        self, table: Table, parts: list[Part], weights: Tensor | None, where: Where
    ) -> None:
        """Fold what one update brings, as `fold` does."""
        kind = _kind(parts, weights, where)
        folding = self.compiled.get(kind)
        if folding is None and len(self.compiled) < _MOST_KINDS and not _capturing(table.one):
            # Dynamo counts the graphs of a function by its code, and gives up after a few.
            own = FunctionType(fold.__code__.replace(), fold.__globals__, fold.__name__)
            folding = self.compiled[kind] = torch.compile(own, fullgraph=True, dynamic=True)
        if folding is None or self.failed or _in_a_mode():
            fold(table, parts, weights, where, None)
            return
        # Takes seconds to load, and is loaded by now.
        from torch._dynamo.exc import TorchDynamoException  # noqa: PLC0415

        try:
            folding(table, parts, weights, where, None)
        except TorchDynamoException as error:  # before anything has run
            self.failed = True
            _logger.warning(
                "an update of a DeviceAccumulator could not be compiled to one kernel, and takes "
                "several, here and in what follows (fused=False says so without this warning): %s: %s",
                type(error).__name__,
                " ".join(str(error).split("\n")[:2]),
            )
            fold(table, parts, weights, where, None)


FOLDS = FusedFolds()
"""Those of this process; all accumulators share them."""


def _kind(parts: list[Part], weights: Tensor | None, where: Where) -> Hashable:
    def of(tensor: Tensor | None) -> Hashable:
        return None if tensor is None else (tensor.ndim, tensor.dtype)

    folded = tuple(
        (part.agg_type, part.rows.blocks, len(part.values), of(part.values[0])) for part in parts
    )
    along = tuple((of(ids), size, stride) for ids, size, stride in where.along)
    return folded, of(weights), of(where.datasets), along, tuple(map(of, where.last))


def _in_a_mode() -> bool:
    """Return whether somebody watches all operations, as a counter of FLOPs does."""
    return torch._C._len_torch_dispatch_stack() > 0  # noqa: SLF001


def _capturing(tensor: Tensor) -> bool:
    """Return whether a CUDA graph is being captured, in which nothing can be compiled."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
