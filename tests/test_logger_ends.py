"""Nothing that a logger accepted is lost on exit or SIGTERM: real processes, really ended."""

from __future__ import annotations

import multiprocessing
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest

from metricfold.sinks import JSONLSink, MetricsLogger, TensorBoardSink, read_jsonl

# A sink that is behind, and that loses everything if it is not flushed.
PRELUDE = """
import os, signal, sys, threading, time
from metricfold.sinks import JSONLSink, MetricsLogger, TensorBoardSink

class Lazy(JSONLSink):
    def __init__(self, path):
        super().__init__(path)
        self.held = []
    def write(self, record):
        time.sleep(0.002)
        self.held.append(record)
    def flush(self):
        for record in self.held:
            super().write(record)
        self.held = []

folder = sys.argv[1]
def sinks():
    return [Lazy(folder + "/lazy.jsonl"), JSONLSink(folder + "/run.jsonl"),
            TensorBoardSink(folder + "/board")]

def train(logger, last=10**9, first=0):
    for step in range(first, last):
        logger.log(step, {"x": float(step)})
        os.write(1, b"%d\\n" % step)  # accepted
        time.sleep(0.0005)

def stay():
    # Python runs a handler between two instructions of the main thread: one whose signal comes
    # just before a long sleep begins waits until its end.
    while True:
        time.sleep(0.05)
"""


@contextmanager
def running(code, folder):
    """Run a script that imports what PRELUDE does; kill it if the test leaves it running.

    What it says goes to files. A pipe would be read ahead by `for line in process.stdout`, and what
    is read ahead is lost to `process.communicate`.
    """
    with (folder / "said").open("w") as said, (folder / "errors").open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", PRELUDE + code, str(folder)], stdout=said, stderr=errors
        )
        process.folder = folder
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def said(process):
    """Return the lines that the script has said, without one that it is still writing."""
    return (process.folder / "said").read_text().split("\n")[:-1]


def wait_until_said(process, line, timeout=60):
    deadline = time.monotonic() + timeout
    while line not in said(process):
        if process.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(
                f"{line!r} did not come: {(process.folder / 'errors').read_text()}"
            )
        time.sleep(0.005)


def finish(process, timeout=60):
    """Return all lines that the script said, and what it wrote to stderr."""
    process.wait(timeout)
    return said(process), (process.folder / "errors").read_text()


def steps(path):
    return [record.step for record in read_jsonl(path)]


def board_steps(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder / "board"), size_guidance={"scalars": 0})
    accumulator.Reload()
    return [event.step for event in accumulator.Scalars("x")]


def check_all_written(folder, accepted):
    """Everything that was accepted is there, and at most the one record being accepted besides."""
    for written in (
        steps(folder / "lazy.jsonl"),
        steps(folder / "run.jsonl"),
        board_steps(folder),
    ):
        assert written == list(range(len(written)))
        assert len(accepted) <= len(written) <= len(accepted) + 1


def test_sigterm_loses_nothing_and_still_kills(tmp_path):
    with running("train(MetricsLogger(sinks()))", tmp_path) as process:
        wait_until_said(process, "300")
        process.terminate()
        accepted, errors = finish(process)
    assert process.returncode == -signal.SIGTERM
    assert errors == ""
    check_all_written(tmp_path, accepted)


def test_the_users_handler_is_called_after_everything_is_flushed_and_the_run_goes_on(tmp_path):
    code = """
stop = False
def handler(signum, frame):
    global stop
    stop = True
    from metricfold.sinks import read_jsonl
    at_least = len(read_jsonl(folder + "/lazy.jsonl"))
    os.write(1, b"handler %d %d\\n" % (signum, at_least))
signal.signal(signal.SIGTERM, handler)
with MetricsLogger(sinks()) as logger:
    step = 0
    while not stop:
        train(logger, step + 1, step)
        step += 1
    train(logger, step + 50, step)
assert signal.getsignal(signal.SIGTERM) is handler
"""
    with running(code, tmp_path) as process:
        wait_until_said(process, "300")
        process.terminate()
        accepted, errors = finish(process)
    assert (process.returncode, errors) == (0, "")
    handled = next(number for number, line in enumerate(accepted) if line.startswith("handler"))
    _, number, at_least = accepted.pop(handled).split()
    assert int(number) == signal.SIGTERM
    assert int(at_least) >= handled
    check_all_written(tmp_path, accepted)


@pytest.mark.parametrize(
    ("handler", "then", "code"),
    [
        ("lambda *_: sys.exit(17)", "train(MetricsLogger(sinks()))", 17),
        ("signal.SIG_IGN", "with MetricsLogger(sinks()) as logger: train(logger, 600)", 0),
    ],
)
def test_nothing_is_lost_where_a_handler_exits_or_sigterm_is_ignored(tmp_path, handler, then, code):
    with running(f"signal.signal(signal.SIGTERM, {handler})\n{then}", tmp_path) as process:
        wait_until_said(process, "300")
        process.terminate()
        accepted, errors = finish(process)
    assert (process.returncode, errors) == (code, "")
    check_all_written(tmp_path, accepted)


def test_a_handler_may_log(tmp_path):
    code = """
with MetricsLogger(sinks()) as logger:
    def handler(*_):
        train(logger, last + 1, last)
        sys.exit()
    signal.signal(signal.SIGTERM, handler)
    for last in range(10**9):
        train(logger, last + 1, last)
"""
    with running(code, tmp_path) as process:
        wait_until_said(process, "100")
        process.terminate()
        _, errors = finish(process)
    assert (process.returncode, errors) == (0, "")
    assert steps(tmp_path / "lazy.jsonl") == steps(tmp_path / "run.jsonl")


def test_two_loggers_are_both_written(tmp_path):
    code = """
first, second = MetricsLogger([Lazy(folder + "/1.jsonl")]), MetricsLogger([Lazy(folder + "/2.jsonl")])
for step in range(10**9):
    first.log(step, {"x": 1.0})
    second.log(step, {"x": 1.0})
    os.write(1, b"%d\\n" % step)
    time.sleep(0.0005)
"""
    with running(code, tmp_path) as process:
        wait_until_said(process, "300")
        process.terminate()
        accepted, errors = finish(process)
    assert (process.returncode, errors) == (-signal.SIGTERM, "")
    for name in ("1.jsonl", "2.jsonl"):
        assert len(steps(tmp_path / name)) >= len(accepted)


STUCK = """
class Stuck(JSONLSink):
    def write(self, record):
        time.sleep(120)
logger = MetricsLogger([Stuck(folder + "/stuck.jsonl"), *sinks()])
train(logger, 100)
print("stuck", flush=True)
stay()
"""


def test_a_stuck_sink_delays_sigterm_for_seconds_and_costs_the_others_nothing(tmp_path):
    with running(STUCK, tmp_path) as process:
        wait_until_said(process, "stuck")
        process.terminate()
        (*accepted, _), errors = finish(process)
    assert process.returncode == -signal.SIGTERM
    assert "stuck.jsonl'): " in errors
    assert "it has not answered: its thread is in a call that does not return" in errors
    check_all_written(tmp_path, accepted)


def test_a_second_sigterm_means_now(tmp_path):
    with running(STUCK, tmp_path) as process:
        wait_until_said(process, "stuck")
        while process.poll() is None:  # two that come together are one
            process.terminate()
            time.sleep(0.5)
        _, errors = finish(process)
    assert (process.returncode, errors) == (-signal.SIGTERM, "")


def test_sigterm_does_not_wait_long_for_a_reduction_that_no_other_rank_joins(tmp_path):
    code = """
from concurrent.futures import Future
class Source:
    def reduce_async(self, step=None):
        return Future()
logger = MetricsLogger(sinks())
train(logger, 50)
logger.log(50, Source(), prefix="t")
train(logger, 100, 51)
print("stuck", flush=True)
stay()
"""
    with running(code, tmp_path) as process:
        wait_until_said(process, "stuck")
        process.terminate()
        _, errors = finish(process)
    assert process.returncode == -signal.SIGTERM
    assert "the metrics of step 50 are lost" in errors
    expected = [step for step in range(100) if step != 50]
    assert steps(tmp_path / "lazy.jsonl") == steps(tmp_path / "run.jsonl") == expected


def test_a_forked_child_dies_of_sigterm_at_once_and_writes_nothing(tmp_path):
    code = """
import warnings
warnings.simplefilter("ignore", DeprecationWarning)  # forking with threads about: that is the test
logger = MetricsLogger(sinks())
train(logger, 300)
child = os.fork()
if child == 0:
    print("forked", flush=True)
    stay()
time.sleep(0.2)
os.kill(child, signal.SIGTERM)
_, status = os.waitpid(child, 0)
assert os.WTERMSIG(status) == signal.SIGTERM
logger.close()
"""
    with running(code, tmp_path) as process:
        lines, errors = finish(process)
    assert (process.returncode, errors) == (0, "")
    lines.remove("forked")
    check_all_written(tmp_path, lines)


@pytest.mark.parametrize("ending", ["pass", "sys.exit(3)", "raise RuntimeError('mine')"])
def test_nothing_is_lost_on_exit_without_close(tmp_path, ending):
    code = f"""
train(MetricsLogger(sinks()), 300)
{ending}
"""
    with running(code, tmp_path) as process:
        accepted, errors = finish(process)
    assert process.returncode == {"pass": 0, "sys.exit(3)": 3}.get(ending, 1)
    assert ("mine" in errors) == ("mine" in ending)
    check_all_written(tmp_path, accepted)


def test_sigkill_loses_no_line_that_was_written(tmp_path):
    with running("train(MetricsLogger(sinks()))", tmp_path) as process:
        wait_until_said(process, "2000")
        process.kill()
        accepted, _ = finish(process)
    written = steps(tmp_path / "run.jsonl")
    assert written == list(range(len(written)))
    # The thread that writes lines keeps up with the one that logs them, but for a moment.
    assert len(written) >= len(accepted) - 500


def _rank_without_close(folder, error):
    logger = MetricsLogger([JSONLSink(folder / "run.jsonl"), TensorBoardSink(folder / "board")])
    for step in range(300):
        logger.log(step, {"x": float(step)})
    if error:
        raise SystemExit(5)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
@pytest.mark.parametrize("error", [False, True])
def test_nothing_is_lost_by_a_child_of_multiprocessing(tmp_path, method, error):
    # Its end is not the end of an ordinary interpreter: exit hooks do not run.
    context = multiprocessing.get_context(method)
    child = context.Process(target=_rank_without_close, args=(tmp_path, error))
    child.start()
    child.join(60)
    if child.is_alive():
        child.kill()
    assert child.exitcode == 5 * error
    assert steps(tmp_path / "run.jsonl") == board_steps(tmp_path) == list(range(300))


def test_the_handler_is_put_back():
    before = signal.getsignal(signal.SIGTERM)
    first, second = MetricsLogger([]), MetricsLogger([])
    assert signal.getsignal(signal.SIGTERM) is not before
    first.close()
    assert signal.getsignal(signal.SIGTERM) is not before
    second.close()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_handler_that_was_installed_later_is_left_alone():
    before = signal.getsignal(signal.SIGTERM)

    def later(signum, frame):
        pass

    try:
        with MetricsLogger([]):
            signal.signal(signal.SIGTERM, later)
        assert signal.getsignal(signal.SIGTERM) is later
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_logger_made_after_such_a_handler_was_taken_away_answers_signals_again():
    for _ in range(2):
        with MetricsLogger([]):
            signal.signal(signal.SIGTERM, lambda *_: None)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with MetricsLogger([]):
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_outside_the_main_thread_no_handler_is_installed_and_logging_works(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def train():
        with MetricsLogger([JSONLSink(tmp_path / "run.jsonl")]) as logger:
            logger.log(1, {"x": 1.0})
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=train)
    thread.start()
    thread.join(30)
    assert seen == [before]
    assert steps(tmp_path / "run.jsonl") == [1]


def test_sigterm_while_a_logger_closes(tmp_path):
    code = """
logger = MetricsLogger(sinks())
train(logger, 400)
os.write(1, b"closing\\n")
logger.close()
stay()
"""
    with running(code, tmp_path) as process:
        wait_until_said(process, "closing")
        time.sleep(0.05)
        process.terminate()
        (*accepted, _), errors = finish(process)
    assert (process.returncode, errors) == (-signal.SIGTERM, "")
    check_all_written(tmp_path, accepted)


def test_log_against_close_from_another_thread_writes_what_it_accepted(tmp_path):
    for trial in range(30):
        path = tmp_path / f"{trial}.jsonl"
        logger = MetricsLogger([JSONLSink(path)], queue_size=10**6)
        accepted, errors = [], []

        def log(logger=logger, accepted=accepted, errors=errors):
            try:
                for step in range(10**6):
                    logger.log(step, {"x": 1.0})
                    accepted.append(step)
            except RuntimeError as error:
                errors.append(str(error))

        threads = [threading.Thread(target=log)]
        threads[0].start()
        time.sleep(0.001 * (trial % 5))
        closers = [threading.Thread(target=logger.close) for _ in range(2)]
        for thread in closers:
            thread.start()
        for thread in [*closers, *threads]:
            thread.join()
        assert len(errors) == 1
        assert "closed" in errors[0]
        written = steps(path) if path.exists() else []
        # The last one may have been refused at the very moment at which it was on its way.
        assert accepted == written[: len(accepted)]
        assert len(written) <= len(accepted) + 1
    MetricsLogger([]).close()  # here handlers can be put back; in the threads above they could not


def test_a_handler_that_closes_the_logger_loses_nothing(tmp_path):
    code = """
logger = MetricsLogger(sinks())
def handler(signum, frame):
    logger.close()
    os.write(1, b"closed\\n")
    os._exit(0)
signal.signal(signal.SIGTERM, handler)
train(logger)
"""
    with running(code, tmp_path) as process:
        wait_until_said(process, "100")
        process.terminate()
        accepted, errors = finish(process)
    assert (process.returncode, errors) == (0, "")
    assert accepted.pop() == "closed"
    check_all_written(tmp_path, accepted)


def test_a_second_signal_ends_a_process_whose_sink_is_stuck_at_once(tmp_path):
    code = """
class Stuck(JSONLSink):
    def write(self, record):
        time.sleep(100)
logger = MetricsLogger([Stuck(folder + "/stuck.jsonl"), JSONLSink(folder + "/run.jsonl")])
train(logger, 20)
os.write(1, b"ready\\n")
import ctypes
mutex = ctypes.create_string_buffer(256)
ctypes.CDLL(None).pthread_mutex_lock(mutex), ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""
    with running(code, tmp_path) as process:
        wait_until_said(process, "ready")
        process.terminate()
        time.sleep(0.5)
        assert process.poll() is None
        process.terminate()
        process.wait(2)
    assert process.returncode == -signal.SIGTERM
    assert steps(tmp_path / "run.jsonl") == list(range(20))


def test_a_signal_at_a_forked_child_is_not_its_parents(tmp_path):
    code = """
import ctypes
logger = MetricsLogger([JSONLSink(folder + "/run.jsonl")])
logger.log(0, {"x": 1.0})
mutex, c = ctypes.create_string_buffer(256), ctypes.CDLL(None)
ends = set()
for trial in range(200):
    pid = os.fork()
    if not pid:
        c.pthread_mutex_lock(mutex), c.pthread_mutex_lock(mutex)
    time.sleep(trial % 20 * 1e-4)
    os.kill(pid, signal.SIGTERM)
    ends.add(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
assert ends == {-signal.SIGTERM}, ends
logger.log(1, {"x": 1.0})
logger.close()
"""
    with running(code, tmp_path) as process:
        _, errors = finish(process)
    assert (process.returncode, errors) == (0, "")
    assert steps(tmp_path / "run.jsonl") == [0, 1]


def test_an_interrupt_in_close_leaves_the_rest_to_the_exit_and_one_more_is_told_what_it_cost(
    tmp_path,
):
    """Until now the first cost all that was left, and neither said so."""
    code = """
import os, signal, sys, time
from metricfold import JSONLSink, MetricsLogger

class Slow(JSONLSink):
    def write(self, record):
        super().write(record)
        if record.step in {interrupts}:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)

with MetricsLogger([Slow(sys.argv[1])]) as logger:
    for step in range(20):
        logger.log(step, {{"x": 1.0}})
"""
    for interrupts, all_written in (([4], True), ([4, 9], False)):
        path = tmp_path / f"{len(interrupts)}.jsonl"
        script = code.format(interrupts=interrupts)
        done = subprocess.run(
            [sys.executable, "-c", script, str(path)], capture_output=True, text=True, timeout=60
        )
        assert done.returncode in (130, -signal.SIGINT), done.stderr
        assert (len(steps(path)) == 20) is all_written
        told = re.search(r"(\d+) written, 0 skipped, (\d+) lost", done.stderr)
        assert (told is None) is all_written, done.stderr
        # One may have been in the middle of being written.
        assert all_written or len(steps(path)) - int(told[1]) in (0, 1)
        assert all_written or int(told[1]) + int(told[2]) == 20


def test_a_logger_that_is_made_as_the_interpreter_exits_writes_where_threads_can_still_start(
    tmp_path,
):
    """Until now its constructor raised "can't register atexit after shutdown"."""
    code = """
import atexit, sys
from metricfold import JSONLSink, MetricsLogger

def late():
    logger = MetricsLogger([JSONLSink(sys.argv[1])])
    try:
        logger.log(1, {"x": 1.0})
    except RuntimeError as error:  # from Python 3.12 on
        assert "new thread at interpreter shutdown" in str(error)
        print("no thread")
    logger.close()

atexit.register(late)
"""
    path = tmp_path / "run.jsonl"
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=60
    )
    assert done.stderr == ""
    assert done.stdout == "no thread\n" or steps(path) == [1]
