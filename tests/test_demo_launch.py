"""Ranks as processes: told who they are, and none left behind, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import suppress
from pathlib import Path

import pytest

from metricfold.demo.launch import run_ranks
from metricfold.demo.texts import DemoError


@pytest.fixture
def rank_module(tmp_path, monkeypatch):
    """Return a function that makes a module to run, which notes the process of each rank."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(body):
        (tmp_path / "job_of_a_rank.py").write_text(
            "import os, sys, time\n"
            "rank = int(os.environ['RANK'])\n"
            f"folder = {str(tmp_path)!r}\n"
            "with open(f'{folder}/{rank}.tmp', 'w') as file: file.write(str(os.getpid()))\n"
            "os.replace(f'{folder}/{rank}.tmp', f'{folder}/{rank}.pid')\n"
            "def wait_for(other):\n"
            "    while not os.path.exists(f'{folder}/{other}.pid'): time.sleep(0.01)\n"
            + textwrap.dedent(body)
        )
        return "job_of_a_rank"

    yield write
    for pid in pids(tmp_path):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def pids(folder: Path):
    return [int(path.read_text()) for path in folder.glob("*.pid")]


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A process that has ended and was not waited for yet still has its id.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def test_ranks_know_who_they_are(rank_module, tmp_path, capfd):
    module = rank_module("""
        e = os.environ
        print(e["RANK"], e["LOCAL_RANK"], e["WORLD_SIZE"], e["OMP_NUM_THREADS"], sys.argv[1:])
    """)
    run_ranks(module, ["some", "words"], ranks=3, logs=tmp_path)
    assert capfd.readouterr().out == "0 0 3 1 ['some', 'words']\n"
    assert (tmp_path / "rank-2.log").read_text() == "2 2 3 1 ['some', 'words']\n"


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    ("end", "reason"),
    [
        ("raise ValueError('the disk is on fire')", "ValueError: the disk is on fire"),
        ("sys.exit(3)", "failed with exit code 3"),
        ("os.kill(os.getpid(), 9)", "was killed by SIGKILL"),
    ],
)
def test_when_a_rank_fails_the_others_end_and_the_reason_is_told(
    rank_module, tmp_path, end, reason
):
    module = rank_module(f"""
        if rank == 1:
            wait_for(0); wait_for(2)
            {end}
        time.sleep(60)
    """)
    with pytest.raises(DemoError, match=reason) as error:
        run_ranks(module, [], ranks=3, logs=tmp_path)
    assert str(error.value).startswith("rank 1 ")
    assert len(pids(tmp_path)) == 3
    assert not any(alive(pid) for pid in pids(tmp_path))


@pytest.mark.timeout(30)
def test_a_rank_that_does_not_listen_is_killed(rank_module, tmp_path, monkeypatch):
    monkeypatch.setattr("metricfold.demo.launch._GRACE", 0.2)
    module = rank_module("""
        import signal
        if rank == 1:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            os.replace(f"{folder}/1.pid", f"{folder}/deaf.pid")
            time.sleep(60)
        wait_for("deaf")
        sys.exit(1)
    """)
    with pytest.raises(DemoError, match="rank 0 failed"):
        run_ranks(module, [], ranks=2, logs=tmp_path)
    assert not any(alive(pid) for pid in pids(tmp_path))


@pytest.mark.timeout(30)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ctrl_c_and_its_like_end_all_ranks(rank_module, tmp_path, number):
    module = rank_module("time.sleep(60)")
    code = (
        "import signal, sys; from pathlib import Path\n"
        "from metricfold.demo.launch import run_ranks\n"
        # As in a terminal: where tests run in the background, SIGINT may be ignored from birth.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "run_ranks(sys.argv[2], [], ranks=2, logs=Path(sys.argv[1]))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path), module]
    with subprocess.Popen(
        command, start_new_session=True, stderr=subprocess.PIPE, text=True
    ) as parent:
        while len(pids(tmp_path)) < 2:
            assert parent.poll() is None, parent.stderr.read()
            time.sleep(0.02)
        # As a terminal does it: Ctrl-C goes to the whole group.
        os.killpg(parent.pid, number)
        _, said = parent.communicate(timeout=20)
    assert said.rstrip().endswith("KeyboardInterrupt")
    assert parent.returncode != 0
    assert not any(alive(pid) for pid in pids(tmp_path))
