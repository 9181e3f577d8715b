"""A training to be run by `torchrun --max-restarts`: the last rank is killed once, in step 6.

torchrun --standalone --nproc-per-node 2 --max-restarts 1 tests/restarted_training.py FOLDER

It kills itself; where there is FOLDER/killed-from-outside, it waits to be.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from parallel_trainings import DATASETS, batches, byte_model, items, sgd
from torch.nn.parallel import DistributedDataParallel

from metricfold import JSONLSink, MetricsAggregator, MetricsLogger
from metricfold.torch import DeviceAccumulator

STEPS, SAVE_EVERY, KILLED_IN = 8, 4, 6


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    restarts = os.environ["TORCHELASTIC_RESTART_COUNT"]
    (folder / f"{os.getpid()}.pid").touch()  # for the test, which leaves none behind
    model = DistributedDataParallel(byte_model())
    optimizer = sgd(model)
    acc, aggregator = DeviceAccumulator({"loss": "mean"}, DATASETS), MetricsAggregator()

    start, checkpoint = 0, folder / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        start = state["step"]
        model.module.load_state_dict(state["model"])
        aggregator.load_state_dict(state["metrics"])
    with (folder / f"started-{rank}.txt").open("a") as file:
        file.write(f"{restarts} {start}\n")

    with MetricsLogger([JSONLSink(folder / "log.jsonl")]) as logger:
        logger.rewind(start)
        for step, batch in enumerate(batches(rank, ranks, steps=range(start, STEPS)), start + 1):
            aggregator.update(batch.pop("metrics"))
            num_items = items(batch["labels"], None, ranks)
            loss = acc.token_loss(
                model(batch["inputs"]), batch["labels"], batch["dataset"], num_items=num_items
            )
            optimizer.zero_grad()
            if (rank, step) == (ranks - 1, KILLED_IN) and not (folder / "killed").exists():
                (folder / "killed").touch()
                if (folder / "killed-from-outside").exists():
                    time.sleep(600)
                os.kill(os.getpid(), signal.SIGKILL)
            loss.backward()
            optimizer.step()
            aggregator.drain(acc)
            logger.log(step, aggregator, prefix="train")
            if step % SAVE_EVERY == 0:
                metrics = aggregator.state_dict()
                if rank == 0:
                    state = {"step": step, "model": model.module.state_dict(), "metrics": metrics}
                    torch.save(state, checkpoint.with_suffix(".unfinished"))
                    checkpoint.with_suffix(".unfinished").replace(checkpoint)
    totals = aggregator.get_metrics_for_logging("run")
    (folder / f"totals-{rank}.json").write_text(json.dumps(totals))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
