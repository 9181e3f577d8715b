"""The demo, for real: ranks train, what they log is the truth, and a resumed run counts on."""

from __future__ import annotations

import importlib
import io
import json
import multiprocessing
import os
import re
import shutil
import sys
from contextlib import redirect_stdout
from functools import partial

import numpy as np
import pytest
import torch
from ranks import free_port, preload

import metricfold.demo.run
from metricfold import read_jsonl
from metricfold.cli import main
from metricfold.demo.folder import RunFolder
from metricfold.demo.mixture import SAMPLES_PER_STEP
from metricfold.demo.proof import prove
from metricfold.demo.texts import DemoError, Text

pytestmark = pytest.mark.timeout(150)
preload("torch._dynamo", "metricfold.demo.train")

SMALL = {"width": 16, "depth": 1, "heads": 2}
"""The model here: what is logged of it is as true as of the one that the demo trains."""


def start_forked(module, arguments, *, ranks, logs, environment):
    """Run ranks as the demo does, but forked from a server that has loaded what they import."""
    port = str(free_port())
    variables = {
        **environment,
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "GLOO_SOCKET_IFNAME": "lo",
        "COLUMNS": "120",
    }
    said = [logs / f"rank-{rank}.log" for rank in range(ranks)]
    context = multiprocessing.get_context("forkserver")
    processes = [
        context.Process(
            target=be_rank, args=(module, arguments, {**variables, "RANK": str(rank)}, said[rank])
        )
        for rank in range(ranks)
    ]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
        outputs = [path.read_text("utf-8") for path in said]
        assert [process.exitcode for process in processes] == [0] * ranks, outputs
        assert said[0].with_suffix(".err").read_text("utf-8") == ""
        print(outputs[0])
    finally:
        for process in processes:
            process.kill()


def be_rank(module, arguments, variables, said):
    os.environ |= variables
    sys.argv = [module, *arguments]
    multiprocessing.set_start_method(None, force=True)  # of data workers: as in any other process
    for descriptor, path in ((1, said), (2, said.with_suffix(".err"))):
        with path.open("wb") as log:
            os.dup2(log.fileno(), descriptor)
    loop = importlib.import_module(module)
    loop.ByteTransformer = partial(loop.ByteTransformer, **SMALL)
    loop.main()


def demo(*arguments):
    """Return what the command prints; its ranks are without what the real launcher and model cost.

    That launcher is tested in test_demo_launch.py, in test_demo_jax.py, and by CI's own step.
    """
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as out:
        patch.setattr(metricfold.demo.run, "run_ranks", start_forked)
        patch.setenv("COLUMNS", "120")
        assert main(["demo", *map(str, arguments)]) == 0
    return out.getvalue()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 12 steps on two ranks, which has gone on for 10 more on three."""
    out = tmp_path_factory.mktemp("run") / "made" / "for it"
    return RunFolder(out), demo("--steps", 12, "--out", out)


def counted(folder, steps):
    """Count tokens of the first steps from the texts alone."""
    tokens = {}
    mixture = folder.read_mixture()
    for number in range(steps * SAMPLES_PER_STEP):
        dataset, (text, _) = mixture.draw(number)
        name = mixture.names[dataset]
        tokens[name] = tokens.get(name, 0) + len(text.encode())
    return tokens


def last_log(folder):
    return [one for one in read_jsonl(folder.metrics) if "train/grad_norm" in one.metrics][-1]


def test_it_ends_with_a_table_in_which_ours_is_the_truth(run):
    _, out = run
    rows = re.findall(
        r"(python_docs|python_code|all) +([\d.,]+) +([\d.,]+)[^\n]*? ([\d.,]+) *\n", out
    )
    assert len(rows) == 9
    assert all(ours == truth for _, ours, _, truth in rows)
    assert any(average != truth for _, _, average, truth in rows)


def test_it_says_what_the_metrics_cost(run):
    _, out = run
    said = " ".join(out.split())
    logs, saves, collectives, agreeing, rounds = map(
        int,
        re.search(
            r"(\d+) logs and (\d+) checkpoint took (\d+) collectives: one each, "
            r"and (\d+) for new keys and categories \(in (\d+) of them\)\.",
            said,
        ).groups(),
    )
    assert (logs, saves) == (2, 1)
    assert collectives == logs + saves + agreeing
    assert agreeing == 2 * rounds
    assert float(re.search(r"logger\.log\(\) returned after ([\d.]+) ms", said)[1]) > 0
    assert re.search(r"The largest gradient of these steps was rank [01]'s", said)


def test_what_a_log_holds_up_is_the_median_of_the_slowest_rank(run):
    folder, _ = run
    # What is left is the second launch, which logs at step 20 and before it saves.
    pages = [json.loads(path.read_text()) for path in folder.ledger.iterdir()]
    slowest = max(np.median(page["logging"]) for page in pages)
    said = re.search(r"returned after ([\d.]+) ms \(median", " ".join(prove(folder).sentences))
    assert float(said[1]) == pytest.approx(1e3 * slowest, rel=0.06)
    assert [len(page["logging"]) for page in pages] == [2, 2, 2]


def test_totals_after_resuming_on_three_ranks_are_those_of_the_data(run):
    folder, out = run
    record, truth = last_log(folder), counted(folder, 22)
    assert record.step == 22
    for name, tokens in truth.items():
        assert record.metrics[f"train_{name}/tokens_seen"] == tokens
        assert f"tokens_seen of {name}: {tokens:,} = {tokens:,} counted" in out
    assert record.metrics["train/tokens_seen"] == sum(truth.values())
    assert record.metrics["train/samples_seen"] == 22 * SAMPLES_PER_STEP


def test_the_owner_of_the_largest_gradient_is_the_rank_that_recorded_it(run):
    for record in read_jsonl(run[0].metrics):
        if "train/grad_norm" not in record.metrics:
            continue
        ranks = range(2 if record.step <= 12 else 3)
        norms = [record.metrics.pop(f"train/grad_norm/rank_{rank}") for rank in ranks]
        assert not [key for key in record.metrics if "grad_norm/" in key]
        assert record.metrics["train/grad_norm"] == max(norms)
        assert record.metrics["train/grad_norm_rank"] == np.argmax(norms)


def test_the_wait_for_data_is_known_and_who_waited_longest(run):
    folder, out = run
    for record in read_jsonl(folder.metrics):
        if "train/grad_norm" in record.metrics:
            assert (
                0 < record.metrics["train/data_seconds"] <= record.metrics["train/data_seconds_max"]
            )
            assert 0 < record.metrics["train/data_share"] < 1
            assert record.metrics["train/data_slowest_rank"] in range(2 if record.step <= 12 else 3)
    assert re.search(r"step 20  train  .*  data_slowest_rank [012] ", out)


def test_every_promised_metric_is_in_the_files(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, out = run
    records = read_jsonl(folder.metrics)
    train = last_log(folder).metrics
    for name in ("python_docs", "python_code"):
        for metric in ("loss", "perplexity", "tokens_seen", "samples_seen", "seq_len_stat_p50"):
            assert np.isfinite(train[f"train_{name}/{metric}"])
        assert train[f"train_{name}/perplexity"] == pytest.approx(
            np.exp(train[f"train_{name}/loss"])
        )
    assert train["train_python_code/kind_count_method"] > 0
    assert train["train_python_docs/kind_count_prose"] > 0
    assert train["train/tokens_per_second"] > 0
    assert train["train/grad_norm"] > 0
    losses = [one.metrics["val/loss"] for one in records if "val/loss" in one.metrics]
    assert len(losses) == 2
    assert losses[1] < losses[0] < np.log(256)

    events = EventAccumulator(str(folder.tensorboard)).Reload()
    assert [one.step for one in events.Scalars("train_python_code/loss")] == [
        one.step for one in records if "train_python_code/loss" in one.metrics
    ]
    assert events.Histograms("train_python_code/seq_len")
    assert f"tensorboard --logdir '{folder.tensorboard}'" in out
    assert str(folder.metrics) in out


def test_the_loss_of_each_dataset_is_that_of_its_texts_one_by_one(run):
    from metricfold.demo.model import ByteTransformer

    folder, _ = run
    model = ByteTransformer(**SMALL)
    model.load_state_dict(torch.load(folder.checkpoint, weights_only=True)["model"])
    validated = [one.metrics for one in read_jsonl(folder.metrics) if one.prefix == "val"][-1]
    everything = []
    for corpus in folder.read_mixture().corpora:
        losses = []
        for text in corpus.validation:
            tokens = torch.tensor(list(text.text.encode()))
            with torch.no_grad():
                logits = model(tokens[None, :-1])[0].double()
            losses += torch.nn.functional.cross_entropy(
                logits, tokens[1:], reduction="none"
            ).tolist()
        slow = sum(losses) / len(losses)
        assert validated[f"val_{corpus.name}/loss"] == pytest.approx(slow, rel=1e-6)
        everything += losses
    assert validated["val/loss"] == pytest.approx(sum(everything) / len(everything), rel=1e-6)


def test_it_resumes_when_told_to_on_any_number_of_ranks(run, tmp_path):
    shutil.copytree(run[0].path, tmp_path / "copy")
    folder = RunFolder(tmp_path / "copy")
    before = folder.metrics.read_bytes()
    demo("--resume", "--ranks", 1, "--steps", 2, "--out", folder.path)
    assert folder.metrics.read_bytes().startswith(before)
    assert last_log(folder).step == 26
    for name, tokens in counted(folder, 26).items():
        assert last_log(folder).metrics[f"train_{name}/tokens_seen"] == tokens


def test_a_single_short_text_of_ones_own_is_enough_and_replaces_an_earlier_run(tmp_path):
    story = tmp_path / "story.txt"
    story.write_text("once upon a time")
    folder = RunFolder(tmp_path / "run")
    folder.begin({"earlier": [Text("earlier", "prose")] * 9})
    folder.metrics.write_text("earlier")
    demo("--ranks", 1, "--steps", 2, "--data", f"story={story}", "--out", folder.path)
    assert [one.step for one in read_jsonl(folder.metrics)] == [2, 2, 4, 4]
    assert counted(folder, 4) == {"story": 4 * SAMPLES_PER_STEP * 16}
    assert last_log(folder).metrics["train_story/tokens_seen"] == 4 * SAMPLES_PER_STEP * 16
    assert not (folder.data / "earlier.jsonl").exists()


def test_a_logged_number_that_is_not_the_truth_is_found(run, tmp_path):
    folder, _ = run
    forged = RunFolder(tmp_path)
    for path in (folder.marker, folder.data, folder.ledger):
        (tmp_path / path.name).symlink_to(path)
    lines = folder.metrics.read_text().splitlines()
    for i, line in enumerate(lines):
        record = json.loads(line)
        if "train/grad_norm" in record["metrics"]:
            record["metrics"]["train/tokens_seen"] += 1
        lines[i] = json.dumps(record)
    forged.metrics.write_text("\n".join(lines) + "\n")
    prove(folder).check()
    with pytest.raises(DemoError, match="tokens_seen of all was logged as"):
        prove(forged).check()


def test_a_folder_keeps_the_settings_of_its_run(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.begin({"a": [Text("words", "prose")] * 2}, settings={"seed": 3})
    assert folder.settings == {"seed": 3, "learning_rate": 8e-3}
    # One of an earlier version says nothing of them.
    marks = json.loads(folder.marker.read_text())
    folder.marker.write_text(json.dumps({key: marks[key] for key in ("datasets", "framework")}))
    assert folder.settings == {"seed": 0, "learning_rate": 8e-3}
