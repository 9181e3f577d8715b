"""The order in which the parts of the package may know each other: each imports only those before it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import metricfold

ROOT = Path(metricfold.__file__).parent

ORDER = (
    *(
        "_core.runtime",
        "metric",
        "data.sample",
        "_core.device.arrays",
        "_core.sketch",
        "_core.fold",
    ),
    *("_core.device", "_core.reduce", "communicator", "_core.exchange", "_core.view"),
    *("_core.intake", "data", "torch", "jax", "sinks", "integrations", "demo", "cli"),
)
"""Folders and modules, the lowest first. Of a folder's module that stands here itself, that counts."""

ALIASES = {"histogram", "transform", "data.batch", "device_lanes"}
"""Where users and their pickles may still look for what has moved."""


def modules() -> Iterator[tuple[str, Path]]:
    """Yield each module's name, without the package's, and its file."""
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name not in ("", "_core"):
            yield name, path


def part_of(name: str) -> str:
    """Return the longest entry of `ORDER` that a module is, or is in."""
    parts = name.split(".")
    found = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((part for part in found if part in ORDER), "")


def imported_by(path: Path) -> Iterator[tuple[str, int]]:
    """Yield what a module imports of the package, also within its functions, and in which lines."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            # A name may be a module's: `from metricfold._core.fold import names`.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.startswith("metricfold."):
                yield name.removeprefix("metricfold."), node.lineno


def test_each_module_has_a_place_in_the_order() -> None:
    places = {name: part_of(name) for name, _ in modules() if name not in ALIASES}
    assert [name for name, part in places.items() if not part] == []
    assert set(ORDER) - set(places.values()) == set()


def test_no_part_imports_one_that_comes_after_it() -> None:
    wrong = []
    for name, path in modules():
        if name in ALIASES:
            continue
        for imported, line in imported_by(path):
            known = part_of(imported)
            if known and ORDER.index(known) > ORDER.index(part_of(name)):
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {imported}")
    assert wrong == []


def test_no_part_imports_the_public_names_that_are_made_of_it() -> None:
    # Within the package a name is imported from where it is; examples and the demo are users.
    wrong = [
        name
        for name, path in modules()
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module == "metricfold"
        if part_of(name) not in ("demo", "cli")
    ]
    assert wrong == []


def test_no_other_room_asks_what_class_a_handler_or_a_state_is_of() -> None:
    wrong = []
    for name, path in modules():
        if part_of(name) == "_core.fold":
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance":
                asked = ast.unparse(node.args[1])
                # What registers a handler has to refuse what is none.
                if re.search(r"(Handler|State)\b", asked) and asked != "AggregationHandler":
                    wrong.append(f"{name}:{node.lineno} {asked}")
    assert wrong == []
