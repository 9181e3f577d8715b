"""Sinks for trackers that may refuse a key and take others: such a key costs only itself.

A tracker checks a batch of metrics as a whole: one name with a character that it does not like, and it
takes none. So what it refuses is offered again in halves, down to single keys, and what it refuses of
these is left out from then on, without asking, and counted.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

from metricfold.sinks.loud import mention
from metricfold.sinks.record import KeysRefused, Record, RecordRefused
from metricfold.sinks.selection import SelectiveSink
from metricfold.sinks.worker import THIS_RECORD

__all__ = ["KeywiseSink"]

_MOST_AT_HAND = 16


class KeywiseSink(SelectiveSink):
    """A sink that hands values by key to a tracker, from which nothing can be taken back.

    Args:
        select: see `SelectiveSink`.
        key_format: see `SelectiveSink`.
    """

    most: ClassVar[int] = 1 << 30
    """How many keys the tracker takes at once."""

    def __init__(
        self,
        *,
        select: str | Sequence[str] = "*",
        key_format: str | Callable[[str], str] = "{key}",
    ) -> None:
        super().__init__(select=select, key_format=key_format)
        # The keys that the tracker has taken, for records that may be offered again.
        self._taken: dict[tuple[int, float, str], set[str]] = {}
        self._refused: dict[str, BaseException] = {}  # keys, for good, and why
        self._newest: int | None = None  # step that was written

    def rewind(self, step: int) -> None:
        """Say in the log that the tracker cannot take back what it was given, if there is any."""
        if self._is_new() or (self._newest is not None and self._newest <= step):
            return
        mention(
            f"{self!r} cannot take back steps: what the tracker holds after step {step} is shown next "
            "to what comes now. JSONLSink, TensorBoardSink and WandbSink can, as far as their backends "
            "do"
        )

    def _is_new(self) -> bool:
        """Return whether it is known that the tracker holds nothing yet."""
        return False

    @abstractmethod
    def _log(self, record: Record, values: dict[str, Any]) -> None:
        """Hand some of the values of `record` to the tracker: all of them, or an error."""

    def _values(self, record: Record) -> Mapping[str, Any]:
        """Return what of a record the tracker takes, by key."""
        return record.metrics

    def _beside(self, record: Record) -> Iterable[Callable[[], object]]:
        """Return calls for what is no value by key; an error in one is said, and costs no more."""
        return ()

    def _attempt(self, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001 - the values have been written
            mention(f"{self!r} did not take what goes beside the values: {error!r}")

    def _is_refusal(self, error: BaseException) -> bool | None:
        """Return whether the tracker refuses a key or value, or has other trouble; None: who knows."""
        if isinstance(error, OSError):
            return False
        return True if isinstance(error, THIS_RECORD) else None

    def _write(self, record: Record) -> None:
        if not -(2**63) <= record.step < 2**63:
            raise RecordRefused(
                f"step {record.step} is beyond the 64 bits that trackers have for it"
            )
        name = record.step, record.wall_time, record.prefix
        taken = self._taken.setdefault(name, set())
        while len(self._taken) > _MOST_AT_HAND:
            del self._taken[next(iter(self._taken))]
        given = self._values(record)
        refused = {key: error for key, error in self._refused.items() if key in given}
        keys = [key for key in given if key not in refused and key not in taken]
        for start in range(0, len(keys), self.most):
            values = {key: given[key] for key in keys[start : start + self.most]}
            refused |= self._offer(record, values, taken)
        self._taken.pop(name, None)
        if taken:  # otherwise it may be the record that is refused, or the run
            self._refused |= {key: why for key, why in refused.items() if not _is_odd(given[key])}
        if given and not taken:
            error = next(iter(refused.values()))
            raise RecordRefused(f"all of its keys are refused, the first one by {error!r}")
        self._newest = max(record.step, record.step if self._newest is None else self._newest)
        for call in self._beside(record):
            self._attempt(call)
        if refused:
            raise KeysRefused(refused)

    def _offer(
        self, record: Record, values: dict[str, Any], taken: set[str]
    ) -> dict[str, BaseException]:
        """Log `values`, and return which of them the tracker refuses, and why."""
        try:
            self._log(record, values)
        except BaseException as error:
            verdict = self._is_refusal(error)
            if verdict is False:
                raise
            refused = self._each(record, values, taken)
            if verdict is None and not taken:
                raise
        else:
            refused = {}
            taken.update(values)
        return refused

    def _each(
        self, record: Record, values: dict[str, Any], taken: set[str]
    ) -> dict[str, BaseException]:
        """Log in halves, and halves of these, and return which keys the tracker refuses, and why."""
        refused: dict[str, BaseException] = {}
        parts = [*_halves([*values])]
        while parts:
            part = parts.pop(0)
            try:
                self._log(record, {key: values[key] for key in part})
            except BaseException as error:
                if self._is_refusal(error) is False:
                    raise  # what is left of the record is tried again later
                if len(part) > 1:
                    parts += _halves(part)
                else:
                    if part[0] not in refused:
                        parts.append(part)  # once more: the tracker may only just have come back
                    refused[part[0]] = error
            else:
                taken.update(part)
        return {key: error for key, error in refused.items() if key not in taken}


def _is_odd(value: object) -> bool:
    """Return whether a value, rather than its key, may be what is refused."""
    return isinstance(value, float) and not math.isfinite(value)


def _halves(keys: list[str]) -> list[list[str]]:
    middle = len(keys) // 2
    return [part for part in (keys[:middle], keys[middle:]) if part]
