"""Make and close aggregators and loggers over and over: threads, descriptors and memory stay as they are."""

from __future__ import annotations

import gc
import os
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from rich.console import Console

from campaign.forks import Say, World, store_host
from campaign.table import Options, Row, Table, main
from metricfold import ConsoleSink, JSONLSink, MetricsAggregator, MetricsLogger

PAGE = os.sysconf("SC_PAGE_SIZE")
_SLACK = 2 << 20  # bytes by which arenas and thread stacks may grow once


def memory() -> int:
    """Return the bytes that this process has in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def settled_threads(at_most: int = 0) -> int:
    """Return the number of threads, once it is no more than `at_most` or those that end have ended."""
    least, since = threading.active_count(), time.monotonic()
    while time.monotonic() < since + 0.5 and least > at_most:
        gc.collect()
        time.sleep(0.02)
        least = min(least, threading.active_count())
    return least


def soaked(
    row: Row, options: Options, what: str, cycles: int, cycle: Callable[[int], None]
) -> None:
    """Run `cycle` so often, and look at what it leaves behind."""
    warm = max(3, cycles // 5)  # caches fill, arenas grow
    for number in range(warm):
        cycle(number)
    threads, files, held = settled_threads(), descriptors(), memory()
    done = 0
    for number in range(cycles):
        if options.left() <= 0 and number >= cycles // 4:
            break
        cycle(warm + number)
        done += 1
    row.inject(done)
    left = settled_threads(threads) - threads
    kept = descriptors() - files
    grown = (memory() - held) / max(done, 1)
    row.figures = f"{left:+d} threads, {kept:+d} descriptors, {grown:+,.0f} bytes in each of {done}"
    if left > 0 or kept > 0 or grown * done > _SLACK + 1024 * done:
        row.went_wrong(f"{what} leaves something behind: {row.figures}", count=done)
    else:
        row.went_right(done)


def run(options: Options, table: Table) -> None:
    over_ranks(options, table)
    folder = Path(tempfile.mkdtemp(prefix="campaign"))

    def aggregators(number: int) -> None:
        aggregator = MetricsAggregator(name="soak", timeout=5)
        for value in range(20):
            aggregator.record("loss", value, dataset=f"d{value % 3}")
            aggregator.record("len", value, "distribution")
        aggregator.reduce_async().result()
        state = aggregator.state_dict()
        aggregator.close()
        MetricsAggregator(name="soak").load_state_dict(state)

    def unclosed(number: int) -> None:
        aggregator = MetricsAggregator(name="soak")
        aggregator.record("loss", 1.0)
        aggregator.reduce_async().result()

    def loggers(number: int) -> None:
        with (
            Path(os.devnull).open("w", encoding="utf-8") as screen,
            MetricsLogger(
                [JSONLSink(folder / "run.jsonl"), ConsoleSink(Console(file=screen))]
            ) as logger,
        ):
            for step in range(10):
                logger.log(step, {"x": 1.0})
        (folder / "run.jsonl").unlink()

    def both(number: int) -> None:
        aggregator = MetricsAggregator(name="soak")
        with MetricsLogger([JSONLSink(folder / "both.jsonl")]) as logger:
            for step in range(5):
                aggregator.record("loss", step)
                logger.log(step, aggregator, prefix="train")
        aggregator.close()
        (folder / "both.jsonl").unlink()

    for name, cycle, full, quick in (
        ("aggregators made and closed", aggregators, 2000, 30),
        ("aggregators made and dropped", unclosed, 2000, 30),
        ("loggers made and closed", loggers, 600, 12),
        ("loggers of an aggregator made and closed", both, 600, 12),
    ):
        soaked(table.row(name), options, name, options.pick(full, quick), cycle)


def over_ranks(options: Options, table: Table) -> None:
    """The same over two ranks, where each aggregator has connections of its own."""
    import torch.distributed as dist

    port, host = store_host()
    cycles = options.pick(60, 6)

    def body(rank: int, say: Say) -> None:
        store = dist.TCPStore("127.0.0.1", port, None, False, timedelta(seconds=30), False)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
        row = Row("")

        def cycle(number: int) -> None:
            aggregator = MetricsAggregator(name=f"soak {number}", timeout=20)
            aggregator.record("loss", rank)
            aggregator.reduce()
            aggregator.close()

        soaked(row, options, "", cycles, cycle)
        say(right=row.right, injected=row.injected, figures=row.figures)
        dist.barrier()

    row = table.row("aggregators made and closed, over two ranks")
    world = World(2, body)
    hung = world.wait(max(options.left(), 0) + 60)
    for rank in range(2):
        said = world.said(rank)
        if rank in hung:
            row.inject()
            row.has_hung(f"rank {rank}")
        elif not said or "figures" not in said[0]:
            row.inject()
            row.went_wrong(world.errors(rank)[-400:])
        else:
            row.inject(said[0]["injected"])
            row.went_right(said[0]["right"])
            row.figures = said[0]["figures"]
            if said[0]["right"] < said[0]["injected"]:
                row.went_wrong(said[0]["figures"], count=said[0]["injected"])
    world.end()
    host.end()


if __name__ == "__main__":
    main(run, __doc__)
