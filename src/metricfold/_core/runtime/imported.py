"""Modules of frameworks, which are looked for and never imported from here."""

from __future__ import annotations

import sys

__all__ = ["is_of"]


def is_of(value: object, module: str, name: str) -> bool:
    """Return whether `value` is of a class of a module that may not be there, or not all of it yet."""
    kind = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(value, kind)
