"""What a rank of the demo is made of: batches, model, gradients."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from metricfold import MetricsAggregator
from metricfold.demo.batches import held_out
from metricfold.demo.gradients import LocalGradientNorm
from metricfold.demo.mixture import Corpus, Mixture
from metricfold.demo.model import ByteTransformer
from metricfold.demo.texts import MAX_BYTES_PER_TEXT, Text
from metricfold.demo.train import next_tokens, padded, sums_by_dataset, training_batches
from metricfold.torch import DeviceAccumulator


@pytest.fixture
def mixture():
    return Mixture(
        [
            Corpus.split("digits", [Text("0123456789"[: 2 + n % 9], "up") for n in range(60)]),
            Corpus.split("letters", [Text("é" * (1 + n), "same") for n in range(30)]),
        ]
    )


class TestBatches:
    def test_metrics_come_with_the_batch_and_count_what_is_in_it(self, mixture):
        aggregator = MetricsAggregator()
        tokens = samples = 0
        for rank in range(2):
            for batch in training_batches(mixture, range(1, 4), rank, 2):
                aggregator.update(batch.pop("metrics"))
                tokens += int(batch["mask"].sum())
                samples += len(batch["tokens"])
        seen = aggregator.get_metrics_for_logging("train")
        assert samples == 48
        assert seen["train_digits/samples_seen"] + seen["train_letters/samples_seen"] == 48
        assert seen["train_digits/tokens_seen"] + seen["train_letters/tokens_seen"] == tokens
        assert seen["train_digits/kind_count_up"] == seen["train_digits/samples_seen"]

    def test_tokens_are_bytes_and_padding_is_masked(self, mixture):
        (batch,) = training_batches(mixture, range(1, 2), 0, 1)
        for number, row, mask in zip(
            mixture.shares(1, 1)[0], batch["tokens"], batch["mask"], strict=True
        ):
            assert bytes(row[mask].tolist()) == mixture.draw(number).text.text.encode()
            assert not row[~mask].any()

    def test_validation_reads_each_held_out_text_once(self, mixture):
        read = sorted(
            (int(dataset), bytes(tokens[mask].tolist()).decode())
            for rank in range(3)
            for batch in map(padded, held_out(mixture, rank, 3))
            for dataset, tokens, mask in zip(
                batch["dataset"], batch["tokens"], batch["mask"], strict=True
            )
        )
        assert read == sorted(
            (i, text.text) for i, corpus in enumerate(mixture.corpora) for text in corpus.validation
        )


class TestModel:
    @pytest.fixture
    def model(self):
        torch.manual_seed(0)
        return ByteTransformer().eval()

    def test_has_well_under_a_million_parameters(self, model):
        assert 50_000 < sum(one.numel() for one in model.parameters()) < 500_000

    @torch.no_grad()
    def test_looks_only_back(self, model):
        tokens = torch.randint(256, (2, MAX_BYTES_PER_TEXT))
        changed = tokens.clone()
        changed[:, 100:] = 7
        before, after = model(tokens)[:, :100], model(changed)[:, :100]
        torch.testing.assert_close(before, after)
        assert not torch.allclose(model(tokens)[:, 100:], model(changed)[:, 100:])

    @torch.no_grad()
    def test_padding_changes_no_loss(self, model):
        texts = [torch.arange(5), torch.arange(9)]
        batch = side_by_side(texts)
        logits = model(batch["tokens"][:, :-1])
        losses, tokens = sums_by_dataset(logits, next_tokens(batch), batch["dataset"], 3)
        assert tokens.tolist() == [4, 8, 0]
        assert losses[2] == 0
        for i, text in enumerate(texts):
            alone = torch.nn.functional.cross_entropy(model(text[None, :-1])[0], text[1:])
            assert losses[i].item() == pytest.approx(alone.item() * (len(text) - 1), rel=1e-5)


def test_the_loss_of_each_dataset_is_that_of_its_samples_one_by_one(mixture):
    torch.manual_seed(0)
    model = ByteTransformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=8e-3)
    accumulator = DeviceAccumulator({"loss": "mean"}, mixture.names)
    aggregator = MetricsAggregator()
    slow = {name: [] for name in mixture.names}
    for batch in training_batches(mixture, range(1, 6), 0, 1):
        for dataset, tokens, mask in zip(
            batch["dataset"], batch["tokens"], batch["mask"], strict=True
        ):
            text = tokens[mask]
            with torch.no_grad():
                logits = model(text[None, :-1])[0].double()
            losses = torch.nn.functional.cross_entropy(logits, text[1:], reduction="none")
            slow[mixture.names[dataset]] += losses.tolist()
        loss = accumulator.token_loss(
            model(batch["tokens"][:, :-1]), next_tokens(batch), batch["dataset"]
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    aggregator.drain(accumulator)
    found = aggregator.get_metrics_for_logging("train")
    for name, losses in slow.items():
        assert found[f"train_{name}/loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)


def side_by_side(texts):
    length = max(map(len, texts))
    mask = torch.tensor([[i < len(text) for i in range(length)] for text in texts])
    tokens = torch.zeros(len(texts), length, dtype=torch.long)
    tokens[mask] = torch.cat(texts)
    return {"tokens": tokens, "mask": mask, "dataset": torch.arange(len(texts))}


def test_the_norm_of_the_local_gradient_is_that_before_the_all_reduce(tmp_path):
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        model = DistributedDataParallel(torch.nn.Linear(3, 2))
        norm = LocalGradientNorm(model)
        model(torch.ones(4, 3)).square().sum().backward()
        expected = torch.cat([one.grad.flatten() for one in model.parameters()]).norm()
        assert norm.pop().item() == pytest.approx(expected.item())
        assert norm.pop().item() == 0
    finally:
        dist.destroy_process_group()
