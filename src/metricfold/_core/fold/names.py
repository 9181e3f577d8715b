"""Which printed names each key claims, so that no two metrics ever print the same one."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeAlias

from metricfold.metric import check_name

ANYTHING = "\x00"
"""Stands for any text in what a key claims; no name can hold it, since names are printable."""

Key: TypeAlias = tuple[str, str]
"""(dataset name, metric name); the dataset of a step's metric is empty."""


class Meaning(NamedTuple):
    """What a printed key stands for, which its text alone does not tell: names may hold ``_`` and ``/``.

    Args:
        dataset: empty: of a metric without one, or of all of them together.
        name: of the metric.
        statistic: what `Snapshot.value` calls it, such as ``"p50"`` or a category; empty if the metric
            is one number.
        aggregation: the type, such as ``"mean"``, or ``"derived"``; None where that is not known.
    """

    dataset: str
    name: str
    statistic: str = ""
    aggregation: str | None = None


_FORMS = ("_stat_{}", "_count_{}", "_{}")
"""How a statistic is printed behind the name of its metric."""


def suffixes_of(statistic: str) -> list[str]:
    """Return what a statistic may be printed as behind the name of its metric."""
    return [form.format(statistic) for form in _FORMS]


def statistic_of(suffix: str) -> str:
    """Return what `Snapshot.value` calls a statistic whose value is printed with `suffix`."""
    for form in _FORMS:
        beginning = form.format("")
        if suffix.startswith(beginning):
            return suffix.removeprefix(beginning).replace(ANYTHING, "")
    return suffix


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
    where the sum over datasets is printed, together with its namesakes in other datasets.
    """

    def __init__(self) -> None:
        self._claimed = Claimed()
        self._derived: list[str] = []
        # By what may be a metric's name in them; those that are not listed yet.
        self._printing: dict[str, str] = {}
        self._unlisted: list[str] = []

    def add(self, keys: Iterable[tuple[Key, Iterable[str]]]) -> None:
        """Claim the names of all `keys`, each with its suffixes; raises ValueError as `check`."""
        self.commit(self.check(keys))

    def check(self, keys: Iterable[tuple[Key, Iterable[str]]]) -> Claimed:
        """Return what `keys`, each with its suffixes, would claim; claims nothing.

        Raises:
            ValueError: one of the names is taken, by another key or by a derived metric.
        """
        claimed, proposed = self._claimed, Claimed(self._claimed.endings)
        for key, suffixes in keys:
            texts = {text + suffix: owner for text, owner in _printing(key) for suffix in suffixes}
            for suffix in suffixes:
                if suffix.endswith(ANYTHING):
                    claimed.expect(suffix[:-1])
                    proposed.expect(suffix[:-1])
            for text, owner in texts.items():
                if claimed.owners.get(text) != owner:  # else a namesake in another dataset has it
                    clash = claimed.clash(text, owner) or proposed.clash(text, owner)
                    if clash is not None:
                        taken, other = clash
                        theirs = claimed.speak_of(other) or proposed.speak_of(other)
                        raise ValueError(_clashing(key, owner, text, taken, other, theirs))
                    if self._derived:
                        self._refuse_derived(key, text)
            for text, owner in texts.items():
                proposed.enter(text, owner)
            if key[0]:
                proposed.datasets.setdefault(key[1], key[0])
        return proposed

    def commit(self, proposed: Claimed) -> None:
        """Take over what `check` found free."""
        for name, dataset in proposed.datasets.items():
            self._claimed.datasets.setdefault(name, dataset)
        known = self._claimed.owners
        for text, owner in proposed.owners.items():
            if text not in known:
                self._unlisted.append(text)
                self._claimed.enter(text, owner)

    def owner(self, key: Key, suffix: str) -> Key | None:
        """Return another key that has claimed what `key` would print with `suffix`, if one has."""
        clash = self._claimed.clash(printed(key) + suffix, key)
        return None if clash is None else clash[1]

    def owner_of(self, text: str) -> Key | None:
        """Return whose claim `text` is, after the prefix; a total's dataset is `ANYTHING`."""
        clash = self._claimed.clash(text, ("", ""))
        return None if clash is None else clash[1]

    def derive(self, name: str) -> None:
        """Claim `name`, in every dataset, for a derived metric."""
        place = bisect_left(self._derived, name)
        if self._derived[place : place + 1] == [name]:
            raise ValueError(f"a derived metric {name!r} is defined already")
        text = self._claim_on(name)
        if text is not None:
            raise ValueError(
                f"a derived metric cannot be called {name!r}: {show(self._claimed.owners[text])} "
                "prints that name"
            )
        self._derived.insert(place, name)

    def _refuse_derived(self, key: Key, text: str) -> None:
        for rest in _rests(text):
            name = rest.removesuffix(ANYTHING)
            place = bisect_left(self._derived, name)
            for derived in self._derived[place : place + 1]:
                if derived == name or (name != rest and derived.startswith(name)):
                    raise ValueError(
                        f"{show(key)} would print the name of the derived metric {derived!r}: give "
                        "one of them another name"
                    )

    def _claim_on(self, name: str) -> str | None:
        """Return a claim that `name` belongs to, in whichever dataset."""
        while self._unlisted:
            text = self._unlisted.pop()
            for rest in _rests(text):
                self._printing[rest] = text
        beginnings = (name[:length] + ANYTHING for length in range(len(name) + 1))
        found = map(self._printing.get, (name, *beginnings))
        return next((text for text in found if text is not None), None)


class Claimed:
    """Claimed names, and which of them begin alike: what one more costs does not grow with them.

    Two whole names clash if they are equal: one look-up. One that claims all that begins so ends in
    one of few *endings*, nearly always ``_count_``. So another can only begin with it where it
    holds such an ending, and is listed there.
    """

    def __init__(self, endings: Iterable[str] = ()) -> None:
        self.owners: dict[str, Key] = {}
        # The first that has a metric of each name.
        self.datasets: dict[str, str] = {}
        self.endings = list(endings)
        self._beginning: dict[str, list[str]] = {}

    def enter(self, text: str, owner: Key) -> None:
        """Let `text` belong to `owner`, unless it belongs to somebody."""
        if text not in self.owners:
            if self.endings:
                self._list(text, self.endings)
            self.owners[text] = owner

    def expect(self, ending: str) -> None:
        """List from now on what begins with anything that ends so."""
        if ending not in self.endings:
            self.endings.append(ending)
            for text in self.owners:
                self._list(text, (ending,))

    def clash(self, text: str, owner: Key) -> tuple[str, Key] | None:
        """Return a name of another owner that what `text` claims is part of, or has part in."""
        other = self.owners.get(text)
        if other is not None and other != owner:
            return text, other
        if not self.endings:
            return None
        longer = self._beginning.get(text[:-1], ()) if text.endswith(ANYTHING) else ()
        for taken in (*(start + ANYTHING for start in _starts(text, self.endings)), *longer):
            other = self.owners.get(taken)
            if other is not None and other != owner:
                return taken, other
        return None

    def speak_of(self, owner: Key) -> str:
        """Return how messages speak of who has claimed a name; of a total with one of its datasets."""
        dataset, name = owner
        if dataset == ANYTHING and name not in self.datasets:
            return ""
        return _spoken(owner, self.datasets.get(name, ""))

    def _list(self, text: str, endings: Iterable[str]) -> None:
        for start in _starts(text, endings):
            self._beginning.setdefault(start, []).append(text)


def _clashing(key: Key, owner: Key, text: str, taken: str, other: Key, theirs: str) -> str:
    """Return how to refuse what `key` would print, itself or as a total, where something else does."""
    mine = _spoken(owner, key[0])
    also = "" if taken == text else f" (as {_shown(taken)})"
    both = ", or a dataset to both" if "" in (key[0], other[0]) else ""
    return (
        f"{mine} would print {_shown(text)}, which {theirs} prints already{also}: give one of "
        f"them another name{both}"
    )


def _spoken(owner: Key, dataset: str) -> str:
    if owner[0] == ANYTHING:
        return f"the total over all datasets of {show((dataset, owner[1]))}"
    return show(owner) if owner[0] else f"{show(owner)} without a dataset"


def _printing(key: Key) -> tuple[tuple[str, Key], ...]:
    """Return what a key prints, and in whose name: its own, and that of the sum over its datasets."""
    dataset, name = key
    alone = (printed(key), key)
    return (alone, (f"/{name}", (ANYTHING, name))) if dataset else (alone,)


def _starts(text: str, endings: Iterable[str]) -> Iterator[str]:
    """Yield each beginning of `text` that ends in one of `endings`."""
    for ending in endings:
        place = text.find(ending)
        while place >= 0:
            yield text[: place + len(ending)]
            place = text.find(ending, place + 1)


def _rests(text: str) -> Iterator[str]:
    """Yield what may be a metric's name in `text`: a dataset may end at any of the slashes."""
    place = text.find("/")
    while place >= 0:
        yield text[place + 1 :]
        place = text.find("/", place + 1)


def _shown(text: str) -> str:
    return repr(text.lstrip("_").replace(ANYTHING, "*"))


def show(owner: Key) -> str:
    """Return how messages speak of a key."""
    dataset, name = owner
    if dataset == ANYTHING:
        return f"the total over all datasets of metric {name!r}"
    return f"metric {name!r} of dataset {dataset!r}" if dataset else f"metric {name!r}"
