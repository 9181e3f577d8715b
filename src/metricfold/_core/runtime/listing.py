"""What a user is shown of an object: in a list of its attributes, and in one line.

@internal("columns", "replaced")      # public between modules of this package alone
class MetricBatch: ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

__all__ = ["internal", "shortened"]

C = TypeVar("C", bound=type)


def internal(*names: str) -> Callable[[C], C]:
    """Mark attributes of a class that `dir()`, and so a shell's completion, leaves out."""
    hidden = frozenset(names)

    def marked(cls: C) -> C:
        listed: Any = cls.__dir__

        def shown(self: object) -> Iterable[str]:
            return [name for name in listed(self) if name not in hidden]

        setattr(cls, "__dir__", shown)  # noqa: B010 - mypy knows no assignment to a method
        return cls

    return marked


def shortened(items: Iterable[Any], most: int = 4) -> str:
    """Return the first of `items` in one line, and how many more there are."""
    texts = [" ".join(str(item).split()) for item in items]
    more = [f"... {len(texts) - most} more"] if len(texts) > most else []
    return ", ".join([*texts[:most], *more])
