"""How much work a call takes, where a time would depend on the machine."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

__all__ = ["interrupted", "lines_run"]


def lines_run(function: Callable[[], object], *modules: ModuleType) -> int:
    """Return how many lines of `modules` run while `function` is called, on this thread."""
    lines = 0

    def count() -> None:
        nonlocal lines
        lines += 1

    _trace(function, modules, count)
    return lines


def interrupted(function: Callable[[], object], after: int, *modules: ModuleType) -> bool:
    """Call `function`, as if ctrl-C were pressed after so many lines of `modules`.

    Returns:
        whether that was before it had returned.
    """
    left = after

    def count() -> None:
        nonlocal left
        left -= 1
        if left == -1:
            raise KeyboardInterrupt

    try:
        _trace(function, modules, count)
    except KeyboardInterrupt:
        return True
    return False


def _trace(
    function: Callable[[], object], modules: tuple[ModuleType, ...], on_line: Callable[[], None]
) -> None:
    files = {str(Path(str(module.__file__))) for module in modules}

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            on_line()
        return trace

    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(None)
