"""Metrics through Hugging Face Datasets: samples that know which dataset they are of.

    from metricfold.integrations.datasets import with_metrics

    mixture = interleave_datasets([
        with_metrics(alpaca, DefaultTrainingMetricTransform(), "alpaca"),
        with_metrics(orca, DefaultTrainingMetricTransform(), "orca"),
    ])
    mixture = mixture.map(tokenize, batched=True)
    loader = DataLoader(mixture, batch_size=8, collate_fn=MetricsCollator(pad))

Each row carries a number, in a column ``"metrics"`` of plain integers, which is treated like any other by
whatever maps, cuts, mixes, formats or stores rows. Metrics are made of it where the batch is made, by
`MetricsCollator` and what is built on it, of the sample as it is by then.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from metricfold.data.origin import LARGEST, ORIGINS, note
from metricfold.data.sample import METRICS, metrics_of
from metricfold.data.transform import MetricTransform
from metricfold.sinks.selection import require

require("datasets", sink=__name__, extra="datasets")

import datasets
import numpy as np
import pyarrow as pa
from datasets.fingerprint import Hasher
from datasets.table import InMemoryTable, concat_tables

__all__ = ["metrics_of", "metrics_per_token", "remember", "with_metrics"]

AnyDataset = TypeVar("AnyDataset", datasets.Dataset, datasets.IterableDataset)

_NUMBER = datasets.Value("int64")
_ROWS = 2**16  # of one block of numbers, which all of a dataset's rows share


def with_metrics(dataset: AnyDataset, transform: MetricTransform, name: str) -> AnyDataset:
    """Return a dataset whose samples count for it, wherever they are mixed, mapped and cut.

    Args:
        dataset: a `datasets.Dataset` or `datasets.IterableDataset`; it stays as it is.
        transform: what to emit, of each sample as it is where its batch is made. A copy of it takes the
            name: one instance serves several datasets.
        name: the name of the dataset in metrics.

    What it returns has a column ``"metrics"`` of integers, one number for all rows, which stands for the
    transform and the name. `MetricsCollator` makes the metrics of it, in the process that makes the batch;
    `metrics_of` by hand. Call it before datasets are put together; maps, filters, formats and files may
    come before or after it, as long as they keep the column.

    Raises:
        TypeError: `dataset` is something else, such as a dict of splits, or `transform` is no
            `MetricTransform`.
        ValueError: the name is empty, the transform belongs to another dataset already, or
            the dataset has a column ``"metrics"``.

    >>> from datasets import Dataset
    >>> from metricfold import DefaultTrainingMetricTransform
    >>> alpaca = Dataset.from_dict({"tokens": [[1, 2, 3], [4]]})
    >>> alpaca = with_metrics(alpaca, DefaultTrainingMetricTransform(), "alpaca")
    >>> alpaca = alpaca.map(lambda sample: {"tokens": sample["tokens"][:2]})
    >>> [metric.value for metric in metrics_of(alpaca[0])]
    [1, 2, 2]
    """
    if not isinstance(transform, MetricTransform):
        raise TypeError(f"with_metrics() takes a MetricTransform, not {transform!r}")
    if not isinstance(dataset, datasets.Dataset | datasets.IterableDataset):
        pick = f": pick one of {list(dataset)}" if isinstance(dataset, dict) else ""
        raise TypeError(
            "with_metrics() takes a datasets.Dataset or IterableDataset, but got a "
            f"{type(dataset).__name__}{pick}"
        )
    named = copy.copy(transform)
    named.set_dataset_name(name)
    _check_column(dataset.column_names or (), name)
    number = _number(named)
    if isinstance(dataset, datasets.Dataset):
        numbered = _with_column(dataset, number)
    else:
        numbered = _with_number(dataset, number, name)
    ORIGINS.add(number, named)
    info = numbered._info  # noqa: SLF001 - of its own by now
    said = note(number, name)
    if said not in info.description:
        info.description = "\n\n".join(filter(None, (info.description, said)))
    return numbered


def remember(transform: MetricTransform, name: str, *, number: int | None = None) -> None:
    """Let this process know what rows carry that another process has given to `with_metrics`, and saved.

    Call it where such a dataset is loaded, before the workers of a loader start. Metrics are made anew.

    Args:
        transform: of the same class and settings as then; its code may have changed.
        name: of the dataset, as then.
        number: what the rows carry, if the class or the settings are others; errors say it, and so does the
            dataset's ``info.description``.

    Raises:
        ValueError: the number stands for another dataset here.

    >>> from metricfold import DefaultTrainingMetricTransform
    >>> remember(DefaultTrainingMetricTransform(), "alpaca")
    """
    renamed = copy.copy(transform)
    renamed.set_dataset_name(name)
    if number is None:
        ORIGINS.add(_number(renamed), renamed)
    else:
        ORIGINS.add(number, renamed, of_any_class=True)


def metrics_per_token(
    dataset: AnyDataset, column: str = "input_ids", **map_kwargs: Any
) -> AnyDataset:
    """Return a dataset in which each token has the number of its sample's row, so that rows can be packed.

    Call it just before a packer that treats all columns of lists alike, such as TRL's `pack_dataset` or the
    ``group_texts`` of many scripts. What it makes of samples, the packed row then counts for each of them.

    Args:
        dataset: which `with_metrics` has returned, or what has become of it.
        column: of the tokens.
        map_kwargs: of the dataset's `map`, such as ``num_proc``.

    Raises:
        ValueError: the dataset has no column ``"metrics"``, or none of the tokens, or rows without a number.

    >>> from datasets import Dataset
    >>> from metricfold import DefaultTrainingMetricTransform
    >>> docs = Dataset.from_dict({"input_ids": [[1, 2, 3], [4]]})
    >>> docs = metrics_per_token(with_metrics(docs, DefaultTrainingMetricTransform(), "docs"))
    >>> packed = {name: docs[0][name] + docs[1][name] for name in docs.column_names}
    >>> [metric.value for metric in metrics_of(packed) if metric.name == "tokens_seen"]
    [3, 1]
    """
    there = dataset.column_names
    if there is not None and (missing := [one for one in (METRICS, column) if one not in there]):
        raise ValueError(
            f"metrics_per_token() finds no column {missing[0]!r} among {there}: call with_metrics() for each "
            "dataset and tokenize, and then metrics_per_token(), just before packing"
        )
    if dataset.features is not None and isinstance(dataset.features, dict):
        features = {**dataset.features, METRICS: datasets.Sequence(datasets.Value("int32"))}
        map_kwargs = {"features": datasets.Features(features), **map_kwargs}
    return _unformatted(
        dataset,
        lambda plain: plain.map(
            _per_token, batched=True, input_columns=[METRICS, column], **map_kwargs
        ),
    )


def _per_token(numbers: list[int | None], tokens: list[Any]) -> dict[str, list[Any]]:
    spread = []
    for number, of_row in zip(numbers, tokens, strict=True):
        if number is None:
            raise ValueError(
                "metrics_per_token() finds rows that have nothing in the column 'metrics', where others have a "
                "number: call with_metrics() for each of the datasets that are put together"
            )
        each = np.full(len(of_row), number, np.int32)
        each[:1] = ~each[:1]  # the first of a sample
        spread.append(each)
    return {METRICS: spread}


# -- The column ------------------------------------------------------------------------------------


def _with_column(dataset: datasets.Dataset, number: int) -> datasets.Dataset:
    info = dataset.info.copy()
    info.features = datasets.Features({**dataset.features, METRICS: _NUMBER})
    numbered = datasets.Dataset(
        concat_tables([dataset.data, _column(number, dataset.data.num_rows)], axis=1),
        info=info,
        split=dataset.split,
        indices_table=dataset._indices,  # noqa: SLF001 - add_column would write all rows anew
        fingerprint=Hasher.hash([dataset._fingerprint, number]),  # noqa: SLF001
    )
    had = dataset.format
    if had["type"] == "custom":
        had["format_kwargs"] = {"transform": _Keeping(had["format_kwargs"]["transform"])}
    everything = set(had["columns"]) == set(dataset.column_names)
    columns = None if everything else [*had["columns"], METRICS]
    numbered.set_format(had["type"], columns, had["output_all_columns"], **had["format_kwargs"])
    return numbered


def _column(number: int, rows: int) -> InMemoryTable:
    block = pa.array(np.full(min(rows, _ROWS), number))
    blocks = [block] * (rows // _ROWS) + [block[: rows % _ROWS]]
    return InMemoryTable(pa.table({METRICS: pa.chunked_array(blocks, type=pa.int64())}))


class _Keeping:
    """What `with_transform` was given, which need not know of the column."""

    def __init__(self, function: Callable[[dict[str, Any]], Mapping[str, Any]]) -> None:
        self._function = function

    def __eq__(self, other: object) -> bool:
        # Datasets that are put together keep a format that is the same.
        return isinstance(other, _Keeping) and other._function == self._function

    def __hash__(self) -> int:
        return hash(self._function)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        rest = dict(batch)
        numbers = rest.pop(METRICS, None)
        made = dict(self._function(rest))
        if numbers is None:
            return made
        wrong = {column: len(values) for column, values in made.items()}
        if any(length != len(numbers) for length in wrong.values()):
            raise ValueError(
                f"{len(numbers)} rows were formatted as columns of the lengths {wrong}: what makes "
                "several samples of one, or one of several, belongs into map(), before "
                "with_metrics()"
            )
        return {**made, METRICS: numbers}


def _with_number(
    dataset: datasets.IterableDataset, number: int, name: str
) -> datasets.IterableDataset:
    features = dataset.features
    if features is not None:
        features = datasets.Features({**features, METRICS: _NUMBER})
    return _unformatted(
        dataset, lambda plain: plain.map(_Numbering(number, name), features=features)
    )


class _Numbering:
    """Adds the number to the samples of a stream, as they are read."""

    def __init__(self, number: int, name: str) -> None:
        self._number, self._name = number, name

    def __call__(self, sample: Mapping[str, Any]) -> dict[str, int]:
        _check_column(sample, self._name)
        return {METRICS: self._number}


def _unformatted(dataset: Any, change: Callable[[Any], Any]) -> Any:
    """Change a dataset as if it had no format, which it has afterwards as before."""
    if isinstance(dataset, datasets.Dataset):
        had = dataset.format
        everything = set(had["columns"]) == set(dataset.column_names)
        changed = change(dataset.with_format(None))
        columns = None if everything else had["columns"]
        return changed.with_format(
            had["type"], columns, had["output_all_columns"], **had["format_kwargs"]
        )
    formatting = dataset._formatting  # noqa: SLF001
    if formatting is None:
        return change(dataset)
    return change(dataset.with_format(None)).with_format(formatting.format_type)


def _check_column(columns: Any, name: str) -> None:
    if METRICS in columns:
        raise ValueError(
            f"dataset {name!r} has a column 'metrics' already, and that name belongs to metricfold: call "
            "with_metrics() once for each dataset, with a transform that emits all of its metrics, before "
            "datasets are put together; a column of your own has to be renamed; and of a dataset that was "
            "saved with the column, let remember(transform, name) make known what it stands for"
        )


# -- Numbers ---------------------------------------------------------------------------------------


def _number(transform: MetricTransform) -> int:
    """Return the number of `transform`: the same in every run, as cached and saved rows have it.

    It is of the class, the name and the state. The code is left out: who changes what a transform emits
    does not have to map the dataset anew.
    """
    cls = type(transform)
    own = [transform.dataset_name, cls.__module__, cls.__qualname__]
    try:
        own.append(Hasher.hash(transform.__reduce_ex__(2)[2:]))
    except Exception:  # noqa: BLE001 - what pickling raises depends on what it meets
        # Told apart from others by when they come, which is the same in every run.
        own.append(str(next(_unhashable)))
    return int(Hasher.hash(own), 16) & LARGEST


_unhashable = itertools.count()
