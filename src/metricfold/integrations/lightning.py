"""`MetricfoldCallback`: metrics per dataset inside Lightning's Trainer.

    metrics = MetricfoldCallback()
    trainer = Trainer(callbacks=[metrics], logger=CSVLogger("runs"))
    trainer.fit(model, DataLoader(mixture, batch_size=8, collate_fn=MetricsCollator(pad)))

The callback takes a batch's metrics out before `training_step` sees it, and lets them count when the
step is over. Lightning's hooks run on all ranks, also those about checkpoints: so metrics are reduced
over all of them, and rank 0 hands the result to the Trainer's own loggers.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from metricfold._core.fold.batch import MetricBatch
from metricfold._core.runtime.copies import OneInUse
from metricfold._core.runtime.processes import TaskThread
from metricfold._core.view.alert import Severity, check_severity
from metricfold._core.view.tables import Rollup, check_rollup
from metricfold._core.view.windows import WindowLike, check_window
from metricfold.data.sample import METRICS
from metricfold.integrations.phases import Phases
from metricfold.sinks.selection import require

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import Callback

    from metricfold._core.device.rows import Accumulator
    from metricfold._core.intake.aggregator import MetricsAggregator
else:
    # One library by two names, and each Trainer takes callbacks of its own.
    _found = [name for name in ("lightning", "pytorch_lightning") if find_spec(name) is not None]
    if not _found:
        require("lightning", sink=__name__, extra="lightning")
    if min(_found, key=lambda name: name not in sys.modules) == "lightning":
        from lightning.pytorch.callbacks import Callback
    else:
        from pytorch_lightning.callbacks import Callback

import torch

__all__ = ["MetricfoldCallback"]


_PATIENCE = 10.0
"""So many seconds a rank that saves after an exception waits for the others."""


class MetricfoldCallback(Phases, OneInUse, Callback):
    """Takes in, reduces, logs and saves the metrics that batches carry.

    Args:
        aggregator: of what training brings; default: a new one.
        eval_aggregator: of what a validation or test brings; default: a new one.
        accumulators: accumulators on the device that your steps fill, and `ModelWatch`es; they are read when there is a
            log or a checkpoint. The list `accumulators` may also be filled later, as in a module's
            `on_fit_start`.
        window: what a log of training speaks about, as in `Snapshot.as_dict`; ``"auto"``: totals
            over the run, everything else over the time since the log before.
        rollup: which totals over datasets there are, as in `Snapshot.as_dict`.
        stop_on: stop training, by ``trainer.should_stop``, when a rule of `MetricsAggregator.alert_on`
            has found something of this severity or worse: ``"severe"``, or ``"warning"``. All ranks
            stop after the same step. What was found is in `alerts`, and a warning of the log.

    Keys are ``train_{dataset}/{name}``, and ``train/{name}`` for all datasets together, be it one or
    many, and for what is recorded without one; of evaluations ``val`` and ``test``. They are logged at
    the Trainer's ``global_step``, and are in ``trainer.callback_metrics`` of all ranks, for such
    callbacks as `EarlyStopping` to monitor. A key that the module logs itself, by `self.log`, stays
    its own. An evaluation speaks about itself alone, and Lightning's sanity check about nothing; the
    time of an evaluation is a pause in that of training.

    Raises:
        ValueError: there is another one in the Trainer, or ranks share batches.
    """

    _framework = "lightning"
    _so_that_they_count = " and set DataLoader(collate_fn=MetricsCollator(...))"

    def __init__(
        self,
        *,
        aggregator: MetricsAggregator | None = None,
        eval_aggregator: MetricsAggregator | None = None,
        accumulators: Iterable[Accumulator] = (),
        window: WindowLike = "auto",
        rollup: Rollup = True,
        stop_on: Severity | None = None,
    ) -> None:
        super().__init__()
        check_window(window)
        check_rollup(rollup)
        if stop_on is not None:
            check_severity("stop_on", stop_on)
        self._stop_on = stop_on
        self.accumulators = [*accumulators]
        self.window = window
        self.rollup = rollup
        if aggregator is not None:
            self.aggregator = aggregator
        if eval_aggregator is not None:
            self.eval_aggregator = eval_aggregator
        self._trainer: Trainer | None = None  # the one that has called setup
        self._taken: list[MetricBatch] = []  # of the step under way
        self._phase = contextlib.ExitStack()  # an evaluation, while there is one
        self._trial: contextlib.ExitStack | None = None  # of the Tuner, while there is one
        self._unlearned = contextlib.ExitStack()  # a batch that no step learns from
        self._logged_step = 0
        self._monitored: dict[str, torch.Tensor] = {}  # what callback_metrics has from here

    # -- The Trainer

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if sum(isinstance(callback, MetricfoldCallback) for callback in callbacks) > 1:
            raise ValueError(
                "this Trainer has several MetricfoldCallbacks, of which the first would take all "
                "metrics: leave one, in Trainer(callbacks=...) or in configure_callbacks()"
            )
        sampler = getattr(trainer.strategy, "distributed_sampler_kwargs", None) or {}
        if sampler.get("num_replicas", trainer.world_size) != trainer.world_size:
            raise ValueError(
                "ranks that share a batch (tensor parallel) would each count its metrics: "
                "MetricfoldCallback works with data parallel ranks only"
            )
        self._end()  # what another Trainer has left
        self._trainer = trainer
        self._look_out_for_trials(trainer)
        self._leave_hyperparameters(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._end()
        vars(trainer.strategy).pop("batch_to_device", None)
        self._trainer = None

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        with contextlib.suppress(RuntimeError):  # of a device that has failed, too
            self._end()

    def _end(self) -> None:
        """Leave whatever is under way."""
        self._unlearned.close()
        self._end_trial()
        self._phase.close()

    def _end_trial(self) -> None:
        trial, self._trial = self._trial, None
        if trial is not None:
            trial.close()

    def _look_out_for_trials(self, trainer: Trainer) -> None:
        """Take the metrics out of the Tuner's batches, and let nothing of them count.

        For its trials the Tuner sets all callbacks aside: no hook of ours is called. Batches come by
        the strategy all the same. Before, it saves a checkpoint, and after, it restores that.
        """
        strategy = trainer.strategy
        move = strategy.batch_to_device

        def moved(*args: Any, **kwargs: Any) -> Any:
            batch = move(*args, **kwargs)
            if self in trainer.callbacks:  # type: ignore[attr-defined]
                self._end_trial()
                return batch
            if self._trial is None:
                self._trial = contextlib.ExitStack()
                self._trial.enter_context(self._uncounted())
            self._take(batch)
            return batch

        vars(strategy)["batch_to_device"] = moved

    # -- Batches

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, *_: Any, **__: Any
    ) -> None:
        self._taken = self._take(batch)

    # The step of a prediction need not know of them either; there nothing counts.
    on_test_batch_start = on_predict_batch_start = on_validation_batch_start

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        self._count(batch)

    on_test_batch_end = on_validation_batch_end  # type: ignore[assignment]

    # -- Training

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._logged_step = trainer.global_step

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._unlearned.close()
        self._taken = self._take(batch)
        if _passes_over(trainer):
            self._unlearned.enter_context(self._uncounted())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        if _passes_over(trainer):
            self._take(batch)
            self._unlearned.close()
            return
        self._count(batch)
        # Several batches may make one step (accumulated gradients), or one several (optimizers). The
        # last batch of an epoch is one to log, so that whoever looks when it has ended, in whatever
        # order callbacks stand, finds its values.
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        due = bool(every) and trainer.global_step // every > self._logged_step // every
        if due or (trainer.is_last_batch and trainer.global_step > self._logged_step):
            self._log(trainer, "train", self.window)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step > self._logged_step:
            self._log(trainer, "train", self.window)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log(trainer, "train", self.window)  # what came after, as in the module's hooks

    # -- Evaluation

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._phase.close()
        self._phase.enter_context(self._evaluation())

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # In the end of the epoch, for other callbacks look at its values when all of it has ended.
        if not trainer.sanity_checking:
            self._log(trainer, "val", "interval")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._phase.close()

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log(trainer, "test", "interval")

    on_test_start, on_test_end = on_validation_start, on_validation_end

    # -- Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the run's metrics; the Trainer calls it on all ranks.

        After an exception other ranks may not come: there it waits for them for some seconds, and
        then returns the state as of the last reduction, with a warning that says so.
        """
        trainer = self._trainer
        if trainer is None or not trainer.interrupted or trainer.world_size == 1:
            return self._state()
        # That thread may be left behind: it ends with the process, which will not last.
        asked = TaskThread("metricfold-lightning").submit(self._state)
        with contextlib.suppress(Exception):
            return asked.result(_PATIENCE)
        self._warn(
            f"a checkpoint is saved after an exception, at step {trainer.global_step}, but not all "
            "ranks have come to it: its metrics are those of the last log or checkpoint, since "
            "which they lack something"
        )
        return self.aggregator.state_dict(sync=False)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict` in a fit; an evaluation of a checkpoint leaves the metrics alone."""
        self._end_trial()
        if self._resumes(self._trainer):
            self._load(state_dict)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._resumes(trainer) and self.state_key not in checkpoint.get("callbacks", {}):
            self._warn(
                "the checkpoint holds no metrics, as one that was saved without "
                "MetricfoldCallback: they start from nothing"
            )

    # -- Inside

    def _leave_hyperparameters(self, pl_module: LightningModule) -> None:
        """Leave what a checkpoint would pickle, as Lightning drops all that cannot be when a fit begins.

        Then this could, for it was not in use.
        """
        hparams = pl_module.hparams
        for name in [name for name, value in hparams.items() if value is self]:
            del hparams[name]
            self._warn(
                f"a MetricfoldCallback cannot be saved as the hyperparameter {name!r} and was left out: "
                f"write save_hyperparameters(ignore=[{name!r}])"
            )

    def _in_use(self) -> bool:
        # A module keeps the callback, and weight averaging copies the module.
        made = {"aggregator", "eval_aggregator"} & vars(self).keys()
        return self._trainer is not None or bool(made)

    def _stop(self) -> None:
        if self._trainer is not None:
            self._trainer.should_stop = True

    def _is_first(self) -> bool:
        return self._trainer is None or self._trainer.is_global_zero

    def _take(self, batch: Any) -> list[MetricBatch]:
        """Take the metrics out of a batch."""
        taken = []
        for carrier in _carriers(batch):
            metrics = carrier.get(METRICS)
            if isinstance(metrics, MetricBatch):
                taken.append(carrier.pop(METRICS))
            elif carrier is batch and (isinstance(metrics, list) or _are_numbers(metrics)):
                self._warn(
                    f"the batch's 'metrics' are a {type(metrics).__name__}, which nobody counts: set "
                    "DataLoader(collate_fn=MetricsCollator(...))",
                    "no metrics",
                )
        return taken

    def _count(self, batch: Any) -> None:
        """Take in what the step under way had; a batch that it fetched itself still carries it."""
        for metrics in (*self._taken, *self._take(batch)):
            self._into.update(metrics)
        self._taken = []

    def _log(self, trainer: Trainer, prefix: str, window: WindowLike) -> None:
        """Reduce, and hand out the values; on every rank."""
        step = trainer.global_step
        snapshot = self._reduced(step)
        if not self._evaluating:
            self._logged_step = step
        if snapshot.empty:
            return
        monitored = trainer.callback_metrics
        values = snapshot.as_dict(prefix, window, rollup=self.rollup)
        others = {key for key, one in monitored.items() if one is not self._monitored.get(key)}
        theirs = others.union(_logged_by(trainer))
        values = self._without_theirs(values, theirs, "logged by the module too, as by self.log()")
        tensors = {key: torch.tensor(value, dtype=torch.float64) for key, value in values.items()}
        self._monitored.update(tensors)
        monitored.update(tensors)
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics({"epoch": trainer.current_epoch, **values}, step=step)
                logger.save()

    @staticmethod
    def _resumes(trainer: Trainer | None) -> bool:
        return trainer is None or trainer.state.fn == "fit"


def _passes_over(trainer: Trainer) -> bool:
    """Return whether no step learns from the batches, as where only batch norms are made anew.

    `StochasticWeightAveraging` reads the data once more for them, after the last epoch.
    """
    return bool(getattr(trainer.fit_loop, "_skip_backward", False))


def _logged_by(trainer: Trainer) -> Iterator[str]:
    """Yield the keys that the module logs, also those whose values come at the end of an epoch."""
    results: Mapping[str, Any] = getattr(trainer, "_results", None) or {}
    for result in results.values():
        name = result.meta.name
        yield from (name, f"{name}_step", f"{name}_epoch")


def _are_numbers(metrics: object) -> bool:
    """Return whether these are what rows of datasets carry, collated as if they were data."""
    return isinstance(metrics, torch.Tensor) and metrics.dtype == torch.int64 and metrics.ndim > 0


def _carriers(batch: Any) -> Iterator[MutableMapping[str, Any]]:
    """Yield what may carry metrics: a mapping, also as the first item of a list or tuple.

    Either may be one of several batches, as a `CombinedLoader` puts them together.
    """
    parts = batch.values() if isinstance(batch, Mapping) else batch
    several = isinstance(batch, Mapping | list | tuple)
    for part in (batch, *parts) if several else (batch,):
        first = part[0] if isinstance(part, list | tuple) and part else part
        if isinstance(first, MutableMapping):
            yield first
