"""What rules find in a merged result, the same on every rank."""

from __future__ import annotations

import json
import math
import operator
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

__all__ = ["Alert", "Alerts", "Severity", "check_severity"]

Severity: TypeAlias = Literal["warning", "severe"]


def check_severity(what: str, severity: object) -> None:
    """Raise ValueError if it is none."""
    if severity not in ("warning", "severe"):
        raise ValueError(f"{what}={severity!r}: use 'warning' or 'severe'")


@dataclass(frozen=True, slots=True)
class Alert:
    """What a rule has found in one reduction.

    Args:
        message: what is wrong, in a sentence.
        severity: ``"warning"``, or ``"severe"`` for what training should not go on with.
        dataset: of the metric; None: of one without a dataset, or of none.
        name: of the metric, if it is about one.
        value: what was found.
        rank: the rank that it came from, if that is known.
        rule: which rule found it; filled in by who runs the rule, as is `step`.
        step: of the log that it was found in; None where that is not known.

    Raises:
        ValueError: an unknown severity.
        TypeError: a message or a name is no text, the value no number, or the rank no whole one.
    """

    message: str
    severity: Severity = "warning"
    dataset: str | None = None
    name: str | None = None
    value: float | None = None
    rank: int | None = None
    rule: str = ""
    step: int | None = None

    def __post_init__(self) -> None:
        check_severity("severity", self.severity)
        for name in ("message", "dataset", "name"):
            text = getattr(self, name)
            if not isinstance(text, str) and (text is not None or name == "message"):
                raise TypeError(f"{name}={text!r} of an alert: give a text")
        # Arrays and their scalars too, as rules compute them; files hold plain numbers.
        if self.value is not None:
            object.__setattr__(self, "value", float(self.value))
        if self.rank is not None:
            object.__setattr__(self, "rank", operator.index(self.rank))

    def to_json(self) -> dict[str, Any]:
        """Return it as a JSON object has it: without what is None, and NaN and infinity as text."""
        parts = {name: part for name, part in asdict(self).items() if part is not None}
        if self.value is not None and not math.isfinite(self.value):
            parts["value"] = json.dumps(self.value)
        return parts


class Alerts(tuple[Alert, ...]):
    """What all rules have found in one reduction, the same on every rank; empty if nothing.

    >>> alerts = Alerts([Alert("loss is nan", "severe", rank=3), Alert("slow")])
    >>> [alert.rank for alert in alerts.severe]
    [3]
    >>> bool(Alerts().severe)
    False
    """

    __slots__ = ()

    @property
    def severe(self) -> Alerts:
        """Those that training should not go on with."""
        return Alerts(alert for alert in self if alert.severity == "severe")
