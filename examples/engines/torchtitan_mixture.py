"""torchtitan: a `MetricsProcessor` with losses and totals of each dataset, in torchtitan's checkpoint.

    torchrun --nproc-per-node 2 examples/engines/torchtitan_mixture.py folder 6
    torchrun --nproc-per-node 2 examples/engines/torchtitan_mixture.py folder 8

The second goes on from the first's checkpoint.
"""

import json
import sys
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import cpu_for_torchtitan  # noqa: F401 - a GPU has no need of it
import mixture
import torch
from mixture import BREAK, EVERY, NAMES
from torch.distributed.fsdp import FSDPModule
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config import ParallelismConfig, TrainingConfig
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.llama3 import model_registry
from torchtitan.trainer import Trainer

from metricfold import JSONLSink, MetricsAggregator, MetricsLogger, read_jsonl
from metricfold.torch import DeviceAccumulator

LONGEST, ROWS = 40, 5


class MetricfoldProcessor(MetricsProcessor):
    """torchtitan's own metrics as ever, and beside them those of each dataset."""

    @dataclass(kw_only=True, slots=True)
    class Config(MetricsProcessor.Config):
        path: str = "run.jsonl"
        datasets: tuple[str, ...] = ()

    def __init__(self, config, **parts):
        super().__init__(config, **parts)
        self.aggregator = MetricsAggregator()  # of all ranks; with TP, CP or PP see the page
        device = self.device_memory_monitor.device
        self.losses = DeviceAccumulator({"loss": "mean"}, config.datasets, device=device)
        self.ids = deque()  # of the microbatches whose loss is still to come
        self.metricfold = MetricsLogger([JSONLSink(config.path)], config=parts["config_dict"])

    def log(self, step, global_avg_loss, global_max_loss, grad_norm, extra_metrics=None):
        super().log(step, global_avg_loss, global_max_loss, grad_norm, extra_metrics)
        self.aggregator.drain(self.losses)
        titans = {"global_avg_loss": global_avg_loss, "grad_norm": grad_norm, **extra_metrics}
        self.metricfold.log(step, self.aggregator, prefix="train", extra=titans)  # every rank

    def close(self):
        self.metricfold.close()
        super().close()


class DatasetLoss(CrossEntropyLoss):
    """torchtitan's loss; on the side it takes in that of each token."""

    @dataclass(kw_only=True, slots=True)
    class Config(CrossEntropyLoss.Config):
        pass

    def __call__(self, pred, labels, global_valid_tokens=None, **kwargs):
        processor = self.trainer.metrics_processor
        if processor.ids:  # a validation has none
            dataset = processor.ids.popleft()
            processor.losses.token_loss(pred.detach(), labels, dataset)
            batch = {"labels": labels, "dataset": dataset}
            self.trainer.ledger.see(self.trainer.step, pred, batch)
        return super().__call__(pred, labels, global_valid_tokens, **kwargs)


class MetricfoldTrainer(Trainer):
    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        pass

    def __init__(self, config):
        super().__init__(config)
        self.loss_fn.trainer = self
        self.ledger = mixture.Ledger()

    def batch_generator(self, data_iterable):
        for inputs, labels in super().batch_generator(data_iterable):
            self.metrics_processor.aggregator.update(inputs.pop("metrics"))
            yield inputs, labels

    def post_dataloading_process(self, input_dict, labels):
        self.metrics_processor.ids.append(input_dict.pop("dataset"))
        return super().post_dataloading_process(input_dict, labels)

    def state_dict(self):  # asked for on every rank, at each checkpoint
        processor = self.metrics_processor
        processor.aggregator.drain(processor.losses)
        return {**super().state_dict(), "metricfold": processor.aggregator.state_dict()}

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self.metrics_processor.aggregator.load_state_dict(state_dict["metricfold"])
        self.metrics_processor.metricfold.rewind(self.step)


# -- What torchtitan is given to train with --------------------------------------------------------


class Batches(BaseDataLoader):
    """Rows of one length, so many of them on each rank; the first rank has little but padding."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        pass

    def __init__(self, config, *, dp_rank, **parts):
        self.rank, self.step = dp_rank, 0

    def __iter__(self):
        while True:
            self.step += 1
            batch = mixture.batch_of(self.step, self.rank)
            rows, length = batch["labels"].shape
            missing = (0, LONGEST - length, 0, ROWS - rows)
            labels = torch.nn.functional.pad(batch["labels"], missing, value=mixture.PAD)
            tokens = torch.nn.functional.pad(batch["inputs"], missing)
            dataset = torch.nn.functional.pad(batch["dataset"], missing[2:])
            yield {"input": tokens, "dataset": dataset, "metrics": batch["metrics"]}, labels

    def state_dict(self):
        return {f"step_of_{self.rank}": self.step}

    def load_state_dict(self, state):
        self.step = state[f"step_of_{self.rank}"]


class NoTokenizer(BaseTokenizer):
    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config, **parts):
        super().__init__()

    def encode(self, *args, **kwargs):
        raise NotImplementedError

    decode = encode

    def get_vocab_size(self):
        return 2048


def small_model():
    """Return a Llama of two layers, with the one attention that runs without a GPU."""
    spec = model_registry("debugmodel")
    spec.model.layers = spec.model.layers[:2]
    for layer in spec.model.layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    return spec


def train(folder, last):
    config = MetricfoldTrainer.Config(
        model_spec=small_model(),
        dump_folder=str(folder),
        tokenizer=NoTokenizer.Config(),
        dataloader=Batches.Config(),
        optimizer=default_adamw(lr=1e-3),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=1),
        loss=DatasetLoss.Config(),
        metrics=MetricfoldProcessor.Config(
            log_freq=EVERY, path=str(folder / "log.jsonl"), datasets=NAMES
        ),
        training=TrainingConfig(
            local_batch_size=ROWS, seq_len=LONGEST, steps=last, disable_cuda_graphs=True
        ),
        parallelism=ParallelismConfig(spmd_backend="partial_dtensor"),
        checkpoint=CheckpointManager.Config(
            enable=True, interval=BREAK, last_save_model_only=False
        ),
    )
    trainer = config.build()
    for module in trainer.model_parts[0].modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    seen = folder / f"ledger-{rank}.json"
    if seen.exists():
        trainer.ledger.seen = json.loads(seen.read_text())
    trainer.train()
    seen.write_text(json.dumps(trainer.ledger.seen))
    trainer.close()
    truth = trainer.ledger.losses(max(last - EVERY, 0) + 1, last) | mixture.counted(last, ranks)
    if rank == 0 and last % EVERY == 0:
        path = folder / "log.jsonl"
        titans = read_jsonl(path)[-1].metrics
        theirs = {"all/loss": titans["global_avg_loss"], "all/tokens_seen": titans["n_tokens_seen"]}
        print(mixture.table(theirs, mixture.last_logged(path, truth), truth))


if __name__ == "__main__":
    train(Path(sys.argv[1]), int(sys.argv[2]))
