"""A few seconds of every program of the campaign: nothing goes wrong, hangs or is lost."""

from __future__ import annotations

import pytest
from campaign.__main__ import PROGRAMS, run

pytestmark = pytest.mark.alone  # they stop and kill processes in their own time


# A life of JAX processes takes seconds to begin; tests/test_jax_processes.py has much the same.
SHORT = [program for program in PROGRAMS if program != "jax_ranks"]


@pytest.mark.parametrize("program", SHORT)
@pytest.mark.timeout(120)
def test_faults_of_a_campaign_come_out_right(program):
    found = run(program, seed=0, quick=True)
    assert sum(row.injected for row in found.rows) > 0, found.said
    assert all(row.well() for row in found.rows), found.said
