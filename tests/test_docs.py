"""The documentation's own code runs, and says what the documentation says it does."""

from __future__ import annotations

import ast
import doctest
import importlib
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import metricfold

ROOT = Path(__file__).parent.parent
# Pages whose Python stands on its own, with the results of expressions in comments.
SELF_CONTAINED = ("docs/aggregation.md", "docs/handlers.md")


def modules() -> list[str]:
    found = pkgutil.walk_packages(metricfold.__path__, "metricfold.")
    return [module.name for module in found if not module.name.startswith("metricfold.demo")]


@pytest.mark.parametrize("name", modules())
def test_docstring_examples_run(name: str) -> None:
    module: ModuleType = importlib.import_module(name)
    failed, _ = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert failed == 0


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


# A page reduces where a reader would, not where something has come in.
@pytest.mark.filterwarnings("ignore:the interval is empty:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:the derived metric 'perplexity':RuntimeWarning")
@pytest.mark.parametrize("page", SELF_CONTAINED)
def test_the_examples_of_a_page_run_and_give_what_their_comments_say(page: str) -> None:
    namespace: dict[str, Any] = {}
    exec("import math\nfrom metricfold import *", namespace)
    checked = 0
    for block in blocks(page):
        exec(block, namespace)
        lines = block.splitlines()
        for node in ast.parse(block).body:
            after = lines[node.end_lineno - 1 : node.end_lineno + 1]
            said = re.search(r"#\s*(\{.*\})$", "\n".join(after[: 1 + after[-1].startswith("#")]))
            if isinstance(node, ast.Expr) and said:
                expected = ast.literal_eval(said.group(1))
                # The call has closed the interval above; the run view stays as it was.
                assert eval(ast.unparse(node), namespace) == expected
                checked += 1
    assert checked > 0


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


def test_the_quickstart_runs_and_the_readme_shows_its_ten_lines(tmp_path: Path) -> None:
    readme = blocks("README.md")[0]
    quickstart = (ROOT / "examples/quickstart.py").read_text()
    for call in (
        'aggregator.update(batch.pop("metrics"))',
        'logger.log(step, aggregator, prefix="train")',
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
    records = metricfold.read_jsonl(tmp_path / "runs/quickstart.jsonl")
    assert [record.step for record in records] == [0, 50, 100]
    assert records[-1].metrics["train/loss"] < records[0].metrics["train/loss"] - 2
    assert f"{records[-1].metrics['train/tokens_seen']:,.0f}" in ended.stdout
