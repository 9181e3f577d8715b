"""Lightning Fabric: the loss of each dataset, totals, and a restart from Fabric's checkpoint.

python examples/engines/fabric_mixture.py [folder]
torchrun --nproc-per-node 2 examples/engines/fabric_mixture.py [folder]
"""

import os
import sys
from pathlib import Path

import mixture
import torch
from lightning.fabric import Fabric
from mixture import BREAK, EVERY, NAMES, STEPS

from metricfold import JSONLSink, MetricsAggregator, MetricsLogger
from metricfold.torch import DeviceAccumulator


def train(fabric, folder, ledger, *, first, last):
    model = mixture.Model()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    model, optimizer = fabric.setup(model, optimizer)
    aggregator = MetricsAggregator()  # after launch(), which joins the ranks
    losses = DeviceAccumulator({"loss": "mean"}, NAMES, device=fabric.device)
    state = {"model": model, "optimizer": optimizer, "metrics": aggregator}
    if first > 1:
        fabric.load(folder / "checkpoint.pt", state)

    since_log = []
    with MetricsLogger([JSONLSink(folder / "log.jsonl")]) as logger:
        logger.rewind(first - 1)
        for step in range(first, last + 1):
            batch = mixture.batch_of(step, fabric.global_rank)
            aggregator.update(batch.pop("metrics"))
            batch = fabric.to_device(batch)
            logits = model(batch["inputs"])
            loss = losses.token_loss(logits, batch["labels"], batch["dataset"])
            optimizer.zero_grad()
            fabric.backward(loss)
            optimizer.step()
            since_log.append(loss.detach())
            ledger.see(step, logits, batch)
            if step % EVERY == 0:
                aggregator.drain(losses)
                logger.log(step, aggregator, prefix="train")  # every rank
                theirs = fabric.all_reduce(torch.stack(since_log).mean())
                since_log.clear()
        aggregator.drain(losses)
        fabric.save(folder / "checkpoint.pt", state)  # every rank: it asks for their states
    return theirs.item()


def main(folder):
    fabric = Fabric(accelerator="cpu", devices=int(os.environ.get("WORLD_SIZE", "1")))
    fabric.launch()
    ledger = mixture.Ledger()
    train(fabric, folder, ledger, first=1, last=BREAK)
    theirs = {"all/loss": train(fabric, folder, ledger, first=BREAK + 1, last=STEPS)}
    truth = ledger.losses(STEPS - EVERY + 1, STEPS) | mixture.counted(STEPS, fabric.world_size)
    ours = mixture.last_logged(folder / "log.jsonl", truth) if fabric.is_global_zero else {}
    return theirs, ours, truth


if __name__ == "__main__":
    theirs, ours, truth = main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/fabric"))
    if ours:
        print(mixture.table(theirs, ours, truth))
