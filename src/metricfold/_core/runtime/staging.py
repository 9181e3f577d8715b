"""Whether a call comes from a function that JAX traces, where Python runs once for all steps.

    refuse_while_traced("record", "loss")     raises a TypeError that says what to do instead

What traces (`jit`, `scan`, `pmap`, `eval_shape`, ...) is told by what it all shares: a new array is a
tracer. It is none under `grad`, `vmap` and `disable_jit` alone, nor in a callback: there Python runs
each time, and counts. To find out takes 0.1 µs while JAX is not imported; after that JAX's own word for
"nothing is traced on this thread" is asked first.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from metricfold._core.runtime.imported import is_of

__all__ = ["NO_NUMBER", "is_traced", "refuse_while_traced"]

_INSIDE = (
    "update a metricfold.jax.DeviceAccumulator inside, or make the call from a jax.debug.callback"
)
NO_NUMBER = (
    "a traced value has no number yet: return it from the function (with has_aux=True under grad) and "
    f"make the call outside, {_INSIDE}"
)
"""What to tell who gives such a value."""


def refuse_while_traced(call: str, name: object = None, *given: object) -> None:
    """Raise a TypeError if JAX traces the function that makes `call`.

    Args:
        call: the method's name.
        name: of the metric, if it is about one.
        given: values of that metric.
    """
    if _traced():
        if any(map(is_traced, given)):
            raise TypeError(f"metric {name!r:.80}: {NO_NUMBER}")
        about = "" if name is None else f"{name!r:.80}"
        raise TypeError(
            f"{call}({about}) is called in a function that JAX traces (jit, scan, pmap, shard_map, "
            "eval_shape or the like). Python runs there once, when the function is traced, and not at "
            "each step, so that a number would count once: return what it is about from the function "
            f"and make the call outside, {_INSIDE}"
        )


def is_traced(value: object) -> bool:
    """Return whether `value` is one that JAX traces."""
    return is_of(value, "jax.core", "Tracer")


def _traced_by_jax() -> bool:
    jax: Any = sys.modules.get("jax")
    if getattr(jax, "lax", None) is None:  # not imported yet, or not all of it
        return False
    global _traced  # noqa: PLW0603
    core: Any = sys.modules.get("jax._src.core")
    context: Any
    context, evaluating = getattr(core, "trace_ctx", None), getattr(core, "eval_trace", None)
    if not hasattr(context, "trace") or evaluating is None:  # this JAX says it elsewhere
        _traced = _new_arrays_are_traced
    else:
        _traced = lambda: context.trace is not evaluating and _new_arrays_are_traced()  # noqa: E731
    return _traced()


def _new_arrays_are_traced() -> bool:
    jax = sys.modules["jax"]
    with jax.transfer_guard("allow"):
        return isinstance(jax.lax.iota("int32", 1), jax.core.Tracer)


_traced: Callable[[], bool] = _traced_by_jax
"""Whether JAX traces what this thread runs; found out how once JAX is there."""
