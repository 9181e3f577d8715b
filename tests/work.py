"""How much work a call takes, where a time would depend on the machine."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

__all__ = ["lines_run"]


def lines_run(function: Callable[[], object], *modules: ModuleType) -> int:
    """Return how many lines of `modules` run while `function` is called, on this thread."""
    files = {str(Path(str(module.__file__))) for module in modules}
    lines = 0

    def count(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal lines
        if frame.f_code.co_filename not in files:
            return None
        lines += event == "line"
        return count

    sys.settrace(count)
    try:
        function()
    finally:
        sys.settrace(None)
    return lines
