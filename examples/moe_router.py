"""Where the tokens of each dataset go in a mixture of experts that is split over ranks.

    torchrun --nproc-per-node 2 examples/moe_router.py

A small network learns to guess the next byte of Python's own documentation and of its bytecode. In each
layer a router sends a token to two of eight experts, half of which each rank holds. Tokens are counted
by layer, expert and dataset where the router chooses, and once more where the experts get them: each
rank then knows its own experts alone, and the log has all of them. What is derived of the counts
(imbalance, dead experts, entropy) is computed from those of all ranks. The mean of what each rank would
say by itself, which is what one gets who logs it on each, stands beside it: it is another number.
"""

import marshal
import math
import os
import pydoc_data.topics
import textwrap
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from metricfold import ConsoleSink, JSONLSink, MetricsAggregator, MetricsLogger
from metricfold.torch import DeviceAccumulator

NAMES = ("docs", "bytecode")
LAYERS, EXPERTS, TOP, WIDTH = 3, 8, 2, 32  # of experts each rank has its part
STEPS, EVERY, SAMPLES, LENGTH = 30, 10, 16, 32


# -- What is derived: of arrays (layer, expert), of which the last axis is the experts ---------------


def imbalance(tokens):
    """How many times its share the busiest expert of a layer gets; 1 at best."""
    return tokens.max(-1) / tokens.mean(-1)


def dead(tokens):
    """How many experts of a layer get less than a twentieth of their share."""
    return (tokens < tokens.mean(-1, keepdims=True) / 20).sum(-1)


def entropy(tokens):
    """How evenly tokens are spread over the experts of a layer, in 0..1."""
    p = tokens / tokens.sum(-1, keepdims=True)
    return -(p * np.log(np.where(p > 0, p, 1))).sum(-1) / math.log(tokens.shape[-1])


DERIVED = {
    "moe/imbalance": lambda m: imbalance(m["expert_tokens"]).max(),
    "moe/dead_experts": lambda m: dead(m["expert_tokens"]).sum(),
    "moe/entropy": lambda m: entropy(m["expert_tokens"]).mean(),
}


# -- A mixture of experts ----------------------------------------------------------------------------


class Exchange(torch.autograd.Function):
    """Rows for each rank go there, gradients the other way."""

    @staticmethod
    def forward(ctx, rows, got, sent):
        ctx.sizes = sent, got
        whole = rows.new_empty((sum(got), *rows.shape[1:]))
        dist.all_to_all_single(whole, rows.contiguous(), got, sent)
        return whole

    @staticmethod
    def backward(ctx, grad):
        return Exchange.apply(grad, *ctx.sizes), None, None


class MoE(torch.nn.Module):
    """One layer: a router, which all ranks hold alike, and this rank's experts."""

    def __init__(self, layer, counts, rank, world_size):
        super().__init__()
        self.here, self.world_size = EXPERTS // world_size, world_size
        self.first = rank * self.here
        self.gate = torch.nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = torch.nn.ModuleList(
            torch.nn.Sequential(
                torch.nn.Linear(WIDTH, 2 * WIDTH),
                torch.nn.ReLU(),
                torch.nn.Linear(2 * WIDTH, WIDTH),
            )
            for _ in range(self.here)
        )
        # The place is kept as a tensor: compiled, layers share one graph.
        self.chosen = counts.at("expert_tokens", layer=layer)
        self.served = counts.at("served_tokens", layer=layer)

    def forward(self, x, dataset):
        """Return what the experts make of tokens, shape (tokens, WIDTH), each of a dataset."""
        scores, top = self.gate(x).softmax(-1).topk(TOP)
        self.chosen.update(torch.ones_like(scores), ids={"expert": top}, dataset_ids=dataset)

        # Each choice of each token goes to the rank that holds the expert.
        expert, order = top.flatten().sort(stable=True)
        token = order // TOP
        sent = torch.bincount(expert // self.here, minlength=self.world_size)
        got = torch.empty_like(sent)
        dist.all_to_all_single(got, sent)
        got, sent = got.tolist(), sent.tolist()
        expert, of, given = (
            Exchange.apply(rows, got, sent) for rows in (expert, dataset[token], x[token])
        )
        self.served.update(torch.ones(len(expert)), ids={"expert": expert}, dataset_ids=of)
        made = torch.zeros_like(given)
        for place, one in enumerate(self.experts, self.first):
            chosen = (expert == place).nonzero().squeeze(1)
            made = made.index_add(0, chosen, one(given[chosen]))

        # And back to where it came from.
        weighed = Exchange.apply(made, sent, got) * scores.flatten()[order, None]
        return x + torch.zeros_like(x).index_add(0, token, weighed)


class Model(torch.nn.Module):
    def __init__(self, counts, rank, world_size):
        super().__init__()
        self.embedding = torch.nn.Embedding(256, WIDTH)
        self.layers = torch.nn.ModuleList(
            MoE(layer, counts, rank, world_size) for layer in range(LAYERS)
        )
        self.head = torch.nn.Linear(WIDTH, 256)

    def forward(self, tokens, dataset):
        x = self.embedding(tokens)
        flat, of = x.flatten(0, 1), dataset[:, None].expand(tokens.shape).flatten()
        for layer in self.layers:
            flat = layer(flat, of)
        return self.head(flat.view(x.shape))


# -- Two datasets, of which one rank sees more of the one, and the other of the other ----------------


def texts():
    docs = "\n".join(pydoc_data.topics.topics.values()).encode()
    source = Path(textwrap.__file__).read_text()
    code = marshal.dumps(compile(source, textwrap.__file__, "exec"))
    return [torch.tensor(list(text)) for text in (docs, code)]


def batch(sources, generator, rank):
    dataset = (torch.rand(SAMPLES, generator=generator) < (0.1, 0.9)[rank % 2]).long()
    starts = torch.rand(SAMPLES, generator=generator)
    samples = []
    for source, start in zip(dataset.tolist(), starts.tolist(), strict=True):
        first = int(start * (len(sources[source]) - LENGTH - 1))
        samples.append(sources[source][first : first + LENGTH + 1])
    return torch.stack(samples), dataset


# -- The training ------------------------------------------------------------------------------------


def train(folder, rank, world_size):
    """Return the snapshot of the last log."""
    counts = DeviceAccumulator(
        {
            "loss": "mean",
            "expert_tokens": ("sum", "layer", "expert"),
            "served_tokens": ("sum", "layer", "expert"),
        },
        NAMES,
        axes={"layer": LAYERS, "expert": EXPERTS},
    )
    torch.manual_seed(0)  # what all ranks hold begins alike
    model = Model(counts, rank, world_size)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    everywhere = [p for name, p in model.named_parameters() if ".experts." not in name]
    aggregator = MetricsAggregator(by={"expert_tokens": "layer"})
    for name, fn in DERIVED.items():
        aggregator.derive(name, fn, window="interval")
    sources, generator = texts(), torch.Generator().manual_seed(1 + rank)
    sinks = [ConsoleSink(select=["*/loss", "*/moe/*"]), JSONLSink(folder / "moe.jsonl")]
    snapshot = None
    with MetricsLogger(sinks) as logger:
        for step in range(1, STEPS + 1):
            tokens, dataset = batch(sources, generator, rank)
            counts.token_loss(model(tokens[:, :-1], dataset), tokens[:, 1:], dataset).backward()
            for parameter in everywhere:
                dist.all_reduce(parameter.grad)
            optimizer.step()
            optimizer.zero_grad()
            if step % EVERY == 0:
                aggregator.drain(counts)
                snapshot = aggregator.reduce()
                logger.log(step, snapshot, prefix="train", rollup=True)
    return snapshot


def compared(snapshot, what):
    """Return by dataset what holds of all tokens, and the mean of what each rank finds of its own."""
    found = {}
    for dataset in (None, *NAMES):
        everyone = snapshot.array(dataset, "expert_tokens", window="interval")[0]
        ranks = snapshot.array(
            dataset, "expert_tokens", by=("rank", "layer", "expert"), window="interval"
        )[0]
        found[dataset] = what(everyone), np.nanmean([what(own) for own in ranks], axis=0)
    return found


def main(folder):
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    snapshot = train(folder, rank, world_size)
    if rank == 0:
        for name, what in (("imbalance", imbalance), ("dead", dead), ("entropy", entropy)):
            for dataset, (right, mean_of_ranks) in compared(snapshot, what).items():
                print(f"{name:10}{dataset or 'all':9}by layer {np.round(right, 3)}", end="   ")
                print(f"mean of the ranks' own {np.round(mean_of_ranks, 3)}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(os.environ.get("RUNS", "runs")))
