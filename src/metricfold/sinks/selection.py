"""Which keys a sink takes, and what it calls them: ``select=`` and ``key_format=`` for all backends."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from importlib.util import find_spec
from operator import itemgetter
from typing import Any, TypeVar

from metricfold.metric import check_name
from metricfold.sinks.early import said_unmatched
from metricfold.sinks.record import KeysRefused, Record

__all__ = ["SelectiveSink"]

_Value = TypeVar("_Value")


class SelectiveSink(ABC):
    """A sink that takes some of the keys, under names of its choice.

    Args:
        select: a glob, or several of which one must match, over whole keys: ``"*/loss"``,
            ``["train_*", "val_*"]``. Upper and lower case differ, and ``*`` matches ``/`` too. Keys
            come in the order of the globs. One that begins with ``!`` leaves out what it matches:
            ``["*/loss*", "!val*"]``, or ``"!*/len_stat_*"`` for all but those.
        key_format: what a key is called in this backend: a format string that holds ``{key}``, such
            as ``"run7/{key}"``, or a function from key to key.

    A record of which no key is selected is written only if it has alerts, which no glob leaves out.

    Attributes:
        arrays: whether it takes `Record.arrays`; one that does not gets none.
    """

    arrays = True

    def __init__(
        self,
        *,
        select: str | Sequence[str] = "*",
        key_format: str | Callable[[str], str] = "{key}",
    ) -> None:
        globs = (select,) if isinstance(select, str) else tuple(select)
        if not globs or not all(isinstance(one, str) and one.strip("!") for one in globs):
            raise ValueError(
                f"select={select!r} names no key: use a glob such as '*/loss', or several of them"
            )
        self._left_out = tuple(one[1:] for one in globs if one.startswith("!"))
        self._patterns = tuple(one for one in globs if not one.startswith("!")) or ("*",)
        self._globs = globs
        # How many records had no key for us; None once one has, or a mistake has been said.
        self._unmatched: int | None = 0
        self._run: dict[str, Any] | None = None
        self._format = key_format if callable(key_format) else _formatter(key_format)
        # key -> its name here and the place of the pattern that selects it, or None: not selected
        self._names: dict[str, tuple[str, int] | None] = {}

    def write(self, record: Record) -> None:
        """Write what is selected of `record`.

        Raises:
            ValueError: a key, its name here or the prefix cannot be printed.
        """
        if record.prefix:
            check_name("the prefix of a record", record.prefix)
        if record.arrays and not self.arrays:
            record = replace(record, arrays={})
        if record.run is not None:
            self._run = record.run
        given = {name: getattr(record, name) for name in ("metrics", "histograms", "arrays")}
        chosen: dict[str, Any] = {name: self._renamed(values) for name, values in given.items()}
        found = any(chosen.values())
        if self._unmatched is not None and any(given.values()):
            keys = {key for values in given.values() for key in values}
            self._unmatched += 1
            if found or said_unmatched(self, self._globs, keys, self._unmatched):
                self._unmatched = None
        if found or record.alerts:
            # What is known of the run goes with the first record that is written.
            said = self._renamed(record.keys)
            try:
                self._write(replace(record, keys=said, run=self._run, **chosen))
            except KeysRefused:  # the rest of it has been written
                self._run = None
                raise
            self._run = None

    def parts(self) -> Sequence[SelectiveSink]:
        """Return the sinks that this one stands for, each of which gets a thread of its own.

        Called once, in the thread of the first log.
        """
        return (self,)

    @abstractmethod
    def _write(self, record: Record) -> None:
        """Write `record`, which holds selected keys under their names in this backend."""

    def flush(self) -> None:  # noqa: B027 - most need no more than that
        """Bring what was written to where it survives the process; nothing if `_write` has done so."""

    @abstractmethod
    def close(self) -> None:
        """Flush, and let go of files and connections."""

    @abstractmethod
    def rewind(self, step: int) -> None:
        """Take back what was written for the steps after `step`."""

    def _renamed(self, values: Mapping[str, _Value]) -> dict[str, _Value]:
        """Return what is selected, in the order of the patterns that select it."""
        for key in values:
            if key not in self._names:
                self._names[key] = self._name(key)
        found = [(key, *named) for key in values if (named := self._names[key]) is not None]
        found.sort(key=itemgetter(2))
        renamed = {name: values[key] for key, name, _ in found}
        if len(renamed) < len(found):
            names = [name for _, name, _ in found]
            twice = next(name for name in names if names.count(name) > 1)
            clash = sorted(key for key, name, _ in found if name == twice)
            raise ValueError(
                f"key_format makes {twice!r} of each of {clash}: choose one that keeps keys apart"
            )
        return renamed

    def _name(self, key: str) -> tuple[str, int] | None:
        place = next((i for i, p in enumerate(self._patterns) if fnmatchcase(key, p)), None)
        if place is None or any(fnmatchcase(key, one) for one in self._left_out):
            return None
        name = self._format(key)
        check_name(f"what key_format makes of {key!r}", name)
        return name, place


def _formatter(key_format: str) -> Callable[[str], str]:
    try:
        probes = key_format.format(key="a"), key_format.format(key="b")
    except (AttributeError, IndexError, KeyError, ValueError) as error:
        raise ValueError(
            f"key_format={key_format!r} is not a format of {{key}} alone: "
            f"use one such as 'run7/{{key}}', or a function from key to key"
        ) from error
    if probes[0] == probes[1]:
        raise ValueError(
            f"key_format={key_format!r} makes the same name of every key: it must hold {{key}}"
        )
    return partial(_formatted, key_format)  # which can be pickled


def _formatted(key_format: str, key: str) -> str:
    return key_format.format(key=key)


def check_one(sink: str, argument: str, given: object, others: Iterable[str], maker: str) -> None:
    """Raise a `TypeError` where what is made already is `given`, and arguments to make it as well."""
    if given is not None and (names := ", ".join(f"{name}=" for name in others)):
        raise TypeError(
            f"{sink} got {argument}= and {names}: those are for {maker}, which has made yours already; "
            "leave out one or the other"
        )


def require(package: str, *, sink: str, extra: str) -> None:
    """Raise an `ImportError` that says what to install, without importing `package`."""
    if find_spec(package) is None:
        raise ImportError(
            f"{sink} needs the package {package!r}, which is not installed: "
            f"pip install 'metricfold[{extra}]'"
        )
