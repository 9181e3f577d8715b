"""Reductions over real JAX processes, connected by JAX's coordinator."""

from __future__ import annotations

import logging
import math
import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blocks import block, bracketed, joined
from handlers_of_users import LaneRMS, MyTypes, RMSHandler
from jax_processes import World, end_processes, run_processes
from ranks import free_port

from metricfold import (
    AggregationType,
    DefaultTrainingMetricTransform,
    JSONLSink,
    Metric,
    MetricsAggregator,
    MetricsCollator,
    MetricsLogger,
    MissingRanksError,
    NonFinite,
    Spike,
    read_jsonl,
)
from metricfold.communicator import LocalCommunicator

pytestmark = pytest.mark.skipif(find_spec("jax") is None, reason="needs JAX")
needs_torch = pytest.mark.skipif(find_spec("torch") is None, reason="needs torch")
needs_orbax = pytest.mark.skipif(find_spec("orbax") is None, reason="needs Orbax")
needs_grain = pytest.mark.skipif(find_spec("grain") is None, reason="needs Grain")

SUM, MEAN, MAX, MIN = (
    AggregationType.SUM,
    AggregationType.MEAN,
    AggregationType.MAX,
    AggregationType.MIN,
)
DISTRIBUTION, CATEGORICAL = AggregationType.DISTRIBUTION, AggregationType.CATEGORICAL_COUNT


@pytest.fixture(scope="module", autouse=True)
def _ended() -> Any:
    yield
    end_processes()


def attempt(call: Callable[[], Any]) -> str:
    """Return what `call` raises, as text, or "ok"."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "ok"


# -- Right whatever each process holds -----------------------------------------------------------


def different_keys(rank: int) -> Any:
    aggregator = MetricsAggregator()
    if rank == 0:
        aggregator.update([Metric("alpaca", "tokens", 5, SUM), Metric("alpaca", "loss", 2, MEAN)])
    if rank == 1:
        aggregator.update(
            [
                Metric("orca", "tokens", 7, SUM),
                Metric("alpaca", "loss", 5, MEAN, 2),
                Metric("alpaca", "longest", 9, MAX),
                Metric("orca", "kind", "a", CATEGORICAL),
            ]
        )
    first = aggregator.reduce()
    before = aggregator.collectives
    second = aggregator.reduce()
    once = aggregator.collectives - before
    return first.as_dict("t"), first.lacking("alpaca", "loss"), second.as_dict("t"), once


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_with_different_keys_or_none_agree(processes: int) -> None:
    results = run_processes(different_keys, processes)
    logged = {
        "t_alpaca/tokens": 5.0,
        "t_alpaca/loss": 4.0,
        "t_alpaca/longest": 9.0,
        "t_orca/tokens": 7.0,
        "t_orca/kind_count_a": 1.0,
    }
    lacking = list(range(2, processes))
    assert results == [(logged, lacking, logged, 1)] * processes


WEIGHTED = ("mean", "distribution")


def anything(rng: np.random.Generator, rank: int) -> list[Metric]:
    """Return some metrics of any types, of keys that another rank may not have."""
    metrics = []
    for _ in range(rng.integers(0, 60)):
        agg_type = rng.choice(["sum", "mean", "max", "min", "distribution", "lane rms"])
        special = [math.nan, math.inf, -math.inf, -0.0, 5e-324, 2**53 - 1]
        usual = float(rng.lognormal(0, 9))
        value = special[rng.integers(6)] if rng.random() < 0.05 else usual
        weight = float(rng.choice([0, 0.5, 1, 3] if agg_type in WEIGHTED else [0, 1]))
        name = f"{agg_type} {rng.integers(4 + rank)}"
        dataset = str(rng.choice(["alpaca", "orca"]))
        metrics.append(Metric(dataset, name, value, agg_type, weight))
    lengths = rng.normal(300, 5, rng.integers(0, 2) * 900).tolist()
    metrics += [Metric("d", "len", length, DISTRIBUTION) for length in lengths]
    metrics += [Metric("d", "kind", f"{rng.integers(9)}", CATEGORICAL) for _ in range(3 * rank)]
    return [*metrics, Metric("d", "custom", int(rng.integers(1, 9)), MyTypes.RMS)]


def story(rank: int, route: str, window: int | None, seed: int) -> list[Any]:
    """Live through some intervals; returns all that is said of them, and what they cost."""
    aggregator = MetricsAggregator(window, route=route)
    aggregator.register_handler("lane rms", LaneRMS())
    aggregator.register_handler(MyTypes.RMS, RMSHandler())
    rng = np.random.default_rng([seed, rank])
    said: list[Any] = []
    for interval in range(4):
        aggregator.update(anything(rng, rank))
        aggregator.record("loss", math.nan if rank == interval else 1.0, "max", per_rank=True)
        if interval == 2:
            aggregator.state_dict()
        before = aggregator.collectives
        snapshot = aggregator.reduce(step=interval)
        said += [snapshot.as_dict("t", window, rollup=True) for window in ("run", "interval")]
        said.append([aggregator.collectives - before, snapshot.tied(None, "loss")])
        said.append(repr(snapshot.per_rank(None, "loss")))
    return said


def stories(rank: int, route: str, window: int | None, seeds: int) -> list[Any]:
    return [said for seed in range(seeds) for said in story(rank, route, window, seed)]


@needs_torch
@pytest.mark.parametrize(("processes", "window"), [(2, 1000), (4, None)])
def test_jax_processes_and_torch_ranks_come_to_the_same(processes: int, window: int | None) -> None:
    from ranks import run_ranks

    for route in ("narrow", "wide"):
        ours = run_processes(stories, processes, route, window, 2)
        theirs = run_ranks(stories, processes, route, window, 2)
        assert all(repr(result) == repr(ours[0]) for result in ours)
        if route == "narrow":
            assert repr(ours[0]) == repr(theirs[0])
            continue
        # gloo adds in another order than that of ranks.
        for mine, other in zip(ours[0], theirs[0], strict=True):
            if not isinstance(mine, dict):
                assert mine == other
                continue
            assert mine.keys() == other.keys()
            for key, value in mine.items():
                assert value == pytest.approx(other[key], rel=1e-9, nan_ok=True), key


# -- The collectives themselves ------------------------------------------------------------------


def collectives(rank: int, sizes: list[int]) -> list[Any]:
    import jax

    from metricfold.communicator.jax import JaxCommunicator

    assert not jax.config.jax_enable_x64
    communicator = JaxCommunicator("collectives")
    world = communicator.world_size
    blocks = [block(other, world) for other in range(world)]
    failed = []
    for size in sizes:
        vectors = []
        for other in range(world):
            vector = np.random.default_rng([size, other]).lognormal(0, 90, size)
            vector[:: other + 2] *= -1
            specials = [np.inf, -np.inf, np.nan, 5e-324, -0.0, 2.0**53 - 1]
            vector[-1] = specials[other % len(specials)]
            vectors.append(vector)
        mine = vectors[rank]
        before = mine.tobytes()
        rows = communicator.all_gather(mine)
        with np.errstate(invalid="ignore"):
            added = communicator.tree(mine, np.add)
            total = bracketed(vectors, np.add)
        joined_ranks = communicator.tree(block(rank, world), joined)
        good = (
            rows.tobytes() == np.stack(vectors).tobytes()
            and rows.flags.writeable
            and added.tobytes() == total.tobytes()
            and joined_ranks.tobytes() == bracketed(blocks, joined).tobytes()
            and mine.tobytes() == before
        )
        failed += [] if good else [size]
    texts = [b"", b"\x00\xffabc" * 5, b"x", b"the same"]
    parts = [texts[other % 4] * (1 + other // 4) for other in range(world)]
    gathered = communicator.all_gather_bytes(parts[rank], [len(part) for part in parts])
    return [failed, gathered == parts, communicator.collectives]


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_float64_arrives_bit_for_bit_and_is_merged_in_rank_order(processes: int) -> None:
    sizes = [1, 2, 255, 257, 3001, 70_001, 150_000]
    expected = [[], True, 3 * len(sizes) + 1]
    assert run_processes(collectives, processes, sizes) == [expected] * processes


def within_contexts(rank: int) -> list[dict[str, float]]:
    import jax

    aggregator = MetricsAggregator()
    explicit = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    contexts = (
        lambda: jax.set_mesh(explicit),
        lambda: jax.transfer_guard("disallow"),
        jax.disable_jit,
        lambda: jax.enable_x64(True),
        lambda: jax.default_device(jax.local_devices()[0]),
        lambda: jax.debug_nans(True),
        jax.checking_leaks,
    )
    logged = []
    for context in contexts:
        # Of different sizes, so that each is compiled within its context.
        for number in range(300 * (1 + len(logged))):
            aggregator.record(f"loss {number}", rank + math.pi)
        aggregator.record("nan", math.nan)
        with context():
            logged.append(aggregator.get_metrics_for_logging("t", "interval")["t/loss 0"])
    return logged


def test_whatever_jax_is_told_around_the_call_changes_nothing() -> None:
    expected = (math.pi + (1 + math.pi)) / 2
    assert run_processes(within_contexts, 2) == [[expected] * 7] * 2


def stop_by_alerts(rank: int) -> tuple[int, list[Any]]:
    """Return the step after which a process ends its loop, and for what; process 1 has a NaN in step 3."""
    aggregator = MetricsAggregator()
    aggregator.alert_on(NonFinite("*/loss"), Spike("*/loss"))
    with MetricsLogger([]) as logger:
        for step in range(9):
            loss = math.nan if (step, rank) == (3, 1) else 1.0
            aggregator.record("loss", loss, dataset="web")
            alerts = logger.log(step, aggregator, prefix="train")
            if alerts.severe:
                break
    return step, [(one.step, one.rank, one.dataset) for one in alerts]


def test_what_rules_find_ends_the_loops_of_all_processes_at_the_same_step() -> None:
    assert run_processes(stop_by_alerts, 2) == [(4, [(3, 1, "web")])] * 2


def train_and_log(rank: int) -> list[Any]:
    """Log in the background while training steps with collectives of their own are queued."""
    import jax
    import jax.numpy as jnp

    world = jax.process_count()
    mesh = jax.make_mesh((world,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.NamedSharding(mesh, jax.P("data"))

    def work(x: Any) -> Any:
        block = jnp.full((200, 200), 1e-3)
        for _ in range(10):
            block = jnp.tanh(block @ block)
        return jax.lax.psum(x.sum() + 0 * block[0, 0], "data")

    step = jax.jit(jax.shard_map(work, mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P()))
    shard = np.full((1, 256), rank + 1, np.float32)
    batch = jax.make_array_from_process_local_data(split, shard)
    aggregator = MetricsAggregator()
    losses, futures, done = [], [], []
    for number in range(12):
        for _ in range(4):
            losses.append(step(batch))
            aggregator.record("loss", losses[-1])
        futures.append(aggregator.reduce_async(step=number))
        done.append(futures[-1].done())
        losses += [step(batch) for _ in range(3)]
    return [
        {float(loss) for loss in losses},
        {future.result().as_dict("t", "interval")["t/loss"] for future in futures},
        set(done),
    ]


@pytest.mark.parametrize("processes", [2, 4])
def test_logging_in_the_background_leaves_training_alone(processes: int) -> None:
    loss = 256.0 * sum(range(1, processes + 1))
    expected = [{loss}, {loss}, {True}]
    assert run_processes(train_and_log, processes) == [expected] * processes


def log_and_fail(rank: int) -> list[str]:
    aggregator = MetricsAggregator()
    aggregator.record("x", 1)
    first = aggregator.reduce_async(step=rank)
    second = aggregator.reduce_async(step=3)
    return [attempt(first.result), str(second.result().as_dict("t"))]


def test_a_reduction_in_the_background_fails_in_its_future() -> None:
    one, other = run_processes(log_and_fail, 2)
    assert one == other
    assert "rank 0 gave 0, rank 1 gave 1" in one[0]
    assert one[1] == "{'t/x': 1.0}"


# -- Missing processes ---------------------------------------------------------------------------


class Warnings(logging.Handler):
    """What metricfold has warned about."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())

    def __enter__(self) -> list[str]:
        logging.getLogger("metricfold").addHandler(self)
        return self.said

    def __exit__(self, *_: object) -> None:
        logging.getLogger("metricfold").removeHandler(self)


def one_is_missing(rank: int, late: list[int]) -> dict[str, Any]:
    import jax
    from jax.experimental import multihost_utils

    aggregator = MetricsAggregator(timeout=3)
    aggregator.record("x", 1, "sum")
    aggregator.reduce()
    state = aggregator.state_dict()
    aggregator.record("x", 1, "sum")
    if rank in late:
        time.sleep(7)
    with Warnings() as warnings:
        errors = [attempt(aggregator.reduce)]
    aggregator.record("x", 1, "sum")
    errors += [attempt(aggregator.reduce), attempt(aggregator.state_dict)]
    missing: tuple[int, ...] = ()
    try:
        aggregator.reduce()
    except MissingRanksError as error:
        missing = error.missing
    # JAX goes on, and so does a new aggregator.
    total = multihost_utils.process_allgather(np.float32(rank))
    again = MetricsAggregator(timeout=20)
    again.load_state_dict(state)
    again.record("x", 1, "sum")
    return {
        "errors": errors,
        "warnings": warnings,
        "missing": missing,
        "jax": total.tolist(),
        "recovered": again.get_metrics_for_logging("t")["t/x"],
        "local": attempt(lambda: aggregator.state_dict(sync=False)),
        "processes": jax.process_count(),
    }


@pytest.mark.parametrize(("processes", "late"), [(2, [0]), (4, [1, 3])])
def test_missing_processes_are_named_and_late_ones_are_told_the_same(
    processes: int, late: list[int]
) -> None:
    results = run_processes(one_is_missing, processes, late)
    names = ", ".join(map(str, late))
    (error,) = {error for result in results for error in result["errors"]}
    assert error.startswith("MissingRanksError")
    assert f"process(es) {names} of {processes}" in error
    assert "did not come within 3 s" in error
    assert "if jax.process_index() == 0:" in error
    for rank, result in enumerate(results):
        assert result["missing"] == tuple(late)
        assert result["jax"] == list(range(processes))
        assert result["recovered"] == 2.0 * processes
        assert result["local"] == "ok"
        if rank in late:
            assert result["warnings"] == []
        else:
            (warning,) = result["warnings"]
            assert f"process {rank} has waited " in warning
            assert f"process(es) {names}; giving up after 3 s" in warning


def fails_in_a_tree(rank: int, how: str, faulty: int, at: int) -> Any:
    """Let one process fail before a round of a tree; the one before it goes well."""
    from metricfold.communicator.jax import JaxCommunicator

    communicator: Any = JaxCommunicator(f"{how} {faulty} {at}", timedelta(seconds=6))
    world = communicator.world_size
    right = bracketed([block(other, world) for other in range(world)], joined).tobytes()
    swapped, spread = 0, communicator._spread

    def spread_or_fail(vector: Any) -> Any:
        nonlocal swapped
        if how == "killed" and rank == faulty and swapped == at:
            os._exit(3)
        swapped += 1
        return spread(vector)

    def merge(lower: Any, upper: Any) -> Any:
        if how == "raising" and rank == faulty and swapped > at:
            raise MemoryError("no room to merge in")
        return joined(lower, upper)

    outcomes: list[Any] = [communicator.tree(block(rank, world), joined).tobytes() == right]
    communicator._spread = spread_or_fail
    for _ in range(2):
        try:
            outcomes.append(communicator.tree(block(rank, world), merge).tobytes() == right)
        except MissingRanksError as error:
            outcomes.append((error.missing, str(error)))
            break  # as an aggregator does
    return outcomes


@pytest.mark.parametrize(("processes", "at"), [(3, 1), (4, 0)])
def test_a_process_that_is_killed_in_a_tree_is_named(processes: int, at: int) -> None:
    last = processes - 1
    results = run_processes(fails_in_a_tree, processes, "killed", last, at, dies=(last,))
    for result in results[:last]:
        assert result[0] is True
        assert result[1] is True or len(result) == 2
        assert result[-1][0] == (last,), result


def test_a_process_that_cannot_merge_in_a_tree_is_named_and_jax_goes_on() -> None:
    for at in (0, 1):
        results = run_processes(fails_in_a_tree, 4, "raising", 1, at)
        for result in results:
            assert result[0] is True
            assert result[1] is True or len(result) == 2
            missing, text = result[-1]
            assert missing == (1,)
            assert "MemoryError: no room to merge in" in text
        assert len(results[1]) == 2


def killed_after_the_meeting(rank: int) -> list[str]:
    aggregator = MetricsAggregator(timeout=20)
    aggregator.record("x", 1, "sum")
    aggregator.reduce()
    communicator: Any = aggregator._link.communicator
    if rank == 1:
        communicator._gathered = lambda _: os._exit(3)
    return [attempt(aggregator.reduce), attempt(aggregator.reduce)]


def test_a_process_that_is_killed_after_the_meeting_is_named() -> None:
    text, again = run_processes(killed_after_the_meeting, 2, dies=(1,))[0]
    # It was a bare ValueError.
    assert text.startswith("MissingRanksError: "), text
    assert "process(es) 1 of 2; the connection to them broke (" in text
    assert again == text


def fails_by_itself(rank: int) -> list[str]:
    aggregator = MetricsAggregator(timeout=3)
    aggregator.record("x", 1, "sum")
    aggregator.reduce()
    communicator: Any = aggregator._link.communicator
    gathered = communicator._gathered

    def failing(vector: Any) -> Any:
        gathered(vector)
        raise ValueError("out of memory while trying to allocate")

    if rank == 1:
        communicator._gathered = failing
    return [attempt(aggregator.reduce) for _ in range(2)]


def test_a_process_whose_own_device_fails_in_a_collective_names_itself() -> None:
    other, failed = run_processes(fails_by_itself, 2)
    named = "process(es) 1 of 2; it left a reduction in the middle: ValueError: out of memory"
    assert named in failed[0]
    assert other[0] == "ok"
    assert named in other[1]


def interrupted_in_the_middle(rank: int, times: int) -> list[str]:
    aggregator = MetricsAggregator(timeout=3)
    aggregator.record("x", 1, "sum")
    aggregator.reduce()
    communicator: Any = aggregator._link.communicator
    gathered = communicator._gathered
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupted(vector: Any) -> Any:
        communicator._gathered = gathered
        rows = gathered(vector)
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        return rows

    if rank == 1:
        communicator._gathered = interrupted
    seen = []
    aggregator.record("new", 1, "sum")  # of which the processes agree between two collectives
    for _ in range(2):
        try:
            seen.append(attempt(aggregator.reduce))
        except KeyboardInterrupt:
            seen.append("interrupted")
    alone = MetricsAggregator(communicator=LocalCommunicator())
    alone.load_state_dict(aggregator.state_dict(sync=False))
    return [*seen, alone.get_metrics_for_logging("t")]


def test_an_interrupt_between_collectives_waits_for_the_end_of_the_reduction() -> None:
    # It put the aggregator out of use, on all processes.
    assert run_processes(interrupted_in_the_middle, 2, 1) == [
        ["ok", "ok", {"t/x": 2.0, "t/new": 2.0}],
        ["interrupted", "ok", {"t/x": 2.0, "t/new": 2.0}],
    ]


def test_a_process_that_is_interrupted_twice_in_the_middle_takes_part_in_nothing_more() -> None:
    other, interrupted = run_processes(interrupted_in_the_middle, 2, 2)
    assert interrupted[0] == "interrupted"
    assert "this rank left a reduction in the middle (KeyboardInterrupt)" in interrupted[1]
    assert "process(es) 1 of 2; it left a reduction in the middle: KeyboardInterrupt" in other[1]


def slow(rank: int) -> Any:
    from metricfold.communicator import roll_call as communicator

    aggregator = MetricsAggregator(timeout=20)
    aggregator.record("x", rank, "sum")
    aggregator.reduce()
    communicator._FIRST_WAIT, before = 0.5, communicator._FIRST_WAIT
    if rank == 1:
        time.sleep(3)
    try:
        with Warnings() as warnings:
            aggregator.record("x", rank, "sum")
            logged = aggregator.get_metrics_for_logging("t")
    finally:
        communicator._FIRST_WAIT = before
    aggregator.record("x", rank, "sum")
    return logged, aggregator.get_metrics_for_logging("t"), len(warnings)


def test_a_slow_process_is_waited_for() -> None:
    totals = {"t/x": 2.0}, {"t/x": 3.0}
    assert run_processes(slow, 2) == [(*totals, 1), (*totals, 0)]


def in_another_order(rank: int) -> list[str]:
    train = MetricsAggregator(name="train", timeout=2)
    val = MetricsAggregator(name="val", timeout=2)
    for one in (train, val):
        one.record("x", 1, "sum")
        one.reduce()
    found = [attempt(one.reduce) for one in ((train, val) if rank else (val, train))]
    if rank:
        found.append(attempt(MetricsAggregator(name="alone", timeout=1).reduce))
    return found


def test_what_only_one_process_calls_is_an_error_and_never_anothers_result() -> None:
    left, right = run_processes(in_another_order, 2)
    alone = right.pop()
    assert "aggregator 'alone': missing from a collective call: process(es) 0 of 2" in alone
    for name, error in zip(("val", "train"), left, strict=True):
        assert f"MissingRanksError: aggregator {name!r}" in error
    assert sorted(left) == sorted(right)


# -- Which processes -----------------------------------------------------------------------------


def with_a_group(rank: int) -> str:
    return attempt(MetricsAggregator(process_group=object()).reduce)


def test_a_process_group_is_refused_because_jax_has_none() -> None:
    for error in run_processes(with_a_group, 2):
        assert error.startswith("RuntimeError: a process_group was given, but the processes are")
        assert "leave it out" in error


def with_torch_too(rank: int, store: str) -> list[Any]:
    import torch.distributed as dist

    from metricfold.communicator import global_rank
    from metricfold.communicator.jax import JaxCommunicator

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=1 - rank, world_size=2)
    undecided = attempt(MetricsAggregator().reduce)
    totals = []
    over_jax = MetricsAggregator(communicator=JaxCommunicator("both"))
    over_torch = MetricsAggregator(process_group=dist.group.WORLD)
    for aggregator in (over_jax, over_torch):
        aggregator.record("x", rank, "max")
        snapshot = aggregator.reduce()
        totals.append((snapshot.as_dict("t")["t/x"], snapshot.owner(None, "x")))
    rank_of_torch = global_rank()
    over_torch.close()
    dist.destroy_process_group()
    return [undecided, totals, rank_of_torch, global_rank()]


@needs_torch
def test_torch_and_jax_at_once_ask_which_is_meant(tmp_path: Path) -> None:
    results = run_processes(with_torch_too, 2, str(tmp_path / "store"))
    for rank, (undecided, totals, rank_of_torch, rank_of_jax) in enumerate(results):
        assert "torch.distributed (2 ranks) and jax.distributed (2 processes)" in undecided
        assert "communicator=JaxCommunicator('a name of its own')" in undecided
        assert "process_group=torch.distributed.group.WORLD" in undecided
        assert totals == [(1.0, 1), (1.0, 0)]
        assert (rank_of_torch, rank_of_jax) == (1 - rank, rank)


def log_to(rank: int, folder: str) -> None:
    aggregator = MetricsAggregator()
    with MetricsLogger([JSONLSink(f"{folder}/{rank}.jsonl")]) as logger:
        for step in range(3):
            aggregator.record("tokens", 10 + rank, "sum")
            logger.log(step, aggregator, prefix="train")


def test_the_first_process_writes_the_log(tmp_path: Path) -> None:
    run_processes(log_to, 2, str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["0.jsonl"]
    records = read_jsonl(tmp_path / "0.jsonl")
    assert [record.metrics["train/tokens"] for record in records] == [21.0, 42.0, 63.0]


def before_and_after_the_job(rank: int, port: int) -> list[Any]:
    import jax

    from metricfold.communicator import global_rank

    jax.distributed.shutdown()
    aggregator = MetricsAggregator()
    aggregator.record("x", 1, "sum")
    alone = aggregator.get_metrics_for_logging("t")["t/x"]
    aggregator.reset()
    seen: list[Any] = [alone, global_rank()]
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)
    aggregator.record("x", 1, "sum")
    seen += [aggregator.get_metrics_for_logging("t")["t/x"], global_rank()]
    aggregator.record("x", 1, "sum")
    aggregator.state_dict()
    jax.distributed.shutdown()
    seen += [attempt(aggregator.reduce), len(aggregator.state_dict(sync=False)["payload"]) > 9]
    return seen


def test_an_aggregator_follows_the_job() -> None:
    port = free_port()
    world = World.connected(2)
    try:
        results = world.run(before_and_after_the_job, port, timeout=60)
    finally:
        world.kill()
    for rank, (alone, no_rank, together, own_rank, gone, kept) in enumerate(results):
        assert (alone, no_rank, together, own_rank, kept) == (1.0, 0, 2.0, rank, True)
        assert "jax.distributed.shutdown()" in gone


# -- Checkpoints and data ------------------------------------------------------------------------


def take_in(aggregator: MetricsAggregator, rank: int) -> None:
    aggregator.record("tokens", 10 + rank, "sum")
    aggregator.record("loss", 2.0 * rank, weight=rank + 1)
    aggregator.update([Metric("d", "len", 100 * rank + n, DISTRIBUTION) for n in range(50)])


def save_through_orbax(rank: int, folder: str) -> dict[str, float]:
    import orbax.checkpoint as ocp

    aggregator = MetricsAggregator()
    take_in(aggregator, rank)
    aggregator.reduce()
    take_in(aggregator, rank)
    state = aggregator.state_dict()
    with ocp.CheckpointManager(folder) as manager:
        manager.save(
            7,
            args=ocp.args.Composite(
                metrics=ocp.args.JsonSave(state), tree=ocp.args.PyTreeSave(state)
            ),
        )
    return aggregator.reduce().as_dict("t")


def load_through_orbax(rank: int, folder: str) -> Any:
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(folder) as manager:
        restored = manager.restore(
            7,
            args=ocp.args.Composite(metrics=ocp.args.JsonRestore(), tree=ocp.args.PyTreeRestore()),
        )
    said = []
    for state in (restored["metrics"], restored["tree"]):
        aggregator = MetricsAggregator()
        aggregator.load_state_dict(state)
        aggregator.record("tokens", 1, "sum")
        snapshot = aggregator.reduce()
        said.append((snapshot.as_dict("t"), snapshot.as_dict("t", "interval")))
    return said


@needs_orbax
def test_a_checkpoint_of_four_processes_loads_on_one_and_two(tmp_path: Path) -> None:
    saved = run_processes(save_through_orbax, 4, str(tmp_path / "run"))
    assert saved[0]["t/tokens"] == 2 * (10 + 11 + 12 + 13)
    for processes in (1, 2):
        for run, interval in (
            pair
            for said in run_processes(load_through_orbax, processes, str(tmp_path / "run"))
            for pair in said
        ):
            assert run == {**saved[0], "t/tokens": saved[0]["t/tokens"] + processes}
            # The interval that was open when the run was saved goes on.
            assert interval["t/tokens"] == 10 + 11 + 12 + 13 + processes
            assert interval["t_d/len_stat_count"] == 4 * 50
            assert interval["t/loss"] == pytest.approx(saved[0]["t/loss"])


def pad(samples: list[dict[str, Any]]) -> Any:
    from metricfold.data.grain import stack

    longest = max(len(sample["tokens"]) for sample in samples)
    return stack([{"tokens": np.resize(sample["tokens"], longest)} for sample in samples])


def text(index: int) -> dict[str, Any]:
    return {"tokens": np.arange(1 + index % 7)}


def data_through_grain(rank: int, workers: int) -> Any:
    import grain
    from absl import flags

    from metricfold.data.grain import GrainMetricTransform

    flags.FLAGS.mark_as_parsed()
    transform = DefaultTrainingMetricTransform()
    transform.set_dataset_name("texts")
    adapter = GrainMetricTransform(transform)
    dataset = (
        grain.MapDataset.source([text(index) for index in range(40)])[rank::2]
        .map(adapter)
        .batch(5, batch_fn=MetricsCollator(pad))
        .to_iter_dataset()
        .mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    )
    aggregator, batches = MetricsAggregator(), iter(dataset)
    shapes = []
    for _ in range(2):
        batch = next(batches)
        aggregator.update(batch.pop("metrics"))
        shapes.append(batch["tokens"].shape)
    at, state = batches.get_state(), aggregator.state_dict()
    next(batches)  # lost with the process: it will be read again

    resumed, batches = MetricsAggregator(), iter(dataset)
    resumed.load_state_dict(state)
    batches.set_state(at)
    for batch in batches:
        resumed.update(batch.pop("metrics"))
    loader = grain.DataLoader(
        data_source=[text(index) for index in range(40)],
        sampler=grain.samplers.IndexSampler(
            40, num_epochs=1, shard_options=grain.sharding.ShardByJaxProcess()
        ),
        operations=[adapter, grain.transforms.Batch(5, batch_fn=MetricsCollator(pad))],
    )
    loaded = MetricsAggregator()
    for batch in loader:
        loaded.update(batch.pop("metrics"))
    return shapes, resumed.get_metrics_for_logging("t"), loaded.get_metrics_for_logging("t")


@needs_grain
@pytest.mark.parametrize("workers", [0, 1])
def test_what_grain_loads_counts_once_over_a_restart(workers: int) -> None:
    lengths = [1 + index % 7 for index in range(40)]
    for shapes, resumed, loaded in run_processes(data_through_grain, 2, workers):
        assert [shape[0] for shape in shapes] == [5, 5]
        for logged in (resumed, loaded):
            assert logged["t_texts/samples_seen"] == 40
            assert logged["t_texts/tokens_seen"] == sum(lengths)
            assert logged["t_texts/seq_len_stat_p50"] == np.median(lengths)


def wrap(rank: int) -> list[str]:
    from metricfold.data.grain import GrainMetricTransform

    unnamed: Any = DefaultTrainingMetricTransform()
    return [
        attempt(lambda: GrainMetricTransform(unnamed)),
        attempt(lambda: GrainMetricTransform(len)),
    ]


@needs_grain
def test_a_transform_without_a_dataset_is_refused_before_the_pipeline_starts() -> None:
    unnamed, other = run_processes(wrap, 2)[0]
    assert "ValueError: this DefaultTrainingMetricTransform does not know its dataset" in unnamed
    assert "TypeError: GrainMetricTransform takes a MetricTransform" in other
