"""An interrupt, or a lack of memory, at any moment of a call: what was taken in counts once."""

from __future__ import annotations

import random

import pytest
from campaign import steps
from campaign.table import Row, Trial

SOME = 8
TENDER = {
    "cut": "until now it lost what had come in since the last reduction",
    "_close": "until now a second close() waited half a minute, and wrote nothing",
    "_running": "until now a second close() wrote nothing",
    "wait_for": "until now a second close() wrote nothing",
    "_start_from": "until now two states were mixed",
    "_learn": "until now the key could not be reduced any more",
}


@pytest.mark.parametrize("which", steps.ERRORS)
@pytest.mark.parametrize("name", steps.CALLS)
@pytest.mark.filterwarnings("ignore")
def test_what_strikes_in_the_middle_of_a_call_costs_no_value_and_doubles_none(name, which):
    call = steps.CALLS[name]
    seen = steps.Struck()
    assert call(seen) == ""
    moments = list(seen.moments)
    chosen = moments[:: max(len(moments) // SOME, 1)]
    chosen += [moment for moment in moments if moment[1] in TENDER][:SOME]
    row = Row(name)
    for number, moment in enumerate(chosen):
        row.inject()
        struck = steps.Struck(moment, steps.ERRORS[which])
        steps.strike(row, Trial(number, random.Random(0)), call, struck)
    assert row.well(), row.notes
    assert row.right > SOME / 2
