"""The benchmarks run, and what they print is a table of numbers; how fast anything is, nobody asks."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from threading import Thread

import pytest
import torch
import torch.distributed as dist
from benchmarks.__main__ import SUBJECTS, complaints
from benchmarks.log import _log
from benchmarks.peers import axis_table, tried
from benchmarks.peers.differing import CASES, outcome
from benchmarks.peers.libraries import BARE, OURS, Library
from benchmarks.peers.run import Measured, Point, run
from benchmarks.table import Row, Section, at_most
from benchmarks.traffic import traffic_of
from benchmarks.workloads import mixed, small
from ranks import preload, run_ranks

from metricfold import MetricsAggregator
from metricfold.communicator.tree import steps

ROOT = Path(__file__).parents[1]


def benchmarks(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONWARNINGS": "error"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_a_quick_run_prints_a_table_of_finite_ratios() -> None:
    # All of it runs in CI, as `make bench BENCH_ARGS=--quick`, which fails as the next tests say.
    done = benchmarks("--quick", "log")
    assert done.returncode == 0, done.stderr
    lines = [line.strip("|").split("|") for line in done.stdout.splitlines() if line[:1] == "|"]
    rows = [[cell.strip() for cell in line] for line in lines if "---" not in line[1]]
    figures = [row for row in rows if row[0] != "what"]
    for what, _, _, figure, _, budget, verdict in figures:
        assert float(figure.split()[0]) > 0, what
        assert verdict in (("pass", "MISS") if budget else ("",)), what
    counted = {row[0]: row[3] for row in figures if "per log" in row[0]}
    assert counted == {"2 ranks: collectives per log": "1", "2 ranks, tree: rounds per log": "1"}
    assert "bare all_reduce" in {row[2].split(":")[0] for row in figures}


def test_a_subject_that_is_none_is_refused_with_those_that_are() -> None:
    done = benchmarks("--quick", "logs")
    assert done.returncode == 2
    assert "no subject 'logs'" in done.stderr
    assert "on_jax" in done.stderr
    for subject in SUBJECTS:
        assert find_spec(f"benchmarks.{subject}")


def measured(*contenders: str, figure: float = 1.5) -> list[Section]:
    return [Section("a subject", [Row("ours", "1 s", f"{one}: 2 s", figure) for one in contenders])]


def test_a_subject_fails_when_a_contender_that_is_installed_was_not_measured() -> None:
    wanted = {"numpy's": ("numpy",), "anyone's": (), "nobody's": ("no_such_package",)}
    assert complaints(wanted, measured("numpy's", "anyone's")) == []
    assert complaints(wanted, measured("anyone's")) == ["numpy's: not measured"]
    assert complaints(wanted, measured("numpy's")) == ["anyone's: not measured"]
    nothing = [*measured("numpy's", "anyone's"), Section("devices")]
    assert complaints(wanted, nothing) == ["devices: no rows"]
    failed = Section("peers", head=["library", "4"], lines=[["theirs", "failed"]])
    assert complaints({}, [failed]) == ["theirs: failed"]


@pytest.mark.parametrize("figure", [math.nan, math.inf, 0.0, -1.0])
def test_a_subject_fails_when_a_figure_is_none(figure: float) -> None:
    wrong = [Section("another", [Row("loss", "1 s", "theirs", figure)])]
    assert complaints({}, wrong) == [f"loss: the figure is {figure}"]


def test_nothing_is_a_figure_where_the_budget_is_nothing() -> None:
    assert complaints({}, [Section("waits", [Row("n", "", "", 0, "", None, at_most(0))])]) == []


# -- What is counted -----------------------------------------------------------------------------

_NUMBERS = 100_000


def test_traffic_counts_the_collectives_and_bytes_of_each_way_to_issue_them() -> None:
    for rank in run_ranks(_issue, 2):
        assert rank["nothing"] == ([], 0)
        kinds, sent = rank["all_reduce"]
        assert kinds == ["all_reduce"]
        # Two ranks reduce by sending half of the numbers and then the other half's sums.
        assert 8 * _NUMBERS <= sent < 8.1 * _NUMBERS
        kinds, sent = rank["all_gather"]
        assert kinds == ["all_gather"]
        assert 4 * _NUMBERS <= sent < 4.1 * _NUMBERS
        kinds, sent = rank["barrier"]
        assert kinds == ["barrier"]
        assert 0 < sent < 1000
        assert rank["objects"][0] == ["all_gather", "all_gather"]
        assert rank["from a thread"][0] == ["all_reduce"]
        kinds, sent = rank["a group of its own"]
        assert kinds == ["all_gather"]
        assert 0 < sent < 4000


def _issue(rank: int) -> dict[str, tuple[list[str], int]]:
    aggregator = MetricsAggregator()

    def reduce() -> None:
        aggregator.record("loss", 1.0)
        aggregator.reduce()

    reduce()
    numbers = torch.zeros(_NUMBERS, dtype=torch.float64)
    halves = torch.zeros(_NUMBERS // 2, dtype=torch.float64)
    ways = {
        "nothing": lambda: None,
        "all_reduce": lambda: dist.all_reduce(numbers),
        "all_gather": lambda: dist.all_gather([halves.clone(), halves.clone()], halves),
        "barrier": dist.barrier,
        "objects": lambda: dist.all_gather_object([None, None], {"rank": rank}),
        "from a thread": lambda: _in_a_thread(lambda: dist.all_reduce(numbers)),
        "a group of its own": reduce,
    }
    counted = {}
    for name, issue in ways.items():
        dist.barrier()
        counted[name] = traffic_of(issue)
    return counted


@pytest.mark.parametrize("size", [3, 5])
def test_a_tree_takes_the_messages_of_its_rounds_and_a_gather_takes_one_collective(
    size: int,
) -> None:
    for rank, by_tree in enumerate(run_ranks(_log, size, small(4), 1, "tree")):
        of_rank = steps(rank, size)
        wanted = {"send": [s.sends for s in of_rank], "recv": [s.receives for s in of_rank]}
        assert Counter(by_tree.issued) == {kind: sum(those) for kind, those in wanted.items()}
    for gathered in run_ranks(_log, size, small(4), 1, "gather"):
        assert gathered.issued == ["all_gather"]


def _in_a_thread(issue: Callable[[], object]) -> None:
    thread = Thread(target=issue)
    thread.start()
    thread.join()


def _has_loaded(rank: int, module: str) -> bool:
    return module in sys.modules


def test_ranks_find_loaded_what_was_asked_for_after_others_had_started() -> None:
    assert run_ranks(_has_loaded, 1, "wave") == [False]
    preload("wave")
    assert run_ranks(_has_loaded, 1, "wave") == [True]


# -- Peers, as far as they need no other package -------------------------------------------------


def test_a_workload_of_many_samples_has_as_many() -> None:
    for samples in (100, 1000, 10**5, 10**7):
        workload = mixed(4, 1, samples, None)
        batches = list(workload.interval(0, 0))
        values = sum(len(batch[-1].values) for batch in batches)
        assert values * workload.repeats == samples
        # The rest is said again, so that nobody's memory is full of values that wait.
        assert values <= 10**5


def test_a_table_shows_each_point_and_the_rest_from_the_first_to_the_last() -> None:
    here = Measured(0.0123, 1, 520, 2_000_000, 0.05)
    there = Measured(1.5, 1, 1040, 2_000_000, 0.1)
    points = [Point(4, 2, 100), Point(8, 2, 100)]
    table = axis_table(
        "metrics", points, {"ours": [here, there], "theirs": ["not installed", "failed"]}
    )
    assert table.head[:3] == ["2 ranks, 100 samples, 0 distributions", "4", "8"]
    assert table.lines == [
        ["ours", "12.3 ms", "1.5 s", "1", "520 B → 1.04 kB", "2 MB", "10 %"],
        ["theirs", "not installed", "failed", "", "", "", ""],
    ]


def test_ranks_that_differ_get_the_truth_from_metricfold() -> None:
    assert [outcome(OURS, case) for case in CASES] == ["right"] * len(CASES)


NOWHERE = Library("nowhere", "no_such_package", "peers.nowhere:Nothing")


def test_a_library_that_hangs_or_fails_is_said_to() -> None:
    mispaired = next(case for case in CASES if "one rank only" in case.title)
    assert outcome(BARE, mispaired) == "missing"
    assert outcome(NOWHERE, mispaired) == "raises an error"


def test_a_missing_library_is_a_line_of_the_table_and_one_that_fails_too() -> None:
    point, most = Point(4, 1, 10), (0.0, 1)
    assert tried(NOWHERE, point, 0, most) == "not installed"
    broken = Library("broken", "metricfold", "peers.nowhere:Nothing")
    assert tried(broken, point, 0, most) == "failed"


def test_what_a_log_takes_is_counted_and_what_it_says_is_compared_with_the_truth() -> None:
    point, most = Point(4, 2, 100, 1), (0.1, 3)
    ours = run(OURS, point, 0, most)
    assert ours.collectives == 1
    assert 0 < ours.seconds < 60
    assert ours.sent >= 8 * ours.floats > 0
    assert ours.error == 0
    scalars = run(OURS, Point(4, 2, 100), 0, most)
    assert scalars.error is not None
    assert scalars.error < 1e-12
    assert run(BARE, point, ours.floats, most).collectives == 1
