"""Statistics of what chosen modules return, eager, compiled or checkpointed; once per forward.

The `forward` of a module's instance is wrapped, for on that `torch.compile` guards; on hooks it does not,
and one that is added after a model has been compiled does nothing there, without a word. Whether a step
is due is a flag on the host: a compiled model has two graphs, and that of the other steps has nothing
of this in it.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack

from metricfold._core.device.arrays import of_mesh
from metricfold._core.device.watched import matches
from metricfold._core.runtime.recomputation import recomputed, unseen
from metricfold.metric import escaped
from metricfold.torch.recomputing import counts
from metricfold.torch.statistics import Statistics, add_of_one

__all__ = ["Activations", "named"]

_logger = logging.getLogger("metricfold")

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")
"""Parts of a name that only say how the model is wrapped."""


class Activations:
    """Watches the first output of each module that a pattern names, as long as it is in training mode.

    Args:
        model: whose modules.
        patterns: of their names.
        octaves: as in `Statistics`.

    Attributes:
        names: of the modules, sorted.
        statistics: what has been collected.
        due: whether what is returned now counts; set by `look`.
        seen: whether that has been so at all since they were emptied.

    Raises:
        ValueError: no module matches.
    """

    def __init__(self, model: nn.Module, patterns: Sequence[str], *, octaves: bool) -> None:
        modules = named((name, module) for name, module in model.named_modules() if name)
        chosen = {name: one for name, one in modules.items() if matches(name, patterns)}
        if not chosen:
            raise ValueError(
                f"activations={list(patterns)!r} matches no module of the model, which has: "
                f"{', '.join(modules)[:300] or 'none'}"
            )
        self.names = tuple(chosen)
        device = next((one.device for one in model.parameters()), torch.device("cpu"))
        self.statistics = Statistics(len(chosen), device, octaves=octaves)
        self._like = self.statistics.state.new_empty(0)
        self.due = self.seen = self._told = False
        self._watched = [_Watched(self, row, module) for row, module in enumerate(chosen.values())]

    def look(self, due: bool) -> None:
        """Say whether what is returned from now on counts."""
        self.due, self.seen = due, self.seen or due

    def clear(self) -> None:
        """Forget what has been collected."""
        self.statistics.clear()
        self.seen = self.due

    def close(self) -> None:
        """Let modules be as they were."""
        for one in self._watched:
            one.close()

    @torch.no_grad()
    def collect(self, row: int, output: Any) -> None:
        """Take in the first tensor of what a module has returned."""
        while isinstance(output, tuple | list | Mapping) and output:
            output = next(iter(output.values() if isinstance(output, Mapping) else output))
        if of_mesh(output):
            output = output.to_local()
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return
        state, x = self.statistics.state, output.detach()
        if torch.compiler.is_compiling():
            # A compiled module inside of an eager checkpoint runs twice.
            add_of_one(state, row, x, counts(self._like))
        elif recomputed():
            return
        elif peek_interpreter_stack() is not None:
            self._say_transformed()
        else:
            unseen(add_of_one, state, row, x)

    def _say_transformed(self) -> None:
        if not self._told:
            self._told = True
            _logger.warning(
                "ModelWatch leaves out activations inside of a transform of torch.func, such as vmap or "
                "grad, which allows no change of what lies outside of it"
            )


class _Watched:
    """Stands for the `forward` of a module; copies and pickles of the module have the one from before."""

    def __init__(self, activations: Activations, row: int, module: nn.Module) -> None:
        self._activations, self._row, self._module = activations, row, module
        self._own = "forward" in vars(module)
        self._forward: Callable[..., Any] = module.forward
        functools.update_wrapper(self, self._forward, updated=())  # its name and signature
        module.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self._forward(*args, **kwargs)
        if self._activations.due and self._module.training:
            self._activations.collect(self._row, output)
        return output

    def __reduce__(self) -> tuple[Any, ...]:
        return _as_it_was, (self._forward,)

    def close(self) -> None:
        # Where something else has wrapped it since, it stays, and finds nothing due.
        self._activations.due = False
        if vars(self._module).get("forward") is self:
            if self._own:
                self._module.forward = self._forward
            else:
                del self._module.forward  # the class's own shows again


def _as_it_was(forward: Callable[..., Any]) -> Callable[..., Any]:
    return forward


def named(given: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Return parameters or modules by name, sorted: without what wrappers add to a name, printable.

    >>> named([("layers.1._checkpoint_wrapped_module.up", 1), ("_orig_mod.layers.0", 2)])
    {'layers.0': 2, 'layers.1.up': 1}
    """
    whole = dict(given)
    bare = {name: _bare(name) for name in whole}
    if len(set(bare.values())) < len(bare):  # such as of a module that somebody calls so
        bare = {name: name for name in whole}
    found = {escaped(bare[name]): one for name, one in whole.items()}
    return {name: found[name] for name in sorted(found)}


def _bare(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name
