"""Stays for those who import from here: see `metricfold.data`."""

from metricfold.data.transform import *  # noqa: F403
