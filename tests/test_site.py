"""The site: every page is in it, and every public name in its reference. `make docs` builds it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def test_every_page_is_in_the_table_of_contents() -> None:
    index = (DOCS / "index.md").read_text()
    trees = re.findall(r"```\{toctree\}\n(?::[^\n]*\n)*\n(.*?)```", index, flags=re.DOTALL)
    listed = [name for tree in trees for name in tree.split()]
    assert len(set(listed)) == len(listed)
    assert sorted([*listed, "index"]) == sorted(page.stem for page in DOCS.glob("*.md"))


def test_every_public_module_is_in_the_reference() -> None:
    said = set(re.findall(r"automodule:: (\S+)", (DOCS / "api.md").read_text()))
    exporting = set()
    for path in (ROOT / "src").rglob("*.py"):
        parts = path.relative_to(ROOT / "src").with_suffix("").parts
        if any(part.startswith("_") and part != "__init__" for part in parts):
            continue
        body = ast.parse(path.read_text()).body
        names = [node.targets[0] for node in body if isinstance(node, ast.Assign)]
        if path.name == "__init__.py" and any(getattr(one, "id", "") == "__all__" for one in names):
            exporting.add(".".join(parts[:-1]))
        elif parts[1:2] == ("integrations",) and path.stem not in ("__init__", "phases"):
            exporting.add(".".join(parts))
    assert said == exporting - {"metricfold.demo", "metricfold.demo.jax"}


def test_messages_that_the_questions_quote_are_there() -> None:
    quoted = re.findall(r'^### "(.*)"$', (DOCS / "faq.md").read_text(), flags=re.MULTILINE)
    assert len(quoted) > 15
    source = "\n".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # texts that go on in the next line
    assert [one for one in quoted if one not in source] == []
