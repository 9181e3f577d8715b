"""Where a sample is from, as a number: what `with_metrics` of the integrations puts into a dataset's rows.

Rows of Arrow know no `Metric`. So they carry the number of a transform that knows its dataset, which any
map, filter, format or file leaves what it is, and the transform is called where the batch is made: by then
it sees the sample that the model will see, cut and packed.

A packed row carries one number for each of its tokens. The first token of a sample has ``~number``, which is
negative: so two samples of one dataset side by side are two, whichever packer has put them there.
"""

from __future__ import annotations

import pickle
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from metricfold._core.runtime.listing import shortened
from metricfold.metric import METRICS, Metric

__all__ = [
    "LARGEST",
    "ORIGINS",
    "TOKENS",
    "Segment",
    "UnknownOriginError",
    "check_bare",
    "check_origins",
    "measured",
    "named",
    "note",
    "noted",
    "number_of",
    "segments",
    "tokens_of",
]

TOKENS = ("input_ids", "tokens", "labels")
"""Columns with one value for each token of a sample; the first that there is."""

LARGEST = 2**31 - 1
"""Numbers are no larger, for JAX makes int32 of any integer."""


class MetricTransform(Protocol):
    """What the table needs to know of a `metricfold.data.transform.MetricTransform`, which builds on it."""

    dataset_name: str | None

    def __call__(self, sample: Any) -> Any: ...


# -- The table -------------------------------------------------------------------------------------


class UnknownOriginError(ValueError):
    """A row carries a number that stands for nothing here."""

    number = -1


def _unknown(number: int, name: str = "") -> UnknownOriginError:
    known = shortened(map(_described, ORIGINS.known)) or "none"
    of = f", of dataset {name}," if name else ","
    error = UnknownOriginError(
        f"the column {METRICS!r} of a sample holds {number}{of} for which this process knows no transform; "
        f"it knows {known}: call with_metrics() before the workers of the loader start; or, if the "
        "dataset was saved by another process, remember(transform, name) of "
        f"metricfold.integrations.datasets, with number={number} where the settings are others"
    )
    error.number = number
    return error


class Origins:
    """The one table of a process: its transforms, by the number that their rows carry.

    It travels with each `MetricsCollator` to the processes that unpickle it, and joins theirs there.
    """

    def __init__(self) -> None:
        self._transforms: dict[int, MetricTransform] = {}
        self._packed: dict[
            int, tuple[str, bytes | str]
        ] = {}  # not unpickled yet, or why not pickled

    def __bool__(self) -> bool:
        return bool(self._transforms or self._packed)

    @property
    def known(self) -> list[MetricTransform]:
        return [*self._transforms.values()]

    def add(self, number: int, transform: MetricTransform, *, of_any_class: bool = False) -> None:
        """Let `number` stand for `transform`; the last one of the same class, name and state does.

        Raises:
            ValueError: it stands for another dataset already, or for another class, unless `of_any_class`.
        """
        known = self._transforms.get(number, transform)
        same = known.dataset_name == transform.dataset_name
        if not (same and (of_any_class or _described(known) == _described(transform))):
            raise ValueError(
                f"{_described(transform)} and {_described(known)} come to the same number, by chance: "
                "give one of the two datasets another name"
            )
        self._transforms[number] = transform

    def __getitem__(self, number: int) -> MetricTransform:
        transform = self._transforms.get(number)
        if transform is None:
            transform = self._transforms[number] = self._unpacked(number)
        return transform

    def _unpacked(self, number: int) -> MetricTransform:
        name, packed = self._packed.get(number, ("", ""))
        if isinstance(packed, bytes):
            transform: MetricTransform = pickle.loads(packed)  # noqa: S301 - from our parent process
            return transform
        if name:
            raise ValueError(
                f"the transform of dataset {name!r} could not be sent to this process ({packed}): let "
                "it hold nothing that cannot be pickled, and be of a class that stands in a module"
            )
        raise _unknown(number)

    def __contains__(self, number: int) -> bool:
        return number in self._transforms or number in self._packed

    def packed(self) -> dict[int, tuple[str, bytes | str]]:
        """Return what `join` takes, in which one that cannot be pickled does not stop the others."""
        found = dict(self._packed)
        for number, transform in self._transforms.items():
            found[number] = str(transform.dataset_name), _packed(transform)
        return found

    def join(self, packed: Mapping[int, tuple[str, bytes | str]]) -> None:
        self._packed.update(packed)


ORIGINS = Origins()


def _packed(transform: MetricTransform) -> bytes | str:
    """Return `transform` pickled, or why it could not be.

    A class of a script, a notebook or a function is nothing that another process can import. Where Datasets
    is, there is dill, which takes such a class along.
    """
    dill = sys.modules.get("dill")
    cls = type(transform)
    own = cls.__module__ == "__main__" or "<locals>" in cls.__qualname__
    try:
        if own and dill is not None:
            packed: bytes = dill.dumps(transform, recurse=True)
            return packed
        return pickle.dumps(transform)
    except Exception as error:  # noqa: BLE001 - what pickling raises depends on what it meets
        return str(error)


def _described(transform: MetricTransform) -> str:
    return f"{transform.dataset_name!r} ({type(transform).__qualname__})"


# -- What a row says -------------------------------------------------------------------------------


class Segment(NamedTuple):
    """The part of a packed row that was a sample."""

    number: int
    sample: Mapping[str, Any]
    length: int  # in tokens


def number_of(given: Any) -> int | None:
    """Return what a sample has under ``"metrics"`` as the number of an origin; None: it is none.

    Raises:
        TypeError: it is a number, but no integer.
    """
    numbers = _numbers(given)
    return int(numbers) if numbers is not None and numbers.ndim == 0 else None


def segments(given: Any, sample: Mapping[str, Any]) -> list[Segment] | None:
    """Return the segments of a packed row, or None if `given`, its ``"metrics"``, are no numbers.

    Args:
        given: one number for each token, or each segment.
        sample: the rest of it.

    Raises:
        TypeError: `given` are numbers, but no integers.
        ValueError: there are as many numbers as there are neither tokens nor segments.
    """
    numbers = _numbers(given)
    return None if numbers is None else _segments(numbers, sample)


def measured(number: int, sample: Mapping[str, Any]) -> list[Metric]:
    """Return the metrics that the transform of its dataset makes of a sample."""
    transform = ORIGINS[number]
    try:
        made: list[Metric] = transform(sample)[METRICS]
    except KeyError as error:
        if not error.args or error.args[0] in sample:
            raise
        raise ValueError(
            f"the transform of dataset {_described(transform)} asks for the column {error.args[0]!r}, but "
            f"where the batch is made its samples have {sorted(map(str, sample))}: metrics are made after "
            "all maps, so let them keep the column"
        ) from error
    return made


def tokens_of(sample: Mapping[str, Any]) -> int | None:
    """Return the number of tokens of a sample; None: it has none."""
    found: Any = next((sample[name] for name in TOKENS if name in sample), None)
    return len(found) if _is_column(found) else None


def _numbers(given: Any) -> npt.NDArray[np.int64] | None:
    """Return `given` as integers, of no dimension or of one; None: it is something else."""
    if isinstance(given, Mapping | str | bytes | Metric) or given is None:
        return None
    if isinstance(given, list | tuple):
        if not given or (
            not isinstance(given[0], int | np.integer) and not hasattr(given[0], "dtype")
        ):
            return None
    elif not isinstance(given, np.generic) and not hasattr(given, "__array__"):
        return None
    if hasattr(given, "detach"):  # a tensor, wherever it lies
        given = given.detach().cpu()
    array = np.asarray(given)
    if array.ndim > 1 or array.dtype.kind not in "iuf":
        return None
    if array.dtype.kind == "f":
        raise TypeError(
            f"the column {METRICS!r} of a sample came as {array.dtype}, in which numbers are rounded: set "
            "a format that leaves integers what they are, without dtype="
        )
    return array.astype(np.int64)


def _segments(numbers: npt.NDArray[np.int64], sample: Mapping[str, Any]) -> list[Segment]:
    tokens = tokens_of(sample)
    total = len(numbers) if tokens is None else tokens
    lengths = np.asarray(sample.get(_LENGTHS, ()), dtype=np.int64).reshape(-1)
    first = numbers < 0
    numbers = np.where(first, ~numbers, numbers)
    if len(numbers) == total:
        starts = first | (np.diff(numbers, prepend=-1) != 0)
        if lengths.sum() == total:
            ends = np.cumsum(lengths)
            starts[ends[ends < total]] = True
        bounds = [*np.flatnonzero(starts).tolist(), total]
        numbers = numbers[starts]
    elif len(numbers) == len(lengths) and lengths.sum() == total:
        bounds = [0, *np.cumsum(lengths).tolist()]
    else:
        raise ValueError(
            f"a packed row has {len(numbers)} numbers in its column {METRICS!r} for {total} tokens: cut that "
            "column wherever the tokens are cut, or call metrics_per_token() after cutting, just before "
            "packing"
        )
    rest = {name: value for name, value in sample.items() if name != _LENGTHS}
    columns = {name for name, value in rest.items() if _is_column(value) and len(value) == total}
    found = []
    for number, start, end in zip(numbers.tolist(), bounds[:-1], bounds[1:], strict=True):
        part = {
            name: value[start:end] if name in columns else value for name, value in rest.items()
        }
        found.append(Segment(number, part, end - start))
    return found


_LENGTHS = "seq_lengths"
"""The column in which packers say how long the samples of a row are."""


def _is_column(value: object) -> bool:
    shape = getattr(value, "shape", None)
    return (
        len(shape) > 0
        if shape is not None
        else isinstance(value, Sequence) and type(value) is not str
    )


# -- A dataset that has lost them ------------------------------------------------------------------

_NOTE = "metricfold: the column 'metrics' is {} in samples of dataset {!r}"
_NOTED = re.compile(r"metricfold: the column 'metrics' is (\d+) in samples of dataset (.+)")


def note(number: int, name: str) -> str:
    """Return what a dataset's description says from `with_metrics` on; it survives what drops the column."""
    return _NOTE.format(number, name)


def noted(dataset: object) -> dict[int, str]:
    """Return the datasets, quoted, whose samples are in `dataset` and have, or had, the column, by number."""
    said: dict[int, str] = {}
    for one in _with_what_it_reads(dataset):
        description = getattr(getattr(one, "info", None), "description", None) or ""
        said |= {int(number): name for number, name in _NOTED.findall(description)}
    return said


def _with_what_it_reads(dataset: object) -> Iterator[object]:
    """Yield a dataset and what it is made of.

    Torch's subsets and chains say nothing themselves, nor does a stream by `to_iterable_dataset`, to which
    nothing but the features goes along.
    """
    found: list[Any] = [dataset]
    seen: set[int] = set()
    for one in found:  # which grows meanwhile
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        own = getattr(one, "__dict__", {})
        found += [own[name] for name in ("_ex_iterable", "ex_iterable", "dataset") if name in own]
        kwargs = own.get("kwargs")
        shards = kwargs.get("shards") if isinstance(kwargs, dict) else None
        for several in (own.get("ex_iterables"), own.get("datasets"), shards):
            found += several if isinstance(several, list | tuple) else ()


def check_origins(dataset: object, where: str) -> None:
    """Raise ValueError if `dataset` has lost its column ``"metrics"``, or nobody knows what is there.

    Args:
        dataset: of any kind.
        where: what it is, such as ``"train_dataset"``.
    """
    columns = getattr(dataset, "column_names", None)
    names = noted(dataset)
    if columns is not None and METRICS not in columns and names:
        raise ValueError(f"{where} has lost the column {METRICS!r}: {_lost(names, columns)}")
    for number, name in names.items():
        if number not in ORIGINS:
            raise _unknown(number, name)


def check_bare(samples: Sequence[Mapping[str, Any]], collator: object) -> None:
    """Raise ValueError if samples without metrics are of a dataset whose rows carry numbers.

    Args:
        samples: of a batch; one at least.
        collator: which makes it.
    """
    names = noted(_being_read(collator))
    if names:
        columns = sorted(map(str, samples[0]))
        raise ValueError(
            f"the samples of a batch come without the column {METRICS!r}: {_lost(names, columns)}"
        )


def named(error: UnknownOriginError, collator: object) -> UnknownOriginError:
    """Return an error that says of which dataset the number is, if that can be known."""
    return _unknown(error.number, noted(_being_read(collator)).get(error.number, ""))


def _lost(names: Mapping[int, str], columns: Sequence[str]) -> str:
    return (
        f"with_metrics() has put it there for {shortened(names.values())}, and now there are "
        f"{shortened(map(repr, columns), 8)}. A map(..., remove_columns=dataset.column_names), a "
        "select_columns() or a format's columns= has left it out: let them keep it, or call with_metrics() "
        "after them, once for each dataset of the mixture"
    )


def _being_read(collator: object) -> object:
    """Return the dataset of the loader that makes a batch at the moment, if it is one of torch's.

    Nobody but the caller of the collate function knows it. That is asked only for an error, and where no
    sample of a batch has metrics.
    """
    found: Any = None
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001
    while found is None and frame is not None:
        caller = frame.f_locals.get("self")
        if type(caller) is type(collator) and caller is not collator:
            return None  # another one around it has taken the metrics
        if hasattr(caller, "collate_fn"):
            found = getattr(caller, "dataset", None)
        frame = frame.f_back
    return found
