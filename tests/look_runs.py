"""Run files that tests look at."""

from __future__ import annotations

import math

import numpy as np

from metricfold import JSONLSink
from metricfold.sinks import Meaning, Record

DATASETS = ("web", "code", "books")
FLOORS = {"web": 2.6, "code": 1.1, "books": 2.9}


def correlated(rng, count, memory=0.6, size=0.03):
    """Return noise in which each value remembers a part of the one before."""
    found, last = np.empty(count), rng.normal(0, size)
    steps = rng.normal(0, size * math.sqrt(1 - memory**2), count)
    for place in range(count):
        last = found[place] = memory * last + steps[place]
    return found


def training(
    path,
    seed,
    *,
    logs=400,
    every=10,
    shift=0.0,
    since=0,
    datasets=DATASETS,
    config=None,
    memory=0.6,
):
    """Write a run with a loss for each dataset, which from step `since` on is larger by a part `shift`."""
    rng = np.random.default_rng(seed)
    noise = {name: correlated(rng, logs, memory) for name in datasets}
    keys = {f"train_{name}/loss": Meaning(name, "loss", "", "mean") for name in datasets}
    keys |= {
        f"train_{name}/tokens_seen": Meaning(name, "tokens_seen", "", "sum") for name in datasets
    }
    keys["train/loss"] = Meaning("", "loss", "", "mean")
    sink = JSONLSink(path)
    run = {"world_size": 2, "name": path.stem, "config": config or {"lr": 3e-4}}
    for number in range(1, logs + 1):
        step = number * every
        factor = 1 + (shift if step >= since else 0.0)
        metrics = {}
        for name in datasets:
            curve = FLOORS[name] + 3 * step**-0.5
            metrics[f"train_{name}/loss"] = (curve + noise[name][number - 1]) * factor
            metrics[f"train_{name}/tokens_seen"] = 1000.0 * step
        of_all = [metrics[f"train_{name}/loss"] for name in datasets]
        metrics["train/loss"] = sum(of_all) / len(of_all)
        metrics["train/lr"] = 1e-3
        metrics["train/step_seconds"] = 1 + 0.1 * rng.random()
        sink.write(Record(step, 1e9 + step, metrics, {}, "train", {}, [], run, keys))
        run = None
    sink.close()
    return path


def plain(path, steps, values, key="loss", prefix="train"):
    """Write one metric, logged as a dict."""
    sink = JSONLSink(path)
    for step, value in zip(steps, values, strict=True):
        sink.write(
            Record(int(step), 1e9 + int(step), {f"{prefix}/{key}": float(value)}, prefix=prefix)
        )
    sink.close()
    return path
