"""Where the parameters of a model are, and which part of each a rank works on.

Frameworks put other tensors in the place of a parameter when they shard, move or gather it: so it is
known by its module and its name there, and looked up each time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from metricfold._core.device.watched import matches
from metricfold._core.runtime.imported import is_of
from metricfold.torch.activations import named

__all__ = [
    "IN_PARTS",
    "Part",
    "Place",
    "part_of_group",
    "part_of_mesh",
    "places_of",
    "stepping",
    "unusable",
    "unwrapped",
]

IN_PARTS = (
    "each rank holds a part of a sum (Partial), whose norm no rank knows: let the gradient be reduced, as by "
    "redistribute(), if it is wanted"
)
_SPARSE = "it is sparse, and holds no element for most"
_NO_NUMBERS = "it lies on the meta device, and has no numbers"
_NO_REALS = "its elements are no floating-point numbers"


class Part(NamedTuple):
    """Which of the elements that a rank holds it works on: one of so many parts."""

    place: int = 0
    of: int = 1

    def take(self, flat: Tensor) -> Tensor:
        """Return this part of a flat tensor."""
        if self.of == 1:
            return flat
        first, end = (len(flat) * place // self.of for place in (self.place, self.place + 1))
        return flat[first:end]


class Place(NamedTuple):
    """Where a parameter is found."""

    module: nn.Module
    attribute: str

    def parameter(self) -> Tensor | None:
        found: Tensor | None = vars(self.module)["_parameters"].get(self.attribute)
        return found


def stepping(optimizer: torch.optim.Optimizer | None) -> torch.optim.Optimizer | None:
    """Return the optimizer that steps, inside of those that frameworks wrap around it."""
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer  # type: ignore[union-attr]
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer={type(optimizer).__name__} has no hooks for its step: give the "
            "torch.optim.Optimizer that it wraps, or none, and call grads() before each step"
        )
    return optimizer


def unwrapped(model: nn.Module) -> tuple[Any, nn.Module]:
    """Return the group over which parameters are replicated, if one is known, and the model inside."""
    group = None
    if not isinstance(model, nn.Module):
        raise TypeError(f"ModelWatch takes a module, not {type(model).__name__}")
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            # Of parameters that it leaves alone each rank may have its own.
            group = None if model.parameters_to_ignore else model.process_group
            model = model.module
        elif isinstance(model, nn.DataParallel):
            model = model.module
        elif is_of(model, "torch._dynamo.eval_frame", "OptimizedModule"):
            model = model.get_submodule("_orig_mod")
        else:
            return group, model


def places_of(model: nn.Module, patterns: Sequence[str]) -> dict[str, Place]:
    """Return where each parameter is that one of the patterns matches, tied ones once."""
    places: dict[str, Place] = {}
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        if is_of(module, "torch.distributed.fsdp", "FullyShardedDataParallel"):
            raise TypeError(
                "the parameters of FullyShardedDataParallel (FSDP1) do not say which part of the whole a "
                "rank holds: shard the model by torch.distributed.fsdp.fully_shard"
            )
        for attribute, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            name = f"{prefix}.{attribute}" if prefix else attribute
            if nn.parameter.is_lazy(parameter):
                raise ValueError(f"parameter {name!r} has no shape yet: run the model once before")
            if hasattr(parameter, "ds_id"):
                raise TypeError(
                    f"parameter {name!r} is sharded by DeepSpeed's ZeRO-3, which does not say which part "
                    "of it a rank holds"
                )
            places[name] = Place(module, attribute)
    found = named(places.items())
    held = {name: place for name, place in found.items() if matches(name, patterns)}
    if not held:
        raise ValueError(
            f"only={patterns!r} matches no parameter of the model, which has: "
            f"{', '.join(found)[:300] or 'none'}"
        )
    return held


def unusable(tensor: Tensor) -> str:
    """Return why a tensor cannot be looked at; nothing if it can."""
    if tensor.layout != torch.strided:
        return _SPARSE
    if tensor.is_meta:
        return _NO_NUMBERS
    return "" if tensor.is_floating_point() or tensor.is_complex() else _NO_REALS


def part_of_group(group: Any) -> Part:
    """Return a rank's part of what all ranks of a group hold; all of it if no group is known."""
    if group is None:
        return Part()
    return Part(dist.get_rank(group), dist.get_world_size(group))


def part_of_mesh(mesh: Any, placements: Sequence[Any]) -> Part | None:
    """Return a rank's part of what its replicas on a mesh hold; None: each holds a part of a sum."""
    if any(placement.is_partial() for placement in placements):
        return None
    place, of = 0, 1
    coordinate = mesh.get_coordinate() or ()
    for dimension, placement in enumerate(placements):
        if placement.is_replicate() and coordinate:
            size = mesh.size(dimension)
            place, of = place * size + coordinate[dimension], of * size
    return Part(place, of)
