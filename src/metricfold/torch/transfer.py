"""The way of a tensor to the host, which begins at once and is waited for later, on any thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["started"]


def started(tensor: Tensor) -> Callable[[], Any]:
    """Begin to copy a tensor, which nobody changes on a CPU; what is returned waits for the array."""
    if tensor.device.type != "cuda":
        return lambda: tensor.cpu().numpy()
    copied = tensor.to("cpu", non_blocking=True)
    ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
    ready.record(torch.cuda.current_stream(tensor.device))

    def finish() -> Any:
        ready.synchronize()
        return copied.numpy()

    return finish
