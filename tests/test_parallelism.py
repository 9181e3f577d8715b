"""Trainings in the usual parallel layouts: what they log is what is counted from their data."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from typing import Any

import pytest
import restarted_training
import torch  # noqa: F401 - where there is none, conftest skips this module
from parallel_trainings import (
    DATASETS,
    LOG_EVERY,
    OVERFLOWING,
    STEPS,
    Reference,
    all_layouts,
    counted,
)
from ranks import preload, run_ranks

from metricfold import read_jsonl

preload("torch.distributed.fsdp", "torch.distributed.pipelining", "metricfold.torch")

LAYOUTS = (
    *("ddp", "fsdp", "accumulated", "tensor-by group", "tensor-by owner"),
    *("pipeline-ScheduleGPipe-by owner", "pipeline-Schedule1F1B-by owner"),
)


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference.train()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Any]:
    folder = tmp_path_factory.mktemp("logs")
    return run_ranks(all_layouts, 4, folder, timeout=150), folder


def prefixed(prefix: str, values: dict[str, float]) -> dict[str, float]:
    return {f"{prefix}_{key}": value for key, value in values.items()}


def of(metrics: dict[str, float], keys: Any) -> dict[str, float | None]:
    return {key: metrics.get(key) for key in keys}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_totals_are_those_counted_from_the_data(trained, layout):
    of_ranks, _ = trained
    expected = prefixed("run", counted(range(STEPS)))
    # A pipeline's or mesh's replicas say the same, and so does every rank.
    for totals in of_ranks:
        assert of(totals[layout], expected) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_of_datasets_are_those_of_a_training_in_one_process(trained, reference, layout):
    of_ranks, _ = trained
    expected = {f"run_{name}/loss": reference.loss(slice(None), name) for name in DATASETS}
    for totals in of_ranks:
        assert of(totals[layout], expected) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rank_0_logs_each_interval_with_the_losses_in_it(trained, reference, layout):
    _, folder = trained
    records = read_jsonl(folder / f"{layout}.jsonl")
    assert [record.step for record in records] == [LOG_EVERY, 2 * LOG_EVERY]
    for record in records:
        interval = slice(record.step - LOG_EVERY, record.step)
        losses = {f"train_{name}/loss": reference.loss(interval, name) for name in DATASETS}
        losses["train/loss"] = reference.loss(interval)
        assert of(record.metrics, losses) == pytest.approx(losses, rel=1e-4)
        seen = {
            key: number
            for key, number in prefixed("train", counted(range(record.step))).items()
            if "_seen" in key or "_count_" in key
        }
        assert of(record.metrics, seen) == seen


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_the_norm_of_a_gradient_is_taken_as_it_is_also_a_dtensor(trained, reference, layout):
    of_ranks, _ = trained
    for totals in of_ranks:
        assert totals[layout]["run/grad_norm"] == pytest.approx(max(reference.norms), rel=1e-4)


def test_samples_count_twice_where_both_replicas_take_them_in(trained):
    of_ranks, _ = trained
    once, twice = (of_ranks[0][f"tensor-{how}"] for how in ("by owner", "twice"))
    for key, number in once.items():
        if "_seen" in key or "_count_" in key:
            assert twice[key] == 2 * number


def test_over_one_dimension_of_a_pipeline_rank_0_has_no_loss(trained):
    of_ranks, folder = trained
    totals = [of_one["pipeline-ScheduleGPipe-by group"] for of_one in of_ranks]
    assert ["run_code/loss" in of_one for of_one in totals] == [False, True, False, True]
    assert ["run_code/samples_seen" in of_one for of_one in totals] == [True, False, True, False]
    records = read_jsonl(folder / "pipeline-ScheduleGPipe-by group.jsonl")
    assert records[-1].metrics["train_code/samples_seen"] == 16
    assert "train_code/loss" not in records[-1].metrics


def test_a_mesh_of_two_dimensions_is_refused_with_what_to_pass_instead(trained):
    of_ranks, _ = trained
    for of_one in of_ranks:
        assert "a DeviceMesh of 2 dimensions" in of_one["whole mesh"]
        assert "mesh['data']" in of_one["whole mesh"]


def test_a_skipped_step_leaves_nothing_behind(trained):
    of_ranks, folder = trained
    taken = [step for step in range(STEPS) if step + 1 not in OVERFLOWING]
    reference = Reference.train(taken)
    expected = prefixed("run", counted(taken))
    approximate = {f"run_{name}/loss": reference.loss(slice(None), name) for name in DATASETS}
    approximate["run/grad_norm"] = max(reference.norms)
    for totals in of_ranks:
        assert of(totals["skipping"], expected) == pytest.approx(expected, rel=1e-12)
        assert of(totals["skipping"], approximate) == pytest.approx(approximate, rel=1e-4)
        assert totals["skipping"]["run/skipped_steps"] == len(OVERFLOWING)
    records = read_jsonl(folder / "skipping.jsonl")
    assert [record.step for record in records] == [LOG_EVERY, 2 * LOG_EVERY]
    for record, interval in zip(records, (slice(0, 2), slice(2, 4)), strict=True):
        assert record.metrics["train/loss"] == pytest.approx(reference.loss(interval), rel=1e-4)


def test_under_torchrun_totals_are_exact_though_a_worker_is_killed(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "--max-restarts", "1", restarted_training.__file__]
    # Without this, torch 2.13 hands the addresses of the killed ranks to those started anew.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with subprocess.Popen(
        [*command, str(tmp_path)], env=environment, stderr=subprocess.PIPE, text=True
    ) as torchrun:
        try:
            _, said = torchrun.communicate(timeout=120)
        finally:
            torchrun.kill()
            for path in tmp_path.glob("*.pid"):
                with suppress(ProcessLookupError):
                    os.kill(int(path.stem), signal.SIGKILL)
    assert torchrun.returncode == 0, said
    assert "exitcode: -9" in said

    steps, reference = restarted_training.STEPS, Reference.train(range(restarted_training.STEPS))
    expected = prefixed("run", counted(range(steps)))
    losses = {f"run_{name}/loss": reference.loss(slice(None), name) for name in DATASETS}
    for rank in range(2):
        begun_at = f"0 0\n1 {restarted_training.SAVE_EVERY}\n"
        assert (tmp_path / f"started-{rank}.txt").read_text() == begun_at
        totals = json.loads((tmp_path / f"totals-{rank}.json").read_text())
        assert of(totals, expected) == pytest.approx(expected, rel=1e-12)
        assert of(totals, losses) == pytest.approx(losses, rel=1e-4)
    records = read_jsonl(tmp_path / "log.jsonl")
    assert [record.step for record in records] == list(range(1, steps + 1))
    for record in records:
        seen = {
            key: number
            for key, number in prefixed("train", counted(range(record.step))).items()
            if key.endswith("_seen")
        }
        assert of(record.metrics, seen) == seen
