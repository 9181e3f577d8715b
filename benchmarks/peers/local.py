"""What a user keeps by hand for a library that only moves numbers."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

__all__ = ["Running"]


@dataclass(slots=True)
class Running:
    """One metric on this rank since the last log.

    Args:
        aggregation: of the metric.
        keep: of a distribution, how many recent values; None: all.
    """

    aggregation: str
    keep: int | None = None
    total: torch.Tensor = field(default_factory=lambda: torch.tensor(0.0, dtype=torch.float64))
    count: int = 0
    parts: list[torch.Tensor] = field(default_factory=list)

    def add(self, values: torch.Tensor) -> None:
        if self.aggregation == "distribution":
            self.parts.append(values)
            if self.keep is not None:
                self.parts = [torch.cat(self.parts)[-self.keep :]]
        elif self.aggregation == "max":
            self.total = torch.maximum(self.total, values.max()) if self.count else values.max()
        elif self.aggregation == "min":
            self.total = torch.minimum(self.total, values.min()) if self.count else values.min()
        else:
            self.total = self.total + values.sum(dtype=torch.float64)
        self.count += values.numel()

    @property
    def values(self) -> torch.Tensor:
        """The values of a distribution."""
        return torch.cat(self.parts)
