"""Plain data: what travels between ranks and into checkpoints comes back as it was."""

from __future__ import annotations

import enum
import json
from collections import Counter, OrderedDict, defaultdict, deque
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metricfold._core.fold.plain import NotPlainError, pack, unpack

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
keys = st.text() | st.integers() | st.floats(allow_nan=False) | st.tuples(st.integers(), st.text())
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.builds(deque, st.lists(inner, max_size=3), st.none() | st.integers(3, 9))
        | st.dictionaries(keys, inner)
        | st.dictionaries(keys, inner).map(OrderedDict)
        | st.dictionaries(keys, inner).map(lambda pairs: defaultdict(list, pairs))
        | st.dictionaries(keys, st.integers()).map(Counter)
    ),
    max_leaves=10,
)


def sent(value: Any) -> Any:
    return unpack(json.loads(json.dumps(pack(value))))


def kinds(value: Any) -> Any:
    """Return the types of a value and of all in it."""
    if isinstance(value, dict):
        return type(value), [(kinds(key), kinds(item)) for key, item in value.items()]
    if isinstance(value, list | tuple | deque):
        return type(value), getattr(value, "maxlen", None), [kinds(item) for item in value]
    return type(value)


@given(values)
def test_plain_data_come_back_as_they_were(value: Any) -> None:
    assert sent(value) == value
    assert kinds(sent(value)) == kinds(value)


@pytest.mark.parametrize("dtype", ["f8", ">f8", "f4", "f2", "i8", ">i2", "u1", "?", "c16"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0, 4)])
def test_arrays_of_numbers_come_back_as_they_were(dtype: str, shape: tuple[int, ...]) -> None:
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    (back,) = sent([array.T])
    assert (back.dtype, back.shape) == (array.dtype.newbyteorder("="), array.T.shape)
    assert (back == array.T).all()
    assert back.flags.writeable


def test_a_long_list_of_floats_travels_in_little_and_comes_back_bit_for_bit() -> None:
    values = [0.1 * place for place in range(1000)] + [float("inf"), -0.0]
    assert sent({"values": values}) == {"values": values}
    assert type(sent(values)[0]) is float
    assert len(json.dumps(pack(values))) < 11 * len(values)
    mixed = [*values, 1]
    assert sent(mixed) == mixed
    assert type(sent(mixed)[-1]) is int


def test_a_factory_and_a_bound_come_back_too() -> None:
    back = sent({"d": defaultdict(int, a=1), "q": deque([1, 2], maxlen=2)})
    back["d"]["b"] += 1
    back["q"].append(3)
    assert back == {"d": {"a": 1, "b": 1}, "q": deque([2, 3])}


def test_numpy_scalars_and_members_that_are_numbers_come_back_as_python_has_them() -> None:
    class Level(enum.IntEnum):
        HIGH = 2

    given_ = [np.float32(0.5), np.int64(3), np.bool_(True), np.str_("a"), Level.HIGH]
    assert sent(given_) == [0.5, 3, True, "a", 2]
    assert kinds(sent(given_)) == (list, None, [float, int, bool, str, int])


class Colour(enum.Enum):
    RED = 1


@pytest.mark.parametrize(
    ("value", "field"),
    [
        ({1, 2}, ""),
        ({"seen": [0, frozenset()]}, "['seen'][1]"),
        ({"a": {3: (b"x",)}}, "['a'][3][0]"),
        ({Colour.RED: 1}, " (a key)"),
        ({"a": {(1, Colour.RED): 1}}, "['a'] (a key)"),
        ([1j], "[0]"),
        ([defaultdict(lambda: 0)], "[0]"),
        ([np.array(["a"])], "[0]"),
        ([np.array([None])], "[0]"),
        ([np.ma.masked_array([1.0], [True])], "[0]"),
        ([np.datetime64("2026-01-01")], "[0]"),
        (object(), ""),
    ],
)
def test_what_is_no_plain_data_is_named(value: Any, field: str) -> None:
    with pytest.raises(NotPlainError) as raised:
        pack(value)
    assert raised.value.field == field


def test_a_dict_that_looks_like_what_stands_for_something_else_is_a_dict() -> None:
    value = {"__kind__": "tuple", "items": [1, {"__kind__": 3}]}
    assert sent(value) == value


@pytest.mark.parametrize(
    "packed",
    [
        {"__kind__": "os.system"},
        {"__kind__": ["tuple"]},
        {"__kind__": "tuple"},
        {"__kind__": "defaultdict", "of": "eval", "keys": [], "items": []},
        {"__kind__": "dict", "keys": [[]], "items": [1]},
        {"__kind__": "dict", "keys": [1, 2], "items": [1]},
        {"__kind__": "array", "type": "O", "shape": [1], "data": ""},
        {"__kind__": "array", "type": "<f8", "shape": [10**12], "data": ""},
        {"__kind__": "array", "type": "<f8", "shape": [1], "data": "not base64!"},
        {"__kind__": "deque", "items": [1], "most": -1},
    ],
)
def test_damaged_data_are_refused(packed: Any) -> None:
    with pytest.raises(ValueError, match="damaged data of kind"):
        unpack([packed])
