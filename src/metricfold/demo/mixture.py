"""Which texts are trained on in which step, by which rank: a pure function of the step.

Sample 0, 1, 2, … of the run is drawn by a generator that is seeded with that number, so the
position in the data is a single integer, any process can say which texts a step holds, and nothing
changes when the run goes on with another number of ranks: a step has `SAMPLES_PER_STEP` samples
whoever computes them.

Within a step, samples are sorted by length and cut into shares, which take about equally long
(`cut_by_time`): one rank gets many short texts, another one few long ones. Little is lost to
padding, no rank waits for another; and what one rank sees is not a fair sample of the data, as in
any job that batches so. The devices of one compiled step have equally many instead (`cut_evenly`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, TypeAlias

import numpy as np

from metricfold.demo.texts import Text

__all__ = [
    "SAMPLES_PER_STEP",
    "Corpus",
    "Cut",
    "Mixture",
    "Sample",
    "cut_by_time",
    "cut_evenly",
]

SAMPLES_PER_STEP = 16

Cut: TypeAlias = Callable[[list[int], int], list[int]]
"""Given ascending lengths and a number of parts, returns where each part but the last ends."""

_HOLD_OUT_EVERY = 20
_MAX_HELD_OUT = 48


@dataclass(frozen=True, slots=True)
class Corpus:
    """The texts of one dataset: those to train on, and those held out for validation."""

    name: str
    training: list[Text]
    validation: list[Text]

    @classmethod
    def split(cls, name: str, texts: list[Text]) -> Corpus:
        """Hold every 20th text out; a single text has to serve for both."""
        training = [text for i, text in enumerate(texts) if i % _HOLD_OUT_EVERY]
        return cls(name, training or texts, texts[::_HOLD_OUT_EVERY][:_MAX_HELD_OUT])


class Sample(NamedTuple):
    """One text of the mixture, and the index of the dataset it is from."""

    dataset: int
    text: Text

    @property
    def length(self) -> int:
        """Number of tokens: one a byte."""
        return len(self.text.text.encode())


def cut_by_time(lengths: list[int], parts: int) -> list[int]:
    """Return where to cut ascending `lengths` into `parts`, none empty, so that each is quick.

    A part costs its number of samples times its longest one: that is what padding makes of it.
    """
    budgets = {number * length for number in range(1, len(lengths) + 1) for length in lengths}
    for budget in sorted(budgets):
        cuts = []
        end = len(lengths)
        for left in range(parts - 1, 0, -1):
            # From the longest down: as many as the budget holds, and one at least for each part left.
            end -= min(max(budget // lengths[end - 1], 1), end - left)
            cuts.append(end)
        if end * lengths[end - 1] <= budget:
            return cuts[::-1]
    raise AssertionError("the largest budget holds all samples")


def cut_evenly(lengths: list[int], parts: int) -> list[int]:
    """Return where to cut `lengths` into `parts` of equal numbers; the first have the remainder."""
    each, remainder = divmod(len(lengths), parts)
    return [part * each + min(part, remainder) for part in range(1, parts)]


class Mixture:
    """Several datasets, drawn from in proportion to the square roots of their sizes.

    The square root, as multilingual training has it, keeps a small dataset from drowning.
    """

    def __init__(self, corpora: Sequence[Corpus], *, cut: Cut = cut_by_time) -> None:
        self.corpora = list(corpora)
        self.names = [corpus.name for corpus in corpora]
        self.cut = cut
        roots = np.sqrt([len(corpus.training) for corpus in corpora])
        self.weights = roots / roots.sum()

    @property
    def longest(self) -> int:
        """Number of tokens of the longest text."""
        texts = (one for corpus in self.corpora for one in (*corpus.training, *corpus.validation))
        return max(Sample(0, text).length for text in texts)

    def draw(self, number: int) -> Sample:
        """Return sample `number` of the run."""
        generator = np.random.default_rng((0, number))
        dataset = int(generator.choice(len(self.corpora), p=self.weights))
        texts = self.corpora[dataset].training
        return Sample(dataset, texts[generator.integers(len(texts))])

    def shares(self, step: int, parts: int) -> list[list[int]]:
        """Return the sample numbers of `step` (from 1 on) for each of at most 16 ranks or devices."""
        first = (step - 1) * SAMPLES_PER_STEP
        numbers = range(first, first + SAMPLES_PER_STEP)
        lengths = {number: self.draw(number).length for number in numbers}
        by_length = sorted(numbers, key=lambda number: lengths[number])
        cuts = [0, *self.cut([lengths[number] for number in by_length], parts), SAMPLES_PER_STEP]
        return [by_length[start:end] for start, end in pairwise(cuts)]

    def held_out(self) -> list[Sample]:
        """Return all texts that are not trained on, the longest first."""
        samples = [
            Sample(i, text) for i, corpus in enumerate(self.corpora) for text in corpus.validation
        ]
        return sorted(samples, key=lambda sample: sample.length, reverse=True)
