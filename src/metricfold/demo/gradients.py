"""The norm of each rank's own gradient, which only exists before the ranks' gradients are averaged.

Afterwards all ranks hold the same gradient, and the rank that spoiled it cannot be told any more.
"""

# Annotations stay objects here: DistributedDataParallel inspects those of its hooks.

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

__all__ = ["LocalGradientNorm"]


class LocalGradientNorm:
    """Watches the gradients of `model` on their way into the all-reduce."""

    def __init__(self, model: DistributedDataParallel) -> None:
        self._squares = torch.zeros(())
        model.register_comm_hook(None, self._watch)

    def _watch(
        self,
        state: None,
        bucket: dist.GradBucket,  # type: ignore[name-defined] # torch does not tell mypy of it
    ) -> torch.futures.Future[torch.Tensor]:
        self._squares = self._squares + bucket.buffer().square().sum()
        assert dist.group.WORLD is not None
        return allreduce_hook(dist.group.WORLD, bucket)

    def pop(self) -> torch.Tensor:
        """Return the norm since the last call, a scalar on the gradients' device."""
        norm, self._squares = self._squares.sqrt(), torch.zeros(())
        return norm
