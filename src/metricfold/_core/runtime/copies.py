"""Copies: what is in use stays one, and what cannot be copied says where it was found.

Frameworks copy whatever hangs on a module: weight averaging, quantisation, searches for settings. What
has threads, ranks or a Trainer is no second one's; before that it copies as anything does.
"""

from __future__ import annotations

import copy
import gc
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["OneInUse", "copied_plainly", "where_found"]

T = TypeVar("T")

_LEVELS = 4  # of what holds what holds it
_PLACES = 5  # that a message names


class OneInUse:
    """Something that copies to itself once it is in use."""

    def _in_use(self) -> bool:
        raise NotImplementedError

    def __copy__(self) -> Self:
        return self if self._in_use() else copied_plainly(self, None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self if self._in_use() else copied_plainly(self, memo)


def copied_plainly(one: T, memo: dict[int, Any] | None) -> T:
    """Return what `copy.deepcopy`, or `copy.copy` if `memo` is None, makes of an object by default."""
    reduced: Any = one.__reduce_ex__(4)
    make, args, state = reduced[:3]
    copied: T = make(*args)
    if memo is not None:
        memo[id(one)] = copied
        state = copy.deepcopy(state, memo)
    if hasattr(copied, "__setstate__"):
        copied.__setstate__(state)
    else:
        vars(copied).update(state or {})
    return copied


def where_found(thing: object) -> str:
    """Return in which attributes of which objects `thing` is, for a message; empty if in none.

    >>> from types import SimpleNamespace
    >>> model = SimpleNamespace(metrics={"loss"})
    >>> where_found(model.metrics)
    "attribute 'metrics' of a SimpleNamespace"
    """
    return "; ".join([*dict.fromkeys(_places(thing, _LEVELS))][:_PLACES])


def _places(thing: object, levels: int) -> list[str]:
    found: list[str] = []
    for holder in gc.get_referrers(thing) if levels else ():
        owners = [holder] if _attributes(holder) is not None else []
        if isinstance(holder, dict):
            owners = [one for one in gc.get_referrers(holder) if _attributes(one) is holder]
        if not owners and isinstance(holder, dict | list | tuple):
            found += _places(holder, levels - 1)
        for owner in owners:
            found += _place_in(owner, thing, levels)
    return found


def _place_in(owner: object, thing: object, levels: int) -> list[str]:
    kind = type(owner)
    if isinstance(owner, ModuleType):
        return []
    if kind.__module__.partition(".")[0] != "metricfold":
        attributes = _attributes(owner) or {}
        names = [name for name, value in attributes.items() if value is thing]
        return [f"attribute {name!r} of a {kind.__name__}" for name in names]
    if kind.__name__.startswith("_"):
        return []
    further = _places(owner, levels - 1)
    return [f"in a {kind.__name__}, {place}" for place in further] or [f"in a {kind.__name__}"]


def _attributes(one: object) -> dict[str, Any] | None:
    """Return the very dict of an object's attributes; a class has none."""
    attributes = getattr(one, "__dict__", None)
    return attributes if isinstance(attributes, dict) else None
