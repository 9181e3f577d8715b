"""A mixture of experts over two real ranks: what is logged of its tokens is what was routed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks import run_ranks

from metricfold import read_jsonl

ROOT = Path(__file__).parent.parent


def example() -> Any:
    spec = importlib.util.spec_from_file_location("moe_router", ROOT / "examples/moe_router.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train_on_rank(rank: int, folder: Path) -> dict[str, Any]:
    """Train for a few steps, and count what is routed by hand."""
    import torch
    import torch.distributed as dist
    from torch.nn.modules.module import register_module_forward_pre_hook

    module = example()
    module.STEPS, module.EVERY, module.SAMPLES = 4, 2, 12
    truth = torch.zeros(module.LAYERS, 2, module.EXPERTS, dtype=torch.int64)
    places: dict[Any, int] = {}

    def count(layer: Any, given: Any) -> None:
        if isinstance(layer, module.MoE):
            place = places.setdefault(layer, len(places))
            with torch.no_grad():
                top = layer.gate(given[0]).softmax(-1).topk(module.TOP).indices
            for token, dataset in zip(top.tolist(), given[1].tolist(), strict=True):
                for expert in token:
                    truth[place, dataset, expert] += 1

    hook = register_module_forward_pre_hook(count)
    try:
        snapshot = module.train(folder, rank, 2)
    finally:
        hook.remove()
    own = truth.clone()
    dist.all_reduce(truth)
    return {
        "own": own.numpy(),
        "truth": truth.numpy(),
        "chosen": [snapshot.array(name, "expert_tokens", window="run")[0] for name in module.NAMES],
        "served": [snapshot.array(name, "served_tokens", window="run")[0] for name in module.NAMES],
        "compared": module.compared(snapshot, module.imbalance),
        "derived": snapshot.as_dict("train", "interval", rollup=True),
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Path]:
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("moe")
    return run_ranks(train_on_rank, 2, folder), folder


def test_tokens_of_each_layer_expert_and_dataset_are_those_that_were_routed(trained: Any) -> None:
    """Also where each rank has counted its own experts alone: parts of an axis on different ranks."""
    for rank in trained[0]:
        for dataset in range(2):
            np.testing.assert_array_equal(rank["chosen"][dataset], rank["truth"][:, dataset])
            np.testing.assert_array_equal(rank["served"][dataset], rank["truth"][:, dataset])
    assert not np.array_equal(trained[0][0]["own"], trained[0][1]["own"])


def test_what_is_derived_of_merged_tokens_is_not_the_mean_of_the_ranks(trained: Any) -> None:
    first, second = (rank["compared"] for rank in trained[0])
    derived = trained[0][0]["derived"]
    for dataset, (everyone, mean_of_ranks) in first.items():
        np.testing.assert_array_equal(everyone, second[dataset][0])
        key = f"train_{dataset}/moe/imbalance" if dataset else "train/moe/imbalance"
        assert derived[key] == everyone.max()
        assert np.abs(everyone - mean_of_ranks).max() > 0.01 * everyone.max()


def test_the_record_of_a_log_holds_cells_and_what_is_derived_of_them(trained: Any) -> None:
    ranks, folder = trained
    *_, record = read_jsonl(folder / "moe.jsonl")
    tokens = record.arrays["train_bytecode/expert_tokens"]
    assert [name for name, _ in tokens["axes"]] == ["layer", "expert"]
    np.testing.assert_array_equal(tokens["values"], ranks[0]["truth"][:, 1])
    assert record.metrics["train/moe/imbalance"] == ranks[0]["derived"]["train/moe/imbalance"]
    assert record.metrics["train_docs/moe/entropy"] < 1
    assert {
        f"train_docs/expert_tokens/layer_{layer}" for layer in range(3)
    } <= record.metrics.keys()
