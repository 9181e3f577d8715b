"""Modules of frameworks, which are looked for and never imported from here."""

from __future__ import annotations

import sys

__all__ = ["is_of", "kinds"]


def is_of(value: object, module: str, name: str) -> bool:
    """Return whether `value` is of a class of a module that may not be there, or not all of it yet."""
    kind = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(value, kind)


def kinds(module: str, name: str) -> tuple[type, ...]:
    """Return what to ask `isinstance` of many values; empty if the module is not there."""
    kind = getattr(sys.modules.get(module), name, None)
    return () if kind is None else (kind,)
