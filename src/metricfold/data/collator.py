"""`MetricsCollator`: a collate function that carries each sample's metrics along with the batch.

    loader = DataLoader(dataset, batch_size=8, num_workers=2, collate_fn=MetricsCollator(pad))
    for batch in loader:
        aggregator.update(batch.pop("metrics"))

The metrics of a batch count when the batch is consumed. Batches that were prefetched when a run
stops, and are loaded again after it resumes, count once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

from metricfold._core.fold.batch import MetricBatch
from metricfold._core.fold.builtin import check_on_bad_name
from metricfold._core.runtime.listing import shortened
from metricfold.data.sample import METRICS, take_metrics
from metricfold.metric import Metric

__all__ = ["MetricsCollator"]


class MetricsCollator:
    """Collates samples with `collate_fn`, and their ``"metrics"`` into one `MetricBatch`.

    Args:
        collate_fn: turns a list of samples into a batch; default: torch's ``default_collate``.
        on_bad_name: what becomes of a category of the data that is empty or cannot be printed, as
            in `MetricBatch.from_metrics`: by default it is replaced, and no worker ends.

    Samples are mappings, or tuples whose first item is one. `collate_fn` gets shallow copies
    without ``"metrics"``, and returns a mutable mapping, or a list or tuple whose first item is
    one; there ``"metrics"`` becomes the last entry. Samples without metrics are welcome. Raises
    TypeError for anything else, ValueError for no samples if there is no `collate_fn`, and what
    `MetricBatch.from_metrics` raises for a bad metric.

    >>> from metricfold import AggregationType, Metric
    >>> collate = MetricsCollator(lambda samples: {"x": [sample["x"] for sample in samples]})
    >>> seen = Metric("alpaca", "samples_seen", 1, AggregationType.SUM)
    >>> collate([{"x": 1, "metrics": [seen]}, {"x": 2, "metrics": [seen]}])
    {'x': [1, 2], 'metrics': MetricBatch(alpaca/samples_seen)}
    """

    def __init__(
        self,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        *,
        on_bad_name: str = "replace",
    ) -> None:
        if collate_fn is not None and not callable(collate_fn):
            raise TypeError(f"MetricsCollator takes a collate function, not {collate_fn!r}")
        self.collate_fn = collate_fn
        self.on_bad_name = check_on_bad_name(on_bad_name)

    def __repr__(self) -> str:
        inner = self.collate_fn
        name = "" if inner is None else getattr(inner, "__qualname__", None) or repr(inner)
        return f"MetricsCollator({shortened([name])})"

    def __call__(self, samples: Sequence[Any]) -> Any:
        metrics: list[Metric] = []
        bare = [
            (take_metrics if type(sample) is dict else _take_metrics)(sample, metrics)
            for sample in samples
        ]
        if not bare and self.collate_fn is None:
            raise ValueError(
                "MetricsCollator got no samples, and default_collate cannot make a batch of none: "
                "leave empty batches out of the batch sampler, or give a collate function that can"
            )
        batch = MetricBatch.from_metrics(metrics, on_bad_name=self.on_bad_name)
        collated = (self.collate_fn or _default_collate())(bare)
        target = _mapping_of(collated)
        # Batch movers and samplers look at the first entry to learn the size of a batch.
        if not isinstance(target.pop(METRICS, batch), MetricBatch):
            raise ValueError(
                "the collate function returned an entry 'metrics' of its own, which would be "
                "lost: give it another name"
            )
        target[METRICS] = batch
        return collated


def _take_metrics(sample: Any, metrics: list[Metric]) -> Any:
    """Return a copy of `sample` without its metrics, which join the list."""
    if isinstance(sample, Mapping):
        return take_metrics(sample, metrics)
    if isinstance(sample, tuple) and sample:
        items = (_take_metrics(sample[0], metrics), *sample[1:])
        # A named tuple takes its fields one by one.
        return type(sample)(*items) if hasattr(sample, "_fields") else items
    raise TypeError(
        "MetricsCollator takes samples that are mappings, or tuples whose first item is one, but "
        f"got a {type(sample).__name__}"
    )


def _mapping_of(collated: Any) -> MutableMapping[str, Any]:
    first = collated[0] if isinstance(collated, list | tuple) and collated else collated
    if not isinstance(first, MutableMapping):
        where = "" if first is collated else f"a {type(collated).__name__} that begins with "
        raise TypeError(
            f"the collate function returned {where}a {type(first).__name__}, which has no place "
            "for metrics: return a dict, or a list or tuple whose first item is one"
        )
    return first


def _default_collate() -> Callable[[list[Any]], Any]:
    try:
        from torch.utils.data import default_collate  # noqa: PLC0415 - torch is an extra
    except ImportError:
        raise ImportError(
            "MetricsCollator() collates with PyTorch's default_collate, and PyTorch is not "
            "installed: pip install 'metricfold[torch]', or give it a collate function"
        ) from None
    return default_collate
