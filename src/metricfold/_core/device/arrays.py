"""Device arrays as metric values: held without a wait, read all at once.

A training loop must not wait for its device because of a metric: an array that comes in is *held* (torch: a
detached clone, because callers reuse buffers and a graph must not stay alive; JAX: the array itself, which
is immutable), and all that are held are *read* in one transfer per device when a reduction needs them.

No framework is imported here: an array can only come from one that its owner has imported already, so
`sys.modules` tells which ones to ask.
"""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from metricfold._core.runtime.imported import is_of
from metricfold._core.runtime.recomputation import unseen
from metricfold._core.runtime.staging import NO_NUMBER, is_traced

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = [
    "backend_of",
    "counts_here",
    "hold",
    "hold_each",
    "not_one_value",
    "read",
    "ready",
    "unwrapped",
    "whole_tensor",
]


class ArrayBackend(ABC):
    """What holds and reads the arrays of one framework."""

    framework: str
    """The module whose presence means that arrays of this kind may come in."""
    noun: str

    @abstractmethod
    def owns(self, value: object) -> bool: ...

    @abstractmethod
    def checked(self, value: Any) -> Any:
        """Return the array of which this process has the numbers; raises what says why there are none."""

    @abstractmethod
    def kept(self, value: Any) -> Any:
        """Return what the caller cannot change any more, without waiting for it."""

    def hold(self, value: Any) -> Any:
        value = self.checked(value)
        if math.prod(value.shape) != 1:
            raise ValueError(not_one_value(self.noun, value.shape))
        return self.kept(value)

    def hold_each(self, value: Any) -> Any:
        return self.kept(self.checked(value))

    def lost(self, value: Any) -> str | None:
        """Return why a held value cannot be read any more, or None if it can."""
        return None

    def counts_here(self, value: Any) -> bool:
        """Return whether this process is the one to count `value`, which several may hold together."""
        return True

    def ready(self, value: Any) -> bool:
        """Return whether reading a held value would wait for nothing, as far as that can be told."""
        return True

    @abstractmethod
    def start(self, values: Sequence[Any]) -> Callable[[], list[Any]]:
        """Enqueue the transfer; what is returned waits for it, and gives what `read` says."""


class TorchArrays(ArrayBackend):
    framework = "torch"
    noun = "tensor"

    def owns(self, value: object) -> bool:
        return is_of(value, "torch", "Tensor")

    def checked(self, value: Any) -> Any:
        value = whole_tensor(value)
        if value.is_complex():
            raise ValueError("a complex tensor is no number: give its real part or its magnitude")
        if value.is_meta:
            raise ValueError("a tensor on the meta device has no number: give a real one")
        return value

    def kept(self, value: Any) -> Any:
        contiguous = sys.modules["torch"].contiguous_format
        return unseen(lambda: value.detach().clone(memory_format=contiguous).reshape(-1))

    def start(self, values: Sequence[Any]) -> Callable[[], list[Any]]:
        torch = sys.modules["torch"]
        groups: dict[Any, dict[Any, list[int]]] = {}
        for index, value in enumerate(values):
            groups.setdefault(value.device, {}).setdefault(value.dtype, []).append(index)
        reads: list[tuple[Any, Any, list[tuple[Any, list[int]]]]] = []
        for device, by_dtype in groups.items():
            # The bytes as they are: no number is rounded. Widest first, so that all are aligned.
            ordered = sorted(by_dtype.items(), key=lambda one: -one[0].itemsize)
            parts = [torch.cat([values[i].reshape(-1) for i in indices]) for _, indices in ordered]
            one_kind = len(parts) == 1
            together = parts[0] if one_kind else torch.cat([p.view(torch.uint8) for p in parts])
            ready = None
            if device.type == "cuda":
                ready = torch.cuda.Event()
                ready.record(torch.cuda.current_stream(device))
            reads.append((together, ready, ordered))

        def finish() -> list[Any]:
            numbers: list[Any] = [None] * len(values)
            for together, ready, ordered in reads:
                if ready is not None:
                    ready.synchronize()
                host, place = together.cpu(), 0
                for dtype, indices in ordered:
                    part = host
                    if len(ordered) > 1:
                        size = sum(values[i].numel() for i in indices) * dtype.itemsize
                        part = host[place : place + size].view(dtype)
                        place += size
                    _hand_out(part, [(i, values[i].numel()) for i in indices], numbers)
            return numbers

        return finish


def _hand_out(part: Any, sizes: Sequence[tuple[int, int]], numbers: list[Any]) -> None:
    """Put the elements of `part` where they belong, which is a place and a size for each array."""
    if all(size == 1 for _, size in sizes):
        for (place, _), number in zip(sizes, part.tolist(), strict=True):
            numbers[place] = number
        return
    torch = sys.modules["torch"]
    known = part.dtype in (torch.float64, torch.float32, torch.float16)
    elements = (part.float() if part.is_floating_point() and not known else part).numpy()
    first = 0
    for place, size in sizes:
        last = first + size
        numbers[place] = elements[first].item() if size == 1 else elements[first:last]
        first = last


class JaxArrays(ArrayBackend):
    framework = "jax"
    noun = "JAX array"

    def owns(self, value: object) -> bool:
        return is_of(value, "jax", "Array")

    def checked(self, value: Any) -> Any:
        if is_traced(value):
            raise TypeError(NO_NUMBER)
        if not _is_number_type(value.dtype):
            raise TypeError(f"an array of type {value.dtype} is no number to aggregate")
        return value

    def kept(self, value: Any) -> Any:
        return value

    def hold_each(self, value: Any) -> Any:
        value = self.checked(value)
        if not (value.is_fully_addressable or value.is_fully_replicated):
            raise ValueError(
                "the elements of this JAX array lie on several processes, and none has them all: "
                "give each process's own part, or use a metricfold.jax.DeviceAccumulator"
            )
        return value

    def lost(self, value: Any) -> str | None:
        if not value.is_deleted():
            return None
        return (
            "the JAX array was donated or deleted before it was read: record a copy (jnp.copy), "
            "or do not donate it"
        )

    def ready(self, value: Any) -> bool:
        return bool(value.is_deleted() or value.is_ready())

    def counts_here(self, value: Any) -> bool:
        if is_traced(value) or value.is_fully_addressable or not value.is_fully_replicated:
            return True
        holders = {device.process_index for device in value.sharding.device_set}
        return bool(sys.modules["jax"].process_index() == min(holders))

    def start(self, values: Sequence[Any]) -> Callable[[], list[Any]]:
        jax = sys.modules["jax"]
        # Whoever forbids transfers means those that he does not know of; a log is there to read.
        with jax.transfer_guard("allow"):
            for value in values:
                value.copy_to_host_async()

        def finish() -> list[Any]:
            with jax.transfer_guard("allow"):
                hosts = [np.asarray(value) for value in values]
            return [host.item() if host.size == 1 else np.ravel(host) for host in hosts]

        return finish


def of_mesh(value: Any) -> bool:
    return is_of(value, "torch.distributed.tensor", "DTensor")


def is_sharded(value: Any, dim: int) -> bool:
    """Return whether a tensor is a `DTensor` of which each rank holds a part along `dim`."""
    return of_mesh(value) and any(placement.is_shard(dim) for placement in value.placements)


def whole_tensor(value: Any) -> Any:
    """Return this rank's part of a `DTensor`, if that is the whole, and other tensors as they are."""
    if not of_mesh(value):
        return value
    # Reading any other one would be a collective, which no metric may begin unasked.
    if not all(placement.is_replicate() for placement in value.placements):
        raise ValueError(
            f"a DTensor placed as {value.placements} has its value only once the ranks combine "
            "it: give value.full_tensor(), on every rank. To count each element of one that is sharded "
            "give value.to_local(), each rank its own"
        )
    return value.to_local()


@cache
def _is_number_type(dtype: Any) -> bool:
    numpy = sys.modules["jax"].numpy
    kinds = (numpy.bool_, numpy.integer, numpy.floating)
    return any(numpy.issubdtype(dtype, kind) for kind in kinds)


_BACKENDS = (TorchArrays(), JaxArrays())


def not_one_value(kind: str, shape: Sequence[int]) -> str:
    """Return what to tell who gives many values where one is taken."""
    return (
        f"a {kind} of shape {tuple(shape)} is not one value: reduce it first, such as by .mean(), or "
        "count each element: record(..., each=True), or weight= an array of that shape"
    )


def unwrapped(value: Any) -> Any:
    """Return the array that stands in `value`, such as a Flax variable; anything else as it is."""
    plain = type(value) in (float, int, bool, str)
    if plain or "jax" not in sys.modules or is_of(value, "jax", "Array"):
        return value
    unwrap = getattr(type(value), "__jax_array__", None)
    return value if unwrap is None else unwrap(value)


def backend_of(value: object) -> ArrayBackend | None:
    """Return what handles `value` if it is a device array, else None."""
    for backend in _BACKENDS:
        if backend.framework in sys.modules and backend.owns(value):
            return backend
    return None


def hold(value: object) -> object | None:
    """Return the one element of a device array, to be read later; None if `value` is none."""
    backend = backend_of(value)
    return None if backend is None else backend.hold(value)


def hold_each(value: object) -> object | None:
    """Return the elements of one, likewise."""
    backend = backend_of(value)
    return None if backend is None else backend.hold_each(value)


def counts_here(value: object) -> bool:
    """Return whether this process is the one to count `value`.

    What lies, whole, on the devices of several processes of a job is one value, and the lowest of these
    counts it.
    """
    backend = backend_of(value)
    return backend is None or backend.counts_here(value)


def ready(value: object) -> bool:
    """Return whether a held value, or a number, can be read without a wait."""
    backend = backend_of(value)
    return backend is None or backend.ready(value)


def read(values: Sequence[Any]) -> Callable[[], list[Any]]:
    """Enqueue the transfer of held arrays; call the result, on any thread, for the numbers.

    Of an array of more than one element they are a NumPy array, shape (n,), whose numbers are those on
    the device. In the place of one that cannot be read stands the exception that says why.
    """
    places: dict[ArrayBackend | None, list[int]] = {}
    for place, value in enumerate(values):
        places.setdefault(backend_of(value), []).append(place)
    finishers = [
        (_start(backend, [values[place] for place in some]), some)
        for backend, some in places.items()
        if backend is not None
    ]

    def finish() -> list[Any]:
        numbers: list[Any] = [None] * len(values)
        for finisher, some in finishers:
            for place, number in zip(some, finisher(), strict=True):
                numbers[place] = number
        return numbers

    return finish


def _start(backend: ArrayBackend, values: Sequence[Any]) -> Callable[[], list[Any]]:
    """Begin to read `values` together, or one by one, as one that is bad spoils the transfer of all."""
    together: Callable[[], list[Any]] | None = None
    with suppress(Exception):
        together = backend.start(values)

    def finish() -> list[Any]:
        with suppress(Exception):
            if together is not None:
                return together()
        return [_read_alone(backend, value) for value in values]

    return finish


def _read_alone(backend: ArrayBackend, value: Any) -> Any:
    reason = backend.lost(value)
    if reason is not None:
        return ValueError(reason)
    try:
        return backend.start([value])()[0]
    except Exception as error:  # noqa: BLE001 - whatever the framework says
        return error
