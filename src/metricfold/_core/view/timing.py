"""What a timer took over all ranks, and under which names it is counted."""

from __future__ import annotations

from dataclasses import dataclass

from metricfold.metric import AggregationType

__all__ = ["TimerKeys", "Timing"]


@dataclass(frozen=True, slots=True)
class Timing:
    """What a timer took in the interval, over all ranks (`Snapshot.timing`).

    Args:
        mean: seconds of one use that has ended in the interval; None if none has.
        max: seconds of the longest; None as before.
        max_rank: the rank that the longest use was on; None if that is not known.
        share: of the interval's time that counts, 0 to 1: the mean over ranks. More than 1 if
            several threads or tasks of a rank use the timer at the same time.
        slowest: the rank that spent the most time on it.
        slowest_share: its own share.
        fastest: the rank that spent the least; a rank that never used it spent none.
        fastest_share: its own share.
        median_share: that of the median rank.
    """

    mean: float | None
    max: float | None
    max_rank: int | None
    share: float
    slowest: int
    slowest_share: float
    fastest: int
    fastest_share: float
    median_share: float


@dataclass(frozen=True, slots=True)
class TimerKeys:
    """The names of the metrics that a timer gives."""

    mean: str
    max: str
    share: str

    @classmethod
    def of(cls, name: str) -> TimerKeys:
        return cls(f"{name}_seconds", f"{name}_seconds_max", f"{name}_share")

    def names(self) -> tuple[str, ...]:
        return self.mean, self.max, self.share

    def types(self) -> tuple[tuple[str, AggregationType], ...]:
        """Return each name with its aggregation."""
        return (
            (self.mean, AggregationType.MEAN),
            (self.max, AggregationType.MAX),
            (self.share, AggregationType.RATE),
        )
