"""What two curves of logs say about each other, given that logs near each other are not independent.

The difference of two curves is what is looked at: both have seen the same steps, and often the same
data, and what these do to both cancels. Its mean over the last part of the run has an error that
follows from the means of blocks; these are nearly independent where a block is long against the memory
of the noise. How long that is nobody knows beforehand, so blocks of several lengths are tried, and a
noise that forgets like an autoregression of order one; the widest interval counts.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = [
    "Difference",
    "apart_since",
    "crossed_at",
    "final",
    "paired",
    "shared_steps",
    "smoothed",
    "tail_of",
]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

_BLOCKS = (20, 10)
_REMEMBERED = 100  # logs
_FEWEST = 3  # degrees of freedom that the mean of even the shortest and slowest noise is given
_SOUGHT = 1.5  # times the error
_LEAST = 6  # points from which on an error can be told


class Difference(NamedTuple):
    """The mean of a difference.

    Args:
        mean: of b − a.
        error: half the width of its interval; None where there are too few points to tell.
    """

    mean: float
    error: float | None

    @property
    def verdict(self) -> str:
        """Whether b is above a: ``"="``, ``"+"``, ``"-"``, or ``"?"`` where nobody can tell."""
        if self.error is None or not math.isfinite(self.mean):
            return "?"
        if abs(self.mean) <= self.error:
            return "="
        return "+" if self.mean > 0 else "-"


def tail_of(count: int) -> int:
    """Return over how many of the last logs a final value is taken: a tenth, but not too few.

    >>> [tail_of(count) for count in (4, 10, 40, 200, 5000)]
    [4, 6, 20, 50, 500]
    """
    return min(count, max(_LEAST, count // 10, min(count // 4, 50), min(count // 2, 20)))


def final(difference: FloatArray, of: int = 1, last: int | None = None) -> Difference:
    """Return the mean of the last part of a difference of two curves, and its error.

    Args:
        difference: shape (n,).
        of: so many differences are looked at together, of all of which the intervals are to hold with
            95 %: one of twenty that are equal would lie outside of its own by chance alone.
        last: how many values the last part has; None: all.
    """
    last = len(difference) if last is None else last
    values = difference[len(difference) - last :]
    if not last:
        return Difference(math.nan, None)
    mean = float(values.mean())
    if not values.any():
        return Difference(0.0, 0.0)
    if last < _LEAST:
        return Difference(mean, None)
    level = 1 - 0.025 / max(of, 1)
    errors = [_by_blocks(values, count, level) for count in _BLOCKS if count <= last / 2]
    # How long a short run remembers, and what its beginning has left that still fades, shows in more
    # than its last part; but not in its first steps, in which all of it changes.
    start = max(len(difference) - _REMEMBERED, len(difference) // 4)
    longer = difference[min(start, len(difference) - last) :]
    return Difference(mean, max([*errors, _by_memory(longer, last, level)]))


def _by_blocks(values: FloatArray, count: int, level: float) -> float:
    means = np.array([block.mean() for block in np.array_split(values, count)])
    return t_quantile(level, count - 1) * float(means.std(ddof=1)) / math.sqrt(count)


def _by_memory(values: FloatArray, last: int, level: float) -> float:
    """Return the error of the mean of the last values if each remembers a part of the one before."""
    count = len(values)
    rest = values - values.mean()
    power = float(rest @ rest)
    if power == 0:
        return 0.0
    memory = float(rest[1:] @ rest[:-1]) / power
    # The estimate is too low on short series, by about this much (Marriott and Pope 1954).
    memory = min(max(memory + (1 + 4 * memory) / count, 0.0), 1 - 2 / count)
    longer = (1 + memory) / (1 - memory)
    freedom = max(int(count / longer) - 1, _FEWEST)
    return t_quantile(level, freedom) * math.sqrt(power / (count - 1) / last * min(longer, last))


def t_quantile(level: float, freedom: int) -> float:
    """Return a quantile of Student's t, to 1 % (Hill 1970).

    >>> [round(t_quantile(0.975, freedom), 2) for freedom in (1, 2, 4, 9, 19, 1000)]
    [12.71, 4.3, 2.78, 2.26, 2.09, 1.96]
    """
    if freedom == 1:
        return math.tan(math.pi * (level - 0.5))
    if freedom == 2:
        return (2 * level - 1) * math.sqrt(2 / (4 * level * (1 - level)))
    z = NormalDist().inv_cdf(level)
    # Of a normal deviate to one of t, by an expansion that holds far out as well.
    a = 1 / (freedom - 0.5)
    b = (48 / a) / a
    c = ((20700 * a / b - 98) * a - 16) * a + 96.36
    d = ((94.5 / (b + c) - 3) / c + 1) * math.sqrt(a * math.pi / 2) * freedom
    y = (d * 2 * (1 - level)) ** (2 / freedom)
    if y > 0.05 + a:
        y = z * z
        if freedom < 5:
            c += 0.3 * (freedom - 4.5) * (-z + 0.6)
        c += (((0.05 * d * -z - 5) * -z - 7) * -z - 2) * -z + b
        y = (((((0.4 * y + 6.3) * y + 36) * y + 94.5) / c - y - 3) / b + 1) * -z
        y = math.expm1(a * y * y)
    else:
        y = (
            (
                1 / (((freedom + 6) / (freedom * y) - 0.089 * d - 0.822) * (freedom + 2) * 3)
                + 0.5 / (freedom + 4)
            )
            * y
            - 1
        ) * (freedom + 1) / (freedom + 2) + 1 / y
    return math.sqrt(freedom * y)


def paired(
    a: tuple[IntArray, FloatArray], b: tuple[IntArray, FloatArray]
) -> tuple[IntArray, FloatArray, FloatArray]:
    """Return steps at which two curves can be compared, and the values of both there.

    Where they were logged at the same steps, at least half of the time, these are the ones. Otherwise
    the steps that both cover are divided into stretches with values of both, each of which counts as
    its mean. What is not finite in either of them is left out of both.
    """
    (steps_a, values_a), (steps_b, values_b) = (_finite(*one) for one in (a, b))
    shared, at_a, at_b = shared_steps(steps_a, steps_b)
    fewer = min(len(steps_a), len(steps_b))
    if fewer == 0 or 2 * len(shared) >= fewer:
        return shared, values_a[at_a], values_b[at_b]
    low, high = max(steps_a[0], steps_b[0]), min(steps_a[-1], steps_b[-1])
    inside = [(steps >= low) & (steps <= high) for steps in (steps_a, steps_b)]
    fewest = min(int(one.sum()) for one in inside)
    if low >= high or fewest < 2:
        return shared, values_a[at_a], values_b[at_b]
    edges = np.linspace(low, high, max(fewest // 2, 1) + 1)
    means, counts = [], []
    for steps, values, some in zip((steps_a, steps_b), (values_a, values_b), inside, strict=True):
        places = np.clip(np.searchsorted(edges, steps[some], side="right") - 1, 0, len(edges) - 2)
        counts.append(np.bincount(places, minlength=len(edges) - 1))
        sums = np.bincount(places, weights=values[some], minlength=len(edges) - 1)
        means.append(np.divide(sums, counts[-1], out=np.zeros(len(sums)), where=counts[-1] > 0))
    both = (counts[0] > 0) & (counts[1] > 0)
    return np.floor(edges[1:]).astype(np.int64)[both], means[0][both], means[1][both]


def shared_steps(a: IntArray, b: IntArray) -> tuple[IntArray, Any, Any]:
    """Return the steps that two ascending series have in common, and where they are in each."""
    if np.array_equal(a, b):
        return a, slice(None), slice(None)
    shared, at_a, at_b = np.intersect1d(a, b, assume_unique=True, return_indices=True)
    return shared, at_a, at_b


def _finite(steps: IntArray, values: FloatArray) -> tuple[IntArray, FloatArray]:
    known = np.isfinite(values)
    return steps[known], values[known]


def smoothed(values: FloatArray, over: int) -> FloatArray:
    """Return the means of all stretches of so many values; each ends at the place that it is at."""
    over = max(min(over, len(values)), 1)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    found: FloatArray = (sums[over:] - sums[:-over]) / over
    return found


def _blocks(difference: FloatArray) -> tuple[FloatArray, IntArray, float]:
    """Return the means of blocks, where they start, and how much one of them scatters."""
    count = int(np.clip(len(difference) // 10, min(len(difference), 8), 100))
    pieces = np.array_split(difference, count)
    means = np.array([one.mean() for one in pieces])
    starts = np.cumsum([0, *map(len, pieces[:-1])])
    # Of neighbours, so that a difference that grows does not count as noise.
    scatter = float(np.median(np.abs(np.diff(means)))) / (0.6745 * math.sqrt(2))
    return means, starts, scatter


def apart_since(steps: IntArray, difference: FloatArray) -> int | None:
    """Return the step from which on two curves stay apart until the end; None if they do not.

    It is where the last stretch of blocks begins in which the difference keeps its sign and is mostly
    beyond the noise of a block.
    """
    if len(difference) < 2 * _LEAST:
        return None
    means, starts, scatter = _blocks(difference)
    sign = np.sign(means[-_LEAST // 2 :].sum())
    begin = len(means)
    while begin > 0:
        around = means[max(begin - 2, 0) : begin + 1]
        if np.sign(means[begin - 1]) != sign or not (np.abs(around) > 2 * scatter).any():
            break
        begin -= 1
    # A block that lies within the noise is not yet apart.
    while begin < len(means) and abs(means[begin]) <= 2 * scatter:
        begin += 1
    if begin == len(means) or not _clearly(difference[starts[begin] :]):
        return None
    return int(steps[starts[begin]])


def crossed_at(steps: IntArray, difference: FloatArray) -> int | None:
    """Return the step at which the lower curve became the upper one for good; None if it did not.

    The sum of all differences so far turns round there. Before and after it the difference must be
    beyond its error, with opposite signs.
    """
    if not len(steps):
        return None
    sums = np.cumsum(difference)
    for place in sorted({int(sums.argmin()) + 1, int(sums.argmax()) + 1}):
        before, after = difference[:place], difference[place:]
        if not (len(before) >= _LEAST and len(after) >= _LEAST):
            continue
        if np.sign(before.mean()) != np.sign(after.mean()) and _clearly(before) and _clearly(after):
            return int(steps[place])
    return None


def _clearly(difference: FloatArray) -> bool:
    """Return whether a stretch that was looked for is apart from zero: more than one given beforehand."""
    found = final(difference)
    return found.error is not None and abs(found.mean) > _SOUGHT * found.error
