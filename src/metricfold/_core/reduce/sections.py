"""The merges: what becomes of two vectors of numbers, over ranks and over time.

A wire vector is a row of sections, and so is an accumulated result. Each section is one of these
three, which differ in nothing but their identity and how two of them become one:

    section     identity      over ranks                          over time
    Added       0             a + b                               a + b, and what rounding took
    Larger      -inf          the larger; NaN beyond all          the same
    Owned       -inf, -1, 0   the larger, the lowest rank that    the larger with its owner and
                              has it, and how many have it        ties; of equal ones the older
    Latest      the same      of the lowest rank that has one     the newer, with its owner

All are associative (sums but for rounding) and have an identity. Over ranks both sides are always
*neighbouring blocks of ranks, the lower ones first*: so the first that has a maximum is the lowest
rank that has it. The bits that come out depend on neither the processor nor how the numbers lie in
memory: NaN is made one NaN, and 0 is beyond -0.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from metricfold._core.fold.sample import FloatArray
from metricfold._core.fold.state import is_first

__all__ = ["NOBODY", "added", "added_later", "larger", "latest", "owned", "owned_later"]

NOBODY = -1
"""Stands for the owner of a maximum that no rank has."""

BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]
Owned = tuple[FloatArray, IntArray, IntArray]


def added(lower: FloatArray, upper: FloatArray, out: FloatArray | None = None) -> FloatArray:
    """Return the sums of two blocks of ranks, in `out` if there is one: large ones are written once."""
    with np.errstate(all="ignore"):
        return _one_nan(np.add(lower, upper, out=out))


def added_later(
    old: FloatArray, lost: FloatArray, new: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Return sums over time, and what rounding has taken from them (Neumaier's compensated sum).

    Args:
        old: the sums so far.
        lost: what rounding has taken from these so far, and from `new`.
        new: what came after.
    """
    with np.errstate(all="ignore"):
        sums = old + new
        small = np.where(np.abs(old) >= np.abs(new), (old - sums) + new, (new - sums) + old)
    # Once a sum is infinite its rounding has no meaning.
    return sums, lost + np.where(np.isfinite(sums), small, 0.0)


def larger(one: FloatArray, other: FloatArray) -> FloatArray:
    """Return the larger of each two, over ranks and over time."""
    return _one_nan(np.where(is_first(one, other), one, other))


def owned(lower: FloatArray, upper: FloatArray) -> FloatArray:
    """Return maxima of two blocks of ranks, with their owners and how many ranks have them.

    Args:
        lower: maxima, owners and numbers of ranks, shape (..., 3, n).
        upper: those of the higher ranks.
    """
    a, b = lower[..., 0, :], upper[..., 0, :]
    out = np.where(is_first(a, b)[..., np.newaxis, :], lower, upper)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    # Who has nothing never owns, though the maximum be -inf itself.
    nobody = lower[..., 1, :] == NOBODY
    np.copyto(out[..., 1, :], np.where(nobody, upper[..., 1, :], lower[..., 1, :]), where=same)
    np.copyto(out[..., 2, :], lower[..., 2, :] + upper[..., 2, :], where=same)
    _one_nan(out[..., 0, :])
    return out


def owned_later(old: Owned, new: Owned, begins: BoolArray, newest: BoolArray) -> Owned:
    """Return maxima over time, with the owners and ties of the larger ones, of equal ones the older.

    Args:
        old: maxima, owners and numbers of ranks, shapes (n,).
        new: what came after.
        begins: where there is a number in `new`, and none in `old`. An old owner may be unknown,
            as out of a checkpoint, where there is one.
        newest: where `new` holds a value that counts, be it larger or not.
    """
    a, b = old[0], new[0]
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    later = begins | ~(is_first(a, b) | same)
    later |= newest
    owners, tied = (np.where(later, *both) for both in zip(new[1:], old[1:], strict=True))
    return np.where(newest, b, larger(a, b)), owners, tied


def latest(lower: FloatArray, upper: FloatArray) -> FloatArray:
    """Return the values of two blocks of ranks, and whose they are; those of `lower` where it has any.

    Args:
        lower: values, owners and numbers of ranks, shape (..., 3, n).
        upper: those of the higher ranks.
    """
    return np.where(lower[..., 1:2, :] != NOBODY, lower, upper)


def _one_nan(numbers: FloatArray) -> FloatArray:
    """Make each NaN the same one: which comes out of an addition is the processor's choice."""
    numbers[np.isnan(numbers)] = np.nan
    return numbers
