"""`ModelWatch`: statistics of each parameter, on any mesh, in the collective that a log takes anyway.

    watch = ModelWatch(model, optimizer, every=50, activations="*.mlp.act")
    ...                                              # the loop stays as it is
    aggregator.drain(acc, watch)
    logger.log(step, aggregator, prefix="train")     # train/grad/norm, train/param/abs_max, ...

Nothing is asked of other ranks, and the host never waits for the device. What several ranks hold alike is
divided out when everything has been merged (`_core.fold.elements`); where a mesh says that ranks hold
the same, each does its share of the work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from metricfold._core.fold.axes import Axes, Axis
from metricfold._core.fold.names import Key
from metricfold._core.fold.state import State
from metricfold._core.runtime.listing import internal
from metricfold._core.runtime.uncompiled import uncompiled
from metricfold.metric import AggregationType, TypeLike, check_name
from metricfold.torch.activations import Activations, bare, matches
from metricfold.torch.statistics import (
    FINITE,
    NONFINITE,
    OCTAVES,
    SEEN,
    SQUARES,
    TOTAL,
    ZEROS,
    Statistics,
)

__all__ = ["ModelWatch"]

PARAMETER, OCTAVE = "parameter", "octave"
"""The axes of what is collected."""


class Part(NamedTuple):
    """Which of the elements that a rank holds it works on: the `index`-th of `of` parts."""

    index: int = 0
    of: int = 1

    def take(self, tensor: Tensor) -> Tensor:
        flat = local(tensor).detach().reshape(-1)
        if self.of == 1:
            return flat
        first, end = (len(flat) * place // self.of for place in (self.index, self.index + 1))
        return flat[first:end]


@internal("layout", "start_read", "empty")
class ModelWatch:
    """Collects statistics of gradients, parameters, updates and activations, every so many steps.

    Of each it reports the norm, mean, largest magnitude, share of zeros and number of elements that are
    not finite, over the elements of all: ``grad/norm``, ``grad/mean``, ``grad/abs_max``, ``grad/zeros``
    and ``grad/nonfinite``; and the same for ``param``, ``update`` and ``activation``. They have the axis
    ``parameter`` (or ``module``): ``by={"grad/norm": "parameter"}`` prints each parameter's own, and
    `Snapshot.array` returns them. Norms, means and shares are of the finite elements.

    Works under DDP, FSDP2, HSDP, tensor and pipeline parallelism, and any mix: each rank says what it
    holds, and what several hold counts once. Between due steps nothing runs.

    Args:
        model: whose parameters; wrap and shard it before.
        optimizer: its `step` is the moment of collection: gradients are as it sees them, clipped and
            unscaled. None: call `grads` by hand.
        every: collect at each so many-th step of the optimizer, from the first on.
        grads: whether to collect gradients.
        params: parameters, before the step.
        updates: what the step changes of them; keeps a copy of what this rank works on meanwhile.
        only: a pattern of parameter names, as a shell has it; or several.
        activations: a pattern of module names, or several, of which the first output is looked at.
        octaves: whether to count magnitudes by power of two: ``grad/octaves``, with the axes
            ``parameter`` and ``octave``; cell k holds those from 2^(k-64) on.
        compiled: whether the reduction is compiled, in some seconds when it first runs.

    Raises:
        TypeError, ValueError: `model` has no parameter that is watched, or `every` is below 1.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        every: int = 1,
        grads: bool = True,
        params: bool = True,
        updates: bool = False,
        only: str | Iterable[str] = "*",
        activations: str | Iterable[str] | None = None,
        octaves: bool = False,
        compiled: bool = False,
    ) -> None:
        if not every >= 1:
            raise ValueError(f"every={every!r}: give a number of steps, 1 or more")
        patterns = [only] if isinstance(only, str) else list(only)
        named = ((bare(name), one) for name, one in model.named_parameters())  # tied ones come once
        self._held = {name: one for name, one in sorted(named) if matches(name, patterns)}
        if not self._held:
            raise ValueError(f"only={only!r} matches no parameter of the model")
        self._rows = {name: row for row, name in enumerate(self._held)}
        group = getattr(model, "process_group", None) if _is_ddp(model) else None
        self._parts = {name: _part(one, group) for name, one in self._held.items()}
        self._every, self._step = every, 0
        self._collects = {"grad": grads, "param": params, "update": updates}
        self._settings = {"octaves": octaves, "compiled": compiled}
        self._statistics: dict[str, Statistics] = {}
        self._before: dict[str, Tensor] | None = None
        self.partial: set[str] = set()
        """Parameters whose gradients are left out: each rank holds a part of a sum that none has."""
        self.layout = _Layout(self)
        self._activations = None
        if activations is not None:
            chosen = [activations] if isinstance(activations, str) else list(activations)
            self._activations = Activations(model, chosen, **self._settings)
        if optimizer is not None:
            optimizer.register_step_pre_hook(lambda given, *_: self._begin_step(given))
            optimizer.register_step_post_hook(lambda *_: self._end_step())

    @property
    def due(self) -> bool:
        """Whether the step that comes next is collected."""
        return self._step % self._every == 0

    # -- In the step

    @uncompiled
    def grads(self, name: str = "grad", scale: Tensor | None = None) -> None:
        """Collect the gradients as they are now, if the step is due, such as before they are clipped.

        Args:
            name: what their statistics are called.
            scale: what they have been multiplied by, such as by a gradient scaler.
        """
        check_name("the name of what is collected", name)
        if self.due:
            held = ((key, one.grad) for key, one in self._held.items())
            self._add(name, {key: grad for key, grad in held if grad is not None}, scale)

    def _begin_step(self, optimizer: torch.optim.Optimizer) -> None:
        if not self.due:
            return
        if self._collects["grad"]:
            # A fused optimizer unscales within its step.
            self.grads("grad", getattr(optimizer, "grad_scale", None))
        if self._collects["param"]:
            self._add("param", self._held)
        if self._collects["update"]:
            self._before = {
                name: self._parts[name].take(one).clone()
                for name, one in self._held.items()
                if one.requires_grad
            }

    def _end_step(self) -> None:
        if self._before is not None:
            changed = {
                name: self._parts[name].take(self._held[name]) - before
                for name, before in self._before.items()
            }
            self._collected("update").add(
                [self._rows[name] for name in changed], [*changed.values()]
            )
            self._before = None
        self._step += 1
        if self._activations is not None:
            self._activations.due = self.due

    @torch.no_grad()
    def _add(self, name: str, tensors: Mapping[str, Tensor], scale: Tensor | None = None) -> None:
        held: dict[str, Tensor] = {}
        for key, tensor in tensors.items():
            if isinstance(tensor, DTensor) and any(one.is_partial() for one in tensor.placements):
                self.partial.add(key)  # the norm of a sum is not the sum of norms
            else:
                held[key] = self._parts[key].take(tensor)
        if held:
            self._collected(name).add([self._rows[key] for key in held], [*held.values()], scale)

    def _collected(self, name: str) -> Statistics:
        if name not in self._statistics:
            device = local(next(iter(self._held.values()))).device
            self._statistics[name] = Statistics(len(self._held), device, **self._settings)
        return self._statistics[name]

    def close(self) -> None:
        """Take the watch off activations."""
        if self._activations is not None:
            self._activations.close()

    def __repr__(self) -> str:
        return f"ModelWatch({len(self._held)} parameters, every={self._every})"

    # -- On the way to the aggregator

    def parts(self) -> list[tuple[str, Axis, Mapping[str, int], Statistics]]:
        """Return what has been collected: its name, its axis, how many elements each cell has."""
        sizes = {name: one.numel() for name, one in self._held.items()}
        axis = Axis(PARAMETER, 0, tuple(sizes))
        found = [(name, axis, sizes, one) for name, one in self._statistics.items()]
        if self._activations is not None:
            found.append(self._activations.part())
        return found

    @uncompiled
    def start_read(self) -> Callable[[], list[Any]]:
        """Begin the transfer to the host; what is returned waits for it, on any thread."""
        parts = self.parts()
        reads = [_started(statistics.state) for *_, statistics in parts]
        return lambda: [(*part[:3], read()) for part, read in zip(parts, reads, strict=True)]

    @uncompiled
    def empty(self) -> ModelWatch:
        """Forget what has been collected, and return this watch."""
        for *_, statistics in self.parts():
            statistics.clear()
        return self


class _Layout:
    """What a watch says of itself to an aggregator."""

    def __init__(self, watch: ModelWatch) -> None:
        self._watch = watch

    def keys(self) -> list[tuple[Key, TypeLike]]:
        """Return each metric, with its aggregation."""
        found: list[tuple[Key, TypeLike]] = []
        for name, _, _, statistics in self._watch.parts():
            found += [(("", f"{name}/{end}"), kind) for end, kind in _TYPES.items()]
            if statistics.octaves.shape[1]:
                found.append((("", f"{name}/octaves"), "tensor_number"))
        return found

    def states(self, arrays: Iterable[Any]) -> Iterable[tuple[Key, State]]:
        """Yield the state of each metric that has something."""
        for name, axis, sizes, state in arrays:
            for end, one in _states(axis, [*sizes.values()], state):
                yield ("", f"{name}/{end}"), one

    def complaints(self, _: object) -> list[str]:
        """Return what is to be said of what was left out."""
        return []


_TYPES: dict[str, TypeLike] = {
    "norm": "tensor_norm",
    "mean": "tensor_mean",
    "abs_max": AggregationType.MAX,
    "zeros": "tensor_mean",
    "nonfinite": "tensor_number",
}


def _states(
    axis: Axis, sizes: list[int], state: np.ndarray[Any, np.dtype[np.float64]]
) -> Iterable[tuple[str, State]]:
    """Yield the states of what was collected of the cells along one axis."""
    sums, largest, octaves = np.split(state, (SQUARES + 1, SQUARES + 2), axis=1)
    seen, zero = sums[:, SEEN], np.zeros(len(sums))
    if not seen.any():
        return
    has = seen > 0
    size = np.where(has, np.array(sizes or seen, dtype=np.float64), -np.inf)[:, np.newaxis]
    axes: Axes = (axis,)

    def of(*lanes: int) -> Any:
        return np.stack([seen, zero, *(sums[:, lane] for lane in lanes)], axis=1)

    yield "norm", State(of(SQUARES), size, axes=axes)
    yield "mean", State(of(TOTAL, FINITE), size, axes=axes)
    yield "abs_max", State(of(), np.where(has[:, np.newaxis], largest, -np.inf), axes=axes)
    yield "zeros", State(of(ZEROS, SEEN), size, axes=axes)
    yield "nonfinite", State(of(NONFINITE), size, axes=axes)
    if octaves.shape[1]:
        cells = np.stack(
            np.broadcast_arrays(seen[:, np.newaxis], np.zeros(octaves.shape), octaves), axis=-1
        )
        whole = np.repeat(size, OCTAVES, axis=0)
        yield "octaves", State(cells.reshape(-1, 3), whole, axes=(axis, Axis(OCTAVE, OCTAVES)))


def local(tensor: Tensor) -> Tensor:
    return cast("Tensor", tensor.to_local()) if isinstance(tensor, DTensor) else tensor


def _is_ddp(model: nn.Module) -> bool:
    return isinstance(model, nn.parallel.DistributedDataParallel)


def _part(parameter: Tensor, group: Any) -> Part:
    """Return a rank's part of the work for a parameter, as far as its mesh tells who holds the same.

    It need not tell all: a parameter on a sub-mesh has replicas that the mesh does not name. Nobody's
    work is missing then, for those do it too.
    """
    index, of = 0, 1
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        coordinate = mesh.get_coordinate() or ()
        for dimension, placement in enumerate(parameter.placements):
            if placement.is_replicate() and coordinate:
                size = mesh.size(dimension)
                index, of = index * size + coordinate[dimension], of * size
    elif group is not None:
        index, of = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
    return Part(index, of)


def _started(tensor: Tensor) -> Callable[[], Any]:
    """Begin to copy a tensor to the host; what is returned waits for it."""
    if tensor.device.type != "cuda":
        held = tensor.detach().clone()
        return lambda: held.cpu().numpy()
    copied = tensor.detach().to("cpu", non_blocking=True)
    ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
    ready.record(torch.cuda.current_stream(tensor.device))

    def finish() -> Any:
        ready.synchronize()
        return copied.numpy()

    return finish
