"""PyTorch Ignite: the loss of each dataset by handlers, totals, and a restart from its `Checkpoint`.

python examples/engines/ignite_mixture.py [folder]
torchrun --nproc-per-node 2 examples/engines/ignite_mixture.py [folder]
"""

import os
import sys
from pathlib import Path

import ignite.distributed as idist
import mixture
import torch
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint, DiskSaver
from ignite.metrics import Average
from mixture import BREAK, EVERY, NAMES, STEPS

from metricfold import JSONLSink, MetricsAggregator, MetricsLogger
from metricfold.torch import DeviceAccumulator


def train(folder, ledger, *, first, last):
    model = idist.auto_model(mixture.Model())
    optimizer = idist.auto_optim(torch.optim.SGD(model.parameters(), 0.5))
    aggregator = MetricsAggregator()  # inside of idist.Parallel, which joins the ranks
    losses = DeviceAccumulator({"loss": "mean"}, NAMES, device=idist.device())
    logger = MetricsLogger([JSONLSink(folder / "log.jsonl")])

    def step(engine, batch):
        aggregator.update(batch.pop("metrics"))
        logits = model(batch["inputs"])
        loss = losses.token_loss(logits, batch["labels"], batch["dataset"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ledger.see(engine.state.iteration, logits, batch)
        return loss.item()

    trainer = Engine(step)

    @trainer.on(Events.ITERATION_COMPLETED(every=EVERY) | Events.ITERATION_COMPLETED(once=BREAK))
    def drain(engine):  # before what logs and saves
        aggregator.drain(losses)

    @trainer.on(Events.ITERATION_COMPLETED(every=EVERY))
    def log(engine):  # every rank
        logger.log(engine.state.iteration, aggregator, prefix="train")

    checkpointed = {
        "trainer": trainer,
        "model": model,
        "optimizer": optimizer,
        "metrics": aggregator,
    }
    saver = DiskSaver(folder, require_empty=False)
    save = Checkpoint(checkpointed, saver, n_saved=1)  # every rank: it asks for their states
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=BREAK), save)
    if first > 1:
        idist.barrier()
        Checkpoint.load_objects(checkpointed, folder / f"checkpoint_{first - 1}.pt")
        logger.rewind(first - 1)

    Average().attach(trainer, "theirs")
    batches = (mixture.batch_of(number, idist.get_rank()) for number in range(first, last + 1))
    trainer.run(batches, max_epochs=STEPS // EVERY, epoch_length=EVERY)
    logger.close()
    return trainer.state.metrics["theirs"]


def both(local_rank, folder, found):
    ledger = mixture.Ledger()
    train(folder, ledger, first=1, last=BREAK)
    theirs = {"all/loss": train(folder, ledger, first=BREAK + 1, last=STEPS)}
    truth = ledger.losses(STEPS - EVERY + 1, STEPS) | mixture.counted(STEPS, idist.get_world_size())
    ours = mixture.last_logged(folder / "log.jsonl", truth) if idist.get_rank() == 0 else {}
    found += theirs, ours, truth


def main(folder):
    found = []
    ranks_to_join = "WORLD_SIZE" in os.environ and not torch.distributed.is_initialized()
    with idist.Parallel("gloo" if ranks_to_join else None) as parallel:
        parallel.run(both, folder, found)
    return found


if __name__ == "__main__":
    theirs, ours, truth = main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/ignite"))
    if ours:
        print(mixture.table(theirs, ours, truth))
