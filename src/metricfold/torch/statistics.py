"""Sums over the elements of many tensors at once, a row for each: a fixed number of kernels, none per tensor.

Tensors are copied side by side into one float32 buffer of (blocks, 256), each from the start of a block
on, by one multi-tensor kernel that widens bfloat16 and float16 on the way. The blocks are reduced, and
then joined by row. What pads a block is 0, and how much that is, is known beforehand. More tensors than
a buffer holds are taken group by group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["FINITE", "NONFINITE", "OCTAVES", "SEEN", "SQUARES", "TOTAL", "ZEROS", "Statistics"]

SEEN, NONFINITE, ZEROS, FINITE, TOTAL, SQUARES = range(6)
"""Sums of a row: elements, those that are NaN or infinite, that are 0, that are finite; their sum, and that of squares."""

OCTAVES = 128
"""Octave k holds magnitudes from 2^(k - 64) on; the first all that are smaller, the last all that are larger."""

_BLOCK, _GROUP = 256, 1 << 20
_LOWEST = 127 - 64


class _Group(NamedTuple):
    """Tensors, or parts of long ones, that fill one buffer.

    Args:
        pieces: which elements of which tensors: place, first, end.
        views: where each goes in the buffer.
        buffer: shape (blocks, 256).
        rows: of each block, shape (blocks,).
        owners: the row of each piece, shape (pieces,).
        counts: elements of each piece, shape (pieces,).
        pads: what pads the blocks of each, shape (pieces,).
    """

    pieces: Sequence[tuple[int, int, int]]
    views: list[Tensor]
    buffer: Tensor
    rows: Tensor
    owners: Tensor
    counts: Tensor
    pads: Tensor


class Statistics:
    """What has been collected of each of some tensors.

    Args:
        rows: how many tensors there are.
        device: where they lie.
        octaves: whether magnitudes are counted by octave.
        compiled: whether the reduction of a buffer is compiled, in some seconds when it first runs.

    Attributes:
        sums: shape (rows, 6), float64.
        largest: of magnitudes, shape (rows,).
        octaves: shape (rows, OCTAVES); of no row, if they are not counted.
    """

    def __init__(
        self, rows: int, device: torch.device, *, octaves: bool = False, compiled: bool = False
    ) -> None:
        width = SQUARES + 2 + (OCTAVES if octaves else 0)
        with torch.inference_mode(mode=False):
            # One tensor, so that it is read by one transfer.
            self.state = torch.zeros(rows, width, dtype=torch.float64, device=device)
        self.sums, self.largest = self.state[:, : SQUARES + 1], self.state[:, SQUARES + 1]
        self.octaves = self.state[:, SQUARES + 2 :]
        self._device = device
        self._groups: dict[tuple[int, ...], list[_Group]] = {}
        self._reduce = torch.compile(_reduce, dynamic=False) if compiled else _reduce

    @torch.no_grad()
    def add(
        self, rows: Sequence[int], tensors: Sequence[Tensor], scale: Tensor | None = None
    ) -> None:
        """Take in what tensors hold at present, divided by `scale`.

        Args:
            rows: of each tensor.
            tensors: real ones, on this device, of any shape.
            scale: of one element.
        """
        wide = [place for place, one in enumerate(tensors) if one.dtype == torch.float64]
        if wide:  # a buffer of float32 would lose what lies beyond its range
            for place in wide:
                self._add_wide(rows[place], tensors[place], scale)
            narrow = [place for place in range(len(tensors)) if place not in set(wide)]
            rows, tensors = [rows[i] for i in narrow], [tensors[i] for i in narrow]
        flat = [one.detach().reshape(-1) for one in tensors]
        for group in self._grouped(rows, [one.numel() for one in flat]):
            group.buffer.zero_()
            torch._foreach_copy_(
                group.views, [flat[place][first:end] for place, first, end in group.pieces]
            )
            if scale is not None:
                group.buffer.div_(scale.to(group.buffer.device))
            self._reduce(
                group.buffer, group.rows, group.owners, group.counts, group.pads, self.state
            )

    def _add_wide(self, row: int, tensor: Tensor, scale: Tensor | None) -> None:
        x = tensor.detach().reshape(-1)
        x = x if scale is None else x / scale
        finite = x.isfinite()
        y = torch.where(finite, x, 0.0)
        number, good, zeros = float(x.numel()), finite.sum().double(), (x == 0).sum().double()
        sums = [good.new_tensor(number), number - good, zeros, good, y.sum(), y.square().sum()]
        self.sums[row].add_(torch.stack(sums))
        if x.numel():
            largest = y.abs().amax()
            self.largest[row : row + 1].copy_(torch.maximum(self.largest[row : row + 1], largest))
        if self.octaves.shape[1]:
            octave = torch.frexp(y)[1] + (64 - 1)
            counted = finite & (y != 0)
            cells = octave.clamp(0, OCTAVES - 1).long()
            self.octaves[row].index_add_(0, cells, counted.double())

    def clear(self) -> None:
        """Forget everything."""
        self.state.zero_()

    def _grouped(self, rows: Sequence[int], sizes: Sequence[int]) -> list[_Group]:
        key = (*rows, *sizes)
        if key not in self._groups:
            self._groups[key] = _groups(rows, sizes, self._device)
        return self._groups[key]


def _reduce(
    buffer: Tensor, rows: Tensor, owners: Tensor, counts: Tensor, pads: Tensor, state: Tensor
) -> None:
    """Add a buffer to the state of its rows."""
    finite = buffer.isfinite()
    x = torch.where(finite, buffer, 0.0).double()
    bad = (~finite).sum(1, dtype=torch.float64)
    zeros = (buffer == 0).sum(1, dtype=torch.float64)
    block = torch.stack([bad, zeros, -bad, x.sum(1), (x * x).sum(1)], 1)
    state[:, NONFINITE : SQUARES + 1].index_add_(0, rows, block)
    state[:, SQUARES + 1].scatter_reduce_(0, rows, x.abs().amax(1), "amax")
    state[:, SEEN].index_add_(0, owners, counts)
    state[:, FINITE].index_add_(0, owners, counts)
    state[:, ZEROS].index_add_(0, owners, -pads)
    if state.shape[1] > SQUARES + 2:
        exponent = (buffer.view(torch.int32) >> 23) & 255
        octave = (exponent - _LOWEST).clamp(0, OCTAVES - 1)
        # Subnormals have the exponent 0, and zero is none of them.
        counted = (finite & (buffer != 0)).float().reshape(-1)
        where = (rows.unsqueeze(1) * OCTAVES + octave).reshape(-1)
        # In float32, for fewer than 2^24 are in a group.
        cells = torch.zeros(state.shape[0] * OCTAVES, device=buffer.device)
        cells.scatter_add_(0, where, counted)
        state[:, SQUARES + 2 :].add_(cells.view(-1, OCTAVES))


def _groups(rows: Sequence[int], sizes: Sequence[int], device: torch.device) -> list[_Group]:
    """Cut tensors into groups that fit into a buffer; a long one lies in several."""
    most = _GROUP // _BLOCK
    cut: list[list[tuple[int, int, int]]] = []
    room = 0
    for place, size in enumerate(sizes):
        first = 0
        while first < size:
            if room == 0:
                cut.append([])
                room = most
            end = min(size, first + room * _BLOCK)
            cut[-1].append((place, first, end))
            room -= -(-(end - first) // _BLOCK)
            first = end
    heights = [[-(-(end - first) // _BLOCK) for _, first, end in pieces] for pieces in cut]
    with torch.inference_mode(mode=False):
        # One serves all groups in turn.
        whole = torch.zeros(max(map(sum, heights), default=0), _BLOCK, device=device)
        return [
            _group(rows, pieces, each, whole) for pieces, each in zip(cut, heights, strict=True)
        ]


def _group(
    rows: Sequence[int],
    pieces: Sequence[tuple[int, int, int]],
    heights: Sequence[int],
    whole: Tensor,
) -> _Group:
    device = whole.device
    buffer, views, at = whole[: sum(heights)], [], 0
    for (_, first, end), height in zip(pieces, heights, strict=True):
        views.append(buffer.view(-1)[at * _BLOCK : at * _BLOCK + end - first])
        at += height
    owners = torch.tensor([rows[place] for place, *_ in pieces], device=device)
    counts = [float(end - first) for _, first, end in pieces]
    pads = [height * _BLOCK - count for height, count in zip(heights, counts, strict=True)]
    return _Group(
        pieces,
        views,
        buffer,
        owners.repeat_interleave(torch.tensor(heights, device=device)),
        owners,
        torch.tensor(counts, dtype=torch.float64, device=device),
        torch.tensor(pads, dtype=torch.float64, device=device),
    )
