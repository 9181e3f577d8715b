"""Sums over the elements of many tensors at once, a row for each: a fixed number of kernels, none per tensor.

Tensors are copied side by side into one float32 buffer of (blocks, 256), each from the start of a block
on, by one multi-tensor kernel that widens bfloat16 and float16 on the way. The blocks are reduced, and
then joined by row. What pads a block is 0, and how much that is, is known beforehand. More tensors than
a buffer holds are taken group by group.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metricfold._core.device.watched import FINITE, NONFINITE, OCTAVES, SEEN, SQUARES, ZEROS

__all__ = [
    "BLOCK",
    "LARGEST",
    "WIDTH",
    "Group",
    "Grouped",
    "Scratch",
    "Statistics",
    "add_of_one",
]

BLOCK = 256
_GROUP = {"cpu": 1 << 20}
"""Elements of a buffer: on a CPU as many as its cache holds."""
_GROUP_OF_OTHERS = 1 << 24
"""On other devices, where it is the number of kernels that matters. A float32 counts so far, too."""
LARGEST, WIDTH = SQUARES + 1, SQUARES + 2
"""Where a row has the largest magnitude, and where octaves begin, if they are counted."""
_LOWEST = 127 - 64
"""The exponent of a float32 in the first octave but the one for all that are smaller."""


class Group(NamedTuple):
    """Tensors, or parts of long ones, that fill one buffer.

    Args:
        pieces: which elements of which tensors: place, and the part, or None for all.
        views: where each goes in the buffer.
        buffer: shape (blocks, 256), float32; of what lies in it nothing stays there.
        rows: of each block, shape (blocks,).
        starts: which element of its tensor a block begins with, shape (blocks,).
    """

    pieces: Sequence[tuple[int, slice | None]]
    views: list[Tensor]
    buffer: Tensor
    rows: Tensor
    starts: Tensor

    def fill(self, flat: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> None:
        """Copy flat tensors into the buffer, as numbers of a type of 32 bits."""
        self.buffer.zero_()
        same = dtype == torch.float32
        views = self.views if same else [one.view(dtype) for one in self.views]
        torch._foreach_copy_(
            views, [flat[at] if part is None else flat[at][part] for at, part in self.pieces]
        )


class Grouped(NamedTuple):
    """Tensors in groups.

    Args:
        key: rows and sizes of the tensors.
        groups: in order.
        known: what to add to the sums of each row besides: shape (rows, 6).
    """

    key: tuple[int, ...]
    groups: Sequence[Group]
    known: Tensor


class Scratch:
    """The buffer of each device, which serves all groups in turn."""

    def __init__(self) -> None:
        self._buffers: dict[torch.device, Tensor] = {}

    def buffer(self, device: torch.device, blocks: int) -> Tensor:
        """Return a buffer of so many blocks."""
        known = self._buffers.get(device)
        if known is None or len(known) < blocks:
            with torch.inference_mode(mode=False):
                known = torch.zeros(blocks, BLOCK, device=device)
            self._buffers[device] = known
        return known[:blocks]

    def grouped(
        self, rows: Sequence[int], sizes: Sequence[int], number: int, device: torch.device
    ) -> Grouped:
        """Cut tensors into groups that fit into the buffer; a long one lies in several.

        Args:
            rows: of each tensor.
            sizes: how many elements each has.
            number: of rows.
            device: where they lie.
        """
        most = _GROUP.get(device.type, _GROUP_OF_OTHERS) // BLOCK
        cut: list[list[tuple[int, int, int]]] = []
        room = 0
        for place, size in enumerate(sizes):
            first = 0
            while first < size:
                if room == 0:
                    cut.append([])
                    room = most
                end = min(size, first + room * BLOCK)
                cut[-1].append((place, first, end))
                room -= -(-(end - first) // BLOCK)
                first = end
        # If there are several, all are as long, for one shape is compiled once.
        blocks = most if len(cut) > 1 else most - room if cut else 0
        known = torch.zeros(number, LARGEST, dtype=torch.float64)
        with torch.inference_mode(mode=False):
            buffer = self.buffer(device, blocks)
            groups = [self._group(rows, sizes, pieces, buffer, known) for pieces in cut]
            return Grouped((*rows, *sizes), groups, _sent(known, device))

    def _group(
        self,
        rows: Sequence[int],
        sizes: Sequence[int],
        pieces: Sequence[tuple[int, int, int]],
        buffer: Tensor,
        known: Tensor,
    ) -> Group:
        blocks, device, views, at = len(buffer), buffer.device, [], 0
        of_blocks, starts = torch.zeros(2, blocks, dtype=torch.int64)
        for place, first, end in pieces:
            views.append(buffer.view(-1)[at * BLOCK : at * BLOCK + end - first])
            height, row = -(-(end - first) // BLOCK), rows[place]
            of_blocks[at : at + height] = row
            starts[at : at + height] = torch.arange(first, end, BLOCK)
            at += height
            known[row, SEEN] += end - first
            known[row, FINITE] += end - first
            known[row, ZEROS] -= height * BLOCK - (end - first)
        known[0, ZEROS] -= (blocks - at) * BLOCK
        parts = [
            (place, None if end - first == sizes[place] else slice(first, end))
            for place, first, end in pieces
        ]
        return Group(parts, views, buffer, _sent(of_blocks, device), _sent(starts, device))


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a copy on a device, for which the host does not wait."""
    return tensor.to(device, non_blocking=True)


class Statistics:
    """What has been collected of each of some tensors.

    Args:
        rows: how many tensors there are.
        device: where they lie.
        octaves: whether magnitudes are counted by octave.
        compiled: whether the reduction of a buffer is compiled, in some seconds when it first runs.
        scratch: where the buffer is.

    Attributes:
        state: all of it, shape (rows, n), float64.
        sums: shape (rows, 6), as `element_states` takes them.
        largest: of magnitudes, shape (rows,).
        octaves: shape (rows, OCTAVES); (rows, 0) if they are not counted.
    """

    def __init__(
        self,
        rows: int,
        device: torch.device,
        *,
        octaves: bool = False,
        compiled: bool = False,
        scratch: Scratch | None = None,
    ) -> None:
        width = WIDTH + (OCTAVES if octaves else 0)
        with torch.inference_mode(mode=False):
            # One tensor, so that it is read by one transfer.
            self.state = torch.zeros(rows, width, dtype=torch.float64, device=device)
        self.sums, self.largest = self.state[:, :LARGEST], self.state[:, LARGEST]
        self.octaves = self.state[:, WIDTH:]
        self._device, self._scratch = device, scratch or Scratch()
        self._grouped: Grouped | None = None
        self._reduce = _compiled() if compiled else _reduce

    @torch.no_grad()
    def add(
        self,
        rows: Sequence[int],
        tensors: Sequence[Tensor],
        scale: Tensor | None = None,
        counts: Tensor | None = None,
    ) -> None:
        """Take in what tensors hold at present, divided by `scale`.

        Args:
            rows: of each tensor.
            tensors: real ones, on this device, of any shape.
            scale: of one element.
            counts: a flag of one element on this device: whether they are taken in at all.
        """
        before = self.state if counts is None else self.state.clone()
        wide = [place for place, one in enumerate(tensors) if one.dtype == torch.float64]
        if wide:  # a buffer of float32 would lose what lies beyond its range
            for place in wide:
                self._add_wide(rows[place], tensors[place], scale)
            narrow = sorted({*range(len(tensors))} - {*wide})
            rows, tensors = [rows[place] for place in narrow], [tensors[place] for place in narrow]
        flat = [one if one.dim() == 1 else one.reshape(-1) for one in tensors]
        grouped = self._in_groups(rows, [one.numel() for one in flat])
        for group in grouped.groups:
            group.fill(flat)
            if scale is not None:
                group.buffer.div_(scale.to(self._device))
            self._reduce(group.buffer, group.rows, self.state)
        self.sums.add_(grouped.known)
        if counts is not None:
            self.state.copy_(torch.where(counts, self.state, before))

    def _in_groups(self, rows: Sequence[int], sizes: Sequence[int]) -> Grouped:
        if self._grouped is None or self._grouped.key != (*rows, *sizes):
            self._grouped = self._scratch.grouped(rows, sizes, len(self.state), self._device)
        return self._grouped

    def _add_wide(self, row: int, tensor: Tensor, scale: Tensor | None) -> None:
        x = tensor.detach()
        add_of_one(self.state, row, x if scale is None else x / scale.to(x))

    def clear(self) -> None:
        """Forget everything."""
        self.state.zero_()


def add_of_one(state: Tensor, row: int, x: Tensor, counts: Tensor | None = None) -> None:
    """Add one tensor, of any shape, to a row; eager or inside of a graph.

    Args:
        state: of `Statistics`.
        row: which.
        x: a real tensor.
        counts: a flag on its device: whether it is taken in.
    """
    if not x.numel():
        return
    finite = x.isfinite()
    y = torch.where(finite, x, 0.0).double()
    good = finite.sum().double()
    number = torch.full_like(good, float(x.numel()))
    zeros = (x == 0).sum().double()
    sums = torch.stack([number, number - good, zeros, good, y.sum(), y.square().sum()])
    largest = y.abs().amax()
    counted = finite & (x != 0)
    if counts is not None:
        sums, largest = torch.where(counts, sums, 0.0), torch.where(counts, largest, 0.0)
        counted = counted & counts
    # Numbers alone cross to another device, if the state lies on one.
    state[row, :LARGEST].add_(sums.to(state.device))
    top = state[row, LARGEST:WIDTH]
    top.copy_(torch.maximum(top, largest.to(state.device)))
    if state.shape[1] > WIDTH:
        exponent = (y.reshape(-1).view(torch.int64) >> 52) & 2047  # the sign is the bit above
        octave = (exponent - (1023 - 64)).clamp(0, OCTAVES - 1)
        cells = torch.zeros(OCTAVES, dtype=torch.float64, device=x.device)
        cells.index_add_(0, octave, counted.double().reshape(-1))
        state[row, WIDTH:].add_(cells.to(state.device))


def _reduce(buffer: Tensor, rows: Tensor, state: Tensor) -> None:
    """Add a buffer to the state of its rows, as far as it is not known beforehand."""
    finite = buffer.isfinite()
    x = torch.where(finite, buffer, 0.0).double()
    bad = (~finite).sum(1, dtype=torch.float64)
    zeros = (buffer == 0).sum(1, dtype=torch.float64)
    block = torch.stack([bad, zeros, -bad, x.sum(1), (x * x).sum(1)], 1)
    state[:, NONFINITE:LARGEST].index_add_(0, rows, block)
    state[:, LARGEST].scatter_reduce_(0, rows, x.abs().amax(1), "amax")
    if state.shape[1] > WIDTH:
        exponent = (buffer.view(torch.int32) >> 23) & 255
        octave = (exponent - _LOWEST).clamp(0, OCTAVES - 1)
        # Subnormals have the exponent 0, and zero is none of them.
        counted = (finite & (buffer != 0)).float().reshape(-1)
        where = (rows.unsqueeze(1) * OCTAVES + octave).reshape(-1)
        # In float32, for no more than 2^24 are in a group.
        cells = torch.zeros(state.shape[0] * OCTAVES, device=buffer.device)
        cells.scatter_add_(0, where, counted)
        state[:, WIDTH:].add_(cells.view(-1, OCTAVES))


@functools.cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(_reduce, dynamic=False)
