"""Metrics as trees: names for their leaves, and what a second tree says about each of them.

Metrics may be nested. A second dict, of ops or of weights, may be nested likewise, and what it says
about a dict it says about everything in there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

__all__ = ["ABSENT", "Leaf", "flatten", "look_up"]

ABSENT = object()
"""What `look_up` returns for a leaf about which nothing is said."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """One value of a tree, and the way to it."""

    value: Any
    keys: tuple[Any, ...]

    def path(self, root: str) -> str:
        """Return how a user would write it: ``metrics['train']['loss']``."""
        return root + "".join(f"[{key!r}]" for key in self.keys)


def flatten(tree: Any) -> tuple[list[Leaf], Any]:
    """Return the leaves of a pytree, ``None`` being one, and its structure."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is None)
    return [Leaf(value, tuple(_key(entry) for entry in path)) for path, value in leaves], structure


def _key(entry: Any) -> Any:
    for attribute in ("key", "idx", "name"):
        if hasattr(entry, attribute):
            return getattr(entry, attribute)
    return entry


def look_up(said: Mapping[Any, Any], leaf: Leaf) -> Any:
    """Return what `said` has for `leaf`, or for a dict that it is in; else `ABSENT`."""
    found: Any = said
    for key in leaf.keys:
        if not isinstance(found, Mapping):
            break
        if key not in found:
            return ABSENT
        found = found[key]
    return found
