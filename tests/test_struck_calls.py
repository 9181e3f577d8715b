"""An interrupt, or a lack of memory, at any moment of a call: what was taken in counts once."""

from __future__ import annotations

import contextlib
import random

import pytest
from campaign import steps
from campaign.table import Row, Trial

from metricfold import JSONLSink, MetricsLogger, read_jsonl

SOME = 8
TENDER = {
    "cut": "until now it lost what had come in since the last reduction",
    "_close": "until now a second close() waited half a minute, and wrote nothing",
    "_end": "until now a second close() wrote nothing",
    "wait": "until now a second close() wrote nothing",
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


def test_a_log_that_is_struck_is_written_or_not_but_never_said_to_be_lost(tmp_path, caplog, capfd):
    """Until now its place in the queue stayed taken, and the table at the end spoke of a loss."""

    def log(number: int, struck: steps.Struck) -> None:
        path = tmp_path / f"{number}.jsonl"
        with MetricsLogger([JSONLSink(path)]) as logger:
            logger.log(0, {"x": 1.0})
            with struck.watching(), contextlib.suppress(KeyboardInterrupt):
                logger.log(1, {"x": 1.0})
        assert [record.step for record in read_jsonl(path)] in ([0], [0, 1])

    seen = steps.Struck()
    log(0, seen)
    for number, moment in enumerate(seen.moments, 1):
        struck = steps.Struck(moment, KeyboardInterrupt)
        log(number, struck)
        assert struck.there
    assert len(seen.moments) > SOME
    assert caplog.messages == []
    assert "lost" not in capfd.readouterr().err
