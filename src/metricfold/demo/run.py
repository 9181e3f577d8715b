"""The command ``metricfold demo``: checks what was asked for, trains, proves, resumes, proves."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from metricfold.demo.folder import RunFolder
from metricfold.demo.framework import Framework, virtual_devices
from metricfold.demo.launch import run_ranks
from metricfold.demo.mixture import SAMPLES_PER_STEP
from metricfold.demo.texts import BUILT_IN, DemoError, Text, read_texts

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["run_demo"]

_RESUMED_STEPS = 10


def run_demo(
    *,
    framework: Framework,
    parts: int | None,
    steps: int | None,
    data: Mapping[str, Path],
    out: Path,
    resume: bool,
    settings: Mapping[str, float] | None = None,
) -> None:
    """Train on `parts` ranks or devices, prove what was logged, and go on with another number.

    Raises `DemoError`: before anything is written or started, if it cannot be done as asked;
    later, if a rank fails or if a number that was logged is not what the data say.
    """
    parts, steps = parts or framework.parts, steps or framework.steps
    if parts > SAMPLES_PER_STEP:
        raise DemoError(
            f"--{framework.part}s {parts} is too many: a step has {SAMPLES_PER_STEP} samples, and "
            f"each {framework.part} needs one; give 1 to {SAMPLES_PER_STEP}"
        )
    _check_packages(framework.packages)
    folder = RunFolder(out)
    if resume:
        if data:
            raise DemoError(
                "--data cannot go with --resume: a run goes on with the texts that it began with"
            )
        if settings:
            raise DemoError(
                "--seed and --lr cannot go with --resume: a run goes on with what it began with"
            )
        folder.check_resumable(framework)
    else:
        folder.check_new()
        folder.begin(_read(data), framework, settings)

    # What follows needs the packages that have just been found.
    from rich.console import Console  # noqa: PLC0415

    console = Console()
    try:
        _train_and_prove(console, folder, parts, steps, resume=resume)
    except BaseException:
        # A rank that was killed while it drew has left no cursor, and the line it was drawing on.
        console.show_cursor()
        if console.is_terminal:
            console.print()
        raise


def _train_and_prove(
    console: Console, folder: RunFolder, parts: int, steps: int, *, resume: bool
) -> None:
    from metricfold.demo import report  # noqa: PLC0415 - needs rich
    from metricfold.demo.proof import count, prove  # noqa: PLC0415

    report.print_opening(console, folder, parts, steps)
    _train(folder, parts, steps, resume=resume)
    proof = prove(folder)
    report.print_proof(console, folder, proof)
    proof.check()

    others = parts + 1 if parts < SAMPLES_PER_STEP else parts - 1
    console.print(
        "\nThe run stops here, and goes on from its checkpoint on "
        f"{count(others, folder.framework.part)}.\n"
    )
    _train(folder, others, min(steps, _RESUMED_STEPS), resume=True)
    proof = prove(folder)
    report.print_resumed(console, folder, proof, others)
    proof.check()
    report.print_where_to_look(console, folder)


def _train(folder: RunFolder, parts: int, steps: int, *, resume: bool) -> None:
    folder.begin_launch()
    on_devices = folder.framework.part == "device"
    run_ranks(
        folder.framework.module,
        [str(folder.path), "--steps", str(steps), *(["--resume"] if resume else [])],
        ranks=1 if on_devices else parts,
        logs=folder.logs,
        environment=virtual_devices(parts) if on_devices else {},
    )


def _check_packages(packages: Mapping[str, str]) -> None:
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        extras = ",".join(dict.fromkeys(packages[one] for one in missing if packages[one]))
        ours = [f"'metricfold[{extras}]'"] if extras else []
        install = " ".join([*ours, *(one for one in missing if not packages[one])])
        raise DemoError(f"the demo needs {' and '.join(missing)}: run pip install {install}")


def _read(data: Mapping[str, Path]) -> dict[str, list[Text]]:
    if not data:
        return {name: read() for name, read in BUILT_IN.items()}
    texts = {}
    for name, path in data.items():
        try:
            texts[name] = read_texts(path)
        except DemoError as error:
            raise DemoError(f"--data {name}: {error}") from error
    return texts
