"""A run's configuration: as JSON has it, in a size that a record has room for, and by flat names."""

from __future__ import annotations

import argparse
import dataclasses
import enum
import json
import math
import re
import reprlib
import types
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import PurePath
from typing import Any

__all__ = ["config_as_json", "flattened"]

_ROOM = 1 << 16
"""So many bytes of JSON a configuration may take: it is written by every process, to every sink."""
_LONGEST = 2000  # characters of a text
_DEEPEST = 20  # how deep it may nest, so that one that holds itself ends


def config_as_json(config: object) -> tuple[dict[str, Any], int]:
    """Return a configuration as a JSON object has it, and how many entries it has no room for.

    Args:
        config: a mapping (OmegaConf's, too), a dataclass, a namespace of argparse, or an object with
            ``to_dict`` or ``model_dump``. What JSON does not have is written as text, without the
            addresses of objects, so that equal runs have equal ones.

    Raises:
        TypeError: it is something else.

    >>> config_as_json({"lr": 3e-4, "path": PurePath("data"), "clip": math.nan})
    ({'lr': 0.0003, 'path': 'data', 'clip': 'NaN'}, 0)
    """
    if not isinstance(config, type) and (entries := _entries(config)) is not None:
        written = _Written()
        return dict(written.entries(entries, 0)), written.left_out
    raise TypeError(
        f"config={reprlib.repr(config)} is no configuration: give a dict, a dataclass, a namespace of "
        "argparse, or an object with to_dict()"
    )


class _Written:
    """Turns values into JSON's, for as long as there is room."""

    def __init__(self) -> None:
        self.room = _ROOM
        self.left_out = 0

    def entries(self, entries: Mapping[Any, Any], depth: int) -> Iterator[tuple[str, Any]]:
        for name in entries:
            text = _shortened(str(name))
            if not self._takes(text):
                continue
            try:
                value = entries[name]
            except Exception as error:  # noqa: BLE001 - OmegaConf's, of what is missing
                value = f"({type(error).__name__})"
            yield text, self.value(value, depth + 1)

    def value(self, value: Any, depth: int) -> Any:
        if isinstance(value, enum.Enum):
            value = value.value
        if hasattr(value, "item") and getattr(value, "shape", None) == ():
            value = value.item()
        if value is None or isinstance(value, bool | int | float):
            found: Any = value
            if isinstance(value, float) and not math.isfinite(value):
                found = json.dumps(float(value))
            self._takes(found)
            return found
        if (entries := _entries(value)) is not None and depth < _DEEPEST:
            return dict(self.entries(entries, depth))
        if isinstance(value, AbstractSet):
            value = sorted(value, key=str)
        listed = isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)
        if listed and depth < _DEEPEST:
            return [self.value(one, depth + 1) for one in value if self._takes("")]
        text = _as_text(value)
        self._takes(text)
        return text

    def _takes(self, part: Any) -> bool:
        """Return whether there is room for a part, and take it."""
        self.room -= len(json.dumps(part)) + 2
        self.left_out += self.room < 0
        return self.room >= 0


def _entries(value: Any) -> Mapping[Any, Any] | None:
    if isinstance(value, Mapping):
        return value
    if isinstance(value, type):
        return None
    if dataclasses.is_dataclass(value):
        return {one.name: getattr(value, one.name, None) for one in dataclasses.fields(value)}
    if isinstance(value, argparse.Namespace | types.SimpleNamespace):
        return vars(value)
    for name in ("to_dict", "model_dump"):
        if callable(method := getattr(value, name, None)) and not hasattr(value, "shape"):
            found = method()
            return found if isinstance(found, Mapping) else None
    return None


def _as_text(value: Any) -> str:
    if isinstance(value, bytes | bytearray):
        return f"{len(value)} bytes"
    if getattr(value, "shape", ()):
        return f"{type(value).__name__} of shape {tuple(value.shape)}"
    if isinstance(value, str | PurePath):
        return _shortened(str(value))
    if (name := getattr(value, "__qualname__", None)) is not None:
        return f"{getattr(value, '__module__', '')}.{name}"
    return _shortened(re.sub(r" at 0x[0-9a-fA-F]+", "", str(value)))


def _shortened(text: str) -> str:
    # A lone surrogate, as names of files may hold, is no text that others read.
    text = text.encode("utf-8", "backslashreplace").decode()
    if len(text) <= _LONGEST:
        return text
    return f"{text[:_LONGEST]}… ({len(text)} characters)"


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
