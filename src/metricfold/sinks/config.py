"""A run's configuration as trackers have it: values by flat names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["flattened"]


def flattened(config: Mapping[str, Any], of: str = "") -> dict[str, Any]:
    """Return the values of nested mappings under joined names.

    >>> flattened({"seed": 1, "optimizer": {"lr": 0.1, "betas": [0.9, 0.99]}, "data": {}})
    {'seed': 1, 'optimizer.lr': 0.1, 'optimizer.betas': [0.9, 0.99]}
    """
    flat: dict[str, Any] = {}
    for name, value in config.items():
        key = f"{of}{name}"
        flat |= flattened(value, f"{key}.") if isinstance(value, Mapping) else {key: value}
    return flat
