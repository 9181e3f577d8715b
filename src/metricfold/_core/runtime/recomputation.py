"""Whether a call comes from a forward that has run, and counted, before.

A layer under activation checkpointing runs a second time in PyTorch's backward pass, and what it says
of itself must not count again. Outside of a backward pass everything counts; to find out takes 0.1 µs.
Inside of one, what the engine has called last decides, which is on the stack of this thread:

    a hook                                   counts: it runs once
    the backward of an autograd.Function     counts what it says itself; what it calls is a forward that
                                             it repeats (reentrant checkpoints, Megatron, DeepSpeed)
    the unpacking of a saved tensor          a repeated forward (non-reentrant and selective ones)

A hook by the name of `_recompute` repeats a forward, too (Megatron's checkpoints without output), and so
is repeated the hook of a gradient that a repeated forward takes. What no stack shows, such as an
optimizer's second evaluation, is for `metricfold.torch.recomputing` to say.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable
from inspect import currentframe
from types import FrameType
from typing import Any, TypeVar

__all__ = ["not_given_before", "open_blocks", "recomputed", "said", "unseen"]

T = TypeVar("T")


class _Said(threading.local):
    repeats: bool | None = None


said = _Said()
"""What `metricfold.torch.recomputing` says on this thread; None if nothing."""
open_blocks: set[object] = set()
"""The blocks of `recomputing` that are open, on any thread."""

_ENGINE = ("torch.autograd.graph", "_engine_run_backward")
_CHECKPOINT = ("torch.utils.checkpoint", "unpack_hook")
_NODES = "torch.autograd.function"
_TRACED_NODE = ("torch._dynamo.external_utils", "call_backward")  # of compiled autograd
_COMPILED = "torch._functorch._aot_autograd."
_WRAPPERS = (_NODES, "torch.amp.autocast_mode", "torch.utils._contextlib")
"""Modules of what may stand between a node and the `backward` that its author wrote."""


def recomputed() -> bool:
    """Return whether this call comes from a forward that has counted before."""
    if _task() == -1 and not open_blocks:
        return False
    if said.repeats is not None:
        return said.repeats
    return _task() != -1 and _is_repeated(currentframe())


def not_given_before(metrics: Iterable[str]) -> str:
    """Return what to tell the user of metrics that a repeated forward gives, and no first one has."""
    return (
        f"{', '.join(metrics)} came only from a forward that PyTorch runs again in the backward pass "
        "(activation checkpointing), where nothing counts, so it is lost: give it in the first forward "
        "as well, or in a hook, or inside of `with metricfold.torch.recomputing(False):`"
    )


def unseen(call: Callable[..., T], *args: Any) -> T:
    """Return what `call` returns, of whose operations no selective checkpoint knows.

    One counts the operations of a forward, to give the repeated one what it has saved. That one lacks
    ours, and would get their results for those of the layer.
    """
    torch = sys.modules["torch"]
    if not torch._C._len_torch_dispatch_stack():  # noqa: SLF001
        return call(*args)
    from torch.utils import _python_dispatch as dispatch  # noqa: PLC0415 - loaded with torch
    from torch.utils import checkpoint  # noqa: PLC0415

    names = ("_CachingTorchDispatchMode", "_CachedTorchDispatchMode")
    selective = tuple(getattr(checkpoint, name) for name in names if hasattr(checkpoint, name))
    modes = dispatch._get_current_dispatch_mode_stack()  # noqa: SLF001
    others = [mode for mode in modes if not isinstance(mode, selective)]
    if len(others) == len(modes):
        return call(*args)
    with dispatch._disable_current_modes():  # noqa: SLF001
        for mode in others:
            dispatch._push_mode(mode)  # noqa: SLF001
        try:
            return call(*args)
        finally:
            for _ in others:
                dispatch._pop_mode()  # noqa: SLF001


def _task_of_torch() -> int:
    global _task  # noqa: PLW0603
    found = getattr(getattr(sys.modules.get("torch"), "_C", None), "_current_graph_task_id", None)
    if found is None:
        return -1
    _task = found
    return _task()


_task: Callable[[], int] = _task_of_torch
"""Which backward pass this thread works on, -1 for none; torch's own, once torch is there."""


def _is_repeated(frame: FrameType | None) -> bool:
    """Return whether a repeated forward is on the stack, seen from `frame` inside of a backward pass."""
    below, depth, once, own_thread = None, 0, False, False
    while frame is not None:
        module, name = _module(frame), frame.f_code.co_name
        if (module, name) == _CHECKPOINT:
            return True
        if (module, name) == _ENGINE:
            if _repeats_by_name(below):
                return True
            once = own_thread = True  # a hook, or what a backward has begun
        elif _runs_a_backward(frame):
            # Of a compiled graph, which holds what has been traced, nothing runs twice.
            if depth > 1 and not once and not _module(below).startswith(_COMPILED):
                return True
            once = True
        elif module not in _WRAPPERS and not module.startswith("metricfold."):
            depth += 1
        below, frame = frame, frame.f_back
    # The engine's own threads, those of GPUs, have no stack of who has called `backward`.
    return not own_thread and (_repeats_by_name(below) or bool(open_blocks))


def _module(frame: FrameType | None) -> str:
    return "" if frame is None else str(frame.f_globals.get("__name__"))


def _runs_a_backward(frame: FrameType) -> bool:
    """Return whether this calls the backward of an `autograd.Function`; a forward's `apply` has cls."""
    module, code = _module(frame), frame.f_code
    if module == _NODES:
        return code.co_name.startswith("apply") and code.co_varnames[0] == "self"
    return (module, code.co_name) == _TRACED_NODE


def _repeats_by_name(called: FrameType | None) -> bool:
    """Return whether what the engine has called directly is no hook, going by its name."""
    name = "" if called is None else called.f_code.co_name
    return "unpack" in name or "recompute" in name
