"""Stays for batches that were pickled and imports from here: see `metricfold.data`."""

from metricfold._core.fold.batch import MetricBatch, _unpack_batch

__all__ = ["MetricBatch", "_unpack_batch"]
