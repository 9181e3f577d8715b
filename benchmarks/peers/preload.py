"""Imported once, before ranks are forked: they then start with every library in memory."""

from __future__ import annotations

import gc
import importlib
import warnings

from benchmarks.peers.libraries import LIBRARIES


def _import_all() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for library in LIBRARIES:
            try:
                library.load()
            except Exception:  # noqa: BLE001 - the rank that needs it says what is wrong
                continue
    importlib.import_module("benchmarks.peers.run")
    # What is imported stays; the collector need not look at it in each rank again.
    gc.collect()
    gc.freeze()


_import_all()
