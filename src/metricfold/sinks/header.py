"""What a process says of the run, with the first record that it writes."""

from __future__ import annotations

import operator
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, SupportsIndex

from metricfold.communicator.base import jax_job, torch_ranks
from metricfold.metric import check_name
from metricfold.sinks.config import config_as_json
from metricfold.sinks.loud import mention

__all__ = ["Header", "better"]

_PACKAGES = ("metricfold", "numpy", "torch", "jax")


@dataclass(frozen=True, slots=True)
class Header:
    """What the user has said of the run."""

    said: dict[str, Any]
    left_out: int = 0  # entries of the configuration that there is no room for

    @classmethod
    def checked(
        cls,
        config: object,
        name: str | None,
        total_steps: SupportsIndex | None,
        better: Mapping[str, str] | None,
    ) -> Header:
        """Return it as it is now; errors are those of `MetricsLogger`."""
        said: dict[str, Any] = {}
        left_out = 0
        if name is not None:
            check_name("name=", name)
            said["name"] = name
        if total_steps is not None:
            steps = operator.index(total_steps)
            if steps < 1:
                raise ValueError(f"total_steps is {steps}, but must be at least 1")
            said["total_steps"] = steps
        if better:
            for one, way in better.items():
                check_name("a name in better=", one)
                if way not in ("higher", "lower"):
                    raise ValueError(f"better={{{one!r}: {way!r}}}: use 'higher' or 'lower'")
            said["better"] = dict(better)
        if config is not None:
            said["config"], left_out = config_as_json(config)
        return cls(said, left_out)

    def of_process(self) -> dict[str, Any]:
        """Return all of it: what was said, and what is known now of the process that writes."""
        known: dict[str, Any] = {"python": platform.python_version()}
        for package in _PACKAGES:
            version = getattr(sys.modules.get(package), "__version__", None)
            if isinstance(version, str):
                known[package] = str(version)
        job = jax_job()
        known["world_size"] = max(torch_ranks(), 1 if job is None else int(job.num_processes))
        if self.left_out:
            known["config_left_out"] = self.left_out
            mention(
                f"config= is too large for a record: {self.left_out} of its entries are left out. "
                "Give the settings alone, and no data"
            )
        return known | self.said


def better(name: str, statistic: str, said: Mapping[str, Any]) -> str | None:
    """Return whether ``"lower"`` or ``"higher"`` values of a metric are better; None: nobody knows.

    Args:
        name: of the metric.
        statistic: of it; counts beside a value are neither.
        said: what is known of the run; its ``"better"`` says so first.
    """
    if statistic in _NEITHER:
        return None
    last = name.rpartition("/")[2]
    chosen = said.get("better")
    for one in (name, last):
        if isinstance(chosen, Mapping) and chosen.get(one) in ("lower", "higher"):
            return str(chosen[one])
    return "lower" if last in ("loss", "perplexity") or last.endswith("_loss") else None


_NEITHER = ("count", "nan_count", "inf_count", "std", "weight", "stderr")
