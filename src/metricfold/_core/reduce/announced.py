"""The entries of new keys as they travel, checked before they are believed.

They say how much memory the others are about to take, and what they will print; a checkpoint may come
from anywhere. So their number is bounded, and every field is held to what this version writes.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from typing import Any

from metricfold._core.fold.axes import Axes, axes_of, described
from metricfold._core.fold.kinds import Parts, kind_of_parts, parts_of
from metricfold._core.fold.names import ANYTHING, show
from metricfold._core.fold.state import OTHER
from metricfold._core.reduce.header import MOST_NEWS
from metricfold._core.reduce.schema import Entry, Schema
from metricfold.metric import check_key, is_name

__all__ = [
    "NotAnEntryError",
    "check_room",
    "decoded",
    "encoded",
    "entries_from",
    "entry_of_version_1",
]

_MOST_TEXT = 2**26
"""Bytes of one rank's news as JSON: those of half a million keys."""
_MOST_PARTS = 2**22
"""Commas in them: what is parsed takes memory for each part, however short."""
_BLOCK = 2**20

_MOST_LANES = 2**16
"""SUM or MAX lanes of a key, without those of categories."""
_MOST_LANES_IN_ALL = 2**22
_MOST_CAPACITY = 2**24
"""Values of a DISTRIBUTION that a rank holds."""
_MOST_CAPACITY_IN_ALL = 2**27
_MOST_SUFFIXES = 2**12
_FEWEST_LANES = 2  # the number of values, and of those that were NaN


class NotAnEntryError(ValueError):
    """Something is not how a key travels."""


def encoded(entries: Sequence[Entry]) -> bytes:
    """Return entries as they travel; nothing if there are none.

    Raises:
        ValueError: they are more than other ranks take.
    """
    check_room(sum(map(_lanes_of, entries)))
    data = Schema.entries_to_json(entries).encode()
    blob = zlib.compress(data, level=1) if entries else b""
    if len(data) > _MOST_TEXT or len(blob) > MOST_NEWS or data.count(b",") > _MOST_PARTS:
        raise ValueError(
            f"{len(data)} bytes about new keys and categories are too many for one reduction: reduce "
            "more often, or record fewer names"
        )
    return blob


def decoded(blob: bytes) -> list[Entry]:
    """Return the entries of which `encoded` made `blob`.

    Raises:
        ValueError: they are none, or too many.
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
    if not stream.eof or stream.unused_data:
        raise ValueError("they break off, or something follows them")
    try:
        plain = json.loads(b"".join(blocks))
    except RecursionError:
        raise ValueError("they are nested too deeply") from None
    return entries_from(plain, settled=False)


def entries_from(plain: object, *, settled: bool) -> list[Entry]:
    """Return the entries of which `Schema.entries_to_json` gave `plain`.

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
    check_room(sum(map(_lanes_of, entries)))
    if sum(entry.capacity for entry in entries) > _MOST_CAPACITY_IN_ALL:
        raise NotAnEntryError(f"the keys need room for more than {_MOST_CAPACITY_IN_ALL} values")
    return entries


def check_room(lanes: int) -> None:
    """Raise if so many lanes of all keys are more than ranks, and checkpoints, take."""
    if lanes > _MOST_LANES_IN_ALL:
        raise NotAnEntryError(
            f"the keys need {lanes} lanes, more than {_MOST_LANES_IN_ALL}: declare fewer cells"
        )


def _lanes_of(entry: Entry) -> int:
    return entry.sum_width + entry.maxs * entry.cells


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
        if name not in _TYPES:
            raise NotAnEntryError(f"a key has a field {name!r:.40}, which is unknown here")
        try:
            read[name] = _read(name, value)
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
    if parts_of(entry.kind).axes != described(entry.axes):
        return "has other axes than its kind says"
    if entry.axes and (entry.custom or entry.distributed or counts or entry.latest):
        return "has axes, which no such kind may have"
    if entry.custom:
        lanes = entry.maxs or entry.per_rank or entry.distributed or counts or entry.latest
        return "has no SUM lanes, but others" if lanes or entry.categories or entry.full else ""
    if entry.sums < _FEWEST_LANES:
        return f"has {entry.sums} SUM lanes, fewer than any handler"
    if not counts and (entry.categories or entry.full or entry.most):
        return "has categories, and does not count them"
    if entry.distributed:
        clash = entry.drained and entry.bounded
        return "comes from devices, but is about recent values" if clash else ""
    room = entry.capacity or entry.weighted or entry.condensed or entry.drained
    return "has room for values, but is no DISTRIBUTION" if room else ""


_NEEDED = {"key", "kind"}
_TYPES: dict[str, type] = {"key": list, "kind": str} | {
    name: list if type(usual) is tuple else type(usual)
    for name, usual in Entry._field_defaults.items()
}
_HIGHEST = {"capacity": _MOST_CAPACITY, "most": 2**63}


def _read(name: str, value: Any) -> Any:
    """Return what a field of an entry says; raises ValueError if nothing that it may say."""
    given, wanted = type(value), _TYPES[name]
    if given is not wanted:
        raise ValueError(f"it is {given.__name__}, not {wanted.__name__}")
    match name:
        case "key":
            if len(value) != 2:
                raise ValueError("it is no pair of a dataset's and a metric's name")
            check_key(*value)
        case "kind":
            parts = parts_of(value)
            if max(parts.sums, parts.maxs) > _MOST_LANES or not is_name(parts.label):
                raise ValueError(f"it has more than {_MOST_LANES} lanes, or no name")
        case "suffixes":
            if not (0 < len(value) <= _MOST_SUFFIXES and all(map(_is_suffix, value))):
                raise ValueError(f"they are no list of 1 to {_MOST_SUFFIXES} that can be printed")
        case "axes":
            return _axes(value)
        case "categories":
            if not all(map(is_name, value)) or len(set(value)) < len(value):
                raise ValueError("they are no list of names, each of them once")
        case "capacity" | "most":
            if not 0 <= value <= _HIGHEST[name]:
                raise ValueError(f"it is no number in 0..{_HIGHEST[name]}")
    return tuple(value) if wanted is list else value


def _axes(plain: list[Any]) -> Axes:
    """Return the axes of which JSON has made lists; raises ValueError if they are none."""
    if not all(type(one) is list and len(one) == 3 and type(one[2]) is list for one in plain):
        raise ValueError("they are no list of axes")
    declared = {name: labels if size == 0 else size for name, size, labels in plain}
    axes = axes_of(declared)
    if [[*axis[:2], [*axis.labels]] for axis in axes] != plain or not all(a.length for a in axes):
        raise ValueError("they are not as axes are written")
    return axes


def _is_suffix(value: object) -> bool:
    if value in ("", ANYTHING):
        return True
    return isinstance(value, str) and is_name(value.removesuffix(ANYTHING))
