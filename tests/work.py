"""How much work a call takes, where a time would depend on the machine."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

__all__ = ["interrupted", "lines_run", "with_signal"]


def lines_run(function: Callable[[], object], *modules: ModuleType) -> int:
    """Return how many lines of `modules` run while `function` is called, on this thread."""
    lines = 0

    def count() -> None:
        nonlocal lines
        lines += 1

    _trace(function, modules, count)
    return lines


def with_signal(
    function: Callable[[], object], after: int, handler: Callable[[], object], *modules: ModuleType
) -> bool:
    """Call `function`, and `handler` where Python answers signals in it, after so many such places.

    These are where a function begins, and where one of C returns.

    Returns:
        whether there are as many.
    """
    files = {str(Path(str(module.__file__))) for module in modules}
    left = after

    def watch(frame: FrameType, event: str, argument: object) -> None:
        nonlocal left
        if event in ("call", "c_return") and frame.f_code.co_filename in files:
            left -= 1
            if left == -1:
                handler()

    sys.setprofile(watch)
    try:
        function()
    finally:
        sys.setprofile(None)
    return left < 0


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
