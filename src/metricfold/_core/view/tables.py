"""What a log shows: a table of values, of each dataset and of datasets together.

One rule says who prints a name that two would: what was recorded stays, then what a handler of the
user's has called so, and last come totals over datasets, which nobody has asked for by that name. What
is left out is said once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from operator import itemgetter
from typing import Literal, TypeAlias

from metricfold._core.fold.names import Key, printed

__all__ = ["Origin", "Rollup", "Table", "Warn", "check_rollup", "levels_of"]

Rollup: TypeAlias = bool | Literal["levels"]
"""Whether totals over all datasets are shown, and with ``"levels"`` those over some of them."""

Warn: TypeAlias = Callable[[str, str], None]
"""Says something once: takes what it is about, and the message."""


class Origin(IntEnum):
    """Where a value comes from; of two that print one name the smaller stays."""

    RECORDED = 0
    RESULT = 1
    """A handler without lanes has given it that name."""
    TOTAL = 2
    """It is of several datasets together, or derived from what is."""


_SAID = {
    Origin.RECORDED: "a metric",
    Origin.RESULT: "a result of a custom handler",
    Origin.TOTAL: "a total over datasets",
}


@dataclass(slots=True)
class Table:
    """The values of all metrics, by dataset and what is printed after the slash.

    What is of all datasets together stands where what was recorded without one does.

    Args:
        values: all of them.
        origins: of those that were not recorded.
    """

    values: dict[Key, float]
    origins: dict[Key, Origin] = field(default_factory=dict)

    def put(self, key: Key, value: float, origin: Origin, warn: Warn) -> None:
        """Add a value, unless what has that name already stays; `warn` says what is left out."""
        known = self.origins.get(key, Origin.RECORDED) if key in self.values else None
        if known is not None:
            _say(warn, printed(key), min(known, origin), max(known, origin))
        if known is None or origin < known:
            self.values[key] = value
            self.origins[key] = origin

    def groups(self) -> dict[str, dict[str, float]]:
        """Return the values of each dataset."""
        found: dict[str, dict[str, float]] = {}
        for (dataset, name), value in self.values.items():
            found.setdefault(dataset, {})[name] = value
        return found

    def printed(self, prefix: str, warn: Warn) -> dict[str, float]:
        """Return the values by what they print, dataset by dataset."""
        heads = {one: prefix + printed((one, "")) for one in {key[0] for key in self.values}}
        if self.origins:
            ordered = {key: self.values[key] for key in sorted(self.values, key=itemgetter(0))}
        else:
            ordered = self.values  # in the order of the keys
        values = {heads[dataset] + name: value for (dataset, name), value in ordered.items()}
        if len(values) < len(ordered):
            # Such as dataset 'a' with 'b/c', and dataset 'a/b' with 'c'.
            stays: dict[str, Key] = {}
            for key in ordered:
                text = printed(key)
                origin = self.origins.get(key, Origin.RECORDED)
                if text in stays:
                    known = self.origins.get(stays[text], Origin.RECORDED)
                    _say(warn, text, min(known, origin), max(known, origin))
                if text not in stays or origin < known:
                    stays[text] = key
            values.update((prefix + text, ordered[key]) for text, key in stays.items())
        return values


def _say(warn: Warn, key: str, stays: Origin, left_out: Origin) -> None:
    warn(
        f"printed {key}",
        f"{_SAID[stays]} and {_SAID[left_out]} would both print '{{prefix}}{key}': the first is "
        "shown and the other left out; give one of them another name",
    )


def levels_of(dataset: str) -> Iterator[str]:
    """Yield ``a`` and ``a/b`` for a dataset ``a/b/c``."""
    for place, character in enumerate(dataset):
        if character == "/" and place and dataset[place - 1] != "/":
            yield dataset[:place]


def check_rollup(rollup: object) -> None:
    """Refuse what says nothing about totals."""
    if not isinstance(rollup, bool) and rollup != "levels":
        raise ValueError(
            f"rollup={rollup!r}: use True for totals over all datasets, 'levels' for those over "
            "datasets whose names begin alike too, such as 'code/python' and 'code/rust', or False"
        )
