"""What trainers log by themselves, what metricfold logs there, and the truth: three datasets, two uneven ranks.

One sample's loss is a number that it carries, of as many tokens as it says, so that the truth is known
without a model: Σ tokens x loss / Σ tokens of a dataset's samples. All three frameworks run in one
pair of processes.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks

if not all(map(importlib.util.find_spec, ("lightning", "transformers", "accelerate"))):
    pytest.skip("needs lightning, transformers and accelerate", allow_module_level=True)

from metricfold import Metric, MetricsAggregator, MetricsCollator

NAMES = ("code", "docs", "math")
ORDER = "cdmmcdccdmdcm"  # of which rank 0 has seven, rank 1 six, and each some of every dataset
SAMPLES = len(ORDER)
BATCH = 2

Row = tuple[str, str, float, float, float]  # framework and phase, name, theirs, ours, the truth


def samples() -> list[dict[str, Any]]:
    made = []
    for index in range(SAMPLES):
        name = {name[0]: name for name in NAMES}[ORDER[index]]
        loss, tokens = float(index * index % 13), 1 + 3 * (index % 4)
        metrics = [Metric(name, "loss", loss, "mean", tokens), Metric(name, "seen", 1, "sum")]
        own = {"index": index, "value": loss, "tokens": tokens, "dataset": NAMES.index(name)}
        made.append({**own, "metrics": metrics})
    return made


def name_of(sample: dict[str, Any]) -> str:
    return NAMES[sample["dataset"]]


def collate(batch: list[Any]) -> dict[str, Any]:
    columns = ("index", "value", "tokens", "dataset")
    return {key: torch.tensor([one[key] for one in batch]) for key in columns}


def truth(indices: Iterable[int], name: str | None = None) -> float:
    chosen = [samples()[index] for index in indices]
    chosen = [one for one in chosen if name in (None, name_of(one))]
    return float(sum(s["value"] * s["tokens"] for s in chosen) / sum(s["tokens"] for s in chosen))


def mean_of(batch: dict[str, Any], name: str | None = None) -> torch.Tensor | None:
    """Return what a step calls its loss, of one dataset if that is asked for."""
    of_name = batch["dataset"] == NAMES.index(name) if name else torch.ones(len(batch["value"])) > 0
    if not of_name.any():
        return None
    tokens = batch["tokens"][of_name]
    return (batch["value"][of_name] * tokens).sum() / tokens.sum()


class Unpadded(torch.utils.data.DistributedSampler):  # type: ignore[type-arg]
    def __iter__(self) -> Any:
        return iter(range(self.rank, len(self.dataset), self.num_replicas))

    def __len__(self) -> int:
        return len(range(self.rank, len(self.dataset), self.num_replicas))


# -- Three frameworks ------------------------------------------------------------------------------


def by_lightning(rank: int, folder: Path) -> list[Row]:
    from lightning.pytorch import LightningModule, Trainer

    from metricfold.integrations.lightning import MetricfoldCallback

    class Model(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            # Each key in each batch: ranks that log others, or in another order, wait for ever.
            for place, name in enumerate((None, *NAMES)):
                loss = mean_of(batch, name)
                size = (
                    len(batch["value"]) if name is None else (batch["dataset"] == place - 1).sum()
                )
                value = torch.zeros(()) if loss is None else loss
                key = f"theirs/{name or 'all'}"
                self.log(key, value, on_epoch=True, sync_dist=True, batch_size=int(size))

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[MetricfoldCallback()],
    )
    loader = torch.utils.data.DataLoader(
        samples(),  # type: ignore[arg-type]
        batch_size=BATCH,
        sampler=Unpadded(samples(), 2, rank),  # type: ignore[arg-type]
        collate_fn=MetricsCollator(collate),
    )
    trainer.validate(Model(), loader, verbose=False)
    logged = {key: value.item() for key, value in trainer.callback_metrics.items()}
    assert logged["val/seen"] == SAMPLES
    return [
        (
            "Lightning, evaluation",
            name or "all",
            logged[f"theirs/{name or 'all'}"],
            logged[f"val_{name}/loss" if name else "val/loss"],
            truth(range(SAMPLES), name),
        )
        for name in (None, *NAMES)
    ]


class Weighing(torch.nn.Module):
    """A model whose loss is that of the samples; it has something to learn, as trainers ask."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, value: Any, tokens: Any, dataset: Any, index: Any) -> dict[str, Any]:
        loss = (value * tokens).sum() / tokens.sum()
        return {"loss": loss + 0 * self.weight}


def by_transformers(rank: int, folder: Path) -> list[Row]:
    import transformers

    from metricfold.integrations.transformers import MetricfoldMixin

    class Trainer(MetricfoldMixin, transformers.Trainer):  # type: ignore[misc]
        consumed: list[int]

        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            self.consumed += inputs["index"].tolist()
            return super().training_step(model, inputs, *args, **kwargs)

    transformers.logging.set_verbosity_error()
    arguments = transformers.TrainingArguments(
        str(folder),
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH,
        max_steps=3,
        logging_steps=3,
        remove_unused_columns=False,
        prediction_loss_only=True,
        label_names=["value"],
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    each = {name: [one for one in samples() if name_of(one) == name] for name in NAMES}
    given = {"train_dataset": samples(), "eval_dataset": {"all": samples(), **each}}
    trainer = Trainer(Weighing(), arguments, data_collator=collate, **given)
    trainer.consumed = []
    trainer.train()
    log = trainer.state.log_history[0]
    ranks: list[Any] = [None, None]
    torch.distributed.all_gather_object(ranks, trainer.consumed)
    rows: list[Row] = [
        (
            "Transformers, training",
            "all",
            log["loss"],
            log["all/loss"],
            truth([*ranks[0], *ranks[1]]),
        )
    ]
    evaluated = trainer.evaluate()
    assert evaluated["eval_all_all/seen"] == SAMPLES
    return [
        *rows,
        *(
            (
                "Transformers, evaluation",
                name,
                evaluated[f"eval_{name}_loss"],
                evaluated["eval_all_all/loss" if name == "all" else f"eval_{name}_{name}/loss"],
                truth(range(SAMPLES), None if name == "all" else name),
            )
            for name in ("all", *NAMES)
        ),
        *(
            # Of the mixture itself, where the Trainer has one number.
            (
                "Transformers, the mixture",
                name,
                evaluated["eval_all_loss"],
                evaluated[f"eval_all_{name}/loss"],
                truth(range(SAMPLES), name),
            )
            for name in NAMES
        ),
    ]


def by_accelerate(rank: int, folder: Path) -> list[Row]:
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

    made = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(even_batches=False))
    loader = torch.utils.data.DataLoader(
        samples(),  # type: ignore[arg-type]
        batch_size=BATCH,
        collate_fn=MetricsCollator(collate),
    )
    aggregator = MetricsAggregator()
    losses: dict[str | None, list[torch.Tensor]] = {name: [] for name in (None, *NAMES)}
    for batch in made.prepare(loader):
        aggregator.update(batch.pop("metrics"))
        for name, own in losses.items():
            if (loss := mean_of(batch, name)) is not None:
                own.append(loss)
    logged = aggregator.reduce().as_dict("eval", rollup=True)
    assert logged["eval/seen"] == SAMPLES
    rows: list[Row] = []
    for name, own in losses.items():
        # Ranks have different numbers of batches: gather() in the loop would wait for ever.
        mean = torch.stack(own).mean() if own else torch.zeros(())
        theirs = made.reduce(mean, reduction="mean").item()
        ours = logged[f"eval_{name}/loss" if name else "eval/loss"]
        rows.append(
            ("Accelerate, evaluation", name or "all", theirs, ours, truth(range(SAMPLES), name))
        )
    return rows


def on_two_ranks(rank: int, folder: Path) -> list[Row]:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(LOCAL_WORLD_SIZE="2", GROUP_RANK="0", TORCHELASTIC_RUN_ID="tests")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", HF_HUB_OFFLINE="1")
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the frameworks' advice
        return [
            row for by in (by_transformers, by_accelerate, by_lightning) for row in by(rank, folder)
        ]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[list[Row]]:
    found = run_ranks(on_two_ranks, 2, tmp_path_factory.mktemp("rows"))
    print(table(found[0]))
    return found


def table(rows: list[Row]) -> str:
    lines = [f"{'':32}{'theirs':>9}{'ours':>9}{'the truth':>11}"]
    for of, name, theirs, ours, true in rows:
        lines.append(f"{of + ', ' + name:32}{theirs:9.4f}{ours:9.4f}{true:11.4f}")
    return "\n".join(lines)


@pytest.mark.parametrize("framework", ["Lightning", "Transformers", "Accelerate"])
def test_ours_is_the_truth_of_each_dataset_where_a_mean_of_means_is_not(
    rows: list[list[Row]], framework: str
) -> None:
    assert rows[0] == rows[1]  # the same on both ranks
    own = [row for row in rows[0] if row[0].startswith(framework)]
    assert {name for _, name, *_ in own} == {"all", *NAMES}
    for of, name, _, ours, true in own:
        assert ours == pytest.approx(true, rel=1e-12), (of, name)
    wrong = [row for row in own if row[2] != pytest.approx(row[4], rel=1e-3)]
    assert len(wrong) >= 3  # where theirs is not the truth
