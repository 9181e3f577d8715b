"""The benchmarks run, and what they print is a table of numbers; how fast anything is, nobody asks."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
import torch.distributed as dist
from benchmarks.complete import complaints
from benchmarks.contenders import MetricfoldEverywhere, PickledStatesEverywhere
from benchmarks.meter import Meter
from benchmarks.own_process import installed
from benchmarks.peers.libraries import Library
from benchmarks.peers.points import QUICK, Point
from benchmarks.peers.results import Outcome, Results, Row
from benchmarks.peers.run import Measured
from benchmarks.peers.tables import tables
from benchmarks.peers.truth import CASES, outcome
from benchmarks.table import Row as TableRow
from benchmarks.table import Section
from benchmarks.traffic import Traffic
from benchmarks.workloads import mixed
from ranks import run_ranks

from metricfold import MetricsAggregator

ROOT = Path(__file__).parents[1]


def test_a_quick_run_prints_a_table_of_finite_ratios(tmp_path: Path) -> None:
    # All of it runs in CI, as `make bench BENCH_ARGS=--quick`, which fails as the next tests say.
    rows_file = tmp_path / "rows.json"
    quick = ["--quick", "--only", "update", "log", "--json", str(rows_file)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *quick],
        cwd=ROOT,
        env={**os.environ, "PYTHONWARNINGS": "error"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(rows_file.read_text())
    for row in rows:
        assert math.isfinite(row["figure"]), row
        assert row["figure"] > 0, row
        assert row["verdict"] in (("pass", "MISS") if row["budget"] else ("",)), row
        assert row["what"] in done.stdout
    collectives = [row for row in rows if "collectives per log" in row["what"]]
    assert {row["what"] for row in collectives} == {
        "1 rank: collectives per log",
        "2 ranks: collectives per log",
    }
    assert all(row["figure"] == 1 for row in collectives)
    assert {row["against"].split(":")[0] for row in rows} >= {
        "bare all_reduce",
        "a handler call each",
    }
    for line in done.stdout.splitlines():
        assert line == line.rstrip()


CONTENDERS = {
    "bare all_reduce": True,
    "bare all_gather": True,
    "pickled states": True,
    "a handler call each": True,
    "3 frozen dataclasses": True,
    "8 nnx Averages": installed("jax", "flax"),
    "8 clu Averages": installed("jax", "flax", "clu"),
}


def measured(*contenders: str, figure: float = 1.5) -> list[Section]:
    return [
        Section("a subject", [TableRow("ours", "1 s", f"{one}: 2 s", figure) for one in contenders])
    ]


def test_a_run_of_everything_fails_when_a_contender_that_is_installed_was_not_measured() -> None:
    present = [contender for contender, there in CONTENDERS.items() if there]
    assert complaints(measured(*present)) == []
    for contender in present:
        others = [one for one in present if one != contender]
        assert complaints(measured(*others)) == [f"{contender}: not measured"]
    assert complaints([*measured(*present), Section("devices")]) == ["devices: no rows"]


@pytest.mark.parametrize("figure", [math.nan, math.inf, 0.0, -1.0])
def test_a_run_of_everything_fails_when_a_figure_is_none(figure: float) -> None:
    present = [contender for contender, there in CONTENDERS.items() if there]
    wrong = [Section("another", [TableRow("loss", "1 s", "theirs", figure)])]
    assert complaints([*measured(*present), *wrong]) == [f"loss: the figure is {figure}"]


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
        traffic = Traffic()
        traffic.begin()
        issue()
        traffic.end()
        counted[name] = (traffic.kinds, traffic.sent)
    return counted


def _in_a_thread(issue: Callable[[], object]) -> None:
    thread = Thread(target=issue)
    thread.start()
    thread.join()


# -- Peers, as far as they need no other package -------------------------------------------------


def test_contenders_that_keep_everything_agree_on_an_interval() -> None:
    for ours, pickled in run_ranks(_log_an_interval, 2):
        assert ours.keys() >= pickled.keys()
        np.testing.assert_allclose([ours[key] for key in pickled], [*pickled.values()], rtol=1e-12)


def _log_an_interval(rank: int) -> list[dict[str, float]]:
    workload = mixed(8, 2, 100, 1000)
    logged = []
    for make in (MetricfoldEverywhere, PickledStatesEverywhere):
        meter = Meter(0.0, 1)
        make(workload, rank, 0).run(meter)
        assert len(meter.turns) == 1
        logged.append(dict(meter.values))
    return logged


def test_a_workload_of_many_samples_has_as_many() -> None:
    for samples in (100, 1000, 10**5, 10**7):
        workload = mixed(4, 1, samples, None)
        batches = list(workload.interval(0, 0))
        values = sum(len(batch[-1].values) for batch in batches)
        assert values * workload.repeats == samples
        # The rest is said again, so that nobody's memory is full of values that wait.
        assert values <= 10**5


def test_results_survive_their_file_and_fill_the_tables(tmp_path: Path) -> None:
    here, there = Point(4, 2, 100, 1), Point(8, 2, 100, 1)
    measured = Measured(0.0123, 0.01, 0.02, 5, 1, 520, 2_000_000, 0.0, 0.05, 65)
    results = Results("a machine", {"ours": "1"}, None, {"metrics": [here, there]})
    results.rows = [
        Row("ours", here, measured),
        Row("ours", there, measured),
        Row("theirs", here, reason="not installed"),
        Row("theirs", there, reason="failed"),
    ]
    results.outcomes = [Outcome("ours", "ranks differ", "2.8", "right")]
    path = tmp_path / "results.json"
    results.save(path)
    again = Results.load(path)
    assert again == results
    lines = tables(again).splitlines()
    ours = next(line for line in lines if line.startswith("| ours "))
    assert [cell.strip() for cell in ours.split("|")[2:-1]] == [
        *("12.3 ms", "12.3 ms", "1", "520 B", "2 MB", "5 %")
    ]
    theirs = next(line for line in lines if line.startswith("| theirs "))
    assert "not installed" in theirs
    assert "failed" in theirs
    assert "| ranks differ | 2.8      | right |" in lines


def test_ranks_that_differ_get_the_truth_from_metricfold() -> None:
    library = Library("ours", "metricfold", "benchmarks.contenders:MetricfoldEverywhere")
    assert [outcome(library, case) for case in CASES] == ["right"] * len(CASES)


def test_a_library_that_hangs_or_fails_is_said_to() -> None:
    mispaired = next(case for case in CASES if "one rank only" in case.title)
    bare = Library("bare", "torch", "benchmarks.contenders:BareAllReduce")
    assert outcome(bare, mispaired) == "missing"
    nowhere = Library("nowhere", "no_such_package", "benchmarks.peers.nowhere:Nothing")
    assert not nowhere.installed
    assert outcome(nowhere, mispaired) == "raises an error"


def test_a_missing_library_is_a_line_of_the_table(tmp_path: Path) -> None:
    found = tmp_path / "peers.json"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.peers", "--quick", "--axes", "metrics"),
            *("--only", "metricfold", "torcheval", "bare all_reduce", "--json", str(found)),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = Results.load(found)
    assert results.axes == {"metrics": QUICK.axes["metrics"]}
    for point in QUICK.axes["metrics"]:
        ours = results.at("metricfold", point).measured
        assert ours is not None, done.stderr
        assert ours.collectives == 1
        assert 0 < ours.seconds < 60
        assert ours.sent >= 8 * ours.floats
        assert ours.scalar_error < 1e-12
        bare = results.at("bare all_reduce", point).measured
        assert bare is not None, done.stderr
        assert bare.collectives == 1
        if not find_spec("torcheval"):
            assert results.at("torcheval", point).reason == "not installed"
            assert "not installed" in done.stdout
