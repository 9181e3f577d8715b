"""The seam between folding and whatever moves bytes between ranks."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from metricfold._core.fold.sample import FloatArray
from metricfold.communicator.tree import Merge

__all__ = [
    "Communicator",
    "LocalCommunicator",
    "MissingRanksError",
    "jax_job",
    "torch_distributed",
    "torch_ranks",
]


class MissingRanksError(RuntimeError):
    """Some ranks did not take part in a collective call before its timeout.

    Attributes:
        missing: the ranks that did not come, ascending.
        hosts: the names of the hosts on which they run, as far as they have said so; empty where all
            ranks that are known of run on one.
    """

    def __init__(
        self, message: str, missing: Sequence[int] = (), hosts: Mapping[int, str] | None = None
    ) -> None:
        super().__init__(message)
        self.missing = tuple(missing)
        self.hosts = dict(hosts or {})


class Communicator(ABC):
    """Collectives over float64 vectors, which all ranks call in the same order.

    Attributes:
        rank: this rank, in 0..world_size - 1.
        world_size: the number of ranks.
        collectives: how many collectives this communicator has issued.
        any_thread: whether collectives may be issued from a thread of our own, while training
            goes on in the caller's.
        failed: whether a collective has failed, though it may not be known yet who was missing.
    """

    rank: int
    world_size: int
    collectives: int = 0
    any_thread: bool = True
    failed: bool = False

    def all_gather(self, vector: FloatArray) -> FloatArray:
        """Return everyone's `vector`, shape (n,), as rows of shape (world_size, n)."""
        self.collectives += 1
        return self._all_gather(vector)

    def tree(self, vector: FloatArray, merge: Merge) -> FloatArray:
        """Return everyone's `vector`, shape (n,), merged in rank order: the same bits on all ranks.

        Args:
            vector: of the same size on all ranks.
            merge: gets two vectors of neighbouring blocks of ranks, that of the lower ranks first, and
                returns a new one. It is called any number of times. Whatever it raises leaves ranks
                out of step.
        """
        if self.world_size == 1:
            return vector
        self.collectives += 1
        return self._tree(vector, merge)

    def all_gather_bytes(self, data: bytes, sizes: Sequence[int]) -> list[bytes]:
        """Return everyone's `data`; `sizes`, known to all, has its length on each rank.

        One tree over as many bytes as there are in all: every rank writes to its own place among
        zeros, and bits are joined. A rank whose bytes others have already got may send none. What is
        not of the size announced is cut or filled up: the vectors must be of one size.
        """
        if not any(sizes):
            return [b""] * len(sizes)
        ends = np.cumsum(sizes)
        vector = np.zeros(-(-int(ends[-1]) // 8))
        size, end = sizes[self.rank], int(ends[self.rank])
        mine = np.frombuffer(data[:size].ljust(size, b"\0"), np.uint8)
        vector.view(np.uint8)[end - size : end] = mine

        def either(lower: FloatArray, upper: FloatArray) -> FloatArray:
            return (lower.view(np.uint64) | upper.view(np.uint64)).view(np.float64)

        gathered = self.tree(vector, either).tobytes()
        return [gathered[end - size : end] for end, size in zip(ends, sizes, strict=True)]

    @abstractmethod
    def _all_gather(self, vector: FloatArray) -> FloatArray: ...

    @abstractmethod
    def _tree(self, vector: FloatArray, merge: Merge) -> FloatArray: ...

    def current(self) -> bool:
        """Return whether the ranks that this communicator connects are still the ones to ask."""
        return True

    def waits_for(self) -> tuple[int, ...]:
        """Return the ranks that the collective under way waits for, as far as they can be told."""
        return ()

    def abandon(self, why: str) -> None:  # noqa: B027 - where nobody waits, nobody needs to hear
        """Leave in the middle of a reduction, and let those hear who wait for this rank."""

    def interrupts_deferred(self) -> AbstractContextManager[object]:
        """Return what holds an interrupt back while a reduction must not be left; default: nothing."""
        return nullcontext()

    def close(self) -> None:  # noqa: B027 - most have nothing to give back
        """Give the connection back."""


class LocalCommunicator(Communicator):
    """A world of one rank."""

    rank = 0
    world_size = 1

    def all_gather(self, vector: FloatArray) -> FloatArray:
        return vector[np.newaxis]

    _all_gather = all_gather

    def _tree(self, vector: FloatArray, merge: Merge) -> FloatArray:
        return vector

    def current(self) -> bool:
        return not torch_ranks() and jax_job() is None


def torch_ranks() -> int:
    """Return the size of the job's `torch.distributed` group; 0 if the training script has made none.

    The ranks of a dry run, on the backend "fake", do not exist.
    """
    distributed = torch_distributed()
    there = distributed is not None and "fake" not in distributed.get_backend()
    return int(distributed.get_world_size()) if there else 0


def torch_distributed() -> Any:
    """Return the module if the training script has made a process group, of any backend."""
    distributed = sys.modules.get("torch.distributed")
    # While another thread imports it, nothing can be initialised.
    initialized = getattr(distributed, "is_initialized", None)
    return distributed if initialized is not None and initialized() else None


def jax_job() -> Any:
    """Return what JAX knows of its processes if the training script has connected several.

    Not by `jax.process_count()`, which would start JAX's backend, and wait for the others as it
    does.
    """
    # Absent, or still half imported, where nothing can be initialised.
    state = getattr(sys.modules.get("jax._src.distributed"), "global_state", None)
    return None if state is None or state.client is None or state.num_processes == 1 else state
