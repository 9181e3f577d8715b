"""Statistics of what chosen modules return, eager, compiled or checkpointed; once per forward.

The `forward` of a module's instance is wrapped, for on that `torch.compile` guards; on hooks it does not,
and one that is added after a model has been compiled does nothing there, without a word. Whether a step
is due is a flag on the host: a compiled model has two graphs, and that of the other steps has nothing
of this in it.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metricfold._core.fold.axes import Axis
from metricfold._core.runtime.recomputation import recomputed
from metricfold.torch.recomputing import counts
from metricfold.torch.statistics import OCTAVES, Statistics

__all__ = ["Activations", "bare", "matches"]

MODULE = "module"
"""The axis of what is collected."""

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")
"""Parts of a parameter's name that only say how the model is wrapped."""


class Activations:
    """Watches the first output of each module that a pattern names.

    Args:
        model: whose modules.
        patterns: of their names.
        octaves: as in `Statistics`, as is `compiled`, which does not matter here.

    Attributes:
        due: whether what is returned now counts.

    Raises:
        ValueError: no module matches.
    """

    def __init__(
        self, model: nn.Module, patterns: Sequence[str], *, octaves: bool, compiled: bool
    ) -> None:
        named = ((bare(name), module) for name, module in model.named_modules() if name)
        self._modules = {name: one for name, one in named if matches(name, patterns)}
        if not self._modules:
            raise ValueError(f"activations={list(patterns)!r} matches no module of the model")
        device = next((one.device for one in model.parameters()), torch.device("cpu"))
        self._statistics = Statistics(len(self._modules), device, octaves=octaves)
        self._like = self._statistics.state.new_empty(0)
        self.due = True
        for row, module in enumerate(self._modules.values()):
            module.forward = self._watched(module.forward, row)

    def close(self) -> None:
        """Let modules be as they were."""
        for module in self._modules.values():
            vars(module).pop("forward", None)  # the class's own shows again

    def part(self) -> tuple[str, Axis, Mapping[str, int], Statistics]:
        """Return what has been collected, as `ModelWatch.parts` does."""
        # An activation has no size of its own: all that was seen is all there is.
        return "activation", Axis(MODULE, 0, tuple(self._modules)), {}, self._statistics

    def _watched(self, forward: Callable[..., Any], row: int) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            if self.due:
                self._collect(row, output)
            return output

        return watched

    @torch.no_grad()
    def _collect(self, row: int, output: Any) -> None:
        x = output[0] if isinstance(output, tuple) and output else output
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return
        compiling = torch.compiler.is_compiling()
        if not compiling and recomputed():
            return
        state = self._statistics.state
        x = x.detach()
        finite = x.isfinite()
        y = torch.where(finite, x, 0.0).double()
        number = torch.full((), float(x.numel()), dtype=torch.float64, device=x.device)
        good = finite.sum().double()
        sums = torch.stack(
            [number, number - good, (x == 0).sum().double(), good, y.sum(), y.square().sum()]
        )
        largest = y.abs().amax()
        if compiling:
            # A compiled module inside of an eager checkpoint runs twice.
            flag = counts(self._like)
            sums, largest = torch.where(flag, sums, 0.0), torch.where(flag, largest, 0.0)
        width = sums.shape[0]
        state[row, :width].add_(sums)
        state[row, width : width + 1].copy_(torch.maximum(state[row, width : width + 1], largest))
        if state.shape[1] > width + 1:
            counted = (finite & (x != 0)).double().reshape(-1)
            if compiling:
                counted = torch.where(flag, counted, 0.0)
            octave = (torch.frexp(y)[1] + 63).clamp(0, OCTAVES - 1).long().reshape(-1)
            state[row, width + 1 :].index_add_(0, octave, counted)


def bare(name: str) -> str:
    """Return the name of a parameter or module without what wrappers add to it.

    >>> bare("module._orig_mod.layers.0._checkpoint_wrapped_module.up.weight")
    'layers.0.up.weight'
    """
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name.removeprefix("module.")


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Return whether one of the patterns, as a shell has them, matches a name."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
