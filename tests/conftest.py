"""What holds for all tests: what is skipped, and how others are spared what they need not do.

What is not installed is not tested: frameworks are optional, and so are the tests of each. A test
module whose subject is a framework imports it at its top. Where that framework is not
installed, all of the module's tests are skipped. Others ask where they need one, by
`pytest.importorskip`, or have `ranks`, `jax_devices` and `jax_processes` ask for them.
"""

from __future__ import annotations

import gc
import logging
import os
import re
import sys
from collections.abc import Generator, Iterator
from importlib.util import find_spec
from pathlib import Path

import hypotheses  # noqa: F401 - names the profile that --hypothesis-profile=dev asks for
import pytest
from jax_devices import compile_quickly

compile_quickly()

# Whoever connects to a torch store is looked up by name, twice, and the store answers nobody meanwhile:
# a question to which a name server has no answer must not take five seconds each time.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")

FRAMEWORKS = (
    *("torch", "torchdata", "lightning", "transformers", "accelerate", "datasets"),
    *("jax", "flax", "optax", "grain", "orbax"),
)

LONGEST = (
    *("demo", "integration_trl", "jax_accumulator", "logger_ends", "model_watch", "processes"),
    *("jax_processes", "store", "parallelism", "reduction", "integration_transformers", "messages"),
    *("benchmarks", "routes", "demo_jax", "engines", "look_page", "scale"),
    *("integration_accelerate", "sinks_wandb", "sinks_trackio", "alerts_of_trainings"),
    *("torch_recomputation", "meaning", "jax_accumulator_types", "docs", "sinks_comet"),
    *("histogram", "integration_lightning", "jax_fingerprint", "torch_fused"),
    *("torch_accumulator", "gpu_check"),
)
"""Test modules that a worker begins before all others, so that no worker is left alone with one.

Those that compute and those that wait take turns.
"""


def lacking(module: Path) -> list[str]:
    """Return the frameworks that a test module imports at its top and that are not installed."""
    imported = re.findall(r"^(?:import|from) (\w+)", module.read_text("utf-8"), re.MULTILINE)
    return [name for name in FRAMEWORKS if name in imported and find_spec(name) is None]


class NotInstalled(pytest.Module):
    """A test module that cannot be imported here."""

    def collect(self) -> list[pytest.Item]:
        pytest.skip(f"needs {' and '.join(lacking(self.path))}", allow_module_level=True)


def pytest_pycollect_makemodule(
    module_path: Path, parent: pytest.Collector
) -> pytest.Module | None:
    """Tell pytest how to collect a file: as it always does, unless something is lacking."""
    return NotInstalled.from_parent(parent, path=module_path) if lacking(module_path) else None


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m alone`, import no file that has no such test: it takes longer than to run them."""
    test_file = collection_path.suffix == ".py" and config.option.markexpr == "alone"
    return (test_file and "mark.alone" not in collection_path.read_text("utf-8")) or None


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Keep the garbage collector away from what is imported: each pass over it takes 0.4 s."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest, and refuse what only works in one process or in one order."""
    turns = {f"test_{name}": turn for turn, name in enumerate(LONGEST)}
    items.sort(key=lambda item: turns.get(item.path.stem, len(turns)))
    if "jax" in sys.modules:
        raise pytest.UsageError(
            "a test module imports JAX, perhaps through another: pytest's own process must be able "
            "to fork, which JAX warns about. Import it where the test needs it"
        )
    for item in items:
        if re.search(r" at 0x[0-9a-f]+", item.nodeid):
            raise pytest.UsageError(
                f"{item.nodeid} has an address in its name: give parametrize ids=, such as "
                "ids=lambda one: one.__name__"
            )


class Unfinished:
    """The tests that have crashed a worker, or that were left out then: the cache calls them failed.

    xdist starts other workers and lets them go on, but not for ever, and pytest forgets a failure when
    the test has passed since.
    """

    def __init__(self) -> None:
        self._collected: set[str] = set()
        self._over: set[str] = set()
        self._crashed: set[str] = set()

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        self._collected.update(ids)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "teardown":
            self._over.add(report.nodeid)
        elif report.when == "???":  # thus xdist reports a crash
            self._crashed.add(report.nodeid)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        unfinished = dict.fromkeys((self._collected - self._over) | self._crashed, True)
        if unfinished and (cache := session.config.cache):
            cache.set("cache/lastfailed", cache.get("cache/lastfailed", {}) | unfinished)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Unfinished())


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """With `--last-failed`, as `make test` does at its end, name what has failed and passes now."""
    passed = terminalreporter.stats.get("passed", [])
    if config.getoption("lf", default=False) and passed:
        tests = "1 test" if len(passed) == 1 else f"{len(passed)} tests"
        terminalreporter.section(f"{tests} failed under load and passed alone:", "!", yellow=True)
        for report in passed:
            terminalreporter.line(report.nodeid, yellow=True)


@pytest.fixture(autouse=True)
def _close_loggers_left_open() -> Iterator[None]:
    """Close what a test has left open, for it would answer the signals of the tests after it."""
    yield
    if ends := sys.modules.get("metricfold.sinks.ends"):
        for logger in [*ends._watch.watched]:
            logger.close()


@pytest.fixture(autouse=True)
def _keep_the_collector_from_what_was_imported() -> Iterator[None]:
    """Libraries that are imported where a test needs them stay: trainers collect garbage in each run."""
    known = len(sys.modules)
    yield
    if len(sys.modules) > known + 300:
        gc.collect()
        gc.freeze()


@pytest.fixture
def warned() -> Iterator[list[str]]:
    """Yield what metricfold warns of."""
    texts: list[str] = []

    class Heard(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            texts.append(record.getMessage())

    heard = Heard()
    logging.getLogger("metricfold").addHandler(heard)
    yield texts
    logging.getLogger("metricfold").removeHandler(heard)
