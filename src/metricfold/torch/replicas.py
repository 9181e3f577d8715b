"""Whether ranks hold the same bits of a parameter where they should: checksums, which are compared in the log.

A checksum is the sum of a tensor's words as integers, each times an odd number of its place, in 64 bits
that wrap around; so neither order nor kernel matters, and one changed word always shows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from metricfold._core.device.arrays import of_mesh
from metricfold.torch.statistics import BLOCK, Grouped, Scratch

__all__ = ["Checksums", "shard_of"]


class Checksums:
    """The newest checksum of each of some tensors.

    Args:
        names: of the tensors.
        device: where they lie.
        scratch: where the buffer is.

    Attributes:
        names: of the tensors.
        state: shape (tensors,), int64.
    """

    def __init__(self, names: Sequence[str], device: torch.device, scratch: Scratch) -> None:
        self.names = names
        with torch.inference_mode(mode=False):
            self.state = torch.zeros(len(names), dtype=torch.int64, device=device)
            self._odd = torch.arange(1, 2 * BLOCK, 2, device=device)
        self._scratch = scratch
        self._grouped: Grouped | None = None

    @torch.no_grad()
    def take(self, tensors: Sequence[Tensor]) -> None:
        """Take the checksum of what each tensor holds at present."""
        words = [_words(one) for one in tensors]
        sizes = [len(one) for one in words]
        rows = range(len(sizes))
        if self._grouped is None or self._grouped.key != (*rows, *sizes):
            device = self.state.device
            self._grouped = self._scratch.grouped(rows, sizes, len(sizes), device)
        self.state.zero_()
        for group in self._grouped.groups:
            integers = group.buffer.view(torch.int32)
            group.fill(words, torch.int32)
            wide = integers.long()
            # The places of a block go on where those of the block before ended.
            by_place = (wide * self._odd).sum(1) + 2 * group.starts * wide.sum(1)
            self.state.index_add_(0, group.rows, by_place)


def _words(tensor: Tensor) -> Tensor:
    """Return the bits of a tensor as integers, shape (n,)."""
    flat = tensor.detach().contiguous().reshape(-1)
    kinds: Mapping[int, torch.dtype] = {1: torch.uint8, 2: torch.int16}
    return flat.view(kinds.get(flat.element_size(), torch.int32))


def shard_of(name: str, parameter: Tensor, world_size: int) -> str | None:
    """Return what a parameter's shard on this rank is called on all ranks; None: nobody else can hold it."""
    if not of_mesh(parameter):
        return name
    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    whole = mesh.size() == world_size
    if whole and world_size > 1 and not any(one.is_replicate() for one in placements):
        return None
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return None
    along = [*_along(mesh, placements, coordinate)]
    return f"{name}[{','.join(along)}]" if along else name


def _along(mesh: Any, placements: Sequence[Any], coordinate: Sequence[int]) -> Iterable[str]:
    names = mesh.mesh_dim_names or [*map(str, range(mesh.ndim))]
    for dimension, placement in enumerate(placements):
        if not placement.is_replicate():
            yield f"{names[dimension]}={coordinate[dimension]}"
