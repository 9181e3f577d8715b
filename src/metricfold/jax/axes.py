"""Which axes to reduce over.

`jax.pmap`, `jax.shard_map` and ``jax.vmap(axis_name=)`` bind an axis; under plain `jax.jit` none is bound,
as a value there is that of the whole batch. `lax` collectives return their input when they are given no
axes, so that a forgotten name would go unseen. Here it is an error, which says what is bound.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import jax
from jax import lax
from jax.sharding import get_abstract_mesh

__all__ = [
    "DEFAULT_AXIS",
    "Axes",
    "AxisName",
    "bound_axes",
    "is_bound",
    "knows_what_varies",
    "resolve_axes",
    "varying",
]

AxisName: TypeAlias = "str | tuple[str, ...] | None"
Axes: TypeAlias = tuple[str, ...]

DEFAULT_AXIS = "batch"
"""The name that stands for the one bound axis, whatever that is called."""


def resolve_axes(axis_name: AxisName) -> Axes:
    """Return the bound axes that `axis_name` means; none only for ``None``.

    * A name or a tuple of names: those axes.
    * ``"batch"`` where no axis has that name: the one axis that ``pmap`` or ``shard_map`` binds.
    * ``None``: all axes that ``pmap`` and ``shard_map`` bind, which under plain ``jit`` are none.
      It does not see the axes of ``vmap``: name those.

    Raises:
        NameError: an axis is not bound, or ``"batch"`` could mean several.
        TypeError: no name, tuple of names, or None.
        ValueError: an empty tuple, or an axis that is named twice.
    """
    if axis_name is None:
        return bound_axes()
    given = (axis_name,) if isinstance(axis_name, str) else axis_name
    if not isinstance(given, (tuple, list)) or not all(isinstance(name, str) for name in given):
        raise TypeError(f"axis_name={axis_name!r}: give a name, a tuple of names, or None")
    names = tuple(given)
    if not names:
        raise ValueError(
            "axis_name=() names no axis: name one, or give None for all that there are"
        )
    if len(set(names)) < len(names):
        raise ValueError(f"axis_name={names!r} names an axis twice")
    unbound = [name for name in names if not is_bound(name)]
    if not unbound:
        return names
    bound = bound_axes()
    if names == (DEFAULT_AXIS,) and len(bound) == 1:
        return bound
    raise NameError(_not_bound(unbound[0], bound))


def bound_axes() -> Axes:
    """Return the axes that ``pmap`` and ``shard_map`` bind here."""
    return tuple(get_abstract_mesh().manual_axes)


def is_bound(name: str) -> bool:
    """Tell whether a collective over `name` is possible here."""
    try:
        lax.axis_size(name)
    except NameError:
        return False
    return True


def knows_what_varies(axes: Axes) -> bool:
    """Return whether JAX tells apart what is the same over bound `axes`: `shard_map` with `check_vma`."""
    return bool(varying(lax.axis_index(axes)))


def varying(array: jax.Array) -> frozenset[str]:
    """Return the bound axes over which an array is known to differ: none where JAX does not tell."""
    kind: Any = jax.typeof(array)
    # Releases of JAX call it differently.
    told = kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying
    return frozenset(told)


def _not_bound(name: str, bound: Axes) -> str:
    ways = (
        f"by jax.pmap(step, axis_name={name!r}), jax.shard_map over a mesh with an axis {name!r}, "
        f"or jax.vmap(step, axis_name={name!r})"
    )
    if len(bound) == 1:
        return (
            f"the axis {name!r} is not bound here, but {bound[0]!r} is: leave axis_name out to use "
            f"that, or bind {name!r}, {ways}"
        )
    if bound:
        return (
            f"the axis {name!r} is not bound here, but {', '.join(map(repr, bound))} are: give one "
            f"of them as axis_name, a tuple, or None for all of them; or bind {name!r}, {ways}"
        )
    mesh = get_abstract_mesh()
    where = (
        f"{name!r} is an axis of the mesh, but bound only inside jax.shard_map"
        if name in mesh.axis_names
        else f"the axis {name!r} is not bound here, nor is any other"
    )
    return (
        f"{where}. Bind it, {ways}. Under plain jax.jit values are already those of the whole "
        "batch: call nothing there, or give axis_name=None, which then changes nothing"
    )
