"""How much a value may weigh."""

from __future__ import annotations

__all__ = ["LARGEST_WEIGHT"]

LARGEST_WEIGHT = 1e150
"""The squares of weights must add up to a number."""
