"""Trainings by other engines count what they trained on, on two ranks that read unevenly."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks

pytest.importorskip("torch")

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples/engines"
# The page's sections, the example of each, and what it needs.
ON_RANKS = {"fabric_mixture": "lightning", "ignite_mixture": "ignite"}
SECTIONS = {"Lightning Fabric": "fabric_mixture", "PyTorch Ignite": "ignite_mixture"}


def train_on_rank(rank: int, folder: Path) -> dict[str, Any]:
    """Return what each engine, ours and the truth say, by the name of the example."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # asked for, though we have a group
    sys.path.insert(0, str(EXAMPLES))
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
