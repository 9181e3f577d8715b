"""`MetricsCollator`, in the main process and in real data workers, around any collate function."""

from __future__ import annotations

import dataclasses
import io
import re
from collections import OrderedDict, UserDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from ranks import preload
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torch.utils.data._utils.pin_memory import pin_memory
from torchdata.stateful_dataloader import StatefulDataLoader

from metricfold import (
    AggregationType,
    DefaultTrainingMetricTransform,
    Metric,
    MetricBatch,
    MetricsAggregator,
    MetricsCollator,
)

preload("torch.utils.data")

SIZE = 23
BATCH = 4


class Texts(Dataset[dict[str, Any]]):
    """Samples of two datasets, cached, of 4 tokens each or of `1 + index % 5`."""

    def __init__(self, *, uneven: bool = True) -> None:
        self._transforms = {}
        for name in ("alpaca", "orca"):
            self._transforms[name] = DefaultTrainingMetricTransform()
            self._transforms[name].set_dataset_name(name)
        self._cached = [
            {"tokens": [index] * (1 + index % 5 if uneven else 4), "index": index}
            for index in range(SIZE)
        ]

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._transforms["alpaca" if index % 3 else "orca"](self._cached[index])


def expected(*, uneven: bool = True, indices: Any = range(SIZE)) -> dict[str, float]:
    """Return `samples_seen` and `tokens_seen`, counted by hand."""
    totals: dict[str, float] = {}
    for index in indices:
        name = "alpaca" if index % 3 else "orca"
        for metric, count in (("samples_seen", 1), ("tokens_seen", 1 + index % 5 if uneven else 4)):
            key = f"data_{name}/{metric}"
            totals[key] = totals.get(key, 0.0) + count
    return totals


def totals(aggregator: MetricsAggregator) -> dict[str, float]:
    results = aggregator.get_metrics_for_logging()
    return {key: value for key, value in results.items() if key.endswith("_seen")}


def pad(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Pad tokens to the longest."""
    longest = max(len(sample["tokens"]) for sample in samples)
    rows = [sample["tokens"] + [0] * (longest - len(sample["tokens"])) for sample in samples]
    return {
        "tokens": torch.tensor(rows),
        "lengths": torch.tensor([len(sample["tokens"]) for sample in samples]),
        "index": [sample["index"] for sample in samples],
    }


def pad_to_encoding(samples: list[dict[str, Any]]) -> Any:
    from transformers import BatchEncoding

    return BatchEncoding(pad(samples))


# -- Around collate functions, in workers --------------------------------------------------------


# A worker that is spawned imports everything anew. One that a server forks is sent what it needs in
# the same way, by pickling it, in a fraction of the time.
@pytest.mark.parametrize(
    ("collate_fn", "workers"),
    [
        *product([None, pad, pad_to_encoding], [0, "fork", "forkserver"]),
        (pad_to_encoding, "spawn"),
    ],
)
def test_metrics_arrive_with_their_batch(collate_fn: Any, workers: Any) -> None:
    uneven = collate_fn in (pad, pad_to_encoding)
    loader = DataLoader(
        Texts(uneven=uneven),
        BATCH,
        collate_fn=MetricsCollator(collate_fn),
        num_workers={0: 0, "spawn": 1}.get(workers, 2),
        multiprocessing_context=workers or None,
        persistent_workers=bool(workers),
    )
    aggregator = MetricsAggregator()
    for epoch in (1, 2, 3):
        for batch in loader:
            assert list(batch)[-1] == "metrics"
            assert isinstance(batch["metrics"], MetricBatch)
            aggregator.update(batch.pop("metrics"))
            assert "metrics" not in batch
            assert len(batch["tokens"]) <= BATCH
            if collate_fn is pad_to_encoding:
                assert type(batch).__name__ == "BatchEncoding"
                assert batch.to("cpu")["tokens"].device.type == "cpu"
        once = expected(uneven=uneven)
        assert totals(aggregator) == {key: epoch * value for key, value in once.items()}


def test_a_batch_encoding_can_be_moved_with_its_metrics_in_it() -> None:
    transform = DefaultTrainingMetricTransform()
    transform.set_dataset_name("alpaca")
    from transformers import BatchEncoding

    samples = [
        transform(BatchEncoding({"input_ids": torch.tensor([1, 2]), "labels": torch.tensor(1)}))
        for _ in range(3)
    ]
    batch = MetricsCollator()(samples)
    assert type(batch) is BatchEncoding
    moved = batch.to("cpu")
    aggregator = MetricsAggregator()
    aggregator.update(moved.pop("metrics"))
    assert totals(aggregator) == {"data_alpaca/samples_seen": 3.0, "data_alpaca/tokens_seen": 6.0}
    assert moved["input_ids"].shape == (3, 2)


class Stream(IterableDataset[dict[str, Any]]):
    """Texts without an index."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        texts, info = Texts(), torch.utils.data.get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        yield from (texts[index] for index in range(first, SIZE, step))


@pytest.mark.parametrize("workers", [0, 2])
def test_streams_are_collated_too(workers: int) -> None:
    loader = DataLoader(Stream(), BATCH, num_workers=workers, collate_fn=MetricsCollator(pad))
    aggregator = MetricsAggregator()
    for batch in loader:
        aggregator.update(batch.pop("metrics"))
    assert totals(aggregator) == expected()


# -- Kinds of samples ----------------------------------------------------------------------------


class Pair(NamedTuple):
    inputs: Any
    label: int


def tagged(value: int = 1, **entries: Any) -> dict[str, Any]:
    metric = Metric("alpaca", "seen", value, AggregationType.SUM)
    return {"x": value, "metrics": [metric], **entries}


def seen(batch: Any) -> float:
    aggregator = MetricsAggregator()
    aggregator.update(batch)
    return aggregator.get_metrics_for_logging()["data_alpaca/seen"]


def test_a_tuple_may_begin_with_the_mapping() -> None:
    samples = [(tagged(2), 7), (tagged(3), 8)]
    inputs, labels = MetricsCollator()(samples)
    assert list(inputs) == ["x", "metrics"]
    assert inputs["x"].tolist() == [2, 3]
    assert labels.tolist() == [7, 8]
    assert seen(inputs["metrics"]) == 5.0
    assert list(samples[0][0]) == ["x", "metrics"]


def test_a_named_tuple_stays_one() -> None:
    samples = [Pair(tagged(2), 7), Pair(tagged(3), 8)]
    batch = MetricsCollator()(samples)
    assert type(batch) is Pair
    assert batch.label.tolist() == [7, 8]
    assert list(batch.inputs) == ["x", "metrics"]
    assert seen(batch.inputs["metrics"]) == 5.0
    kinds = []
    MetricsCollator(lambda bare: kinds.append({type(sample) for sample in bare}) or {})(samples)
    assert kinds == [{Pair}]


@pytest.mark.parametrize(
    "kind", [dict, OrderedDict, UserDict, MappingProxyType], ids=lambda kind: kind.__name__
)
def test_any_mapping_is_a_sample_and_stays_as_it_is(kind: Callable[[Any], Any]) -> None:
    samples = [kind(tagged(2)), kind(tagged(3))]
    given: list[Any] = []
    batch = MetricsCollator(lambda bare: given.extend(bare) or {"n": len(bare)})(samples)
    assert seen(batch["metrics"]) == 5.0
    assert [dict(sample) for sample in given] == [{"x": 2}, {"x": 3}]
    assert all(isinstance(sample, Mapping) for sample in given)
    assert [list(sample) for sample in samples] == [["x", "metrics"]] * 2
    assert [len(sample["metrics"]) for sample in samples] == [1, 1]


@pytest.mark.parametrize("returns", [dict, OrderedDict, UserDict], ids=lambda kind: kind.__name__)
def test_metrics_become_the_last_entry_of_any_mutable_mapping(returns: Callable[..., Any]) -> None:
    batch = MetricsCollator(lambda bare: returns(b=1, a=2))([tagged()])
    assert list(batch) == ["b", "a", "metrics"]
    assert seen(batch["metrics"]) == 1.0


@pytest.mark.parametrize("wrap", [lambda m: [m, 5], lambda m: (m, 5), lambda m: Pair(m, 5)])
def test_a_collate_function_may_return_a_sequence_that_begins_with_the_mapping(wrap: Any) -> None:
    batch = MetricsCollator(lambda bare: wrap({"x": 1}))([tagged()])
    assert seen(batch[0]["metrics"]) == 1.0
    assert batch[1] == 5


def test_samples_without_metrics_are_welcome() -> None:
    batch = MetricsCollator()([{"x": 1}, tagged(2), {"x": 3, "metrics": []}])
    assert batch["x"].tolist() == [1, 2, 3]
    assert seen(batch["metrics"]) == 2.0
    bare = MetricsCollator()([{"x": 1}])
    aggregator = MetricsAggregator()
    aggregator.update(bare.pop("metrics"))
    assert aggregator.get_metrics_for_logging() == {}


def test_a_cached_sample_is_not_altered_by_a_collate_function_that_returns_it() -> None:
    cached = {"x": 1}
    for _ in range(3):
        batch = MetricsCollator(lambda bare: bare[0])([cached])
        assert list(batch) == ["x", "metrics"]
    assert cached == {"x": 1}


def test_a_packed_sample_carries_the_metrics_of_all_that_it_holds() -> None:
    texts = Texts()
    samples = [texts[index] for index in range(6)]
    packed = {
        "tokens": [token for sample in samples for token in sample["tokens"]],
        "metrics": [metric for sample in samples for metric in sample["metrics"]],
    }
    aggregator = MetricsAggregator()
    aggregator.update(MetricsCollator(lambda bare: {"n": len(bare)})([packed])["metrics"])
    assert totals(aggregator) == expected(indices=range(6))


def test_collators_may_be_nested() -> None:
    batch = MetricsCollator(MetricsCollator())([tagged(2), tagged(3)])
    assert list(batch) == ["x", "metrics"]
    assert seen(batch["metrics"]) == 5.0


# -- What moves batches --------------------------------------------------------------------------


def collated() -> dict[str, Any]:
    batch: dict[str, Any] = MetricsCollator()([tagged(2), tagged(3)])
    return batch


def test_torch_moves_and_pins_a_batch_and_leaves_its_metrics_alone() -> None:
    batch = collated()
    metrics = batch["metrics"]
    assert metrics.to("cuda", non_blocking=True) is metrics
    assert metrics.to(device="cpu") is metrics
    assert metrics.pin_memory() is metrics
    assert metrics.pin_memory("cuda") is metrics
    # Without an accelerator torch cannot pin tensors, but it still walks through the rest.
    rest = {"names": ["a", "b"], "metrics": metrics}
    pinned = pin_memory(rest)
    assert list(pinned) == ["names", "metrics"]
    assert pinned["metrics"] is metrics
    if torch.accelerator.is_available():
        assert pin_memory(batch)["x"].is_pinned()
    leaves, _ = pytree.tree_flatten(batch)
    assert metrics in leaves
    moved = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), batch)
    assert moved["metrics"] is metrics
    assert moved["x"].device.type == "meta"


def test_movers_that_walk_into_containers_do_not_walk_into_metrics() -> None:
    """The way of trainers: whatever has `to` is moved, containers are rebuilt."""

    def move(data: Any) -> Any:
        if isinstance(data, torch.Tensor) or callable(getattr(data, "to", None)):
            return data.to("cpu", non_blocking=True)
        if isinstance(data, Mapping):
            return type(data)({key: move(value) for key, value in data.items()})
        if isinstance(data, tuple) and hasattr(data, "_fields"):
            return type(data)(*(move(value) for value in data))
        if isinstance(data, list | tuple):
            return type(data)(move(value) for value in data)
        assert not dataclasses.is_dataclass(data)
        return data

    batch = collated()
    moved = move((batch, [1, 2]))
    assert moved[0]["metrics"] is batch["metrics"]
    assert not isinstance(batch["metrics"], Mapping | tuple | list)
    assert not dataclasses.is_dataclass(batch["metrics"])
    assert not hasattr(batch["metrics"], "__dict__")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_that_pins_memory_delivers_metrics(workers: int) -> None:
    loader = DataLoader(
        Texts(), BATCH, num_workers=workers, collate_fn=MetricsCollator(pad), pin_memory=True
    )
    pins = torch.accelerator.is_available()
    # Without an accelerator torch says that it will not pin.
    warned: AbstractContextManager[Any] = (
        nullcontext() if pins else pytest.warns(UserWarning, match="no accelerator is found")
    )
    aggregator = MetricsAggregator()
    with warned:
        for batch in loader:
            assert batch["tokens"].is_pinned() == pins
            aggregator.update(batch.pop("metrics"))
    assert totals(aggregator) == expected()


# -- Counted when consumed -----------------------------------------------------------------------


def test_batches_that_were_prefetched_and_never_consumed_do_not_count() -> None:
    loader = DataLoader(
        Texts(), BATCH, num_workers=2, prefetch_factor=3, collate_fn=MetricsCollator(pad)
    )
    aggregator = MetricsAggregator()
    consumed: list[int] = []
    for number, batch in enumerate(loader):
        aggregator.update(batch.pop("metrics"))
        consumed += batch["index"]
        if number == 1:
            break
    assert len(consumed) == 2 * BATCH
    assert totals(aggregator) == expected(indices=consumed)


def run(
    aggregator: MetricsAggregator,
    loader: StatefulDataLoader[Any],
    stop_after: int | None = None,
) -> bytes:
    """Train; return a checkpoint taken after `stop_after` batches, or at the end of the epoch."""
    batches = iter(loader)
    for number, batch in enumerate(batches, start=1):
        aggregator.update(batch.pop("metrics"))
        if number == stop_after:
            break
    checkpoint = io.BytesIO()
    state = {"loader": loader.state_dict(), "metrics": aggregator.state_dict()}
    torch.save(state, checkpoint)
    if stop_after is not None:
        # The run goes on a little, and is then killed.
        for _, batch in zip(range(2), batches, strict=False):
            aggregator.update(batch.pop("metrics"))
    return checkpoint.getvalue()


def stateful() -> StatefulDataLoader[Any]:
    return StatefulDataLoader(
        Texts(),
        BATCH,
        num_workers=2,
        prefetch_factor=2,
        shuffle=True,
        generator=torch.Generator().manual_seed(3),
        collate_fn=MetricsCollator(pad),
    )


# torchdata calls what torch has deprecated.
class Kinds:
    """A dataset some of whose samples say nothing about their kind."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, place: int) -> dict[str, Any]:
        kind = ("prose", "", "a\nb", "code")[place % 4]
        return {"metrics": [Metric("d", "id", kind, "categorical_count")], "n": place}


def test_no_data_worker_ends_because_of_a_category(caplog: pytest.LogCaptureFixture) -> None:
    loader = DataLoader(Kinds(), batch_size=4, num_workers=1, collate_fn=MetricsCollator())
    aggregator = MetricsAggregator()
    for batch in loader:
        aggregator.update(batch.pop("metrics"))
    assert aggregator.get_metrics_for_logging("t") == {
        "t_d/id_count_prose": 2.0,
        "t_d/id_count___empty__": 2.0,
        "t_d/id_count_a\\nb": 2.0,
        "t_d/id_count_code": 2.0,
    }
    assert len(caplog.records) == 1  # here, and not in the worker


class Types:
    """A dataset in which a metric is of another type in one of the samples."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, place: int) -> dict[str, Any]:
        agg = "max" if place == 5 else "sum"
        metrics = [Metric("d", "n", 1, agg), Metric("d", "tokens", place, "sum")]
        return {"metrics": metrics, "n": place}


def test_a_second_type_of_a_metric_ends_no_worker_but_its_batch_is_refused() -> None:
    """It ended the worker, and with it the run."""
    loader = DataLoader(Types(), batch_size=4, num_workers=1, collate_fn=MetricsCollator())
    aggregator, refused = MetricsAggregator(), []
    for batch in loader:
        try:
            aggregator.update(batch.pop("metrics"))
        except ValueError as error:
            refused.append(str(error))
    (complaint,) = refused
    assert complaint.startswith("metric 'n' of dataset 'd' is already registered with aggregation ")
    assert "type sum, so it cannot take a value of type max" in complaint
    assert aggregator.get_metrics_for_logging("t") == {"t_d/n": 8.0, "t_d/tokens": 44.0}


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")
@pytest.mark.parametrize("stop_after", [1, 4])
def test_a_run_resumed_in_the_middle_of_an_epoch_counts_every_batch_once(stop_after: int) -> None:
    uninterrupted = MetricsAggregator()
    run(uninterrupted, stateful())
    assert totals(uninterrupted) == expected()

    stopped = MetricsAggregator()
    checkpoint = run(stopped, stateful(), stop_after)
    state = torch.load(io.BytesIO(checkpoint), weights_only=False)
    loader, resumed = stateful(), MetricsAggregator()
    loader.load_state_dict(state["loader"])
    resumed.load_state_dict(state["metrics"])
    assert sum(totals(resumed).values()) < sum(expected().values())
    run(resumed, loader)
    assert resumed.get_metrics_for_logging() == pytest.approx(
        uninterrupted.get_metrics_for_logging()
    )
    assert totals(resumed) == expected()


# -- What it cannot use --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("samples", "error", "complaint"),
    [
        ([[1, 2]], TypeError, "takes samples that are mappings, or tuples .* but got a list"),
        ([(1, {"x": 1})], TypeError, "takes samples that are mappings, or tuples .* got a int"),
        ([()], TypeError, "got a tuple"),
        ([None], TypeError, "got a NoneType"),
        ([{"metrics": {"bleu": 1}}], TypeError, "'metrics' of a sample is a dict, but that name"),
        ([{"metrics": tagged()["metrics"][0]}], TypeError, "'metrics' of a sample is a Metric"),
        ([{"metrics": ["bleu"]}], TypeError, "item 0 of the metrics is 'bleu'"),
        ([tagged(metrics=[Metric("d", "n", None, "sum")])], TypeError, "'n' of dataset 'd': the"),
    ],
    ids=str,
)
def test_a_sample_that_it_cannot_use_is_an_error(
    samples: list[Any], error: type[Exception], complaint: str
) -> None:
    with pytest.raises(error, match=complaint) as caught:
        MetricsCollator(lambda bare: {})(samples)
    assert "\n" not in str(caught.value)


def test_no_samples_are_an_error_that_says_where_they_may_come_from() -> None:
    with pytest.raises(ValueError, match=r"MetricsCollator got no samples.*batch sampler"):
        MetricsCollator()([])


def test_a_collate_function_may_make_a_batch_of_no_samples() -> None:
    batch = MetricsCollator(lambda samples: {"x": samples})([])
    assert batch["x"] == []
    assert len(batch["metrics"]) == 0


@pytest.mark.parametrize(
    ("returned", "error", "complaint"),
    [
        (None, TypeError, "returned a NoneType, which has no place for metrics: return a dict"),
        (torch.zeros(2), TypeError, "returned a Tensor, which has no place"),
        ([], TypeError, "returned a list, which has no place"),
        ((torch.zeros(2), {}), TypeError, "returned a tuple that begins with a Tensor"),
        (MappingProxyType({}), TypeError, "returned a mappingproxy"),
        ({"metrics": 3}, ValueError, "an entry 'metrics' of its own, which would be lost"),
    ],
    ids=lambda case: type(case).__name__,
)
def test_a_batch_with_no_place_for_metrics_is_an_error(
    returned: Any, error: type[Exception], complaint: str
) -> None:
    with pytest.raises(error, match=complaint):
        MetricsCollator(lambda bare: returned)([tagged()])


def test_what_is_no_function_is_refused_at_once() -> None:
    with pytest.raises(TypeError, match="takes a collate function, not 'pad'"):
        MetricsCollator("pad")  # type: ignore[arg-type]


class Faulty(Texts):
    def __getitem__(self, index: int) -> dict[str, Any]:
        metrics = [Metric("alpaca", "loss", "high", AggregationType.MEAN)]
        return {**super().__getitem__(index), "metrics": metrics}


def test_an_error_in_a_worker_arrives_with_its_message() -> None:
    loader = DataLoader(Faulty(), BATCH, num_workers=2, collate_fn=MetricsCollator(pad))
    batches: Any = iter(loader)
    with pytest.raises(TypeError, match="'loss' of dataset 'alpaca': the value 'high'"):
        next(batches)
    # Its traceback keeps the iterator alive until a garbage collection, in which torch would wait
    # ten seconds for the workers.
    batches._shutdown_workers()


class Weighty(Texts):
    """Sums with weights: of 0 for what fills up, and of 1 but for one sample."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        weight = {5: 2.0, 2: 0.0}.get(index, 1.0)
        metrics = [
            Metric(
                "alpaca", "seen", float("nan") if weight == 0 else 1, AggregationType.SUM, weight
            ),
            Metric("alpaca", "padding", index, AggregationType.MAX, 0),
        ]
        return {**super().__getitem__(index), "metrics": metrics}


def test_a_weight_that_is_refused_ends_no_worker_but_its_batch_alone() -> None:
    loader = DataLoader(Weighty(), BATCH, num_workers=1, collate_fn=MetricsCollator(pad))
    aggregator, refused = MetricsAggregator(), []
    for number, batch in enumerate(loader):
        try:
            aggregator.update(batch.pop("metrics"))
        except ValueError as error:
            refused.append((number, str(error)))
    [(number, message)] = refused
    assert number == 1
    assert "metric 'seen' of dataset 'alpaca': a value of type 'sum' counts once" in message
    assert "the weight 2.0 would be ignored" in message
    # But for the batch and what fills up; nothing has made a name of what has no weight.
    assert aggregator.get_metrics_for_logging() == {"data_alpaca/seen": SIZE - BATCH - 1.0}


# -- The page about it ---------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")
def test_the_examples_in_the_documentation_run() -> None:
    page = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) == 4
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "docs/data.md", "exec"), names)
    assert {"Conversation", "new_loader"} <= names.keys()
