"""What a logger hands to a sink, and what a sink is."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from decimal import Decimal
from numbers import Real
from typing import Any, Protocol, runtime_checkable

import numpy as np

from metricfold._core.device.arrays import unwrapped
from metricfold._core.fold import hints
from metricfold._core.fold.names import Meaning
from metricfold._core.sketch import Histogram
from metricfold.metric import check_name

__all__ = ["KeysRefused", "Meaning", "Record", "RecordRefused", "Sink", "checked_numbers"]


@dataclass(frozen=True, slots=True, eq=False)
class Record:
    """The metrics of one `MetricsLogger.log`.

    Args:
        step: the training step.
        wall_time: when `log` was called, in seconds since 1970 (Unix time).
        metrics: a number for each key, such as ``"train_alpaca/loss"``.
        histograms: a histogram for each DISTRIBUTION metric, such as ``"train_alpaca/seq_len"``.
        prefix: the ``prefix=`` of `log`, which tells where the dataset's name begins in a key that
            starts with it; empty if there was none.
        arrays: for each metric with axes ``"axes"``, a list of the name and the size, or the labels, of
            each axis, and ``"values"``, an array with a dimension for each axis, as `Snapshot.array`
            returns it. They are there if one of the sinks takes them.
        alerts: what was found in these metrics, each as JSON objects have it.
        run: in a process's first record, and in the first one after a `rewind`, what is known of the
            run, as a JSON object has it.
        keys: what keys stand for, of those that an aggregator or a snapshot has printed.

    A sink that does not know the last four may leave them.
    """

    step: int
    wall_time: float
    metrics: dict[str, float]
    histograms: dict[str, Histogram] = field(default_factory=dict)
    prefix: str = ""
    arrays: dict[str, dict[str, Any]] = field(default_factory=dict)
    alerts: list[dict[str, Any]] = field(default_factory=list)
    run: dict[str, Any] | None = None
    keys: dict[str, Meaning] = field(default_factory=dict)

    # The comparison that a dataclass has by itself fails on the arrays of a histogram.
    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Record):
            return NotImplemented
        apart = ("histograms", "arrays")
        plain = [part.name for part in fields(Record) if part.name not in apart]
        return (
            all(getattr(self, name) == getattr(other, name) for name in plain)
            and self.arrays.keys() == other.arrays.keys()
            and all(_same_cells(one, other.arrays[key]) for key, one in self.arrays.items())
            and self.histograms.keys() == other.histograms.keys()
            and all(_same(one, other.histograms[key]) for key, one in self.histograms.items())
        )

    __hash__ = None  # type: ignore[assignment]  # what it holds can be altered


class RecordRefused(ValueError):  # noqa: N818 - it says what becomes of the record
    """A sink's word that it will never take this record, although it takes others.

    The record is skipped and counted. Any `ValueError`, `TypeError`, `ArithmeticError`,
    `LookupError` or `AttributeError` says so, too.
    """


class KeysRefused(RecordRefused):
    """A sink's word that it has taken a record but for some of its keys, which are counted.

    Args:
        refused: why, for each key that is left out.
    """

    def __init__(self, refused: Mapping[str, BaseException]) -> None:
        self.refused = dict(refused)
        super().__init__(f"left out are {', '.join(map(repr, self.refused))}")


@runtime_checkable
class Sink(Protocol):
    """Anything with these four methods; subclass `SelectiveSink` for ``select=`` and ``key_format=``.

    All four are called from one thread, which belongs to this sink alone. What `write` raises says
    what becomes of the record: by an `OSError` it is held and offered again, by a `RecordRefused`
    or another error of values it is skipped (by a `KeysRefused` but some of its keys), and by any other error held until the next record
    shows whether it was at fault. So one that fails should leave nothing half-written. Every rank
    makes the same sinks and rank 0 alone writes: open files in `write`, not in ``__init__``. One whose
    attribute ``arrays`` is False does not take `Record.arrays`, which are left out where none does.
    """

    def write(self, record: Record) -> None:
        """Take in one record; it is shared with the other sinks and must not be altered."""

    def flush(self) -> None:
        """Bring what was written to where it survives the process."""

    def close(self) -> None:
        """Flush, and let go of files and connections; called once, also when nothing was written."""

    def rewind(self, step: int) -> None:
        """Take back what was written for the steps after `step`: training goes on from there."""


def _same(one: Histogram, other: Histogram) -> bool:
    return all(
        np.array_equal(getattr(one, part.name), getattr(other, part.name))
        for part in fields(Histogram)
    )


def _same_cells(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    values = np.asarray(one["values"]), np.asarray(other["values"])
    return one["axes"] == other["axes"] and np.array_equal(*values, equal_nan=True)


def checked_numbers(what: str, values: Mapping[str, float]) -> dict[str, float]:
    """Return a copy of `values` as floats; an error says what is none."""
    if not isinstance(values, Mapping):
        raise TypeError(f"{what} must be a dict of numbers, but is {values!r}")
    numbers_by_key: dict[str, float] = {}
    for key, given in values.items():
        check_name(f"a key of {what}", key)
        value = unwrapped(given)
        # The exact types first: asking an abstract class is slow.
        number = value if type(value) in (float, int) else _host_number(value)
        if number is None:
            raise TypeError(
                f"{what}[{key!r}] is {reprlib.repr(value)} of type {type(value).__name__}, which is "
                f"not a number: {hints.for_number(key, value)}"
            )
        try:
            numbers_by_key[key] = float(number)
        except OverflowError:
            raise ValueError(f"{what}[{key!r}] is too large for a float") from None
    return numbers_by_key


def _host_number(value: object) -> Real | Decimal | None:
    """Return `value` if it is a number, or an array without axes that holds one on the host.

    That is what `jax.device_get` and NumPy's own reductions return. A masked one holds none.
    """
    if isinstance(value, np.timedelta64) or np.ma.is_masked(value):
        return None
    if isinstance(value, np.generic | np.ndarray) and value.ndim == 0:
        value = value.item()
    return value if isinstance(value, Real | Decimal) else None
