"""Make the golden files: what metricfold 0.1.0 wrote, at commit 4ed8aa1, for later versions to read.

    python tests/golden/make.py FOLDER

They were made once, and are to be read from then on: making them anew with a later version would
test nothing. `made.json` names the versions. Numbers that are expected stand beside, in JSON, and
are computed here by NumPy from the raw values; only times of timers are what the product said.

    checkpoints/   state dicts of version 1: {route}-{ranks}-{window}-{interval}.json
    accumulators/  undrained DeviceAccumulators, through pickle, torch.save and Orbax
    percentiles/   8 x 1,000 values, one row a rank, and the percentiles of all
    sinks/         records as JSON lines, and as W&B and TensorBoard wrote them; lines of the demo
"""

from __future__ import annotations

import base64
import gzip
import json
import math
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from handlers_of_users import LaneRMS, MyTypes, ProductHandler, RMSHandler
from ranks import run_threads

import metricfold
from metricfold import AggregationType, Metric, MetricsAggregator
from metricfold.histogram import Histogram
from metricfold.sinks import JSONLSink, Record, TensorBoardSink, WandbSink

COMMIT = "4ed8aa1"
WINDOW = 16
CATEGORIES = 3
PERCENTILES = (5, 50, 95)
DISTRIBUTION = AggregationType.DISTRIBUTION
DEVICE_KINDS = {
    "mean": "mean",
    "sum": "sum",
    "max": "max",
    "min": "min",
    "len": "distribution",
}
DEVICE_NAMES = ("dev", "both")

# -- What a rank records in the first interval ("early") and in the second ("late") ---------------


def small(rank: int, phase: str) -> list[int]:
    """Values of one rank: whole numbers from 1 to 37, so that sums and buckets are exact."""
    start, size = (0, 20) if phase == "early" else (20, 8)
    return [(7 * i + 11 * rank) % 37 + 1 for i in range(start, start + size)]


def many(rank: int, world_size: int, phase: str) -> list[int]:
    """More values than are kept as they are."""
    start, size = (0, 1400) if phase == "early" else (1400, 1048)
    return [(i * i) % 37 + 1 for i in range(start + rank, start + size, world_size)]


def weight(place: int) -> int:
    return 1 + place % 3


def category(place: int, phase: str) -> str:
    return "abc"[place % 3] if phase == "early" else "abcde"[place % 5]


def feed(
    aggregator: MetricsAggregator, rank: int, world_size: int, phase: str, window: int | None
) -> None:
    for place, value in enumerate(small(rank, phase)):
        aggregator.update(
            [
                Metric("d", "sum", value, AggregationType.SUM),
                Metric("d", "mean", value, AggregationType.MEAN, weight(place)),
                Metric("d", "mean", math.nan, AggregationType.MEAN, 0.0),
                Metric("d", "max", value - 40, AggregationType.MAX),
                Metric("d", "min", value - 20, AggregationType.MIN),
                Metric("d", "rate", value, AggregationType.RATE),
                Metric("d", "len", value, DISTRIBUTION),
                Metric("d", "weighted", value, DISTRIBUTION, weight(place)),
                Metric("d", "kind", category(place, phase), AggregationType.CATEGORICAL_COUNT),
                Metric("d", "rms", value, MyTypes.RMS),
                Metric("d", "product", 2, MyTypes.PRODUCT),
                Metric("d", "lane", value, "lane rms"),
                Metric("größe/ä", "sum", value / 4, AggregationType.SUM),
            ]
        )
        aggregator.record("loss", value / 8)
        aggregator.record("step", value, "max", per_rank=True)
        if window is None:  # else what a device sends cannot be the same metric
            aggregator.record("len", value, "distribution", dataset="both")
    aggregator.update([Metric("d", "many", v, DISTRIBUTION) for v in many(rank, world_size, phase)])
    if rank == world_size - 1:
        aggregator.update([Metric("d", "holes", v, DISTRIBUTION) for v in (1, math.nan, math.inf)])
        aggregator.update([Metric("d", "nan", v, AggregationType.SUM) for v in (1, math.nan)])
    with aggregator.timer("data"):
        time.sleep(0.001)


def drained(aggregator: MetricsAggregator, rank: int, phase: str, route: str) -> None:
    """Drain an accumulator of torch, or of JAX on the wide route."""
    x = np.array(small(rank, phase), dtype=np.float32)
    w = np.array([weight(place) for place in range(x.size)], dtype=np.float32)
    ids = np.arange(x.size) % 2
    aggregator.drain(
        torch_accumulator(x, w, ids) if route == "narrow" else jax_accumulator(x, w, ids)
    )


def torch_accumulator(x: Any, w: Any, ids: Any) -> Any:
    import torch

    from metricfold.torch import DeviceAccumulator

    acc = DeviceAccumulator(DEVICE_KINDS, DEVICE_NAMES)
    x, w, ids = torch.tensor(x), torch.tensor(w), torch.tensor(ids)
    for name, kind in DEVICE_KINDS.items():
        acc.update(name, x, weights=w if kind == "mean" else None, dataset_ids=ids)
    return acc


def jax_accumulator(x: Any, w: Any, ids: Any) -> Any:
    from metricfold.jax import DeviceAccumulator

    acc = DeviceAccumulator(DEVICE_KINDS, DEVICE_NAMES)
    for name, kind in DEVICE_KINDS.items():
        acc = acc.update(name, x, weights=w if kind == "mean" else None, dataset_ids=ids)
    return acc


# -- Checkpoints ----------------------------------------------------------------------------------


def saved(communicator: Any, route: str, window: int | None) -> list[dict[str, Any]]:
    """Return the state with the second interval open, and closed; and the timers' numbers."""
    aggregator = MetricsAggregator(
        window,
        communicator=communicator,
        route=route,
        max_categories=CATEGORIES,
        percentiles=PERCENTILES,
        on_nan="propagate" if window else "skip",
    )
    aggregator.register_handler(MyTypes.RMS, RMSHandler())
    aggregator.register_handler(MyTypes.PRODUCT, ProductHandler())
    aggregator.register_handler("lane rms", LaneRMS())
    rank, world_size = communicator.rank, communicator.world_size
    for phase in ("early", "late"):
        feed(aggregator, rank, world_size, phase, window)
        drained(aggregator, rank, phase, route)
        if phase == "early":
            aggregator.reduce()
    opened = aggregator.state_dict()
    snapshot = aggregator.reduce()
    closed = aggregator.state_dict(sync=False)
    names = ("t/data_seconds", "t/data_seconds_max")
    timed = {
        view: {name: snapshot.as_dict("t", view)[name] for name in names}
        for view in ("run", "interval")
    }
    return [opened, closed, timed]


def make_checkpoints(folder: Path) -> None:
    folder.mkdir()
    expected: dict[str, Any] = {}
    timers: dict[str, Any] = {}
    drawn: dict[str, Any] = {}
    for route in ("narrow", "wide"):
        for world_size in (1, 2, 4):
            for window in (WINDOW, None):
                kind = f"{world_size}-{'bounded' if window else 'unbounded'}"
                opened, closed, timed = run_threads(saved, world_size, route, window)[0]
                for interval, state in (("open", opened), ("closed", closed)):
                    name = f"{route}-{kind}-{interval}"
                    write_json(folder / f"{name}.json", state)
                    timers[name] = timed
                    if (route, window, interval) == ("wide", WINDOW, "closed"):
                        drawn[name] = {str(n): of_drawn(state, n) for n in (1, 2)}
                    expected[f"{kind}-{interval}"] = {
                        "run": {
                            str(loading): truth("run", world_size, window, interval, loading)
                            for loading in (1, 2)
                        },
                        "interval": truth("interval", world_size, window, interval, 1)
                        if interval == "open"
                        else {},
                    }
    write_json(folder / "expected.json", {"metrics": expected, "timers": timers, "drawn": drawn})


def of_drawn(state: dict[str, Any], loading: int) -> dict[str, float]:
    """Return what recent values say that were drawn from a sketch.

    After a reduction by the wide route nobody has everyone's recent values; a checkpoint without
    another exchange holds as many that are spread alike. What they are, the file alone knows.
    """
    found = {}
    for (dataset, name), (window,) in json.loads(state["payload"])["content"]["windows"]:
        values = np.frombuffer(base64.b64decode(window["values"]), dtype="<f8")
        newest = values[-WINDOW * loading :]
        found |= statistics(f"t_{dataset}/{name}", newest, np.ones(newest.size), weighted=False)
    return {name: float(value) for name, value in found.items()}


def truth(
    view: str, world_size: int, window: int | None, interval: str, loading: int
) -> dict[str, float]:
    """Compute from the raw values what a view says once the state is loaded on `loading` ranks."""
    phases = ("early", "late") if view == "run" else ("late",)
    ranks = range(world_size)
    values = [np.array(small(r, p), dtype=float) for p in phases for r in ranks]
    weights = [np.array([weight(i) for i in range(v.size)], dtype=float) for v in values]
    x, w = np.concatenate(values), np.concatenate(weights)
    found = {
        "t_d/sum": x.sum(),
        "t_d/mean": (x * w).sum() / w.sum(),
        "t_d/max": x.max() - 40,
        "t_d/min": x.min() - 20,
        "t_d/rms": math.sqrt((x * x).mean()),
        "t_d/lane": math.sqrt((x * x).mean()),
        "t_d/product": 2.0**x.size,
        "t_größe/ä/sum": x.sum() / 4,
        "t/loss": x.mean() / 8,
        "t/step": x.max(),
    }
    names = [category(i, p) for p in phases for r in ranks for i in range(len(small(r, p)))]
    for name in "abcde":
        # The first three that the ranks agreed on are told apart.
        label = f"t_d/kind_count_{name if name in 'abc' else '__other__'}"
        if name in names:
            found[label] = found.get(label, 0.0) + names.count(name)
    bounds = {"view": view, "window": window, "interval": interval, "loading": loading}
    for name, of_rank, weighted in (
        ("len", small, False),
        ("weighted", small, True),
        ("many", lambda r, p: many(r, world_size, p), False),
    ):
        pool = pooled([(of_rank(r, "early"), of_rank(r, "late")) for r in ranks], **bounds)
        found |= statistics(f"t_d/{name}", *pool, weighted=weighted)
    holes = [((1,) if r == ranks[-1] else (),) * 2 for r in ranks]
    found |= statistics("t_d/holes", *pooled(holes, **bounds), weighted=False)
    found["t_d/holes_stat_nan_count"] = found["t_d/holes_stat_inf_count"] = float(len(phases))
    if window:
        found["t_d/nan"] = math.nan
    else:
        found |= {"t_d/nan": float(len(phases)), "t_d/nan_nan_count": float(len(phases))}
    for place, dataset in enumerate(DEVICE_NAMES):
        mine = [v[place::2] for v in values]
        y, u = np.concatenate(mine), np.concatenate([v[place::2] for v in weights])
        found |= {
            f"t_{dataset}/mean": (y * u).sum() / u.sum(),
            f"t_{dataset}/sum": y.sum(),
            f"t_{dataset}/max": y.max(),
            f"t_{dataset}/min": y.min(),
        }
        # What devices send has no age: such a distribution is about all values, in either view.
        all_of_it = np.concatenate([y, x]) if (dataset, window) == ("both", None) else y
        found |= statistics(f"t_{dataset}/len", all_of_it, np.ones(all_of_it.size), weighted=False)
    return {name: float(value) for name, value in found.items()}


def pooled(
    ranks: list[Any], *, view: str, window: int | None, interval: str, loading: int
) -> tuple[Any, Any]:
    """Return the values, and weights by their place, that a view of a DISTRIBUTION is about."""
    parts = []
    for rank, (early, late) in enumerate(ranks):
        marked = [(v, weight(i), False) for i, v in enumerate(early)]
        marked += [(v, weight(i), True) for i, v in enumerate(late)]
        if view == "interval":
            marked = [one for one in marked if one[2]]
        elif window:
            marked = marked[-window:]
        if interval == "open":
            older = [one for one in marked if not one[2]]
            fresh = [one for one in marked if one[2]]
        else:
            older, fresh = marked, []
        for newer, part in ((0, older), (1, fresh)):
            parts += [(newer, -age, rank, *one) for age, one in enumerate(reversed(part))]
    parts.sort(key=lambda part: part[:3])
    if window and view == "run":
        # Of what was saved, the newest that as many ranks keep.
        parts = parts[-window * loading :]
    return np.array([part[3] for part in parts], float), np.array([p[4] for p in parts], float)


def statistics(name: str, x: Any, w: Any, *, weighted: bool) -> dict[str, float]:
    """Return what a DISTRIBUTION reports, by NumPy.

    Weights are copies to percentiles, which 0.1.0 itself did not make of them.
    """
    if not weighted:
        w = np.ones(x.size)
    total = w.sum()
    mean = (x * w).sum() / total
    found = {"mean": mean, "min": x.min(), "max": x.max(), "count": x.size}
    if x.size > 1:
        found["std"] = math.sqrt((w * (x - mean) ** 2).sum() / (total - (w * w).sum() / total))
    quantiles = np.quantile(np.repeat(x, w.astype(int)), np.array(PERCENTILES) / 100)
    found |= {f"p{p:02d}": q for p, q in zip(PERCENTILES, quantiles, strict=True)}
    return {f"{name}_stat_{key}": value for key, value in found.items()}


# -- Accumulators -----------------------------------------------------------------------------------


def make_accumulators(folder: Path) -> None:
    import jax
    import orbax.checkpoint as ocp
    import torch

    folder.mkdir()
    x = np.array(small(0, "early") + small(1, "early"), dtype=np.float32)
    w = np.array([weight(place) for place in range(x.size)], dtype=np.float32)
    x[7], w[7] = math.nan, 0.0  # padding
    ids = np.arange(x.size) % 2
    expected = {}
    for place, dataset in enumerate(DEVICE_NAMES):
        here = (ids == place) & (w > 0)
        y, u = x[here].astype(float), w[here].astype(float)
        expected |= {
            f"t_{dataset}/mean": (y * u).sum() / u.sum(),
            f"t_{dataset}/sum": y.sum(),
            f"t_{dataset}/max": y.max(),
            f"t_{dataset}/min": y.min(),
            **statistics(f"t_{dataset}/len", y, u, weighted=False),
        }
    write_json(folder / "expected.json", {k: float(v) for k, v in expected.items()})

    from metricfold.jax import DeviceAccumulator as OfJAX
    from metricfold.torch import DeviceAccumulator as OfTorch

    of_torch = OfTorch(DEVICE_KINDS, DEVICE_NAMES)
    of_jax = OfJAX(DEVICE_KINDS, DEVICE_NAMES)
    for name, kind in DEVICE_KINDS.items():
        # Only zero or not matters to a type that has no weights, and to the distribution here.
        weights = w if kind == "mean" else (w > 0).astype(np.float32)
        of_torch.update(
            name,
            torch.tensor(x),
            weights=torch.tensor(weights),
            dataset_ids=torch.tensor(ids),
        )
        of_jax = of_jax.update(name, x, weights=weights, dataset_ids=ids)
    # The grid of a distribution is megabytes of zeros.
    write_gz(folder / "torch.pickle.gz", pickle.dumps(of_torch))
    write_gz(folder / "jax.pickle.gz", pickle.dumps(of_jax))
    with tempfile.TemporaryDirectory() as scratch:
        torch.save(of_torch, Path(scratch) / "acc.pt")
        write_gz(folder / "torch.pt.gz", (Path(scratch) / "acc.pt").read_bytes())
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((folder / "jax.orbax").absolute(), of_jax)
        checkpointer.wait_until_finished()
    # It says where the folder was made, which is nobody's business.
    (folder / "jax.orbax" / "commit_success.txt").write_text("committed\n")
    assert isinstance(jax.tree.leaves(of_jax)[0], jax.Array)


# -- Percentiles ------------------------------------------------------------------------------------


def eight_ranks(communicator: Any, route: str, values: Any) -> dict[str, float]:
    aggregator = MetricsAggregator(
        communicator=communicator, route=route, percentiles=(1, 5, 25, 50, 75, 95, 99)
    )
    aggregator.update([Metric("d", "x", v, DISTRIBUTION) for v in values[communicator.rank]])
    return aggregator.get_metrics_for_logging("t")


def make_percentiles(folder: Path) -> None:
    folder.mkdir()
    i = np.arange(8000).reshape(8, 1000)
    # Spread over five decades, otherwise on each rank, and a tenth of them negative.
    values = np.exp(5 * np.modf(i * 0.7548776662466927)[0] + i // 1000 * 0.8).astype(np.float32)
    values[:, ::10] *= -1
    np.save(folder / "values.npy", values)
    q = (1, 5, 25, 50, 75, 95, 99)
    exact = np.quantile(values.astype(float), np.array(q) / 100)
    said = {
        route: run_threads(eight_ranks, 8, route, values.astype(float).tolist())[0]
        for route in ("narrow", "wide")
    }
    numpy = {f"t_d/x_stat_p{p:02d}": float(v) for p, v in zip(q, exact, strict=True)}
    write_json(folder / "expected.json", {"numpy": numpy, "said": said})


# -- Sinks ------------------------------------------------------------------------------------------


def records() -> list[Record]:
    histogram = Histogram(
        np.array([0.0, 1.0, 2.0, 4.0]), np.array([3.0, 0.0, 1.5]), 0.25, 3.5, 6.0, 20.0
    )
    return [
        Record(10, 1.7e9, {"train/loss": 2.5, "train_größe/n": 2.0**53}, {}, "train"),
        Record(20, 1.7e9 + 0.25, {"train/loss": 0.1}, {"train_d/len": histogram}, "train"),
        Record(20, 1.7e9 + 0.5, {"val/loss": math.nan, "val/top": math.inf}, {}, "val"),
        Record(30, 1.7e9 + 1, {"train/loss": -1e-30, "train/low": -math.inf}, {}, "train"),
    ]


def make_sinks(folder: Path) -> None:
    import wandb

    folder.mkdir()
    with tempfile.TemporaryDirectory() as scratch:
        settings = wandb.Settings(
            silent=True, console="off", disable_git=True, x_disable_meta=True, x_disable_stats=True
        )
        run = wandb.init(
            mode="offline", dir=scratch, project="golden", id="golden", settings=settings
        )
        sinks = [
            JSONLSink(folder / "records.jsonl"),
            TensorBoardSink(Path(scratch) / "tensorboard"),
            WandbSink(run=run),
        ]
        for record in records():
            for sink in sinks:
                sink.write(record)
        for sink in sinks:
            sink.close()
        run.finish()
        (events,) = (Path(scratch) / "tensorboard").iterdir()
        shutil.copy(events, folder / "events.out.tfevents.golden")
        (written,) = Path(scratch).glob("wandb/offline-run-*/run-*.wandb")
        shutil.copy(written, folder / "run-golden.wandb")
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "run"
        command = [
            sys.executable,
            "-m",
            "metricfold.cli",
            "demo",
            "--steps",
            "20",
            "--out",
            str(out),
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        shutil.copy(out / "metrics.jsonl", folder / "demo.jsonl")


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_gz(path: Path, content: bytes) -> None:
    path.write_bytes(gzip.compress(content, mtime=0))


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    make_checkpoints(target / "checkpoints")
    make_accumulators(target / "accumulators")
    make_percentiles(target / "percentiles")
    make_sinks(target / "sinks")
    packages = ("numpy", "torch", "jax", "orbax-checkpoint", "wandb", "tensorboard")
    write_json(
        target / "made.json",
        {"metricfold": f"{metricfold.__version__} ({COMMIT})", **{p: version(p) for p in packages}},
    )
