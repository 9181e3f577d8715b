"""Numbers as integers that sort alike, with NaN on top.

XLA's maximum over devices drops NaN on some platforms, so extrema travel as integers. The bits of a
positive float grow with it; those of a negative one shrink, and flipping all but the sign puts them right.
Every NaN becomes the largest integer. Inverting all bits reverses the order, without the overflow of
``-(-128)``: a minimum is the maximum of the inverted integers.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

__all__ = ["from_sortable", "to_sortable"]


def to_sortable(values: jax.Array, *, reverse: bool = False) -> jax.Array:
    """Return integers whose order is that of `values`, or its reverse; NaN is the largest in both.

    Args:
        values: of 32 or 64 bits: float, int or unsigned int.
        reverse: let the smallest value have the largest integer.
    """
    integers = np.dtype(f"int{values.dtype.itemsize * 8}")
    if jnp.issubdtype(values.dtype, jnp.signedinteger):
        return ~values if reverse else values
    bits = lax.bitcast_convert_type(values, integers)
    if jnp.issubdtype(values.dtype, jnp.unsignedinteger):
        bits ^= np.iinfo(integers).min
        return ~bits if reverse else bits
    bits = _flip_negative(bits)
    return jnp.where(jnp.isnan(values), np.iinfo(integers).max, ~bits if reverse else bits)


def from_sortable(integers: jax.Array, dtype: Any, *, reverse: bool = False) -> jax.Array:
    """Return the values of type `dtype` that `to_sortable` made `integers` of."""
    bits = ~integers if reverse else integers
    if jnp.issubdtype(dtype, jnp.signedinteger):
        return bits
    if jnp.issubdtype(dtype, jnp.unsignedinteger):
        return lax.bitcast_convert_type(bits ^ np.iinfo(integers.dtype).min, dtype)
    values = lax.bitcast_convert_type(_flip_negative(bits), dtype)
    return jnp.where(integers == np.iinfo(integers.dtype).max, jnp.nan, values)


def _flip_negative(bits: jax.Array) -> jax.Array:
    """Invert all but the sign of what is negative; doing it twice changes nothing."""
    info = np.iinfo(bits.dtype)
    return bits ^ ((bits >> (info.bits - 1)) & info.max)
