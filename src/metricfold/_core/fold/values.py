"""What a user may give as a value or a weight, and what number or text it is."""

from __future__ import annotations

import contextlib
from enum import Enum
from typing import Any

import numpy as np

from metricfold.metric import quote

__all__ = ["category_of", "number_of"]


def number_of(value: Any) -> float:
    """Return the number that `value` is, or that is all it holds.

    Raises:
        TypeError: it is no number.
    """
    if type(value) is float:
        return value
    # A text may spell a number, and NumPy's masked value is NaN with a warning.
    if value is not np.ma.masked and not isinstance(value, str | bytes | bytearray):
        item = getattr(value, "item", None)
        with contextlib.suppress(Exception):  # a framework's own may be of any kind
            return float(value if item is None else item())
    raise TypeError(f"{quote(value)} is no number")


def category_of(value: Any) -> str:
    """Return the text that `value` counts under.

    Raises:
        TypeError: it is no category.
    """
    if not isinstance(value, str | int | float | Enum):
        raise TypeError(
            f"the value {quote(value)} is no category: give a text, a number, an Enum member, or "
            "an array of one element"
        )
    return str(value)
