"""`DatasetIds`: which dataset each row of a batch, or each of its tokens, is of; by name.

Data workers meet datasets in any order, and so do ranks. So the places that ids count are those of the names
that a batch brings along, and whoever takes them says which places these names have with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from metricfold._core.runtime.listing import shortened
from metricfold.data.origin import TOKENS

__all__ = ["DatasetIds", "dataset_ids", "predicted"]

Part = tuple[str, "int | None"]
"""The dataset of a segment of a sample, and its length in tokens."""


class DatasetIds:
    """Which dataset each row of a batch is of, or each token, as `MetricsCollator` says it.

    ``ids[:, 1:]`` cuts as an array would be cut. Movers and pinners of batches leave it on the host: what
    takes it sends its few numbers to the device, without a wait.

    Args:
        names: of the datasets in the batch.
        index: for each row, or token, the place of its dataset in `names`.

    Raises:
        ValueError: a place is that of no name.

    >>> ids = DatasetIds(("docs", "code"), [0, 1, 1])
    >>> ids.places(("web", "code", "docs"))
    array([2, 1, 1])
    """

    __slots__ = ("index", "names")

    def __init__(self, names: Sequence[str], index: npt.ArrayLike) -> None:
        self.names = tuple(names)
        self.index = np.asarray(index, dtype=np.int32)
        if self.index.size and (self.index.min() < 0 or self.index.max() >= len(self.names)):
            raise ValueError(
                f"dataset ids from {self.index.min()} to {self.index.max()} are places among "
                f"{len(self.names)} names: give those of `names`, from 0 on"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        return self.index.shape

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, key: Any) -> DatasetIds:
        return DatasetIds(self.names, self.index[key])

    def places(self, datasets: Sequence[str]) -> npt.NDArray[np.int64]:
        """Return for each row, or token, the place of its dataset in `datasets`.

        Raises:
            ValueError: a name of the batch is not there.
        """
        places = {name: place for place, name in enumerate(datasets)}
        if unknown := [name for name in self.names if name not in places]:
            raise ValueError(
                f"a batch has samples of dataset {shortened(map(repr, unknown))}, but the datasets are "
                f"{shortened(map(repr, datasets)) or 'none'}: name them all, or let a "
                "metricfold.torch.DeviceAccumulator learn them, by datasets=16"
            )
        return np.array([places[name] for name in self.names], np.int64)[self.index]

    def to(self, *args: object, **kwargs: object) -> DatasetIds:
        return self

    def pin_memory(self, device: object = None) -> DatasetIds:
        return self

    def __repr__(self) -> str:
        return f"DatasetIds({shortened(self.names)}; shape {self.shape})"

    def __reduce__(self) -> tuple[Any, ...]:
        return DatasetIds, (self.names, self.index)


def dataset_ids(rows: Sequence[Sequence[Part]], batch: Mapping[str, Any]) -> DatasetIds:
    """Return the ids of a batch that was collated of samples.

    Args:
        rows: the parts of each sample; several if it is packed.
        batch: what the collate function has made of them.

    Raises:
        ValueError: the batch has another shape than that of a row for each sample, or of all samples in one
            row, and its ids would be guessed.
    """
    names = tuple(dict.fromkeys(name for row in rows for name, _ in row))
    places = {name: place for place, name in enumerate(names)}
    shape = _shape(batch)
    packed = any(len(row) != 1 for row in rows)
    if not packed and (shape is None or shape[0] == len(rows)):
        return DatasetIds(names, [places[name] for ((name, _),) in rows])
    each = [
        np.repeat([places[name] for name, _ in row], [length or 0 for _, length in row])
        for row in rows
    ]
    lengths = [len(row) for row in each]
    if shape is not None and len(shape) == 2 and shape[0] == len(rows) and max(lengths) <= shape[1]:
        index = np.zeros(shape, np.int32)
        for row, own, there in zip(index, each, _there(batch, lengths, shape), strict=True):
            row[there] = own
        return DatasetIds(names, index)
    flat = np.concatenate(each)
    if shape in ((len(flat),), (1, len(flat))) or (
        shape is not None and len(shape) == 2 and shape[0] == 1 and len(flat) < shape[1]
    ):
        index = np.zeros(shape, np.int32)
        index.reshape(-1)[: len(flat)] = flat
        return DatasetIds(names, index)
    raise ValueError(
        f"dataset_ids=True: {len(rows)} samples of {len(flat)} tokens were collated to a batch of the shape "
        f"{shape}, which does not say where each is: let the collate function return {TOKENS[0]!r} or "
        "'labels' with one row for each sample, or with all of them in one row, and nothing cut"
    )


def predicted(ids: DatasetIds, shape: tuple[int, ...]) -> DatasetIds:
    """Return the ids of what each place of a batch predicts: the next token, whose labels have this shape.

    Raises:
        ValueError: the labels do not go with the ids.
    """
    if ids.shape != shape[: len(ids.shape)]:
        raise ValueError(
            f"loss_per_dataset=True, but a batch whose dataset_ids have the shape {ids.shape} has labels of "
            f"the shape {shape}: let the collate function return labels of one row per sample, or of all "
            "samples in one row, or write a compute_loss with a DeviceAccumulator of your own"
        )
    # The last place predicts nothing that counts.
    return ids if len(ids.shape) == 1 else DatasetIds(ids.names, np.roll(ids.index, -1, axis=-1))


def _shape(batch: Mapping[str, Any]) -> tuple[int, ...] | None:
    found = next((batch[name] for name in ("labels", *TOKENS) if name in batch), None)
    if found is None:
        return None
    shape = getattr(found, "shape", None)
    if shape is not None:
        return tuple(shape)
    widths = {len(row) if isinstance(row, list | tuple) else None for row in found}
    width = widths.pop() if len(widths) == 1 else None
    return (len(found),) if width is None else (len(found), width)


def _there(
    batch: Mapping[str, Any], lengths: Sequence[int], shape: tuple[int, ...]
) -> list[slice | npt.NDArray[np.bool_]]:
    """Return where in its row of a batch each sample is: where it says so, or at the left."""
    mask = batch.get("attention_mask")
    seen = None if mask is None else np.asarray(mask)
    if seen is not None and seen.shape == shape and (seen != 0).sum(axis=1).tolist() == [*lengths]:
        return [row != 0 for row in seen]
    return [slice(length) for length in lengths]
