"""Metrics through Hugging Face Accelerate: its checkpoints, its trackers, its padded batches.

    from metricfold.integrations.accelerate import TrackerSink, register

    accelerator = Accelerator(log_with="tensorboard", project_dir="runs")
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    aggregator = MetricsAggregator()
    register(accelerator, aggregator)                    # save_state() and load_state() have it
    logger = MetricsLogger([ConsoleSink(), TrackerSink(accelerator)])

A loader made with `MetricsCollator` can be prepared as it is: Accelerate's movers leave a
`MetricBatch` alone. Only `dispatch_batches`, which sends tensors and nothing else from the first
rank to the others, is out of the question; `register` refuses it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from metricfold.integrations.phases import Saved
from metricfold.sinks.keywise import KeywiseSink
from metricfold.sinks.record import Record
from metricfold.sinks.selection import SelectiveSink, require

require("accelerate", sink=__name__, extra="accelerate")

import accelerate
import torch
from accelerate.data_loader import BatchSamplerShard, DataLoaderDispatcher, IterableDatasetShard

if TYPE_CHECKING:
    from metricfold._core.device.rows import Accumulator
    from metricfold._core.intake.aggregator import MetricsAggregator

__all__ = ["TrackerSink", "register", "sample_weights"]


def register(
    accelerator: accelerate.Accelerator,
    aggregator: MetricsAggregator,
    *accumulators: Accumulator,
) -> None:
    """Let `accelerator.save_state` and `load_state` save and load `aggregator`.

    Call it on every rank, after `accelerator.prepare`. `save_state`, which all ranks call anyway,
    then is collective: the state that the first rank writes is that of all, and any number of ranks
    can load it.

    Args:
        accelerator: which saves and loads.
        aggregator: what is saved and loaded.
        accumulators: drained into the aggregator before each save, so that it holds all that they
            have taken in.

    Raises:
        ValueError: the aggregator is registered already, or batches are made on the first rank and
            dispatched to the others, as Accelerate does by default with iterable datasets.
    """
    for registered in accelerator._custom_objects:  # noqa: SLF001
        if isinstance(registered, _Checkpointed) and registered.aggregator is aggregator:
            raise ValueError(
                f"the aggregator {aggregator.name!r} is registered with this accelerator already, "
                "and its checkpoints would hold it twice: call register() once"
            )
    loaders = accelerator._dataloaders  # noqa: SLF001 - has all that were prepared
    if accelerator.dispatch_batches or any(isinstance(x, DataLoaderDispatcher) for x in loaders):
        raise ValueError(
            "the accelerator dispatches batches from the first rank (dispatch_batches=True, the "
            "default for iterable datasets), which takes tensors alone, and no metrics: let each "
            "rank load its own, with "
            "Accelerator(dataloader_config=DataLoaderConfiguration(dispatch_batches=False))"
        )
    accelerator.register_for_checkpointing(_Checkpointed(aggregator, accumulators))


class _Checkpointed(Saved):
    """What Accelerate saves and loads, on every rank."""

    _framework = "accelerate"

    def __init__(self, aggregator: MetricsAggregator, accumulators: Sequence[Accumulator]) -> None:
        self.aggregator = aggregator
        self.accumulators = [*accumulators]

    state_dict, load_state_dict = Saved._state, Saved._load  # noqa: SLF001 - of its own base


def sample_weights(accelerator: accelerate.Accelerator, samples: int) -> torch.Tensor:
    """Return 1 for each sample of this rank's batch, and 0 for what only fills it up.

    With ``even_batches=True``, its default, Accelerate repeats samples at the end of an epoch until
    all ranks have the same number of full batches. In training these are samples like any others.
    In an evaluation they count a second time, unless they have weight 0. Call it inside the loop
    over a prepared loader.

    Args:
        accelerator: which has prepared the loader.
        samples: how many samples this rank's batch has.

    Returns:
        float32 of shape (samples,), on the accelerator's device.

    Raises:
        RuntimeError: there is no loop over a prepared loader.
        ValueError: the dataset has no length, so that nothing tells what fills up from the rest.
    """
    loader = accelerator.gradient_state.active_dataloader
    if loader is None:
        raise RuntimeError(
            "sample_weights() speaks about the batch at hand: call it inside the loop over a loader "
            "that accelerator.prepare() returned"
        )
    weights = torch.ones(samples, device=accelerator.device)
    if accelerator.num_processes == 1 or not loader.end_of_dataloader:
        return weights
    if isinstance(loader.dataset, IterableDatasetShard) and not loader.dataset.drop_last:
        raise ValueError(
            "the dataset has no length, so nothing tells which samples of the last batch fill it "
            "up: use a map-style dataset, drop_last=True, or a datasets.IterableDataset with at "
            "least one shard per rank, which Accelerate does not fill up"
        )
    shards = (loader.batch_sampler, getattr(loader, "sampler", None))
    filled = any(isinstance(shard, BatchSamplerShard) and shard.even_batches for shard in shards)
    if filled and loader.remainder > 0:
        # Gathered in the order of ranks, the samples that fill up come last.
        weights[max(loader.remainder - accelerator.process_index * samples, 0) :] = 0
    return weights


class TrackerSink(KeywiseSink):
    """Hands scalars to the accelerator's trackers, as `accelerator.log` does, each by itself.

    Trackers take numbers and texts: histograms go to sinks of metricfold's own. Each tracker has a
    thread and a queue of its own: what one does not take, the others do. Close the logger before
    `accelerator.end_training()`, which ends the trackers.

    Args:
        accelerator: made with ``log_with=``. `accelerator.init_trackers` comes before the first
            record; MLflow's tracker then writes to the run that this has started.
        select: see `SelectiveSink`.
        key_format: see `SelectiveSink`.

    Raises:
        ValueError: the accelerator was made without ``log_with=``.
    """

    arrays = False

    def __init__(
        self,
        accelerator: accelerate.Accelerator,
        *,
        select: str | Sequence[str] = "*",
        key_format: str | Callable[[str], str] = "{key}",
    ) -> None:
        super().__init__(select=select, key_format=key_format)
        if not accelerator.log_with:
            raise ValueError(
                "the accelerator has no trackers: make it with Accelerator(log_with='tensorboard', "
                "project_dir='runs') or another tracker, or leave out the TrackerSink"
            )
        self._accelerator = accelerator
        self._part = partial(_Tracker, accelerator, select=select, key_format=key_format)

    def __repr__(self) -> str:
        return f"TrackerSink({self._accelerator.log_with!r})"

    def parts(self) -> Sequence[SelectiveSink]:
        """Return a sink for each tracker, if they are there already."""
        return [self._part(tracker) for tracker in self._accelerator.trackers] or [self]

    def close(self) -> None:
        """Do nothing: `accelerator.end_training` ends the trackers."""

    def _log(self, record: Record, values: dict[str, Any]) -> None:
        raise RuntimeError(
            "the accelerator's trackers were not there yet at the first log: call "
            "accelerator.init_trackers() before it"
        )


class _Tracker(TrackerSink):
    """One of the accelerator's trackers."""

    def __init__(self, accelerator: accelerate.Accelerator, tracker: Any, **chosen: Any) -> None:
        super().__init__(accelerator, **chosen)
        self._tracker = tracker
        # MLflow's active run belongs to the thread that has started it: on any other one,
        # mlflow.log_metrics starts another run.
        self._where = {"run_id": tracker.tracker.info.run_id} if tracker.name == "mlflow" else {}

    def __repr__(self) -> str:
        return f"TrackerSink({self._tracker.name!r})"

    def _log(self, record: Record, values: dict[str, Any]) -> None:
        self._tracker.log(values, step=record.step, **self._where)
