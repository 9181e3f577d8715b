"""The words of an accumulator's lanes: what a row is in 32 bits, and how rows merge.

    counts   4        values, NaN, +inf, -inf
    sums     3 x 2    two float32 each, by their bits: 48 bits together
    extrema  2 x 2    largest x and largest -x: a float32, and what it has rounded away of an integer

All are int32, whatever they stand for. What averages or casts the floats of a training state leaves
integers alone; and the -inf of an extremum that has seen nothing is no infinity to ``jax_debug_infs``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from metricfold._core.device.rows import COUNTS, EXTREMA, SUMS, HostArrays
from metricfold.jax.exact_sums import add_pairs

__all__ = [
    "LANES",
    "LOWEST",
    "NOTHING",
    "Lanes",
    "floats",
    "nothing",
    "of_host",
    "on_host",
    "words",
]

_SUMS_END = COUNTS + 2 * SUMS
LANES = _SUMS_END + 2 * EXTREMA
LOWEST = np.int32(np.iinfo(np.int32).min)
NOTHING = np.int32(LOWEST ^ np.int32(0x7F80_0000) ^ np.int32(0x7FFF_FFFF))
"""-inf, as `to_sortable` says it."""


def floats(words: Any) -> jax.Array:
    """Return the float32 of which these are the bits."""
    return lax.bitcast_convert_type(words, jnp.float32)


def words(values: Any) -> jax.Array:
    """Return the bits of float32, as int32."""
    return lax.bitcast_convert_type(values, jnp.int32)


class Lanes(NamedTuple):
    """Rows, taken apart.

    Args:
        counts: int32, shape (..., 4).
        sums: pairs, shape (..., 3, 2).
        extrema: integers that sort like the floats, shape (..., 2, 2); None if nothing was compared.
    """

    counts: jax.Array
    sums: jax.Array
    extrema: jax.Array | None

    @classmethod
    def of(cls, words: jax.Array) -> Lanes:
        """Take rows apart, shape (..., LANES)."""
        leading = words.shape[:-1]
        return cls(
            words[..., :COUNTS],
            floats(words[..., COUNTS:_SUMS_END]).reshape(*leading, SUMS, 2),
            words[..., _SUMS_END:].reshape(*leading, EXTREMA, 2),
        )

    def words(self) -> jax.Array:
        """Return rows, shape (..., LANES)."""
        leading = self.counts.shape[:-1]
        assert self.extrema is not None
        sums, extrema = words(self.sums).reshape(*leading, -1), self.extrema.reshape(*leading, -1)
        return jnp.concatenate([self.counts, sums, extrema], axis=-1)

    def merged(self, other: Lanes) -> Lanes:
        """Return rows that have seen what both have."""
        return Lanes(
            self.counts + other.counts,
            add_pairs(self.sums, other.sums),
            self.extrema if other.extrema is None else _larger(self.extrema, other.extrema),
        )


def _larger(one: jax.Array | None, other: jax.Array) -> jax.Array:
    """Return the larger of extrema, shape (..., 2): the second decides where the first are equal."""
    if one is None:
        return other
    high = jnp.maximum(one[..., 0], other[..., 0])
    low = jnp.maximum(
        *(jnp.where(each[..., 0] == high, each[..., 1], LOWEST) for each in (one, other))
    )
    return jnp.stack([high, low], axis=-1)


def nothing(leading: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Return rows that have seen nothing, shape (*leading, LANES)."""
    row = np.zeros(LANES, np.int32)
    row[_SUMS_END::2] = NOTHING
    return np.broadcast_to(row, (*leading, LANES))


def on_host(lanes: Any, refused: Any, grid: Any) -> HostArrays:
    """Return what the arrays of one accumulator say, read from the device."""
    lanes = np.ascontiguousarray(lanes)
    rows = len(lanes)
    sums = np.ascontiguousarray(lanes[:, COUNTS:_SUMS_END]).view(np.float32)
    extrema = np.ascontiguousarray(lanes[:, _SUMS_END:])
    flipped = extrema ^ ((extrema >> 31) & np.int32(0x7FFF_FFFF))
    high, low = np.moveaxis(flipped.view(np.float32).reshape(rows, EXTREMA, 2).astype(float), -1, 0)
    largest = np.where(low == 0, high, high + low)  # -0.0 + 0.0 were 0.0, and the smallest -0.0
    return HostArrays(
        lanes[:, :COUNTS],
        sums.reshape(rows, SUMS, 2),
        largest,
        None if grid is None else np.ascontiguousarray(grid).view(np.float32),
        np.asarray(refused),
    )


def of_host(counts: Any, sums: Any, extrema: Any) -> np.ndarray[Any, Any]:
    """Return the rows of these arrays: int32, float32 pairs, and float32."""
    lanes = nothing((len(counts),)).copy()
    lanes[:, :COUNTS] = counts
    lanes[:, COUNTS:_SUMS_END] = (
        np.ascontiguousarray(sums, np.float32).view(np.int32).reshape(len(counts), -1)
    )
    bits = np.ascontiguousarray(extrema, np.float32).view(np.int32)
    lanes[:, _SUMS_END::2] = bits ^ ((bits >> 31) & np.int32(0x7FFF_FFFF))
    return lanes
