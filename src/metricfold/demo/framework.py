"""What the demo's loops have in common, and what differs between the frameworks."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from metricfold.demo.mixture import Cut, cut_by_time, cut_evenly

__all__ = ["FRAMEWORKS", "LOG_EVERY", "ON_SCREEN", "SAVE_EVERY", "Framework", "virtual_devices"]

LOG_EVERY = 10
SAVE_EVERY = 50  # after a validation pass
ON_SCREEN = [
    *("*/loss", "*/perplexity", "*/grad_norm", "*/grad_norm_*", "*/tok*"),
    *("*/seq_len_stat_mean", "*/seq_len_stat_std", "*/seq_len_stat_p50", "*/kind*"),
    *("*/data_seconds", "*/data_share", "*/data_slowest_*"),
]


@dataclass(frozen=True, slots=True)
class Framework:
    """One framework."""

    name: str  # what --framework takes
    title: str  # what people call it
    part: str  # what the samples of a step are split over
    parts: int  # how many of them there are by default
    steps: int  # how many there are by default: a minute's, about
    module: str  # the training loop
    checkpoint: str  # the name of the file that it saves to
    cut: Cut  # how a step is cut into shares
    packages: Mapping[str, str]  # what it needs, and in which of our extras it is, if in any


_SINKS = {"rich": "console", "tensorboard": "tensorboard"}

FRAMEWORKS = MappingProxyType(
    {
        "torch": Framework(
            name="torch",
            title="PyTorch",
            part="rank",
            parts=2,
            steps=200,
            module="metricfold.demo.train",
            checkpoint="checkpoint.pt",
            cut=cut_by_time,
            packages={"torch": "torch", **_SINKS},
        ),
        "jax": Framework(
            name="jax",
            title="JAX",
            part="device",
            parts=4,
            steps=60,
            module="metricfold.demo.jax.train",
            checkpoint="checkpoint.npz",
            cut=cut_evenly,
            packages={"jax": "jax", "flax": "jax", "optax": "", **_SINKS},
        ),
    }
)


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
