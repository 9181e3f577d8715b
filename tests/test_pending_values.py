"""Where nobody logs, what lies on devices does not pile up without end; a warning says so, once."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from handlers_of_users import RMSHandler
from jax_devices import on_devices

from metricfold import AggregationType, Metric, MetricsAggregator

_MANY = 4096
"""As many as may wait here; what is promised does not depend on how many that are."""


@contextmanager
def bounded() -> Iterator[None]:
    from metricfold._core.intake import inbox

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inbox, "MOST_PENDING", _MANY)
        yield


class _Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())

    def __enter__(self) -> list[str]:
        logging.getLogger("metricfold").addHandler(self)
        return self.texts

    def __exit__(self, *_: object) -> None:
        logging.getLogger("metricfold").removeHandler(self)


@on_devices(1)
def test_values_that_nobody_logs_are_read_and_let_go_of_and_count_all_the_same() -> None:
    import jax.numpy as jnp

    aggregator = MetricsAggregator(dist_window_size=None)
    first = [jnp.float32(i) for i in range(10)]
    held = [weakref.ref(array) for array in first]
    deleted = jnp.float32(7)
    one = jnp.float32(1)
    aggregator.record("lost", deleted)
    deleted.delete()
    with bounded(), _Warnings() as texts:
        for array in first:
            aggregator.record("loss", array, dataset="d")
        del first, array
        for _ in range(12):
            aggregator.update([Metric("d", "loss", one, "mean")] * 1024)
            aggregator.record("len", one, "distribution", dataset="d")
            aggregator.record("len", 3.0, "distribution", dataset="d")  # behind those on the device
    assert len(texts) == 1, texts
    assert "values on a device (metric 'lost', metric 'loss' of dataset 'd'" in texts[0]
    assert [ref() for ref in held] == [None] * 10
    with pytest.raises(RuntimeError, match=r"'lost': the JAX array was donated or deleted"):
        aggregator.reduce()
    logged = aggregator.get_metrics_for_logging("t")
    assert logged["t_d/loss"] == (45.0 + 12 * 1024) / (10 + 12 * 1024)
    assert (logged["t_d/len_stat_mean"], logged["t_d/len_stat_min"]) == (2.0, 1.0)
    # Also where each value is large.
    large = jnp.ones(2**20)
    held = [weakref.ref(large)]
    with _Warnings() as texts:
        for _ in range(17):
            aggregator.record("large", large, "sum", each=True)
            large = large * 1
    assert held[0]() is None
    assert aggregator.reduce().value(None, "large", window="interval") == 17 * 2**20
    assert texts == []  # said once


@on_devices(1)
def test_accumulators_and_values_of_handlers_without_lanes_are_bounded_too() -> None:
    import jax
    import jax.numpy as jnp

    from metricfold.jax import DeviceAccumulator

    aggregator = MetricsAggregator()
    accumulator = DeviceAccumulator({"loss": "sum"}).update("loss", jnp.ones(2))
    arrays = weakref.ref(jax.tree.leaves(accumulator)[0])
    with _Warnings() as texts:
        for _ in range(200):
            empty = aggregator.drain(accumulator)
            accumulator = empty.update("loss", 1.0)
    assert len(texts) == 1, texts
    assert "drained accumulators wait for a log" in texts[0]
    assert arrays() is None
    assert aggregator.get_metrics_for_logging("t") == {"t/loss": 201.0}

    rms = MetricsAggregator()
    rms.register_handler(AggregationType.MEAN, RMSHandler())
    value = jnp.float32(3)
    with bounded(), _Warnings() as texts:
        for _ in range(5):
            rms.update([Metric("d", "rms", value, "mean")] * 1024)
    assert len(texts) == 1, texts
    assert len(rms._held.inbox._stage.below.custom) < _MANY
    logged: dict[str, Any] = rms.get_metrics_for_logging("t")
    assert logged["t_d/rms"] == pytest.approx(3.0)
