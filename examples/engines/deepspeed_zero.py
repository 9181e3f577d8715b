"""DeepSpeed: ZeRO-2, accumulated gradients, a step that is skipped, and a restart.

torchrun --nproc-per-node 2 examples/engines/deepspeed_zero.py [folder]
"""

import sys
from pathlib import Path

import deepspeed
import mixture
import torch
from mixture import BREAK, EVERY, NAMES, STEPS

from metricfold import JSONLSink, MetricsAggregator, MetricsLogger
from metricfold.torch import DeviceAccumulator

ACCUMULATED = 2  # steps of ours, which are DeepSpeed's microbatches
OVERFLOWS = (
    3,
    4,
)  # whose gradients are infinite, so that DeepSpeed skips what it would do with them
CONFIG = {
    "train_micro_batch_size_per_gpu": 1,  # only counted with: batches may have any size
    "gradient_accumulation_steps": ACCUMULATED,
    "zero_optimization": {"stage": 2},
    "zero_allow_untested_optimizer": True,
    "bf16": {"enabled": True, "check_grad_overflow": True},
}


def train(folder, ledger, *, first, last):
    model = mixture.Model()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=CONFIG)
    aggregator = MetricsAggregator()  # after init_distributed(), which joins the ranks
    losses = DeviceAccumulator({"loss": "mean"}, NAMES, device=engine.device)
    if first > 1:
        _, state = engine.load_checkpoint(folder)
        aggregator.load_state_dict(state["metrics"])

    since_log = []
    with MetricsLogger([JSONLSink(folder / "log.jsonl")]) as logger:
        logger.rewind(first - 1)
        mark, mark_on_device = aggregator.mark(), losses.mark()
        for step in range(first, last + 1):
            batch = mixture.batch_of(step, torch.distributed.get_rank())
            aggregator.update(batch.pop("metrics"))
            logits = engine(batch["inputs"])
            loss = losses.token_loss(logits, batch["labels"], batch["dataset"])
            ledger.see(step, logits, batch)
            since_log.append(loss.item())
            engine.backward(loss * float("inf") if step in OVERFLOWS else loss)
            boundary = engine.is_gradient_accumulation_boundary()  # before step(), which counts on
            engine.step()
            if boundary:
                if not engine.was_step_applied():  # on all ranks alike
                    aggregator.rollback(mark)
                    losses.rollback(mark_on_device)
                    aggregator.record("skipped_steps", 1, "max")
                mark, mark_on_device = aggregator.mark(), losses.mark()
            if step % EVERY == 0:
                aggregator.drain(losses)
                logger.log(step, aggregator, prefix="train")  # every rank
                theirs = sum(since_log) / len(since_log)
                since_log.clear()
        aggregator.drain(losses)
        metrics = aggregator.state_dict()  # every rank
        engine.save_checkpoint(folder, client_state={"metrics": metrics})
    return theirs


def main(folder):
    deepspeed.init_distributed()
    ledger = mixture.Ledger()
    train(folder, ledger, first=1, last=BREAK)
    theirs = {"all/loss": train(folder, ledger, first=BREAK + 1, last=STEPS)}
    ranks, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    truth = ledger.losses(STEPS - EVERY + 1, STEPS) | mixture.counted(
        STEPS, ranks, without=OVERFLOWS
    )
    ours = mixture.last_logged(folder / "log.jsonl", truth) if rank == 0 else {}
    return theirs, ours, truth


if __name__ == "__main__":
    theirs, ours, truth = main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/deepspeed"))
    if ours:
        print(mixture.table(theirs, ours, truth))
