"""Metrics through Grain, the data loader of JAX programs.

    from metricfold.data.grain import GrainMetricTransform, stack

    dataset = (
        grain.MapDataset.source(samples)
        .map(GrainMetricTransform(transform))                 # any MetricTransform
        .batch(8, batch_fn=MetricsCollator(stack))
    )
    for batch in dataset:
        aggregator.update(batch.pop("metrics"))

Both work in `grain.DataLoader` too, and in Grain's worker processes. Save Grain's iterator and the
aggregator at the same moment, and each batch counts once over a restart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from metricfold.data.transform import MetricTransform

try:
    import grain
except ImportError:
    raise ImportError(
        "metricfold.data.grain needs Grain, which is not installed: pip install grain"
    ) from None

__all__ = ["GrainMetricTransform", "stack"]


class GrainMetricTransform(grain.transforms.Map):  # type: ignore[misc]
    """Adds the metrics of a `MetricTransform` to each element of a Grain pipeline.

    Args:
        transform: knows its dataset's name.

    Raises:
        TypeError: `transform` is no `MetricTransform`.
        ValueError: it does not know its dataset; here rather than in a worker.
    """

    def __init__(self, transform: MetricTransform) -> None:
        if not isinstance(transform, MetricTransform):
            raise TypeError(f"GrainMetricTransform takes a MetricTransform, not {transform!r}")
        if transform.dataset_name is None:
            raise ValueError(
                f"this {type(transform).__name__} does not know its dataset: call "
                "set_dataset_name() before it goes into a pipeline"
            )
        self._transform = transform

    def map(self, element: Any) -> Any:
        return self._transform(element)


def stack(samples: Sequence[Any]) -> Any:
    """Return samples of one structure as one batch of NumPy arrays, as Grain itself would.

    Structures are made of mappings, tuples and lists; what they hold gets a new first axis. For
    samples of uneven lengths write a function that pads.

    >>> stack([{"x": 1, "y": (2, 3)}, {"x": 4, "y": (5, 6)}])
    {'x': array([1, 4]), 'y': (array([2, 5]), array([3, 6]))}
    """
    first = samples[0]
    if isinstance(first, Mapping):
        return {key: stack([sample[key] for sample in samples]) for key in first}
    if isinstance(first, tuple) and hasattr(first, "_fields"):
        return type(first)(*map(stack, zip(*samples, strict=True)))
    if isinstance(first, tuple | list):
        return type(first)(map(stack, zip(*samples, strict=True)))
    return np.stack([np.asarray(sample) for sample in samples])
