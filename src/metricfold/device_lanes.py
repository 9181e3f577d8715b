"""Stays for accumulators that were pickled with it."""

from metricfold._core.device.rows import Layout

__all__ = ["Layout"]
