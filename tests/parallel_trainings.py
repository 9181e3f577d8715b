"""One small training, laid out over four ranks in each of the usual ways.

Whatever the layout, a step trains on the same texts, and its gradient is that of the mean over
their tokens. So all of them must log what is counted from the texts, and the losses of the
`Reference`, which trains in one process without metricfold.
"""

from __future__ import annotations

import statistics
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from metricfold import JSONLSink, MetricsAggregator, MetricsCollator, MetricsLogger
from metricfold.demo.batches import TextMetrics
from metricfold.demo.texts import read_python_docs
from metricfold.torch import DeviceAccumulator

DATASETS = ("docs", "code")
STEPS, LOG_EVERY, PER_STEP = 6, 3, 8
LENGTH, WIDTH, HEAD = 32, 16, 8  # tokens of a sample, features, features of a head
IGNORED = -100
CUTS = {1: (0, 8), 2: (0, 3, 8), 4: (0, 1, 3, 6, 8)}
"""Where a step's samples are cut for so many data-parallel ranks: unevenly."""
EVENLY = (0, 4, 8)
"""For two pipelines, whose microbatches must all have one shape."""
LEARNING_RATE = 0.3
OVERFLOWING = (2, 6)  # steps, counted from 1, that are skipped in one of the trainings
NO_CLIPPING = 1e9  # the norm is all that is wanted


# -- Data ----------------------------------------------------------------------------------------


def read_samples(steps: int = STEPS) -> list[dict[str, Any]]:
    """Return the samples of a run, `PER_STEP` for each step, about every third of them code."""
    docs = [(text.text, text.kind) for text in read_python_docs()]
    source = Path(textwrap.__file__).read_text(encoding="utf-8")
    code = [(block, "code") for block in source.split("\n\n") if len(block) > 1]
    samples = []
    for number in range(steps * PER_STEP):
        dataset = int(number % 3 == 2)
        texts = (docs, code)[dataset]
        text, kind = texts[number % len(texts)]
        tokens = list(text.encode()[: LENGTH + 1])
        samples.append({"tokens": tokens, "dataset": dataset, "kind": kind})
    return samples


def counted(steps: Sequence[int]) -> dict[str, float]:
    """Return what the samples of these steps say, by dataset, by plain Python."""
    result: dict[str, float] = {}
    everything = read_samples(max(steps) + 1)
    samples = [one for step in steps for one in everything[PER_STEP * step : PER_STEP * (step + 1)]]
    for index, name in enumerate(DATASETS):
        own = [sample for sample in samples if sample["dataset"] == index]
        lengths = [len(sample["tokens"]) for sample in own]
        result[f"{name}/samples_seen"] = len(own)
        result[f"{name}/tokens_seen"] = sum(lengths)
        result[f"{name}/seq_len_stat_count"] = len(lengths)
        result[f"{name}/seq_len_stat_mean"] = statistics.fmean(lengths)
        result[f"{name}/seq_len_stat_std"] = statistics.stdev(lengths)
        result[f"{name}/seq_len_stat_p50"] = statistics.median(lengths)
        for kind, number in Counter(sample["kind"] for sample in own).items():
            result[f"{name}/kind_count_{kind}"] = number
    return result


def tagged(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the samples with their metrics."""
    transforms = [TextMetrics() for _ in DATASETS]
    for transform, name in zip(transforms, DATASETS, strict=True):
        transform.set_dataset_name(name)
    return [transforms[sample["dataset"]](sample) for sample in samples]


def pad(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    inputs = torch.zeros(len(samples), LENGTH, dtype=torch.long)
    labels = torch.full((len(samples), LENGTH), IGNORED)
    for row, sample in enumerate(samples):
        tokens = torch.tensor(sample["tokens"])
        inputs[row, : len(tokens) - 1] = tokens[:-1]
        labels[row, : len(tokens) - 1] = tokens[1:]
    dataset = torch.tensor([sample["dataset"] for sample in samples])
    return {"inputs": inputs, "labels": labels, "dataset": dataset}


def batches(
    part: int,
    parts: int,
    *,
    cuts: Sequence[int] = (),
    steps: range = range(STEPS),
) -> Iterator[dict[str, Any]]:
    """Load the share of the data-parallel rank `part` of `parts` in each step."""
    start, end = list(pairwise(cuts or CUTS[parts]))[part]
    shares = [list(range(PER_STEP * step + start, PER_STEP * step + end)) for step in steps]
    samples = tagged(read_samples(steps.stop))
    collate = MetricsCollator(collate_fn=pad)
    return iter(DataLoader(samples, batch_sampler=shares, collate_fn=collate))


# -- Model ---------------------------------------------------------------------------------------


class Embed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(256, WIDTH), nn.Embedding(LENGTH, WIDTH)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.token(tokens) + self.position(torch.arange(tokens.shape[1]))


class Block(nn.Module):
    """Causal attention and a two-layer network; has as many heads as its linear layers hold."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm_network = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.value, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.norm(x)
        q, k, v = (
            layer(normed).unflatten(-1, (-1, HEAD)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm_network(x))))


def byte_model() -> nn.Sequential:
    """Return the model; every call returns the same one."""
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, 256)
    return nn.Sequential(Embed(), Block(), Block(), nn.LayerNorm(WIDTH), head)


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), LEARNING_RATE)


# -- What they all share -------------------------------------------------------------------------


class Job:
    """The metrics of one training: the aggregator, what is on the device, and the log."""

    def __init__(self, name: str, folder: Path, process_group: Any = None) -> None:
        self.aggregator = MetricsAggregator(name=name, process_group=process_group)
        self.acc = DeviceAccumulator({"loss": "mean"}, DATASETS)
        self.logger = MetricsLogger([JSONLSink(folder / f"{name}.jsonl")])

    def loss(
        self, logits: torch.Tensor, batch: dict[str, torch.Tensor], num_items: torch.Tensor
    ) -> torch.Tensor:
        """Return the loss to back-propagate."""
        return self.acc.token_loss(logits, batch["labels"], batch["dataset"], num_items=num_items)

    def log(self, step: int, *, owner: bool = True) -> None:
        if step % LOG_EVERY == 0:
            if owner:
                self.aggregator.drain(self.acc)
            self.logger.log(step, self.aggregator, prefix="train")

    def totals(self) -> dict[str, float]:
        """Return what this rank says of the run, and end the job."""
        self.logger.close()
        return self.aggregator.get_metrics_for_logging("run")


def items(labels: torch.Tensor, group: dist.ProcessGroup | None, parts: int) -> torch.Tensor:
    """Return what a rank divides its loss by, so that gradients may be averaged over `parts`."""
    number = (labels != IGNORED).sum()
    dist.all_reduce(number, group=group)
    return number / parts


# -- Layouts -------------------------------------------------------------------------------------


def data_parallel(rank: int, folder: Path) -> dict[str, float]:
    """DDP: every rank has samples of its own."""
    return train_on_own_samples(rank, DistributedDataParallel(byte_model()), Job("ddp", folder))


def fully_sharded(rank: int, folder: Path) -> dict[str, float]:
    """FSDP2: as DDP, with parameters cut over the ranks; the gradient's norm is a DTensor."""
    from torch.distributed.fsdp import fully_shard

    model = byte_model()
    for block in model[1:3]:
        fully_shard(block)
    fully_shard(model)
    return train_on_own_samples(rank, model, Job("fsdp", folder))


def skipping(rank: int, folder: Path) -> dict[str, float]:
    """DDP; in two steps the gradients of one rank overflow, and no rank takes those steps."""
    model = DistributedDataParallel(byte_model())
    return train_on_own_samples(rank, model, Job("skipping", folder), OVERFLOWING)


def train_on_own_samples(
    rank: int, model: nn.Module, job: Job, overflowing: Sequence[int] = ()
) -> dict[str, float]:
    optimizer = sgd(model)
    for step, batch in enumerate(batches(rank, 4), 1):
        mark, mark_on_device = job.aggregator.mark(), job.acc.mark()
        job.aggregator.update(batch.pop("metrics"))
        loss = job.loss(model(batch["inputs"]), batch, items(batch["labels"], None, 4))
        if step in overflowing and rank == 2:
            loss = loss * float("inf")
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), NO_CLIPPING)
        job.aggregator.record("grad_norm", norm, "max")
        if norm.isfinite():
            optimizer.step()
        else:
            job.aggregator.rollback(mark)
            job.acc.rollback(mark_on_device)
            if rank == 0:
                job.aggregator.record("skipped_steps", 1, "sum")
        job.log(step)
    return job.totals()


def accumulated(rank: int, folder: Path) -> dict[str, float]:
    """DDP with gradients accumulated over two microbatches; one rank has but one sample."""
    model = DistributedDataParallel(byte_model())
    optimizer, job = sgd(model), Job("accumulated", folder)
    micro = [
        list(pairwise((start, (start + end + 1) // 2, end))) for start, end in pairwise(CUTS[4])
    ][rank]
    micro = [(start, end) for start, end in micro if start < end]
    loaders = [batches(0, 1, cuts=part) for part in micro]
    for step, parts in enumerate(zip(*loaders, strict=True), 1):
        num_items = items(torch.cat([batch["labels"] for batch in parts]), None, 4)
        optimizer.zero_grad()
        for number, batch in enumerate(parts, 1):
            job.aggregator.update(batch.pop("metrics"))
            with nullcontext() if number == len(parts) else model.no_sync():
                job.loss(model(batch["inputs"]), batch, num_items).backward()
        optimizer.step()
        job.log(step)
    return job.totals()


def data_and_tensor_parallel(rank: int, folder: Path, counted: str) -> dict[str, float]:
    """FSDP2 over one dimension of a mesh, and layers cut in two over the other one.

    Both ranks of a `tensor` group hold the same samples, and losses of them, as a DTensor.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        loss_parallel,
        parallelize_module,
    )

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = byte_model()
    plan: dict[str, Any] = {"4": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)}
    for block in ("1", "2"):
        plan |= {f"{block}.{name}": ColwiseParallel() for name in ("query", "key", "value", "up")}
        plan |= {f"{block}.{name}": RowwiseParallel() for name in ("out", "down")}
    parallelize_module(model, mesh["tensor"], plan)
    fully_shard(model, mesh=mesh["data"])

    job = Job(f"tensor-{counted}", folder, mesh["data"] if counted == "by group" else None)
    owner = counted != "by owner" or mesh["tensor"].get_local_rank() == 0
    optimizer, group = sgd(model), mesh["data"].get_group()
    for step, batch in enumerate(batches(mesh["data"].get_local_rank(), 2), 1):
        metrics = batch.pop("metrics")
        if owner:
            job.aggregator.update(metrics)
        with loss_parallel():
            loss = job.loss(model(batch["inputs"]), batch, items(batch["labels"], group, 2))
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        job.log(step, owner=owner)
    return job.totals()


def data_and_pipeline_parallel(
    rank: int, folder: Path, schedule: str, counted: str = "by owner"
) -> dict[str, float]:
    """FSDP2 over one dimension of a mesh, and layers one after the other over the other one.

    Samples count where they go in. Losses are on the last stage alone, which rank 0 is not.
    """
    from torch.distributed import pipelining
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "pipe"))
    part, number = mesh["data"].get_local_rank(), mesh["pipe"].get_local_rank()
    group = mesh["data"].get_group()
    layers = byte_model()[:2] if number == 0 else byte_model()[2:]
    fully_shard(layers, mesh=mesh["data"])
    # A stage that must find its shapes out calls the loss once with what happens to be in memory.
    shapes = [
        torch.empty(2, LENGTH, dtype=torch.long),
        torch.empty(2, LENGTH, WIDTH, requires_grad=True),
        torch.empty(2, LENGTH, 256, requires_grad=True),
    ]
    stage = pipelining.PipelineStage(
        layers,
        number,
        2,
        torch.device("cpu"),
        input_args=shapes[number],
        output_args=shapes[number + 1],
        group=mesh["pipe"].get_group(),
    )
    name = f"pipeline-{schedule}-{counted}"
    job = Job(name, folder, mesh["data"] if counted == "by group" else None)

    def loss_of(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        microbatch = {"labels": target[:, :-1], "dataset": target[:, -1]}
        return job.loss(logits, microbatch, num_items)

    pipeline = getattr(pipelining, schedule)(
        stage, n_microbatches=2, loss_fn=loss_of, scale_grads=False
    )
    optimizer = sgd(layers)
    for step, batch in enumerate(batches(part, 2, cuts=EVENLY), 1):
        metrics = batch.pop("metrics")
        num_items = items(batch["labels"], group, 2)
        optimizer.zero_grad()
        if number == 0:
            job.aggregator.update(metrics)
            pipeline.step(batch["inputs"])
        else:
            # A pipeline cuts its target into microbatches: what a loss needs must be in it.
            pipeline.step(target=torch.cat([batch["labels"], batch["dataset"][:, None]], 1))
        optimizer.step()
        job.log(step)
    return job.totals()


def whole_mesh(rank: int) -> str:
    """Give a mesh of two dimensions to an aggregator; return what it says."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    try:
        MetricsAggregator(process_group=mesh).reduce()
    except ValueError as error:
        return str(error)
    return "nothing"


def all_layouts(rank: int, folder: Path) -> dict[str, Any]:
    """Train in each layout, one after the other, since starting ranks takes longer than that."""
    return {
        "whole mesh": whole_mesh(rank),
        "ddp": data_parallel(rank, folder),
        "fsdp": fully_sharded(rank, folder),
        "accumulated": accumulated(rank, folder),
        "skipping": skipping(rank, folder),
        "tensor-by group": data_and_tensor_parallel(rank, folder, "by group"),
        "tensor-by owner": data_and_tensor_parallel(rank, folder, "by owner"),
        "tensor-twice": data_and_tensor_parallel(rank, folder, "twice"),
        **{
            f"pipeline-{schedule}-{counted}": data_and_pipeline_parallel(
                rank, folder, schedule, counted
            )
            for schedule, counted in (
                ("ScheduleGPipe", "by owner"),
                ("Schedule1F1B", "by owner"),
                ("ScheduleGPipe", "by group"),
            )
        },
    }


# -- The truth -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """What a training in one process says of each step."""

    losses: list[dict[str, list[float]]]
    """Of each token, by dataset."""
    norms: list[float]

    @classmethod
    def train(cls, steps: Sequence[int] = range(STEPS)) -> Reference:
        model = byte_model()
        optimizer, samples = sgd(model), read_samples(max(steps) + 1)
        losses, norms = [], []
        for step in steps:
            of_step: dict[str, list[torch.Tensor]] = {name: [] for name in DATASETS}
            for sample in samples[PER_STEP * step : PER_STEP * (step + 1)]:
                tokens = torch.tensor(sample["tokens"])
                of_sample = F.cross_entropy(
                    model(tokens[None, :-1])[0], tokens[1:], reduction="none"
                )
                of_step[DATASETS[sample["dataset"]]].append(of_sample)
            everything = torch.cat([one for of_one in of_step.values() for one in of_one])
            optimizer.zero_grad()
            everything.mean().backward()
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), NO_CLIPPING).item())
            optimizer.step()
            losses.append({name: torch.cat(of_one).tolist() for name, of_one in of_step.items()})
        return cls(losses, norms)

    def loss(self, steps: slice, dataset: str | None = None) -> float:
        """Return the mean over the tokens of these steps, of one dataset or all."""
        names = DATASETS if dataset is None else (dataset,)
        values = [value for step in self.losses[steps] for name in names for value in step[name]]
        return sum(values) / len(values)
