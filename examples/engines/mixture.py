"""What the examples of engines share: three datasets that ranks read unevenly, a model, the truth.

What a rank reads in a step follows from the two alone, so that a training that starts again reads
what it would have read, and totals can be counted from the data.
"""

import random

import torch
import torch.distributed as dist

from metricfold import DefaultTrainingMetricTransform, MetricsCollator, read_jsonl

NAMES = ("docs", "code", "tables")
LENGTHS = {"docs": (4, 20), "code": (10, 40), "tables": (2, 6)}
ALPHABETS = {"docs": range(20), "code": range(20, 32), "tables": range(30, 32)}
PAD = -100
STEPS, EVERY, BREAK = (
    8,
    4,
    6,
)  # steps, steps between logs, and the step after which it is begun anew


def drawn(step, rank):
    """Return names and tokens of the samples that a rank reads in a step: rank 0 has "docs" alone."""
    draw = random.Random(1000 * step + rank)
    names = draw.choices(NAMES, (3, 2, 1), k=3 + 2 * rank) if rank else ["docs"] * 3
    return [(name, draw.choices(ALPHABETS[name], k=draw.randint(*LENGTHS[name]))) for name in names]


def batch_of(step, rank):
    return collate(
        [
            TRANSFORMS[name]({"tokens": tokens, "dataset": NAMES.index(name)})
            for name, tokens in drawn(step, rank)
        ]
    )


def pad(samples):
    tokens = [torch.tensor(sample["tokens"]) for sample in samples]
    tokens = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=PAD)
    return {
        "inputs": tokens[:, :-1].clamp(min=0),
        "labels": tokens[:, 1:],
        "dataset": torch.tensor([sample["dataset"] for sample in samples]),
    }


collate = MetricsCollator(pad)
TRANSFORMS = {name: DefaultTrainingMetricTransform() for name in NAMES}
for name, transform in TRANSFORMS.items():
    transform.set_dataset_name(name)


class Model(torch.nn.Module):
    """Guesses the next token from this one; the same on every rank."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(32, 16)
        self.head = torch.nn.Linear(16, 32)

    def forward(self, inputs):
        return self.head(self.embedding(inputs))


# -- The truth, of which a training has no need ----------------------------------------------------


class Ledger:
    """The loss of every token, added up by hand."""

    def __init__(self):
        self.seen = []  # of each sample: step, dataset, sum of the losses and number of tokens

    @torch.no_grad()
    def see(self, step, logits, batch):
        losses = torch.nn.functional.cross_entropy(
            logits.double().transpose(1, 2), batch["labels"], reduction="none", ignore_index=PAD
        ).sum(1)
        tokens = (batch["labels"] != PAD).sum(1)
        names = [NAMES[place] for place in batch["dataset"]]
        self.seen += zip([step] * len(names), names, losses.tolist(), tokens.tolist(), strict=True)

    def losses(self, first, last):
        """Return the mean loss of all tokens of these steps, on all ranks together."""
        everyone = [self.seen]
        if dist.is_initialized():
            everyone = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, self.seen)
        seen = [one for of_rank in everyone for one in of_rank if first <= one[0] <= last]
        datasets = {"all": seen} | {name: [one for one in seen if one[1] == name] for name in NAMES}
        return {
            f"{name}/loss": sum(one[2] for one in of) / sum(one[3] for one in of)
            for name, of in datasets.items()
        }


def counted(steps, ranks, *, without=()):
    """Return the samples and tokens of the first steps of all ranks, counted from the data."""
    totals = {}
    for step in {*range(1, steps + 1)}.difference(without):
        for rank in range(ranks):
            for dataset, tokens in drawn(step, rank):
                for name in ("all", dataset):
                    for key, n in (("samples_seen", 1), ("tokens_seen", len(tokens))):
                        totals[f"{name}/{key}"] = totals.get(f"{name}/{key}", 0) + n
    return totals


def last_logged(path, names, prefix="train"):
    """Return what the last record of a log says, as "docs/loss" for "train_docs/loss"."""
    metrics = read_jsonl(path)[-1].metrics
    prefixes = {name: prefix if name == "all" else f"{prefix}_{name}" for name in ("all", *NAMES)}
    keys = {name: prefixes[name.partition("/")[0]] + "/" + name.partition("/")[2] for name in names}
    return {name: metrics[key] for name, key in keys.items()}


def table(theirs, ours, truth):
    """Return lines of what the engine says, where it does, of what we say, and of the truth."""
    lines = [f"{'':20}{'theirs':>10}{'ours':>10}{'the truth':>12}"]
    for name in truth:
        values = (theirs.get(name), ours[name], truth[name])
        their, our, true = (
            "-" if value is None else f"{value:.5f}" if value % 1 else f"{value:.0f}"
            for value in values
        )
        lines.append(f"{name:20}{their:>10}{our:>10}{true:>12}")
    return "\n".join(lines)
