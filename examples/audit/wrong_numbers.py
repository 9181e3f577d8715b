"""Wrong numbers that were reported in public, each made again in a few lines, beside ours and the truth.

    python examples/audit/wrong_numbers.py              # one table
    python examples/audit/wrong_numbers.py --markdown   # as it stands in docs/audit.md

Each case computes *theirs* the way the report says that the code did, on data of our own; *ours* by an
aggregator on each rank (a thread each, the same protocol as over processes); *truth* by plain Python or
NumPy over everything that all ranks hold. No code of theirs is in here.
"""

import argparse
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from metricfold import MetricsAggregator
from metricfold.communicator.threads import thread_world
from metricfold.torch import DeviceAccumulator

__all__ = ["CASES", "Case", "Figures", "logged", "markdown"]


@dataclass(frozen=True)
class Figures:
    theirs: float
    ours: float
    truth: float


@dataclass(frozen=True)
class Case:
    """One report.

    Args:
        report: repository and number.
        kind: "issues" or "pull".
        state: of the report, and of its repair where there is one.
        what: the code did, in a line.
        figures: makes the numbers.
    """

    report: str
    kind: str
    state: str
    what: str
    figures: Callable[[], Figures]

    @property
    def url(self) -> str:
        repository, number = self.report.split("#")
        return f"https://github.com/{repository}/{self.kind}/{number}"


CASES: list[Case] = []


def reported(report: str, kind: str, state: str, what: str) -> Callable[..., Any]:
    def add(figures: Callable[[], Figures]) -> Callable[[], Figures]:
        CASES.append(Case(report, kind, state, what, figures))
        return figures

    return add


def logged(
    ranks: int,
    record: Callable[[MetricsAggregator, int], object],
    state: dict[str, Any] | None = None,
    **derived: Callable[[Any], float],
) -> dict[str, float]:
    """Return what is logged after ``record(aggregator, rank)`` on each of so many ranks.

    Args:
        ranks: how many.
        record: what each of them does.
        state: a checkpoint to go on from.
        derived: what is computed from the sums of an interval, once those of all ranks are in.
    """

    def of_rank(communicator: Any) -> dict[str, float]:
        aggregator = MetricsAggregator(communicator=communicator, percentiles=(50, 99))
        if state is not None:
            aggregator.load_state_dict(state)
        for name, function in derived.items():
            aggregator.derive(name, function, window="interval")
        record(aggregator, communicator.rank)
        return aggregator.reduce().as_dict("all")

    with ThreadPoolExecutor(ranks) as pool:
        of_ranks = list(pool.map(of_rank, thread_world(ranks)))
    assert all(other == of_ranks[0] for other in of_ranks), "every rank logs the same"
    return of_ranks[0]


def saved(ranks: int, record: Callable[[MetricsAggregator, int], object]) -> dict[str, Any]:
    """Return the checkpoint that so many ranks take."""

    def of_rank(communicator: Any) -> dict[str, Any]:
        aggregator = MetricsAggregator(communicator=communicator)
        record(aggregator, communicator.rank)
        return aggregator.state_dict()

    with ThreadPoolExecutor(ranks) as pool:
        return next(iter(pool.map(of_rank, thread_world(ranks))))


# -- Means -----------------------------------------------------------------------------------------


@reported(
    "radixark/miles_diffusion#70",
    "pull",
    "merged",
    "mean of the ranks' means: a rank with 1 sample counted as much as one with 8",
)
def mean_of_rank_means() -> Figures:
    losses = [[1.0] * 8, [10.0]]

    def record(aggregator: MetricsAggregator, rank: int) -> None:
        for loss in losses[rank]:
            aggregator.record("loss", loss)

    theirs = np.mean([np.mean(of_rank) for of_rank in losses])
    return Figures(theirs, logged(2, record)["all/loss"], np.mean(np.concatenate(losses)))


@reported(
    "google/flax#262",
    "issues",
    "closed; a guide in #2111",
    "mean of the batches' means: a last batch of 2 counted as much as one of 64",
)
def mean_of_batch_means() -> Figures:
    batches = [(64, 0.5), (64, 0.5), (2, 1.0)]  # samples, accuracy

    def record(aggregator: MetricsAggregator, rank: int) -> None:
        for samples, accuracy in batches:
            aggregator.record("accuracy", accuracy, weight=samples)

    theirs = np.mean([accuracy for _, accuracy in batches])
    truth = sum(n * accuracy for n, accuracy in batches) / sum(n for n, _ in batches)
    return Figures(theirs, logged(1, record)["all/accuracy"], truth)


@reported(
    "huggingface/trl#1514",
    "pull",
    "open; #2094, for logits, is merged",
    "mean of the steps' means between two logs, though steps have more or fewer chosen samples",
)
def mean_of_step_means() -> Figures:
    chosen = [[1.0] * 6, [4.0]]  # rewards of the chosen samples of two steps

    def record(aggregator: MetricsAggregator, rank: int) -> None:
        for rewards in chosen:
            aggregator.record("rewards_chosen", np.array(rewards), each=True)

    theirs = np.mean([np.mean(rewards) for rewards in chosen])
    return Figures(theirs, logged(1, record)["all/rewards_chosen"], np.mean(np.concatenate(chosen)))


@reported(
    "Lightning-AI/pytorch-lightning#21859",
    "issues",
    "open",
    "sums and batch sizes were averaged over ranks before the division, the sizes as integers, rounded down",
)
def rounded_denominator() -> Figures:
    ranks = [(3, 0.8), (2, 0.8)]  # samples, accuracy

    def record(aggregator: MetricsAggregator, rank: int) -> None:
        samples, accuracy = ranks[rank]
        aggregator.record("accuracy", accuracy, weight=samples)

    total = sum(n * accuracy for n, accuracy in ranks)
    samples = sum(n for n, _ in ranks)
    theirs = (total / len(ranks)) / (samples // len(ranks))
    return Figures(theirs, logged(2, record)["all/accuracy"], total / samples)


@reported(
    "huggingface/trl#2468",
    "issues",
    "closed",
    "what was logged was the mean of rank 0 alone",
)
def rank_zero_alone() -> Figures:
    accuracies = [0.9, 0.5, 0.6, 0.4]  # of equally many samples

    def record(aggregator: MetricsAggregator, rank: int) -> None:
        aggregator.record("accuracy", accuracies[rank])

    return Figures(accuracies[0], logged(4, record)["all/accuracy"], np.mean(accuracies))


@reported(
    "allenai/open-instruct#614",
    "pull",
    "merged",
    "metrics were reduced by their place in each rank's own order, though ranks had different ones",
)
def reduced_by_place() -> Figures:
    ranks = [{"math": 1.0, "code": 0.0}, {"code": 0.0}]  # the mean reward of each kind of sample

    def record(aggregator: MetricsAggregator, rank: int) -> None:
        aggregator.record_all(ranks[rank], agg="mean")

    theirs = np.mean([next(iter(own.values())) for own in ranks])  # rank 0 calls that place "math"
    truth = np.mean([own["math"] for own in ranks if "math" in own])
    return Figures(theirs, logged(2, record)["all/math"], truth)


# -- Extrema and percentiles -----------------------------------------------------------------------


@reported(
    "radixark/miles#1968",
    "pull",
    "merged",
    "maxima of the ranks were averaged, as all else",
)
def averaged_maxima() -> Figures:
    turns = [[1, 3], [2, 5], [4, 4], [1, 12]]  # of each sample, by rank

    def record(aggregator: MetricsAggregator, rank: int) -> None:
        for number in turns[rank]:
            aggregator.record("turns", number, "max")

    theirs = np.mean([max(own) for own in turns])
    return Figures(theirs, logged(4, record)["all/turns"], max(map(max, turns)))


@reported(
    "verl-project/verl#7361",
    "pull",
    "open",
    'any name with "max" in it was reduced by the maximum, "minmax_diff" too',
)
def reduced_by_name() -> Figures:
    name, steps = "global_seqlen/minmax_diff", [10.0, 50.0, 30.0]

    def record(aggregator: MetricsAggregator, rank: int) -> None:
        for difference in steps:
            aggregator.record(name, difference, "mean")

    theirs = max(steps) if "max" in name else np.mean(steps)
    return Figures(theirs, logged(1, record)[f"all/{name}"], np.mean(steps))


@reported(
    "huggingface/lerobot#4156",
    "issues",
    "open; #3804, which takes bounds, is merged",
    "99th percentiles of the parts were averaged, weighted by their sizes",
)
def averaged_percentiles() -> Figures:
    parts = [np.linspace(-10, 10, 900), np.linspace(10, 50, 100)]

    def record(aggregator: MetricsAggregator, rank: int) -> None:
        aggregator.record("angle", parts[rank], "distribution", each=True)

    theirs = np.average([np.percentile(part, 99) for part in parts], weights=list(map(len, parts)))
    truth = np.percentile(np.concatenate(parts), 99)
    return Figures(theirs, logged(2, record)["all/angle_stat_p99"], truth)


# -- Norms -----------------------------------------------------------------------------------------

GRADIENT = np.tile([0.5, -0.5], 8)  # of norm 2


def root_of_squares(merged: Any) -> float:
    return math.sqrt(merged["squares"])


@reported(
    "radixark/miles_diffusion#35",
    "pull",
    "merged; also LlamaFactory #10640",
    "the norm of one rank's shard was logged: too low by the root of their number",
)
def norm_of_one_shard() -> Figures:
    shards = np.split(GRADIENT, 4)

    def record(aggregator: MetricsAggregator, rank: int) -> None:
        aggregator.record("squares", shards[rank] @ shards[rank], "sum")

    ours = logged(4, record, norm=root_of_squares)["all/norm"]
    return Figures(np.linalg.norm(shards[0]), ours, np.linalg.norm(GRADIENT))


@reported(
    "ByteDance-Seed/VeOmni#184",
    "issues",
    "closed; #862 is merged",
    "squares were added over shards and their replicas: too high by the root of the replicas",
)
def norm_with_replicas() -> Figures:
    shards = np.split(GRADIENT, 2)  # ranks 0 and 1 hold them, ranks 2 and 3 hold them again

    def record(aggregator: MetricsAggregator, rank: int) -> None:
        shard = shards[rank % 2]  # ModelWatch finds out by itself how often each element is held
        aggregator.record("squares", shard @ shard / 2, "sum")

    theirs = math.sqrt(sum(shards[rank % 2] @ shards[rank % 2] for rank in range(4)))
    ours = logged(4, record, norm=root_of_squares)["all/norm"]
    return Figures(theirs, ours, np.linalg.norm(GRADIENT))


# -- Totals and rates ------------------------------------------------------------------------------


@reported(
    "allenai/open-instruct#1808",
    "pull",
    "open",
    "each of 4 ranks was given the lengths of all samples, and all four lists were added",
)
def counted_on_every_rank() -> Figures:
    lengths = list(range(2000, 2128))

    def record(aggregator: MetricsAggregator, rank: int) -> None:
        for length in lengths[rank::4]:  # its own samples
            aggregator.record("tokens", length, "sum")

    theirs = sum(sum(lengths) for _ in range(4))
    return Figures(theirs, logged(4, record)["all/tokens"], sum(lengths))


@reported(
    "pytorch/pytorch#25162",
    "issues",
    "open; 22 of 21 images in rf-detr #1507",
    "a sampler repeats samples so that all ranks have as many, and they count twice",
)
def repeated_samples() -> Figures:
    images, ranks = 21, 2
    padded = [*range(images), 0]

    def record(aggregator: MetricsAggregator, rank: int) -> None:
        for place in range(rank, len(padded), ranks):
            aggregator.record("images", 1, "sum", weight=int(place < images))

    theirs = sum(len(padded[rank::ranks]) for rank in range(ranks))
    return Figures(theirs, logged(ranks, record)["all/images"], images)


@reported(
    "NVIDIA-NeMo/Automodel#3247",
    "pull",
    "merged",
    "tokens of an expert were counted in the forward pass, which activation checkpointing runs again",
)
def recomputed_forward() -> Figures:
    tokens, counted = torch.ones(6, 4, requires_grad=True), []
    acc = DeviceAccumulator({"tokens": "sum"})

    def expert(x: torch.Tensor) -> torch.Tensor:
        counted.append(len(x))
        acc.update("tokens", torch.tensor(float(len(x))))
        return x.sin().sin()

    checkpoint(expert, tokens, use_reentrant=False).sum().backward()
    aggregator = MetricsAggregator(None)
    aggregator.drain(acc)
    ours = aggregator.get_metrics_for_logging("all")["all/tokens"]
    return Figures(sum(counted), ours, len(tokens))


@reported(
    "axolotl-ai-cloud/axolotl#3291",
    "issues",
    "closed; #3293 is merged",
    "tokens of evaluations were added to those of the training",
)
def evaluation_counted() -> Figures:
    steps = [("train", 1000)] * 50
    evaluations = [("eval", 10_000)] * 5
    of_phase = {}
    for phase in ("train", "eval"):  # an aggregator for each

        def record(aggregator: MetricsAggregator, rank: int, phase: str = phase) -> None:
            for where, tokens in steps + evaluations:
                if where == phase:
                    aggregator.record("tokens", tokens, "sum")

        of_phase[phase] = logged(1, record)["all/tokens"]
    theirs = sum(tokens for _, tokens in steps + evaluations)
    return Figures(theirs, of_phase["train"], sum(tokens for _, tokens in steps))


@reported(
    "axolotl-ai-cloud/axolotl#3940",
    "issues",
    "open",
    "the count of tokens began anew when a run was resumed by itself",
)
def total_after_resume() -> Figures:
    before, after = 1000, 300  # tokens of each rank; 4 ranks, then 2

    def record(aggregator: MetricsAggregator, rank: int, tokens: int) -> None:
        aggregator.record("tokens", tokens, "sum")

    state = saved(4, lambda aggregator, rank: record(aggregator, rank, before))
    ours = logged(2, lambda aggregator, rank: record(aggregator, rank, after), state)
    return Figures(2 * after, ours["all/tokens"], 4 * before + 2 * after)


def tokens_and_seconds(aggregator: MetricsAggregator, tokens: int, seconds: float) -> None:
    aggregator.record_all({"tokens": tokens, "spent": seconds}, agg="sum")


def per_second(merged: Any) -> float:
    return merged["tokens"] / merged["spent"]


@reported(
    "huggingface/transformers#41156",
    "pull",
    "merged",
    "tokens since the first start were divided by the seconds since the last one",
)
def rate_after_resume() -> Figures:
    before, after = (1_000_000, 200.0), (50_000, 10.0)
    state = saved(1, lambda aggregator, rank: tokens_and_seconds(aggregator, *before))
    ours = logged(
        1, lambda aggregator, rank: tokens_and_seconds(aggregator, *after), state, rate=per_second
    )
    theirs = (before[0] + after[0]) / after[1]
    return Figures(theirs, ours["all/rate"], after[0] / after[1])


@reported(
    "allenai/open-instruct#1032",
    "pull",
    "merged",
    "tokens of all steps so far were divided by the seconds of the last one",
)
def rate_of_all_steps() -> Figures:
    steps = [(10_000, 5.0)] * 5

    def record(aggregator: MetricsAggregator, rank: int) -> None:
        for tokens, seconds in steps:
            tokens_and_seconds(aggregator, tokens, seconds)

    theirs = sum(tokens for tokens, _ in steps) / steps[-1][1]
    truth = sum(tokens for tokens, _ in steps) / sum(seconds for _, seconds in steps)
    return Figures(theirs, logged(1, record, rate=per_second)["all/rate"], truth)


# -- The table -------------------------------------------------------------------------------------


def markdown(*, links: bool) -> list[str]:
    """Return the table, a line each."""
    lines = [
        "| report | state | what the code did | theirs | ours | truth |",
        "|---|---|---|---|---|---|",
    ]
    for case in CASES:
        found = case.figures()
        name = case.report.replace("#", " #")
        report = f"[{name}]({case.url})" if links else name
        numbers = [f"{number:.6g}" for number in (found.theirs, found.ours, found.truth)]
        lines.append(f"| {' | '.join([report, case.state, case.what, *numbers])} |")
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--markdown", action="store_true")
    print("\n".join(markdown(links=parser.parse_args().markdown)))
