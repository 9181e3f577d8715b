"""A batch says of which dataset its rows and tokens are, by name, and accumulators learn the names as they come."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks

from metricfold import Metric, MetricsAggregator, MetricsCollator, MetricTransform
from metricfold.data import DatasetIds, metrics_of
from metricfold.data.origin import ORIGINS
from metricfold.torch import DeviceAccumulator


class Tokens(MetricTransform):
    def _generate_metrics(self, sample: Any) -> list[Metric]:
        return [Metric(self.dataset_name, "tokens", len(sample["input_ids"]), "sum")]


NUMBERS = {"docs": 5, "code": 6, "chat": 7}
for _name, _number in NUMBERS.items():
    _transform = Tokens()
    _transform.set_dataset_name(_name)
    ORIGINS.add(_number, _transform)


def row(*parts: tuple[str, int], **more: Any) -> dict[str, Any]:
    """Return a packed row of samples of so many tokens."""
    numbers = [
        ~NUMBERS[name] if place == 0 else NUMBERS[name]
        for name, length in parts
        for place in range(length)
    ]
    return {"input_ids": [*range(len(numbers))], "metrics": numbers, **more}


def plain(name: str, length: int) -> dict[str, Any]:
    return {"input_ids": [*range(length)], "metrics": NUMBERS[name]}


def pad(samples: list[Any], *, left: bool = False) -> dict[str, Any]:
    rows = [torch.tensor(sample["input_ids"]) for sample in samples]
    width = max(map(len, rows)) + 1
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.long)
    for at, own in enumerate(rows):
        there = slice(width - len(own), None) if left else slice(len(own))
        ids[at, there], mask[at, there] = own, 1
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.where(mask > 0, -100)}


def flat(samples: list[Any]) -> dict[str, Any]:
    return {"input_ids": torch.tensor([[t for one in samples for t in one["input_ids"]]])}


def ids_of(samples: list[Any], collate: Any) -> DatasetIds:
    found = MetricsCollator(collate, dataset_ids=True)(samples)["dataset_ids"]
    assert found.to("cpu") is found.pin_memory() is found
    return found


def test_ids_are_of_rows_where_each_sample_has_one() -> None:
    ids = ids_of([plain("docs", 3), plain("code", 2), plain("docs", 4)], pad)
    assert (ids.names, ids.index.tolist(), ids.shape) == (("docs", "code"), [0, 1, 0], (3,))
    assert ids[1:].places(("x", "code", "docs")).tolist() == [1, 2]
    sent = pickle.loads(pickle.dumps(ids))
    assert (sent.names, sent.index.tolist()) == (ids.names, ids.index.tolist())
    seen = [Metric("web", "seen", 1, "sum"), Metric("web", "words", 3, "sum")]
    assert ids_of([{"input_ids": [1], "metrics": seen}], pad).names == ("web",)
    lists = ids_of([plain("code", 1)] * 2, lambda some: {"x": [one["input_ids"] for one in some]})
    assert lists.index.tolist() == [0, 0]


def test_ids_are_of_tokens_where_rows_are_packed_or_all_in_one() -> None:
    packed = [row(("docs", 2), ("code", 1), ("code", 2)), row(("chat", 2), ("docs", 1))]
    ids = ids_of(packed, pad)
    assert ids.names == ("docs", "code", "chat")
    assert ids.index[:, :5].tolist() == [[0, 0, 1, 1, 1], [2, 2, 0, 0, 0]]
    left = ids_of(packed, lambda samples: pad(samples, left=True))
    assert [left.index[0, 1:].tolist(), left.index[1, 3:].tolist()] == [[0, 0, 1, 1, 1], [2, 2, 0]]
    one = ids_of([plain("docs", 3), plain("code", 2)], flat)
    assert (one.index.tolist(), one.shape) == ([[0, 0, 0, 1, 1]], (1, 5))
    assert ids_of(packed, flat).index.tolist() == [[0, 0, 1, 1, 1, 2, 2, 0]]
    assert ids_of(packed[:1], flat)[:, 1:].index.tolist() == [[0, 1, 1, 1]]


def test_segments_are_told_apart_by_marks_lengths_and_numbers() -> None:
    def values(sample: dict[str, Any]) -> list[tuple[str, float]]:
        return [(one.dataset_name, one.value) for one in metrics_of(sample)]

    assert values(row(("docs", 2), ("docs", 3), ("code", 1))) == [
        ("docs", 2),
        ("docs", 3),
        ("code", 1),
    ]
    # A row that begins in the middle of a sample.
    cut = row(("docs", 3), ("code", 2))
    assert values({name: column[1:] for name, column in cut.items()}) == [("docs", 2), ("code", 2)]
    # Numbers without marks, as of a packer that repeats them itself, beside lengths or without.
    bare = {"input_ids": [0] * 5, "metrics": [5, 5, 5, 6, 6]}
    assert values(bare) == [("docs", 3), ("code", 2)]
    assert values({**bare, "seq_lengths": [1, 2, 2]}) == [("docs", 1), ("docs", 2), ("code", 2)]
    by_segment = {"input_ids": [0] * 5, "metrics": [5, 5, 6], "seq_lengths": [1, 2, 2]}
    assert values(by_segment) == [("docs", 1), ("docs", 2), ("code", 2)]
    assert values(
        {**cut, "input_ids": torch.arange(5), "metrics": torch.tensor(cut["metrics"])}
    ) == [
        ("docs", 3),
        ("code", 2),
    ]
    assert values({"input_ids": [], "metrics": []}) == []


def test_a_transform_sees_one_segment_of_what_has_a_value_for_each_token() -> None:
    class Looks(MetricTransform):
        def _generate_metrics(self, sample: Any) -> list[Metric]:
            seen.append(dict(sample))
            return []

    seen: list[dict[str, Any]] = []
    transform = Looks()
    transform.set_dataset_name("looked at")
    ORIGINS.add(99, transform)
    mask = np.array([1, 1, 0])
    sample = {"input_ids": [1, 2, 3], "mask": mask, "text": "abc", "metrics": [~99, ~99, 99]}
    metrics_of({**sample, "seq_lengths": [1, 2], "id": 4})
    assert [one["input_ids"] for one in seen] == [[1], [2, 3]]
    assert seen[1]["mask"].tolist() == [1, 0]
    assert [seen[1][name] for name in ("text", "id")] == ["abc", 4]
    assert not {"metrics", "seq_lengths"} & seen[1].keys()


def test_what_would_make_ids_a_guess_is_refused() -> None:
    some = [plain("docs", 3), plain("code", 2)]
    with pytest.raises(ValueError, match=r"2 samples of 5 tokens were collated to .* \(1, 4\)"):
        ids_of(some, lambda samples: {"input_ids": flat(samples)["input_ids"][:, 1:]})
    with pytest.raises(ValueError, match=r"of the shape \(2, 3\)"):
        ids_of(
            [row(("docs", 3), ("code", 2))] * 2, lambda samples: {"input_ids": torch.zeros(2, 3)}
        )
    with pytest.raises(ValueError, match="an entry 'dataset_ids' of its own"):
        ids_of(some, lambda samples: {"input_ids": torch.zeros(2, 3), "dataset_ids": [0, 1]})
    for bare in ({"input_ids": [1]}, {"input_ids": [1], "metrics": []}):
        with pytest.raises(ValueError, match="a sample carries no metrics"):
            ids_of([bare], pad)
    with pytest.raises(ValueError, match=r"1 of the 2 samples .* others are of dataset 'docs'"):
        MetricsCollator(pad)([plain("docs", 3), {"input_ids": [1]}])
    empty = {"input_ids": [], "metrics": []}  # such as the last row of a packer
    assert ids_of([row(("docs", 2)), empty], flat).index.tolist() == [[0, 0]]
    both = [Metric("docs", "seen", 1, "sum"), Metric("code", "seen", 1, "sum")]
    with pytest.raises(ValueError, match=r"metrics of 'code', 'docs'.*a number per token"):
        ids_of([{"input_ids": [1, 2], "metrics": both}], pad)
    with pytest.raises(ValueError, match="5 numbers in its column 'metrics' for 4 tokens"):
        metrics_of({**row(("docs", 3), ("code", 2)), "input_ids": [1, 2, 3, 4]})
    with pytest.raises(ValueError, match="dataset 'docs', but the datasets are 'code'"):
        DatasetIds(("docs",), [0]).places(("code",))


# -- Accumulators that learn

SPEC = {
    "loss": "mean",
    "n": "sum",
    "most": "max",
    "least": "min",
    "len": "distribution",
    "cells": ("sum", "expert"),
    "tops": ("max", "expert"),
}


def test_an_accumulator_that_grows_holds_what_one_with_all_names_does() -> None:
    names = [f"d{place}" for place in range(7)]
    learns = DeviceAccumulator(SPEC, 1, axes={"expert": 3})
    knows = DeviceAccumulator(SPEC, names, axes={"expert": 3})
    at = [one.at("cells", expert=1) for one in (learns, knows)]
    generator = np.random.default_rng(0)
    for step in range(21):
        there = [names[step // 3], *generator.permutation(names[: step // 3])[:2]]
        ids = DatasetIds(there, generator.integers(len(there), size=5))
        x, w = torch.from_numpy(generator.normal(size=(2, 5)))
        for one, own, place in (
            (learns, ids, at[0]),
            (knows, torch.tensor(ids.places(names)), at[1]),
        ):
            for name in ("loss", "n", "most", "least", "len"):
                weighs = {"weights": w.abs()} if step % 2 and name in ("loss", "len") else {}
                one.update(name, x, dataset_ids=own, **weighs)
            experts = torch.arange(5) % 3
            one.update_all({"cells": x, "tops": x}, ids={"expert": experts}, dataset_ids=own)
            place.update(x, dataset_ids=own)
    found = []
    for one in (learns, knows):
        aggregator = MetricsAggregator()
        aggregator.drain(one)
        found.append(aggregator.get_metrics_for_logging("t"))
    assert found[0] == found[1]
    assert {key.split("/")[0] for key in found[0]} == {f"t_{name}" for name in names}


def test_ranks_that_learn_other_names_in_other_orders_agree() -> None:
    for logged in run_ranks(learn_apart, 2):
        assert logged == {"t_docs/loss": 2.0, "t_code/loss": 5.0, "t_chat/loss": 7.0}


def learn_apart(rank: int) -> dict[str, float]:
    acc = DeviceAccumulator({"loss": "mean"}, 1)
    batches = ([("docs", 1.0), ("code", 5.0)], [("chat", 7.0), ("docs", 3.0), ("code", 5.0)])
    for name, loss in batches[rank]:
        acc.update("loss", torch.tensor([loss]), dataset_ids=DatasetIds((name,), [0]))
    aggregator = MetricsAggregator()
    aggregator.drain(acc)
    return aggregator.get_metrics_for_logging("t")


@pytest.mark.parametrize("place", [-1, 2])
def test_a_place_of_no_name_is_refused(place: int) -> None:
    with pytest.raises(ValueError, match="among 2 names"):
        DatasetIds(("docs", "code"), [0, place])


def test_what_is_on_its_way_when_an_accumulator_grows_is_what_it_was() -> None:
    spec = {"loss": "mean", "len": "distribution", "cells": ("sum", "expert")}
    acc = DeviceAccumulator(spec, 1, axes={"expert": 2})
    aggregator = MetricsAggregator()
    for value, name in enumerate(("docs", "code", "chat", "web", "docs"), 1):
        ids = DatasetIds((name,), [0])
        x = torch.tensor([float(value)])
        acc.update_all({"loss": x, "len": x}, dataset_ids=ids)
        acc.update("cells", x, ids={"expert": 1}, dataset_ids=ids)
        aggregator.drain(acc)  # and nobody waits for it before there are more names
    snapshot = aggregator.reduce()
    logged = snapshot.as_dict("t")
    assert (logged["t_docs/loss"], logged["t_web/loss"]) == (3.0, 4.0)
    assert (logged["t_docs/len_stat_max"], logged["t_code/len_stat_max"]) == (5.0, 2.0)
    assert snapshot.array("docs", "cells")[0].tolist() == [0.0, 6.0]
    assert snapshot.array("code", "cells")[0].tolist() == [0.0, 2.0]


def test_a_compiled_step_is_compiled_again_only_where_the_accumulator_has_grown() -> None:
    graphs = []

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    acc = DeviceAccumulator({"loss": "mean", "cells": ("sum", "expert")}, 7, axes={"expert": 2})
    placed = acc.at("cells", expert=1)

    @torch.compile(backend=counting, fullgraph=True)
    def step(x: torch.Tensor, ids: torch.Tensor) -> None:
        acc.update("loss", x, dataset_ids=ids)
        placed.update(x, dataset_ids=ids)

    for place in range(6):
        step(torch.ones(2), acc.learn(DatasetIds((f"a{place}", "b"), [0, 1])))
    assert len(graphs) == 1
    for place in range(6, 12):
        step(torch.ones(2), acc.learn(DatasetIds((f"a{place}", "b"), [0, 1])))
    assert len(graphs) == 2
    aggregator = MetricsAggregator()
    aggregator.drain(acc)
    assert aggregator.reduce().array("b", "cells")[0].tolist() == [0.0, 12.0]
    with pytest.raises(Exception, match=r"learn|Observed exception"):
        step(torch.ones(2), DatasetIds(("b",), [0, 0]))


def test_the_loss_of_a_packed_batch_is_that_of_its_tokens() -> None:
    batch = MetricsCollator(pad, dataset_ids=True)(
        [row(("docs", 3), ("code", 2)), plain("chat", 4)]
    )
    acc = DeviceAccumulator({"loss": "mean"}, 16)
    logits = torch.randn(2, 6, 9, dtype=torch.float64)
    labels, ids = batch["labels"][:, 1:], batch["dataset_ids"][:, 1:]
    acc.token_loss(logits[:, :-1], labels, ids)
    aggregator = MetricsAggregator()
    aggregator.drain(acc)
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), labels, reduction="none"
    )
    expected = {"docs": losses[0, :2], "code": losses[0, 2:4], "chat": losses[1, :3]}
    for name, own in expected.items():
        assert aggregator.get_metrics_for_logging()[f"data_{name}/loss"] == pytest.approx(
            own.mean().item(), rel=1e-12
        )


def test_what_an_accumulator_that_learns_cannot_take_is_refused(
    caplog: pytest.LogCaptureFixture,
) -> None:
    acc = DeviceAccumulator({"loss": "mean"}, 2)
    with pytest.raises(ValueError, match=r"is to be learnt: give dataset_ids, the DatasetIds"):
        acc.update("loss", torch.ones(2))
    with pytest.raises(ValueError, match="room for one at least"):
        DeviceAccumulator({"loss": "mean"}, 0)
    mark = acc.mark()
    acc.update("loss", torch.ones(5), dataset_ids=DatasetIds("abcde", range(5)))
    with pytest.raises(ValueError, match="or has grown for new datasets"):
        acc.rollback(mark)
    acc.empty().update("loss", torch.ones(1), dataset_ids=torch.tensor([5]))
    aggregator = MetricsAggregator()
    aggregator.drain(acc)
    assert aggregator.get_metrics_for_logging() == {}
    assert "places that have no dataset yet" in caplog.text
    fixed = DeviceAccumulator({"loss": "mean"}, ("docs",))
    with pytest.raises(ValueError, match="dataset 'web', but the datasets are 'docs'"):
        fixed.update("loss", torch.ones(1), dataset_ids=DatasetIds(("web",), [0]))


def test_what_has_been_learnt_is_copied_and_pickled() -> None:
    acc = DeviceAccumulator({"loss": "mean"}, 1)
    acc.update("loss", torch.tensor([1.0, 3.0]), dataset_ids=DatasetIds(("docs", "code"), [0, 1]))
    for one in (acc, copy.deepcopy(acc), pickle.loads(pickle.dumps(acc))):
        one.update("loss", torch.tensor([5.0]), dataset_ids=DatasetIds(("code",), [0]))
        aggregator = MetricsAggregator()
        aggregator.drain(one)
        assert aggregator.get_metrics_for_logging() == {
            "data_docs/loss": 1.0,
            "data_code/loss": 4.0,
        }


def test_an_accumulator_of_jax_takes_places_and_says_so() -> None:
    jax_accumulator = pytest.importorskip("metricfold.jax").DeviceAccumulator
    acc = jax_accumulator({"loss": "mean"}, datasets=("docs", "code"))
    ids = DatasetIds(("code", "docs"), [0, 1, 1])
    with pytest.raises(TypeError, match=r"give it batch\['dataset_ids'\]\.places"):
        acc.update("loss", np.ones(3), dataset_ids=ids)
    with pytest.raises(TypeError, match="DeviceAccumulator alone takes a number of them"):
        jax_accumulator({"loss": "mean"}, datasets=16)
    acc = acc.update("loss", np.array([1.0, 2.0, 4.0]), dataset_ids=ids.places(acc.layout.datasets))
    aggregator = MetricsAggregator()
    aggregator.drain(acc)
    assert aggregator.get_metrics_for_logging() == {"data_code/loss": 1.0, "data_docs/loss": 3.0}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_name_that_is_new_waits_for_the_gpu() -> None:
    acc = DeviceAccumulator({"loss": "mean", "len": "distribution"}, 1, device="cuda", fused=False)
    losses = torch.ones(4, 8, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for place in range(5):
            acc.update("loss", losses, dataset_ids=DatasetIds(("b", f"a{place}"), [0, 1, 0, 1]))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    aggregator = MetricsAggregator()
    aggregator.drain(acc)
    logged = aggregator.get_metrics_for_logging()
    assert [logged[f"data_{name}/loss"] for name in ("b", "a0", "a4")] == [1.0, 1.0, 1.0]
