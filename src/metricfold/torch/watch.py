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

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from metricfold._core.device.arrays import of_mesh
from metricfold._core.device.watched import PARAMETER
from metricfold._core.fold.axes import Axis
from metricfold._core.fold.elements import EVERY_ELEMENT
from metricfold._core.runtime.imported import kinds
from metricfold._core.runtime.listing import internal, shortened
from metricfold._core.runtime.uncompiled import leave_alone, uncompiled
from metricfold.metric import check_name
from metricfold.torch.activations import Activations
from metricfold.torch.collected import (
    MODULE,
    OF_ACTIVATIONS,
    OF_PARAMETERS_AND_OCTAVES,
    Checked,
    Collected,
    Keys,
    Read,
)
from metricfold.torch.placed import (
    IN_PARTS,
    Part,
    part_of_group,
    part_of_mesh,
    places_of,
    stepping,
    unusable,
    unwrapped,
)
from metricfold.torch.replicas import Checksums, shard_of
from metricfold.torch.statistics import Scratch, Statistics
from metricfold.torch.transfer import started

__all__ = ["ModelWatch"]

_logger = logging.getLogger("metricfold")


@internal("collected", "layout", "start_read")
class ModelWatch:
    """Collects statistics of gradients, parameters, updates and activations, every so many steps.

    Of each it reports the norm, the mean, the largest magnitude, the share of zeros and the number of
    elements that are not finite: ``grad/norm``, ``grad/mean``, ``grad/abs_max``, ``grad/zeros`` and
    ``grad/nonfinite``; and the same for ``param``, ``update`` and ``activation``, of which there is
    ``activation/rms`` instead of a norm. They have the axis ``parameter`` (or ``module``):
    ``by={"grad/norm": "parameter"}`` prints each parameter's own, `Snapshot.array` returns them, and
    without it ``grad/norm`` is the norm over all. A norm or mean is NaN where an element is not finite,
    or with ``on_nan="skip"`` that of the others.

    Works under DDP, FSDP2, HSDP, tensor and pipeline parallelism, and any mix: each rank says what it
    holds, and what several hold counts once. Between due steps nothing runs. It is drained as an
    accumulator is, and if several steps have been collected since, shows their mean (root of the mean
    of squares, for a norm).

    Args:
        model: whose parameters; wrap and shard it before.
        optimizer: its `step` is the moment of collection: gradients are as it sees them, clipped and
            unscaled. None: call `grads` by hand.
        every: collect at each so many-th step of the optimizer.
        grads: whether to collect gradients.
        params: parameters, before the step.
        updates: what the step changes of them; keeps a copy of what this rank works on meanwhile.
        only: a pattern of parameter names, as a shell has it; or several.
        activations: a pattern of module names, or several, whose first output is looked at.
        octaves: whether to count magnitudes by power of two: ``grad/octaves``, with the axes
            ``parameter`` and ``octave``; cell k holds those from 2^(k-64) on.
        replicas: whether to compare the bits of parameters that several ranks hold, by checksums:
            ``param/replicas`` is how many tensors (or shards of them) differ, and the rule
            `metricfold.ReplicasDiffer` names them. Costs some reads of all parameters.
        compiled: whether the reduction is compiled, in some seconds when it first runs.
        name: of the model, if there are several: ``generator/grad/norm``.

    Raises:
        TypeError, ValueError: `model` has no parameter that is watched, or is sharded in a way that does
            not show in its parameters (FSDP1, ZeRO), or `every` is below 1.

    >>> from metricfold import MetricsAggregator
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> aggregator, watch = MetricsAggregator(), ModelWatch(model, optimizer, params=False)
    >>> model(torch.tensor([[3.0, 4.0]])).sum().backward()
    >>> optimizer.step()
    >>> _ = aggregator.drain(watch)
    >>> snapshot = aggregator.reduce()
    >>> snapshot.as_dict("train")["train/grad/norm"], snapshot.array(None, "grad/abs_max")
    (5.0, (array([4.]), (('weight',),)))
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
        replicas: bool = False,
        compiled: bool = False,
        name: str = "",
    ) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every={every!r}: give a number of steps, 1 or more")
        optimizer = stepping(optimizer)
        if name:
            check_name("the name of a ModelWatch", name)
        self._prefix = f"{name}/" if name else ""
        given, (group, model) = model, unwrapped(model)
        self._held = places_of(model, [only] if isinstance(only, str) else [*only])
        self._group = group
        self._every, self._step = every, 0
        self._collects = {
            "grad": grads,
            "param": params,
            "update": updates,
            "replicas": replicas,
        }
        self._scratch, self._octaves, self._compiled = Scratch(), octaves, compiled
        self._statistics: dict[tuple[str, torch.device], Statistics] = {}
        self._before: dict[str, Tensor] | None = None
        self._counts: Tensor | None = None
        self._parts: dict[tuple[Any, ...], Part | None] = {}
        self._told: set[tuple[str, str]] = set()
        self._sizes: dict[str, int] = {}
        self._checksums: dict[torch.device, Checksums] = {}
        self._checks, self._unsent = 0, False
        self._new = False
        self._hooks: tuple[Any, ...] = ()
        self.layout = Keys(self.collected)
        self._activations = None
        if activations is not None:
            if isinstance(given, nn.DataParallel):
                raise ValueError(
                    "activations= cannot be watched in the copies that DataParallel makes for each "
                    "forward: use DistributedDataParallel"
                )
            chosen = [activations] if isinstance(activations, str) else [*activations]
            self._activations = Activations(model, chosen, octaves=octaves)
            self._activations.look(self.due)
        if optimizer is not None:
            self._hooks = (
                optimizer.register_step_pre_hook(_uncompiled_hook(self._begin_step)),
                optimizer.register_step_post_hook(_uncompiled_hook(self._end_step)),
            )

    @property
    def due(self) -> bool:
        """Whether the step that is under way is collected."""
        return (self._step + 1) % self._every == 0

    # -- In the step

    @uncompiled
    def grads(self, name: str = "grad") -> None:
        """Collect the gradients as they are now, if the step is due, such as before they are clipped.

        Args:
            name: what their statistics are called.
        """
        check_name("the name of what is collected", name)
        if name in ("param", "update", "activation"):
            raise ValueError(
                f"{name!r} names what is no gradient: give another, such as 'grad_raw'"
            )
        if self.due:
            self._add_grads(name)

    @torch.no_grad()
    def _begin_step(self, optimizer: torch.optim.Optimizer) -> None:
        if not self.due:
            return
        # A fused optimizer unscales within its step, or leaves the step out.
        found = getattr(optimizer, "found_inf", None)
        self._counts = None if found is None else found == 0
        if self._collects["grad"]:
            self._add_grads("grad", getattr(optimizer, "grad_scale", None))
        if self._collects["param"]:
            self._add("param", self._parameters())
        if self._collects["replicas"]:
            self._check_replicas()
        if self._collects["update"]:
            trained = ((name, one) for name, one in self._parameters() if one.requires_grad)
            self._before = {name: part.clone() for name, part in self._shares("update", trained)}

    @torch.no_grad()
    def _end_step(self, _: object) -> None:
        if self._before is not None:
            now = dict(self._shares("update", self._parameters()))
            changed = [
                (name, _difference(now[name], before)) for name, before in self._before.items()
            ]
            self._before = None
            self._take("update", changed)
        self._counts = None
        self._step += 1
        if self._activations is not None:
            self._activations.look(self.due)

    def _parameters(self) -> Iterator[tuple[str, Tensor]]:
        for name, place in self._held.items():
            parameter = place.parameter()
            if parameter is not None:
                yield name, parameter

    def _add_grads(self, name: str, scale: Tensor | None = None) -> None:
        held = ((key, one.grad) for key, one in self._parameters())
        self._add(name, ((key, grad) for key, grad in held if grad is not None), scale)

    def _add(
        self, name: str, tensors: Iterable[tuple[str, Tensor]], scale: Tensor | None = None
    ) -> None:
        self._take(name, self._shares(name, tensors), scale)

    def _shares(
        self, name: str, tensors: Iterable[tuple[str, Tensor]]
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield what this rank works on of tensors, flat; say once which are left out."""
        left_out: dict[str, list[str]] = {}
        on_meshes = kinds("torch.distributed.tensor", "DTensor")
        plain = self._part()
        for key, tensor in tensors:
            here, part = tensor, plain
            if isinstance(tensor, on_meshes):
                part = self._part(tensor.device_mesh, tensor.placements)  # type: ignore[attr-defined]
                here = tensor.to_local()  # type: ignore[attr-defined]
            why = unusable(here) if part is not None else IN_PARTS
            if part is None or why:
                if (key, why) not in self._told:
                    left_out.setdefault(why, []).append(key)
                continue
            size, flat = tensor.numel(), here if here.dim() == 1 else here.reshape(-1)
            if here.is_complex():
                size, flat = 2 * size, torch.view_as_real(flat).reshape(-1)
            self._sizes[key] = size
            yield key, flat if part.of == 1 else part.take(flat)
        for why, keys in left_out.items():
            self._told.update((key, why) for key in keys)
            _logger.warning(
                "ModelWatch leaves %d out of %r, such as %s: %s",
                len(keys),
                name,
                shortened(keys),
                why,
            )

    def _part(self, *of_mesh: Any) -> Part | None:
        """Return a rank's part of the work for a tensor, as far as its mesh tells who holds the same.

        It need not tell all: a parameter on a sub-mesh has replicas that the mesh does not name. Nobody's
        work is missing then, for those do it too. None: each rank holds a part of a sum.
        """
        if of_mesh not in self._parts:
            known = part_of_mesh(*of_mesh) if of_mesh else part_of_group(self._group)
            self._parts[of_mesh] = known
        return self._parts[of_mesh]

    @torch.no_grad()
    def _take(
        self, name: str, held: Iterable[tuple[str, Tensor]], scale: Tensor | None = None
    ) -> None:
        rows = {key: row for row, key in enumerate(self._held)}
        by_device: dict[torch.device, tuple[list[int], list[Tensor]]] = {}
        for key, tensor in held:
            of_device = by_device.setdefault(tensor.device, ([], []))
            of_device[0].append(rows[key])
            of_device[1].append(tensor)
        for device, (some, tensors) in by_device.items():
            counts = None if self._counts is None else self._counts.to(device)
            self._statistics_of(name, device).add(some, tensors, scale, counts)
            self._new = True

    def _statistics_of(self, name: str, device: torch.device) -> Statistics:
        known = self._statistics.get((name, device))
        if known is None:
            known = self._statistics[name, device] = Statistics(
                len(self._held),
                device,
                octaves=self._octaves,
                compiled=self._compiled,
                scratch=self._scratch,
            )
        return known

    def _check_replicas(self) -> None:
        """Take the checksum of what this rank holds of each parameter, if another may hold the same."""
        world_size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        by_device: dict[torch.device, dict[str, Tensor]] = {}
        for name, parameter in self._parameters():
            shard = shard_of(name, parameter, world_size)
            here = parameter.to_local() if of_mesh(parameter) else parameter  # type: ignore[attr-defined]
            if shard is not None and here.layout == torch.strided and not here.is_meta:
                by_device.setdefault(here.device, {})[shard] = here
        if not by_device and ("", "replicas") not in self._told:
            self._told.add(("", "replicas"))
            _logger.warning("replicas=True has nothing to compare: no parameter is on two ranks")
        self._checks += 1
        for device, tensors in by_device.items():
            names = sorted(tensors)
            known = self._checksums.get(device)
            if known is None or known.names != names:
                known = self._checksums[device] = Checksums(names, device, self._scratch)
            known.take([tensors[name] for name in names])
            self._new = self._unsent = True

    def close(self) -> None:
        """Let the optimizer and the modules be as they were; what has been collected may be drained yet."""
        for hook in self._hooks:
            hook.remove()
        if self._activations is not None:
            self._activations.close()

    def __repr__(self) -> str:
        return f"ModelWatch({len(self._held)} parameters, every={self._every})"

    # -- On the way to the aggregator

    def collected(self) -> list[Collected | Checked]:
        """Return what has been collected, on its devices."""
        sizes = [float(self._sizes.get(name, 0)) for name in self._held]
        axis = Axis(PARAMETER, 0, tuple(self._held))
        found: list[Collected | Checked] = [
            Collected(self._prefix + name, axis, sizes, OF_PARAMETERS_AND_OCTAVES, statistics.state)
            for (name, _), statistics in self._statistics.items()
        ]
        if self._activations is not None:
            names, state = self._activations.names, self._activations.statistics.state
            every = [EVERY_ELEMENT] * len(names)
            axis = Axis(MODULE, 0, names)
            name = f"{self._prefix}activation"
            found.append(Collected(name, axis, every, OF_ACTIVATIONS, state))
        number = self._checks if self._unsent else 0
        return found + [
            Checked(f"{self._prefix}param", number, Axis(PARAMETER, 0, tuple(one.names)), one.state)
            for one in self._checksums.values()
        ]

    @uncompiled
    def start_read(self) -> Callable[[], Read | None]:
        """Begin the transfer to the host; what is returned waits for it, on any thread."""
        if not self._new and (self._activations is None or not self._activations.seen):
            return lambda: None
        reads = [(one, started(one.state.detach().clone())) for one in self.collected()]
        return lambda: Read([(one, read()) for one, read in reads])

    @uncompiled
    def empty(self) -> ModelWatch:
        """Forget what has been collected, and return this watch."""
        for statistics in self._statistics.values():
            statistics.clear()
        self._new = self._unsent = False
        if self._activations is not None:
            self._activations.clear()
        return self


def _difference(now: Tensor, before: Tensor) -> Tensor:
    """Return the difference, in float32 at least: bfloat16 would round it."""
    wide = torch.promote_types(now.dtype, torch.float32)
    return now.to(wide) - before.to(wide)


Hook: TypeAlias = Callable[..., None]


def _uncompiled_hook(collect: Callable[[Any], None]) -> Hook:
    """Return a hook of an optimizer's step, which a compiled step leaves alone."""

    @uncompiled
    def hook(optimizer: Any, *_: object) -> None:
        collect(optimizer)

    leave_alone()  # it is made after the constructors that say so
    return hook
