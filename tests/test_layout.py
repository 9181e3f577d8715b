"""The order in which the parts of the package may know each other: each imports only those before it."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import pickle
import pickletools
import pydoc
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType

import pytest

import metricfold
from metricfold.sinks import Record

ROOT = Path(metricfold.__file__).parent

ORDER = (
    *(
        "_core.runtime",
        "metric",
        "data.origin",
        "data.sample",
        "_core.device.arrays",
        "_core.sketch",
        "_core.fold",
    ),
    *("_core.device", "_core.reduce", "communicator", "_core.exchange", "_core.view"),
    *(
        "_core.intake",
        "alerts",
        "data",
        "torch",
        "jax",
        "sinks",
        "integrations",
        "look",
        "run",
        "demo",
        "cli",
        "__main__",
    ),
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


# -- What is public says where users find it -----------------------------------------------------


def public_names() -> list[tuple[str, str]]:
    """Return each public module, and each name that it exports."""
    found = []
    for name in PUBLIC:
        if {"torch", "jax"} & {*name.split(".")}:
            pytest.importorskip(name.rpartition(".")[2])
        found += [(name, one) for one in importlib.import_module(name).__all__]
    return found


PUBLIC = (
    "metricfold",
    "metricfold.communicator",
    "metricfold.data",
    "metricfold.histogram",
    "metricfold.jax",
    "metricfold.look",
    "metricfold.sinks",
    "metricfold.torch",
)


def test_public_objects_say_the_public_module_that_they_are_imported_from() -> None:
    wrong = []
    for module, name in public_names():
        found = getattr(importlib.import_module(module), name)
        wanted = (
            "metricfold" if name in metricfold.__all__ and module != "metricfold.torch" else module
        )
        if hasattr(found, "__module__") and found.__module__ != wanted:
            wrong.append(f"{module}.{name} says {found.__module__}")
    assert wrong == []


def test_representations_help_and_hints_of_public_objects_show_no_private_path() -> None:
    for module, name in public_names():
        found = getattr(importlib.import_module(module), name)
        assert "_core" not in repr(found)
        if isinstance(found, type | FunctionType):
            assert "_core" not in pydoc.plain(pydoc.render_doc(found)), name
        if isinstance(found, type):
            typing.get_type_hints(found)  # as frameworks do that fill classes from files
        if dataclasses.is_dataclass(found):  # as pydantic does
            assert not any(isinstance(one.type, str) for one in dataclasses.fields(found)), name


def test_a_copied_class_of_a_private_module_is_still_the_public_one() -> None:
    from metricfold._core.view.snapshot import Snapshot

    assert Snapshot is metricfold.Snapshot
    assert repr(Snapshot) == "<class 'metricfold.Snapshot'>"


def paths_in(pickled: bytes) -> set[str]:
    """Return the modules that a pickle names."""
    texts = (argument for _, argument, _ in pickletools.genops(pickled))
    return {text for text in texts if isinstance(text, str) and text.startswith("metricfold")}


def test_what_is_pickled_names_no_private_path_so_that_it_is_found_when_files_move() -> None:
    metrics = [
        metricfold.Metric("a", "loss", 1.0, "mean", 2.0),
        metricfold.Metric("a", "len", 3.0, "distribution"),
        metricfold.Metric("a", "kind", "x", "categorical_count"),
        metricfold.Metric("a", "own", 1.0, "a type of mine"),
    ]
    record = Record(1, 2.0, {"train/loss": 1.5})
    batch = metricfold.MetricBatch.from_metrics(metrics)
    handlers = [metricfold.MeanAggHandler(), metricfold.DistributionAggHandler(percentiles=(1, 2))]
    for thing in (*metrics, record, batch, *handlers, metricfold.AggregationType.MEAN):
        pickled = pickle.dumps(thing, protocol=4)
        assert [path for path in paths_in(pickled) if "_core" in path] == []
        assert type(pickle.loads(pickled)) is type(thing)
    assert repr(pickle.loads(pickle.dumps(batch))) == repr(batch)


def test_a_pickled_accumulator_names_no_private_path() -> None:
    pytest.importorskip("torch")
    from metricfold.torch import DeviceAccumulator

    pickled = pickle.dumps(DeviceAccumulator({"loss": "mean", "len": "distribution"}, ["a"]), 4)
    assert [path for path in paths_in(pickled) if "_core" in path] == []
    assert isinstance(pickle.loads(pickled), DeviceAccumulator)
