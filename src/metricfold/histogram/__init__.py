"""Histograms: a mergeable sketch of any number of values, and the record that sinks draw.

Four questions, four files: *which bucket is this value in* (`indexing`), *which buckets are kept,
and how fine* (`layout`), *how are their contents stored, folded and re-binned* (`grid`), and *what
do they say about the values* (`estimation`). `sketch` joins them in `LogLinearHistogram`; `contents`
is what it holds in the form that merges, `wire` and `plain` write that as lanes for collectives
and as plain types for checkpoints.
"""

from metricfold.histogram.indexing import bucket_index
from metricfold.histogram.record import Histogram
from metricfold.histogram.sketch import LogLinearHistogram
from metricfold.histogram.wire import EXTENTS_WIDTH, slot_width

__all__ = ["EXTENTS_WIDTH", "Histogram", "LogLinearHistogram", "bucket_index", "slot_width"]
