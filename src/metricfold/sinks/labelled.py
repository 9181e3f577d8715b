"""Metrics as Prometheus and OpenTelemetry have them: a name, and labels for what it is of.

    train_code/loss                -> loss {prefix: train, dataset: code}
    train_code/len_stat_p50        -> len {prefix: train, dataset: code, statistic: p50}

Names hold letters, digits and ``_`` there. Two that would become one are told apart by nothing, so the
second is refused.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from metricfold.sinks.record import Meaning, Record

__all__ = ["Labelled", "Series"]

_OWN = {"step": "step of the last log", "time_seconds": "time of the last log"}
_LONGEST = 200  # OpenTelemetry has room for 255 characters


class Series(NamedTuple):
    """A value, and what it is called."""

    key: str
    name: str
    labels: dict[str, str]  # those that are there
    value: float


class Labelled:
    """Names what records hold, and knows which names are taken."""

    def __init__(self) -> None:
        self._taken = dict(_OWN)  # by name here, what it stands for
        self._keys: dict[tuple[Any, ...], str] = {}  # by name and labels

    def of(self, record: Record) -> tuple[list[Series], dict[str, BaseException]]:
        """Return the series of a record, and why keys are not among them."""
        refused: dict[str, BaseException] = {}
        prefix = {"prefix": record.prefix} if record.prefix else {}
        series = [
            Series("", "step", prefix, record.step),
            Series("", "time_seconds", prefix, record.wall_time),
        ]
        for key, value in record.metrics.items():
            plain = Meaning("", key.removeprefix(f"{record.prefix}/"))
            dataset, metric, statistic, _ = record.keys.get(key, plain)
            name = re.sub(r"[^A-Za-z0-9_]", "_", metric)
            of = {**prefix, "dataset": dataset, "statistic": statistic}
            labels = {label: text for label, text in of.items() if text}
            other = self._taken.setdefault(name, metric)
            owner = self._keys.setdefault((name, *labels.items()), key)
            if len(name) > _LONGEST:
                refused[key] = ValueError(f"its name has more than {_LONGEST} characters")
            elif other != metric or owner != key:
                text = f"its name becomes {name!r}, which stands for {other!r} already: give it another"
                refused[key] = ValueError(text)
            else:
                series.append(Series(key, name, labels, value))
        return series, refused
