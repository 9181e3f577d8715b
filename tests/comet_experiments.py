"""Log to Comet offline, in a process of its own: its import patches other packages.

`python comet_experiments.py FOLDER` leaves archives in FOLDER/yours, /own and /shared, and prints what
was refused as JSON.
"""

from __future__ import annotations

import json
import math
import sys
import threading
from pathlib import Path

import comet_ml
import numpy as np

from metricfold._core.sketch import Histogram
from metricfold.sinks import CometSink, KeysRefused, MetricsLogger, Record, RecordRefused

BARE = {
    "log_code": False,
    "log_env_details": False,
    "log_git_metadata": False,
    "log_git_patch": False,
    "parse_args": False,
}
LONG = "x" * 101


def started(folder):
    return comet_ml.OfflineExperiment(
        offline_directory=str(folder), auto_output_logging=False, display_summary_level=0, **BARE
    )


def into_yours(folder):
    """Several kinds of records into an experiment of the user's; return what was refused."""
    experiment, sink = started(folder), CometSink()
    histogram = Histogram(
        np.array([-2.0, -1.0, 1.0, 2.0, 4.0]), np.array([2.0, 1.0, 3.0, 4.0]), -2, 4, 20.0, 99.0
    )
    cells = {"axes": [["layer", 2], ["expert", 3]], "values": np.arange(6.0).reshape(2, 3)}
    alert = {"rule": "Spike", "severity": "warning", "message": "high", "dataset": "a", "name": "x"}
    run = {"config": {"optimizer": {"lr": 0.5}, "seed": 7}, "world_size": 2}
    odd = {"nan": math.nan, "inf": math.inf}
    rich = Record(3, 1.0, odd, {"train_a/len": histogram}, "train", {"tokens": cells}, [alert], run)
    with experiment.train(), MetricsLogger([sink]) as logger:
        logger.log(1, {"loss": 0.5}, prefix="train")
        well = logger.flush()
        logger.log(2, {"loss": 0.25}, prefix="train")
    left_open = experiment.alive
    sink.write(rich)
    refused = []
    for step in (4, 5):
        try:
            sink.write(Record(step, 1.0, {LONG: 1.0, "loss": 2.0}))
        except KeysRefused as error:
            refused.append({key: str(why) for key, why in error.refused.items()})
    experiment.end()
    try:
        sink.write(Record(6, 1.0, {"loss": 1.0}))
    except RecordRefused as error:
        ended = str(error)
    return {"well": well, "left_open": left_open, "refused": refused, "ended": ended}


def into_its_own(folder):
    with MetricsLogger([CometSink(offline_directory=folder, **BARE)]) as logger:
        logger.log(1, {"loss": 0.5})


def beside_another_thread(folder):
    """comet-ml/issue-tracking#523 and its kind: the step is the experiment's, whoever sets it."""
    sys.setswitchinterval(1e-5)
    experiment, stop = started(folder), threading.Event()

    def logging():
        while not stop.is_set():
            experiment.log_metric("theirs", 1.0, step=1)

    thread = threading.Thread(target=logging)
    thread.start()
    sink = CometSink(experiment)
    for step in range(100, 110):
        sink.write(Record(step, 1.0, {f"m{n}": 1.0 for n in range(20)}))
    stop.set()
    thread.join()
    experiment.end()


if __name__ == "__main__":
    top = Path(sys.argv[1])
    print(json.dumps(into_yours(top / "yours")))
    into_its_own(top / "own")
    beside_another_thread(top / "shared")
