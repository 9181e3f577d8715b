"""The documentation's own code runs, and says what the documentation says it does."""

from __future__ import annotations

import ast
import contextlib
import doctest
import importlib
import importlib.util
import os
import re
import sqlite3
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest
from jax_devices import run_devices

import metricfold

ROOT = Path(__file__).parent.parent
# Pages whose Python stands on its own, with the results of expressions in comments.
SELF_CONTAINED = (
    "docs/aggregation.md",
    "docs/alerts.md",
    "docs/audit.md",
    "docs/axes.md",
    "docs/coming-from.md",
    "docs/device.md",
    "docs/handlers.md",
    "docs/inside-the-model.md",
    "docs/tutorial.md",
    "docs/which-call.md",
    "docs/report.md",
    "docs/look.md",
)


# Pages that run as they stand, from their first block on, and how many blocks of each say that they
# cannot, and why: "# not run: ...".
FROM_THE_TOP = {
    "docs/checkpoints.md": 1,
    "docs/distributed.md": 0,
    "docs/histograms.md": 0,
    "docs/logging.md": 0,
}
# Pages whose code other tests run.
RUN_ELSEWHERE = {
    "docs/data.md": "test_collator.py",
    "docs/datasets.md": "test_integration_datasets.py",
    "docs/trl.md": "trl_trainings.py",
}
# Pages whose code is of somebody's trainer or job; their programs are run, of which the pages show parts.
OF_PROGRAMS = {
    "docs/accelerate.md",
    "docs/engines.md",
    "docs/jax-processes.md",
    "docs/lightning.md",
    "docs/parallelism.md",
    "docs/transformers.md",
    "README.md",
}

# What runs in a process of its own, offline.
TRACKERS = "docs/trackers.md"
# What runs where JAX has four devices.
ON_DEVICES = "docs/jax.md"


def modules() -> list[str]:
    """Return the names of all modules, found without importing any."""
    paths = (path.relative_to(ROOT / "src") for path in (ROOT / "src").rglob("*.py"))
    names = (".".join(path.with_suffix("").parts) for path in paths)
    return sorted(name.removesuffix(".__init__") for name in names)


WITH_JAX = [name for name in modules() if {"jax", "grain"} & {*name.split(".")}]
HERE = [
    name
    for name in modules()
    if name not in WITH_JAX and not name.startswith("metricfold.demo")  # it needs its own folder
]


@pytest.mark.parametrize("name", HERE)
def test_docstring_examples_run(name: str) -> None:
    for framework in {"accelerate", "torch", "datasets", "transformers", "trl"} & {
        *name.split(".")
    }:
        pytest.importorskip(framework)
    assert failed_examples(name) == 0


def test_docstring_examples_of_what_loads_jax_run() -> None:
    assert "metricfold.jax" in WITH_JAX
    for name in WITH_JAX:
        assert run_devices(failed_examples, 4, name) == 0


def failed_examples(name: str) -> int:
    """Run the examples in the docstrings of what lies in a module, wherever it says that it does."""
    module: ModuleType = importlib.import_module(name)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    tests = doctest.DocTestFinder(recurse=False).find(module)
    for thing in filter(partial(lies_in, module), vars(module).values()):
        globs = vars(module).copy()
        tests += doctest.DocTestFinder().find(thing, thing.__name__, module=False, globs=globs)
    for test in tests:
        runner.run(test)
    return runner.failures


def lies_in(module: ModuleType, thing: object) -> bool:
    if not isinstance(thing, type | FunctionType):
        return False
    parts = vars(thing).values() if isinstance(thing, type) else [thing]
    spaces = [part.__globals__ for part in parts if isinstance(part, FunctionType)]
    return any(one is vars(module) for one in spaces) or (
        not spaces and thing.__module__ == module.__name__
    )


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


# A page reduces where a reader would, not where something has come in.
@pytest.mark.filterwarnings("ignore:the interval is empty:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:the derived metric 'perplexity':RuntimeWarning")
@pytest.mark.parametrize("page", SELF_CONTAINED)
def test_the_examples_of_a_page_run_and_give_what_their_comments_say(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert checked_examples(page) > 0


@pytest.mark.parametrize(("page", "not_run"), FROM_THE_TOP.items())
def test_a_page_runs_from_its_top_but_for_blocks_that_say_why_not(
    page: str, not_run: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("torch", "tensorboard", "rich"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    found = blocks(page)
    runs = [block for block in found if not block.startswith("# not run: ")]
    assert len(found) - len(runs) == not_run
    try:
        assert checked_blocks(runs, {}) or page in {"docs/histograms.md", "docs/logging.md"}
    finally:
        leave_the_job()


def leave_the_job() -> None:
    distributed = sys.modules["torch.distributed"]
    if distributed.is_initialized():
        distributed.destroy_process_group()


def test_no_page_is_left_out_and_no_other_block_says_that_it_is_not_run() -> None:
    pages = {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")} | {"README.md"}
    known = {*SELF_CONTAINED, *FROM_THE_TOP, *RUN_ELSEWHERE, *OF_PROGRAMS, TRACKERS, ON_DEVICES}
    assert {page for page in pages if blocks(page)} == known
    for page, test in RUN_ELSEWHERE.items():
        assert page in (ROOT / "tests" / test).read_text()
    for page in known - {*FROM_THE_TOP}:
        for block in blocks(page):
            assert "# not run" not in block


def test_the_examples_of_the_jax_page_run_on_devices() -> None:
    assert run_devices(checked_examples, 4, ON_DEVICES) > 0


def test_the_examples_of_the_trackers_run_offline(tmp_path: Path) -> None:
    for package in (
        "comet_ml",
        "mlflow",
        "opentelemetry",
        "pandas",
        "prometheus_client",
        "trackio",
    ):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")
    # In a process of its own: Comet's import patches other packages.
    code = f"""
import socket
import test_docs
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = str(free.getsockname()[1])
blocks = test_docs.blocks
test_docs.blocks = lambda page: [block.replace("9464", port) for block in blocks(page)]
print("checked", test_docs.checked_examples({TRACKERS!r}))
"""
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT), *sys.path]),
            "MLFLOW_TRACKING_URI": f"file:{tmp_path}/mlruns",
            "MLFLOW_ALLOW_FILE_STORE": "true",
            "TRACKIO_DIR": str(tmp_path / "trackio"),
            "COMET_OFFLINE_DIRECTORY": str(tmp_path / "comet"),
            "COMET_LOGGING_CONSOLE": "ERROR",
        },
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "checked 3" in ended.stdout
    assert "metricfold" not in ended.stderr, "nothing is missing anywhere"
    assert len([*tmp_path.glob("comet/*.zip")]) == 1


def test_the_sinks_of_ones_own_on_the_page_of_logging_work(tmp_path: Path) -> None:
    page = (ROOT / "docs/logging.md").read_text()
    namespace: dict[str, Any] = {}
    for block in re.findall(
        r"```python\n(.*?)```", page.partition("## Your own sink")[2], re.DOTALL
    ):
        exec(block, namespace)
    path = tmp_path / "run.db"
    with metricfold.MetricsLogger(
        [namespace["PrintSink"](), namespace["SQLiteSink"](path, select="*/loss")]
    ) as logger:
        for step in (1, 2, 3):
            logger.log(step, {"loss": step / 4, "other": 0.0}, prefix="train")
        logger.rewind(2)
        assert logger.flush()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        rows = connection.execute("SELECT * FROM metrics").fetchall()
    assert rows == [(1, "train/loss", 0.25), (2, "train/loss", 0.5)]


def checked_examples(page: str) -> int:
    """Run the code of a page; return how many results it states, all of which are right."""
    namespace: dict[str, Any] = {}
    exec("import math\nfrom metricfold import *", namespace)
    return checked_blocks(blocks(page), namespace)


def checked_blocks(found: list[str], namespace: dict[str, Any]) -> int:
    checked = 0
    for block in found:
        exec(block, namespace)
        lines = block.splitlines()
        for node in ast.parse(block).body:
            after = lines[node.end_lineno - 1 : node.end_lineno + 1]
            said = re.search(
                r"#\s*(\{.*\}|\[.*\]|-?[\d.]+)$", "\n".join(after[: 1 + after[-1].startswith("#")])
            )
            if isinstance(node, ast.Expr) and said:
                expected = ast.literal_eval(said.group(1))
                # The call has closed the interval above; the run view stays as it was.
                assert eval(ast.unparse(node), namespace) == expected
                checked += 1
    return checked


@pytest.mark.parametrize(
    "page",
    sorted(
        str(path.relative_to(ROOT)) for path in ROOT.glob("**/*.md") if ".venv" not in str(path)
    ),
)
def test_links_between_pages_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert ((ROOT / page).parent / target).exists(), target


def test_the_changelog_begins_with_this_version_and_says_each_thing_once() -> None:
    said = (ROOT / "CHANGELOG.md").read_text()
    assert re.findall(r"^## (\S+)", said, re.MULTILINE)[0] == metricfold.__version__
    lines = re.findall(r"^- .*(?:\n  .*)*", said, re.MULTILINE)
    assert len(lines) > 100
    assert [line for line in lines if lines.count(line) > 1] == []
    stray = re.sub(
        r"^(- .*(\n  .*)*|#+ .*)$", "", said.partition("### What")[2], flags=re.MULTILINE
    )
    assert stray.strip() == "changes for you"
    titles = re.findall(r"^#### (.*)", said, re.MULTILINE)
    assert len(titles) == len({*titles})


def test_the_quickstart_runs_and_the_readme_shows_its_ten_lines(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    readme = blocks("README.md")[0]
    quickstart = (ROOT / "examples/quickstart.py").read_text()
    for call in (
        'run.aggregator.update(batch.pop("metrics"))',
        'losses.token_loss(logits, batch["labels"], batch["dataset_ids"])',
        "losses = run.aggregator.drain(losses)",
        "run.log(step)",
    ):
        assert call in readme
        assert call in quickstart
    ended = subprocess.run(
        [sys.executable, str(ROOT / "examples/quickstart.py")],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    records = metricfold.read_jsonl(tmp_path / "runs/quickstart/metrics.jsonl")
    assert [record.step for record in records] == [0, 50, 100]
    for key in ("train/loss", "train_docs/loss", "train_code/loss"):
        assert records[-1].metrics[key] < records[0].metrics[key] - 2
    assert f"{records[-1].metrics['train/tokens_seen']:,.0f}" in ended.stdout
