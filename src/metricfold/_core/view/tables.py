"""What a log shows: a table with a group of values for each dataset, and for datasets together.

One rule says who prints a name that two would: what was recorded stays, then what a handler of the
user's has called so, and last come totals over datasets, which nobody has asked for by that name. What
is left out is said once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Literal, TypeAlias

from metricfold._core.fold.names import printed

__all__ = ["Group", "Origin", "Rollup", "Table", "Warn", "check_rollup", "levels_of", "named"]

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
class Group:
    """The values of one dataset, or of several together.

    Args:
        values: by what is printed after the slash.
        origins: of those that were not recorded.
    """

    values: dict[str, float] = field(default_factory=dict)
    origins: dict[str, Origin] = field(default_factory=dict)

    def origin(self, name: str) -> Origin:
        return self.origins.get(name, Origin.RECORDED)

    @property
    def has_totals(self) -> bool:
        return Origin.TOTAL in self.origins.values()

    def put(self, name: str, value: float, origin: Origin, warn: Warn, dataset: str) -> None:
        """Add a value, unless what has that name already stays.

        Args:
            name: what is printed after the slash.
            value: of it.
            origin: where it comes from.
            warn: says what is left out.
            dataset: the group's.
        """
        known = self.origin(name) if name in self.values else None
        if known is not None:
            _say(warn, printed((dataset, name)), min(known, origin), max(known, origin))
        if known is None or origin < known:
            self.values[name] = value
            self.origins[name] = origin


Table: TypeAlias = dict[str, Group]
"""Groups by dataset. That of all datasets, and of what was recorded without one, is the empty text's."""


def named(table: Table, prefix: str, warn: Warn) -> dict[str, float]:
    """Return the values by what they print, dataset by dataset."""
    heads = {dataset: printed((dataset, "")) for dataset in sorted(table)}
    values = {
        prefix + head + name: value
        for dataset, head in heads.items()
        for name, value in table[dataset].values.items()
    }
    if len(values) < sum(len(group.values) for group in table.values()):
        # Such as dataset 'a' with 'b/c', and dataset 'a/b' with 'c'.
        stays: dict[str, tuple[Origin, float]] = {}
        for dataset, head in heads.items():
            for name, value in table[dataset].values.items():
                origin = table[dataset].origin(name)
                known = stays.get(head + name)
                if known is not None:
                    _say(warn, head + name, min(known[0], origin), max(known[0], origin))
                if known is None or origin < known[0]:
                    stays[head + name] = (origin, value)
        values.update((prefix + key, value) for key, (_, value) in stays.items())
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
