"""Trainings by other engines count what they trained on, on two ranks that read unevenly."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks

from metricfold import read_jsonl
from metricfold.torch import DeviceAccumulator

pytest.importorskip("torch")

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples/engines"
# The page's sections, the example of each, and what it needs.
ON_RANKS = {
    "fabric_mixture": "lightning",
    "ignite_mixture": "ignite",
    "deepspeed_zero": "deepspeed",
}
SECTIONS = {
    "Lightning Fabric": "fabric_mixture",
    "PyTorch Ignite": "ignite_mixture",
    "Ray Train": "ray_train",
    "DeepSpeed": "deepspeed_zero",
    "Hydra": "hydra_mixture",
    "Keras": "keras_mixture",
    "torchtitan": "torchtitan_mixture",
}
# Those that start a cluster, or whose packages change what others do: `make engines` runs them.
by_request = pytest.mark.skipif("METRICFOLD_ENGINES" not in os.environ, reason="make engines")


def train_on_rank(rank: int, folder: Path) -> dict[str, Any]:
    """Return what each engine, ours and the truth say, by the name of the example."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # asked for, though we have a group
    sys.path.insert(0, str(EXAMPLES))
    if importlib.util.find_spec("deepspeed"):
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed.ops  # which else compiles its own all-reduce of CPUs, for a minute

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    found = {}
    for name, needed in ON_RANKS.items():
        if importlib.util.find_spec(needed):
            (folder / name).mkdir(exist_ok=True)
            found[name] = importlib.import_module(name).main(folder / name)
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(train_on_rank, 2, tmp_path_factory.mktemp("engines"))


@pytest.mark.parametrize("name", ON_RANKS)
def test_ours_is_the_truth_where_the_engine_has_a_mean_of_means(trained: Any, name: str) -> None:
    """Losses since the log before, and totals over a restart in the middle of an interval."""
    if name not in trained[0]:
        pytest.skip(f"{ON_RANKS[name]} is not installed")
    theirs, ours, truth = trained[0][name]
    assert trained[1][name][2] == truth
    assert ours == pytest.approx(truth, rel=1e-6)
    assert truth["docs/samples_seen"] > truth["code/samples_seen"] > truth["tables/samples_seen"]
    for metric, value in theirs.items():
        assert value == pytest.approx(truth[metric], rel=0.1)
        assert value != pytest.approx(truth[metric], rel=1e-3)


@pytest.mark.parametrize("backend", ["torch", pytest.param("jax", marks=by_request)])
def test_keras_has_losses_by_token_and_dataset_and_goes_on_from_its_own_backup(
    backend: str, tmp_path: Path
) -> None:
    """Keras' loss divides by padding, too; `BackupAndRestore` carries the totals with the weights."""
    if importlib.util.find_spec("keras") is None:  # which wants to know its backend to be imported
        pytest.skip("keras is not installed")
    said = run("keras_mixture", str(tmp_path), env={"KERAS_BACKEND": backend})
    theirs, ours, truth = ({key: float(x) for key, x in one.items()} for one in columns(said))
    assert ours == pytest.approx(truth, rel=1e-5)
    assert theirs["all/loss"] < truth["all/loss"] / 2
    logged = [(one.step, one.prefix, one.metrics) for one in read_jsonl(tmp_path / "log.jsonl")]
    assert [one[:2] for one in logged] == [(4, "train"), (4, "val"), (8, "train"), (8, "val")]
    before, after = logged[0][2], logged[2][2]  # the second in a process' stead, from the backup
    assert [before["train/samples_seen"], after["train/samples_seen"]] == [20, 40]
    assert after["train_docs/tokens_seen"] == 2 * before["train_docs/tokens_seen"]
    assert logged[3][2]["val/samples_seen"] == 20


def test_jobs_of_a_hydra_sweep_log_to_files_of_their_own_with_their_configuration(
    tmp_path: Path,
) -> None:
    """Two jobs in one process, each with the sinks and settings that its YAML file says."""
    pytest.importorskip("hydra")
    settings = ("--multirun", "lr=0.1,0.5", f"hydra.sweep.dir={tmp_path}/sweep")
    run("hydra_mixture", *settings, cwd=tmp_path)
    for job, rate in enumerate((0.1, 0.5)):
        records = read_jsonl(tmp_path / f"sweep/{job}/run.jsonl")
        assert [record.step for record in records] == [4, 8]
        assert records[0].run["config"]["lr"] == rate
        assert records[0].run["config"]["losses"]["datasets"] == ["docs", "code", "tables"]
        assert records[1].metrics["train_tables/tokens_seen"] == 26
        assert "train_code/seq_len_stat_p99" in records[1].metrics
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sweep"]


def test_an_accumulator_takes_axes_out_of_omegaconf() -> None:
    """A list of OmegaConf's was no list: "is not an aggregation type"."""
    config = pytest.importorskip("omegaconf").OmegaConf.create(
        {
            "metrics": {"loss": "mean", "tokens": ["sum", "layer", "expert"]},
            "datasets": ["docs", "code"],
            "axes": {"layer": 2, "expert": ["a", "b"]},
        }
    )
    losses = DeviceAccumulator(config.metrics, config.datasets, axes=config.axes)
    plain = DeviceAccumulator(
        {"loss": "mean", "tokens": ("sum", "layer", "expert")},
        ("docs", "code"),
        axes={"layer": 2, "expert": ("a", "b")},
    )
    assert losses.layout == plain.layout


@by_request
@pytest.mark.alone
def test_a_worker_that_is_killed_under_ray_train_costs_no_total(tmp_path: Path) -> None:
    """Ray starts all workers again, from its last checkpoint, which is not that of the last log."""
    pytest.importorskip("ray.train")
    with tempfile.TemporaryDirectory(
        prefix="ray", dir="/tmp"
    ) as folder:  # sockets' names are short
        settings = {"RAY_TMPDIR": folder, "RAY_AUTH_MODE": "disabled"}
        said = run("ray_train", str(tmp_path), env=settings)
    assert "all went on after step 6" in said
    theirs, ours, truth = columns(said)
    assert ours == truth
    assert theirs["all/loss"] != truth["all/loss"]
    assert [record.step for record in read_jsonl(tmp_path / "log.jsonl")] == [4, 8]


@by_request
def test_torchtitan_goes_on_from_its_checkpoint_with_losses_and_totals_of_each_dataset(
    tmp_path: Path,
) -> None:
    """Its Trainer on two ranks, once to step 6 and once more to 8; its loss is of the last step alone."""
    pytest.importorskip("torchtitan")
    for last in ("6", "8"):
        said = run("torchtitan_mixture", str(tmp_path), last, ranks=2)
    theirs, ours, truth = ({key: float(x) for key, x in one.items()} for one in columns(said))
    assert ours == pytest.approx(truth, rel=1e-5)
    assert theirs["all/tokens_seen"] > 3 * truth["all/tokens_seen"]  # with the padding
    assert theirs["all/loss"] != pytest.approx(truth["all/loss"], rel=1e-4)
    assert [record.step for record in read_jsonl(tmp_path / "log.jsonl")] == [1, 4, 8]


def run(
    name: str, *args: str, env: dict[str, str] | None = None, cwd: Path = ROOT, ranks: int = 0
) -> str:
    """Return what an example prints, which torchrun starts if it has ranks."""
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}")
    ended = subprocess.run(
        [sys.executable, *launcher[: 4 * bool(ranks)], str(EXAMPLES / f"{name}.py"), *args],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def columns(said: str) -> list[dict[str, str]]:
    """Return theirs, ours and the truth out of the table that an example prints."""
    rows = re.findall(r"^(\w+/\w+) +(\S+) +(\S+) +(\S+)$", said, re.MULTILINE)
    return [{row[0]: row[column] for row in rows if row[column] != "-"} for column in (1, 2, 3)]


def code(text: str) -> str:
    """Return code without comments, and however it is laid out."""
    lines = (line.partition("  #")[0] for line in text.splitlines())
    bare = "".join("".join(line.split()) for line in lines if not line.strip().startswith("#"))
    return re.sub(r",([)\]}])", r"\1", bare)


@pytest.mark.parametrize("section", SECTIONS)
def test_the_lines_that_the_page_says_to_copy_are_those_of_the_example(section: str) -> None:
    page = (ROOT / "docs/engines.md").read_text()
    (text,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", page, re.DOTALL | re.MULTILINE)
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    parts = [
        part for block in blocks for part in re.split(r"^ *\.\.\.$|\n\n", block, flags=re.MULTILINE)
    ]
    example = code((EXAMPLES / f"{SECTIONS[section]}.py").read_text())
    assert len(parts) > 1
    for part in parts:
        assert code(part) in example, part
    for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL):
        for part in block.split("\n\n"):
            assert part in (EXAMPLES / f"{SECTIONS[section]}.yaml").read_text()
