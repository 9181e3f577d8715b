"""What a user may give as a value or a weight: one place for `record`, `update` and `record_all`.

What is refused names the metric, and says what to give instead.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, NoReturn, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from metricfold._core.device import arrays
from metricfold._core.fold import hints
from metricfold._core.fold.names import Key, show
from metricfold._core.fold.sample import FloatArray
from metricfold._core.runtime.imported import is_of
from metricfold.metric import AggregationType, TypeLike, quote, type_label

T = TypeVar("T")
Numbers: TypeAlias = "Sequence[Any] | npt.NDArray[Any]"

NUMBERS = {int, float, bool}
"""Types of what needs no look at all."""

_LARGEST_INT = 2**53
"""Up to here a float64 holds every integer."""


# -- Of anyone: a handler's states may hold anything ----------------------------------------------


def number_of(value: Any) -> float:
    """Return the number that `value` is, or that is all it holds; raises TypeError if it is none."""
    if type(value) is float:
        return value
    # A text may spell a number, and NumPy's masked value is NaN with a warning.
    if value is not np.ma.masked and not isinstance(value, str | bytes | bytearray):
        item = getattr(value, "item", None)
        with contextlib.suppress(Exception):  # a framework's own may be of any kind
            return float(value if item is None else item())
    raise TypeError(f"{quote(value)} is no number")


def category_of(value: Any) -> str:
    """Return the text that `value` counts under; raises TypeError if it is no category."""
    if not isinstance(value, str | int | float | Enum):
        raise TypeError(
            f"the value {quote(value)} is no category: give a text, a number, an Enum member, or "
            "an array of one element"
        )
    return str(value)


# -- Of a metric: single values -------------------------------------------------------------------


def number(key: Key, value: Any, what: str = "value") -> float:
    """Return `value`, or a ``"weight"``, as a float if it is a real number or holds exactly one."""
    scalar = host_scalar(key, value)
    if what == "value":
        _refuse_many(key, scalar)
    if not isinstance(scalar, int | float | np.floating):
        for_it = hints.for_value if what == "value" else hints.for_weight
        raise TypeError(
            f"{show(key)}: the {what} {quote(value)} is no number: give an int, a float, or an "
            f"array of one element{for_it(value)}"
        )
    try:
        return float(scalar)
    except OverflowError:
        raise _too_large(key, f"the {what}") from None


def category(key: Key, value: Any) -> str:
    """Return the text that `value` counts under."""
    scalar = host_scalar(key, value)
    _refuse_many(key, scalar)
    return named(key, category_of, scalar)


def host_scalar(key: Key, value: Any) -> Any:
    """Return the one element of an array, and anything else as it is."""
    if isinstance(value, np.ndarray | np.generic):
        if value.size != 1 or value.dtype.kind in "mM":  # the latter's items may be mere ints
            return value
        if _is_masked(value) and np.ma.getmaskarray(value).any():
            raise ValueError(f"{show(key)}: what is masked has no value: leave the metric out")
        return value.item()
    backend = arrays.backend_of(value)
    if backend is None:
        return value
    (scalar,) = arrays.read([named(key, backend.hold, value)])()
    if isinstance(scalar, Exception):
        _refuse(key, scalar)
    return scalar


def held(key: Key, value: Any, *, in_worker: bool = False) -> Any:
    """Return what is to be kept of a value on a device; None for any other, and in a worker."""
    if in_worker or type(value) in NUMBERS or type(value) is str:
        return None
    return named(key, arrays.hold, value)


def named(key: Key, take: Callable[[Any], T], value: Any) -> T:
    """Return what `take` makes of `value`; its errors get the metric's name."""
    try:
        return take(value)
    except Exception as error:  # noqa: BLE001 - a framework's own may be of any kind
        _refuse(key, error)


def _refuse(key: Key, error: Exception) -> NoReturn:
    if isinstance(error, TypeError | ValueError):
        raise type(error)(f"{show(key)}: {error}") from None
    raise ValueError(f"{show(key)}: the array cannot be taken as a value: {error}") from error


def _refuse_many(key: Key, scalar: Any) -> None:
    if isinstance(scalar, np.ndarray) and scalar.size != 1:
        raise ValueError(f"{show(key)}: {arrays.not_one_value('NumPy array', scalar.shape)}")


def _too_large(key: Key, what: str) -> ValueError:
    return ValueError(f"{show(key)}: {what} is too large for a 64-bit float: scale it down")


# -- Weights --------------------------------------------------------------------------------------


def weight_of(key: Key, weight: Any, *, weighted: bool, in_worker: bool) -> Any:
    """Return a weight as a number; one that lies on a device is left there, but for a worker."""
    if type(weight) in NUMBERS:
        return weight
    weight = arrays.unwrapped(weight)
    on_device = arrays.backend_of(weight) is not None
    if on_device and not in_worker:
        return weight
    # What lies on a device cannot be refused where it is given, so that only "0 or not" matters.
    return (
        counts_or_not(key, weight) if on_device and not weighted else number(key, weight, "weight")
    )


def counts_or_not(key: Key, weight: Any) -> float:
    """Return 1.0 for any weight but 0."""
    given = number(key, weight, "weight")
    return 1.0 if 0 < given < np.inf else given


def check_weights(key: Key, weights: Sequence[float]) -> None:
    """Refuse host weights of which one is negative, infinite or NaN."""
    if bad_weight(floats(key, "a weight", weights)) is not None:
        _refuse_bad(key, next(weight for weight in weights if not 0 <= weight < np.inf))


def bad_weight(weights: Any) -> float | None:
    """Return a weight that is negative, infinite or NaN, if there is one."""
    if isinstance(weights, int | float):
        return None if 0 <= weights < np.inf else weights
    given = np.asarray(weights)
    bad = given[~((given >= 0) & (given < np.inf))]
    return bad[0].item() if bad.size else None


def _refuse_bad(key: Key, weight: float) -> NoReturn:
    raise ValueError(f"{show(key)}: the weight {weight!r} is not a finite number of 0 or more")


def refuse_weight(key: Key, agg_type: TypeLike, weight: float) -> NoReturn:
    """Refuse a weight other than 0 and 1 of a type to which it means nothing."""
    built_in = isinstance(agg_type, AggregationType)
    weighing = "use 'mean' or 'distribution'" if built_in else "let its handler say weighted = True"
    raise ValueError(
        f"{show(key)}: a value of type {type_label(agg_type)!r} counts once (weight 1) or not at all "
        f"(weight 0), so the weight {weight!r} would be ignored: leave it out, or {weighing}"
    )


# -- Arrays of which each element counts ----------------------------------------------------------


def is_many(value: Any, weight: Any) -> bool:
    """Return whether a weight for each element of an array is given.

    One element has one weight, be it in arrays or not; but some may be masked, as in larger arrays.
    """
    if type(weight) in NUMBERS or type(value) in NUMBERS or not _is_array(weight):
        return False
    return math.prod(weight.shape) != 1 or _masks_one(value, weight) or _masks_one(weight, value)


def shape_of(key: Key, array: Any) -> tuple[int, ...]:
    """Return the shape of an array; raises TypeError or ValueError for what has none."""
    if not _is_array(array):
        raise TypeError(
            f"{show(key)}: {quote(array)} is no array whose elements could each count: give "
            "np.asarray(...) of it"
        )
    # Such as a nested tensor has none.
    return named(key, lambda given: tuple(given.shape), array)


def weights_of_each(
    key: Key, agg_type: TypeLike, values: Any, weights: Any, *, weighted: bool
) -> Any:
    """Return the weights of an array's elements, or the one of all; on a device they are held."""
    shape = shape_of(key, weights) if _is_array(weights) else ()
    many = math.prod(shape) != 1 or _masks_one(weights, values)
    if many and shape != tuple(values.shape):
        raise ValueError(
            f"{show(key)}: weights of shape {shape} do not go with values of shape "
            f"{tuple(values.shape)}: give one weight for each value, or one for all"
        )
    if arrays.backend_of(weights) is not None:
        return elements_of(key, weights) if many else held(key, weights)
    weighing: Any
    if many:
        given = elements_of(key, weights)
        weighing = _exact_floats(key, "a weight", np.asarray(given))
        weighing = weights_beside(values, weights_beside(given, weighing))
    else:
        weighing = number(key, weights, "weight")
    bad = bad_weight(weighing)
    if bad is not None:
        _refuse_bad(key, bad)
    if not weighted:
        conflicting = np.extract((weighing != 0) & (weighing != 1), weighing)
        if conflicting.size:
            refuse_weight(key, agg_type, conflicting[0].item())
    return weighing


def elements_of(key: Key, values: Any) -> Any:
    """Return the elements of an array, as a copy of shape (n,), perhaps masked; or held."""
    if arrays.backend_of(values) is not None:
        return named(key, arrays.hold_each, values)
    if not _is_masked(values):
        return np.array(values, subok=False).ravel()
    elements = np.array(np.ma.getdata(values), subok=False).ravel()
    return np.ma.MaskedArray(elements, mask=np.ma.getmaskarray(values).ravel())


def counted_elements(values: Any, weights: Any) -> tuple[Any, Any]:
    """Return the elements, shape (n,), that are neither masked nor of weight 0, with their weights."""
    weighing = np.broadcast_to(np.asarray(weights, dtype=np.float64), values.shape)
    counts = weights_beside(values, weighing) != 0
    if counts.all():
        return np.asarray(values), weighing
    return np.asarray(values)[counts], weighing[counts]


def weights_beside(values: Any, weights: Any) -> Any:
    """Return host weights with 0 for values that are masked: whatever stands there means nothing."""
    if not _is_masked(values) or np.shape(weights) == ():
        return weights
    return np.where(np.ma.getmaskarray(values).reshape(np.shape(weights)), 0.0, weights)


def listed(numbers: Numbers) -> Sequence[Any]:
    """Return Python's own numbers or texts for those of an array."""
    return numbers.tolist() if isinstance(numbers, np.ndarray) else numbers


def floats(key: Key, what: str, numbers: Numbers) -> FloatArray:
    """Return numbers as an array of float64; raises ValueError if one is too large for that."""
    if isinstance(numbers, np.ndarray):
        return _exact_floats(key, what, numbers)
    try:
        return np.array(numbers, dtype=np.float64)
    except OverflowError:
        raise _too_large(key, what) from None


def _exact_floats(key: Key, what: str, numbers: npt.NDArray[Any]) -> FloatArray:
    kind = numbers.dtype.kind
    # The float and int types of ml_dtypes are of the kind of raw bytes, which are numpy.void.
    if kind not in "biuf" and (kind != "V" or issubclass(numbers.dtype.type, np.void)):
        raise TypeError(
            f"{show(key)}: an array of type {numbers.dtype} holds no real numbers: give one of floats, "
            "ints or bools"
        )
    converted = numbers.astype(np.float64)
    if kind in "iu":
        large = np.abs(converted) >= _LARGEST_INT
        if large.any() and converted[large].astype(object).tolist() != numbers[large].tolist():
            raise ValueError(
                f"{show(key)}: {what} is an integer of more than 2^53, which a 64-bit float does not "
                "hold exactly: give .astype(float) of the array if it may be rounded"
            )
    return converted


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray | np.generic) or arrays.backend_of(value) is not None


def _is_masked(value: Any) -> bool:
    return is_of(value, "numpy.ma", "MaskedArray")  # which NumPy loads when it is first used


def _masks_one(one: Any, other: Any) -> bool:
    """Return whether `one` is a masked array of one element, which that of `other` goes with."""
    return (
        _is_masked(one) and one is not np.ma.masked and one.shape == getattr(other, "shape", None)
    )
