"""The oldest versions that pyproject.toml claims, each in an environment of its own: `make check-minimums`.

    python -m check_minimums                            # a table of all extras
    python -m check_minimums datasets lightning         # of some
    python -m check_minimums datasets --at datasets==2.21.0   # what another version would do
    python -m check_minimums --folder /tmp/minimums     # keeps the environments, for the next time

For each extra the packages that it names are installed at the lower bound that it states, PyTorch
too where its tests use that, and the tests of that part of metricfold are run there. Warnings are no errors: old
versions give some that nobody will mend.

PyTorch's wheels of those days are built with CUDA, whose libraries are gigabytes. They are not
installed: empty libraries of the same names stand in for them, which is enough to import PyTorch where
there is no GPU. That needs gcc and binutils.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
import venv
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
RUNNERS = ("pytest>=8", "pytest-timeout>=2.3", "hypothesis>=6.100", "numpy")


@dataclass(frozen=True)
class Check:
    """What is tested of an extra.

    Attributes:
        tests: arguments of pytest.
        extras: others whose packages its tests use, at their oldest versions as well.
        beside: further packages that its tests use, at any version.
    """

    tests: tuple[str, ...]
    extras: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()


CHECKS = {
    "numpy": Check(
        ("test_metric.py", "test_aggregator.py", "test_algebra.py", "test_distribution.py")
    ),
    "torch": Check(("test_torch_accumulator.py", "test_torch_axes.py", "test_store.py")),
    "jax": Check(
        ("test_jax_accumulator.py", "test_jax_spec.py", "test_jax_processes.py"),
        beside=("optax", "orbax-checkpoint", "grain", "scikit-learn"),
    ),
    "console": Check(("test_sinks_console.py",)),
    "tensorboard": Check(("test_sinks_tensorboard.py",)),
    "wandb": Check(("test_sinks_wandb.py",)),
    "mlflow": Check(("test_sinks_mlflow.py",)),
    "trackio": Check(("test_sinks_trackio.py",)),
    "comet": Check(("test_sinks_comet.py",)),
    "parquet": Check(("test_sinks_parquet.py",)),
    "prometheus": Check(("test_sinks_labelled.py",), extras=("otel",)),
    "otel": Check(("test_sinks_labelled.py",), extras=("prometheus",)),
    "lightning": Check(
        ("test_integration_lightning.py",),
        extras=("torch", "tensorboard"),
        beside=("scikit-learn", "torchdata"),
    ),
    "transformers": Check(
        ("test_integration_transformers.py",), extras=("torch", "datasets", "tensorboard")
    ),
    "accelerate": Check(
        ("test_integration_accelerate.py",),
        extras=("torch", "datasets", "tensorboard", "console"),
    ),
    "datasets": Check(("test_integration_datasets.py",), extras=("torch",)),
    "trl": Check(("test_integration_trl.py",), extras=("torch",)),
}


@dataclass
class Row:
    """What came out for one extra."""

    extra: str
    versions: list[str] = field(default_factory=list)
    result: str = ""
    seconds: float = 0.0

    @property
    def good(self) -> bool:
        return "passed" in self.result and "failed" not in self.result


class Broken(Exception):
    """An environment that could not be made."""


# -- What is claimed -------------------------------------------------------------------------------


def claimed() -> dict[str, list[Requirement]]:
    """Return what each extra asks for, here and now."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = {"numpy": project["dependencies"], **project["optional-dependencies"]}
    found = {name: [*map(Requirement, texts)] for name, texts in extras.items()}
    return {
        name: [one for one in asked if one.marker is None or one.marker.evaluate()]
        for name, asked in found.items()
        if not any(one.name == "metricfold" for one in asked)
    }


def oldest(requirement: Requirement) -> str:
    """Return the requirement for the oldest version that it allows, or for any, if it says none."""
    for specifier in requirement.specifier:
        if specifier.operator == ">=":
            return f"{requirement.name}=={specifier.version}"
    return requirement.name


def pinned(extras: Iterable[str], instead: Sequence[str]) -> list[str]:
    """Return what is installed for `extras`; `instead` replaces requirements of the same name."""
    given = {Requirement(text).name: text for text in instead}
    asked = [one for extra in extras for one in claimed()[extra]]
    return [*dict.fromkeys(given.get(one.name, oldest(one)) for one in asked)]


# -- Environments ----------------------------------------------------------------------------------


def run(*command: object, **options: object) -> str:
    done = subprocess.run(  # type: ignore[call-overload]
        [*map(str, command)], capture_output=True, text=True, check=False, **options
    )
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise Broken(next((line for line in lines if "ERROR" in line), "".join(lines[-1:])))
    return str(done.stdout)


def install(python: Path, *what: str) -> None:
    run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *what)


def make_environment(folder: Path, packages: Sequence[str], torch: Path | None) -> Path:
    """Return the Python of a new environment that has `packages`, and PyTorch from elsewhere."""
    python = folder / "bin/python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        (own,) = folder.glob("lib/python*/site-packages")
        if torch is not None:
            (own / "oldest_torch.pth").write_text(f"{torch}\n")
    install(python, *RUNNERS, *packages)
    return python


def torch_without_cuda(folder: Path, requirement: str) -> Path:
    """Install PyTorch into `folder`, once, with stand-ins for CUDA's libraries; return its packages."""
    packages = folder / requirement
    if (packages / "stand-ins").exists():
        return packages
    python = Path(sys.executable)
    target = ("--target", str(packages))
    install(python, "--no-deps", *target, requirement)
    (about,) = packages.glob("torch-*.dist-info/METADATA")
    lines = about.read_text("utf-8").splitlines(keepends=True)
    asked = [one.split(":", 1)[1].strip() for one in lines if one.startswith("Requires-Dist:")]
    needed = [
        text
        for text in asked
        if not re.match("nvidia|cuda|triton", text)
        and ((marker := Requirement(text).marker) is None or marker.evaluate({"extra": ""}))
    ]
    about.write_text(
        "".join(x for x in lines if not re.match("Requires-Dist: (nvidia|cuda|tri)", x))
    )
    install(python, *target, *(text.split(";")[0] for text in needed), "numpy")
    make_stand_ins(packages / "torch/lib", packages / "stand-ins")
    return packages


def make_stand_ins(libraries: Path, into: Path) -> None:
    """Make libraries that define what `libraries` ask of CUDA, by functions that report an error."""
    is_of_cuda = re.compile(
        r"(__)?(cuda|cu[A-Z]|cublas|cudnn|cufft|curand|cusolver|cusparse|nccl|nv)"
    )
    symbols: dict[str, set[str]] = defaultdict(set)
    names: set[str] = set()
    files = [*libraries.glob("*.so*")]
    for file in files:
        names.update(re.findall(r"NEEDED.*\[(lib(?:cu|nv|nc)[^\]]*)\]", run("readelf", "-d", file)))
        for line in run("nm", "-D", "--undefined-only", file).splitlines():
            symbol, _, version = line.split()[-1].replace("@@", "@").partition("@")
            if version.startswith(("libcu", "libnv", "libnc")):
                symbols[version].add(symbol)
            elif not version and is_of_cuda.match(symbol):
                symbols["libcudart"].add(symbol)
    into.mkdir()
    source, script = into / "functions.c", into / "versions.map"
    for name in (names | {*symbols} - {"libcudart"}) - {file.name for file in files}:
        plain = symbols["libcudart"] if name.startswith("libcudart") else set()
        functions = sorted(symbols[name] | plain)
        source.write_text("".join(f"int {one}(void) {{ return 100; }}\n" for one in functions))
        exported = "".join(f"{one};" for one in sorted(symbols[name]))
        script.write_text(f"{name} {{ {'global: ' + exported if exported else ''} }};\n")
        run(
            *("gcc", "-shared", "-fPIC", "-w", source, "-o", into / name),
            *(f"-Wl,-soname,{name}", f"-Wl,--version-script={script}"),
        )


# -- Checks ----------------------------------------------------------------------------------------


def check(extra: str, folder: Path, instead: Sequence[str], chosen: Sequence[str]) -> Row:
    """Install the oldest versions that `extra` claims, and run its tests."""
    began, row, what = time.monotonic(), Row(extra), CHECKS[extra]
    try:
        packages = pinned((extra, *what.extras), instead)
        row.versions = [one for one in packages if Requirement(one).name != "pillow"]
        of_torch = next((one for one in packages if Requirement(one).name == "torch"), None)
        torch = None if of_torch is None else torch_without_cuda(folder, of_torch)
        others = [one for one in packages if one != of_torch]
        where = folder / "_".join((extra, *packages))
        python = make_environment(where, [*others, *what.beside], torch)
        row.result = tested(python, torch, [f"tests/{one}" for one in what.tests], chosen)
    except Broken as error:
        row.result = f"not run: {error}"
    row.seconds = time.monotonic() - began
    return row


def tested(python: Path, torch: Path | None, tests: list[str], chosen: Sequence[str]) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    if torch is not None:
        environment["LD_LIBRARY_PATH"] = str(torch / "stand-ins")
    options = ("-q", "-rfE", "-p", "no:cacheprovider", "-W", "default", "--tb=short")
    done = subprocess.run(
        [python, "-m", "pytest", *options, *tests, *chosen],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or ["nothing"]
    if done.returncode:
        sys.stderr.write(done.stdout[-20_000:] + done.stderr[-2_000:])
    summary = re.sub(r", \d+ warnings?| in [\d.]+s.*|=", "", lines[-1]).strip()
    return summary if done.returncode == 0 else f"failed: {summary}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make check-minimums", description=__doc__)
    parser.add_argument("extras", nargs="*", metavar="EXTRA", help=f"of {', '.join(CHECKS)}")
    parser.add_argument("--at", action="append", default=[], help="a version instead of the oldest")
    parser.add_argument("--folder", type=Path, help="where environments are kept")
    parser.add_argument("--tests", default="", help="an expression for pytest's -k")
    given = parser.parse_args(arguments)
    if unknown := {*given.extras} - {*CHECKS}:
        parser.error(f"no check of {', '.join(sorted(unknown))}: there are {', '.join(CHECKS)}")
    with tempfile.TemporaryDirectory(prefix="metricfold-minimums-") as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        rows = []
        for extra in given.extras or CHECKS:
            rows.append(check(extra, folder, given.at, ("-k", given.tests) if given.tests else ()))
            print(f"{extra}: {rows[-1].result} ({rows[-1].seconds:.0f} s)", file=sys.stderr)
    print(f"Python {sys.version.split()[0]}\n")
    print("| extra | oldest versions | its tests |\n|---|---|---|")
    for row in rows:
        print(f"| {row.extra} | {', '.join(row.versions)} | {row.result} |")
    return 0 if all(row.good for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
