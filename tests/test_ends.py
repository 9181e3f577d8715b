"""A process with an open logger ends as it would without one, and loses no record: real processes.

Each way of ending is run twice, with a logger and without; the first must do what the second does.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from metricfold import read_jsonl

pytestmark = pytest.mark.alone

ALIVE = "lives on"
RECORDS = 5


class Way(NamedTuple):
    """How a process meets a signal.

    Args:
        before: what it sets up before the logger.
        after: what it sets up after it.
        does: what its main thread does when the signal comes.
        signum: which signal it is.
        heard: whether a logger can hear of it; else what it has not written yet is lost.
    """

    before: str = ""
    after: str = ""
    does: str = "time.sleep(60)"
    signum: int = signal.SIGTERM
    heard: bool = True


HANDLER = "signal.signal(signal.SIGTERM, lambda *_: {})"
LOOP = "import asyncio; loop = asyncio.new_event_loop(); "
RUN = "loop.run_forever(); sys.exit(7)"

WAYS = {
    "a loop in Python": Way(does="while True: pass"),
    "asleep": Way(),
    "waiting for a lock of Python's": Way(does="x = threading.Lock(); x.acquire(); x.acquire()"),
    "waiting in C": Way(does="wait_in_c()"),
    "holding the interpreter in C": Way(does="sum(range(2 * 10**7)); time.sleep(60)"),
    "SIGHUP": Way(signum=signal.SIGHUP),
    "SIGHUP under nohup": Way("signal.signal(signal.SIGHUP, signal.SIG_IGN)", signum=signal.SIGHUP),
    "SIGTERM ignored": Way("signal.signal(signal.SIGTERM, signal.SIG_IGN)"),
    "a handler before that exits": Way(HANDLER.format("sys.exit(3)")),
    "a handler before that exits, in C": Way(HANDLER.format("sys.exit(3)"), does="wait_in_c()"),
    "a handler before that goes on": Way(HANDLER.format("None")),
    "a handler after that goes on": Way(after=HANDLER.format("None")),
    "a handler after that exits, in C": Way(
        after=HANDLER.format("sys.exit(3)"), does="wait_in_c()"
    ),
    "a handler after that calls the one before": Way(
        after="old = signal.getsignal(15)\n"
        "signal.signal(15, lambda *args: old(*args) if callable(old) else None)"
    ),
    "a handler set and taken back": Way(
        after="old = signal.signal(15, lambda *_: None); signal.signal(15, old)", does="wait_in_c()"
    ),
    "a handler after that raises": Way(after=HANDLER.format("1 / 0")),
    "asyncio's handler before": Way(LOOP + "loop.add_signal_handler(15, loop.stop)", does=RUN),
    "asyncio's handler after": Way(after=LOOP + "loop.add_signal_handler(15, loop.stop)", does=RUN),
    "asyncio's handler of another signal": Way(
        after=LOOP + "loop.add_signal_handler(10, loop.stop)", does=RUN
    ),
    "asyncio's handler of another signal, which comes": Way(
        after=LOOP + "loop.add_signal_handler(10, loop.stop)",
        does=RUN,
        signum=signal.SIGUSR1,
    ),
    "asyncio's handler taken away": Way(
        after=LOOP + "loop.add_signal_handler(10, print); loop.remove_signal_handler(10)\n"
        "if logger: logger.log(0, {'x': 1.0})",
        does="wait_in_c()",
    ),
    "asyncio.run, as Jupyter and Ray": Way(
        after="import asyncio", does="asyncio.run(asyncio.sleep(60))"
    ),
    "faulthandler before": Way(
        "import faulthandler; faulthandler.register(15, chain=True)", heard=False
    ),
    "faulthandler after": Way(
        after="import faulthandler; faulthandler.register(15, chain=True)", does="wait_in_c()"
    ),
    "faulthandler that does not hand on": Way(
        after="import faulthandler; faulthandler.register(15, chain=False)", does="wait_in_c()"
    ),
    "submitit's handlers of SIGUSR1 and SIGTERM": Way(
        after="signal.signal(10, lambda *_: sys.exit(9)); signal.signal(15, lambda *_: None)",
        signum=signal.SIGUSR1,
    ),
    "torchelastic's handler that raises": Way(
        before="class Stop(Exception): pass\n"
        "def stop(signum, frame): raise Stop(signum)\n"
        "signal.signal(15, stop)",
        does="try: time.sleep(60)\nexcept Stop: sys.exit(4)",
    ),
    "a logger made in a thread": Way("THREAD = True", does="wait_in_c()", heard=False),
    "blocked in the main thread": Way(
        after="signal.pthread_sigmask(signal.SIG_BLOCK, [15])\n"
        "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
    ),
    "process 1": Way(),
}

CODE = """
import ctypes, os, signal, sys, threading, time
path, logged = sys.argv[1], sys.argv[2] == "logged"
THREAD, logger = False, None

def wait_in_c():
    c, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(256)
    c.pthread_mutex_init(mutex, None), c.pthread_mutex_lock(mutex), c.pthread_mutex_lock(mutex)

{before}
if logged:
    from metricfold import JSONLSink, MetricsLogger
    class Slow(JSONLSink):
        def write(self, record):
            time.sleep(0.05)
            super().write(record)
    def make():
        global logger
        logger = MetricsLogger([Slow(path)])
    if THREAD:
        thread = threading.Thread(target=make)
        thread.start(), thread.join()
    else:
        make()
{after}
if logged:
    def log():
        for step in range(1, {records} + 1):
            logger.log(step, {{"x": 1.0}})
    if THREAD:
        thread = threading.Thread(target=log)
        thread.start(), thread.join()
    else:
        log()
print("ready", flush=True)
{does}
"""


def ending(name: str, way: Way, folder: Path, logged: bool) -> tuple[int | str, int]:
    """Return how the process ends, and how many records are in its file."""
    path = folder / f"{name}-{logged}.jsonl"
    code = CODE.format(before=way.before, after=way.after, does=way.does, records=RECORDS)
    command = [sys.executable, "-c", code, str(path), "logged" if logged else "without"]
    if name == "process 1":
        command = ["unshare", "--pid", "--fork", "--mount-proc", *command]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        pid = process.pid
        if name == "process 1":
            pid = int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])
        time.sleep(0.1)
        os.kill(pid, way.signum)
        end: int | str = ALIVE
        deadline = time.monotonic() + 20
        used, patience = 0, 0.0
        while time.monotonic() < deadline and end == ALIVE:
            if used != (used := cpu_time(pid)) or not patience:
                patience = time.monotonic() + 3  # it is still at something, be it slow
            code_or_none = process.poll()
            if code_or_none is not None:
                end = code_or_none
            elif time.monotonic() > patience and written(path) == RECORDS * logged:
                break  # it has had its time, and has written: it lives
            time.sleep(0.02)
        if end == ALIVE:
            os.kill(pid, signal.SIGKILL)
        return end, written(path)


def cpu_time(pid: int) -> int:
    """Return what a process has used so far, in ticks; 0 where that is not told, or it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return int(fields[11]) + int(fields[12])


NOTIFIER = """
import ctypes, os, signal, socket, sys, time
import jax
from metricfold import JSONLSink, MetricsLogger

def handler():
    action = ctypes.create_string_buffer(512)
    ctypes.CDLL(None).sigaction(15, None, action)
    return ctypes.c_void_p.from_buffer(action).value

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = "127.0.0.1:%d" % free.getsockname()[1]
first = MetricsLogger([JSONLSink(sys.argv[1])])
jax.distributed.initialize(address, 1, 0)
theirs = handler()
second = MetricsLogger([JSONLSink(sys.argv[1] + "2")])
second.log(1, {"x": 1.0})
assert handler() == theirs, "while open"
first.close(), second.close()
assert handler() == theirs, "after close"
os.kill(os.getpid(), 15)
from jax._src import distributed
manager = distributed.global_state.preemption_sync_manager
heard = 0
for step in range(100):
    heard += manager.reached_sync_point(step)
    time.sleep(0.05)
assert heard, "of the preemption"
os._exit(0)
"""


def test_the_handler_of_jaxs_preemption_notifier_stays_in_place(tmp_path):
    pytest.importorskip("jax")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", NOTIFIER, str(tmp_path / "x.jsonl")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def written(path: Path) -> int:
    if not path.exists():
        return 0
    return len({record.step for record in read_jsonl(path)} - {0})


@pytest.mark.timeout(170)
def test_a_signal_ends_a_process_as_it_would_without_a_logger_and_loses_nothing(tmp_path):
    ways = dict(WAYS)
    if os.geteuid() or not shutil.which("unshare"):
        del ways["process 1"]  # only root may make a process 1
    with ThreadPoolExecutor(6) as pool:
        ends = {
            name: [pool.submit(ending, name, way, tmp_path, logged) for logged in (False, True)]
            for name, way in ways.items()
        }
    wrong = {}
    for name, (without, logged) in ends.items():
        (expected, _), (end, records) = without.result(), logged.result()
        if end != expected or (records != RECORDS and ways[name].heard):
            wrong[name] = f"without a logger {expected}, with one {end}; {records} records"
    assert not wrong, wrong
    seen = {without.result()[0] for without, _ in ends.values()}
    assert {-signal.SIGTERM, -signal.SIGHUP, 3, 4, 7, 9, ALIVE} <= seen


SEVERAL = """
import os, signal, sys, time
from metricfold import JSONLSink, MetricsLogger

class Hanging(JSONLSink):
    def write(self, record):
        time.sleep(1000)

class Slow(JSONLSink):
    def write(self, record):
        time.sleep(1.0)
        super().write(record)

hanging = [MetricsLogger([Hanging(f"{sys.argv[1]}{n}")]) for n in range(2)]
last = MetricsLogger([Slow(sys.argv[1])])
for logger in [*hanging, last]:
    for step in range(3):
        logger.log(step, {"x": 1.0})
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(60)
"""


def test_loggers_whose_sinks_hang_take_no_time_from_another_as_the_process_dies(tmp_path):
    """Until now each had ten seconds of its own, one after the other: a scheduler kills after thirty."""
    path = tmp_path / "x.jsonl"
    done = subprocess.run(
        [sys.executable, "-c", SEVERAL, str(path)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == -signal.SIGTERM, done.stderr
    assert [one.step for one in read_jsonl(path)] == [0, 1, 2]
    assert done.stderr.count("it has not answered") == 2
