"""Plain data as JSON: what a handler's state may hold, between ranks and in a checkpoint.

JSON types, arrays of numbers, and containers come back as they were; nothing else does, and no code.

>>> unpack(pack({"seen": (1, 2), "counts": {3: 0.5}}))
{'seen': (1, 2), 'counts': {3: 0.5}}
"""

from __future__ import annotations

import base64
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable
from typing import Any

import numpy as np

from metricfold.metric import quote

_KIND = "__kind__"
"""Marks a JSON object that stands for something else."""

_MANY = 32
_SCALARS = {type(None), bool, int, float, str}
_FACTORIES = {kind.__name__: kind for kind in (int, float, str, bool, list, dict, Counter, deque)}


class NotPlainError(TypeError):
    """Something is no plain data.

    Attributes:
        field: where it stands, such as ``['seen'][0]``.
        value: what it is, as messages say it.
    """

    def __init__(self, value: object) -> None:
        super().__init__(value)
        self.field = ""
        self.value = quote(value)

    def __str__(self) -> str:
        return (
            f"{self.field or 'it'} is {self.value}, but plain data are numbers, texts, None, lists, "
            "tuples, dicts, deques, Counters and arrays of numbers"
        )


def pack(value: Any) -> Any:
    """Return `value` in JSON types.

    Raises:
        NotPlainError: it, or something in it, is no plain data.
    """
    kind = type(value)
    if kind in _SCALARS:
        return value
    if kind is list:
        if len(value) >= _MANY and {float}.issuperset(map(type, value)):  # such as a window
            data = np.array(value, "<f8").tobytes()
            return {_KIND: "floats", "data": base64.b64encode(data).decode("ascii")}
        return _packed(value)
    if kind is dict and _KIND not in value and all(type(key) is str for key in value):
        return dict(zip(value, _packed(value.values(), value), strict=True))
    if isinstance(value, np.generic) and value.dtype.kind in "biufU":
        # Not by `item`, which leaves a longdouble as it is.
        unboxed = {"b": bool, "f": float, "U": str}.get(value.dtype.kind, int)
        return unboxed(value)
    if isinstance(value, bool | int | float | str):  # such as an IntEnum
        return value
    packed = _pack_container(kind, value)
    if packed is None:
        raise NotPlainError(value)
    return packed


def _pack_container(kind: type, value: Any) -> dict[str, Any] | None:
    if kind is tuple:
        return {_KIND: "tuple", "items": _packed(value)}
    if kind is deque:
        return {_KIND: "deque", "most": value.maxlen, "items": _packed(value)}
    if kind in (dict, Counter, OrderedDict):
        return {_KIND: kind.__name__, **_pairs(value)}
    if kind is defaultdict and value.default_factory in _FACTORIES.values():
        return {_KIND: "defaultdict", "of": value.default_factory.__name__, **_pairs(value)}
    if kind is np.ndarray and value.dtype.kind in "biufc":
        array = np.ascontiguousarray(value, value.dtype.newbyteorder("<"))
        data = base64.b64encode(array.tobytes()).decode("ascii")
        return {_KIND: "array", "type": array.dtype.str, "shape": list(value.shape), "data": data}
    return None


def _packed(values: Iterable[Any], places: Iterable[Any] | None = None) -> list[Any]:
    values = list(values)
    if _SCALARS.issuperset(map(type, values)):
        return values
    packed = []
    for place, value in zip(range(len(values)) if places is None else places, values, strict=True):
        try:
            packed.append(pack(value))
        except NotPlainError as error:
            error.field = f"[{place!r}]{error.field}"
            raise
    return packed


def _pairs(value: dict[Any, Any]) -> dict[str, Any]:
    try:
        keys = _packed(value)
    except NotPlainError as error:
        error.field = " (a key)"
        raise
    return {"keys": keys, "items": _packed(value.values(), value)}


def unpack(packed: Any) -> Any:
    """Return what was packed.

    Raises:
        ValueError: `packed` is damaged.
    """
    try:
        return _unpacked(packed)
    except RecursionError:
        raise ValueError("the data are nested too deeply") from None


def _unpacked(packed: Any) -> Any:
    if isinstance(packed, list):
        return packed if _SCALARS.issuperset(map(type, packed)) else [_unpacked(p) for p in packed]
    if not isinstance(packed, dict):
        return packed
    if _KIND not in packed:
        return {key: _unpacked(value) for key, value in packed.items()}
    try:
        return _unpack_container(packed[_KIND], packed)
    except (ArithmeticError, KeyError, SyntaxError, TypeError, ValueError) as error:
        raise ValueError(f"damaged data of kind {packed[_KIND]!r}: {error!r}") from None


def _unpack_container(kind: str, packed: dict[str, Any]) -> Any:
    if kind == "floats":
        return np.frombuffer(base64.b64decode(packed["data"], validate=True), "<f8").tolist()
    if kind == "array":
        dtype = np.dtype(packed["type"])
        if dtype.kind not in "biufc":
            raise ValueError(f"an array of {dtype} is none of numbers")
        data = base64.b64decode(packed["data"], validate=True)
        return np.frombuffer(data, dtype).reshape(packed["shape"]).astype(dtype.newbyteorder("="))
    items = _unpacked(packed["items"])
    if kind == "tuple":
        return tuple(items)
    if kind == "deque":
        return deque(items, packed["most"])
    pairs = zip(_unpacked(packed["keys"]), items, strict=True)
    if kind == "defaultdict":
        return defaultdict(_FACTORIES[packed["of"]], pairs)
    if kind == "Counter":
        return Counter(dict(pairs))
    return OrderedDict(pairs) if kind == "OrderedDict" else dict(pairs)
