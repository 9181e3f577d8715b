"""Which printed names each key claims, so that no two metrics ever print the same one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import TypeAlias

from metricfold.metric import check_name

__all__ = ["ANYTHING", "Claims", "Key", "check_prefix", "printed", "repeated", "show"]

ANYTHING = "\x00"
"""Stands for any text in what a key claims; no name can hold it, since names are printable."""

Key: TypeAlias = tuple[str, str]
"""(dataset name, metric name); the dataset of a step's metric is empty."""


def printed(key: Key) -> str:
    """Return what follows the prefix when `key` is logged: ``_alpaca/loss``, or ``/loss``."""
    dataset, name = key
    return f"_{dataset}/{name}" if dataset else f"/{name}"


def check_prefix(prefix: object) -> None:
    """Refuse a prefix that is no name, or that brings along the slash that is printed anyway."""
    check_name("the prefix", prefix)
    assert isinstance(prefix, str)
    if prefix.endswith("/"):
        bare = prefix.rstrip("/") or "train"
        raise ValueError(
            f"prefix={prefix!r} would print '{prefix}/loss', for a slash follows the prefix anyway: "
            f"write prefix={bare!r}"
        )


def repeated(prefix: str, names: Iterable[str]) -> str:
    """Return what to say of the first of `names` that begins with the prefix; nothing if none does."""
    start = f"{prefix}/"
    for name in names:
        if name.startswith(start):
            return (
                f"the metric {name!r} is printed as '{prefix}/{name}', because it is logged with "
                f"prefix={prefix!r}: name it {name[len(start) :] or 'loss'!r}, and the prefix is put "
                "in front"
            )
    return ""


class Claims:
    """The names in use, each with the key that it belongs to.

    A key claims its name with every suffix that its handler may append; a suffix that ends in
    `ANYTHING` claims all names that begin so. A key with a dataset also claims the name without it,
    where the sum over datasets is printed.
    """

    def __init__(
        self,
        exact: Mapping[str, Key] = MappingProxyType({}),
        beginnings: Mapping[str, Key] = MappingProxyType({}),
        derived: Iterable[str] = (),
    ) -> None:
        self._exact = dict(exact)
        self._open = dict(beginnings)
        self._derived = set(derived)

    def copy(self) -> Claims:
        """Return claims that change on their own."""
        return Claims(self._exact, self._open, self._derived)

    def add(self, key: Key, suffixes: Iterable[str]) -> None:
        """Claim the names of `key`; raises ValueError, and claims none, if one is taken."""
        dataset, name = key
        owners = [key, (ANYTHING, name)] if dataset else [key]
        texts = [(owner, suffix) for owner in owners for suffix in suffixes]
        for owner, suffix in texts:
            self._check(key, owner, _text(owner, suffix))
            self._check_derived(key, _text(owner, suffix))
        for owner, suffix in texts:
            text = _text(owner, suffix)
            if text.endswith(ANYTHING):
                self._open[text[:-1]] = owner
            else:
                self._exact[text] = owner

    def derive(self, name: str) -> None:
        """Claim `name`, in every dataset, for a derived metric."""
        if name in self._derived:
            raise ValueError(f"a derived metric {name!r} is defined already")
        beginnings = ((text + ANYTHING, owner) for text, owner in self._open.items())
        for text, owner in (*self._exact.items(), *beginnings):
            if _may_print(text, name):
                raise ValueError(
                    f"a derived metric cannot be called {name!r}: {show(owner)} prints that name"
                )
        self._derived.add(name)

    def _check(self, key: Key, owner: Key, text: str) -> None:
        for taken, other in self._clashes(text):
            if other != owner:
                raise ValueError(
                    f"{show(key)} would print {_shown(text)}, which {show(other)} claims already "
                    f"(as {_shown(taken)}): give one of them another name"
                )

    def _check_derived(self, key: Key, text: str) -> None:
        for name in self._derived:
            if _may_print(text, name):
                raise ValueError(
                    f"{show(key)} would print the name of the derived metric {name!r}: give one "
                    "of them another name"
                )

    def _clashes(self, text: str) -> Iterator[tuple[str, Key]]:
        if text.endswith(ANYTHING):
            start = text[:-1]
            for taken, other in self._exact.items():
                if taken.startswith(start):
                    yield taken, other
            for taken, other in self._open.items():
                if taken.startswith(start) or start.startswith(taken):
                    yield taken + ANYTHING, other
            return
        if text in self._exact:
            yield text, self._exact[text]
        for taken, other in self._open.items():
            if text.startswith(taken):
                yield taken + ANYTHING, other


def _text(owner: Key, suffix: str) -> str:
    dataset, name = owner
    return printed(("" if dataset == ANYTHING else dataset, name)) + suffix


def _shown(text: str) -> str:
    return repr(text.lstrip("_").replace(ANYTHING, "*"))


def _may_print(text: str, derived: str) -> bool:
    """Return whether `derived`, in whichever dataset, may print what `text` claims."""
    # A dataset may end at any of the slashes.
    names = (text[place + 1 :] for place, character in enumerate(text) if character == "/")
    return any(
        derived.startswith(name[:-1]) if name.endswith(ANYTHING) else derived == name
        for name in names
    )


def show(owner: Key) -> str:
    """Return how messages speak of a key."""
    dataset, name = owner
    if dataset == ANYTHING:
        return f"metric {name!r}, over all its datasets,"
    return f"metric {name!r} of dataset {dataset!r}" if dataset else f"metric {name!r}"
