"""Samples of Hugging Face datasets come with metrics, and each counts for its own dataset."""

from __future__ import annotations

import multiprocessing
import os
import pydoc_data.topics
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch.utils.data import DataLoader

from metricfold import (
    AggregationType,
    DefaultTrainingMetricTransform,
    Metric,
    MetricsAggregator,
    MetricsCollator,
    MetricTransform,
)

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports Datasets
pytest.importorskip("datasets")

pytestmark = [
    # pyarrow 25 about how datasets 5.2 sorts
    pytest.mark.filterwarnings("ignore:Specifying null_placement in SortOptions:FutureWarning"),
    # torch forks its workers although pyarrow has started threads
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]

KINDS = ("map", "iterable")
SIZES = {"short": 60, "long": 25}


class Words(MetricTransform):
    """Reads text, to see that a transform gets what the dataset holds."""

    def _generate_metrics(self, sample: Any) -> list[Metric]:
        words = len(sample["text"].split())
        return [
            Metric(self.dataset_name, "words", words, AggregationType.SUM),
            Metric(self.dataset_name, "longest", words, AggregationType.MAX),
        ]


def texts(name: str) -> list[str]:
    """Return parts of Python's own documentation: short ones or long ones."""
    parts = [part for topic in pydoc_data.topics.topics.values() for part in topic.split("\n\n")]
    fits: Callable[[str], bool] = (
        (lambda part: 20 < len(part) < 150) if name == "short" else (lambda part: len(part) > 600)
    )
    return [part[:700] for part in parts if fits(part)][: SIZES[name]]


def rows(name: str) -> dict[str, list[Any]]:
    return {
        "text": texts(name),
        "tokens": [list(text.encode()) for text in texts(name)],
    }


def plain(name: str, kind: str, shards: int = 5) -> Any:
    import datasets

    dataset = datasets.Dataset.from_dict(rows(name))
    return dataset if kind == "map" else dataset.to_iterable_dataset(num_shards=shards)


def tagged(name: str, kind: str, transform: MetricTransform | None = None) -> Any:
    from metricfold.integrations.datasets import with_metrics

    return with_metrics(plain(name, kind), transform or DefaultTrainingMetricTransform(), name)


def pad(samples: list[Any]) -> dict[str, Any]:
    tokens = [torch.as_tensor(sample["tokens"]) for sample in samples]
    return {"tokens": torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)}


def counted(dataset: Any, **loader: Any) -> dict[str, float]:
    """Return the totals that a loader over `dataset` gives, by key."""
    aggregator = MetricsAggregator()
    for batch in DataLoader(dataset, batch_size=4, collate_fn=MetricsCollator(pad), **loader):
        aggregator.update(batch.pop("metrics"))
    return totals(aggregator)


def totals(aggregator: MetricsAggregator) -> dict[str, float]:
    results = aggregator.get_metrics_for_logging(prefix="d")
    return {key.removeprefix("d_"): results[key] for key in results if key.endswith("_seen")}


def truth(*names: str) -> dict[str, float]:
    lengths = {name: [len(text.encode()) for text in texts(name)] for name in names}
    return {
        **{f"{name}/samples_seen": float(len(lengths[name])) for name in names},
        **{f"{name}/tokens_seen": float(sum(lengths[name])) for name in names},
    }


@pytest.mark.parametrize("kind", KINDS)
def test_samples_come_with_what_the_transform_makes_of_them(kind: str) -> None:
    dataset = tagged("short", kind, Words())
    sample = next(iter(dataset))
    words = len(texts("short")[0].split())
    assert sample == {
        "text": texts("short")[0],
        "tokens": list(texts("short")[0].encode()),
        "metrics": [
            Metric("short", "words", words, AggregationType.SUM),
            Metric("short", "longest", words, AggregationType.MAX),
        ],
    }
    # The dataset that came in, and a second pass over what came out, are as they were.
    assert list(next(iter(plain("short", kind)))) == ["text", "tokens"]
    assert next(iter(dataset)) == sample


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_each_sample_of_a_mixture_counts_for_its_own_dataset(kind: str, workers: int) -> None:
    import datasets

    both = [tagged(name, kind) for name in SIZES]
    chained = datasets.concatenate_datasets(both)
    assert counted(chained, num_workers=workers) == truth(*SIZES)
    shuffled = chained.shuffle(seed=1) if kind == "map" else chained.shuffle(1, buffer_size=7)
    assert counted(shuffled, num_workers=workers) == truth(*SIZES)
    in_turn = datasets.interleave_datasets(
        both, stopping_strategy="all_exhausted_without_replacement"
    )
    assert counted(in_turn, num_workers=workers) == truth(*SIZES)


@pytest.mark.parametrize("kind", KINDS)
def test_an_interleaved_mixture_counts_what_is_drawn(kind: str) -> None:
    import datasets

    mixture = datasets.interleave_datasets(
        [tagged(name, kind) for name in SIZES], probabilities=[0.3, 0.7], seed=3
    )
    drawn = [bytes(sample["tokens"]).decode() for sample in mixture]
    assert {len(text) < 150 for text in drawn} == {True, False}
    expected = {}
    for name in SIZES:
        mine = [len(text.encode()) for text in drawn if text in texts(name)]
        expected[f"{name}/samples_seen"] = float(len(mine))
        expected[f"{name}/tokens_seen"] = float(sum(mine))
    assert counted(mixture) == expected


def test_each_dataset_of_a_mixture_has_its_own_kind_of_metrics() -> None:
    import datasets

    for kind in KINDS:
        mixture = datasets.interleave_datasets(
            [tagged("short", kind, Words()), tagged("long", kind)]
        )
        names = [{metric.name for metric in sample["metrics"]} for sample in mixture]
        assert names[:2] == [{"words", "longest"}, {"samples_seen", "tokens_seen", "seq_len"}]


def test_rows_keep_their_dataset_through_whatever_picks_and_orders_them() -> None:
    import datasets

    mixture = datasets.concatenate_datasets(
        [tagged("short", "map").shuffle(seed=0).select(range(40)), tagged("long", "map")]
    )
    mixture = mixture.train_test_split(0.5, seed=2)["test"].shard(2, 1).sort("text").repeat(2)
    mixture = mixture.filter(lambda sample: len(sample["metrics"]) == 3)
    assert len(mixture) == 32
    for sample in mixture:
        name = "short" if sample["text"] in texts("short") else "long"
        assert {metric.dataset_name for metric in sample["metrics"]} == {name}
        assert sample["metrics"][1].value == len(sample["tokens"])


def test_a_map_after_it_keeps_the_metrics_of_what_it_did_not_touch() -> None:
    for kind in KINDS:
        dataset = tagged("short", kind).map(lambda sample: {"size": len(sample["tokens"])})
        sample = next(iter(dataset))
        assert sample["metrics"][1].value == sample["size"] == len(sample["tokens"])


@pytest.mark.parametrize("kind", KINDS)
def test_samples_keep_the_format_that_the_dataset_had(kind: str) -> None:
    import datasets

    from metricfold.integrations.datasets import with_metrics

    both = [
        with_metrics(
            plain(name, kind).select_columns(["tokens"]).with_format("torch"),
            DefaultTrainingMetricTransform(),
            name,
        )
        for name in SIZES
    ]
    sample = next(iter(datasets.interleave_datasets(both)))
    assert sample["tokens"].tolist() == list(texts("short")[0].encode())
    assert isinstance(sample["tokens"], torch.Tensor)
    assert sample["metrics"][1] == Metric(
        "short", "tokens_seen", len(sample["tokens"]), AggregationType.SUM
    )
    assert counted(datasets.concatenate_datasets(both)) == truth(*SIZES)


def test_the_transform_sees_what_with_transform_makes() -> None:
    import datasets

    from metricfold.integrations.datasets import with_metrics

    raw = [datasets.Dataset.from_dict({"text": texts(name)}) for name in SIZES]
    both = [
        with_metrics(dataset.with_transform(encoded), DefaultTrainingMetricTransform(), name)
        for name, dataset in zip(SIZES, raw, strict=True)
    ]
    assert counted(datasets.interleave_datasets(both, stopping_strategy="all_exhausted")) == {
        "short/samples_seen": 60.0,
        "short/tokens_seen": truth("short")["short/tokens_seen"],
        "long/samples_seen": 60.0,  # starts again until the other is through
        "long/tokens_seen": sum(len(texts("long")[i % 25].encode()) for i in range(60)),
    }


def encoded(batch: dict[str, Any]) -> dict[str, Any]:
    return {"tokens": [list(text.encode()) for text in batch["text"]]}


def test_columns_that_a_format_leaves_out_stay_out() -> None:
    from metricfold.integrations.datasets import with_metrics

    dataset = plain("short", "map").with_format("numpy", columns=["tokens"])
    dataset = with_metrics(dataset, DefaultTrainingMetricTransform(), "short")
    assert list(dataset[0]) == ["tokens", "metrics"]
    assert list(dataset[:2]) == ["tokens", "metrics"]
    assert dataset.remove_columns("metrics")[0].keys() == {"tokens"}


def test_a_mixture_is_read_by_workers_that_inherit_nothing() -> None:
    import datasets

    for kind in KINDS:
        mixture = datasets.concatenate_datasets([tagged(name, kind) for name in SIZES])
        spawned = multiprocessing.get_context("forkserver")
        seen = counted(mixture, num_workers=1, multiprocessing_context=spawned)
        assert seen == truth(*SIZES)


def test_a_stream_goes_on_where_it_was_saved_and_counts_each_sample_once() -> None:
    import datasets

    def new() -> Any:
        both = [tagged(name, "iterable") for name in SIZES]
        return datasets.interleave_datasets(
            both, stopping_strategy="all_exhausted_without_replacement"
        )

    stream, aggregator = new(), MetricsAggregator()
    for index, sample in enumerate(stream):
        aggregator.update(sample["metrics"])
        if index == 30:
            saved = stream.state_dict(), aggregator.state_dict()
            break
    stream, aggregator = new(), MetricsAggregator()
    stream.load_state_dict(saved[0])
    aggregator.load_state_dict(saved[1])
    for sample in stream:
        aggregator.update(sample["metrics"])
    assert totals(aggregator) == truth(*SIZES)


def test_epochs_of_a_stream_differ_in_order_alone() -> None:
    dataset = tagged("short", "iterable").shuffle(seed=0, buffer_size=20)
    orders = []
    for epoch in range(2):
        dataset.set_epoch(epoch)
        orders.append([sample["text"] for sample in dataset])
        assert counted(dataset) == truth("short")
    assert orders[0] != orders[1]


def test_a_generator_of_unknown_features_has_metrics_too(tmp_path: Path) -> None:
    import datasets

    from metricfold.integrations.datasets import with_metrics

    def generate() -> Any:
        for text in texts("short"):
            yield {"text": text}

    stream = datasets.IterableDataset.from_generator(generate).map(
        lambda sample: {"tokens": list(sample["text"].encode())}
    )
    assert stream.features is None
    stream = with_metrics(stream, DefaultTrainingMetricTransform(), "short")
    mixture = datasets.interleave_datasets([stream, tagged("long", "iterable")])
    assert next(iter(mixture))["metrics"][0].dataset_name == "short"
    assert counted(stream) == truth("short")
    stored = datasets.Dataset.from_generator(generate, cache_dir=str(tmp_path))
    stored = with_metrics(stored, Words(), "short")
    assert [len(sample["metrics"]) for sample in stored] == [2] * 60


def test_the_examples_of_the_page_run() -> None:
    page = (Path(__file__).parent.parent / "docs/datasets.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(examples) == 1
    exec(examples[0], {})


# -- Training


def test_two_ranks_train_on_a_mixture_and_count_what_they_read() -> None:
    for of_kind in run_ranks(train_both, 2):
        for losses, seen in of_kind:
            assert seen == truth(*SIZES)
            assert losses[-1] < losses[0] - 1


def train_both(rank: int) -> list[tuple[list[float], dict[str, float]]]:
    return [train(rank, kind) for kind in KINDS]


def train(rank: int, kind: str) -> tuple[list[float], dict[str, float]]:
    import datasets
    from datasets.distributed import split_dataset_by_node

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(256, 32), torch.nn.Linear(32, 256))
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.Adam(parallel.parameters(), 3e-2)
    mixture = datasets.interleave_datasets(
        [tagged(name, kind) for name in SIZES],
        stopping_strategy="all_exhausted_without_replacement",
    )
    mine = split_dataset_by_node(mixture, rank, 2)
    aggregator = MetricsAggregator()
    losses = []
    loader = DataLoader(mine, batch_size=4, collate_fn=MetricsCollator(pad))
    with parallel.join():  # the ranks' parts differ in size
        for batch in loader:
            aggregator.update(batch.pop("metrics"))
            logits = parallel(batch["tokens"][:, :-1])
            loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["tokens"][:, 1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses, totals(aggregator)


# -- What bad input gets


def test_one_instance_serves_several_datasets_unless_it_has_a_name() -> None:
    from metricfold.integrations.datasets import with_metrics

    transform = DefaultTrainingMetricTransform()
    both = [with_metrics(plain(name, "map"), transform, name) for name in SIZES]
    assert [dataset[0]["metrics"][0].dataset_name for dataset in both] == list(SIZES)
    assert transform.dataset_name is None
    transform.set_dataset_name("short")
    with pytest.raises(ValueError, match="already belongs to dataset 'short'"):
        with_metrics(plain("long", "map"), transform, "long")


def test_what_cannot_have_metrics_is_refused() -> None:
    import datasets

    from metricfold.integrations.datasets import with_metrics

    transform = DefaultTrainingMetricTransform()
    for kind in KINDS:
        taken = plain("short", kind).rename_column("text", "metrics")
        with pytest.raises(ValueError, match="has a column 'metrics'"):
            with_metrics(taken, transform, "short")
        with pytest.raises(TypeError, match="whose samples are tables"):
            with_metrics(plain("short", kind).with_format("arrow"), transform, "short")
        with pytest.raises(ValueError, match="is empty"):
            with_metrics(plain("short", kind), transform, "")
        with pytest.raises(TypeError, match="takes a MetricTransform"):
            with_metrics(plain("short", kind), len, "short")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="come with metrics already"):
        with_metrics(tagged("short", "map"), transform, "short")
    with pytest.raises(TypeError, match=r"pick one of \['train'\]"):
        with_metrics(datasets.DatasetDict(train=plain("short", "map")), transform, "short")


def test_a_format_that_replaces_the_metrics_is_found_at_the_first_batch() -> None:
    import datasets

    from metricfold.integrations.datasets import with_metrics

    with pytest.raises(TypeError, match=r"let with_format.* come before"):
        counted(tagged("short", "map").with_format("torch"))
    # Datasets forgets formats that differ.
    formatted = with_metrics(
        plain("long", "map").with_format("torch"), DefaultTrainingMetricTransform(), "long"
    )
    with pytest.raises(TypeError, match="the same for all datasets"):
        counted(datasets.concatenate_datasets([tagged("short", "map"), formatted]))


def test_metrics_do_not_go_into_arrow() -> None:
    import pyarrow as pa

    mapped = tagged("short", "map")
    with pytest.raises(pa.ArrowException):
        mapped.map(lambda sample: {**sample, "more": 1})
    with pytest.raises(TypeError, match="JSON serializable"):
        mapped.save_to_disk("unused")
    with pytest.raises(TypeError, match="cannot be read without them"):
        mapped["metrics"][:2]


def test_rows_made_of_several_samples_are_refused() -> None:
    from metricfold.integrations.datasets import with_metrics

    doubled = plain("short", "map").with_transform(
        lambda batch: {"tokens": [[1], [2]] * len(batch["text"])}
    )
    dataset = with_metrics(doubled, DefaultTrainingMetricTransform(), "short")
    with pytest.raises(ValueError, match=r"belongs into map\(\), before with_metrics"):
        dataset[:3]
