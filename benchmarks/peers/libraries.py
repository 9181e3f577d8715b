"""The libraries that are compared, and where each one's contender is."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from importlib.util import find_spec

from benchmarks.contenders import Contender


@dataclass(frozen=True, slots=True)
class Library:
    """A library as a user would log with it; its contender is a class, as ``module:name``."""

    name: str
    package: str
    contender: str

    @property
    def installed(self) -> bool:
        return find_spec(self.package) is not None

    def load(self) -> type[Contender]:
        """Import the library."""
        module, name = self.contender.split(":")
        found: type[Contender] = getattr(importlib.import_module(f"benchmarks.{module}"), name)
        return found


OURS = Library("metricfold", "metricfold", "contenders:MetricfoldEverywhere")
BARE = Library("bare all_reduce", "torch", "contenders:BareAllReduce")

LIBRARIES = (
    OURS,
    Library("torchmetrics", "torchmetrics", "peers.torchmetrics:MetricCollections"),
    Library("torcheval", "torcheval", "peers.torcheval:SyncAndCompute"),
    Library("Lightning self.log", "lightning", "peers.lightning:SelfLog"),
    Library("Accelerate", "accelerate", "peers.accelerate:GatherForMetrics"),
    BARE,
)
"""Ours comes first: the bare collective is told how much it moves."""
