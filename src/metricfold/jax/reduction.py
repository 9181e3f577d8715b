"""Reduce many values over devices: each by its own op, all by few collectives.

Values of one op and type are joined first, and joined again by `combine`, so that mean and sum, max and
min share a collective. A step with float32 metrics of all four ops compiles to two: one sum, one maximum.

    op      sends                           result
    mean    sum of x                        / number of devices
            sum of w·x, sum of w            Σwx / Σw, with weights
    sum     sum of x                        as it is
    max     maximum of x's sortable bits    x again, in its own type
    min     the same, inverted              x again, in its own type
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metricfold.jax.axes import Axes
from metricfold.jax.collectives import Lane, axes_size, combine, join, split, travel_together
from metricfold.jax.ordering import from_sortable, to_sortable
from metricfold.jax.values import wide

__all__ = ["OPS", "Reduced", "Section", "reduce_arrays", "require_op"]


class Sum:
    """What one reduction does to arrays; others say what they do differently."""

    def computed_in(self, dtype: Any) -> Any:
        """Return the type that values of type `dtype` are reduced in."""
        return wide(dtype)

    def given_back_in(self, dtype: Any) -> Any:
        """Return the type of the result for values of type `dtype`."""
        return self.computed_in(dtype)

    def lanes(self, values: jax.Array, weights: jax.Array | None) -> list[Lane]:
        """Return what is sent of values, and of their weights, which only a mean has."""
        return [("sum", values)]

    def result(self, combined: list[jax.Array], dtype: Any, devices: int) -> jax.Array:
        """Return the result of values that were computed in `dtype`."""
        return combined[0]


class Mean(Sum):
    def computed_in(self, dtype: Any) -> Any:
        whole = jnp.issubdtype(dtype, jnp.integer) or dtype == jnp.bool_
        # JAX's float, said so that it promotes nothing: it may be told not to, and never does int4.
        return wide(jnp.result_type(float) if whole else dtype)

    def lanes(self, values: jax.Array, weights: jax.Array | None) -> list[Lane]:
        if weights is None:
            return [("sum", values)]
        # Nothing times NaN would be NaN; what has no weight must not be seen.
        counted = jnp.where(weights == 0, 0, values)
        return [("sum", counted * weights), ("sum", weights)]

    def result(self, combined: list[jax.Array], dtype: Any, devices: int) -> jax.Array:
        return combined[0] / (devices if len(combined) == 1 else combined[1])


class Max(Sum):
    reverse = False

    def given_back_in(self, dtype: Any) -> Any:
        return dtype

    def lanes(self, values: jax.Array, weights: jax.Array | None) -> list[Lane]:
        return [("max", to_sortable(values, reverse=self.reverse))]

    def result(self, combined: list[jax.Array], dtype: Any, devices: int) -> jax.Array:
        return from_sortable(combined[0], dtype, reverse=self.reverse)


class Min(Max):
    reverse = True


OPS: dict[str, Sum] = {"mean": Mean(), "sum": Sum(), "max": Max(), "min": Min()}


def require_op(op: object, where: str, choices: Sequence[str] = tuple(OPS)) -> None:
    """Raise a `ValueError` that lists the choices if `op` is none of them."""
    if op not in choices:
        raise ValueError(f"{where} is {op!r}, but must be one of {', '.join(map(repr, choices))}")


@dataclass(frozen=True, slots=True)
class Section:
    """What results of one op and type, joined, are of.

    Args:
        dtype: that they were computed in.
        indices: where they stood among the values that came in.
        shapes, dtypes: of each.
    """

    dtype: np.dtype[Any]
    indices: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[np.dtype[Any], ...]

    @property
    def words(self) -> int:
        """How many 32-bit words they take."""
        return sum(map(math.prod, self.shapes)) * self.dtype.itemsize // 4


@dataclass(frozen=True, slots=True)
class Reduced:
    """The results of a reduction, still joined by section."""

    sections: tuple[Section, ...]
    joined: tuple[jax.Array, ...]

    def arrays(self) -> list[jax.Array]:
        """Return the results, one per value that came in, in that order."""
        results: dict[int, jax.Array] = {}
        for section, joined in zip(self.sections, self.joined, strict=True):
            parts = split(joined, section.shapes)
            for i, part, dtype in zip(section.indices, parts, section.dtypes, strict=True):
                results[i] = part.astype(dtype)
        return [results[i] for i in range(len(results))]


def reduce_arrays(
    arrays: Sequence[jax.Array],
    ops: Sequence[str],
    axes: Axes,
    weights: Sequence[jax.Array] | None = None,
) -> Reduced:
    """Reduce each of `arrays` over all devices.

    Args:
        arrays: numbers; for max and min, not complex ones.
        ops: for each array one of `OPS`.
        axes: bound axes; with none, values are taken for those of a single device.
        weights: for means: per array a 0-d weight, or one of the array's shape.
    """
    computed = [OPS[op].computed_in(x.dtype) for op, x in zip(ops, arrays, strict=True)]
    inputs = [x.astype(dtype) for x, dtype in zip(arrays, computed, strict=True)]
    groups = travel_together(inputs, list(zip(ops, computed, strict=True)))
    sent = [
        OPS[ops[indices[0]]].lanes(
            join([inputs[i] for i in indices]), _joined(weights, inputs, indices)
        )
        for indices in groups
    ]
    came_back = iter(combine([lane for lanes in sent for lane in lanes], axes))
    devices = axes_size(axes)
    sections, joined = [], []
    for indices, lanes in zip(groups, sent, strict=True):
        op, dtype = OPS[ops[indices[0]]], computed[indices[0]]
        joined.append(op.result([next(came_back) for _ in lanes], dtype, devices))
        sections.append(
            Section(
                np.dtype(joined[-1].dtype),
                tuple(indices),
                tuple(inputs[i].shape for i in indices),
                tuple(np.dtype(op.given_back_in(arrays[i].dtype)) for i in indices),
            )
        )
    return Reduced(tuple(sections), tuple(joined))


def _joined(
    weights: Sequence[jax.Array] | None, inputs: Sequence[jax.Array], indices: Sequence[int]
) -> jax.Array | None:
    """Return the weights of a group: one number if they are the same, else joined like its values."""
    if weights is None:
        return None
    first = weights[indices[0]]
    # Complex values have real weights.
    dtype = inputs[indices[0]].real.dtype
    if first.ndim == 0 and all(weights[i] is first for i in indices):
        return first.astype(dtype)
    return join([jnp.broadcast_to(weights[i], inputs[i].shape).astype(dtype) for i in indices])
