"""The core where NumPy alone is installed, and what an import brings along elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
EXTRAS = ("torch", "jax", "flax", "rich", "tensorboard", "wandb")


def run(python: Path | str, script: str, cwd: Path, *arguments: str) -> Any:
    """Return what `script` prints as JSON; warnings are errors there too."""
    finished = subprocess.run(
        [python, "-I", "-W", "error", "-c", textwrap.dedent(script), *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment that holds NumPy and this package; returns its folder of programs."""
    folder = tmp_path_factory.mktemp("bare")
    python = [sys.executable, "-m", "venv", "--without-pip", folder / "venv"]
    subprocess.run(python, check=True, timeout=60)
    programs = folder / "venv" / "bin"
    installed = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"),
            *("--python", programs / "python", "install", "--no-deps", ROOT),
        ],
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert installed.returncode == 0, installed.stderr
    # The NumPy that is here, file by file: to install it again takes longer than all of the tests.
    (packages,) = folder.glob("venv/lib/python*/site-packages")
    numpy = distribution("numpy")
    for top in {file.parts[0] for file in numpy.files or ()} - {".."}:
        (packages / top).symlink_to(numpy.locate_file(top))
    return programs


def test_the_core_works_from_end_to_end_with_numpy_alone(bare: Path, tmp_path: Path) -> None:
    script = """
        import json, pickle, sys
        from importlib.util import find_spec
        import numpy as np
        import metricfold
        from metricfold import (
            AggregationType, DefaultTrainingMetricTransform, JSONLSink, Metric, MetricsAggregator,
            MetricsCollator, MetricsLogger, read_jsonl,
        )

        transform = DefaultTrainingMetricTransform()
        transform.set_dataset_name("alpaca")
        collate = MetricsCollator(lambda samples: {"tokens": [s["tokens"] for s in samples]})
        batch = pickle.loads(pickle.dumps(collate([transform({"tokens": [1] * n}) for n in (2, 4)])))

        aggregator = MetricsAggregator()
        aggregator.update(batch.pop("metrics"))
        aggregator.update([
            Metric("alpaca", "kind", "code", AggregationType.CATEGORICAL_COUNT),
            Metric("orca", "tokens_seen", np.int32(5), AggregationType.SUM),
        ])
        aggregator.record("loss", np.array([2.0]), weight=3)
        aggregator.derive("double", lambda metrics: 2 * metrics["tokens_seen"])
        aggregator.reduce()

        resumed = MetricsAggregator()
        resumed.load_state_dict(json.loads(json.dumps(aggregator.state_dict())))
        resumed.update([Metric("orca", "tokens_seen", 1, AggregationType.SUM)])
        with MetricsLogger([JSONLSink(sys.argv[1])]) as logger:
            logger.log(7, resumed, prefix="train", window="run")
        (record,) = read_jsonl(sys.argv[1])
        print(json.dumps({
            "file": metricfold.__file__,
            "step": record.step,
            "metrics": record.metrics,
            "found": [name for name in sys.argv[2:] if find_spec(name)],
            "imported": [name for name in sys.argv[2:] if name in sys.modules],
        }))
    """
    printed = run(bare / "python", script, tmp_path, str(tmp_path / "run.jsonl"), *EXTRAS)
    assert Path(printed["file"]).is_relative_to(bare.parent)
    assert printed["found"] == printed["imported"] == []
    assert printed["step"] == 7
    metrics = printed["metrics"]
    assert (
        metrics.items()
        >= {
            "train_alpaca/samples_seen": 2.0,
            "train_alpaca/tokens_seen": 6.0,
            "train_alpaca/seq_len_stat_p50": 3.0,
            "train_alpaca/kind_count_code": 1.0,
            "train_orca/tokens_seen": 6.0,
            "train/tokens_seen": 12.0,
            "train/loss": 2.0,
        }.items()
    )


@pytest.mark.parametrize(
    ("what", "expression", "line"),
    [
        ("ConsoleSink", "ConsoleSink()", "metricfold[console]"),
        ("TensorBoardSink", "TensorBoardSink('runs')", "metricfold[tensorboard]"),
        ("WandbSink", "WandbSink(project='p')", "metricfold[wandb]"),
        ("MetricsCollator", "MetricsCollator()([{'x': 1}])", "metricfold[torch]"),
        (
            "metricfold.integrations.lightning",
            "__import__('metricfold.integrations.lightning')",
            "metricfold[lightning]",
        ),
    ],
)
def test_what_needs_an_extra_says_what_to_install(
    bare: Path, tmp_path: Path, what: str, expression: str, line: str
) -> None:
    script = """
        import json, sys
        from metricfold import *
        try:
            eval(sys.argv[1])
        except ImportError as error:
            print(json.dumps(str(error)))
    """
    complaint = run(bare / "python", script, tmp_path, expression)
    assert what in complaint
    assert "not installed" in complaint
    assert "pip install" in complaint
    assert line in complaint
    assert "\n" not in complaint
    assert list(tmp_path.iterdir()) == []


def test_the_demo_says_what_to_install(bare: Path, tmp_path: Path) -> None:
    finished = subprocess.run(
        [bare / "metricfold", "demo"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert finished.returncode != 0
    assert "pip install 'metricfold[torch,console,tensorboard]'" in finished.stderr
    assert "Traceback" not in finished.stderr
    assert list(tmp_path.iterdir()) == []


def test_importing_metricfold_brings_nothing_but_numpy_along(tmp_path: Path) -> None:
    script = """
        import json, sys
        import metricfold
        aggregator = metricfold.MetricsAggregator()
        aggregator.record("loss", 1.0)
        assert aggregator.get_metrics_for_logging() == {"data/loss": 1.0}
        print(json.dumps([name for name in sys.argv[1:] if name in sys.modules]))
    """
    names = (*EXTRAS, "torchdata", "transformers", "tensorflow", "pandas", "scipy")
    assert run(sys.executable, script, tmp_path, *names) == []


def test_sinks_load_their_packages_when_they_write(tmp_path: Path) -> None:
    """Every rank makes the sinks, and one of them writes."""
    packages = (
        "mlflow",
        "trackio",
        "comet_ml",
        "pyarrow",
        "prometheus_client",
        "opentelemetry.sdk",
    )
    for package in packages:
        if find_spec(package.partition(".")[0]) is None:
            pytest.skip(f"needs {package}")
    script = """
        import json, sys
        from metricfold.sinks import *
        CometSink(), CSVSink("run.csv"), MLflowSink(), OTelSink(), ParquetSink("run"), PrometheusSink()
        TrackioSink()
        print(json.dumps([name for name in sys.argv[1:] if name in sys.modules]))
    """
    assert run(sys.executable, script, tmp_path, *packages, *EXTRAS) == []
    assert list(tmp_path.iterdir()) == []


def test_accumulators_of_torch_do_not_load_its_compiler(tmp_path: Path) -> None:
    script = """
        import json, sys
        import torch
        import metricfold.torch
        accumulator = metricfold.torch.DeviceAccumulator({"loss": "mean"}, ["a"])
        accumulator.update("loss", torch.ones(3), dataset_ids=torch.zeros(3, dtype=torch.int64))
        print(json.dumps([name for name in sys.argv[1:] if name in sys.modules]))
    """
    assert run(sys.executable, script, tmp_path, "torch._dynamo", "torch._inductor") == []
