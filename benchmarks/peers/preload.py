"""Imported once, before ranks are forked: they then start with every library in memory."""

from __future__ import annotations

import contextlib
import gc
import warnings

from benchmarks.peers.libraries import LIBRARIES

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for library in LIBRARIES:
        # The rank that needs it says what is wrong.
        with contextlib.suppress(Exception):
            library.load()
# What is imported stays; the collector need not look at it in each rank again.
gc.collect()
gc.freeze()
