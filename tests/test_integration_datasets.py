"""Samples of Hugging Face datasets know their dataset through all that is done to them, and count for it."""

from __future__ import annotations

import multiprocessing
import os
import pydoc_data.topics
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
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
from metricfold.data import metrics_of

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


def in_turns(parts: list[Any]) -> Any:
    """Return every sample once, of all in turn; one part after another before Datasets 4.2."""
    import datasets

    try:
        return datasets.interleave_datasets(
            parts, stopping_strategy="all_exhausted_without_replacement"
        )
    except ValueError:
        return datasets.concatenate_datasets(parts)


def tagged(name: str, kind: str, transform: MetricTransform | None = None) -> Any:
    from metricfold.integrations.datasets import with_metrics

    return with_metrics(plain(name, kind), transform or DefaultTrainingMetricTransform(), name)


def pad(samples: list[Any]) -> dict[str, Any]:
    tokens = [torch.tensor(np.asarray(sample["tokens"])) for sample in samples]
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
def test_a_sample_carries_a_plain_number_and_its_metrics_are_made_of_it(kind: str) -> None:
    """Before, `dataset[0]["metrics"]` was the list of them, made by a format or a map of metricfold's."""
    import datasets

    dataset = tagged("short", kind, Words())
    assert dataset.features["metrics"] == datasets.Value("int64")
    sample = next(iter(dataset))
    assert type(sample["metrics"]) is int
    assert metrics_of(sample) == [
        Metric("short", "words", len(sample["text"].split()), AggregationType.SUM),
        Metric("short", "longest", len(sample["text"].split()), AggregationType.MAX),
    ]
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
    in_turn = in_turns(both)
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
        names = [{metric.name for metric in metrics_of(sample)} for sample in mixture]
        assert names[:2] == [{"words", "longest"}, {"samples_seen", "tokens_seen", "seq_len"}]


def test_rows_keep_their_dataset_through_whatever_picks_and_orders_them() -> None:
    import datasets

    mixture = datasets.concatenate_datasets(
        [tagged("short", "map").shuffle(seed=0).select(range(40)), tagged("long", "map")]
    )
    mixture = mixture.train_test_split(0.5, seed=2)["test"].shard(2, 1).sort("text")
    mixture = datasets.concatenate_datasets([mixture, mixture])
    mixture = mixture.filter(lambda sample: len(metrics_of(sample)) == 3)
    assert len(mixture) == 32
    for sample in mixture:
        name = "short" if sample["text"] in texts("short") else "long"
        assert {metric.dataset_name for metric in metrics_of(sample)} == {name}
        assert metrics_of(sample)[1].value == len(sample["tokens"])


def cut(sample: dict[str, Any]) -> dict[str, Any]:
    return {"tokens": sample["tokens"][:10]}


def cut_all(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {"tokens": [tokens[:10] for tokens in batch["tokens"]]}


def whole(sample: dict[str, Any]) -> dict[str, Any]:
    return {**sample, "tokens": sample["tokens"][:10]}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_counted_is_what_maps_have_made_of_a_sample(kind: str) -> None:
    """Before, a stream counted what came before the maps, and a map of whole samples was Arrow's error."""
    import datasets

    ten = {
        **{f"{name}/samples_seen": float(SIZES[name]) for name in SIZES},
        **{f"{name}/tokens_seen": 10.0 * SIZES[name] for name in SIZES},
    }
    both = [tagged(name, kind) for name in SIZES]
    cut_first = datasets.concatenate_datasets([dataset.map(cut) for dataset in both])
    assert counted(cut_first) == ten
    mixture = in_turns(both)
    assert counted(mixture.map(cut)) == ten
    assert counted(mixture.map(whole)) == ten
    assert counted(mixture.map(cut_all, batched=True, batch_size=7)) == ten
    kept = mixture.map(cut_all, batched=True, remove_columns=["text"])
    assert counted(kept.filter(lambda sample: len(sample["tokens"]) == 10)) == ten
    if kind == "map":
        assert counted(mixture.map(cut, num_proc=2), num_workers=1) == ten


@pytest.mark.parametrize("kind", KINDS)
def test_a_format_that_is_set_afterwards_changes_nothing(kind: str) -> None:
    """Before, it replaced the metrics, and the first batch was an error."""
    dataset = tagged("short", kind).select_columns(["tokens", "metrics"])
    for format_type in ("numpy", "torch"):
        assert counted(dataset.with_format(format_type)) == truth("short")
    # JAX makes int32 of integers.
    pytest.importorskip("jax")
    sample = next(iter(dataset.with_format("jax")))
    assert metrics_of(sample) == metrics_of(next(iter(dataset)))


def test_a_dataset_that_is_saved_and_loaded_counts_as_before(tmp_path: Path) -> None:
    """Before, it could not be saved: the transform was part of its format."""
    import datasets

    mixture = datasets.concatenate_datasets([tagged(name, "map") for name in SIZES])
    mixture.map(cut).save_to_disk(tmp_path / "cut")
    mixture.to_parquet(tmp_path / "whole.parquet")
    loaded = datasets.load_from_disk(tmp_path / "cut").shuffle(seed=1).flatten_indices()
    assert counted(loaded)["short/tokens_seen"] == 10.0 * SIZES["short"]
    stream = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "whole.parquet"), split="train", streaming=True
    )
    assert counted(stream) == truth(*SIZES)
    assert counted(mixture.to_iterable_dataset(num_shards=3), num_workers=2) == truth(*SIZES)


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
    # Streams that are put together lose their format, with metrics or without.
    sample = next(iter(datasets.interleave_datasets(both) if kind == "map" else both[0]))
    assert sample["tokens"].tolist() == list(texts("short")[0].encode())
    assert isinstance(sample["tokens"], torch.Tensor)
    assert metrics_of(sample)[1] == Metric(
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
    assert dataset[0]["tokens"].tolist() == list(texts("short")[0].encode())


def test_a_mixture_is_read_by_workers_that_inherit_nothing() -> None:
    import datasets

    for kind in KINDS:
        mixture = datasets.concatenate_datasets([tagged(name, kind) for name in SIZES])
        spawned = multiprocessing.get_context("forkserver")
        seen = counted(mixture, num_workers=1, multiprocessing_context=spawned)
        assert seen == truth(*SIZES)


def test_a_stream_goes_on_where_it_was_saved_and_counts_each_sample_once() -> None:

    def new() -> Any:
        return in_turns([tagged(name, "iterable") for name in SIZES])

    stream, aggregator = new(), MetricsAggregator()
    for index, sample in enumerate(stream):
        aggregator.update(metrics_of(sample))
        if index == 30:
            saved = stream.state_dict(), aggregator.state_dict()
            break
    stream, aggregator = new(), MetricsAggregator()
    stream.load_state_dict(saved[0])
    aggregator.load_state_dict(saved[1])
    for sample in stream:
        aggregator.update(metrics_of(sample))
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
    assert metrics_of(next(iter(mixture)))[0].dataset_name == "short"
    assert counted(stream) == truth("short")
    stored = datasets.Dataset.from_generator(generate, cache_dir=str(tmp_path))
    stored = with_metrics(stored, Words(), "short")
    assert [len(metrics_of(sample)) for sample in stored] == [2] * 60


def test_the_examples_of_the_page_run() -> None:
    pytest.importorskip("datasets", minversion="4.2", reason="the page mixes without replacement")
    page = (Path(__file__).parent.parent / "docs/datasets.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(examples) == 3
    exec("\n".join(examples), {})


# -- Training


def test_two_ranks_train_on_a_mixture_and_count_what_they_read() -> None:
    for of_kind in run_ranks(train_both, 2):
        for losses, seen in of_kind:
            assert seen == truth(*SIZES)
            assert losses[-1] < losses[0] - 1


def train_both(rank: int) -> list[tuple[list[float], dict[str, float]]]:
    return [train(rank, kind) for kind in KINDS]


def train(rank: int, kind: str) -> tuple[list[float], dict[str, float]]:
    from datasets.distributed import split_dataset_by_node

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(256, 32), torch.nn.Linear(32, 256))
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.Adam(parallel.parameters(), 3e-2)
    mixture = in_turns([tagged(name, kind) for name in SIZES])
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
    assert [metrics_of(dataset[0])[0].dataset_name for dataset in both] == list(SIZES)
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
        with pytest.raises(ValueError, match="is empty"):
            with_metrics(plain("short", kind), transform, "")
        with pytest.raises(TypeError, match="takes a MetricTransform"):
            with_metrics(plain("short", kind), len, "short")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="once for each dataset"):
            with_metrics(tagged("short", kind), transform, "short")
    with pytest.raises(TypeError, match=r"pick one of \['train'\]"):
        with_metrics(datasets.DatasetDict(train=plain("short", "map")), transform, "short")


@pytest.mark.parametrize(("kind", "workers"), [("map", 0), ("iterable", 0), ("map", 1)])
def test_a_map_that_drops_the_column_is_named_with_the_dataset(kind: str, workers: int) -> None:
    import datasets

    dropped = tagged("short", kind).map(cut, remove_columns=["text", "tokens", "metrics"])
    with pytest.raises(
        ValueError, match=r"without the column 'metrics'.* for 'short'.*remove_columns"
    ):
        counted(dropped, num_workers=workers)
    # Other samples without metrics are welcome, whatever this process knows.
    assert counted(plain("short", kind), num_workers=workers) == {}
    if kind == "map":
        # A stream of it knows no more of it than its features.
        stream = tagged("short", kind).to_iterable_dataset(2).shuffle(seed=0, buffer_size=8)
        for of_it in (stream, datasets.interleave_datasets([stream, stream])):
            with pytest.raises(ValueError, match=r"without the column 'metrics'.* for 'short'"):
                counted(of_it.remove_columns("metrics"), num_workers=workers)
        hidden = tagged("short", kind).with_format("numpy", columns=["tokens"])
        with pytest.raises(ValueError, match=r"for 'short'.*columns="):
            counted(torch.utils.data.Subset(hidden, range(8)), num_workers=workers)
        with pytest.raises(ValueError, match=r"for 'short'.*columns="):
            counted(torch.utils.data.ConcatDataset([hidden, hidden]), num_workers=workers)
        untagged = datasets.concatenate_datasets([plain("long", kind), tagged("short", kind)])
        with pytest.raises(
            ValueError, match=r"without the column 'metrics'|have nothing in the column"
        ):
            counted(untagged)


def test_rows_without_a_number_beside_others_are_refused() -> None:
    import datasets

    mixture = datasets.interleave_datasets([tagged("short", "map"), plain("long", "map")])
    with pytest.raises(ValueError, match=r"2 of the 4 samples .* others are of dataset 'short'"):
        counted(mixture)


def test_a_number_that_nobody_knows_is_refused_and_can_be_made_known() -> None:
    from metricfold.data.origin import ORIGINS
    from metricfold.integrations.datasets import remember

    dataset = tagged("short", "map", Words())
    number = dataset[0]["metrics"]
    known = ORIGINS._transforms.pop(number)
    with pytest.raises(ValueError, match=rf"holds {number}, .* remember\(transform, name\)"):
        metrics_of(dataset[0])
    with pytest.raises(ValueError, match=rf"holds {number}, of dataset 'short', for which"):
        counted(dataset)
    remember(Words(), "short")
    assert metrics_of(dataset[0]) == known(dataset[0] | {"metrics": []})["metrics"]
    del ORIGINS._transforms[number]
    remember(DefaultTrainingMetricTransform(), "short", number=number)
    assert counted(dataset) == truth("short")
    with pytest.raises(ValueError, match="come to the same number, by chance"):
        remember(Words(), "long", number=number)
    ORIGINS._transforms[number] = known


def test_a_format_that_rounds_numbers_is_refused() -> None:
    dataset = tagged("short", "map").with_format("torch", dtype=torch.float32)
    with pytest.raises(TypeError, match="came as float32, in which numbers are rounded"):
        counted(dataset)


def test_numbers_that_were_collated_as_data_are_refused_with_what_to_set() -> None:
    """Before, `default_collate` refused the metrics; of plain numbers it makes a tensor."""
    batch = next(iter(DataLoader(tagged("short", "map").select_columns("metrics"), batch_size=2)))
    for given in (batch["metrics"], batch["metrics"].tolist()):
        with pytest.raises(TypeError, match=r"with_metrics\(\).* collate_fn=MetricsCollator"):
            MetricsAggregator().update(given)


def test_a_map_that_makes_several_samples_of_one_hands_the_number_on() -> None:
    def halves(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        pairs = [
            (part, number)
            for tokens, number in zip(batch["tokens"], batch["metrics"], strict=True)
            for part in (tokens[: len(tokens) // 2], tokens[len(tokens) // 2 :])
        ]
        return {"tokens": [part for part, _ in pairs], "metrics": [number for _, number in pairs]}

    for kind in KINDS:
        halved = tagged("short", kind).map(halves, batched=True, remove_columns=["text"])
        expected = truth("short")
        expected["short/samples_seen"] *= 2
        assert counted(halved) == expected


def test_a_class_that_nothing_can_import_goes_to_workers_too() -> None:
    class Local(Words):
        pass

    spawned = multiprocessing.get_context("forkserver")
    seen = MetricsAggregator()
    for batch in DataLoader(
        tagged("short", "map", Local()),
        collate_fn=MetricsCollator(pad),
        batch_size=20,
        num_workers=1,
        multiprocessing_context=spawned,
    ):
        seen.update(batch["metrics"])
    words = sum(len(text.split()) for text in texts("short"))
    assert seen.get_metrics_for_logging()["data_short/words"] == words


def test_one_stream_under_two_names_counts_for_each() -> None:
    """A column that was added to a stream had the last value for all once (datasets#5753)."""
    import datasets

    from metricfold.integrations.datasets import with_metrics

    stream = plain("short", "iterable")
    both = [with_metrics(stream, DefaultTrainingMetricTransform(), name) for name in ("a", "b")]
    seen = counted(datasets.interleave_datasets(both, stopping_strategy="all_exhausted"))
    assert seen["a/samples_seen"] == seen["b/samples_seen"] == 60.0


class Unsendable(Words):
    def __init__(self) -> None:
        self.stream = (one for one in ())


def test_a_transform_that_cannot_be_pickled_stops_no_other_ones_worker() -> None:
    """Before, a dataset's format took all transforms along, and one of them stopped all."""
    tagged("long", "map", Unsendable())
    spawned: dict[str, Any] = {
        "num_workers": 1,
        "multiprocessing_context": multiprocessing.get_context("forkserver"),
        "persistent_workers": True,
    }
    assert counted(tagged("short", "map"), **spawned) == truth("short")
    with pytest.raises(ValueError, match=r"transform of dataset 'long' could not be sent "):
        counted(tagged("long", "map", Unsendable()), **spawned)


def test_a_number_depends_on_name_class_and_settings_alone() -> None:
    """So rows that were cached or saved by an earlier run are right, also where code has changed."""

    class Settled(Words):
        def __init__(self, *limits: int) -> None:
            self.limits = limits

    def number(transform: MetricTransform, name: str = "short") -> int:
        from metricfold.integrations.datasets import with_metrics

        return next(iter(with_metrics(plain("short", "iterable"), transform, name)))["metrics"]

    assert number(Settled(1, 2)) == number(Settled(1, 2))
    several = [
        number(Settled(1, 2)),
        number(Settled(1)),
        number(Settled(1), "long"),
        number(Words()),
    ]
    assert len({*several, number(Unsendable()), number(Unsendable())}) == 6
    assert all(0 <= one < 2**31 for one in several)  # so that JAX's int32 holds it


def test_a_transform_whose_column_is_gone_says_which() -> None:
    dataset = tagged("short", "map", Words()).remove_columns("text")
    with pytest.raises(
        ValueError, match=r"'short' \(Words\) asks for the column 'text'.* \['tokens'\]"
    ):
        counted(dataset)


def test_rows_made_of_several_samples_are_refused() -> None:
    from metricfold.integrations.datasets import with_metrics

    doubled = plain("short", "map").with_transform(
        lambda batch: {"tokens": [[1], [2]] * len(batch["text"])}
    )
    dataset = with_metrics(doubled, DefaultTrainingMetricTransform(), "short")
    with pytest.raises(ValueError, match=r"belongs into map\(\), before with_metrics"):
        dataset[:3]


# -- Packed rows


def group(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Put samples end to end and cut them, as most scripts of language models do."""
    joined = {name: [one for row in rows for one in row] for name, rows in batch.items()}
    size = len(joined["tokens"]) // 64 * 64 + 64
    return {name: [all_[i : i + 64] for i in range(0, size, 64)] for name, all_ in joined.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_packed_rows_count_each_token_for_its_dataset(kind: str) -> None:
    import datasets

    from metricfold.integrations.datasets import metrics_per_token

    mixture = datasets.concatenate_datasets([tagged(name, kind) for name in SIZES])
    mixture = metrics_per_token(mixture.select_columns(["tokens", "metrics"]), "tokens")
    packed = mixture.map(group, batched=True)
    # A piece of a sample counts as one: all samples, and those that go over the end of a row.
    expected, at = truth(*SIZES), 0
    for name in SIZES:
        for text in texts(name):
            end = at + len(text.encode())
            expected[f"{name}/samples_seen"] += (end - 1) // 64 - at // 64
            at = end
    assert counted(packed) == expected
