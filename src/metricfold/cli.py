"""The command ``metricfold``.

Nothing heavy is imported before the arguments are known to be good: ``--help`` and mistakes are
answered at once, also where the optional packages are not installed.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import metricfold

__all__ = ["main"]
