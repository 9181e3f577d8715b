"""What a log costs the training: steps that log, against steps that do not.

The numbers are reduced, finished and written in the background, where they compete with the step
*after* the log for the same cores. So that step is looked at by itself.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

__all__ = ["Pace"]


@dataclass(frozen=True, slots=True)
class Pace:
    """How long steps took, in seconds, each by the clock of its slowest rank.

    Args:
        logging: steps that log.
        after: steps right after those.
        others: all others.
    """

    logging: list[float]
    after: list[float]
    others: list[float]

    @classmethod
    def of(
        cls,
        seconds: Sequence[Sequence[float]],
        first_step: int,
        logged: Collection[int],
        paused: Collection[int],
    ) -> Pace:
        """Sort the steps of one launch.

        Args:
            seconds: per rank and step, how long the step took.
            first_step: the number of the first of these steps.
            logged: the steps at whose end there was a log.
            paused: the steps at whose end other things were done, such as validation. They say
                nothing about a log; nor does the step after, whose batch has had time to be loaded.
        """
        pace = cls([], [], [])
        for step, slowest in enumerate(map(max, zip(*seconds, strict=True)), first_step):
            if step in paused or step - 1 in paused:
                continue
            if step in logged:
                group = pace.logging
            else:
                group = pace.after if step - 1 in logged else pace.others
            group.append(slowest)
        return pace
