"""What a peer or a file announces, checked before it is believed.

A rank's header and the entries of new keys say how much memory the others are about to take, and what
they will print; a checkpoint may come from anywhere. So sizes are bounded and every field is held to
what this version writes. What is refused is refused on all ranks alike, for all have received the same.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from metricfold._core.fold.kinds import Parts, kind_of_parts, parts_of
from metricfold._core.fold.names import ANYTHING, show
from metricfold._core.fold.sample import FloatArray
from metricfold._core.fold.state import OTHER
from metricfold._core.reduce.header import HEADER_SIZE, Field, Kind
from metricfold._core.reduce.schema import Entry
from metricfold._core.sketch.weights import LARGEST_COUNT
from metricfold.metric import check_key, is_name

__all__ = [
    "MOST_CUSTOM",
    "MOST_ERROR",
    "NotAnEntryError",
    "compressed",
    "decompressed",
    "entries_from",
    "entry_of_version_1",
    "malformed",
]

_MOST_TEXT = 2**26
"""Bytes of one rank's news as JSON: those of half a million keys."""
_MOST_NEWS = 2**24
"""Bytes of them as they travel."""
_MOST_PARTS = 2**22
"""Commas in them: what is parsed takes memory for each part, however short."""
_BLOCK = 2**20
MOST_ERROR = 2**14
"""Bytes of what a rank says of its failure."""
MOST_CUSTOM = 2**26
"""Bytes of one rank's results of handlers without lanes."""

_MOST_LANES = 2**16
"""SUM or MAX lanes of a key, without those of categories."""
_MOST_LANES_IN_ALL = 2**22
_MOST_CAPACITY = 2**24
"""Values of a DISTRIBUTION that a rank holds."""
_MOST_CAPACITY_IN_ALL = 2**27
_MOST_SUFFIXES = 2**12


class NotAnEntryError(ValueError):
    """Something is not how a key travels."""


# -- Headers -------------------------------------------------------------------------------------

_LOWEST, _HIGHEST = np.zeros(HEADER_SIZE), np.full(HEADER_SIZE, LARGEST_COUNT)
_LOWEST[Field.STEP] = -1.0
_LOWEST[Field.KIND], _HIGHEST[Field.KIND] = min(Kind), max(Kind)
_HIGHEST[Field.ROUTE] = 2.0  # the last RouteChoice
_HIGHEST[[Field.PENDING, Field.ERROR, Field.SINK_FAILED]] = 1.0
_HIGHEST[Field.BLOB_SIZE], _HIGHEST[Field.CUSTOM_SIZE] = _MOST_NEWS, MOST_CUSTOM
_WHOLE = np.ones(HEADER_SIZE, dtype=np.bool_)
_WHOLE[Field.SECONDS] = False


def malformed(headers: FloatArray) -> dict[int, str]:
    """Return which ranks sent what is no header of this version, each with what is wrong.

    Args:
        headers: everyone's, shape (world_size, HEADER_SIZE).
    """
    # What stands behind the fields is for later versions.
    given, used = headers[:, : len(Field)], slice(len(Field))
    fitting = (given >= _LOWEST[used]) & (given <= _HIGHEST[used])
    fitting &= ~_WHOLE[used] | (given == np.floor(given))
    found: dict[int, str] = {}
    if not fitting.all():
        for rank, place in np.argwhere(~fitting).tolist():
            name = Field(place).name.lower()
            found.setdefault(rank, f"its header has {given[rank, place]:g} as {name}")
    sizes, failed = headers[:, Field.BLOB_SIZE], headers[:, Field.ERROR] == 1.0
    odd = (sizes > 0) != (failed | (headers[:, Field.PENDING] == 1.0))
    odd |= failed & ((sizes > MOST_ERROR) | (headers[:, Field.PENDING] == 1.0))
    for rank in np.flatnonzero(odd).tolist():
        found.setdefault(rank, f"its header announces {sizes[rank]:g} bytes of neither kind")
    return found


# -- News ----------------------------------------------------------------------------------------


def compressed(text: str) -> bytes:
    """Return news as they travel.

    Raises:
        ValueError: they are more than other ranks take.
    """
    data = text.encode()
    blob = zlib.compress(data, level=1)
    if len(data) > _MOST_TEXT or len(blob) > _MOST_NEWS or data.count(b",") > _MOST_PARTS:
        raise ValueError(
            f"{len(data)} bytes about new keys and categories are too many for one reduction: reduce "
            "more often, or record fewer names"
        )
    return blob


def decompressed(blob: bytes) -> object:
    """Return the JSON that `compressed` made `blob` of.

    Raises:
        ValueError: it is none, or there is too much of it.
    """
    stream = zlib.decompressobj()
    blocks: list[bytes] = []
    size = parts = 0
    try:
        while not stream.eof:
            block = stream.decompress(stream.unconsumed_tail if blocks else blob, _BLOCK)
            if not block:
                break
            blocks.append(block)
            size, parts = size + len(block), parts + block.count(b",")
            if size > _MOST_TEXT or parts > _MOST_PARTS:
                raise ValueError(f"they are more than {_MOST_TEXT} bytes, or {_MOST_PARTS} parts")
    except zlib.error as error:
        raise ValueError(f"they cannot be decompressed: {error}") from None
    data = b"".join(blocks)
    if not stream.eof or stream.unused_data:
        raise ValueError("they break off, or something follows them")
    try:
        parsed: object = json.loads(data)
    except RecursionError:
        raise ValueError("they are nested too deeply") from None
    return parsed


# -- Entries -------------------------------------------------------------------------------------


def entries_from(plain: object, *, settled: bool) -> list[Entry]:
    """Return the entries of which `Entry.plain` gave `plain`.

    Args:
        plain: a list, as JSON has it.
        settled: whether they are those of a schema, which has a category for the others where there
            are more than are told apart; news may lack it.

    Raises:
        NotAnEntryError: one of them is none, a key is there twice, or they need too much room.
    """
    if type(plain) is not list:
        raise NotAnEntryError(f"a list of keys was expected, not {type(plain).__name__}")
    entries = [_entry(one) for one in plain]
    if len({entry.key for entry in entries}) < len(entries):
        raise NotAnEntryError("a key is there twice")
    if settled:
        for entry in entries:
            if entry.full and OTHER not in entry.categories:
                raise NotAnEntryError(f"{show(entry.key)} lacks the category {OTHER!r}")
    if sum(entry.sum_width + entry.maxs for entry in entries) > _MOST_LANES_IN_ALL:
        raise NotAnEntryError(f"the keys need more than {_MOST_LANES_IN_ALL} lanes")
    if sum(entry.capacity for entry in entries) > _MOST_CAPACITY_IN_ALL:
        raise NotAnEntryError(f"the keys need room for more than {_MOST_CAPACITY_IN_ALL} values")
    return entries


def entry_of_version_1(plain: dict[str, Any]) -> dict[str, Any]:
    """Return how an entry of a checkpoint of version 1 travels now."""
    new = {name: value for name, value in plain.items() if name not in _OF_VERSION_1}
    label, sums, maxs, distributed, bounded = (
        plain.get(name, usual) for name, usual in _OF_VERSION_1.items()
    )
    if "kind" in plain or not (type(sums) is type(maxs) is int and type(label) is str):
        raise NotAnEntryError("a key lacks its type or lanes, or says more than that version knows")
    if type(distributed) is not bool or type(bounded) is not bool or not (distributed or bounded):
        raise NotAnEntryError("a key says in no such words what values it keeps")
    sample = ("recent" if bounded else "all") if distributed else ""
    new["kind"] = kind_of_parts(Parts(label, sums, maxs, sample, bool(plain.get("most"))))
    return new


_OF_VERSION_1 = {"type": "", "sums": None, "maxs": None, "distributed": False, "bounded": True}


def _entry(plain: object) -> Entry:
    if type(plain) is not dict:
        raise NotAnEntryError(f"a key is {type(plain).__name__}, not an object of fields")
    if not plain.keys() >= _NEEDED:
        raise NotAnEntryError(f"a key lacks {', '.join(sorted(_NEEDED - plain.keys()))}")
    read: dict[str, Any] = {}
    for name, value in plain.items():
        reader = _READERS.get(name)
        if reader is None:
            raise NotAnEntryError(f"a key has a field {name!r:.40}, which is unknown here")
        try:
            read[name] = reader(value)
        except (TypeError, ValueError) as error:
            raise NotAnEntryError(f"a key has a bad {name}: {error}") from None
    entry = Entry(**read)
    why = _contradiction(entry)
    if why:
        raise NotAnEntryError(f"{show(entry.key)} {why}")
    return entry


def _contradiction(entry: Entry) -> str:
    """Return what about an entry cannot be, or nothing."""
    counts = parts_of(entry.kind).counts
    if entry.custom:
        lanes = entry.maxs or entry.per_rank or entry.distributed or counts or entry.latest
        return "has no SUM lanes, but others" if lanes or entry.categories or entry.full else ""
    if entry.sums < _FEWEST_LANES:
        return f"has {entry.sums} SUM lanes, fewer than any handler"
    if not counts and (entry.categories or entry.full or entry.most):
        return "has categories, and does not count them"
    if entry.distributed:
        return (
            "comes from devices, but is about recent values"
            if (entry.drained and entry.bounded)
            else ""
        )
    room = entry.capacity or entry.weighted or entry.condensed or entry.drained
    return "has room for values, but is no DISTRIBUTION" if room else ""


_FEWEST_LANES = 2  # the number of values, and of those that were NaN


def _key(value: object) -> tuple[str, str]:
    if type(value) is not list or len(value) != 2:
        raise ValueError("it is no pair of a dataset's and a metric's name")
    check_key(*value)
    return value[0], value[1]


def _name(value: object) -> str:
    if not is_name(value):
        raise ValueError("it is no name")
    assert isinstance(value, str)
    return value


def _kind(value: object) -> str:
    kind = _name(value)
    parts = parts_of(kind)
    if max(parts.sums, parts.maxs) > _MOST_LANES or not is_name(parts.label):
        raise ValueError(f"it has more than {_MOST_LANES} lanes, or no name")
    return kind


def _flag(value: object) -> bool:
    if type(value) is not bool:
        raise ValueError("it is neither true nor false")
    return value


def _whole(most: int) -> Callable[[object], int]:
    def number(value: object) -> int:
        if type(value) is not int or not 0 <= value <= most:
            raise ValueError(f"it is no whole number in 0..{most}")
        return value

    return number


def _suffixes(value: object) -> tuple[str, ...]:
    if type(value) is not list or not 0 < len(value) <= _MOST_SUFFIXES:
        raise ValueError(f"they are no list of 1 to {_MOST_SUFFIXES}")
    for suffix in value:
        if suffix not in ("", ANYTHING) and not (
            isinstance(suffix, str) and is_name(suffix.removesuffix(ANYTHING))
        ):
            raise ValueError("one of them cannot be printed")
    return tuple(value)


def _categories(value: object) -> tuple[str, ...]:
    if type(value) is not list or not all(map(is_name, value)):
        raise ValueError("they are no list of names")
    if len(set(value)) < len(value):
        raise ValueError("one of them is there twice")
    return tuple(value)


_READERS: dict[str, Callable[[object], Any]] = {
    "key": _key,
    "kind": _kind,
    "suffixes": _suffixes,
    "per_rank": _flag,
    "drained": _flag,
    "capacity": _whole(_MOST_CAPACITY),
    "weighted": _flag,
    "condensed": _flag,
    "categories": _categories,
    "most": _whole(2**63),
    "full": _flag,
}
_NEEDED = {name for name in Entry._fields if name not in Entry._field_defaults}
