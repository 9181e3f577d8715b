"""From samples to one `MetricBatch` per batch, in the workers that load the data."""

from metricfold._core.fold.batch import MetricBatch
from metricfold._core.runtime.published import publish
from metricfold.data.collator import MetricsCollator
from metricfold.data.ids import DatasetIds
from metricfold.data.sample import metrics_of

__all__ = ["DatasetIds", "MetricBatch", "MetricsCollator", "metrics_of"]
publish(globals())
