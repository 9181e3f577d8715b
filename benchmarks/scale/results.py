"""What has been measured, in a form that can be kept in a file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.scale.model import Collective, Kind

__all__ = ["First", "Results", "Samples", "Steady"]


@dataclass(frozen=True, slots=True)
class Steady:
    """What a log takes of rank 0 once the keys are agreed on.

    Args:
        workload: what is logged.
        route: on which route.
        ranks: how many there are.
        collectives: what it takes part in.
        pack: CPU seconds before the first collective.
        between: CPU seconds between the two; 0 if there is one.
        merge: CPU seconds after the last one.
        report: CPU seconds that turning the snapshot into a dict takes, on rank 0 alone.
        peak: bytes that the reduction takes at most beyond what was held before.
        report_peak: the same with the dict.
        kept: bytes that stay until the next log.
    """

    workload: str
    route: str
    ranks: int
    collectives: list[Collective]
    pack: float
    between: float
    merge: float
    report: float
    peak: int
    report_peak: int
    kept: int

    @property
    def reduce(self) -> float:
        """CPU seconds of the reduction."""
        return self.pack + self.between + self.merge


@dataclass(frozen=True, slots=True)
class First:
    """What the first log takes of rank 0, where the ranks agree on the keys.

    Args:
        workload: what is logged.
        ranks: how many there are.
        different: how many different news there are.
        collectives: what it takes part in.
        seconds: CPU seconds of the reduction.
        peak: bytes that it takes at most beyond what was held before.
    """

    workload: str
    ranks: int
    different: int
    collectives: list[Collective]
    seconds: float
    peak: int


@dataclass(frozen=True, slots=True)
class Samples:
    """What a log of unbounded distributions takes, given how many values have come in.

    Args:
        route: on which route.
        ranks: how many there are.
        samples: values of each distribution that came in on each rank.
        counted: values that one distribution speaks about, by its own account.
        collectives: what the log takes part in.
        seconds: CPU seconds of the reduction.
        report: CPU seconds of the dict.
        peak: bytes that both take at most beyond what was held before.
    """

    route: str
    ranks: int
    samples: int
    counted: int
    collectives: list[Collective]
    seconds: float
    report: float
    peak: int


@dataclass(slots=True)
class Results:
    """All of it.

    Args:
        machine: where it was measured.
        real: how many ranks of each world held values of their own.
        most_gathered: bytes beyond which no all-gather was carried out.
    """

    machine: str
    real: int
    most_gathered: int
    steady: list[Steady] = field(default_factory=list)
    first: list[First] = field(default_factory=list)
    samples: list[Samples] = field(default_factory=list)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1))

    @classmethod
    def load(cls, path: Path) -> Results:
        plain = json.loads(path.read_text())
        rows = {"steady": Steady, "first": First, "samples": Samples}
        for name, row in rows.items():
            for found in plain[name]:
                found["collectives"] = [
                    Collective(Kind(one["kind"]), one["sent"], one["received"])
                    for one in found["collectives"]
                ]
            plain[name] = [row(**found) for found in plain[name]]
        return cls(**plain)
