"""`MetricsCollator`: a collate function that carries each sample's metrics along with the batch.

    loader = DataLoader(dataset, batch_size=8, num_workers=2, collate_fn=MetricsCollator(pad))
    for batch in loader:
        aggregator.update(batch.pop("metrics"))

The metrics of a batch count when the batch is consumed. Batches that were prefetched when a run
stops, and are loaded again after it resumes, count once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

from metricfold._core.fold.batch import MetricBatch
from metricfold._core.fold.builtin import check_on_bad_name
from metricfold._core.runtime.listing import internal, shortened
from metricfold.data.ids import DatasetIds
from metricfold.data.ids import dataset_ids as ids_of
from metricfold.data.origin import ORIGINS, UnknownOriginError, check_bare, named
from metricfold.data.sample import METRICS, Taken, take

__all__ = ["DATASET_IDS", "Collated", "MetricsCollator", "mapping_of"]

DATASET_IDS = "dataset_ids"
"""Under this name a batch says of which datasets it is."""


class Collated(NamedTuple):
    """A batch, and what its samples have said.

    Args:
        batch: as the collate function has returned it.
        taken: each sample, and its metrics.
        dataset_ids: if they were asked for.
    """

    batch: Any
    taken: list[Taken]
    dataset_ids: DatasetIds | None


@internal("collate", "fold")
class MetricsCollator:
    """Collates samples with `collate_fn`, and their ``"metrics"`` into one `MetricBatch`.

    Args:
        collate_fn: turns a list of samples into a batch; default: torch's ``default_collate``.
        on_bad_name: what becomes of a category of the data that is empty or cannot be printed, as
            in `MetricBatch.from_metrics`: by default it is replaced, and no worker ends.
        dataset_ids: put `DatasetIds` under ``"dataset_ids"`` of the batch, for accumulators on a device:
            the dataset of each row; of each token, if samples are packed or all stand in one row.

    Samples are mappings, or tuples whose first item is one. `collate_fn` gets shallow copies
    without ``"metrics"``, and returns a mutable mapping, or a list or tuple whose first item is
    one; there ``"metrics"`` becomes the last entry. Samples without metrics are welcome, but for those of
    a dataset that had some. Of a number that `metricfold.integrations.datasets.with_metrics` has put under
    ``"metrics"`` the transform makes metrics here, of the sample as it is now. Raises
    TypeError for anything else, ValueError for no samples if there is no `collate_fn`, for metrics that
    have got lost on the way and for numbers that nobody knows, and what
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
        dataset_ids: bool = False,
    ) -> None:
        if collate_fn is not None and not callable(collate_fn):
            raise TypeError(f"MetricsCollator takes a collate function, not {collate_fn!r}")
        self.collate_fn = collate_fn
        self.on_bad_name = check_on_bad_name(on_bad_name)
        self.dataset_ids = dataset_ids

    def __repr__(self) -> str:
        inner = self.collate_fn
        name = "" if inner is None else getattr(inner, "__qualname__", None) or repr(inner)
        return f"MetricsCollator({shortened([name])})"

    def __getstate__(self) -> dict[str, Any]:
        # A process that inherits nothing knows no transforms but those that come along.
        return {**vars(self), _ORIGINS: ORIGINS.packed()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        ORIGINS.join(state.pop(_ORIGINS, {}))
        vars(self).update({"dataset_ids": False} | state)

    def __call__(self, samples: Sequence[Any]) -> Any:
        collated, taken, ids = self.collate(samples, dataset_ids=self.dataset_ids)
        batch = self.fold(taken)
        target = mapping_of(collated)
        # Batch movers and samplers look at the first entry to learn the size of a batch.
        if not isinstance(target.pop(METRICS, batch), MetricBatch):
            raise ValueError(
                "the collate function returned an entry 'metrics' of its own, which would be "
                "lost: give it another name"
            )
        if ids is not None:
            target[DATASET_IDS] = ids
        target[METRICS] = batch
        return collated

    def fold(self, taken: Iterable[Taken]) -> MetricBatch:
        """Return the metrics of all samples of a batch as one."""
        metrics = chain.from_iterable(one.metrics for one in taken)
        return MetricBatch.from_metrics(metrics, on_bad_name=self.on_bad_name)

    def collate(self, samples: Sequence[Any], *, dataset_ids: bool = False) -> Collated:
        """Return a batch, and apart from it what each sample has said."""
        bare: list[Any] = []
        taken: list[Taken] = []
        try:
            for sample in samples:
                if type(sample) is dict:  # nearly always
                    one = take(sample)
                    rest: Any = one.bare
                else:
                    rest, one = _taken(sample)
                bare.append(rest)
                taken.append(one)
        except UnknownOriginError as error:
            raise named(error, self) from None
        _check_all_there(taken, self)
        if not bare and self.collate_fn is None:
            raise ValueError(
                "MetricsCollator got no samples, and default_collate cannot make a batch of none: "
                "leave empty batches out of the batch sampler, or give a collate function that can"
            )
        collated = (self.collate_fn or _default_collate())(bare)
        ids = None
        if dataset_ids:
            target = mapping_of(collated)
            if DATASET_IDS in target:
                raise ValueError(
                    "dataset_ids=True, but the collate function returned an entry 'dataset_ids' of its own, "
                    "which would be lost: give it another name"
                )
            ids = ids_of([one.parts for one in taken], target)
        return Collated(collated, taken, ids)


_ORIGINS = "origins"


def _taken(sample: Any) -> tuple[Any, Taken]:
    """Return a copy of `sample` without its metrics, and what it had to say."""
    if isinstance(sample, Mapping):
        found = take(sample)
        return found.bare, found
    if isinstance(sample, tuple) and sample:
        first, found = _taken(sample[0])
        items = (first, *sample[1:])
        # A named tuple takes its fields one by one.
        return (type(sample)(*items) if hasattr(sample, "_fields") else items), found
    raise TypeError(
        "MetricsCollator takes samples that are mappings, or tuples whose first item is one, but "
        f"got a {type(sample).__name__}"
    )


def _check_all_there(taken: Sequence[Taken], collator: MetricsCollator) -> None:
    """Refuse samples without a number, where others have one, or their dataset had."""
    without = [bare for bare, metrics, origin in taken if origin is None and not metrics]
    if not without:
        return
    if len(without) == len(taken):
        check_bare(without, collator)
    elif known := next((one.parts for one in taken if one.origin is not None), None):
        raise ValueError(
            f"{len(without)} of the {len(taken)} samples of a batch have nothing in the column 'metrics', where "
            f"others are of dataset {known[0][0]!r}; they have {sorted(map(str, without[0]))}: call "
            "with_metrics() for each of the datasets that are put together"
        )


def mapping_of(collated: Any) -> MutableMapping[str, Any]:
    """Return the part of a batch that has entries; raises TypeError if there is none."""
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
