"""Lightning with the loss of each dataset, next to `self.log` and the truth.

    python examples/lightning_digits.py
    torchrun --nproc-per-node 2 examples/lightning_digits.py

A small network learns to read scanned digits. They are two datasets here: those up to 4, and those
from 5.
"""

import os
import sys

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, DistributedSampler, default_collate

from metricfold import AggregationType, Metric, MetricsCollator, MetricTransform
from metricfold.integrations.lightning import MetricfoldCallback
from metricfold.torch import DeviceAccumulator

NAMES = ("low", "high")
EVALUATED = 361  # samples; an odd number
EPOCHS, EVERY = 2, 10


# -- Two datasets, tagged -------------------------------------------------------------------------


class Ink(MetricTransform):
    def _generate_metrics(self, sample):
        ink = sample["image"].sum().item()
        return [
            Metric(self.dataset_name, "samples_seen", 1, AggregationType.SUM),
            Metric(self.dataset_name, "ink", ink, AggregationType.DISTRIBUTION),
        ]


def tagged_digits():
    transforms = {name: Ink() for name in NAMES}
    for name, transform in transforms.items():
        transform.set_dataset_name(name)
    images, labels = load_digits(return_X_y=True)
    return [
        transforms[NAMES[int(label > 4)]](
            {"image": torch.tensor(image).float(), "label": int(label), "dataset": int(label > 4)}
        )
        for image, label in zip(images, labels, strict=True)
    ]


class Unpadded(DistributedSampler):
    """Deals out each sample once, where a DistributedSampler fills up all ranks to one length."""

    def __iter__(self):
        return iter(range(self.rank, len(self.dataset), self.num_replicas))

    def __len__(self):
        return len(range(self.rank, len(self.dataset), self.num_replicas))


# -- A model, and what metricfold asks for ---------------------------------------------------------


class Reader(LightningModule):
    def __init__(self, metrics):
        super().__init__()
        self.network = torch.nn.Sequential(
            torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10)
        )
        self.metrics = metrics

    def setup(self, stage):
        self.losses = DeviceAccumulator({"loss": "mean"}, NAMES, device=self.device)
        self.metrics.accumulators[:] = [self.losses]

    def loss_of(self, batch):
        logits = self.network(batch["image"] / 16)
        return self.losses.token_loss(logits, batch["label"], batch["dataset"])

    def training_step(self, batch, batch_idx):
        return self.loss_of(batch)

    def validation_step(self, batch, batch_idx):
        self.loss_of(batch)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


# -- Theirs, and the truth: a training has no need of this -----------------------------------------


class CheckedReader(Reader):
    """Logs by `self.log` too, and remembers what it saw."""

    def __init__(self, metrics):
        super().__init__(metrics)
        self.seen = []  # of each step of training: its number, and the sum and number of losses

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("theirs/all/loss", loss, sync_dist=True)
        step = self.trainer.global_step + 1
        self.seen.append((step, losses_of(self, batch).sum().item(), len(batch["label"])))
        return loss

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        losses, of_epoch = losses_of(self, batch), {"on_epoch": True, "sync_dist": True}
        self.log("theirs/all/loss", losses.mean(), **of_epoch)
        for place, name in enumerate(NAMES):
            if (of_name := losses[batch["dataset"] == place]).numel():
                self.log(f"theirs/{name}/loss", of_name.mean(), **of_epoch)
        self.log("theirs/all/ink_stat_p50", batch["image"].sum(1).quantile(0.5), **of_epoch)
        self.log("theirs/all/samples_seen", float(len(losses)), reduce_fx="sum", **of_epoch)

    def truth_of_training(self):
        """Return the mean loss since the log before the last, over all ranks."""
        before = (self.seen[-1][0] - 1) // EVERY * EVERY
        last = torch.tensor([(total, n) for step, total, n in self.seen if step > before])
        total, n = self.trainer.strategy.reduce(last.sum(0), reduce_op="sum")
        return {"all/loss": (total / n).item()}

    def truth_of_evaluation(self, samples):
        """Return what all samples say, each taken once."""
        batch = default_collate([{key: s[key] for key in ("image", "label")} for s in samples])
        low, losses = batch["label"] < 5, losses_of(self, batch)
        return {
            "all/loss": losses.mean().item(),
            "low/loss": losses[low].mean().item(),
            "high/loss": losses[~low].mean().item(),
            "all/ink_stat_p50": batch["image"].sum(1).quantile(0.5).item(),
            "all/samples_seen": len(samples),
        }


@torch.no_grad()
def losses_of(model, batch):
    logits = model.network(batch["image"] / 16).double()
    return torch.nn.functional.cross_entropy(logits, batch["label"], reduction="none")


# -- The training ----------------------------------------------------------------------------------


def main(folder):
    torch.manual_seed(0)
    samples = tagged_digits()
    seen, held_out = samples[:-EVALUATED], samples[-EVALUATED:]

    metrics = MetricfoldCallback()
    model = CheckedReader(metrics)
    trainer = Trainer(
        accelerator="cpu",
        devices=int(os.environ.get("WORLD_SIZE", "1")),
        max_epochs=EPOCHS,
        log_every_n_steps=EVERY,
        callbacks=[metrics],
        logger=CSVLogger(folder),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )

    def loader(samples, **how):
        return DataLoader(samples, batch_size=24, collate_fn=MetricsCollator(), **how)

    trainer.fit(model, loader(seen, shuffle=True))
    rows = compare("training", "train", trainer, model.truth_of_training())
    truth = model.truth_of_evaluation(held_out)
    trainer.validate(model, loader(held_out), verbose=False)
    rows += compare("evaluation", "val", trainer, truth)
    if trainer.world_size > 1:
        sampler = Unpadded(held_out, trainer.world_size, trainer.global_rank)
        trainer.validate(model, loader(held_out, sampler=sampler), verbose=False)
        rows += compare("unpadded", "val", trainer, truth)
    return trainer, rows


def compare(what, prefix, trainer, truth):
    """Return (name, theirs, ours, the truth) of each metric."""
    logged = trainer.callback_metrics
    return [
        (
            f"{what}, {name}",
            logged[f"theirs/{name}"].item(),
            logged[f"{prefix}_{name}".replace("_all", "")].item(),
            truth[name],
        )
        for name in truth
    ]


def table(rows):
    lines = [f"{'':28}{'theirs':>10}{'ours':>10}{'the truth':>11}"]
    for name, *values in rows:
        theirs, ours, truth = (
            f"{value:.0f}" if value > 100 and value % 1 == 0 else f"{value:.5g}" for value in values
        )
        lines.append(f"{name:28}{theirs:>10}{ours:>10}{truth:>11}")
    return "\n".join(lines)


if __name__ == "__main__":
    trainer, rows = main(sys.argv[1] if len(sys.argv) > 1 else "runs/lightning")
    if trainer.is_global_zero:
        print(f"\nranks: {trainer.world_size}\n{table(rows)}")
