"""Comet: the real package offline; the archives that it would upload are read back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from metricfold.sinks import CometSink

pytestmark = pytest.mark.skipif(find_spec("comet_ml") is None, reason="needs comet_ml")
LONG = "x" * 101


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("comet")
    ended = subprocess.run(
        [sys.executable, Path(__file__).with_name("comet_experiments.py"), folder],
        env={**os.environ, "COMET_LOGGING_CONSOLE": "ERROR"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return folder, json.loads(ended.stdout.splitlines()[0])


def messages(folder):
    """Return what the one archive in `folder` holds, by type, and its files."""
    (path,) = folder.glob("*.zip")
    found: dict[str, list] = {}
    with zipfile.ZipFile(path) as archive:
        for line in archive.read("messages.json").decode().splitlines():
            message = json.loads(line)
            found.setdefault(message["type"], []).append(message["payload"])
        files = {name: archive.read(name) for name in archive.namelist()}
    return found, files


def metrics(found):
    rows = [message["metric"] for message in found["metric_msg"]]
    return [(row["step"], row["metricName"], row["metricValue"]) for row in rows]


def test_the_running_experiment_gets_everything_under_its_plain_name_and_stays_open(logged):
    folder, said = logged
    found, _ = messages(folder / "yours")
    assert [one for one in metrics(found) if one[1].endswith("loss")] == [
        *[(1, "train/loss", 0.5), (2, "train/loss", 0.25)],
        *[(4, "loss", 2.0), (5, "loss", 2.0)],
    ]
    assert not any("context" in message for message in found["metric_msg"])
    assert said["well"]
    assert said["left_open"]
    assert "has ended, and takes nothing any more" in said["ended"]


def test_what_is_not_finite_arrives(logged):
    found, _ = messages(logged[0] / "yours")
    assert {*metrics(found)} >= {(3, "nan", "NaN"), (3, "inf", "Infinity")}


def test_a_name_that_comet_would_cut_is_left_out_and_said(logged):
    """Comet cuts to 100 characters with a warning, and two metrics become one."""
    folder, said = logged
    found, _ = messages(folder / "yours")
    assert not any(name.startswith("xxx") for _, name, _ in metrics(found))
    assert [list(one) for one in said["refused"]] == [[LONG], [LONG]]
    assert "to 100 characters" in said["refused"][0][LONG]


def test_histograms_keep_their_counts_in_comets_bins(logged):
    found, files = messages(logged[0] / "yours")
    uploads = {one["additional_params"].get("fileName"): one for one in found["file_upload"]}
    assert uploads["train_a/len"]["additional_params"]["step"] == 3
    shown = json.loads(files[uploads["train_a/len"]["file_path"]])
    assert [count for _, count in shown["index_values"]] == [2, 1, 3, 4]


def test_heat_maps_are_images(logged):
    found, files = messages(logged[0] / "yours")
    uploads = {one["additional_params"].get("figName"): one for one in found["file_upload"]}
    assert files[uploads["tokens/cells"]["file_path"]].startswith(b"\x89PNG")
    assert uploads["tokens/cells"]["additional_params"]["step"] == 3


def test_the_configuration_becomes_parameters_and_alerts_stand_under_other(logged):
    found, _ = messages(logged[0] / "yours")
    params = {
        one["param"]["paramName"]: one["param"]["paramValue"] for one in found["parameter_msg"]
    }
    assert (params["optimizer.lr"], params["seed"]) == (0.5, 7)
    others = {one["key"]: one["value"] for one in found["log_other"]}
    assert others["alert.train.a/x"] == "warning, step 3: high"


def test_without_a_running_experiment_an_offline_one_is_made_and_ended(logged):
    """One that has ended is still Comet's running one."""
    found, _ = messages(logged[0] / "own")
    assert (1, "loss", 0.5) in metrics(found)


def test_a_step_stays_its_own_beside_another_thread(logged):
    """With `log_metrics`, 58 of 800 values got the other thread's step, with `log_metric` a few."""
    found, _ = messages(logged[0] / "shared")
    ours = [(step, name) for step, name, _ in metrics(found) if name.startswith("m")]
    assert sorted(ours) == sorted((s, f"m{n}") for s in range(100, 110) for n in range(20))


def test_arguments_for_an_experiment_that_is_there_are_refused():
    with pytest.raises(TypeError, match="experiment= and a=: those are for comet_ml"):
        CometSink(object(), a=1)
