"""What a log shows: a table of values, of each dataset and of datasets together.

One rule says who prints a name that two would: what was recorded stays, then what a handler of the
user's has called so, and last come totals over datasets, which nobody has asked for by that name. What
is left out is said once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Literal, TypeAlias

from metricfold._core.fold.names import Key, printed
from metricfold._core.fold.sample import FloatArray

__all__ = ["Origin", "Rollup", "Table", "Warn", "check_rollup", "levels_of"]

Rollup: TypeAlias = bool | Literal["levels"]
"""Whether totals over all datasets are shown, and with ``"levels"`` those over some of them."""

Warn: TypeAlias = Callable[[str, str], None]
"""Says something once: takes what it is about, and the message."""


class Origin(IntEnum):
    """Where a value comes from; of two that print one name the smaller stays."""

    RECORDED = 0
    RESULT = 1  # a handler without lanes has given it that name
    TOTAL = 2  # it is of several datasets together, or derived from what is


_SAID = {
    Origin.RECORDED: "a metric",
    Origin.RESULT: "a result of a custom handler",
    Origin.TOTAL: "a total over datasets",
}


@dataclass(slots=True)
class Table:
    """The values of all metrics, by what is printed after the prefix.

    What is of all datasets together stands where what was recorded without one does.
    """

    values: dict[str, float]  # all of them, such as of `_alpaca/loss`
    keys: Mapping[str, Key]  # the dataset and the name of many
    added: dict[str, Key] = field(default_factory=dict)  # the same of the others
    origins: dict[str, Origin] = field(default_factory=dict)  # of those that were not recorded
    arrays: Mapping[Key, FloatArray | None] = field(default_factory=dict)  # of those with axes

    def put(self, key: Key, value: float, origin: Origin, warn: Warn) -> None:
        """Add a value, unless what prints that text already stays; `warn` says what is left out."""
        text = printed(key)
        known = self.origins.get(text, Origin.RECORDED) if text in self.values else None
        if known is not None:
            stays, left_out = min(known, origin), max(known, origin)
            warn(
                f"printed {text}",
                f"{_SAID[stays]} and {_SAID[left_out]} would both print '{{prefix}}{text}': the first "
                "is shown and the other left out; give one of them another name",
            )
        if known is None or origin < known:
            self.values[text] = value
            self.added[text] = key
            self.origins[text] = origin

    def groups(self) -> dict[str, dict[str, float]]:
        """Return the values of each dataset."""
        found: dict[str, dict[str, float]] = {}
        for text, value in self.values.items():
            dataset, name = self.added.get(text) or self.keys[text]
            found.setdefault(dataset, {})[name] = value
        return found

    def inputs(self) -> dict[str, dict[str, Any]]:
        """Return the same for functions of them: of a metric with axes its cells, if they are known."""
        found: dict[str, dict[str, Any]] = {**self.groups()}
        for (dataset, name), values in self.arrays.items():
            if values is None:
                found[dataset].pop(name, None)
            else:
                found[dataset][name] = values
        return found


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
