"""Ray Train: a worker is killed, Ray starts all of them again, and every total is exact.

python examples/engines/ray_train.py [folder]
"""

import json
import os
import signal
import sys
import tempfile
from pathlib import Path

import mixture
import ray
import torch
from mixture import BREAK, EVERY, NAMES, STEPS
from ray import train
from ray.train import Checkpoint, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, get_device, prepare_model

from metricfold import JSONLSink, MetricsAggregator, MetricsLogger
from metricfold.torch import DeviceAccumulator

WORKERS = 2


def train_on_worker(config):
    folder, rank = Path(config["folder"]), train.get_context().get_world_rank()
    model = prepare_model(mixture.Model())
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    aggregator = MetricsAggregator()  # in the worker, where Ray has joined the ranks
    losses = DeviceAccumulator({"loss": "mean"}, NAMES, device=get_device())
    ledger, since_log, start, killed = mixture.Ledger(), [], 0, folder / "killed"

    if checkpoint := train.get_checkpoint():
        with checkpoint.as_directory() as directory:
            state = torch.load(Path(directory, "state.pt"), weights_only=True)
            ledger.seen = json.loads(Path(directory, f"ledger-{rank}.json").read_text())
        start = state["step"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        aggregator.load_state_dict(state["metrics"])  # every worker

    logger = MetricsLogger([JSONLSink(folder / "log.jsonl")])
    logger.rewind(start)
    for step in range(start + 1, STEPS + 1):
        if rank == 1 and step == BREAK + 2 and not killed.exists():
            train.get_all_reported_checkpoints()  # has the last one saved by now
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        batch = mixture.batch_of(step, rank)
        aggregator.update(batch.pop("metrics"))
        logits = model(batch["inputs"])
        loss = losses.token_loss(logits, batch["labels"], batch["dataset"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ledger.see(step, logits, batch)
        since_log.append(loss.item())
        if step % EVERY == 0:
            aggregator.drain(losses)
            snapshot = aggregator.reduce(step)  # every worker, and the same on each
            logger.log(step, snapshot, prefix="train")
            metrics = {**snapshot.as_dict("train"), "theirs": sum(since_log) / len(since_log)}
            since_log.clear()
        if step in (BREAK, STEPS):
            aggregator.drain(losses)
            state = {
                "step": step,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "metrics": aggregator.state_dict(),  # every worker
            }
            with tempfile.TemporaryDirectory() as directory:
                Path(directory, f"ledger-{rank}.json").write_text(json.dumps(ledger.seen))
                if rank == 0:
                    torch.save(state, Path(directory, "state.pt"))
                train.report(metrics, checkpoint=Checkpoint.from_directory(directory))
    logger.close()
    return ledger.losses(STEPS - EVERY + 1, STEPS), start


def main(folder):
    folder.mkdir(parents=True, exist_ok=True)
    trainer = TorchTrainer(
        train_on_worker,
        train_loop_config={"folder": str(folder.absolute())},
        scaling_config=ScalingConfig(num_workers=WORKERS),
        run_config=RunConfig(
            storage_path=str(folder.absolute()), failure_config=FailureConfig(max_failures=1)
        ),
    )
    result = trainer.fit()
    losses, started_at = result.return_value
    truth = losses | mixture.counted(STEPS, WORKERS)
    logged = mixture.last_logged(folder / "log.jsonl", truth)
    return {"all/loss": result.metrics["theirs"]}, logged, truth, started_at, result.metrics


if __name__ == "__main__":
    ray.init(
        num_cpus=WORKERS,
        include_dashboard=False,
        object_store_memory=80 * 2**20,
        log_to_driver=False,
    )
    theirs, ours, truth, started_at, _ = main(
        Path(sys.argv[1] if len(sys.argv) > 1 else "runs/ray")
    )
    print(f"a worker was killed; all went on after step {started_at}")
    print(mixture.table(theirs, ours, truth))
