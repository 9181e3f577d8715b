"""How values lie inside a bucket of which only mean, deviation and bounds are known.

The distribution of largest entropy that has them: it assumes nothing else. Its density is
exp(b z + c z²), with z in deviations from the mean. Where a bucket is one of many, that is nearly
flat or a gentle slope; where all the values of a narrow metric share one bucket, it is the normal
distribution; at the edge of a bucket, half of it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from metricfold._core.sketch.indexing import FloatArray, IntArray

__all__ = ["Shapes"]

_REACH = 6.0
"""Deviations from the mean beyond which nothing is expected."""
_HALVES = (64, 32, 16, 8, 4, 2, 1)
_NODES = 1 + 2 * _HALVES[0]
_STEPS = 20
_STRIDE = 2.0
_CLOSE = 1e-3
_TINY = 2.0**-1022
_TRAPEZOID = np.array([0.5, *[1.0] * (_NODES - 2), 0.5])
"""How much each node counts in a sum over all."""


class Shapes:
    """Densities of mean 0 and deviation 1 on intervals from `low` < 0 to `high` > 0, tabulated.

    `known` says whether one was found: there is none where nearly all lies at both bounds.
    """

    __slots__ = ("_density", "_start", "_step", "_through", "known")

    def __init__(self, low: FloatArray, high: FloatArray) -> None:
        low, high = np.maximum(low, -_REACH), np.minimum(high, _REACH)
        self._start, self._step = low, (high - low) / (_NODES - 1)
        z = low[:, np.newaxis] + self._step[:, np.newaxis] * np.arange(_NODES)
        density, self.known = _densest(z, np.minimum(-low, high) > np.sqrt(3.0))
        area = 0.5 * (density[:, 1:] + density[:, :-1])
        through = np.cumsum(area, axis=1)
        self._density = density / through[:, -1:]
        self._through = np.zeros_like(density)
        self._through[:, 1:] = through / through[:, -1:]

    def quantile(self, shape: IntArray, q: FloatArray) -> FloatArray:
        """Return the quantile `q`, in 0..1, of each density numbered in `shape`."""
        # Find the interval that q falls into, by halving all of them.
        through, begin = self._through.ravel(), shape * _NODES
        left = np.zeros_like(shape)
        for step in _HALVES:
            left += step * (through.take(begin + left + step) <= q)
        # Between two nodes the density is linear.
        area = np.maximum(q - self._through[shape, left], 0.0)
        one, other = self._density[shape, left], self._density[shape, left + 1]
        root = np.sqrt(np.maximum(one * one + 2.0 * area * (other - one), 0.0))
        share = np.minimum(2.0 * area / np.maximum(one + root, _TINY), 1.0)
        found: FloatArray = self._start[shape] + self._step[shape] * (left + share)
        return found

    def share(self, shape: IntArray, z: FloatArray) -> FloatArray:
        """Return how much of each density numbered in `shape` lies below `z` deviations."""
        place = np.clip((z - self._start[shape]) / self._step[shape], 0.0, _NODES - 1.0)
        left = np.minimum(place.astype(np.int64), _NODES - 2)
        rest = place - left
        one, other = self._density[shape, left], self._density[shape, left + 1]
        found: FloatArray = self._through[shape, left] + rest * (one + 0.5 * rest * (other - one))
        return np.clip(found, 0.0, 1.0)


def _densest(
    z: FloatArray, bell: npt.NDArray[np.bool_]
) -> tuple[FloatArray, npt.NDArray[np.bool_]]:
    """Return the density of largest entropy at the nodes `z`, shape (n, nodes), and if it is one.

    Newton's method on b and c, in bounded steps: the problem is convex. It starts from the normal
    distribution where `bell` says so, and elsewhere from the uniform one.
    """
    squares = z * z
    powers = np.stack([np.ones_like(z), z, squares, squares * z, squares * squares])
    b, c = np.zeros(len(z)), np.where(bell, -0.5, 0.0)
    for _ in range(_STEPS):
        power = b[:, np.newaxis] * z + c[:, np.newaxis] * squares
        density = np.exp(power - power.max(axis=1, keepdims=True))
        sums = np.einsum("knz,nz->kn", powers, density * _TRAPEZOID)
        first, second, third, fourth = sums[1:] / sums[0]
        known = (np.abs(first) < _CLOSE) & (np.abs(second - 1.0) < _CLOSE)
        if known.all():
            break
        # The covariance of z and z²: how the two moments answer to b and c.
        corner, side, other = second - first**2, third - first * second, fourth - second**2
        scale = np.maximum(corner * other - side**2, _TINY)
        to_b = (side * (second - 1.0) - other * first) / scale
        to_c = (side * first - corner * (second - 1.0)) / scale
        shorter = np.minimum(1.0, _STRIDE / np.maximum(np.hypot(to_b, to_c), _STRIDE))
        b += shorter * to_b
        c += shorter * to_c
    return density, known
