"""Ranks that merge pairwise, of which one is absent, stopped, killed or raises before any round.

Every other rank must come through with the right bits, or get an error that names the faulty rank or
nobody, within the timeout and 5 s; nobody may abort, or get anything from what is left over in a next
exchange. Beside that: the bits of trees and gathers of 2 to 8 processes, which are the same, and two
aggregators that reduce by trees in the background of a training with DDP.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from zlib import crc32

import numpy as np
import torch
import torch.distributed as dist
from blocks import block, bracketed, joined

from campaign.forks import Outcome, Say, World, own_store, say_starved, side_by_side
from campaign.table import Goal, Options, Table, Trial, main
from metricfold import MetricsAggregator, MissingRanksError
from metricfold.communicator import connect
from metricfold.communicator.tree import steps

TIMEOUT = 3.0
PROMISED = TIMEOUT + 5.0
ENDING = 40.0  # seconds that a process may take to end after that
AFTER_ALL = 64
WAYS = ("absent", "stopped", "killed", "raising", "interrupted")


def cases() -> list[tuple[str, int, int, int]]:
    """Return which way, in a world of which size, which rank, before which round."""
    found = []
    for world_size in (4, 5, 8):
        for way in WAYS:
            for faulty in (world_size // 2, 0):
                rounds = [step.round for step in steps(faulty, world_size)]
                # Absence does not depend on the round; a rank that raises must be in one.
                after_all = [] if way in ("raising", "interrupted") else [AFTER_ALL]
                before = [0] if way == "absent" else [*rounds, *after_all]
                found += [(way, world_size, faulty, at) for at in before]
    return found


def join(rank: int, world_size: int, port: int, key: str) -> None:
    store = dist.TCPStore("127.0.0.1", port, None, False, timedelta(seconds=30), False)
    dist.init_process_group(
        "gloo",
        store=dist.PrefixStore(key, store),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )


# -- One rank that fails -------------------------------------------------------------------------


def strike(way: str, say: Say) -> None:
    say(fault=way)
    match way:
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "raising":
            raise MemoryError("no room to merge in")
        case "interrupted":
            raise KeyboardInterrupt


def fault(name: str, trial: Trial) -> Iterator[Outcome]:
    """Let one rank fail in the second of three exchanges."""
    way, world_size, faulty, at = cases()[trial.number]
    port, key = own_store(), f"{os.getpid()}/{trial.number}"
    row = f"rank {way}, {world_size} ranks"

    def body(rank: int, say: Say) -> None:
        say_starved(say)
        join(rank, world_size, port, key)
        communicator: Any = connect("tree", None, timedelta(seconds=TIMEOUT), 0)
        right = bracketed([block(other, world_size) for other in range(world_size)], joined)
        swap = communicator._swap
        armed = False

        def before(step: Any, *arrays: Any) -> None:
            nonlocal armed
            if armed and step.round >= at:
                armed = False
                strike(way, say)
            swap(step, *arrays)

        communicator._swap = before
        for call in range(3):
            armed = call == 1 and rank == faulty and way != "absent"
            if call == 1 and rank == faulty and way == "absent":
                say(fault=way)
                time.sleep(TIMEOUT + 2.0)
            began = time.monotonic()
            try:
                got = communicator.tree(block(rank, world_size), joined)
                say(call=call, right=got.tobytes() == right.tobytes())
            except MissingRanksError as error:
                seconds = time.monotonic() - began
                say(call=call, missing=error.missing, seconds=seconds, text=str(error)[:300])
            except (MemoryError, KeyboardInterrupt) as error:
                communicator.abandon(type(error).__name__)  # as a reduction does
                say(call=call, own=True)
            if armed:  # before no round: after all
                armed = False
                strike(way, say)
        communicator.close()

    world = World(world_size, body)
    others = [rank for rank in range(world_size) if rank != faulty]
    hung = world.wait(2 * PROMISED + ENDING, others)
    if way == "stopped" and world.codes[faulty] is None:
        os.kill(world.pids[faulty], signal.SIGCONT)  # now it wakes up, late
    hung += world.wait(PROMISED + ENDING, [faulty])
    wrong = list(judged(world, faulty))
    said = [line for rank in others for line in world.said(rank)]
    starved = max((line["starved"] for line in said if "starved" in line), default=0.0)
    longest = max((line["seconds"] for line in said if "seconds" in line), default=0.0)
    named = any(line.get("missing") for line in said)
    what = f"rank {faulty} {way} before round {at}: {hung} {'; '.join(wrong)[:500]}"
    if (hung or wrong) and starved > 1.0:
        yield Outcome(row, "unjudged", f"{what}; no processor for {starved:.1f} s", longest)
    elif hung:
        yield Outcome(row, "hung", what, longest)
    else:
        yield Outcome(row, "wrong" if wrong else "right", what if wrong else "", longest)
    if not wrong and not hung:
        yield Outcome("the faulty rank is named" if named else "nobody is named", "right")
    world.end()


def judged(world: World, faulty: int) -> Iterator[str]:
    for rank in range(len(world.pids)):
        lines, text, code = world.said(rank), world.errors(rank), world.codes[rank]
        ended_well = code in (0, None) or (rank == faulty and code == -signal.SIGKILL)
        if "terminate called" in text or not ended_well:
            yield f"rank {rank} ended with {code}: {text[-200:]}"
        for line in lines:
            if line.get("right") is False:
                yield f"rank {rank} got wrong bits in exchange {line['call']}"
            if "missing" in line and not set(line["missing"]) <= {faulty}:
                yield f"rank {rank} names {line['missing']}: {line['text']}"
            if line.get("seconds", 0.0) > PROMISED and rank != faulty:
                yield f"rank {rank} heard of it after {line['seconds']:.1f} s"
        if rank != faulty and {line["call"] for line in lines if "call" in line} != {0, 1, 2}:
            yield f"rank {rank} made other calls: {lines}"


# -- Bits ----------------------------------------------------------------------------------------


def bits(name: str, trial: Trial) -> Iterator[Outcome]:
    """Exchange 25 times on one number of ranks, by tree and by gather."""
    world_size = 2 + trial.number % 7
    port, key = own_store(), f"{os.getpid()}/bits/{trial.number}"
    seed = trial.random.randrange(2**32)

    def vector(rank: int, call: int, size: int) -> Any:
        rng = np.random.default_rng([seed, rank, call])
        return rng.normal(size=size) * 10.0 ** rng.integers(-9, 9, size)

    def body(rank: int, say: Say) -> None:
        join(rank, world_size, port, key)
        communicator = connect("bits", None, timedelta(seconds=60), 0)
        for call in range(25):
            size = int(np.random.default_rng([seed, call]).integers(1, 40_000))
            mine = vector(rank, call, size)
            for merge, own in ((np.add, mine), (joined, block(rank, world_size))):
                tree = communicator.tree(own.copy(), merge)
                gathered = bracketed(list(communicator.all_gather(own)), merge)
                say(tree=crc32(tree.tobytes()), gathered=crc32(gathered.tobytes()))
        communicator.close()

    world = World(world_size, body)
    hung = world.wait(PROMISED + ENDING)
    lines = [world.said(rank) for rank in range(world_size)]
    same = not hung and all(
        len({number for rank in lines for number in rank[call].values()}) == 1 for call in range(50)
    )
    row = "bits of trees and gathers"
    yield Outcome(row, "right" if same else "wrong", f"{world_size} ranks, {hung}, {world.codes}")
    world.end()


# -- Two aggregators beside a training -----------------------------------------------------------


def beside(name: str, trial: Trial) -> Iterator[Outcome]:
    """Reduce two aggregators in the background of a training, in another order on each rank."""
    world_size = 2 + trial.number % 3
    port, key = own_store(), f"{os.getpid()}/beside/{trial.number}"
    rounds = 20

    def body(rank: int, say: Say) -> None:
        join(rank, world_size, port, key)
        torch.manual_seed(0)
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(40, 40))
        alone = torch.nn.Linear(40, 40)
        alone.load_state_dict(model.module.state_dict())
        aggregators = {
            label: MetricsAggregator(name=label, route="tree", timeout=40) for label in "ab"
        }
        for step in range(rounds):
            futures = {}
            for label in "ab" if (rank + step) % 2 else "ba":
                number = (rank + 1) * (step + 1) * (10 if label == "b" else 1)
                aggregators[label].record("n", number, "sum")
                aggregators[label].record("top", number, "max")
                futures[label] = aggregators[label].reduce_async(step)
            for _ in range(3):
                batches = [torch.full((4, 40), float(r + step)) for r in range(world_size)]
                model(batches[rank]).square().mean().backward()
                torch.stack([alone(one).square().mean() for one in batches]).mean().backward()
                for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
                    if not torch.allclose(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5):
                        say(bad=f"gradients differ in step {step}")
                    ours.grad = theirs.grad = None
            for label, future in futures.items():
                got = future.result(60).as_dict("t", "interval")
                by = (step + 1) * (10 if label == "b" else 1)
                wanted = {
                    "t/n": by * world_size * (world_size + 1) / 2,
                    "t/top": float(by * world_size),
                }
                if got != wanted:
                    say(bad=f"{label} in step {step}: {got}, not {wanted}")
        for aggregator in aggregators.values():
            aggregator.close()
        say(finished=True)
        dist.destroy_process_group()

    world = World(world_size, body)
    hung = world.wait(60 + ENDING)
    lines = [line for rank in range(world_size) for line in world.said(rank)]
    wrong = [line for line in lines if "finished" not in line]
    fine = not wrong and not hung and world.codes == [0] * world_size
    row = "two trees beside a training"
    what = f"{world_size} ranks, {hung}, {world.codes}: {wrong[:3]} {world.errors(0)[-300:]}"
    yield Outcome(row, "right" if fine else "wrong", "" if fine else what)
    world.end()


def any_of(name: str, trial: Trial) -> Iterator[Outcome]:
    yield from {"fault": fault, "bits": bits, "beside": beside}[name](name, trial)


def run(options: Options, table: Table) -> None:
    def trials(name: str, numbers: range) -> list[tuple[str, Trial]]:
        return [
            (name, Trial(number, random.Random(f"{options.seed}/{name}/{number}")))
            for number in numbers
        ]

    of_faults = trials("fault", range(len(cases())))
    random.Random(options.seed).shuffle(of_faults)
    chosen = [
        *trials("bits", range(options.pick(full=7, quick=1))),
        *trials("beside", range(options.pick(full=3, quick=1))),
        *of_faults[: options.pick(full=len(of_faults), quick=3)],
    ]
    found = side_by_side(
        options,
        table,
        chosen,
        any_of,
        crews=options.pick(full=5, quick=5),
        patience=2 * PROMISED + 2 * ENDING,
        least=len(of_faults),
        counts=lambda outcome: outcome.row.startswith("rank "),
    )
    times = sorted(outcome.figure for outcome in found if outcome.figure)
    if times:
        table.figures.append(
            f"ranks heard of a fault in a tree within {times[len(times) // 2]:.2f} s (median), "
            f"{times[-1]:.2f} s (longest); the timeout is {TIMEOUT:g} s"
        )
    struck = sum(outcome.row.startswith("rank ") for outcome in found)
    table.goals.append(Goal("faults before a round of a tree", struck, len(of_faults)))


if __name__ == "__main__":
    main(run, __doc__)
