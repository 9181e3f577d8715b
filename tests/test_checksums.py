"""A checksum says whether a tensor holds the same bits on all ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from metricfold._core.fold.elements import checksum_lanes, dissenting
from metricfold.torch.replicas import Checksums
from metricfold.torch.statistics import Scratch


def checksum(*tensors: torch.Tensor) -> list[int]:
    names = [str(number) for number in range(len(tensors))]
    sums = Checksums(names, torch.device("cpu"), Scratch())
    sums.take(tensors)
    return sums.state.tolist()


def plain(tensor: torch.Tensor) -> int:
    """Compute the checksum in plain Python."""
    kind = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int32}[tensor.element_size()]
    words = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().view(kind).tolist()
    total = sum(word * (2 * place + 1) for place, word in enumerate(words))
    return (total + 2**63) % 2**64 - 2**63


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16])
def test_it_is_the_sum_of_words_times_odd_numbers(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(shape).to(dtype) for shape in [(3,), (1_200, 1_000), (), (0,), (257,)]]
    assert checksum(*tensors) == [plain(one) for one in tensors]


def test_any_one_bit_shows_and_so_do_places_zeros_and_nans() -> None:
    torch.manual_seed(0)
    one = torch.randn(1000)
    others = []
    for bit in range(32):
        other = one.clone()
        other.view(torch.int32)[7 * bit] ^= 1 << bit if bit < 31 else -(1 << 31)
        others.append(other)
    swapped = one.clone()
    swapped[:2] = one[[1, 0]]
    zeros = torch.tensor([0.0, -0.0])
    nans = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    found = checksum(one, *others, swapped, zeros[:1], zeros[1:], nans[:1], nans[1:])
    lanes = checksum_lanes(found, 5)
    assert len({tuple(row) for row in lanes.tolist()}) == len(found)
    same = one.view(10, 100).t().contiguous().t()
    assert checksum(same) == checksum(one)


def test_ranks_that_dissent_are_those_that_are_fewer() -> None:
    checks = [[11, 5, -1], [11, 6, -1], [12, 5, -2], [11, 6, -3]]
    lanes = np.stack([checksum_lanes(one, 1) for one in checks])
    lanes[3, 1] = -np.inf  # it does not hold the second
    assert dissenting(lanes) == {0: [2], 1: [1], 2: [2, 3]}
    # An earlier check says nothing of a newer one.
    lanes[0] = checksum_lanes(checks[2], 2)
    lanes[2] = checksum_lanes(checks[2], 2)
    assert dissenting(lanes) == {}
    assert dissenting(np.full((2, 1, 4), -np.inf)) == {}
