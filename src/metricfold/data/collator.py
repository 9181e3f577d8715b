"""`MetricsCollator`: a collate function that carries each sample's metrics along with the batch.

    loader = DataLoader(dataset, batch_size=8, num_workers=2, collate_fn=MetricsCollator(pad))
    for batch in loader:
        aggregator.update(batch.pop("metrics"))

The metrics of a batch count when the batch is consumed. Batches that were prefetched when a run
stops, and are loaded again after it resumes, count once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

from metricfold.data.batch import MetricBatch
from metricfold.metric import Metric

__all__ = ["MetricsCollator"]

METRICS = "metrics"


class MetricsCollator:
    """Collates samples with `collate_fn`, and their ``"metrics"`` into one `MetricBatch`.

    Args:
        collate_fn: turns a list of samples into a batch; default: torch's ``default_collate``.

    Samples are mappings, or tuples whose first item is one. ``"metrics"`` is taken out before
    `collate_fn` sees the samples (they themselves stay as they are), and is the last entry of the
    batch, which must be a mutable mapping, or a sequence whose first item is one. Samples without
    metrics are welcome. Raises TypeError for anything else, and what `MetricBatch.from_metrics`
    raises for a bad metric.

    >>> from metricfold import AggregationType, Metric
    >>> collate = MetricsCollator(lambda samples: {"x": [sample["x"] for sample in samples]})
    >>> seen = Metric("alpaca", "samples_seen", 1, AggregationType.SUM)
    >>> collate([{"x": 1, "metrics": [seen]}, {"x": 2, "metrics": [seen]}])
    {'x': [1, 2], 'metrics': MetricBatch(alpaca/samples_seen)}
    """

    def __init__(self, collate_fn: Callable[[list[Any]], Any] | None = None) -> None:
        self.collate_fn = collate_fn

    def __call__(self, samples: Sequence[Any]) -> Any:
        metrics: list[Metric] = []
        bare = [_take_metrics(sample, metrics) for sample in samples]
        batch = MetricBatch.from_metrics(metrics)
        collated = self._collate(bare)
        _mapping_of(collated, "the collate function returned")[METRICS] = batch
        return collated

    def _collate(self, samples: list[Any]) -> Any:
        if self.collate_fn is not None:
            return self.collate_fn(samples)
        from torch.utils.data import default_collate  # noqa: PLC0415 - torch is an extra

        return default_collate(samples)


def _take_metrics(sample: Any, metrics: list[Metric]) -> Any:
    """Return `sample` without its metrics, which join the list."""
    if isinstance(sample, tuple) and sample:
        first = _take_metrics(sample[0], metrics)
        if first is sample[0]:
            return sample
        # A named tuple takes its fields one by one.
        rest = (first, *sample[1:])
        return type(sample)(*rest) if hasattr(sample, "_fields") else rest
    if not isinstance(sample, Mapping):
        raise TypeError(
            f"MetricsCollator takes samples that are mappings, or tuples whose first item is one, "
            f"but got {type(sample).__name__}"
        )
    if METRICS not in sample:
        return sample
    metrics.extend(sample[METRICS])
    if isinstance(sample, MutableMapping):
        bare = copy.copy(sample)
        del bare[METRICS]
        return bare
    return {key: value for key, value in sample.items() if key != METRICS}


def _mapping_of(batch: Any, whose: str) -> MutableMapping[str, Any]:
    first = batch[0] if isinstance(batch, list | tuple) and batch else batch
    if not isinstance(first, MutableMapping):
        raise TypeError(
            f"{whose} {type(first).__name__}, which has no place for metrics: return a dict (or a "
            "tuple whose first item is one)"
        )
    return first
