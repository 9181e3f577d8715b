"""What becomes of a record that a sink does not take: held, skipped or lost, and always counted."""

from __future__ import annotations

import asyncio
import io
import logging
import random
import re
import subprocess
import sys
import threading
import time

import pytest

from metricfold import MetricsAggregator
from metricfold.sinks import (
    KeysRefused,
    MetricsLogger,
    RecordRefused,
    SinkError,
    read_jsonl,
    worker,
)

WAIT = 30  # seconds that nothing here should take


class OfANetwork(OSError, ValueError):
    """As those of requests are: whatever else they are, the network has failed."""


class OfAPackage(Exception):
    """As `wandb.Error`, MLflow's and gRPC's are: they tell nothing."""


NOT_NOW = [
    OSError(28, "No space left on device"),
    ConnectionError("server away"),
    TimeoutError("no answer"),
    PermissionError(13, "Permission denied"),
    OfANetwork("name resolution"),
    io.UnsupportedOperation("not writable"),
]
THIS_RECORD = [
    RecordRefused("a step that goes back"),
    ValueError("a name it never takes"),
    TypeError("no number"),
    ZeroDivisionError(),
    OverflowError(),
    KeyError("x"),
    AttributeError("x"),
    UnicodeEncodeError("ascii", "\u00fc", 0, 1, "x"),
]
ANYTHING_ELSE = [
    RuntimeError("internal error"),
    OfAPackage("HTTP 500"),
    SystemExit(1),
    KeyboardInterrupt(),
    asyncio.CancelledError(),
    GeneratorExit(),
    MemoryError(),
    AssertionError(),
    ImportError("no such package"),
]


class Remote:
    """A sink that asks `fails(step, attempt)` what to raise, if anything."""

    def __init__(self, fails=lambda step, attempt: None):
        self.fails = fails
        self.got = []
        self.attempts = {}
        self.calls = []

    def __repr__(self):
        return "Remote()"

    def write(self, record):
        attempt = self.attempts[record.step] = self.attempts.get(record.step, 0) + 1
        error = self.fails(record.step, attempt)
        if error is not None:
            raise error
        self.got.append(record.step)

    def flush(self):
        self.calls.append("flush")

    def close(self):
        self.calls.append("close")

    def rewind(self, step):
        self.calls.append(f"rewind {step}")
        self.got = [one for one in self.got if one <= step]


@pytest.fixture(autouse=True)
def _quickly(monkeypatch):
    """Let a second pass in a twentieth."""
    monkeypatch.setattr(worker, "_PAUSES", tuple(pause / 20 for pause in worker._PAUSES))
    for name in ("_ASK_NEXT", "_LOUD_AT_FIRST", "_LOUD_LATER", "_FAILING_SECONDS"):
        monkeypatch.setattr(worker, name, getattr(worker, name) / 20)
    monkeypatch.setattr(worker, "_SHORT_PAUSE", worker._SHORT_PAUSE / 20)


def log_all(sink, count=24, gap=0.004, **choice):
    with MetricsLogger([sink], **choice) as logger:
        for step in range(count):
            logger.log(step, {"x": float(step)})
            time.sleep(gap)
        logger.flush()


def errors_in(caplog):
    return [one.getMessage() for one in caplog.records if one.levelno == logging.ERROR]


def warnings_in(caplog):
    return [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING]


def counts(caplog, name="Remote()"):
    """Return what the table at the end says: written, skipped, lost."""
    (table,) = (one for one in errors_in(caplog) if one.startswith("not all that was logged"))
    (line,) = (line for line in table.splitlines() if line.strip().startswith(name))
    return tuple(map(int, re.findall(r"(\d+) (?:written|skipped|lost)", line)))


def named(error):
    return type(error).__name__


# -- Three kinds ---------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [*NOT_NOW, *ANYTHING_ELSE], ids=named)
def test_what_can_come_back_is_waited_for(error, caplog):
    """Before, a sink that had failed three times within 0.6 s was set aside for the whole run."""
    left, since = [6], 5

    def away(step, attempt):
        if step < since or not left[0]:
            return None
        left[0] -= 1
        return error

    sink = Remote(away)
    log_all(sink)
    # An error that tells nothing may cost a record its place, but nothing else.
    assert (sink.got if isinstance(error, OSError) else sorted(sink.got)) == list(range(24))
    assert not any("not all that was logged" in one for one in errors_in(caplog))


@pytest.mark.parametrize("error", THIS_RECORD, ids=named)
def test_one_record_that_cannot_be_costs_one_record(error, caplog):
    sink = Remote(lambda step, attempt: error if step in (5, 6, 20) else None)
    log_all(sink, gap=0)
    assert sink.got == [step for step in range(24) if step not in (5, 6, 20)]
    assert sink.attempts[5] == 1, "nothing is asked again"
    assert counts(caplog) == (21, 3, 0)
    (warning,) = warnings_in(caplog)
    assert "write() of step 5" in warning
    assert repr(error) in warning
    assert f"3 x write(), steps 5 to 20: {error!r}" in errors_in(caplog)[-1]


@pytest.mark.parametrize("error", ANYTHING_ELSE, ids=named)
def test_the_record_behind_shows_which_one_was_at_fault(error, caplog):
    sink = Remote(lambda step, attempt: error if step in (5, 6, 20) else None)
    log_all(sink)
    assert sink.got == [step for step in range(24) if step not in (5, 6, 20)]
    assert counts(caplog) == (21, 3, 0)


def test_a_record_that_meets_an_outage_is_not_taken_for_a_culprit(caplog):
    """A record at fault, and behind it one whose time the network is away."""

    def fails(step, attempt):
        if step == 3:
            return OfAPackage("for ever")
        return ConnectionError("away") if step == 4 and attempt < 6 else None

    sink = Remote(fails)
    log_all(sink, gap=0.02)
    assert sorted(sink.got) == [step for step in range(24) if step != 3]
    assert counts(caplog) == (23, 1, 0)


def test_a_sink_is_never_given_up(caplog):
    away = threading.Event()
    away.set()
    sink = Remote(lambda step, attempt: ConnectionError() if step >= 3 and away.is_set() else None)
    with MetricsLogger([sink]) as logger:
        for step in range(10):
            logger.log(step, {"x": 1.0})
        time.sleep(0.5)  # which is 10 s
        away.clear()
        logger.log(10, {"x": 1.0})
    assert sink.got == list(range(11))
    assert errors_in(caplog) == []
    fails, back = warnings_in(caplog)
    assert "write() of step 3 fails with ConnectionError(). It is tried again" in fails
    assert "Remote() is back after" in back


def test_a_full_queue_is_said_once_and_what_had_been_accepted_is_written(caplog):
    """Before, this was a warning."""
    away = threading.Event()
    away.set()
    sink = Remote(lambda step, attempt: TimeoutError("no answer") if away.is_set() else None)
    with MetricsLogger([sink], queue_size=5) as logger:
        for step in range(20):
            logger.log(step, {"x": 1.0})
        time.sleep(0.1)
        away.clear()
    assert sink.got == [0, 1, 2, 3, 4]
    full = [one for one in errors_in(caplog) if "the first to be left out" in one]
    assert len(full) == 1
    assert "5 records wait, and that of step 5 is the first to be left out" in full[0]
    assert counts(caplog) == (5, 0, 15)
    assert "15 x left out" in errors_in(caplog)[-1]


def test_at_close_every_record_is_offered_once_more(caplog):
    def fails(step, attempt):
        return None if attempt > 3 and step not in (0, 4) else OfAPackage("mine")

    sink = Remote(lambda step, attempt: OfAPackage("mine") if step in (0, 4) else None)
    with MetricsLogger([sink]) as logger:
        for step in range(8):
            logger.log(step, {"x": 1.0})
    assert sorted(sink.got) == [1, 2, 3, 5, 6, 7]
    written, skipped, lost = counts(caplog)
    assert (written, skipped + lost) == (6, 2)
    assert sink.calls[-1] == "close"


def test_a_sink_that_fails_to_the_end_is_closed_and_counted(caplog):
    sink, good = Remote(lambda step, attempt: ConnectionError("away")), Remote()
    good.__class__ = type("Good", (Remote,), {"__repr__": lambda self: "Good()"})
    with MetricsLogger([sink, good]) as logger:
        for step in range(10):
            logger.log(step, {"x": 1.0})
    assert good.got == list(range(10))
    assert sink.calls[-1] == "close"
    assert counts(caplog) == (0, 0, 10)
    assert "Good()" not in errors_in(caplog)[-1]


@pytest.mark.parametrize("error", [ConnectionError("away"), OfAPackage(), ValueError("no")])
def test_a_rewind_keeps_its_place(error, caplog):
    class Rewinding(Remote):
        left = 3

        def rewind(self, step):
            if self.left:
                self.left -= 1
                raise error
            super().rewind(step)

    sink = Rewinding()
    with MetricsLogger([sink]) as logger:
        for step in range(5):
            logger.log(step, {"x": 1.0})
        logger.rewind(2)
        logger.log(3, {"x": 1.0})
    if isinstance(error, ValueError):
        assert sink.got == [0, 1, 2, 3, 4, 3]
        assert "1 x rewind(), step 2: ValueError('no')" in errors_in(caplog)[-1]
    else:
        assert sink.got == [0, 1, 2, 3]
        assert errors_in(caplog) == []


def test_no_record_is_taken_for_the_culprit_across_a_rewind(caplog):
    sink = Remote(lambda step, attempt: OfAPackage() if step == 4 and attempt < 6 else None)
    with MetricsLogger([sink]) as logger:
        for step in (3, 4):
            logger.log(step, {"x": 1.0})
        logger.rewind(4)
        logger.log(5, {"x": 1.0})
    assert sink.got == [3, 4, 5]


@pytest.mark.parametrize("seed", range(8))
def test_all_that_was_accepted_is_written_once_or_counted(seed, caplog, monkeypatch):
    """Errors of all kinds at random, of records and of times, with flushes and a full queue."""
    monkeypatch.setattr(worker, "_FAILING_SECONDS", 2.0)  # whatever else this machine does
    draw = random.Random(seed)
    kinds = [
        (ConnectionError("x"), (1, 2, 4)),
        (ValueError("x"), (1,)),
        (OfAPackage("x"), (1, 10**9)),
        (SystemExit("x"), (1, 10**9)),
    ]
    plan = {}
    for step in range(80):
        if draw.random() < 0.2:
            error, attempts = draw.choice(kinds)
            plan[step] = error, draw.choice(attempts)

    def fails(step, attempt):
        error, attempts = plan.get(step, (None, 0))
        return error if attempt <= attempts else None

    sink = Remote(fails)
    with MetricsLogger([sink], queue_size=40) as logger:
        for step in range(80):
            logger.log(step, {"x": 1.0})
            if draw.random() < 0.05:
                logger.flush()
            time.sleep(draw.random() * 0.01)
    assert len(sink.got) == len(set(sink.got))
    missing = set(range(80)) - set(sink.got)
    never = {step for step, (error, n) in plan.items() if isinstance(error, ValueError) or n > 9}
    refused = re.search(r"(\d+) x left out", " ".join(errors_in(caplog)))
    assert never >= missing or refused
    if missing:
        written, skipped, lost = counts(caplog)
        assert written == len(sink.got)
        assert skipped + lost == len(missing)


# -- flush() says the truth ----------------------------------------------------------------------


def test_flush_tells_whether_all_has_been_written():
    refused, away = {3}, {6}
    sink = Remote(
        lambda step, attempt: (
            ValueError() if step in refused else ConnectionError() if step in away else None
        )
    )
    with MetricsLogger([sink]) as logger:
        logger.log(1, {"x": 1.0})
        assert logger.flush()
        for step in (2, 3, 4):
            logger.log(step, {"x": 1.0})
        assert not logger.flush(), "step 3 is missing"
        logger.log(5, {"x": 1.0})
        assert logger.flush(), "nothing is missing since"
        logger.log(6, {"x": 1.0})
        assert not logger.flush(), "and a sink that fails is not waited for as long as one is slow"
        away.clear()
        deadline = time.monotonic() + WAIT
        while not logger.flush() and time.monotonic() < deadline:
            pass
        assert sink.got == [1, 2, 4, 5, 6]


def test_flush_asks_a_sink_again_that_would_have_been_left_alone_for_longer(monkeypatch):
    monkeypatch.setattr(worker, "_PAUSES", (0.01, WAIT))
    away = threading.Event()
    away.set()
    sink = Remote(lambda step, attempt: ConnectionError() if away.is_set() else None)
    with MetricsLogger([sink]) as logger:
        logger.log(1, {"x": 1.0})
        deadline = time.monotonic() + WAIT
        while sink.attempts.get(1, 0) < 2 and time.monotonic() < deadline:
            time.sleep(0.005)
        away.clear()
        assert logger.flush()
        assert sink.got == [1]


def test_flush_is_false_while_the_sink_cannot_flush(caplog):
    class Unflushed(Remote):
        fine = False

        def flush(self):
            if not self.fine:
                raise OSError(5, "Input/output error")

    sink = Unflushed()
    with MetricsLogger([sink]) as logger:
        logger.log(1, {"x": 1.0})
        assert not logger.flush()
        sink.fine = True
        assert logger.flush()
    (warning,) = warnings_in(caplog)
    assert "flush()" in warning
    assert errors_in(caplog) == [], "in the end it is all there"


# -- on_sink_error="raise" -----------------------------------------------------------------------


def refusing():
    return Remote(lambda step, attempt: ValueError("no such name") if step == 1 else None)


def test_where_dicts_are_logged_the_next_log_raises_once():
    sink = refusing()
    with MetricsLogger([sink], on_sink_error="raise") as logger:
        for step in (0, 1):
            logger.log(step, {"x": 1.0})
        logger.flush()
        with pytest.raises(SinkError, match=r"a sink has failed: Remote\(\): 1 written, 1 skipped"):
            logger.log(2, {"x": 1.0})
        logger.log(2, {"x": 1.0})
    assert sink.got == [0, 2]


def test_what_is_missing_in_the_end_is_raised_by_close_after_all_is_written():
    gate = threading.Event()
    sink = Remote(
        lambda step, attempt: ValueError("no such name") if gate.wait(WAIT) and step == 1 else None
    )
    logger = MetricsLogger([sink], on_sink_error="raise")
    for step in range(4):
        logger.log(step, {"x": 1.0})
    gate.set()
    with pytest.raises(SinkError, match="no such name"):
        logger.close()
    assert sink.got == [0, 2, 3]
    assert sink.calls[-1] == "close"


def test_a_sink_that_is_away_for_long_is_raised_while_it_is_away():
    away = threading.Event()
    away.set()
    sink = Remote(lambda step, attempt: ConnectionError("away") if away.is_set() else None)
    with MetricsLogger([sink], on_sink_error="raise") as logger:
        logger.log(0, {"x": 1.0})
        logger.flush()
        with pytest.raises(SinkError, match="Remote\\(\\) fails with ConnectionError\\('away'\\)"):
            logger.log(1, {"x": 1.0})
        away.clear()
    assert sink.got == [0]


def test_an_aggregator_raises_in_the_log_after_the_reduction_that_told():
    aggregator, sink = MetricsAggregator(), refusing()
    with MetricsLogger([sink], on_sink_error="raise") as logger:
        for step in range(3):
            aggregator.record("loss", 1.0)
            logger.log(step, aggregator, prefix="t")
            logger.flush()
        aggregator.record("loss", 1.0)
        with pytest.raises(SinkError, match="no such name"):
            logger.log(3, aggregator, prefix="t")
        logger.log(3, aggregator, prefix="t")
    assert sink.got == [0, 2, 3]


def test_an_error_of_the_training_is_not_hidden_by_that_of_a_sink():
    def train():
        with MetricsLogger([refusing()], on_sink_error="raise") as logger:
            logger.log(1, {"x": 1.0})
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        train()


def test_without_it_nothing_is_raised(caplog):
    aggregator, sink = MetricsAggregator(), refusing()
    with MetricsLogger([sink]) as logger:
        for step in range(4):
            aggregator.record("loss", 1.0)
            logger.log(step, aggregator, prefix="t")
            logger.log(step, {"x": 1.0})
    assert counts(caplog) == (6, 2, 0)
    with pytest.raises(ValueError, match="on_sink_error='stop': use 'report' or 'raise'"):
        MetricsLogger([], on_sink_error="stop")


# -- Functions of the user's on the logger's thread ----------------------------------------------


@pytest.mark.parametrize("error", ANYTHING_ELSE, ids=named)
@pytest.mark.filterwarnings("ignore:the derived metric")
def test_what_derive_and_extra_raise_costs_no_record(error):
    """Before, SystemExit ended the logger's thread, and every later record was lost in silence."""

    def raises(given):
        raise error

    sink, aggregator = Remote(), MetricsAggregator()
    aggregator.derive("check", raises)
    with MetricsLogger([sink]) as logger:
        for step in range(3):
            aggregator.record("loss", 1.0)
            logger.log(step, aggregator, prefix="t", extra=raises)
    assert sink.got == [0, 1, 2]


def test_sys_exit_in_derive_is_an_exit_where_the_program_asks():
    aggregator = MetricsAggregator()
    aggregator.derive("check", lambda metrics: sys.exit(3))
    aggregator.record("loss", 1.0)
    with pytest.raises(SystemExit):
        aggregator.get_metrics_for_logging()


@pytest.mark.parametrize("child", ["sys.exit(0)", "raise ValueError", "return", "os._exit(0)"])
def test_a_child_that_a_sink_forks_does_not_go_on_with_the_sinks_thread(child, tmp_path):
    """Until now it did, forked as well, and so on, and the parent waited for it."""
    code = f"""
import os, sys
from metricfold import JSONLSink, MetricsLogger

class Forking(JSONLSink):
    def write(self, record):
        child = os.fork()
        if child == 0:
            {child}
        else:
            os.waitpid(child, 0)
            super().write(record)

with MetricsLogger([Forking({str(tmp_path / "x.jsonl")!r})]) as logger:
    for step in range(3):
        logger.log(step, {{"x": 1.0}})
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert [one.step for one in read_jsonl(tmp_path / "x.jsonl")] == [0, 1, 2]


def test_a_sink_that_waits_for_its_own_logger_waits_for_nothing(caplog):
    """Until now it waited half a minute, and what came then was not written."""

    class Asking(Remote):
        def write(self, record):
            super().write(record)
            answers.append(logger.flush())
            with pytest.raises(RuntimeError, match="cannot close that logger"):
                logger.close()

    answers = []
    sink = Asking()
    logger = MetricsLogger([sink])
    for step in range(3):
        logger.log(step, {"x": 1.0})
    logger.flush()
    ends(logger)
    assert sink.got == [0, 1, 2]
    assert sink.calls[-1] == "close"
    assert answers[0] is False
    assert [one for one in caplog.records if one.levelno >= logging.ERROR] == []


def ends(logger):
    closing = threading.Thread(target=logger.close, daemon=True)
    closing.start()
    closing.join(WAIT / 2)
    assert not closing.is_alive()


def test_a_sink_without_a_name_is_a_sink(caplog):
    class Nameless(Remote):
        def __repr__(self):
            raise RuntimeError("no name yet")

    sink = Nameless(lambda step, attempt: ValueError() if step == 1 else None)
    with MetricsLogger([sink]) as logger:
        for step in range(3):
            logger.log(step, {"x": 1.0})
    assert sink.got == [0, 2]
    assert counts(caplog, "Nameless") == (2, 1, 0)


# -- Loud ----------------------------------------------------------------------------------------


def test_a_sink_that_can_write_nothing_is_loud_at_once_and_once(caplog):
    sink = Remote(lambda step, attempt: PermissionError(13, "Permission denied"))
    with MetricsLogger([sink]) as logger:
        for step in range(5):
            logger.log(step, {"x": 1.0})
        first = time.monotonic()
        while not errors_in(caplog) and time.monotonic() < first + WAIT:
            time.sleep(0.01)
    first, table = errors_in(caplog)
    assert "Remote() has not written anything yet: write() of step 0 fails with" in first
    assert "Permission denied" in first
    assert table.startswith("not all that was logged has been written")


def test_a_sink_that_is_away_for_long_is_loud_once(caplog):
    sink = Remote(lambda step, attempt: TimeoutError() if step > 0 and attempt < 7 else None)
    with MetricsLogger([sink]) as logger:
        for step in range(3):
            logger.log(step, {"x": 1.0})
            logger.flush()
            time.sleep(0.3)
    assert sink.got == [0, 1, 2]


def test_after_a_minute_of_failing_it_is_said_once(caplog, monkeypatch):
    monkeypatch.setattr(worker, "_LOUD_LATER", 0.05)
    away = threading.Event()
    away.set()
    sink = Remote(lambda step, attempt: TimeoutError() if step > 0 and away.is_set() else None)
    with MetricsLogger([sink]) as logger:
        for step in range(3):
            logger.log(step, {"x": 1.0})
        deadline = time.monotonic() + WAIT
        while not errors_in(caplog) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.3)
        away.clear()
    (loud,) = errors_in(caplog)
    assert "has not written anything for" in loud
    assert sink.got == [0, 1, 2]


SETUPS = {
    "nothing": "",
    "a level": "logging.basicConfig(level=logging.ERROR)",
    "a higher level": "logging.basicConfig(level=logging.CRITICAL)",
    "disabled": "logging.disable(logging.CRITICAL)",
    "a file": "logging.basicConfig(filename=os.devnull)",
    "dictConfig": "import logging.config; logging.config.dictConfig("
    "{'version': 1, 'disable_existing_loggers': True, 'root': {'level': 'INFO', 'handlers': []}})",
    "a NullHandler": "logging.getLogger('metricfold').addHandler(logging.NullHandler())",
    "a framework": "logging.getLogger().handlers[:] = [logging.NullHandler()]",
    "propagate off": "logging.getLogger('metricfold').propagate = False",
    "rich": "from rich.logging import RichHandler; logging.basicConfig(handlers=[RichHandler()])",
    "stdout": "logging.basicConfig(stream=sys.stdout)",
    "no last resort": "logging.lastResort = None",
    "no stderr": "sys.stderr = None",
    "stderr is closed": "sys.stderr.close()",
    "a broken stderr": "sys.stderr = object()",
}
SAY = """
import logging, os, sys, tempfile
from metricfold.sinks.loud import say
setups = SETUPS
for name, setup in setups.items():
    with tempfile.TemporaryFile() as said:
        if (child := os.fork()) == 0:
            os.dup2(said.fileno(), 1), os.dup2(said.fileno(), 2)
            exec(setup)
            say("LOST")
            logging.shutdown()
            if sys.stdout: sys.stdout.flush()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0, name
        said.seek(0)
        print(name, said.read().count(b"LOST"), sep=": ", flush=True)
"""


def test_what_is_loud_is_seen_once_however_logging_is_set_up():
    code = SAY.replace("SETUPS", repr(SETUPS))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = dict(line.rsplit(": ", 1) for line in done.stdout.splitlines())
    unseen = {"no stderr", "stderr is closed", "a broken stderr"}
    assert {name: int(count) for name, count in found.items()} == {
        name: int(name not in unseen) for name in SETUPS
    }


class Choosy(Remote):
    """Takes records but for some of their keys, as a tracker does with names."""

    def write(self, record):
        super().write(record)
        refused = {key: OfAPackage("no such name") for key in record.metrics if "@" in key}
        if refused:
            raise KeysRefused(refused)


def test_keys_that_are_refused_are_counted_and_the_record_is_written(caplog):
    sink = Choosy()
    with MetricsLogger([sink]) as logger:
        logger.log(0, {"loss": 1.0})
        assert logger.flush()
        for step in (1, 2):
            logger.log(step, {"loss": 1.0, **{f"k{n}@": 1.0 for n in range(12)}})
        assert not logger.flush(), "something is missing since the flush before"
        assert logger.flush()
    assert sink.got == [0, 1, 2], "and none is offered again"
    table = caplog.messages[-1]
    assert "Remote(): 3 written, 0 skipped, 0 lost" in table
    assert "2 x without 'k0@', steps 1 to 2: OfAPackage('no such name')" in table
    assert "and 2 more keys" in table
    said = [text for text in caplog.messages if "does not take" in text]
    assert len(said) == 1
    assert "'k9@' and 2 more: OfAPackage('no such name')" in said[0]


def test_keys_that_are_refused_are_an_error_where_what_is_missing_is_one():
    logger = MetricsLogger([Choosy()], on_sink_error="raise")
    logger.log(1, {"loss": 1.0, "a@": 1.0})
    logger.flush()
    with pytest.raises(SinkError, match="without 'a@'"):
        logger.log(2, {"loss": 1.0})
    logger.close()
