"""The benchmarks run, and what they print is a table of numbers; how fast anything is, nobody asks."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.timeout(170)
def test_a_quick_run_prints_a_table_of_finite_ratios(tmp_path: Path) -> None:
    rows_file = tmp_path / "rows.json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--quick", "--json", str(rows_file)],
        cwd=ROOT,
        env={**os.environ, "PYTHONWARNINGS": "error"},
        capture_output=True,
        text=True,
        timeout=160,
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
        "bare all_gather",
        "pickled states",
        "a handler call each",
        "3 frozen dataclasses",
    }
    sections = {row["section"] for row in rows}
    assert len(sections) == 6
    for line in done.stdout.splitlines():
        assert line == line.rstrip()
