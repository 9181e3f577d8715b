"""The histogram of a distribution, as sinks draw it, and the sketch that it is made from."""

from metricfold._core.runtime.published import publish
from metricfold._core.sketch import Histogram, LogLinearHistogram, bucket_index

__all__ = ["Histogram", "LogLinearHistogram", "bucket_index"]
publish(globals())
