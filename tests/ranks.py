"""Worlds of ranks for tests: `benchmarks.ranks`, skipped where torch, which joins processes, is missing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from benchmarks import ranks
from benchmarks.ranks import RankError, preload, run_threads
from ports import free_port

__all__ = ["RankError", "free_port", "preload", "run_ranks", "run_threads"]

preload("pytest", "hypothesis")  # each rank imports a test module, and with it what this imports


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, **limits: Any
) -> list[Any]:
    """Return what ``function(rank, *args)`` returned on each rank, a process of its own."""
    pytest.importorskip("torch")
    return ranks.run_ranks(function, world_size, *args, **limits)
