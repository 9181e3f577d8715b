"""From samples to one `MetricBatch` per batch, in the workers that load the data."""

from metricfold.data.batch import MetricBatch
from metricfold.data.collator import MetricsCollator

__all__ = ["MetricBatch", "MetricsCollator"]
