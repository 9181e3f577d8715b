"""A CPU as so many devices of JAX."""

from __future__ import annotations

import os

__all__ = ["virtual_devices"]


def virtual_devices(number: int) -> dict[str, str]:
    """Return the environment in which JAX, once imported, takes this CPU for so many devices.

    XLA runs the devices on a pool of as many threads as there are cores. A device that waits for
    the others in a collective holds one, and so does each device's next program while too many are
    under way. With fewer than two a device, the one that all wait for may never get a thread, and
    XLA aborts the process after 40 seconds.
    """
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={number}"
    threads = max(2 * number, os.cpu_count() or 1)
    return {"XLA_FLAGS": flags.strip(), "JAX_PLATFORMS": "cpu", "PJRT_NPROC": str(threads)}
