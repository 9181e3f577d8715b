"""What `torchrun` starts on both hosts: `job.py PART FOLDER ROUTE`.

Each rank writes what it has found to FOLDER, and ends with an error where a number is wrong.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from metricfold import MetricsAggregator

_ROUNDS = 7


def uneven(aggregator: MetricsAggregator, rank: int) -> None:
    """Record what differs from rank to rank: how much, of which datasets, under which names."""
    for dataset in ("code", "web", "math")[: 1 + rank % 3]:
        for number in range(rank + 1):
            aggregator.record("loss", float(number), weight=rank + 1, dataset=dataset)
            aggregator.record("tokens", 10 * rank + 1, "sum", dataset=dataset)
            aggregator.record("len", float(100 * rank + number), "distribution", dataset=dataset)
    aggregator.record(f"only_{rank}", float(rank), "max")


def truth(ranks: int, logs: int) -> dict[str, float]:
    """Return what all have recorded, by plain NumPy."""
    said: dict[str, float] = {f"run/only_{rank}": float(rank) for rank in range(ranks)}
    for place, dataset in enumerate(("code", "web", "math")):
        having = [rank for rank in range(ranks) if rank % 3 >= place]
        if not having:
            continue
        numbers = [number for rank in having for number in range(rank + 1)]
        weights = [rank + 1 for rank in having for _ in range(rank + 1)]
        lengths = [100 * rank + number for rank in having for number in range(rank + 1)]
        said[f"run_{dataset}/loss"] = float(np.average(numbers, weights=weights))
        said[f"run_{dataset}/tokens"] = float(
            logs * sum((rank + 1) * (10 * rank + 1) for rank in having)
        )
        said[f"run_{dataset}/len_stat_p50"] = float(np.percentile(np.repeat(lengths, logs), 50))
        said[f"run_{dataset}/len_stat_count"] = float(logs * len(lengths))
    return said


def totals(folder: Path, route: str) -> dict[str, Any]:
    """Log five times, and hold the run to plain NumPy."""
    rank, ranks, logs = dist.get_rank(), dist.get_world_size(), 5
    aggregator = MetricsAggregator(route=route)
    for _ in range(logs):
        uneven(aggregator, rank)
        logged = aggregator.get_metrics_for_logging("run")
    expected = truth(ranks, logs)
    wrong = {
        name: (logged.get(name), value)
        for name, value in expected.items()
        if name not in logged or abs(logged[name] - value) > 1e-9 * max(abs(value), 1.0)
    }
    if wrong:
        raise AssertionError(f"(logged, true): {wrong}")
    return {name: logged[name] for name in expected}


def latency(folder: Path, route: str) -> dict[str, Any]:
    """Time logs beside bare collectives of their bytes, once for each delay that the other side sets."""
    found: dict[str, Any] = {}
    while (delay := _next_delay(folder)) is not None:
        found[delay] = _timed(route)
    return found


def _next_delay(folder: Path) -> str | None:
    """Return the delay that is set now, agreed by all ranks; None where all have had their turn."""
    said: list[Any] = [None]
    if dist.get_rank() == 0:
        turn = len(list(folder.glob("turn-*")))
        (folder / f"turn-{turn}").touch()
        while not (folder / f"delay-{turn}").exists():
            time.sleep(0.01)
        said = [(folder / f"delay-{turn}").read_text("ascii") or None]
    dist.broadcast_object_list(said)
    delay: str | None = said[0]
    return delay


def _timed(route: str) -> dict[str, Any]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    aggregator = MetricsAggregator(route=route)

    def record() -> None:
        for number in range(100):
            aggregator.record(f"m{number}", float(rank + number))

    def seconds(call: Callable[[], object]) -> float:
        dist.barrier()
        began = time.perf_counter()
        call()
        return time.perf_counter() - began

    record()
    first = seconds(aggregator.reduce)
    record()
    seconds(aggregator.reduce)  # from now on the keys are agreed
    communicator: Any = aggregator._link.communicator
    floats = []
    exchange = "_all_gather" if route == "gather" else "_tree"
    whole = getattr(communicator, exchange)

    def noted(vector: Any, *args: Any) -> Any:
        floats.append(vector.size)
        return whole(vector, *args)

    setattr(communicator, exchange, noted)
    record()
    aggregator.reduce()
    setattr(communicator, exchange, whole)

    sent = torch.zeros(floats[-1], dtype=torch.float64)
    rows = torch.zeros(ranks * sent.numel(), dtype=torch.float64)

    def bare(group: Any = None) -> None:
        if route == "gather":
            dist.all_gather_into_tensor(rows, sent, group=group)
        else:
            dist.all_reduce(sent, group=group)

    times: dict[str, list[float]] = {"log": [], "save": [], "bare": []}
    bare_first = seconds(lambda: bare(dist.new_group(backend="gloo")))
    for _ in range(_ROUNDS):
        times["bare"].append(seconds(bare))
        record()
        times["log"].append(seconds(aggregator.reduce))
        record()
        times["save"].append(seconds(aggregator.state_dict))
    aggregator.close()
    return {
        "floats": floats[-1],
        "first": first,
        "bare_first": bare_first,
        **{name: median(found) for name, found in times.items()},
    }


def main(part: str, folder: Path, route: str) -> None:
    dist.init_process_group("gloo")
    found = {"totals": totals, "latency": latency}[part](folder, route)
    (folder / f"found-{dist.get_rank()}.json").write_text(json.dumps(found), "ascii")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
