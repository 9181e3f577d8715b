"""What is measured: one `Metric` per value, tagged with where it came from and how it combines.

    Metric("alpaca", "tokens_seen", 512, AggregationType.SUM)
    Metric("alpaca", "loss", 2.31, AggregationType.MEAN, weight=512)

Metrics are made by the million in data-loading workers, so `Metric` is a named tuple: the cheapest
immutable record that Python has to create and to pickle.
"""

from __future__ import annotations

import re
import reprlib
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple, TypeAlias


class AggregationType(Enum):
    """How the values of one metric combine, over samples and over ranks.

    A member of your own `Enum`, or a string, is as good a type: register a handler for it with
    `MetricsAggregator.register_handler`.
    """

    SUM = "sum"
    """Total of the values."""
    MEAN = "mean"
    """Weighted mean, sum(w * x) / sum(w)."""
    MAX = "max"
    """Largest value."""
    MIN = "min"
    """Smallest value."""
    DISTRIBUTION = "distribution"
    """Mean, std, extrema and percentiles of the recent values, pooled over ranks."""
    CATEGORICAL_COUNT = "categorical_count"
    """How often each category occurred; categories are compared as text."""
    RATE = "rate"
    """Total of the values per second of wall time, by the slowest rank's clock."""
    LAST = "last"
    """The value recorded last, by the lowest rank that recorded one."""
    CUSTOM = "custom"
    """Yours: has no handler until you register one."""

    # Members are singletons, so identity is a valid hash; Enum's own is a slow Python function.
    __hash__ = object.__hash__


TypeLike: TypeAlias = AggregationType | Enum | str
"""What names an aggregation: a built-in type, a member of the user's own `Enum`, or a string."""

METRICS = "metrics"
"""Under this name a sample and a batch carry theirs."""
EMPTY = "__empty__"
"""Stands for a category out of data that is an empty text."""

_BUILT_IN = {member.value: member for member in AggregationType}


class Metric(NamedTuple):
    """One value of one sample (or step).

    Args:
        dataset_name: the dataset that the value belongs to; not empty.
        name: the metric's name; may hold ``/``.
        value: a number, or any one-element array; for CATEGORICAL_COUNT the category.
        agg_type: how values combine: an `AggregationType`, your own `Enum` member, or a string.
        weight: how much the value counts in MEAN and DISTRIBUTION, at least 0; other types take
            1 or 0. A metric of weight 0 contributes nothing, in any type: no value, name, NaN or
            category.

    >>> Metric("alpaca", "tokens_seen", 512, AggregationType.SUM).weight
    1.0
    """

    dataset_name: str
    name: str
    value: Any
    agg_type: TypeLike
    weight: Any = 1.0


@dataclass(slots=True)
class MetricState:
    """What a metric has accumulated, as an `AggregationHandler` sees it.

    Args:
        dataset_name: the dataset that the metric belongs to.
        metric_name: the metric's name.
        value: the result so far.
        agg_type: the metric's aggregation; decides which handler combines it over ranks.
        metadata: whatever else the handler needs to go on.
    """

    dataset_name: str
    metric_name: str
    value: Any
    agg_type: TypeLike
    metadata: dict[str, Any] = field(default_factory=dict)


def resolve_type(agg_type: object) -> TypeLike:
    """Return the aggregation that `agg_type` names: ``"mean"`` is ``AggregationType.MEAN``."""
    if isinstance(agg_type, str) and not isinstance(agg_type, Enum):
        if not agg_type:
            raise ValueError("the aggregation type is an empty string: name one, such as 'mean'")
        return _BUILT_IN.get(agg_type, agg_type)
    if isinstance(agg_type, Enum):
        return agg_type
    raise TypeError(
        f"{agg_type!r} is not an aggregation type: use an AggregationType such as "
        "AggregationType.MEAN, a member of your own Enum, or a string"
    )


def type_label(agg_type: TypeLike) -> str:
    """Return the text that stands for `agg_type` on the wire and in checkpoints.

    The program that runs is ``__main__``, whether as a script, by ``python -m``, under a profiler
    or in a process that `multiprocessing` spawned, where Python calls it ``__mp_main__``. The name
    that ``python -m`` knows it by is no substitute: a script has none.
    """
    if isinstance(agg_type, AggregationType):
        return str(agg_type.value)
    if isinstance(agg_type, Enum):
        kind = type(agg_type)
        module = "__main__" if kind.__module__ == "__mp_main__" else kind.__module__
        return f"{module}.{kind.__qualname__}.{agg_type.name}"
    return agg_type


# Control characters, what ends a line, what turns the order of the text around it, and halves of
# surrogate pairs, which no file can hold. By number, not by `str.isprintable` alone: that refuses
# U+3000 and what joins the parts of an emoji or of a Persian word, and each Python has other emoji.
_UNPRINTABLE = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def is_name(name: object) -> bool:
    r"""Return whether `name` can be printed as part of one key on one line.

    >>> is_name("損失 👩‍🔬"), is_name("a\nb"), is_name("")
    (True, False, False)
    """
    if not isinstance(name, str) or not name:
        return False
    return name.isprintable() or _UNPRINTABLE.search(name) is None


def escaped(name: str) -> str:
    r"""Return `name` with what cannot be printed spelled out.

    >>> print(escaped("a\nb"))
    a\nb
    >>> escaped("")
    '__empty__'
    """
    return _UNPRINTABLE.sub(lambda bad: ascii(bad[0])[1:-1], name) or EMPTY


def check_name(what: str, name: object) -> None:
    """Refuse a name that is none, and say why."""
    if is_name(name):
        return
    if not isinstance(name, str):
        raise TypeError(f"{what} must be a string, but is {name!r}")
    if not name:
        raise ValueError(f"{what} is empty: give it a name")
    raise ValueError(
        f"{what} {name!r} holds a line break or another unprintable character: give it a name on "
        "one line"
    )


def check_key(dataset_name: object, metric_name: object) -> None:
    """Refuse the names of a metric; one without a dataset has the dataset ``""``."""
    check_name(f"the name of a metric of dataset {dataset_name!r}", metric_name)
    if dataset_name != "":
        check_name(f"the dataset name of metric {metric_name!r}", dataset_name)


def quote(value: object) -> str:
    """Return how a message speaks of a value that may be anything, in a few words on one line."""
    kind, shape = type(value).__name__, getattr(value, "shape", ())
    if shape:
        return f"({kind} of shape {tuple(shape)})"
    return f"{' '.join(reprlib.repr(value).split())} ({kind})"
