"""Metrics as trees, nested at will: names for their leaves, and what a second tree says about each of them.

What a tree of ops or of weights says about a container it says about everything in there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import jax

__all__ = ["ABSENT", "PARTS", "Leaf", "Said", "flatten", "weights_of"]

Read = TypeVar("Read")

ABSENT, PARTS = object(), object()
"""What `Said.about` returns for a leaf about which nothing is said, or only about what it has not."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """One value of a tree, and the way to it."""

    value: Any
    keys: tuple[Any, ...]

    def path(self, root: str) -> str:
        """Return how a user would write it: ``metrics['train']['loss']``."""
        return root + "".join(f"[{key!r}]" for key in self.keys)


def flatten(
    tree: Any, *, whole: bool = False, leaves: type | tuple[type, ...] = ()
) -> tuple[list[Leaf], Any]:
    """Return the leaves of a pytree, ``None`` being one, and its structure.

    Args:
        tree: any pytree.
        whole: let what stands for one array, such as a Flax variable, be a leaf, and no tree of one.
        leaves: types that are leaves, too.
    """

    def is_leaf(node: Any) -> bool:
        return (
            node is None
            or isinstance(node, leaves)
            or (whole and hasattr(type(node), "__jax_array__"))
        )

    found, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    return [Leaf(value, tuple(_key(entry) for entry in path)) for path, value in found], structure


def _key(entry: Any) -> Any:
    found = (getattr(entry, name) for name in ("key", "idx", "name") if hasattr(entry, name))
    return next(found, entry)


class Said:
    """What a second tree says about each leaf of a first: about it, or about a part that it is in.

    Args:
        tree: with the keys of the first, whatever the containers: a dict may speak of a dataclass.
    """

    def __init__(self, tree: Any) -> None:
        self.leaves = list(_said_in(tree, ()))
        self.one = any(not leaf.keys for leaf in self.leaves)
        self._values = {leaf.keys: leaf.value for leaf in self.leaves}
        self._parts = {leaf.keys[:n] for leaf in self.leaves for n in range(len(leaf.keys))}

    def about(self, leaf: Leaf) -> Any:
        """Return what is said about `leaf`; `ABSENT` if nothing is, `PARTS` if only about parts of it."""
        for n in range(len(leaf.keys) + 1):
            if leaf.keys[:n] in self._values:
                return self._values[leaf.keys[:n]]
        return PARTS if leaf.keys in self._parts else ABSENT


def weights_of(
    weights: Any,
    leaves: Sequence[Leaf],
    named: Callable[[Leaf], str],
    read: Callable[[Any, str], Read],
) -> list[Read]:
    """Return what `read` makes of the weights of each leaf, and of what they are called.

    One is for all, a tree has those of each; `named` says what a leaf is called.
    """
    said = Said(weights)
    if said.one:
        return [read(weights, "weights")] * len(leaves)
    found = []
    for leaf in leaves:
        where, weight = leaf.path("weights"), said.about(leaf)
        if weight is ABSENT or weight is PARTS:
            raise ValueError(
                f"{named(leaf)} has no weights: give {where}, or one number or array for all metrics"
            )
        found.append(read(weight, where))
    return found


def _said_in(tree: Any, keys: tuple[Any, ...]) -> Iterator[Leaf]:
    """Yield the leaves of a tree whose dicts, unlike those of pytrees, may have keys of any types."""
    if isinstance(tree, Mapping):
        for key, part in tree.items():
            yield from _said_in(part, (*keys, key))
        return
    for leaf in flatten(tree, whole=True, leaves=Mapping)[0]:
        if isinstance(leaf.value, Mapping):
            yield from _said_in(leaf.value, (*keys, *leaf.keys))
        else:
            yield Leaf(leaf.value, (*keys, *leaf.keys))
