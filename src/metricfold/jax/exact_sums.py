"""Sums in float32 that do not drift: two numbers each, and no rounding on the way to them.

Adding a million times 0.1 in float32 gives 100,958. So a sum is a *pair* of float32, the second of which
holds what the first has rounded away; and values of one batch are brought to fixed point, relative to the
largest that they are added to, and added up as integers, which is exact, whatever the order. Such a number
is cut into *limbs*, of so few bits each that the sum of a limb over the whole batch is an int32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

__all__ = [
    "MOST_TERMS",
    "Limbs",
    "Segments",
    "add_pairs",
    "exact_product",
    "exact_sum",
    "exponents",
    "magnitudes",
    "pairs_of_counts",
]

MOST_TERMS = 1 << 24
"""So many may be added at once: each limb then has 6 bits."""
_SUM_BITS = 30
_LOW_BITS = 15
_LARGEST = np.float32(np.finfo(np.float32).max)


# -- Pairs -----------------------------------------------------------------------------------------


def exact_sum(one: jax.Array, other: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the rounded sum, and what was rounded away (Knuth): exact, whichever is larger."""
    total = one + other
    seen = total - one
    return total, _where_finite(total, (one - (total - seen)) + (other - seen))


def _settled(high: jax.Array, low: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the same sum, of which the second is what a float32 does not hold."""
    total = high + low
    return total, _where_finite(total, low - (total - high))


def _where_finite(total: jax.Array, lost: jax.Array) -> jax.Array:
    # Of a sum beyond float32 nothing is known but that, and inf - inf is NaN.
    return jnp.where(jnp.isfinite(total), lost, np.float32(0))


def add_pairs(pairs: jax.Array, others: jax.Array) -> jax.Array:
    """Return the sums of pairs, both of shape (..., 2)."""
    high, lost = exact_sum(pairs[..., 0], others[..., 0])
    low, rest = exact_sum(pairs[..., 1], others[..., 1])
    high, low = _settled(high, low + lost)
    return jnp.stack(_settled(high, low + rest), axis=-1)


def pairs_of_counts(counts: jax.Array) -> jax.Array:
    """Return counts, int32 of 0 or more, as pairs."""
    low = counts & ((1 << _LOW_BITS) - 1)
    return jnp.stack(
        exact_sum((counts - low).astype(jnp.float32), low.astype(jnp.float32)), axis=-1
    )


def exact_product(one: jax.Array, other: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the rounded product, and what was rounded away, as far as that is no subnormal."""
    product = one * other
    a, b = _halves(one), _halves(other)
    # Products of halves are exact, so that it does not matter if a compiler fuses them into sums.
    rest = ((a[0] * b[0] - product) + a[0] * b[1] + a[1] * b[0]) + a[1] * b[1]
    return product, jnp.where(jnp.isfinite(rest), rest, 0)


def _halves(values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return two numbers of 12 bits at most that add up to each value."""
    bits = lax.bitcast_convert_type(values, jnp.int32)
    high = lax.bitcast_convert_type(bits & np.int32(-(1 << 12)), jnp.float32)
    return high, values - high


# -- Fixed point -----------------------------------------------------------------------------------


def magnitudes(values: jax.Array) -> jax.Array:
    """Return integers, 0 or more, that sort like the magnitudes of float32 that are not NaN."""
    return lax.bitcast_convert_type(jnp.minimum(jnp.abs(values), _LARGEST), jnp.int32)


def exponents(largest: jax.Array) -> jax.Array:
    """Return e such that what has at most these `magnitudes` is below 2^e."""
    return (jnp.maximum(largest, 0) >> 23) - 126


def _scaled(values: jax.Array, exponent: jax.Array) -> jax.Array:
    """Return values · 2^exponent; in two steps, for the factor alone may be no float32."""
    half = exponent >> 1
    return values * _power(half) * _power(exponent - half)


def _power(exponent: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


class Limbs:
    """How numbers become integers of `bits` bits at least, of which `terms` may be added up."""

    def __init__(self, terms: int, bits: int) -> None:
        self.width = _SUM_BITS - max(terms - 1, 1).bit_length()
        self.count = math.ceil(bits / self.width)

    def of(self, values: jax.Array, exponent: jax.Array) -> jax.Array:
        """Return int32, shape (..., count), of float32 below 2^exponent in magnitude."""
        rest = _scaled(jnp.clip(values, -_LARGEST, _LARGEST), -exponent)
        limbs = []
        for place in range(self.count):
            rest = rest * np.float32(1 << self.width)
            last = place == self.count - 1
            limb = jnp.round(rest) if last else jnp.trunc(rest)
            limbs.append(limb.astype(jnp.int32))
            rest = rest - limb
        return jnp.stack(limbs, axis=-1)

    def pairs(self, sums: jax.Array, exponent: jax.Array) -> jax.Array:
        """Return the pairs, shape (..., 2), of which `sums` are the limbs, shape (..., count)."""
        high = low = jnp.zeros(exponent.shape, jnp.float32)
        for place in range(self.count):
            limb = sums[..., place]
            # A float32 has room for half of an int32 at a time.
            rest = limb & ((1 << _LOW_BITS) - 1)
            for half in (limb - rest, rest):
                term = _scaled(half.astype(jnp.float32), exponent - self.width * (place + 1))
                high, lost = exact_sum(high, term)
                low = low + lost
        return jnp.stack(_settled(high, low), axis=-1)


@dataclass(frozen=True)
class Segments:
    """Which of a number of sums each of n rows belongs to; rows at `number` belong to none."""

    places: jax.Array
    number: int
    ascending: bool = False

    def total(self, columns: jax.Array) -> jax.Array:
        """Return the sums of int32, shape (n, ...), as shape (number, ...)."""
        if self.number == 1:
            return self._where(columns, 0).sum(axis=0, keepdims=True, dtype=jnp.int32)
        return jax.ops.segment_sum(
            columns, self.places, self.number, indices_are_sorted=self.ascending, mode="drop"
        )

    def largest(self, columns: jax.Array) -> jax.Array:
        """Return the largest of int32, likewise; the least of all integers where there is none."""
        lowest = np.iinfo(np.int32).min
        if self.number == 1:
            return self._where(columns, lowest).max(axis=0, keepdims=True, initial=lowest)
        return jax.ops.segment_max(
            columns, self.places, self.number, indices_are_sorted=self.ascending, mode="drop"
        )

    def spread(self, found: jax.Array) -> jax.Array:
        """Return for each row what was `found`, shape (number, ...), for its sum."""
        if self.number == 1:
            return jnp.broadcast_to(found, (self.places.size, *found.shape[1:]))
        return found[jnp.minimum(self.places, self.number - 1)]

    def _where(self, columns: jax.Array, nothing: int) -> jax.Array:
        here = (self.places == 0).reshape(-1, *(1,) * (columns.ndim - 1))
        return jnp.where(here, columns, np.int32(nothing))
