"""What finds frameworks among the modules that are loaded finds them half loaded, too."""

from __future__ import annotations

import sys
from types import ModuleType

import numpy as np
import pytest

from metricfold import Metric, MetricsAggregator

HALF = ("numpy.ma", "torch", "torch.distributed", "torch.distributed.tensor", "jax", "jax.core")


@pytest.mark.parametrize("name", HALF)
def test_a_module_that_another_thread_is_importing_disturbs_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A log in the background was given up where training imported `numpy.ma` just then."""
    monkeypatch.setitem(sys.modules, name, ModuleType(name))  # as at the beginning of an import
    aggregator = MetricsAggregator()
    aggregator.record("n", 1, "sum")
    aggregator.record("n", np.float32(2), "sum")
    aggregator.record("n", np.array([3.0, 4.0]), "sum", each=True)
    aggregator.record("loss", 0.5, weight=np.float64(2))
    aggregator.update([Metric("d", "of", 5.0, "sum")])
    logged = aggregator.get_metrics_for_logging("t")
    assert logged == {"t/n": 10.0, "t/loss": 0.5, "t_d/of": 5.0}
