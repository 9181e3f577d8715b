"""Metrics that stay on the device of a PyTorch program until a log needs them.

    from metricfold.torch import DeviceAccumulator

    acc = DeviceAccumulator({"loss": "mean"}, datasets=("alpaca", "orca"), device="cuda")
    loss = acc.token_loss(model(tokens), labels, dataset_ids)

Import it where it is needed: ``import metricfold`` alone does not load PyTorch.
"""

from __future__ import annotations

from importlib.util import find_spec

if find_spec("torch") is None:
    raise ImportError(
        "metricfold.torch needs torch, which is not installed: pip install 'metricfold[torch]'"
    )

from metricfold._core.runtime.published import publish
from metricfold._core.runtime.uncompiled import leave_alone
from metricfold.torch.accumulator import AccumulatorMark, DeviceAccumulator, PlacedMetric
from metricfold.torch.recomputing import once, recomputing
from metricfold.torch.watch import ModelWatch

__all__ = [
    "AccumulatorMark",
    "DeviceAccumulator",
    "ModelWatch",
    "PlacedMetric",
    "once",
    "recomputing",
]
publish(globals())

leave_alone()
