"""To say what runs a second time, `once` and `recomputing`; and to ask from inside of a graph, `counts`.

    optimizer.step(metricfold.torch.once(closure))           # LBFGS evaluates it up to 20 times

    with metricfold.torch.recomputing():                     # at other weights, as SAM does
        loss_of(model, batch).backward()

Activation checkpointing needs neither: `metricfold._core.runtime.recomputation` says how it is recognised.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from metricfold._core.runtime.recomputation import open_blocks, recomputed, said

__all__ = ["asked", "counts", "once", "recomputing"]

T = TypeVar("T")


@contextlib.contextmanager
def recomputing(repeats: bool = True) -> Iterator[None]:
    """Say that what runs inside has run before: no metric that it gives counts again.

    That goes for what aggregators and accumulators take in on this thread, and in the backward passes
    that it begins. It may decorate a function; of nested ones the inner decides.

    Args:
        repeats: False says that what runs inside has not run before, and counts, although it is part
            of a backward pass.

    >>> from metricfold import MetricsAggregator
    >>> aggregator = MetricsAggregator()
    >>> aggregator.record("loss", 1.0)
    >>> with recomputing():
    ...     aggregator.record("loss", 5.0)
    >>> aggregator.get_metrics_for_logging("train")
    {'train/loss': 1.0}
    """
    before, block = said.repeats, object()
    said.repeats = repeats
    if repeats:
        open_blocks.add(block)
    try:
        yield
    finally:
        open_blocks.discard(block)
        said.repeats = before


def once(closure: Callable[[], T]) -> Callable[[], T]:
    """Let only the first evaluation of `closure` in an optimizer's step give metrics.

    An optimizer such as LBFGS evaluates its closure several times, the first time at the weights that
    the step begins with.

    Args:
        closure: what an optimizer calls. If it is given to several steps of a `torch.optim.Optimizer`,
            the first evaluation in each counts; for an optimizer of another kind call `once` anew for
            each step.

    >>> from metricfold import MetricsAggregator
    >>> aggregator = MetricsAggregator()
    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> optimizer = torch.optim.LBFGS([weight])
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = (weight - 3).square().sum()
    ...     loss.backward()
    ...     aggregator.record("loss", loss)
    ...     return loss
    >>> _ = optimizer.step(once(closure))
    >>> aggregator.get_metrics_for_logging("train")
    {'train/loss': 8.0}
    """
    _watch_steps()
    return _Once(closure)


class _Once(Generic[T]):
    def __init__(self, closure: Callable[[], T]) -> None:
        functools.update_wrapper(self, closure)
        self._closure = closure
        self.evaluated = False

    def __call__(self) -> T:
        first, self.evaluated = not self.evaluated, True
        with contextlib.nullcontext() if first else recomputing():
            return self._closure()


@functools.cache
def _watch_steps() -> None:
    def begin(_: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for given in (*args, *kwargs.values()):
            if isinstance(given, _Once):
                given.evaluated = False

    register_optimizer_step_pre_hook(begin)


# -- Inside of a graph

asked: set[torch.device] = set()
"""Devices on which graphs have asked whether they count."""

_library: Any = torch.library.Library("metricfold", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("counts(Tensor like) -> Tensor")


def _counts(like: Tensor) -> Tensor:
    asked.add(like.device)
    return torch.full((), not recomputed(), device=like.device)


def _fake_counts(like: Tensor) -> Tensor:
    return torch.empty((), dtype=torch.bool, device=like.device)


_library.impl("counts", _counts, "CompositeExplicitAutograd")
torch.library.register_fake("metricfold::counts", _fake_counts, lib=_library)


def counts(like: Tensor) -> Tensor:
    """Return whether a forward counts, as a flag on the device of `like`.

    A graph asks when it runs, since it is traced once, for a forward and its repetition alike.
    """
    flag: Tensor = torch.ops.metricfold.counts(like)
    return flag
