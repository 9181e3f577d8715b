"""Metrics through Hugging Face Datasets: samples that come with the metrics of their dataset.

    from metricfold.integrations.datasets import with_metrics

    mixture = interleave_datasets([
        with_metrics(alpaca, DefaultTrainingMetricTransform(), "alpaca"),
        with_metrics(orca, DefaultTrainingMetricTransform(), "orca"),
    ])
    loader = DataLoader(mixture, batch_size=8, collate_fn=MetricsCollator(pad))

Metrics are made when a sample is read, not when the dataset is made: nothing is written to Arrow,
which knows no `Metric`.

The format of a map-style dataset is one for all rows, and datasets of different formats lose theirs
when they are concatenated. So the rows carry a number under ``"metrics"``, which the same format for
all turns into metrics; selecting, shuffling and interleaving rows need know nothing of it. An iterable
dataset maps its samples when they are read, and hands on what Python objects it is given.
"""

from __future__ import annotations

import copy
import secrets
from typing import Any, TypeVar

from metricfold.data.sample import METRICS
from metricfold.data.transform import MetricTransform
from metricfold.metric import Metric
from metricfold.sinks.selection import require

require("datasets", sink=__name__, extra="datasets")

import datasets
import numpy as np
import pyarrow as pa
from datasets.fingerprint import Hasher
from datasets.formatting import (
    Formatter,
    TableFormatter,
    _register_formatter,
    format_table,
    get_formatter,
)
from datasets.table import InMemoryTable, concat_tables

__all__ = ["with_metrics"]

AnyDataset = TypeVar("AnyDataset", datasets.Dataset, datasets.IterableDataset)

_FORMAT = "metricfold"
_ROWS = 2**16  # of one block of row numbers, which all of a dataset's rows share


def with_metrics(dataset: AnyDataset, transform: MetricTransform, name: str) -> AnyDataset:
    """Return a dataset whose samples come with their metrics, under ``"metrics"``.

    Args:
        dataset: a `datasets.Dataset` or `datasets.IterableDataset`; it stays as it is. The
            transform sees samples as it formats them, so call `map`, `with_format` and
            `with_transform` before.
        transform: what to emit. A copy of it takes the name: one instance serves several datasets.
        name: the name of the dataset in metrics.

    What it returns can be selected, shuffled, split, interleaved and concatenated with others, and
    read by the workers of a `DataLoader`; each sample counts for its own dataset.

    Raises:
        TypeError: `dataset` is something else, such as a dict of splits, or is formatted as tables,
            or `transform` is no `MetricTransform`.
        ValueError: the name is empty, the transform belongs to another dataset already, or
            the dataset has a column ``"metrics"``.

    >>> from datasets import Dataset
    >>> from metricfold import DefaultTrainingMetricTransform
    >>> alpaca = Dataset.from_dict({"tokens": [[1, 2, 3], [4]]})
    >>> alpaca = with_metrics(alpaca, DefaultTrainingMetricTransform(), "alpaca")
    >>> [metric.value for metric in alpaca[1]["metrics"]]
    [1, 1, 1]
    """
    if not isinstance(transform, MetricTransform):
        raise TypeError(f"with_metrics() takes a MetricTransform, not {transform!r}")
    named = copy.copy(transform)
    named.set_dataset_name(name)
    if isinstance(dataset, datasets.Dataset):
        return _tagged(dataset, named, name)
    if isinstance(dataset, datasets.IterableDataset):
        return _mapped(dataset, named, name)
    pick = f": pick one of {list(dataset)}" if isinstance(dataset, dict) else ""
    raise TypeError(
        "with_metrics() takes a datasets.Dataset or IterableDataset, but got a "
        f"{type(dataset).__name__}{pick}"
    )


# -- Iterable datasets


def _mapped(
    dataset: datasets.IterableDataset, transform: MetricTransform, name: str
) -> datasets.IterableDataset:
    # Features that are not known would be guessed from the first samples when datasets are
    # interleaved, and no guess fits a Metric: so that is done without the metrics, and what is
    # said of them is never looked at, since typed samples are passed on as they are.
    resolved = dataset._resolve_features()  # noqa: SLF001
    features = datasets.Features(resolved.features)
    if features.get(METRICS, _METRICS_IN_PYTHON) != _METRICS_IN_PYTHON:
        _refuse_column(name)
    formatting = resolved._formatting  # noqa: SLF001
    if formatting is not None and formatting.is_table:
        _refuse_tables(name, formatting.format_type)
    features[METRICS] = _METRICS_IN_PYTHON
    mapped = resolved.map(transform, features=features)
    # What comes in has its format; what goes out would be formatted once more, metrics and all.
    return mapped if formatting is None else mapped.with_format(None)


_METRICS_IN_PYTHON = datasets.Value("null")


# -- Map-style datasets


class _Transforms:
    """The one table of a process: its transforms by the number that their rows carry.

    It travels with every dataset to the processes that unpickle it, where it joins theirs, so that any
    two formats are equal and concatenated datasets keep them.
    """

    def __init__(self) -> None:
        self._by_number: dict[int, MetricTransform] = {}

    def __getitem__(self, number: int) -> MetricTransform:
        return self._by_number[number]

    def __reduce__(self) -> Any:
        return _joined, (self._by_number,)

    def __deepcopy__(self, memo: Any) -> _Transforms:
        return self

    def number(self, transform: MetricTransform) -> int:
        """Return the number of `transform`: the same in every run, as cached rows must have it."""
        try:
            number = int(Hasher.hash(transform), 16) & (2**63 - 1)
        except Exception:  # noqa: BLE001 - what pickling raises depends on what it meets
            number = secrets.randbits(63)
        self._by_number.setdefault(number, transform)
        return number


_transforms = _Transforms()


def _joined(transforms: dict[int, MetricTransform]) -> _Transforms:
    known = _transforms._by_number  # noqa: SLF001 - it is ours
    known.update({**transforms, **known})
    return _transforms


def _tagged(dataset: datasets.Dataset, transform: MetricTransform, name: str) -> datasets.Dataset:
    if METRICS in dataset.column_names:
        if dataset.format["type"] == _FORMAT:
            raise ValueError(
                f"the samples of dataset {name!r} come with metrics already: call with_metrics() "
                "once for each dataset, with a transform that emits all of its metrics, before "
                "datasets are interleaved or concatenated"
            )
        _refuse_column(name)
    had = dataset.format
    if isinstance(get_formatter(had["type"], **had["format_kwargs"]), TableFormatter):
        _refuse_tables(name, had["type"])
    everything = set(had["columns"]) == set(dataset.column_names)
    samples = {**had, "columns": None if everything else had["columns"]}
    number = _transforms.number(transform)
    info = dataset.info.copy()
    info.features = datasets.Features({**dataset.features, METRICS: datasets.Value("int64")})
    tagged = datasets.Dataset(
        concat_tables([dataset.data, _column(number, dataset.data.num_rows)], axis=1),
        info=info,
        split=dataset.split,
        indices_table=dataset._indices,  # noqa: SLF001 - add_column would write all rows anew
        fingerprint=Hasher.hash([dataset._fingerprint, number]),  # noqa: SLF001
    )
    tagged.set_format(_FORMAT, samples=samples)
    # Added afterwards: a dataset's fingerprint must not depend on what others there are.
    tagged._format_kwargs["transforms"] = _transforms  # noqa: SLF001
    return tagged


def _column(number: int, rows: int) -> InMemoryTable:
    block = pa.array(np.full(min(rows, _ROWS), number))
    blocks = [block] * (rows // _ROWS) + [block[: rows % _ROWS]]
    return InMemoryTable(pa.table({METRICS: pa.chunked_array(blocks, type=pa.int64())}))


class MetricsFormatter(Formatter):  # type: ignore[misc]
    """Formats rows as their dataset did before, and adds the metrics that their numbers stand for."""

    def __init__(
        self,
        samples: dict[str, Any],
        transforms: _Transforms = _transforms,
        features: datasets.Features | None = None,
        **tokens: Any,
    ) -> None:
        super().__init__(features=features, **tokens)
        if features is not None:
            features = datasets.Features({k: v for k, v in features.items() if k != METRICS})
        self._samples = samples
        self._transforms = transforms
        kwargs = {**tokens, **samples["format_kwargs"]}
        self._formatter = get_formatter(samples["type"], features=features, **kwargs)

    def format_row(self, pa_table: pa.Table) -> Any:
        sample = self._formatted(pa_table, 0)
        if METRICS not in pa_table.column_names:
            return sample
        return self._measured(pa_table[METRICS][0].as_py(), sample)

    def format_column(self, pa_table: pa.Table) -> Any:
        return self._formatted(pa_table, pa_table.column_names[0])

    def format_batch(self, pa_table: pa.Table) -> Any:
        batch = self._formatted(pa_table, range(pa_table.num_rows))
        if METRICS not in pa_table.column_names:
            return batch
        numbers = pa_table[METRICS].to_pylist()
        wrong = {column: len(values) for column, values in batch.items()}
        if any(length != len(numbers) for length in wrong.values()):
            raise ValueError(
                f"{len(numbers)} rows were formatted as columns of the lengths {wrong}: what makes "
                "several samples of one, or one of several, belongs into map(), before "
                "with_metrics()"
            )
        metrics: list[list[Metric]] = []
        for row, number in enumerate(numbers):
            sample = {column: values[row] for column, values in batch.items()}
            metrics.append(self._measured(number, sample).get(METRICS, []))
        return {**batch, METRICS: metrics}

    def _formatted(self, pa_table: pa.Table, key: int | str | range) -> Any:
        if pa_table.column_names == [METRICS]:
            raise TypeError(
                "metrics are made from samples, so they cannot be read without them: read "
                "dataset[0]['metrics'] or dataset[:8]['metrics'], not dataset['metrics']"
            )
        if METRICS in pa_table.column_names:
            pa_table = pa_table.drop_columns([METRICS])
        columns = self._samples["columns"]
        if columns is not None:
            columns = [column for column in columns if column in pa_table.column_names]
        hand_on = self._samples["output_all_columns"]
        return format_table(pa_table, key, self._formatter, columns, hand_on)

    def _measured(self, number: int | None, sample: Any) -> Any:
        return sample if number is None else self._transforms[number](sample)


_register_formatter(MetricsFormatter, _FORMAT)


def _refuse_column(name: str) -> None:
    raise ValueError(
        f"dataset {name!r} has a column 'metrics', and that name belongs to the list of Metric "
        "that a MetricTransform adds: rename the column"
    )


def _refuse_tables(name: str, format_type: str) -> None:
    raise TypeError(
        f"dataset {name!r} has the format {format_type!r}, whose samples are tables: metrics are "
        "made from samples that are mappings, so call with_format(None) before with_metrics()"
    )
