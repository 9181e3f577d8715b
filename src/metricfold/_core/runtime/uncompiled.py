"""Calls that `torch.compile` leaves alone.

    @uncompiled
    class MetricsAggregator:
        def record(self, name, value): ...

What works with metrics on the host has nothing for a compiler, which would break it into pieces, and
takes NumPy for torch. A wrapper, as of `torch.compiler.disable`, would take as long as `record` itself,
and an import of torch. But Dynamo asks a function by an attribute whether it is disabled; and it has a
table of the code that is to run as it is, with all that it calls.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from inspect import isfunction
from types import CodeType
from typing import TypeVar

__all__ = ["leave_alone", "uncompiled"]

T = TypeVar("T", bound=Callable[..., object])

_REASON = "it works with metrics on the host; inside of a graph, update a DeviceAccumulator"
_waiting: list[CodeType] = []
"""Code that is not in Dynamo's table yet: torch may be imported after metricfold."""


def uncompiled(marked: T) -> T:
    """Mark a function, or all public ones of a class, as calls that `torch.compile` leaves alone."""
    functions = [marked] if isfunction(marked) else vars(marked).values()
    for function in functions:
        if isfunction(function) and not function.__name__.startswith("_"):
            vars(function).update(_torchdynamo_disable=True, _torchdynamo_disable_msg=_REASON)
            _waiting.append(function.__code__)
    return marked


def leave_alone() -> None:
    """Tell Dynamo of all that is marked, if torch is there; for the constructors of what is."""
    if not _waiting or "torch" not in sys.modules:
        return
    marked = _waiting.copy()
    _waiting.clear()
    try:
        from torch._C._dynamo.eval_frame import (  # noqa: PLC0415 - torch is an extra
            _FrameAction,
            _FrameExecStrategy,
            set_code_exec_strategy,
        )
    except ImportError:  # of older torch, whose table knows no calls: the attribute has to do
        return
    skip = _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP)
    for code in marked:
        set_code_exec_strategy(code, skip)
