"""TRL's trainers with `MetricfoldMixin`: what `trl_trainings.py` has found, in one process of its own."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

if not all(map(find_spec, ("trl", "transformers", "datasets"))):  # to import takes seconds
    pytest.skip("needs trl, transformers and datasets", allow_module_level=True)

NAMES = ("docs", "code", "web")
SAMPLES = {"docs": 5, "code": 6, "web": 7}
Found = dict[str, Any]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder = tmp_path_factory.mktemp("trl")
    script = Path(__file__).parent / "trl_trainings.py"
    ended = subprocess.run(
        [sys.executable, str(script), str(folder)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    everything: Found = json.loads((folder / "found.json").read_text())
    for name, one in everything.items():
        assert "error" not in one, f"{name}: {one['error']}"
    return everything


def assert_right(one: Found) -> None:
    """Assert that losses are those of each token looked up by itself, and totals those of TRL."""
    for name in (*NAMES, "all"):
        assert one["loss"][name] == pytest.approx(one["truth"]["loss"][name], abs=1e-6)
    assert one["off"]["loss"] < 1e-6  # from what TRL logs, in the worst step
    assert one["tokens_seen"]["all"] == one["num_tokens"]
    assert sum(one["tokens_seen"][name] for name in NAMES) == one["num_tokens"]
    for name in NAMES:
        assert one["tokens_seen"][name] >= one["truth"]["words"][name] > 0


# -- SFT -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["text", "messages", "prompt_completion", "tokenized"])
def test_sft_counts_what_is_left_after_its_own_maps(found: Found, kind: str) -> None:
    """Metrics were made before TRL's maps, which failed in Arrow or were not counted."""
    one = found["sft_formats"][kind]
    assert_right(one)
    assert one["samples_seen"] == SAMPLES
    longest = 8 * sum(SAMPLES.values())
    assert one["num_tokens"] <= longest


@pytest.mark.parametrize("kind", ["bfd", "shuffled", "padding_free"])
def test_packed_samples_count_for_their_own_datasets(found: Found, kind: str) -> None:
    one = found["sft_packing"][kind]
    assert_right(one)
    assert one["samples_seen"] == SAMPLES


@pytest.mark.parametrize("kind", ["bfd", "wrapped", "padding_free"])
def test_entropy_and_accuracy_are_those_of_trl(found: Found, kind: str) -> None:
    off = found["sft_packing"][kind]["off"]
    assert off["entropy"] < 1e-6
    assert off["mean_token_accuracy"] < 1e-6


@pytest.mark.parametrize("kind", ["bfd_split", "wrapped"])
def test_samples_that_packing_cuts_count_once_for_each_piece(found: Found, kind: str) -> None:
    one = found["sft_packing"][kind]
    assert_right(one)
    for name in NAMES:
        assert one["samples_seen"][name] >= SAMPLES[name]
    assert sum(one["samples_seen"].values()) > sum(SAMPLES.values())


@pytest.mark.parametrize("kind", ["bfd", "bfd_split", "wrapped", "shuffled"])
def test_rows_are_packed_as_without_the_mixin(found: Found, kind: str) -> None:
    assert found["sft_packing"][kind]["rows"]


@pytest.mark.parametrize("kind", ["truncated", "packed", "wrapped"])
def test_a_stream_counts_what_is_left_after_its_own_maps(found: Found, kind: str) -> None:
    assert_right(found["sft_streams"][kind])


def test_the_loss_of_dynamic_fine_tuning_is_told_apart_too(found: Found) -> None:
    assert_right(found["sft_dft"])


# -- Pairs and examples ----------------------------------------------------------------------------


def assert_pairs_are_right(one: Found) -> None:
    for key, value in one["truth"].items():
        assert one["ours"][key] == pytest.approx(value, abs=1e-6), key
    for step in one["steps"]:
        assert step["all/loss"] == pytest.approx(step["loss"], abs=1e-6)
    assert one["ours"]["all/tokens_seen"] == one["last"]["num_tokens"]


@pytest.mark.parametrize("kind", ["text", "messages", "implicit"])
def test_dpo_tells_losses_and_rewards_of_datasets_apart(found: Found, kind: str) -> None:
    one = found["dpo"][kind]
    assert_pairs_are_right(one)
    assert one["ours"]["docs/samples_seen"] == SAMPLES["docs"]
    step = one["steps"][0]
    for key in ("rewards/chosen", "rewards/margins", "rewards/accuracies", "logps/rejected"):
        assert step[f"all/{key}"] == pytest.approx(step[key], abs=1e-5)


def test_dpo_takes_precomputed_references_and_each_set_of_an_evaluation(found: Found) -> None:
    one = found["precomputed"]
    for step in one["steps"]:
        assert step["all/loss"] == pytest.approx(step["loss"], abs=1e-6)
    evaluated = one["evaluation"]
    assert evaluated["eval_all_docs/loss"] == pytest.approx(one["ours"]["docs/loss"], abs=1e-6)
    assert evaluated["eval_docs_docs/loss"] == pytest.approx(one["ours"]["docs/loss"], abs=1e-6)
    assert "eval_docs_code/loss" not in evaluated


def test_the_reward_trainer_tells_losses_and_rewards_of_datasets_apart(found: Found) -> None:
    assert_pairs_are_right(found["reward"])
    for step in found["reward"]["steps"]:
        for key in ("accuracy", "margin", "min_reward", "max_reward"):
            assert step[f"all/{key}"] == pytest.approx(step[key], abs=1e-6)


def test_kto_tells_losses_and_rewards_of_datasets_apart(found: Found) -> None:
    for kind in ("unpaired", "paired"):
        assert_pairs_are_right(found["kto"][kind])
    assert found["kto"]["paired"]["ours"]["docs/samples_seen"] == 2 * SAMPLES["docs"]
    for step in found["kto"]["divergence"]["steps"]:  # whose loss takes in that of the whole batch
        assert step["kl"] > 0
        assert step["all/loss"] == pytest.approx(step["loss"], abs=1e-6)


# -- Generation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["map-style", "stream"])
def test_completions_count_once_however_often_they_are_learnt_from(found: Found, kind: str) -> None:
    """Each is in as many as four steps; prompts count once for both of their completions."""
    one = found["generated"][kind]
    assert len(one["scored"]) == 16
    assert_scored(one, "train_", prompts=4)
    end = one["end"]
    assert end["train_all/num_tokens"] == one["num_tokens"]
    theirs = sum(one["theirs"]) / len(one["theirs"])  # of batches of one size
    assert end["train_all/reward_stat_mean"] == pytest.approx(theirs, abs=1e-5)


def test_completions_of_an_evaluation_count_apart(found: Found) -> None:
    assert_scored(found["generated"]["evaluation"], "eval_", prompts=2)


def assert_scored(one: Found, prefix: str, prompts: int) -> None:
    end = one["end"]
    for name in ("docs", "code"):
        its = [x for x in one["scored"] if x["prompt"].startswith(name)]
        words = sum(len(x["prompt"].split()) for x in its)
        lengths = [x["length"] for x in its]
        here = {
            key.removeprefix(f"{prefix}{name}/"): value
            for key, value in end.items()
            if key.startswith(f"{prefix}{name}/")
        }
        assert here["samples_seen"] == prompts
        assert here["tokens_seen"] == words / 2
        assert here["num_tokens"] == words + sum(lengths)
        assert here["completions/length_stat_count"] == len(its)
        assert here["completions/length_stat_mean"] == pytest.approx(sum(lengths) / len(its))
        assert here["completions/length_stat_min"] == min(lengths)
        assert here["rewards/brevity_stat_min"] == -max(lengths)
        rewards = [x["brevity"] + (x["first_word"] or 0) for x in its]
        assert here["reward_stat_count"] == len(its)
        assert here["reward_stat_mean"] == pytest.approx(sum(rewards) / len(its))
        same = [a == b for a, b in zip(rewards[::2], rewards[1::2], strict=True)]
        assert here["frac_reward_zero_std"] == sum(same) / len(same)
        of_word = [x["first_word"] for x in its if x["first_word"] is not None]
        assert here.get("rewards/first_word_stat_count", 0) == len(of_word)
        if of_word:
            assert here["rewards/first_word_stat_max"] == max(of_word)


def test_rewards_count_as_weighted_and_choose_the_best_model(found: Found) -> None:
    """huggingface/trl#5352: weights were not logged; #3384: rewards could not be chosen by."""
    one = found["reported"]["grpo"]
    rewards = [0.5 * x["brevity"] + 2 * (x["first_word"] or 0) for x in one["scored"]]
    assert one["logged"] == pytest.approx(sum(rewards) / len(rewards))
    assert len(one["evaluated"]) == 2
    assert one["best"] == max(one["evaluated"])


def test_other_trainers_that_generate_count_alike(found: Found) -> None:
    one = found["reported"]["rloo"]
    assert one["docs/samples_seen"] == 2
    assert one["docs/reward_stat_count"] == 4
    assert one["docs/reward_stat_mean"] == pytest.approx(one["reward"])
    assert one["docs/num_tokens"] == one["num_tokens"]
    unscored = found["reported"]["distillation"]
    assert unscored["all/samples_seen"] == 4
    assert unscored["all/num_tokens"] == unscored["num_tokens"]
    assert not [key for key in unscored if "/reward" in key]


def test_a_collator_that_hands_on_all_columns_does_not_see_those_of_transforms(
    found: Found,
) -> None:
    one = found["reported"]["orpo"]
    assert one["all/samples_seen"] == 4
    assert one["all/tokens_seen"] > 40


def test_a_name_that_trl_logs_by_itself_is_warned_of(found: Found) -> None:
    """What TRL adds to a log comes later, and took the place of ours without a word."""
    reported = found["reported"]
    assert abs(reported["named"]["rewards/chosen"]) < 100
    assert len(reported["warned"]) == 1


# -- What cannot be, and what need not be ----------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("aot", "loss_type=['aot']"),
        ("grpo", "the loss of GRPOTrainer"),
        ("compute_loss_func", "compute_loss_func"),
        ("smoothing", "label_smoothing_factor"),
        ("no metrics", "which dataset"),
        ("some metrics", "with_metrics() for each"),
        ("lost", "has lost the column 'metrics'"),
    ],
)
def test_what_would_be_wrong_or_missing_is_refused(found: Found, kind: str, said: str) -> None:
    refused = found["refusals"][kind]
    assert refused.startswith("ValueError"), refused
    assert said in refused


def test_trainings_without_metrics_go_on_as_without_the_mixin(found: Found) -> None:
    plain = found["without_metrics"]
    for name in ("packed", "dpo"):
        assert plain[name]["loss"] > 0
        assert not [key for key in plain[name] if key.startswith(("all/", "docs/"))]
    grpo = plain["grpo"]
    lengths = [one["length"] for one in grpo["scored"]]
    assert grpo["all/rewards/brevity_stat_mean"] == pytest.approx(-sum(lengths) / len(lengths))


def test_what_the_page_says_runs(found: Found) -> None:
    page = found["page"]
    assert page["SFT"]["all/tokens_seen"] == page["SFT"]["num_tokens"]
    assert page["SFT"]["docs/loss"] > 0
    assert page["GRPO"]["all/reward_stat_count"] == 8
    # The names of functions of one name are told apart, as TRL's are not.
    assert page["GRPO"]["all/rewards/<lambda>_stat_max"] < 0
    assert page["GRPO"]["all/rewards/<lambda>_2_stat_min"] >= 0


# -- Two ranks -------------------------------------------------------------------------------------


def test_two_ranks_without_padding_agree_with_the_truth(found: Found) -> None:
    for one in found["two_ranks"]["ranks"]:
        assert_right(one)
        end, truth = one["evaluation"]["end"], one["evaluation"]["truth"]
        for name in (*NAMES, "all"):
            assert end[f"eval_{name}/loss"] == pytest.approx(truth["loss"][name], abs=1e-6)
        # Seven samples, and one again to fill up the last batch, which TRL's own loss has in it.
        assert end["eval_all/samples_seen"] == 7
        assert end["eval_all/tokens_seen"] == sum(truth["words"].values())
        assert not math.isclose(end["eval_loss"], truth["loss"]["all"], abs_tol=1e-3)


def test_two_ranks_count_pairs_as_one(found: Found) -> None:
    alone = found["dpo"]["text"]
    for one in found["two_ranks"]["ranks"]:
        for key, value in alone["truth"].items():
            assert one["dpo"]["ours"][key] == pytest.approx(value, abs=1e-6), key
        for step in one["dpo"]["steps"]:
            assert step["all/loss"] == pytest.approx(step["loss"], abs=1e-6)
            assert step["all/tokens_seen"] == step["num_tokens"]


def test_prompts_whose_completions_are_on_two_ranks_count_once(found: Found) -> None:
    """Each has two on each rank; columns that TRL would remove do not reach its functions."""
    first, second = (one["grpo"] for one in found["two_ranks"]["ranks"])
    scored = [*first["scored"], *second["scored"]]
    assert len(scored) == 4 * 4
    assert [x["prompt"] for x in first["scored"]] == [x["prompt"] for x in second["scored"]]
    for end in (first["end"], second["end"]):
        assert end["train_all/samples_seen"] == 4
        words = sum(len(x["prompt"].split()) for x in scored)
        assert end["train_all/tokens_seen"] == words / 4
        assert end["train_all/num_tokens"] == words + sum(x["length"] for x in scored)
        for name in ("docs", "code"):
            its = [x["brevity"] for x in scored if x["prompt"].startswith(name)]
            key = f"train_{name}/rewards/brevity_stat"
            assert end.get(f"{key}_count", 0) == len(its)
            assert end.get(f"{key}_mean", 0) == pytest.approx(sum(its) / max(len(its), 1))
