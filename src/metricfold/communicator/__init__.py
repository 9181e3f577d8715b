"""Who the other ranks are, and how to talk to them.

Frameworks are found by looking in `sys.modules`: ranks can only be connected by a framework that
the training script has imported and initialised itself.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

from metricfold._core.runtime.published import publish
from metricfold.communicator.base import (
    Communicator,
    LocalCommunicator,
    MissingRanksError,
    jax_job,
    torch_distributed,
    torch_ranks,
)

__all__ = ["Communicator", "LocalCommunicator", "MissingRanksError", "connect", "global_rank"]


def connect(
    name: str, process_group: Any, timeout: timedelta | None, generation: int
) -> Communicator:
    """Return a communicator over `process_group`, or over all ranks.

    Args:
        name: pairs aggregators across ranks.
        process_group: a torch process group, one dimension of a `DeviceMesh`, or None for all.
        timeout: how long to wait for missing ranks; None: as long as the training group does, or
            ten minutes over JAX processes.
        generation: how often this aggregator has been bound before.

    Raises:
        RuntimeError: it is not clear which processes are meant, or torch has no group to be given.
    """
    job = jax_job()
    if process_group is None and job is not None:
        if (ranks := torch_ranks()) > 1:
            raise RuntimeError(
                f"torch.distributed ({ranks} ranks) and jax.distributed ({job.num_processes} "
                "processes) are both initialised: say which of them the aggregator is to reduce "
                "over, by communicator=JaxCommunicator('a name of its own'), which is in "
                "metricfold.communicator.jax, or by process_group=torch.distributed.group.WORLD"
            )
        from metricfold.communicator.jax import JaxCommunicator  # noqa: PLC0415

        return JaxCommunicator(name, timeout, generation)
    if torch_ranks():
        from metricfold.communicator.torch import TorchCommunicator  # noqa: PLC0415

        return TorchCommunicator(name, process_group, timeout, generation)
    if process_group is not None and job is not None:
        raise RuntimeError(
            "a process_group was given, but the processes are JAX's, which knows no groups: leave "
            "it out, and the aggregator reduces over all processes"
        )
    # There is one in a dry run, whose ranks do not exist.
    if process_group is not None and torch_distributed() is None:
        raise RuntimeError(
            "a process_group was given, but torch.distributed is not initialised (any more): call "
            "torch.distributed.init_process_group() first"
        )
    return LocalCommunicator()


def global_rank() -> int:
    """Return this process's rank in the whole job; 0 when there is only one.

    Before the job is initialised, and after it has been torn down, the launcher's word counts.
    """
    job = jax_job()
    if job is not None and torch_ranks() <= 1:
        return int(job.process_id)
    if torch_ranks():
        return int(torch_distributed().get_rank())
    rank = os.environ.get("RANK", "")
    return int(rank) if rank.isdecimal() else 0


publish(globals())
