"""`DeviceMeshManager`: meshes of devices, from sizes by name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

__all__ = ["DeviceMeshManager", "only_mesh"]

_made: dict[Mesh, None] = {}


def only_mesh() -> Mesh | None:
    """Return the mesh that `DeviceMeshManager` has made, if it is one, of all devices.

    None where there are several processes, each of which may have an accumulator of its own.
    """
    chosen = getattr(jax.config, "jax_default_device", None)
    if len(_made) != 1 or jax.process_count() > 1 or chosen is not None:
        return None
    (mesh,) = _made
    return mesh if mesh.size == jax.device_count() else None


class DeviceMeshManager:
    """Makes meshes over the devices there are.

    Their axes are of type ``Auto``: XLA finds the layout of what a jitted function computes.
    `jax.make_mesh` now makes ``Explicit`` ones, where JAX asks for the layout of many an operation;
    ask for them with ``axis_type=AxisType.Explicit``.

    Args:
        devices: the devices to use; by default all, of all processes.
    """

    def __init__(self, devices: Sequence[jax.Device] | None = None) -> None:
        self.devices = list(jax.devices() if devices is None else devices)

    def create_device_mesh(
        self,
        mesh_shape: Mapping[str, int] | Sequence[tuple[str, int]],
        devices: Sequence[jax.Device] | None = None,
        *,
        axis_type: AxisType = AxisType.Auto,
    ) -> Mesh:
        """Return a mesh of this shape, over the first devices if there are more.

        Args:
            mesh_shape: the size of each axis, as ``{"data": 4, "model": 2}`` or as
                ``[("data", 4), ("model", 2)]``.
            devices: the devices to use; by default those of this manager.
            axis_type: what JAX calls the type of all axes.

        Raises:
            ValueError: the shape needs more devices than there are, or is no shape.
        """
        names, sizes = _shape(mesh_shape)
        available = self.devices if devices is None else list(devices)
        needed = math.prod(sizes)
        if needed > len(available):
            product = " by ".join(f"{name}={size}" for name, size in zip(names, sizes, strict=True))
            raise ValueError(
                f"a mesh of {product} needs {needed} devices, and there are {len(available)}"
            )
        mesh = jax.make_mesh(
            sizes, names, axis_types=(axis_type,) * len(names), devices=available[:needed]
        )
        _made[mesh] = None
        return mesh

    def create_data_parallel_mesh(
        self,
        num_devices: int | None = None,
        axis_name: str = "data",
        *,
        axis_type: AxisType = AxisType.Auto,
    ) -> Mesh:
        """Return a mesh of one axis.

        Args:
            num_devices: its size; by default all devices.
            axis_name: its name.
            axis_type: see `create_device_mesh`.

        Raises:
            ValueError: there are fewer devices.
        """
        size = len(self.devices) if num_devices is None else num_devices
        return self.create_device_mesh({axis_name: size}, axis_type=axis_type)


def _shape(mesh_shape: Any) -> tuple[tuple[str, ...], tuple[int, ...]]:
    items = list(mesh_shape.items() if isinstance(mesh_shape, Mapping) else mesh_shape)
    sound = items and all(
        isinstance(item, (tuple, list))
        and len(item) == 2
        and isinstance(item[0], str)
        and isinstance(item[1], int)
        and item[1] > 0
        for item in items
    )
    if not sound:
        raise ValueError(
            f"mesh_shape={mesh_shape!r}: give the size of each axis, at least 1, by its name, such "
            'as {"data": 4, "model": 2} or [("data", 4), ("model", 2)]'
        )
    names, sizes = zip(*items, strict=True)
    if len(set(names)) < len(names):
        raise ValueError(f"mesh_shape={mesh_shape!r} names an axis twice")
    return names, sizes
