"""Faults by the thousand: programs that break what can break, and count what comes of it.

They are no tests of the suite, which runs a few seconds of each (`tests/test_campaign.py`):

    make campaign                                       all of them, some 15 minutes
    make campaign CAMPAIGN_ARGS="--seed 3 --quick"      seconds of each, other faults
    PYTHONPATH=src:tests python -m campaign.ranks       one of them

A program is a module here with a function `run(options, table)` and a last line
``main(run, __doc__)``; it is found by its file. docs/reliability.md says what they showed.
"""

from __future__ import annotations

import os

# Whoever connects to a torch store is looked up by name. Where a name server drops what it is asked too
# often, ranks would be five or ten seconds late.
os.environ["RES_OPTIONS"] = "timeout:1 attempts:1"
