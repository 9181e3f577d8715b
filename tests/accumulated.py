"""What accumulators on a device are held against: the same values, recorded one by one."""

from __future__ import annotations

import math
from typing import Any

from metricfold import MetricsAggregator

KINDS = {"mean": "mean", "sum": "sum", "max": "max", "min": "min", "len": "distribution"}
NAMES = ("a", "b", "c")
WEIGHTED = ("mean", "len")


def recorded(aggregator: MetricsAggregator, x: Any, w: Any, ids: Any) -> MetricsAggregator:
    """Record the values of each of KINDS; `w` weighs those of WEIGHTED."""
    for name, kind in KINDS.items():
        for value, weight, place in zip(x.tolist(), w.tolist(), ids.tolist(), strict=True):
            aggregator.record(
                name, value, kind, dataset=NAMES[place], weight=weight if name in WEIGHTED else 1.0
            )
    return aggregator


def check_equal(found: dict[str, float], wanted: dict[str, float], rtol: float = 1e-9) -> None:
    """Check percentiles to a bucket's width, the rest to `rtol`, counts and extrema exactly."""
    import numpy as np

    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if name.endswith(("count", "/max", "/min", "stat_max", "stat_min")):
            assert found[name] == value or math.isnan(value), name
        elif "stat_p" in name:
            np.testing.assert_allclose(found[name], value, rtol=2**-6, atol=1e-3, err_msg=name)
        else:
            np.testing.assert_allclose(found[name], value, rtol=rtol, err_msg=name)


def logged(acc: Any, window: str = "run") -> dict[str, float]:
    """Return what an accumulator says once it is drained."""
    aggregator = MetricsAggregator()
    aggregator.drain(acc)
    return aggregator.get_metrics_for_logging("t", window)
