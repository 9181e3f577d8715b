"""From samples to one `MetricBatch` per batch, in the workers that load the data."""

from metricfold._core.fold.batch import MetricBatch
from metricfold._core.runtime.published import publish
from metricfold.data.collator import MetricsCollator

__all__ = ["MetricBatch", "MetricsCollator"]
publish(globals())
