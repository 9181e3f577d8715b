"""Device arrays as metric values: kept without a wait, read all at once.

A training loop must not wait for its device because of a metric, so an array is not read when it
comes in. It is *held* (torch: a detached clone, because callers reuse buffers and a graph must not
stay alive; JAX arrays are immutable: the array itself), and all that are held are *read* in one
transfer per device when a reduction needs them.

No framework is imported here: an array can only come from a framework that its owner has imported
already, so `sys.modules` tells which ones to ask.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["backend_of", "hold", "read", "whole_tensor"]


class ArrayBackend(ABC):
    """What holds and reads the arrays of one framework."""

    framework: str
    """The module whose presence means that arrays of this kind may come in."""

    @abstractmethod
    def owns(self, value: object) -> bool: ...

    @abstractmethod
    def hold(self, value: Any) -> Any:
        """Return a 0-d array that the caller cannot change any more, without waiting for it."""

    def lost(self, value: Any) -> str | None:
        """Return why a held value cannot be read any more, or None if it can."""
        return None

    @abstractmethod
    def start(self, values: Sequence[Any]) -> Callable[[], list[Any]]:
        """Enqueue the transfer; what is returned waits for it and gives Python numbers."""


class TorchArrays(ArrayBackend):
    framework = "torch"

    def owns(self, value: object) -> bool:
        return isinstance(value, sys.modules["torch"].Tensor)

    def hold(self, value: Any) -> Any:
        value = whole_tensor(value)
        if value.numel() != 1:
            raise ValueError(_not_one("tensor", value.shape))
        if value.is_complex():
            raise ValueError("a complex tensor is no number: give its real part or its magnitude")
        if value.is_meta:
            raise ValueError("a tensor on the meta device has no number: give a real one")
        return value.detach().clone().reshape(())

    def start(self, values: Sequence[Any]) -> Callable[[], list[Any]]:
        torch = sys.modules["torch"]
        groups: dict[Any, dict[Any, list[int]]] = {}
        for index, value in enumerate(values):
            groups.setdefault(value.device, {}).setdefault(value.dtype, []).append(index)
        reads: list[tuple[Any, Any, list[tuple[Any, list[int]]]]] = []
        for device, by_dtype in groups.items():
            # MPS has no float64; everywhere else float64 holds every dtype that we take.
            wide = torch.float32 if device.type == "mps" else torch.float64
            stacks = [
                torch.stack([values[i] for i in indices]).to(wide) for indices in by_dtype.values()
            ]
            together = torch.cat(stacks)
            ready = None
            if device.type == "cuda":
                ready = torch.cuda.Event()
                ready.record(torch.cuda.current_stream(device))
            reads.append((together, ready, list(by_dtype.items())))

        def finish() -> list[Any]:
            numbers: list[Any] = [None] * len(values)
            for together, ready, by_dtype in reads:
                if ready is not None:
                    ready.synchronize()
                host = iter(together.cpu().tolist())
                for dtype, indices in by_dtype:
                    kind = bool if dtype == torch.bool else _number_kind(dtype.is_floating_point)
                    for index in indices:
                        numbers[index] = kind(next(host))
            return numbers

        return finish


class JaxArrays(ArrayBackend):
    framework = "jax"

    def owns(self, value: object) -> bool:
        return isinstance(value, sys.modules["jax"].Array)

    def hold(self, value: Any) -> Any:
        jax = sys.modules["jax"]
        if isinstance(value, jax.core.Tracer):
            raise TypeError(
                "a traced value has no number yet: return it from the jitted function and record "
                "the result"
            )
        if value.size != 1:
            raise ValueError(_not_one("JAX array", value.shape))
        numpy = jax.numpy
        kinds = (numpy.bool_, numpy.integer, numpy.floating)
        if not any(numpy.issubdtype(value.dtype, kind) for kind in kinds):
            raise TypeError(f"an array of type {value.dtype} is no number to aggregate")
        return value

    def lost(self, value: Any) -> str | None:
        if not value.is_deleted():
            return None
        return (
            "the JAX array was donated or deleted before it was read: record a copy (jnp.copy), "
            "or do not donate it"
        )

    def start(self, values: Sequence[Any]) -> Callable[[], list[Any]]:
        jax = sys.modules["jax"]
        for value in values:
            value.copy_to_host_async()
        return lambda: [host.item() for host in jax.device_get(list(values))]


def whole_tensor(value: Any) -> Any:
    """Return this rank's part of a `DTensor`, if that is the whole, and other tensors as they are.

    Reading any other one would be a collective, which no metric may begin unasked.
    """
    distributed = sys.modules.get("torch.distributed.tensor")
    if distributed is None or not isinstance(value, distributed.DTensor):
        return value
    if not all(placement.is_replicate() for placement in value.placements):
        raise ValueError(
            f"a DTensor placed as {value.placements} has its value only once the ranks combine "
            "it: give value.full_tensor(), on every rank"
        )
    return value.to_local()


_BACKENDS = (TorchArrays(), JaxArrays())


def _not_one(kind: str, shape: Sequence[int]) -> str:
    return f"a {kind} of shape {tuple(shape)} is not one value: reduce it first, such as by .mean()"


def _number_kind(is_float: bool) -> type:
    return float if is_float else int


def backend_of(value: object) -> ArrayBackend | None:
    """Return what handles `value` if it is a device array, else None."""
    for backend in _BACKENDS:
        if backend.framework in sys.modules and backend.owns(value):
            return backend
    return None


def hold(value: object) -> object | None:
    """Return a 0-d array to be read later if `value` is a device array, else None."""
    backend = backend_of(value)
    return None if backend is None else backend.hold(value)


def read(values: Sequence[Any]) -> Callable[[], list[Any]]:
    """Enqueue the transfer of held arrays; call the result, on any thread, for the numbers.

    In the place of one that cannot be read stands the exception that says why.
    """
    by_backend: dict[ArrayBackend, list[int]] = {}
    for index, value in enumerate(values):
        backend = backend_of(value)
        assert backend is not None
        by_backend.setdefault(backend, []).append(index)
    finishers = [
        (_start(backend, [values[i] for i in indices]), indices)
        for backend, indices in by_backend.items()
    ]

    def finish() -> list[Any]:
        numbers: list[Any] = [None] * len(values)
        for finisher, indices in finishers:
            for index, number in zip(indices, finisher(), strict=True):
                numbers[index] = number
        return numbers

    return finish


def _start(backend: ArrayBackend, values: Sequence[Any]) -> Callable[[], list[Any]]:
    def one_by_one() -> list[Any]:
        return [_read_alone(backend, value) for value in values]

    try:
        together = backend.start(values)
    except Exception:  # noqa: BLE001 - one bad array spoils the transfer of all
        return one_by_one

    def finish() -> list[Any]:
        try:
            return together()
        except Exception:  # noqa: BLE001 - as above
            return one_by_one()

    return finish


def _read_alone(backend: ArrayBackend, value: Any) -> Any:
    reason = backend.lost(value)
    if reason is not None:
        return ValueError(reason)
    try:
        return backend.start([value])()[0]
    except Exception as error:  # noqa: BLE001 - whatever the framework says
        return error
