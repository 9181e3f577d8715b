"""Metrics across the devices of a JAX program, reduced inside the compiled step.

    from metricfold.jax import DistributedMetrics

    dm = DistributedMetrics()

    @jax.pmap
    def eval_step(params, batch):
        loss, hits = evaluate(params, batch)
        return dm.reduce_custom({"loss": loss, "hits": hits}, {"hits": "sum"})

Import it where it is needed: ``import metricfold`` alone loads neither JAX nor Flax.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec

_missing = [package for package in ("jax", "flax") if find_spec(package) is None]
if _missing:
    _python = ".".join(map(str, sys.version_info[:2]))
    raise ImportError(
        f"metricfold.jax needs jax and flax, and {' and '.join(_missing)} is not installed: "
        + (
            "pip install 'metricfold[jax]'"
            if sys.version_info >= (3, 11)
            else f"their versions that it works with need Python 3.11, and on this Python {_python} "
            "pip install 'metricfold[jax]' installs neither. Make an environment with Python 3.11 "
            "or newer"
        )
    )

from metricfold._core.runtime.published import publish  # noqa: E402 (after the check above)
from metricfold.jax.accumulator import DeviceAccumulator  # noqa: E402
from metricfold.jax.data_parallel import DataParallel  # noqa: E402
from metricfold.jax.distributed_metrics import DistributedMetrics  # noqa: E402
from metricfold.jax.exported import register as _register  # noqa: E402
from metricfold.jax.mesh import DeviceMeshManager  # noqa: E402
from metricfold.jax.packed import PackedMetrics  # noqa: E402

_register()

__all__ = [
    "DataParallel",
    "DeviceAccumulator",
    "DeviceMeshManager",
    "DistributedMetrics",
    "PackedMetrics",
]
publish(globals())
