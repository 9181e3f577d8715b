"""`metricfold.jax` loads when asked for, and says what to install where that is missing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from jax_devices import on_devices

SOURCE = Path(__file__).parent.parent / "src"


def run(script: str, *arguments: str | Path) -> str:
    finished = subprocess.run(
        [sys.executable, "-W", "error", *arguments, "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_metricfold_alone_loads_neither_jax_nor_flax() -> None:
    script = (
        "import json, sys, metricfold\n"
        "metricfold.MetricsAggregator().record('loss', 1.0)\n"
        "print(json.dumps(sorted({'jax', 'jaxlib', 'flax', 'optax', 'metricfold.jax'} & {*sys.modules})))"
    )
    assert json.loads(run(script)) == []


@pytest.mark.parametrize(
    ("present", "missing"), [((), "jax and flax is"), (("jax",), "flax is"), (("flax",), "jax is")]
)
def test_what_is_missing_is_named_with_how_to_install_it(
    tmp_path: Path, present: tuple[str, ...], missing: str
) -> None:
    installed = Path(np.__file__).parent.parent
    for package in ("numpy", "numpy.libs"):
        if (installed / package).exists():
            (tmp_path / package).symlink_to(installed / package)
    for package in present:
        (tmp_path / f"{package}.py").touch()
    script = (
        f"import sys; sys.path[:0] = [{str(SOURCE)!r}, {str(tmp_path)!r}]\n"
        "import metricfold\n"
        "try:\n    import metricfold.jax\n"
        "except ImportError as error:\n    print(error)"
    )
    complaint = run(script, "-I", "-S")
    assert f"{missing} not installed: pip install 'metricfold[jax]'" in complaint


@on_devices(1)
def test_the_public_names_are_there() -> None:
    import metricfold.jax

    assert metricfold.jax.__all__ == [
        "DataParallel",
        "DeviceAccumulator",
        "DeviceMeshManager",
        "DistributedMetrics",
        "PackedMetrics",
    ]
    assert all(hasattr(metricfold.jax, name) for name in metricfold.jax.__all__)
