"""Public objects say where users find them, wherever they lie.

    __all__ = ["MetricBatch", "MetricsCollator"]
    publish(globals())

So reprs, `help` and error messages show no private path; and a pickle names the public one, which
stays where it is when private files move.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import suppress
from types import FunctionType
from typing import Any

__all__ = ["publish"]

_PACKAGE = __name__.partition(".")[0]


def publish(module: Mapping[str, Any]) -> None:
    """Let what a public module exports, by its ``__all__``, say that module as its own.

    What the package itself exports says the package.
    """
    package = getattr(sys.modules[_PACKAGE], "__all__", ())
    for name in module["__all__"]:
        found = module.get(name)
        home = _PACKAGE if name in package else module["__name__"]
        # `help` shows private bases, too.
        bases = [one for one in getattr(found, "__mro__", ()) if "._" in one.__module__]
        for one in {found, *bases} if isinstance(found, type | FunctionType) else ():
            if one.__module__.startswith(f"{_PACKAGE}."):
                _resolve(one)
                one.__module__ = home


def _resolve(published: type | FunctionType) -> None:
    """Let annotations be what they mean here: where they are looked for from now on, names may differ."""
    known = vars(sys.modules[published.__module__])
    hints = vars(published).get("__annotations__", {})
    for name, hint in hints.items():
        text = getattr(hint, "__forward_arg__", hint)
        if isinstance(text, str):
            with suppress(NameError):  # of what only type checkers import
                hints[name] = eval(text, known)  # noqa: S307 - our own
    for field in vars(published).get("__dataclass_fields__", {}).values():
        field.type = hints.get(field.name, field.type)
