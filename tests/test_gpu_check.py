"""What `make gpu-check` runs on a GPU runs on a CPU, and says so where there is none."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from gpu_check import PARTS, Place, main, reduce_beside
from jax_devices import on_devices
from ranks import run_ranks


def small(folder: Path) -> Place:
    return Place("cpu", step=1e-4, rounds=2, folder=folder)


@pytest.mark.parametrize("part", ["syncs", "kernels", "steps", "watch", "trace"])
def test_each_part_finds_finite_figures(part: str, tmp_path: Path) -> None:
    section = PARTS[part](small(tmp_path))
    assert section.rows or section.notes
    assert all(math.isfinite(row.figure) for row in section.rows)
    assert part != "trace" or list(tmp_path.glob("metricfold-cpu.json"))


def logged_beside(rank: int) -> None:
    reduce_beside("cpu")


def test_ranks_log_while_their_own_collectives_are_under_way() -> None:
    run_ranks(logged_beside, 2)


@on_devices(1)
def test_jax_agrees_with_the_host() -> None:
    section = PARTS["jax"](small(Path()))
    assert "accumulator, packed metrics, recorded arrays" in section.title


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_it_says_so_and_ends_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert capsys.readouterr().out.startswith("skipped: torch sees no GPU here")
