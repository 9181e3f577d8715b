"""What `MetricfoldMixin` does in the trainers of TRL, where they differ from the Trainer that they extend.

    class SFT(MetricfoldMixin, trl.SFTTrainer):
        pass

They prepare datasets: they tokenise, cut and pack. They have losses of their own, of tokens, pairs or
examples. And those that generate take batches that are lists of prompts, each of them several times.

Nothing here imports TRL: it is there if a trainer is one of its own.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from metricfold.data.ids import predicted
from metricfold.data.sample import METRICS, take
from metricfold.metric import Metric
from metricfold.sinks.selection import require

require("torch", sink=__name__, extra="trl")

import torch

if TYPE_CHECKING:
    from metricfold._core.intake.aggregator import MetricsAggregator
    from metricfold.data.collator import MetricsCollator

__all__ = ["InTRL"]

_LOSSES = {
    "SFTTrainer": "_take_tokens",
    "DPOTrainer": "_take_pairs",
    "RewardTrainer": "_take_preferences",
    "KTOTrainer": "_take_examples",
}
"""What takes in the loss of each dataset, by the trainer that computes it."""

_OF_TOKENS = ("loss", "entropy", "mean_token_accuracy")
"""What `SFTTrainer` logs of each token."""

_OF_PAIRS = ("loss", "rewards/", "logps/")
"""What `DPOTrainer` logs of each pair begins so; the rest is of tokens."""

_OF_REWARDS = {
    "loss": "mean",
    "accuracy": "mean",
    "margin": "mean",
    "mean_reward": "mean",
    "min_reward": "min",
    "max_reward": "max",
}
"""What `RewardTrainer` logs, and how it aggregates."""

_OF_COMPLETIONS = {
    "completions/clipped_ratio": "mean",
    "frac_reward_zero_std": "mean",
    "num_tokens": "sum",
}
"""How what TRL logs of completions aggregates, where that is no distribution."""

_SEQUENCES = ("chosen_ids", "rejected_ids", "completion_ids")
"""Columns of tokens that follow those of a prompt."""

_WHOLE_SEQUENCES = ("chosen_input_ids", "rejected_input_ids")
"""Columns of tokens that have the prompt in them."""

_IGNORED = -100
"""The label that TRL's losses leave out."""

_Trainer: Any = object  # in the end one of TRL's, or a `transformers.Trainer`


class InTRL(_Trainer):  # type: ignore[misc]
    """The part of `MetricfoldMixin` that TRL's trainers alone call, or need."""

    accelerator: Any
    args: Any
    data_collator: Any
    model: Any
    _into: MetricsAggregator
    _real: int
    _loss: Any
    _carried: Any
    _of_real: Callable[[torch.Tensor], torch.Tensor]
    _not_padded: Callable[[int], int]
    _scored: tuple[Any, torch.Tensor] | None = None  # completions, and what they are worth

    @property
    def _trl_trainer(self) -> str | None:
        """The first of TRL's trainers that this one extends; None: it extends none."""
        return next(
            (c.__name__ for c in type(self).__mro__ if c.__module__.startswith("trl.")), None
        )

    # -- Datasets

    def _prepare_dataset(self, *args: Any, **kwargs: Any) -> Any:
        """Let TRL tokenise and pack a dataset, whose tokens know afterwards which dataset they are of."""
        prepare = super()._prepare_dataset
        call = inspect.signature(prepare).bind(*args, **kwargs)
        given = call.arguments
        config = given["args"]
        packs = given.get("packing") and config.max_length is not None
        if not packs or METRICS not in _columns(given["dataset"]):
            return prepare(*args, **kwargs)
        # TRL packs two columns and drops all others. Its own packer would pack a third.
        given["packing"], given["args"] = False, copy.copy(config)
        given["args"].max_length = None  # to cut is for the packer
        return _packed(prepare(*call.args, **call.kwargs), config)

    def _showing_tokens(
        self, collator: MetricsCollator
    ) -> tuple[MetricsCollator, Callable[[Any], Any] | None]:
        """Return what shows transforms, as ``"input_ids"``, the tokens that TRL's collators put together.

        And a collator whose collate function does not see them.
        """
        if self._trl_trainer is None:
            return collator, None
        cuts = getattr(self.data_collator, "collate_fn", self.data_collator)
        most = getattr(cuts, "max_length", None)
        at_end = getattr(cuts, "truncation_mode", None) == "keep_end"
        cut = slice(-most, None) if most and at_end else slice(most)
        blind = copy.copy(collator)
        blind.collate_fn = partial(_collated_as_given, collator.collate_fn)
        return blind, partial(_with_tokens, cut)

    # -- Losses

    @property
    def _wanted_ids(self) -> str:
        """Of what `compute_loss` wants to know the datasets: a sample may become two rows."""
        return (
            "samples"
            if self._trl_trainer in _LOSSES and self._trl_trainer != "SFTTrainer"
            else "batch"
        )

    @property
    def _of_tokens(self) -> tuple[str, ...]:
        """The means that are told for each dataset of the tokens of a batch."""
        return _OF_TOKENS if self._trl_trainer == "SFTTrainer" else ("loss",)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the loss as TRL computes it, and take in that of each dataset on the side."""
        of_each = _LOSSES.get(self._trl_trainer or "")
        if of_each is None or self._loss is None:
            return super().compute_loss(model, inputs, *args, **kwargs)
        reference = getattr(self, "ref_model", None)
        if self._carried is None or self._carried.ids is None:
            raise ValueError(
                "loss_per_dataset=True, but this batch does not say which datasets its samples are "
                "from: let the trainer make its own data loaders"
            )
        with _outputs_of(model, self.model, reference) as outputs:
            result = super().compute_loss(model, inputs, *args, **kwargs)
        with torch.no_grad():
            getattr(self, of_each)(inputs, *outputs)
        return result

    def _check_loss_of_trl(self) -> None:
        """Raise ValueError where TRL's loss cannot be had for each dataset."""
        kind = self._trl_trainer
        tokens = kind == "SFTTrainer"
        mixed = sorted({"aot", "aot_unpaired", "sft"} & {*getattr(self, "loss_types", ())})
        fused = hasattr(sys.modules.get("trl.trainer.utils"), "FusedCausalLMOutput")
        obstacles = {
            "TRL before 1.16, which does not tell the loss of each token": not fused,
            f"the loss of {kind}, which is no mean over tokens, pairs or examples": kind
            not in _LOSSES,
            "compute_loss_func": tokens and self.compute_loss_func is not None,
            "label_smoothing_factor": tokens
            and self.label_smoother is not None
            and self.args.loss_type == "nll",
            f"loss_type={mixed}, in which a pair's loss depends on other pairs": bool(mixed),
        }
        if found := [name for name, there in obstacles.items() if there]:
            raise ValueError(
                f"loss_per_dataset=True does not go with {' and '.join(found)}: leave it out; what samples "
                "carry counts for each dataset without it"
            )

    def _take_tokens(self, inputs: Any, policy: list[Any], *others: Any) -> None:
        """Take in the loss of each token that `SFTTrainer` has learnt from."""
        output = _scored_tokens(policy, 0)
        labels = inputs["labels"]
        width = labels.shape[1] - 1  # tokens of a prompt that is learnt stand before
        losses = -output.log_probs[:, -width:]
        if self.args.loss_type == "dft":
            losses = losses * (-losses).exp()
        ids = predicted(self._carried.ids, tuple(labels.shape))
        counted = self._of_real(labels[:, 1:]).to(losses.device) != _IGNORED
        ids = ids if len(ids.shape) == 1 else ids[:, :-1]
        right = output.is_top1[:, -width:].to(losses.dtype)
        found = (losses, output.entropy[:, -width:], right)
        values = dict(zip(_OF_TOKENS, found, strict=True))
        self._loss.update_all(values, weights=counted, dataset_ids=ids)

    def _take_pairs(
        self, inputs: Any, policy: list[Any], inner: list[Any], reference: list[Any]
    ) -> None:
        """Take in the loss of each pair of `DPOTrainer`, and what its sides are worth."""
        own = _scored_tokens(policy, 0)
        other = None
        if not self.precompute_ref_logps:  # an adapter that is left out makes a model its reference
            other = _scored_tokens(reference, 0) if reference else _scored_tokens(inner, -1)
        for name, rows in self._rows_of_datasets():
            values = self._replayed("_compute_loss", rows, inputs, own, other)
            kept = {key: x for key, x in values.items() if key.startswith(_OF_PAIRS)}
            self._into.record_all(kept, "mean", dataset=name, weight=len(rows))

    def _take_preferences(self, inputs: Any, policy: list[Any], *others: Any) -> None:
        """Take in the loss of each pair of `RewardTrainer`, and its rewards."""
        for name, rows in self._rows_of_datasets():
            values = self._replayed("compute_loss", rows, inputs, policy[0], None)
            kept = {key: values[key] for key in _OF_REWARDS}
            self._into.record_all(kept, _OF_REWARDS, dataset=name, weight=len(rows))

    def _take_examples(
        self, inputs: Any, policy: list[Any], inner: list[Any], reference: list[Any]
    ) -> None:
        """Take in the loss of each example of `KTOTrainer`, and what it is worth."""
        own = _scored_tokens(policy, int(self.calculate_KL))  # the first is of other completions
        other = None if self.precompute_ref_logps else _scored_tokens(reference or inner, -1)
        mode = "train" if self.model.training else "eval"
        # How far the model is from its reference, of the whole batch and on all ranks.
        far = torch.tensor(self._metrics[mode]["kl"][-1], device=own.log_probs.device)
        batch = {**inputs, "ref_KL_logps": torch.zeros_like(far)}
        for name, rows in self._rows_of_datasets():
            of_both = iter((far, torch.zeros_like(far)))
            instead = {"_compute_kl_logps": lambda *_, of_both=of_both: next(of_both)}
            values = self._replayed("_compute_loss", rows, batch, own, other, **instead)
            self._into.record("loss", values["loss"], dataset=name, weight=len(rows))
            chosen = int(inputs["label"][rows].sum())
            for side, count in (("chosen", chosen), ("rejected", len(rows) - chosen)):
                for key in (f"rewards/{side}", f"logps/{side}"):
                    if count:
                        self._into.record(key, values[key], dataset=name, weight=count)

    def _rows_of_datasets(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Return which samples of the batch at hand are of which dataset."""
        ids = self._carried.ids
        for place, name in enumerate(ids.names):
            if len(rows := np.flatnonzero(ids.index[: self._real] == place)):
                yield name, torch.from_numpy(rows).to(self.args.device)

    def _replayed(
        self, method: str, rows: torch.Tensor, inputs: Any, own: Any, other: Any, **instead: Any
    ) -> dict[str, float]:
        """Return what TRL's own code logs of some samples of a batch alone, and their loss.

        It has no loss of each, and a dozen formulas. So it is called once more, on this rank alone, with
        the rows of what the models have returned for the batch.
        """
        cut = partial(_cut, rows, len(self._carried.ids))
        training = self.model.training
        metrics: dict[str, list[float]] = defaultdict(list)
        stand_in = _StandIn(
            self,
            model=SimpleNamespace(training=training, is_gradient_checkpointing=False),
            ref_model=lambda **_: other and _Rows(other, cut),
            accelerator=_Alone(self.accelerator.device),
            aux_loss_enabled=False,
            _metrics={"train" if training else "eval": metrics},
            _total_train_tokens=0,
            **instead,
        )
        compute = getattr(super(), method).__func__
        batch = {name: cut(value) for name, value in inputs.items()}
        loss = compute(stand_in, lambda **_: _Rows(own, cut), batch, False)
        return {"loss": float(loss), **{name: values[-1] for name, values in metrics.items()}}

    # -- Logs

    def _keys_of_trl(self) -> set[str]:
        """Return what TRL's own `log` is about to add, in whose place nothing else can be logged."""
        mode = "train" if self.model.training else "eval"
        pending = getattr(self, "_metrics", {}).get(mode, ())
        return {*pending} if mode == "train" else {f"eval_{key}" for key in pending}

    # -- What is generated

    @property
    def _generates(self) -> bool:
        """Whether batches are lists of prompts, of which TRL makes what it learns from."""
        return hasattr(super(), "_generate_and_score_completions")

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, ids: Any) -> Any:
        rewards = super()._calculate_rewards(inputs, prompts, completions, ids)
        self._scored = ids, rewards
        return rewards

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        """Let TRL generate, and take in what has come of it: once, however often it is learnt from."""
        # Columns are kept for the metrics; TRL gets those that it would have.
        unused = {METRICS}
        if self.args.remove_unused_columns:
            self._set_signature_columns_if_needed()
            unused |= {*inputs[0]} - {*self._signature_columns}
        bare = [{name: x for name, x in sample.items() if name not in unused} for sample in inputs]
        self._scored = None
        output = super()._generate_and_score_completions(bare)
        completions, rewards = self._scored or (_completions_in(output), None)
        self._take_generated(inputs, output, completions, rewards)
        return output

    def _take_generated(
        self,
        samples: Sequence[Mapping[str, Any]],
        output: Mapping[str, Any],
        completions: Sequence[Sequence[int]],
        rewards: torch.Tensor | None,
    ) -> None:
        """Take in each prompt, once for all of its completions, and each completion."""
        first = self.accelerator.process_index * len(samples)
        count = "num_generations" if self.model.training else "num_generations_eval"
        group = getattr(self, count, 1)
        prompts, mask = output["prompt_ids"].cpu(), output["prompt_mask"].cpu().bool()
        ends = (*self.eos_token_ids, self._tokenizer.pad_token_id)
        columns = _of_completions(completions, output.get("tool_mask"), ends)
        columns["num_tokens"] += mask.sum(1).numpy()
        if rewards is not None:
            worth = _of_rewards(rewards, self.reward_weights, self.reward_func_names, group)
            columns |= {name: x[first : first + len(samples)] for name, x in worth.items()}
        metrics: list[Metric] = []
        names: list[str | None] = []
        for row, sample in enumerate(samples[: self._not_padded(len(samples))]):
            if sample.get(METRICS) is None:
                names.append(None)
                continue
            taken = take({"input_ids": prompts[row, mask[row]].tolist(), **sample})
            names.append(taken.parts[0][0])
            if (first + row) % group == 0:  # where the completions of a prompt begin
                metrics += taken.metrics
        self._into.update(metrics)
        for name in dict.fromkeys(names):
            its = np.array([one == name for one in names])
            for metric, column in columns.items():
                values = column[: len(names)][its]
                values = values[~np.isnan(values)]  # which no function has scored
                if len(values):
                    how = _OF_COMPLETIONS.get(metric, "distribution")
                    self._into.record(metric, values, how, dataset=name, each=True)


def _completions_in(output: Mapping[str, Any]) -> list[list[int]]:
    """Return the tokens that TRL has generated, where nothing scores them."""
    pairs = zip(output["completion_ids"].cpu(), output["completion_mask"].cpu().bool(), strict=True)
    return [ids[mask].tolist() for ids, mask in pairs]


def _of_completions(
    completions: Sequence[Sequence[int]], tool_mask: Any, ends: Sequence[int]
) -> dict[str, Any]:
    """Return by name what TRL logs of each completion, of this rank."""
    lengths = [len(ids) for ids in completions]
    if tool_mask is not None:  # what tools have said was not generated
        seen = tool_mask.cpu()
        lengths = [int(row[:length].sum()) for row, length in zip(seen, lengths, strict=True)]
    clipped = [len(ids) > 0 and ids[-1] not in ends for ids in completions]
    return {
        "completions/length": np.array(lengths, float),
        "completions/clipped_ratio": np.array(clipped, float),
        "num_tokens": np.array(lengths, float),
    }


def _of_rewards(
    of_functions: torch.Tensor, weights: torch.Tensor, names: Sequence[str], group: int
) -> dict[str, Any]:
    """Return by name what each completion is worth, of all ranks; NaN: nothing has scored it."""
    each = of_functions.detach().double().cpu().numpy()
    unscored = np.isnan(each).all(axis=1)
    total = np.nansum(each * weights.double().cpu().numpy(), axis=1)
    total[unscored] = np.nan
    columns = {"reward": total}
    for place, name in enumerate(names):
        same = names[:place].count(name)  # of several lambdas, say
        columns[f"rewards/{name}" + (f"_{same + 1}" if same else "")] = each[:, place]
    of_group = np.where(unscored, np.inf, total).reshape(-1, group)
    span = np.where(unscored, -np.inf, total).reshape(-1, group).max(axis=1) - of_group.min(axis=1)
    columns["frac_reward_zero_std"] = np.repeat(np.abs(span) <= 1e-8, group).astype(float)
    return columns


# -- Datasets --------------------------------------------------------------------------------------


def _columns(dataset: Any) -> Sequence[str]:
    """Return the names of a dataset's columns, which a stream may know from its first sample alone."""
    known: Sequence[str] | None = dataset.column_names
    return known if known is not None else [*next(iter(dataset))]


def _packed(dataset: Any, config: Any) -> Any:
    """Pack as `SFTTrainer` does, and the number of each token's dataset with it."""
    from trl.data_utils import pack_dataset  # noqa: PLC0415 - slow, and loaded by now

    from metricfold.integrations.datasets import metrics_per_token  # noqa: PLC0415

    stream = not hasattr(dataset, "num_rows")
    workers = {} if stream else {"num_proc": config.dataset_num_proc}
    with config.main_process_first(desc="packing"):
        dataset = metrics_per_token(dataset, **workers)
        dataset = dataset.select_columns(["input_ids", "labels", METRICS])
        dataset = pack_dataset(dataset, config.max_length, config.packing_strategy, workers)
        return dataset.shuffle(seed=config.seed) if config.shuffle_dataset else dataset


def _with_tokens(cut: slice, sample: Any) -> Any:
    """Return a sample with the tokens of all that the model sees of it, each sequence cut."""
    if "input_ids" in sample:
        return sample
    prompt = sample.get("prompt_ids", [])
    found = [[*prompt, *sample[name]] for name in _SEQUENCES if name in sample]
    found += [sample[name] for name in _WHOLE_SEQUENCES if name in sample]
    tokens = [token for sequence in found for token in sequence[cut]]
    return {**sample, "input_ids": _Shown(tokens)} if found else sample


class _Shown(list[Any]):
    """Tokens that transforms see, and nobody else."""


def _collated_as_given(collate: Any, samples: list[Any]) -> Any:
    for sample in samples:  # copies already
        if isinstance(sample.get("input_ids"), _Shown):
            del sample["input_ids"]
    return collate(samples)


# -- Losses ----------------------------------------------------------------------------------------


@contextmanager
def _outputs_of(*models: Any) -> Iterator[list[list[Any]]]:
    """Note what models return meanwhile."""
    outputs: list[list[Any]] = [[] for _ in models]
    with ExitStack() as hooks:
        for model, own in zip(models, outputs, strict=True):
            if isinstance(model, torch.nn.Module):
                note = partial(_noted, own)
                hooks.callback(model.register_forward_hook(note).remove)
        yield outputs


def _noted(into: list[Any], module: Any, args: Any, output: Any) -> None:
    into.append(output)


def _scored_tokens(outputs: Sequence[Any], place: int) -> Any:
    """Return one of those outputs that say what each token's probability is."""
    found = [one for one in outputs if getattr(one, "log_probs", None) is not None]
    if not -len(found) <= place < len(found):
        raise ValueError(
            "loss_per_dataset=True, but the model did not say the probability of each token, as it does "
            "where TRL's own compute_loss asks it to: leave loss_per_dataset out where you write another"
        )
    return found[place]


def _cut(rows: torch.Tensor, count: int, value: Any) -> Any:
    """Return the rows of a tensor that has one for each sample, or two: first all of one side."""
    length = len(value) if isinstance(value, torch.Tensor) and value.ndim else None
    if length == count:
        return value[rows]
    return value[torch.cat([rows, rows + count])] if length == 2 * count else value


class _Rows:
    """Some rows of what a model has returned."""

    def __init__(self, output: Any, cut: Callable[[Any], Any]) -> None:
        self._output, self._cut = output, cut

    def __getattr__(self, name: str) -> Any:
        return self._cut(getattr(self._output, name))


class _StandIn:
    """A trainer, but for what it is given."""

    def __init__(self, trainer: Any, **own: Any) -> None:
        vars(self).update(own, _trainer=trainer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trainer, name)


class _Alone:
    """An accelerator of one rank: nothing is gathered."""

    def __init__(self, device: Any) -> None:
        self.device = device

    def gather(self, tensor: Any) -> Any:
        return tensor

    gather_for_metrics = gather
