"""`MetricfoldMixin`: metrics per dataset inside the Trainer of HF Transformers.

    class Trainer(MetricfoldMixin, transformers.Trainer):
        pass

    trainer = Trainer(model, args, data_collator=pad, train_dataset=mixture, loss_per_dataset=True)
    trainer.train()        # the log, TensorBoard, ...: docs/loss, code/loss, docs/tokens_seen, ...

The samples carry their metrics under ``"metrics"``, as a `MetricTransform` or `with_metrics` leaves them
there; they count when a step has consumed them. A `TrainerCallback` could not do this: it never sees a batch, trackers
that ran before it miss what it adds in ``on_log``, and only the saving rank is asked for its state.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from metricfold._core.fold.batch import MetricBatch
from metricfold._core.view.alert import Severity, check_severity
from metricfold._core.view.tables import Rollup, check_rollup
from metricfold._core.view.windows import WindowLike
from metricfold.data.collator import DATASET_IDS, MetricsCollator, mapping_of
from metricfold.data.ids import DatasetIds, dataset_ids, predicted
from metricfold.data.origin import check_origins, noted
from metricfold.data.sample import METRICS
from metricfold.integrations.phases import Phases
from metricfold.integrations.trl import InTRL
from metricfold.metric import Metric
from metricfold.sinks.selection import require

for _package in ("transformers", "accelerate", "torch"):
    require(_package, sink=__name__, extra="transformers")

import torch

from metricfold._core.device.rows import Accumulator
from metricfold.torch import DeviceAccumulator

__all__ = ["CHECKPOINT_FILE", "MetricfoldMixin"]

CHECKPOINT_FILE = "metricfold.json"
"""The file of metrics in a checkpoint's folder, which holds `MetricsAggregator.state_dict` as JSON."""

_IGNORED = -100
"""The label that the losses of transformers leave out."""

_ROOM = 16
"""For so many datasets the loss has room at first."""

_CAUSAL_BY_DEFAULT = {"GPT2LMHeadModel"}
"""Models that have no loss type, and take that of causal language models as the default."""

_Trainer: Any = object  # in the end a `transformers.Trainer`, from 4.50 on


class MetricfoldMixin(InTRL, Phases, _Trainer):  # type: ignore[misc]
    """Makes a Trainer take in, reduce, log and save the metrics that its samples carry.

    Name it before the Trainer: ``class Trainer(MetricfoldMixin, transformers.Trainer)``. It takes
    the Trainer's own arguments, and three more.

    Args:
        rollup: which totals over datasets are reported, as ``all/{name}`` and, with ``"levels"``,
            ``{level}/{name}``; see `Snapshot.as_dict`. A key that is in the Trainer's logs or
            metrics already, such as one of ``compute_metrics``, stays what it is.
        loss_per_dataset: report ``{dataset}/loss``: the mean loss per token of each dataset, and
            ``all/loss``, over all ranks. The dataset of a sample is that of its metrics. For
            causal language models, and for trainers of TRL, whose losses of pairs and examples come with
            their rewards; the loss that is back-propagated is what it was.
        stop_on: stop training, by ``control.should_training_stop``, when a rule of
            `MetricsAggregator.alert_on` has found something of this severity or worse: ``"severe"``,
            or ``"warning"``. All ranks stop after the same step.

    Attributes:
        aggregator: what training has brought. Add to it as you like, such as
            ``trainer.aggregator.record("lr_scale", 0.5)``, or replace it before ``train()``.
        eval_aggregator: what the evaluation under way has brought; each starts with none.
        accumulators: accumulators on the device, and `ModelWatch`es, of your own, to be read when the Trainer logs,
            saves or ends an evaluation.
        alerts: what rules have found, in the last log or evaluation in which they found something.

    Raises:
        ValueError: the Trainer is set up in a way that loses metrics or counts them several times;
            says what to set.
    """

    data_collator: Any
    _framework = "transformers"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        above = cls.__mro__[: cls.__mro__.index(MetricfoldMixin)]
        if any(_is_the_trainer(one) for one in above):
            raise TypeError(
                f"{cls.__name__} names MetricfoldMixin after the Trainer, which then never calls "
                f"it: write class {cls.__name__}(MetricfoldMixin, Trainer)"
            )

    def __init__(
        self,
        *args: Any,
        loss_per_dataset: bool = False,
        rollup: Rollup = True,
        stop_on: Severity | None = None,
        **kwargs: Any,
    ) -> None:
        if not any(map(_is_the_trainer, type(self).__mro__)):
            raise TypeError(
                "MetricfoldMixin is no Trainer by itself: write "
                "class Trainer(MetricfoldMixin, transformers.Trainer)"
            )
        check_rollup(rollup)
        if stop_on is not None:
            check_severity("stop_on", stop_on)
        self._rollup: Rollup = rollup
        self._stop_on = stop_on
        _ = self.aggregator, self.eval_aggregator  # now, in the same order on all ranks
        self.accumulators = []
        self._loss: DeviceAccumulator | None = None
        self._carried: _Carried | None = None  # by the batch at hand
        self._real = 0  # how many of its samples do not fill it up
        self._state_to_save: dict[str, Any] | None = None
        self._has_trained = False
        self._training_has_metrics = False
        super().__init__(*args, **kwargs)
        self._check_setup()
        self._check_phases(loss_per_dataset)
        if loss_per_dataset:
            if self._trl_trainer is None:
                _check_loss(self)
                self.compute_loss_func = self._loss_of_batch
            else:
                self._check_loss_of_trl()
            means = dict.fromkeys(self._of_tokens, "mean")
            self._loss = DeviceAccumulator(means, _ROOM, device=self.args.device)

    # -- Batches

    def get_train_dataloader(self) -> Any:
        return self._collating(super().get_train_dataloader, keep_samples=False)

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        return self._collating(super().get_eval_dataloader, *args, **kwargs)

    def get_test_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        return self._collating(super().get_test_dataloader, *args, **kwargs)

    def _collating(
        self, make: Callable[..., Any], *args: Any, keep_samples: bool = True, **kwargs: Any
    ) -> Any:
        """Make a loader that collates metrics too, with whatever collator there is."""
        given = (*args, *kwargs.values())
        self._check_dispatch(given)
        self._check_columns(given)
        if self._generates:  # of its samples, which stay apart until then
            return make(*args, **kwargs)
        own = self.data_collator
        folding = own if isinstance(own, MetricsCollator) else MetricsCollator(own)
        if self.args.remove_unused_columns:
            # Of what the model does not take, metrics may be made: so it goes when they have been.
            folding = copy.copy(folding)
            inner = super()._get_collator_with_removed_columns(folding.collate_fn)
            folding.collate_fn = inner
        wanted = None if self._loss is None else self._wanted_ids
        folding, as_seen = self._showing_tokens(folding)
        self.data_collator = partial(_collated, folding, keep_samples, wanted, as_seen)
        try:
            return make(*args, **kwargs)
        finally:
            self.data_collator = own

    def _remove_unused_columns(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        columns = getattr(dataset, "column_names", None) or ()
        if METRICS in columns or noted(dataset):
            return dataset
        return super()._remove_unused_columns(dataset, *args, **kwargs)

    def _get_collator_with_removed_columns(
        self, data_collator: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if isinstance(data_collator, partial) and data_collator.func is _collated:
            return data_collator  # which does it
        return super()._get_collator_with_removed_columns(data_collator, *args, **kwargs)

    # -- Steps

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        metrics = self._take(inputs)
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.aggregator.update(metrics)
        return loss

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        metrics = self._take(inputs)
        outputs = super().prediction_step(model, inputs, *args, **kwargs)
        self.eval_aggregator.update(metrics)
        return outputs

    def _take(self, inputs: Any) -> Sequence[Metric] | MetricBatch:
        """Take the metrics out of a batch, and note where its rows are from."""
        self._carried = None
        if self._generates:
            return []
        target = mapping_of(inputs)
        carried = target.pop(METRICS, None)
        if not isinstance(carried, _Carried):  # of a loader that the user has made
            return [] if carried is None else carried
        self._carried, self._real = carried, self._not_padded(carried.size)
        if isinstance(carried.metrics, MetricBatch):
            return carried.metrics
        return [metric for metrics in carried.metrics[: self._real] for metric in metrics]

    def _not_padded(self, size: int) -> int:
        """Return how many of the samples of this rank's batch are not there to fill it up.

        So that all ranks have as many batches of the same size, accelerate ends with samples from
        the beginning. Training does learn from them; in an evaluation they are repetitions.
        """
        loader = self.accelerator.gradient_state
        if not self._evaluating or not loader.end_of_dataloader or loader.remainder <= 0:
            return size
        # They are the last ones of all ranks' batches, taken rank by rank.
        left: int = loader.remainder - self.accelerator.process_index * size
        return min(max(left, 0), size)

    def _loss_of_batch(self, outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        """Return the loss that the model would, and take in that of each dataset."""
        carried = self._carried
        if self._loss is None or carried is None or carried.ids is None:
            raise ValueError(
                "loss_per_dataset=True, but this batch does not say which datasets its samples are "
                "from: let the Trainer make its own data loaders, and give it a data_collator"
            )
        logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
        # The labels move, not the logits, which are far larger.
        targets = torch.nn.functional.pad(labels, (0, 1), value=_IGNORED)[..., 1:].to(logits.device)
        accumulator = self._loss
        ids = accumulator.learn(predicted(carried.ids, tuple(labels.shape)))
        mark = accumulator.mark() if self._real < carried.size else None
        loss = accumulator.token_loss(logits, targets, ids, num_items=num_items_in_batch)
        if mark is not None:
            accumulator.rollback(mark)
            accumulator.token_loss(logits, self._of_real(targets), ids)
        return loss

    def _of_real(self, targets: torch.Tensor) -> torch.Tensor:
        """Return what places have to predict, but for samples that fill the batch up."""
        assert self._carried is not None
        if self._real >= self._carried.size:
            return targets
        real = targets.clone()
        if len(real) == self._carried.size:
            real[self._real :] = _IGNORED
        else:  # all samples in one row, of which a place predicts the next
            real[..., max(sum(self._carried.lengths[: self._real]) - 1, 0) :] = _IGNORED
        return real

    @property
    def _all_accumulators(self) -> list[Accumulator]:
        return [*self.accumulators, *([] if self._loss is None else [self._loss])]

    # -- Logs

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log `logs`, and what has come in; every rank takes part if the log is the Trainer's own.

        Other logs, such as ``trainer.log({"my": 1.0})`` anywhere, go by untouched, for not all
        ranks may make them. An evaluation's values are in its logs already.
        """
        if {"loss", "learning_rate"} <= logs.keys():
            self._add(logs, "", "auto")
        elif "train_runtime" in logs:
            self._add(logs, "train_", "run")
        super().log(logs, *args, **kwargs)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Evaluate, and add what the samples had to say to the result's metrics; on every rank."""
        with self._evaluation():
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
            self._add(output.metrics, f"{metric_key_prefix}_", "interval")
        return output

    def _add(self, metrics: dict[str, float], prefix: str, window: WindowLike) -> None:
        """Reduce, and add the values to the Trainer's metrics, whose own stay what they are.

        ``train_docs/loss`` becomes ``{prefix}docs/loss``, and ``train/loss``, of all datasets or of
        none, ``{prefix}all/loss``, for ``loss`` is the Trainer's.
        """
        snapshot = self._reduced(self.state.global_step)
        if self._evaluating and snapshot.empty:
            if self._training_has_metrics:
                self._warn(
                    f"an evaluation has brought no metrics, while training does ({prefix}...): let its "
                    "samples carry some too, as by with_metrics() or a MetricTransform",
                    "eval_dataset",
                )
            return
        self._training_has_metrics |= not self._evaluating and not snapshot.empty
        named: dict[str, float] = {}
        phase = "eval" if self._evaluating else "train"
        for key, value in snapshot.as_dict(phase, window, rollup=self._rollup).items():
            rest = key.removeprefix(phase)
            of_all = rest.startswith("/")
            name = prefix + (f"all{rest}" if of_all else rest[1:])
            if name in named:
                self._warn(
                    f"{name!r} is of a dataset named 'all', and of all datasets together: the first "
                    "is kept and the other left out; to have both, give one of them another name",
                    name,
                )
            if name not in named or not of_all:
                named[name] = value
        theirs = "the Trainer's own already, and one of ours"
        taken = metrics.keys() | self._keys_of_trl()
        metrics.update(self._without_theirs(named, taken, theirs))

    def _stop(self) -> None:
        self.control.should_training_stop = True

    def _is_first(self) -> bool:
        return bool(self.is_world_process_zero())

    # -- Checkpoints

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self.aggregator.pause():
            self._state_to_save = self._state()  # on all ranks: only some will save it
            try:
                super()._save_checkpoint(*args, **kwargs)
            finally:
                self._state_to_save = None

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Save the model and, into a checkpoint, the metrics.

        Of what a checkpoint consists of, the model comes first: so the metrics are there before
        the folder is uploaded, and before older ones are deleted.
        """
        super().save_model(output_dir, *args, **kwargs)
        if self._state_to_save is not None and output_dir is not None and self.args.should_save:
            file = Path(output_dir, CHECKPOINT_FILE)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(self._state_to_save), encoding="utf-8")

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Train, from a checkpoint or from the start; called anew when a batch was too large."""
        checkpoint = kwargs.get("resume_from_checkpoint")
        for accumulator in self._all_accumulators:
            accumulator.empty()
        if self._has_trained:
            self.aggregator.reset()
        if checkpoint is not None:
            self._load_metrics(Path(checkpoint, CHECKPOINT_FILE))
        self._has_trained = True
        return super()._inner_training_loop(*args, **kwargs)

    def _load_metrics(self, file: Path) -> None:
        try:
            state = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            warnings.warn(
                f"the checkpoint {str(file.parent)!r} holds no {CHECKPOINT_FILE}, as one that was "
                "saved without MetricfoldMixin: metrics start from nothing",
                RuntimeWarning,
                stacklevel=2,
            )
            return
        except ValueError as error:
            raise ValueError(
                f"{str(file)!r} is damaged ({error}): resume from another checkpoint, or delete "
                "this file to let metrics start from nothing"
            ) from error
        self._load(state)

    # -- What cannot work

    def _check_setup(self) -> None:
        given = {"train_dataset": self.train_dataset, "eval_dataset": self.eval_dataset}
        self._check_dispatch(given.values())
        self._check_columns(given.values())
        sizes = ("get_tp_size", "get_cp_size", "get_sp_size")
        if any(getattr(self, size)() > 1 for size in sizes if hasattr(self, size)):
            raise ValueError(
                "ranks that share a batch (tensor, context or sequence parallel) would each count "
                "its metrics: MetricfoldMixin works with data parallel ranks only"
            )

    def _check_columns(self, given: Iterable[Any]) -> None:
        """Refuse datasets that had metrics, and have lost them."""
        for one in _each(given):
            where = "train_dataset" if one is self.train_dataset else "a dataset of evaluation"
            check_origins(one, where)

    def _check_phases(self, loss_per_dataset: bool) -> None:
        """Say where samples of training carry metrics and those of an evaluation none, or the reverse."""
        trained = _carries_metrics(self.train_dataset)
        given = self.eval_dataset
        named = given.items() if isinstance(given, dict) else [("", given)]
        for name, dataset in named:
            evaluated = _carries_metrics(dataset)
            if trained is None or evaluated is None or trained == evaluated:
                continue
            which = f"eval_dataset[{name!r}]" if name else "eval_dataset"
            without, others = (which, "train_dataset") if trained else ("train_dataset", which)
            message = (
                f"the samples of {without} carry no metrics, while those of {others} do: let them carry some "
                "too, as by with_metrics() or a MetricTransform"
            )
            if loss_per_dataset:
                raise ValueError(f"loss_per_dataset=True, but {message}")
            self._warn(f"{message}, or nothing of them is reported", without)

    def _check_dispatch(self, given: Iterable[Any]) -> None:
        """Refuse loaders that read on one rank and send tensors to the others."""
        dispatch = self.args.accelerator_config.dispatch_batches
        iterable = any(isinstance(one, torch.utils.data.IterableDataset) for one in _each(given))
        if dispatch or (dispatch is None and iterable):
            default = "" if dispatch else ", the default for iterable datasets,"
            raise ValueError(
                f"dispatch_batches=True{default} reads batches on one rank and sends the others "
                "their tensors, without metrics: set "
                'TrainingArguments(accelerator_config={"dispatch_batches": False})'
            )


def _each(given: Iterable[Any]) -> list[Any]:
    """Return datasets, also those of a dict of them."""
    return [one for x in given for one in (x.values() if isinstance(x, dict) else (x,))]


def _carries_metrics(dataset: Any) -> bool | None:
    """Return whether samples carry metrics; None where that is not known without reading one.

    To read one may cost much, and draw random numbers.
    """
    columns = getattr(dataset, "column_names", None)
    if columns is not None:
        return METRICS in columns
    if isinstance(dataset, list | tuple) and dataset and isinstance(dataset[0], Mapping):
        return METRICS in dataset[0]
    return None


# -- What a batch carries --------------------------------------------------------------------------


@dataclass(slots=True)
class _Carried:
    """A batch's entry ``"metrics"`` between the data worker and the step.

    Like a `MetricBatch` it stays what it is when batches are moved.
    """

    size: int  # how many samples there are
    metrics: MetricBatch | list[list[Metric]]  # of all, or of each where some may be repetitions
    ids: DatasetIds | None  # if they were asked for
    lengths: list[int]  # of each sample, in tokens; likewise

    def to(self, *args: object, **kwargs: object) -> _Carried:
        return self

    def pin_memory(self, device: object = None) -> _Carried:
        return self


def _collated(
    collator: MetricsCollator,
    keep_samples: bool,
    wanted: str | None,
    as_seen: Callable[[Any], Any] | None,
    samples: Sequence[Any],
) -> Any:
    """Collate a batch that carries metrics.

    Args:
        collator: of batch and metrics.
        keep_samples: keep the metrics of each sample apart.
        wanted: the ids of the ``"batch"``, as it is collated, or of ``"samples"``, whatever they become.
        as_seen: makes of a sample what its metrics are made of, if that is another.
        samples: of the batch.
    """
    seen = [*samples] if as_seen is None else [*map(as_seen, samples)]
    of_batch = collator.dataset_ids or wanted == "batch"
    batch, taken, ids = collator.collate(seen, dataset_ids=of_batch)
    parts = [one.parts for one in taken] if wanted else []
    lengths = [sum(length or 0 for _, length in one) for one in parts]
    metrics = [one.metrics for one in taken] if keep_samples else collator.fold(taken)
    target = mapping_of(batch)
    if collator.dataset_ids:
        target[DATASET_IDS] = ids
    ids = dataset_ids(parts, {}) if wanted == "samples" else ids
    target[METRICS] = _Carried(len(taken), metrics, ids, lengths)
    return batch


# -- Loss per dataset ------------------------------------------------------------------------------


def _check_loss(trainer: _Trainer) -> None:
    """Refuse to compute the loss of a Trainer whose loss is another."""
    from transformers.loss.loss_utils import (  # noqa: PLC0415 - slow, and loaded by now
        LOSS_MAPPING,
        ForCausalLMLoss,
    )

    config = getattr(trainer.model, "config", None)  # any model may be trained
    text = getattr(config, "get_text_config", lambda: config)()
    kind = LOSS_MAPPING.get(getattr(trainer.model, "loss_type", ""))
    if type(trainer.model).__name__ in _CAUSAL_BY_DEFAULT:
        kind = ForCausalLMLoss
    obstacles = {
        "compute_loss_func": trainer.compute_loss_func is not None,
        "label_smoothing_factor": trainer.args.label_smoothing_factor != 0,
        "use_liger_kernel": trainer.args.use_liger_kernel,
        "a model whose loss is not that of causal language models": kind is not ForCausalLMLoss,
        "an encoder": getattr(config, "is_encoder_decoder", False),
        "output_router_logits, which adds to the loss": getattr(
            text, "output_router_logits", False
        ),
    }
    found = [name for name, there in obstacles.items() if there]
    if found:
        raise ValueError(
            f"loss_per_dataset=True does not go with {' and '.join(found)}: leave it out, and write "
            "a compute_loss with a DeviceAccumulator of your own, listed in trainer.accumulators"
        )


def _is_the_trainer(cls: type) -> bool:
    """Return whether this is `transformers.Trainer`, without importing it, which takes seconds."""
    return cls.__module__ == "transformers.trainer" and cls.__name__ == "Trainer"
