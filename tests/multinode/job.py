"""What `torchrun` starts on both hosts: `job.py FOLDER`.

For each delay that the other side sets, and on both routes, totals of uneven ranks are held to NumPy's, and
logs are timed beside bare collectives of their bytes. Rank 0 writes what it has found to FOLDER.
"""

from __future__ import annotations

import json
import math
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


def check_totals(route: str, logs: int = 3) -> int:
    """Log several times, and return how many numbers of the run are those of plain NumPy: all."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    aggregator = MetricsAggregator(route=route)
    for _ in range(logs):
        uneven(aggregator, rank)
        logged = aggregator.get_metrics_for_logging("run")
    aggregator.close()
    expected = truth(ranks, logs)
    wrong = {
        name: (logged.get(name), value)
        for name, value in expected.items()
        if not math.isclose(logged.get(name, math.nan), value, rel_tol=1e-9)
    }
    if wrong:
        raise AssertionError(f"rank {rank}, (logged, true): {wrong}")
    of_ranks: list[Any] = [None] * ranks
    dist.all_gather_object(of_ranks, logged)
    if any(other != logged for other in of_ranks):
        raise AssertionError(f"the ranks differ: {of_ranks}")
    return len(expected)


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


def timed(route: str) -> dict[str, Any]:
    """Return the seconds of a log, the first one and a save, and of bare collectives of as many bytes."""
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


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    found: list[dict[str, Any]] = []
    while (delay := _next_delay(folder)) is not None:
        for route in ("gather", "tree"):
            right = check_totals(route)
            found.append({"delay": delay, "route": route, "right": right, **timed(route)})
    if dist.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(found), "ascii")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
