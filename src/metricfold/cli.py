"""The command ``metricfold``.

Nothing heavy is imported before the arguments are known to be good: ``--help`` and mistakes are
answered at once, and also where the optional packages are not installed.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with `arguments` (default: those of the process); return its exit code."""
    chosen = _parser().parse_args(arguments)
    from metricfold.demo.run import run_demo  # noqa: PLC0415 - brings NumPy
    from metricfold.demo.texts import DemoError  # noqa: PLC0415

    try:
        run_demo(
            ranks=chosen.ranks,
            steps=chosen.steps,
            data=_by_name(chosen.data),
            out=chosen.out,
            resume=chosen.resume,
        )
    except DemoError as error:
        print(f"metricfold demo: {error}", file=sys.stderr)  # noqa: T201
        return 1
    except KeyboardInterrupt:
        print("metricfold demo: stopped", file=sys.stderr)  # noqa: T201
        return 130
    return 0
