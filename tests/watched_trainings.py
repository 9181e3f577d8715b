"""Small trainings on four ranks, laid out in each of the usual ways, whose models are watched.

What a `ModelWatch` reports is compared on every rank with what plain code says of the whole tensors, which
are gathered for that.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from metricfold import MetricsAggregator, ReplicasDiffer
from metricfold._core.device.watched import OCTAVES
from metricfold.torch import ModelWatch

WIDTH, WORDS, STEPS, EVERY = 10, 13, 4, 2
"""10, 13 and 42 do not divide by 4, so shards are uneven."""
LAYOUTS = (
    *(
        "alone",
        "ddp",
        "ddp of bf16",
        "fsdp",
        "fsdp of bf16",
        "hsdp",
        "fsdp x tp",
        "pipeline x fsdp",
    ),
)

Truth: TypeAlias = dict[str, Any]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 42), nn.Linear(42, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(torch.relu(self.up(self.norm(x))))
        return out


class Net(nn.Module):
    """Has tied and frozen parameters, and one whose gradient stays None."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.embed.weight
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.unused = nn.Parameter(torch.zeros(3))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(self.frozen(x))
        return logits


class Stage(nn.Module):
    """Half of a pipeline; each has parameters of its own."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(number): Block()})

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = layer(x)
        return x


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def truths_of(tensors: Mapping[str, Tensor | None], due: bool) -> dict[str, Truth]:
    """Return what plain code says of each; it gathers them, so not where nobody asks."""
    there = {name: one for name, one in tensors.items() if one is not None and due}
    return {name: truth_of(one) for name, one in there.items()}


def truth_of(tensor: Tensor) -> Truth:
    """Return what plain code says of a whole tensor."""
    x = whole(tensor).double().reshape(-1)
    magnitudes = x.abs()[x.isfinite() & (x != 0)]
    octaves = (torch.frexp(magnitudes)[1] + 63).clamp(0, OCTAVES - 1)
    return {
        "norm": float(x.norm()) if x.isfinite().all() else math.nan,
        "mean": float(x.mean()) if x.isfinite().all() else math.nan,
        "abs_max": float(x.abs().max()) if x.isfinite().all() else math.nan,
        "zeros": float((x == 0).double().mean()),
        "nonfinite": float((~x.isfinite()).sum()),
        "octaves": torch.bincount(octaves.long(), minlength=OCTAVES).tolist(),
    }


def build(how: str, rank: int) -> nn.Module:
    torch.manual_seed(0)
    if how == "pipeline x fsdp":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
        stage = Stage(rank // 2)
        return fully_shard(stage, mesh=mesh["dp"])
    model = Net()
    if how.endswith("bf16") and how.startswith("ddp"):
        model.bfloat16()
    if how == "alone":
        return model
    if how.startswith("ddp"):
        return DistributedDataParallel(model, find_unused_parameters=True)
    settings = {}
    if how.startswith("fsdp x tp"):
        both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        for layer in model.layers:
            parallelize_module(layer, both["tp"], plan)
        mesh = both["dp"]
    elif how == "hsdp":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("dp",))
        if how.endswith("bf16"):
            settings["mp_policy"] = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32
            )
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, **settings)
    return fully_shard(model, mesh=mesh, **settings)


def loss_of(how: str, model: nn.Module, rank: int, step: int) -> Tensor:
    same = {"fsdp x tp": rank // 2, "alone": 0}.get(how, rank)
    torch.manual_seed(100 * step + same)
    if how == "pipeline x fsdp":
        return model(torch.randn(2, 5, WIDTH)).pow(2).mean()
    tokens = torch.randint(0, WORDS, (2, 5))
    return F.cross_entropy(model(tokens).flatten(0, 1).float(), tokens.flatten())


def spoil(parameters: Mapping[str, Tensor]) -> None:
    """Put what is not finite, and a zero, into a gradient, alike wherever it lies."""
    grad = parameters["layers.0.up.bias"].grad if "layers.0.up.bias" in parameters else None
    if grad is not None and local(grad).numel() > 2:
        local(grad)[:3] = torch.tensor([math.nan, math.inf, 0.0])


def compared(snapshot: Any, kind: str, wanted: Mapping[str, Truth], scale: float) -> list[str]:
    """Return where what is reported of each parameter differs from the truth."""
    bad = []
    for end in ("norm", "mean", "abs_max", "zeros", "nonfinite", "octaves"):
        found, (labels, *_) = snapshot.array(None, f"{kind}/{end}", window="interval")
        by_name = dict(zip(labels, found.tolist(), strict=True))
        for name, one in wanted.items():
            got, right = by_name[name], one[end]
            near = 0.0 if end in ("nonfinite", "octaves", "abs_max") else 1e-6
            atol = 1e-9 * scale if end == "mean" else 0.0
            if not np.allclose(got, right, rtol=near, atol=atol, equal_nan=True):
                bad.append(f"{kind}/{end} of {name}: {got} is not {right}")
    return bad


def total_norm(how: str, truths: Mapping[str, Truth]) -> float:
    """Return the norm over all parameters, also those of another stage."""
    squares = torch.tensor(sum(one["norm"] ** 2 for one in truths.values()))
    if how.startswith("pipeline"):
        dist.all_reduce(squares)
        squares /= 2  # two ranks have each stage
    return math.sqrt(squares)


def watched(how: str, rank: int, aggregator: MetricsAggregator) -> dict[str, Any]:
    """Train for some steps; return what was compared, and what was not as it should be."""
    model = build(how, rank)
    parameters = {name.removeprefix("module."): one for name, one in model.named_parameters()}
    trained = [one for one in parameters.values() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    watch = ModelWatch(model, optimizer, every=EVERY, updates=True, octaves=True)
    bad: list[str] = []
    checked, collectives, logs = 0, 0, []
    for step in range(1, STEPS + 1):
        loss_of(how, model, rank, step).backward()
        if step == STEPS:
            spoil(parameters)
        due = step % EVERY == 0
        raw = truths_of({name: one.grad for name, one in parameters.items()}, due)
        with CommDebugMode() as communication:
            watch.grads("grad_raw")
        collectives += communication.get_total_counts()
        if how == "fsdp x tp":  # whose parameters torch's own clipping does not take together
            for one in trained:
                if one.grad is not None:
                    local(one.grad).mul_(0.37)
        elif step < STEPS:
            torch.nn.utils.clip_grad_norm_(trained, 0.1)
        grads = truths_of({name: one.grad for name, one in parameters.items()}, due)
        before = {name: whole(one) for name, one in parameters.items() if due}
        with CommDebugMode() as communication:
            optimizer.step()
        collectives += communication.get_total_counts()
        optimizer.zero_grad()
        aggregator.drain(watch)
        issued = aggregator.collectives
        snapshot = aggregator.reduce()
        logs.append(aggregator.collectives - issued)
        if not due:
            assert snapshot.empty
            continue
        updates = {
            name: truth_of(whole(one).float() - before[name].float())
            for name, one in parameters.items()
            if one.requires_grad
        }
        wanted = {
            "grad_raw": raw,
            "grad": grads,
            "param": {name: truth_of(one) for name, one in before.items()},
            "update": updates,
        }
        for kind, truths in wanted.items():
            scale = np.nanmax([one["norm"] for one in truths.values()])
            bad += compared(snapshot, kind, truths, scale)
            found, right = snapshot.value(None, f"{kind}/norm"), total_norm(how, truths)
            if not np.isclose(found, right, rtol=1e-6, equal_nan=True):
                bad.append(f"{kind}/norm is {found}, not {right}")
            checked += len(truths)
            values, (labels,) = snapshot.array(None, f"{kind}/norm", window="interval")
            without = {*parameters} - {*truths}
            by_name = dict(zip(labels, values.tolist(), strict=True))
            bad += [f"{kind} of {name}" for name in without if not math.isnan(by_name[name])]
    both = {f"layers.{number}.up.weight" for number in (0, 1)}
    if not both <= {*labels}:
        bad.append(f"labels are {labels}")
    return {"checked": checked, "bad": bad[:8], "collectives": collectives, "logs": logs}


def partial_gradients(rank: int, aggregator: MetricsAggregator) -> list[str]:
    """Return what is said of gradients that are parts of sums, over two collections."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("metricfold").addHandler(handler)
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("tp",))
    torch.manual_seed(0)
    norm = nn.LayerNorm(WIDTH)
    for name, one in list(norm.named_parameters()):
        setattr(norm, name, nn.Parameter(distribute_tensor(one.data, mesh, [Replicate()])))
    x = distribute_tensor(torch.randn(2, 8, WIDTH), mesh, [Shard(1)])
    norm(x).pow(2).mean().backward()
    watch = ModelWatch(norm)
    for _ in range(2):
        watch.grads()
    aggregator.drain(watch)
    logging.getLogger("metricfold").removeHandler(handler)
    assert aggregator.reduce().empty
    return said


def hidden_shards(rank: int, aggregator: MetricsAggregator) -> str:
    """Return what is said of a model whose parameters do not tell how they are sharded."""
    sharded = FullyShardedDataParallel(nn.Linear(WIDTH, WIDTH), device_id=torch.device("cpu"))
    try:
        ModelWatch(sharded)
    except TypeError as error:
        return str(error)
    return ""


def flipped_bit(rank: int, aggregator: MetricsAggregator) -> dict[str, Any]:
    """Return the alerts of logs before and after a bit of one rank's parameters flips, by layout."""
    found = {}
    for how in ("alone", "ddp", "ddp of bf16", "hsdp", "fsdp x tp", "fsdp"):
        model = build(how, rank)
        parameters = {name.removeprefix("module."): one for name, one in model.named_parameters()}
        optimizer = torch.optim.SGD([*parameters.values()], lr=0.0)
        watch = ModelWatch(model, optimizer, grads=False, params=False, replicas=True)
        alerts = []
        for step in range(4):
            if step == 2 and rank == 2:
                # Of a bias that is whole on the ranks of TP, though its mesh does not say so.
                held = local(parameters["layers.1.down.bias"].data)
                held.view(torch.int16 if held.element_size() == 2 else torch.int32)[1] ^= 1
            optimizer.step()
            aggregator.drain(watch)
            if step != 2:  # of two checks in one interval the newer counts
                snapshot = aggregator.reduce()
                alerts.append([(one.message, one.rank) for one in snapshot.alerts])
        found[how] = alerts
    return found


def all_layouts(rank: int) -> dict[str, Any]:
    """Train in every layout, one after the other."""
    dist.barrier()
    aggregator = MetricsAggregator()
    found: dict[str, Any] = {how: watched(how, rank, aggregator) for how in LAYOUTS}
    aggregator.alert_on(ReplicasDiffer())
    others: dict[str, Callable[[int, MetricsAggregator], Any]] = {
        "partial": partial_gradients,
        "flipped": flipped_bit,
        "hidden": hidden_shards,
    }
    return found | {name: work(rank, aggregator) for name, work in others.items()}
