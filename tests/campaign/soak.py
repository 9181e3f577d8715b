"""Make and close aggregators and loggers over and over: threads, descriptors and memory stay as they are."""

from __future__ import annotations

import gc
import os
import tempfile
import threading
import time
from pathlib import Path

from campaign.table import Options, Row, Table, main
from metricfold import ConsoleSink, JSONLSink, MetricsAggregator, MetricsLogger

PAGE = os.sysconf("SC_PAGE_SIZE")


def memory() -> int:
    """Return the bytes that this process has in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def settled_threads() -> int:
    """Return the number of threads, once those that are about to end have done so."""
    least, since = threading.active_count(), time.monotonic()
    while time.monotonic() < since + 1.0:
        gc.collect()
        time.sleep(0.05)
        least = min(least, threading.active_count())
    return least
