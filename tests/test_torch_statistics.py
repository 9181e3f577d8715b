"""Statistics of many tensors at once are those of each by itself."""

from __future__ import annotations

import math

import pytest
import torch

from metricfold._core.device.watched import FINITE, NONFINITE, OCTAVES, SEEN, SQUARES, TOTAL, ZEROS
from metricfold.torch.statistics import Statistics

TYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def tensors_of(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(3, 5), (256,), (257,), (0,), (1,), (7, 100), (70_000, 16), ()]
    made = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    made[0][0, :3] = torch.tensor([math.nan, math.inf, 0.0])
    made[5] *= 1e-3
    made[5][:, ::7] = 0.0
    return made


def octaves_of(x: torch.Tensor) -> torch.Tensor:
    """Count magnitudes by octave in plain code."""
    counts = torch.zeros(OCTAVES, dtype=torch.float64)
    magnitudes = x.double().abs().reshape(-1)
    magnitudes = magnitudes[magnitudes.isfinite() & (magnitudes > 0)]
    octaves = torch.frexp(magnitudes)[1] - 1 + 64
    return counts.index_add_(0, octaves.clamp(0, OCTAVES - 1).long(), torch.ones_like(magnitudes))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("scale", [None, 1024.0])
def test_each_row_is_what_plain_code_says_of_its_tensor(
    dtype: torch.dtype, scale: float | None
) -> None:
    tensors = tensors_of(dtype)
    statistics = Statistics(len(tensors) + 1, torch.device("cpu"), octaves=True)
    rows = list(reversed(range(len(tensors))))
    by = None if scale is None else torch.tensor([scale])
    for _ in range(2):
        statistics.add(rows, tensors, by)
    for row, one in zip(rows, tensors, strict=True):
        x = one.double() / (scale or 1.0)
        if dtype is not torch.float64:
            x = (one.float() / (scale or 1.0)).double()
        finite = x[x.isfinite()]
        sums = statistics.sums[row] / 2
        assert sums[SEEN] == x.numel()
        assert sums[NONFINITE] == (~x.isfinite()).sum()
        assert sums[ZEROS] == (x == 0).sum()
        assert sums[FINITE] == finite.numel()
        torch.testing.assert_close(sums[TOTAL], finite.sum(), rtol=1e-12, atol=1e-9)
        torch.testing.assert_close(sums[SQUARES], finite.square().sum(), rtol=1e-12, atol=0.0)
        largest = finite.abs().amax() if finite.numel() else torch.tensor(0.0).double()
        assert statistics.largest[row] == largest
        assert torch.equal(statistics.octaves[row] / 2, octaves_of(x))
    assert not statistics.state[-1].any()
    statistics.clear()
    assert not statistics.state.any()


def test_subnormals_are_in_the_first_octave_and_large_ones_in_the_last() -> None:
    statistics = Statistics(1, torch.device("cpu"), octaves=True)
    statistics.add([0], [torch.tensor([1e-40, 1e-30, 1.0, 1e30, 0.0, math.inf])])
    assert statistics.octaves[0].nonzero().flatten().tolist() == [0, 64, OCTAVES - 1]
    assert statistics.octaves[0, 0] == 2


def test_a_number_of_kernels_that_does_not_grow_with_the_tensors() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counting(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            moves = ("view", "reshape", "slice", "detach", "select", "alias", "unsqueeze", "expand")
            self.count += not any(move in str(func) for move in moves)
            return func(*args, **(kwargs or {}))

    counts = []
    for number in (3, 300):
        statistics = Statistics(number, torch.device("cpu"))
        tensors = [torch.randn(40) for _ in range(number)]
        statistics.add(range(number), tensors)
        with Counting() as counting:
            statistics.add(range(number), tensors)
        counts.append(counting.count)
    assert counts[0] == counts[1] < 40
