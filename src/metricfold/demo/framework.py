"""What differs between the frameworks that the demo trains with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from metricfold.demo.mixture import Cut, cut_by_time, cut_evenly

__all__ = ["FRAMEWORKS", "Framework"]


@dataclass(frozen=True, slots=True)
class Framework:
    """One framework.

    Args:
        name: what ``--framework`` takes.
        title: what people call it.
        part: what the samples of a step are split over.
        parts: how many of them there are by default.
        steps: how many steps there are by default: a minute's, about.
        module: the training loop.
        checkpoint: the name of the file that it saves to.
        cut: how a step is cut into shares.
        packages: what it needs, and what to give to pip for it.
    """

    name: str
    title: str
    part: str
    parts: int
    steps: int
    module: str
    checkpoint: str
    cut: Cut
    packages: Mapping[str, str]


_SINKS = {"rich": "metricfold[console]", "tensorboard": "metricfold[tensorboard]"}

FRAMEWORKS = MappingProxyType(
    {
        "torch": Framework(
            name="torch",
            title="PyTorch",
            part="rank",
            parts=2,
            steps=200,
            module="metricfold.demo.train",
            checkpoint="checkpoint.pt",
            cut=cut_by_time,
            packages={"torch": "metricfold[torch]", **_SINKS},
        ),
        "jax": Framework(
            name="jax",
            title="JAX",
            part="device",
            parts=4,
            steps=60,
            module="metricfold.demo.jax.train",
            checkpoint="checkpoint.npz",
            cut=cut_evenly,
            packages={
                "jax": "metricfold[jax]",
                "flax": "metricfold[jax]",
                "optax": "optax",
                **_SINKS,
            },
        ),
    }
)
