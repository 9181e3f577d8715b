"""Rules find the same in what was merged, on every rank, and after a resume on any number of ranks."""

from __future__ import annotations

import json
import math
import os
import random
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks import run_threads

from metricfold import (
    Alert,
    Alerts,
    JSONLSink,
    MetricsAggregator,
    MetricsLogger,
    NonFinite,
    Snapshot,
    Spike,
    Straggler,
    merge_state_dicts,
    read_jsonl,
)
from metricfold.sinks import RecordRefused, SinkError


def aggregator_with(communicator: Any, *rules: Any, **settings: Any) -> MetricsAggregator:
    aggregator = MetricsAggregator(communicator=communicator, **settings)
    aggregator.alert_on(*rules)
    return aggregator


@pytest.mark.parametrize("route", ["gather", "tree"])
@pytest.mark.parametrize("world_size", [1, 2, 4, 5])
def test_nan_on_one_rank_is_found_on_all_with_dataset_and_rank(world_size: int, route: str) -> None:
    def rank(communicator: Any) -> list[Alerts]:
        aggregator = aggregator_with(communicator, NonFinite("*/loss"), route=route)
        found = []
        for step in range(4):
            for dataset in ("web", "code"):
                bad = step == 2 and dataset == "code" and communicator.rank == world_size - 1
                aggregator.record("loss", math.nan if bad else 1.0, dataset=dataset)
            found.append(aggregator.reduce(step).alerts)
        return found

    everyone = run_threads(rank, world_size)
    assert all(repr(one) == repr(everyone[0]) for one in everyone)
    assert [len(alerts) for alerts in everyone[0]] == [0, 0, 1, 0]
    (alert,) = everyone[0][2].severe
    assert (alert.dataset, alert.name, alert.step) == ("code", "loss", 2)
    assert math.isnan(alert.value or 0.0)
    # On a tree no rank's own values are known.
    assert alert.rank == (world_size - 1 if route == "gather" or world_size == 1 else None)


def test_all_ranks_that_have_it_are_named() -> None:
    def rank(communicator: Any) -> list[tuple[str, int | None]]:
        aggregator = aggregator_with(communicator, NonFinite("*/loss"))
        aggregator.record("loss", math.nan if communicator.rank in (1, 2) else 1.0)
        return [(alert.message, alert.rank) for alert in aggregator.reduce().alerts]

    assert run_threads(rank, 4) == [[("loss is nan, on ranks 1-2", 1)]] * 4


def test_a_pattern_means_metrics_without_a_dataset_too() -> None:
    aggregator = aggregator_with(None, NonFinite("*/loss"))
    aggregator.record("loss", math.inf)
    aggregator.record("val_loss", math.nan)
    (alert,) = aggregator.reduce().alerts
    assert (alert.dataset, alert.name, alert.value) == (None, "loss", math.inf)


def test_nan_that_is_left_out_is_an_alert_too() -> None:
    aggregator = aggregator_with(None, NonFinite(), on_nan="skip")
    for value in (1.0, math.nan):
        aggregator.record("loss", value)
        aggregator.record("lengths", value, "distribution")
    names = {alert.name: alert.message for alert in aggregator.reduce().alerts}
    assert set(names) == {"loss", "lengths"}
    assert names["loss"] == "loss had NaN, left out of it, on rank 0"


def spiky(step: int) -> float:
    """A loss that falls, with bursts: several spikes close together."""
    noise = random.Random(step).gauss(0.0, 0.02)
    return 2 + 8 * (step + 1000) ** -0.35 + noise + (0.8 if step in SPIKES else 0.0)


SPIKES = {100, 105, 111, 240, 245, 251}


def test_bursts_of_spikes_are_found_and_nothing_else() -> None:
    aggregator = aggregator_with(None, Spike("*/loss"))
    found = set()
    for step in range(300):
        aggregator.record("loss", spiky(step), dataset="web")
        found |= {alert.step for alert in aggregator.reduce(step).alerts}
    assert found == SPIKES


def test_a_level_that_stays_is_soon_the_usual() -> None:
    aggregator = aggregator_with(None, Spike("*/loss", window=32))
    found = []
    for step in range(200):
        aggregator.record("loss", spiky(50 + step % 40) * (1.5 if step >= 100 else 1.0))
        found += [alert.step for alert in aggregator.reduce(step).alerts]
    assert 100 in found
    assert max(step for step in found if step is not None) < 100 + 32


def test_where_most_values_are_equal_a_spike_is_found_and_the_next_value_is_none() -> None:
    """As a loss in bfloat16: the median deviation is 0, which used to mean that nothing was found."""
    aggregator = aggregator_with(None, Spike("*/loss"))
    found = []
    for step in range(100):
        coarse = 2.0 + (step % 5 == 0) / 128
        aggregator.record("loss", 2.5 if step == 90 else coarse)
        found += [alert.step for alert in aggregator.reduce(step).alerts]
    assert found == [90]


def test_the_rank_that_has_the_spike_is_named() -> None:
    def rank(communicator: Any) -> list[int | None]:
        aggregator = aggregator_with(communicator, Spike("*/loss"))
        found = []
        for step in range(40):
            spike = 30.0 if step == 30 and communicator.rank == 2 else 0.0
            aggregator.record("loss", 1 + random.Random(step).random() + spike)
            found += [(alert.step, alert.rank) for alert in aggregator.reduce(step).alerts]
        return found

    assert run_threads(rank, 4) == [[(30, 2)]] * 4


def watched(communicator: Any, steps: range, state: Any) -> tuple[list[Any], Any]:
    aggregator = aggregator_with(communicator, Spike("*/loss"), NonFinite("*/loss"))
    if state is not None:
        aggregator.load_state_dict(json.loads(json.dumps(state)))
    found = []
    for step in steps:
        aggregator.record("loss", spiky(step), dataset="web")
        alerts = aggregator.reduce(step).alerts
        found += [(alert.step, alert.rule, alert.message.split(", most")[0]) for alert in alerts]
    return found, aggregator.state_dict()


@cache
def before() -> tuple[list[Any], list[Any], Any]:
    """Return what two ranks find in all steps, and in the first, and their state then."""
    (whole, _), *_ = run_threads(lambda c: watched(c, range(300), None), 2)
    (first, state), *_ = run_threads(lambda c: watched(c, range(103), None), 2)
    return whole, first, state


@pytest.mark.parametrize("after", [1, 2, 4])
def test_verdicts_after_a_resume_on_other_ranks_are_the_same(after: int) -> None:
    whole, first, state = before()
    (second, _), *_ = run_threads(lambda c: watched(c, range(103, 300), state), after)
    assert first + second == whole
    assert {step for step, *_ in whole} == SPIKES


def test_a_save_in_the_middle_of_an_interval_runs_no_rule() -> None:
    aggregator = aggregator_with(None, looks := Looks())
    aggregator.record("loss", 1.0)
    aggregator.state_dict()
    assert looks.times == 0
    aggregator.reduce()
    assert looks.times == 1


class Looks:
    """A rule that counts how often it looks."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self, snapshot: Snapshot, memory: dict[str, Any]) -> None:
        self.times += 1


def test_a_straggler_is_named_after_some_intervals_in_a_row() -> None:
    import time

    def rank(communicator: Any) -> list[list[int | None]]:
        aggregator = aggregator_with(communicator, Straggler("data", logs=2))
        found = []
        for step in range(3):
            started = time.monotonic()
            with aggregator.timer("data"):
                time.sleep(0.05 if communicator.rank == 1 else 0.0)
            while time.monotonic() - started < 0.06:
                time.sleep(0.001)
            found.append([alert.rank for alert in aggregator.reduce(step).alerts])
        return found

    assert run_threads(rank, 3) == [[[], [1], [1]]] * 3


# -- Rules of one's own


def test_a_function_is_a_rule_and_remembers_over_a_checkpoint() -> None:
    def third(snapshot: Snapshot, memory: dict[str, Any]) -> Iterator[Alert | str]:
        memory["times"] = memory.get("times", 0) + 1
        if memory["times"] == 3:
            yield f"loss is {snapshot.value(None, 'loss', None, 'interval')}"
            yield Alert("stop", "severe")

    first = aggregator_with(None, third)
    for _ in range(2):
        first.record("loss", 1.0)
        assert first.reduce().alerts == ()
    second = MetricsAggregator()
    second.load_state_dict(first.state_dict())
    second.alert_on(third)  # after the load: what it remembers has waited
    second.record("loss", 4.0)
    alerts = second.reduce(7).alerts
    assert [alert.message for alert in alerts] == ["loss is 4.0", "stop"]
    assert [alert.message for alert in alerts.severe] == ["stop"]
    assert alerts[0].rule.endswith("third")


def test_rules_never_see_what_is_derived() -> None:
    def looking(snapshot: Snapshot, memory: dict[str, Any]) -> str:
        with pytest.raises(KeyError):
            snapshot.value(None, "twice", None, "interval")
        return ",".join(sorted(snapshot.as_dict("train", "interval")))

    aggregator = aggregator_with(None, looking)
    aggregator.derive("twice", lambda m: 2 * m["loss"])
    aggregator.record("loss", 1.0)
    assert [alert.message for alert in aggregator.reduce().alerts] == ["train/loss"]


def test_a_rule_that_fails_is_said_once_and_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    def broken(snapshot: Snapshot, memory: dict[str, Any]) -> str:
        raise ZeroDivisionError

    def wrong(snapshot: Snapshot, memory: dict[str, Any]) -> Any:
        return [3]

    aggregator = aggregator_with(None, broken, wrong, NonFinite("*/loss"))
    for _ in range(2):
        aggregator.record("loss", math.nan)
        assert len(aggregator.reduce().alerts) == 1
    said = [record.getMessage() for record in caplog.records]
    assert [text.split(" failed")[0].rsplit(".", 1)[-1] for text in said] == ["broken", "wrong"]


@pytest.mark.parametrize(
    ("rules", "error", "says"),
    [
        ((NonFinite,), TypeError, r"NonFinite\(\.\.\.\)"),
        (("*/loss",), TypeError, "not '\\*/loss'"),
        ((NonFinite(), NonFinite()), ValueError, "already"),
    ],
)
def test_what_is_no_rule_is_refused_and_nothing_is_added(
    rules: Any, error: type[Exception], says: str
) -> None:
    aggregator = MetricsAggregator()
    with pytest.raises(error, match=says):
        aggregator.alert_on(Spike(), *rules)
    aggregator.alert_on(Spike(), NonFinite())


def test_a_memory_that_cannot_be_saved_names_its_rule() -> None:
    def forgetful(snapshot: Snapshot, memory: dict[str, Any]) -> None:
        memory["last"] = object()

    aggregator = aggregator_with(None, forgetful)
    aggregator.record("loss", 1.0)
    aggregator.reduce()
    with pytest.raises(TypeError, match="forgetful remembers cannot be saved"):
        aggregator.state_dict()


@pytest.mark.parametrize("rules", [[], {"rule": 3}, {"rule": []}])
def test_a_forged_memory_is_refused_at_load(rules: Any) -> None:
    from metricfold._core.intake.checkpoint import checksum

    state = MetricsAggregator().state_dict()
    content = json.loads(state["payload"])["content"]
    content["rules"] = rules
    state["payload"] = json.dumps({"checksum": checksum(content), "content": content})
    with pytest.raises(ValueError, match="rules"):
        MetricsAggregator().load_state_dict(state)


def test_a_memory_of_another_form_ends_no_training(caplog: pytest.LogCaptureFixture) -> None:
    from metricfold._core.intake.checkpoint import checksum

    first = aggregator_with(None, Spike("*/loss"))
    first.record("loss", 1.0)
    first.reduce()
    state = first.state_dict()
    content = json.loads(state["payload"])["content"]
    content["rules"] = {repr(Spike("*/loss")): {"/loss": ["a"] * 20}}
    state["payload"] = json.dumps({"checksum": checksum(content), "content": content})
    second = aggregator_with(None, Spike("*/loss"))
    second.load_state_dict(state)
    second.record("loss", 1.0)
    assert second.reduce().as_dict("train") == {"train/loss": 1.0}
    assert "failed, and says no more" in caplog.text


# -- Among ranks


def test_ranks_with_other_rules_are_one_error_and_nothing_is_lost() -> None:
    def rank(communicator: Any) -> tuple[str, dict[str, float]]:
        aggregator = MetricsAggregator(communicator=communicator)
        if communicator.rank == 1:
            aggregator.alert_on(NonFinite("*/loss"))
        aggregator.record("loss", float(communicator.rank))
        with pytest.raises(RuntimeError, match="look for different alerts") as raised:
            aggregator.reduce()
        if communicator.rank != 1:
            aggregator.alert_on(NonFinite("*/loss"))
        return str(raised.value), aggregator.reduce().as_dict("train")

    everyone = run_threads(rank, 3)
    assert everyone == [everyone[0]] * 3
    assert "ranks 0, 2 without a rule, rank 1 with rules" in everyone[0][0]
    assert everyone[0][1] == {"train/loss": 1.0}


def test_what_one_rank_alone_sees_all_hear_of_in_the_next_reduction(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def rank(communicator: Any) -> list[list[tuple[Any, ...]]]:
        def disk(snapshot: Snapshot, memory: dict[str, Any]) -> Alert | None:
            memory["looks"] = memory.get("looks", 0) + 1
            full = memory["looks"] == 3 and communicator.rank == 2
            return Alert("the disk is full", "severe") if full else None

        aggregator = MetricsAggregator(communicator=communicator)
        aggregator.alert_on(disk, local=True)
        found = []
        for step in range(6):
            aggregator.record("loss", 1.0)
            if step == 3:
                aggregator.state_dict()  # takes no message away
            alerts = aggregator.reduce(step).alerts
            found.append([(one.step, one.rank, one.severity, one.message) for one in alerts])
        return found

    everyone = run_threads(rank, 4)
    assert everyone == [everyone[0]] * 4
    ((step, who, severity, message),) = everyone[0][3]
    assert (step, who, severity) == (2, 2, "severe")
    assert "on rank 2" in message
    assert [len(alerts) for alerts in everyone[0]] == [0, 0, 0, 1, 0, 0]
    assert "the disk is full" in caplog.text


def test_a_pattern_that_matches_nothing_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    aggregator = aggregator_with(None, NonFinite("*/los"), NonFinite("*/loss"))
    for _ in range(8):
        aggregator.record("loss", 1.0)
        aggregator.reduce()
    (record,) = caplog.records
    assert "'*/los'" in record.getMessage()
    assert "/loss" in record.getMessage()


def test_a_fork_and_a_reset_leave_no_memory() -> None:
    aggregator = aggregator_with(None, Spike("*/loss", least=2, window=4))
    for value in (1.0, 1.1, 0.9, 1.0):
        aggregator.record("loss", value)
        aggregator.reduce()
    aggregator.reset()
    aggregator.record("loss", 100.0)
    assert aggregator.reduce().alerts == ()


def test_no_collective_is_added(tmp_path: Path) -> None:
    def rank(communicator: Any) -> int:
        aggregator = aggregator_with(communicator, NonFinite(), Spike("*/loss"))
        for _ in range(3):
            aggregator.record("loss", 1.0)
            aggregator.reduce()
        before = aggregator.collectives
        aggregator.record("loss", math.nan)
        assert aggregator.reduce().alerts
        return aggregator.collectives - before

    assert run_threads(rank, 2) == [1, 1]


def test_of_what_ranks_find_in_one_interval_all_is_told_and_what_is_severe_first() -> None:
    def rank(communicator: Any) -> list[list[tuple[Any, ...]]]:
        def disk(snapshot: Snapshot, memory: dict[str, Any]) -> Alert | None:
            memory["looks"] = memory.get("looks", 0) + 1
            full = memory["looks"] == 1 and communicator.rank == 0
            return Alert("the disk is full", "severe") if full else None

        def warm(snapshot: Snapshot, memory: dict[str, Any]) -> str | None:
            memory["looks"] = memory.get("looks", 0) + 1
            return "it is warm" if memory["looks"] == 1 else None

        aggregator = MetricsAggregator(communicator=communicator)
        # In another order on each rank: which rule it was is known all the same.
        for rule in (disk, warm) if communicator.rank else (warm, disk):
            aggregator.alert_on(rule, local=True)
        found = []
        for step in range(5):
            alerts = aggregator.reduce(step).alerts
            aggregator.state_dict()  # takes no message away
            found.append(
                [(one.rule.split(".")[-1], one.rank, one.severity, one.step) for one in alerts]
            )
        return found

    everyone = run_threads(rank, 2)
    assert everyone == [everyone[0]] * 2
    # Of what has waited it is no longer known which log it was of.
    assert everyone[0] == [
        [],
        [("disk", 0, "severe", 0)],
        [("warm", 0, "warning", None)],
        [("warm", 1, "warning", None)],
        [],
    ]


def test_what_local_rules_remember_is_in_no_checkpoint_which_is_the_same_on_all_ranks() -> None:
    def rank(communicator: Any) -> dict[str, Any]:
        def here(snapshot: Snapshot, memory: dict[str, Any]) -> None:
            memory["rank"] = communicator.rank

        aggregator = aggregator_with(communicator, Spike("*/loss"))
        aggregator.alert_on(here, local=True)
        aggregator.record("loss", 1.0)
        aggregator.reduce()
        return aggregator.state_dict()

    first, second = run_threads(rank, 2)
    assert first == second


def test_a_rule_that_is_added_while_a_reduction_is_under_way_looks_at_the_next_on_all_ranks() -> (
    None
):
    def rank(communicator: Any) -> list[int]:
        started, go = threading.Event(), threading.Event()

        def slow(snapshot: Snapshot, memory: dict[str, Any]) -> None:
            started.set()
            assert go.wait(20)

        aggregator = aggregator_with(communicator, slow)
        looks = Looks()
        future = aggregator.reduce_async(0)
        if communicator.rank == 1:
            assert started.wait(20)  # in the midst of it; on the other rank at whatever moment
        aggregator.alert_on(looks)
        go.set()
        future.result()
        seen = [looks.times]
        aggregator.reduce(1)
        return [*seen, looks.times]

    assert run_threads(rank, 2) == [[0, 1]] * 2


def test_a_rule_that_ends_the_program_ends_no_reduction(caplog: pytest.LogCaptureFixture) -> None:
    def ends(snapshot: Snapshot, memory: dict[str, Any]) -> Iterator[str]:
        yield "before"
        raise SystemExit(3)

    aggregator = aggregator_with(None, ends)
    aggregator.record("loss", 1.0)
    snapshot = aggregator.reduce_async(0).result()
    assert [alert.message for alert in snapshot.alerts] == ["before"]
    assert snapshot.as_dict("train") == {"train/loss": 1.0}
    assert "SystemExit" in caplog.text


@pytest.mark.parametrize("call", ["reduce", "reduce_async", "state_dict", "reset"])
def test_a_rule_that_would_wait_for_its_own_reduction_is_told_so(
    call: str, caplog: pytest.LogCaptureFixture
) -> None:
    def rule(snapshot: Snapshot, memory: dict[str, Any]) -> None:
        getattr(aggregator, call)()

    aggregator = aggregator_with(None, rule)
    aggregator.record("loss", 1.0)
    assert aggregator.reduce_async(0).result(20).as_dict("train") == {"train/loss": 1.0}
    assert f"{call}() was called by a rule" in caplog.text
    aggregator.state_dict()


def test_what_is_found_everywhere_is_told_of_some_and_counted() -> None:
    aggregator = aggregator_with(None, NonFinite("*"))
    for number in range(60):
        aggregator.record(f"norm {number:02}", math.nan)
    alerts = aggregator.reduce().alerts
    assert [alert.name for alert in alerts[:50]] == [f"norm {number:02}" for number in range(50)]
    assert [alert.message for alert in alerts[50:]] == [f"{NonFinite('*')!r} has found 10 more"]
    assert len(alerts.severe) == 51


def test_a_rule_remembers_plain_data_of_all_kinds_nan_too() -> None:
    def keeping(snapshot: Snapshot, memory: dict[str, Any]) -> None:
        memory["last"], memory[3], memory["pair"] = math.nan, (1, 2), deque([1.0], 5)

    def recalling(snapshot: Snapshot, memory: dict[str, Any]) -> str:
        return f"{memory}"

    recalling.__qualname__ = keeping.__qualname__
    first, second = aggregator_with(None, keeping), aggregator_with(None, recalling)
    first.record("loss", 1.0)
    first.reduce()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    (alert,) = second.reduce().alerts
    assert alert.message == "{'last': nan, 3: (1, 2), 'pair': deque([1.0], maxlen=5)}"


def test_what_rules_remember_goes_on_from_the_last_of_jobs_in_a_row_and_of_none_side_by_side() -> (
    None
):
    states = []
    for _ in range(2):
        aggregator = aggregator_with(None, spike := Spike("*/loss", least=2))
        for value in (1.0, 1.1, 0.9):
            aggregator.record("loss", value)
            aggregator.reduce()
        states.append(aggregator.state_dict())
    found = []
    for parallel in (False, True):
        aggregator = aggregator_with(None, spike)
        aggregator.load_state_dict(merge_state_dicts(states, parallel=parallel))
        aggregator.record("loss", 100.0)
        found.append(len(aggregator.reduce().alerts))
    assert found == [1, 0]


def test_a_rule_is_known_by_the_same_name_in_every_process() -> None:
    def over(limit: int, snapshot: Snapshot, memory: dict[str, Any]) -> str:
        return f"over {limit}"

    aggregator = aggregator_with(None, partial(over, 3), partial(over, 4))
    names = [alert.rule for alert in aggregator.reduce().alerts]
    assert len(set(names)) == 2
    assert not any("0x" in name for name in names)


def test_an_alert_holds_plain_numbers_whatever_a_rule_computes_with(tmp_path: Path) -> None:
    def rule(snapshot: Snapshot, memory: dict[str, Any]) -> Alert:
        return Alert("much", value=np.float32(2.0), rank=np.int64(1))

    aggregator = aggregator_with(None, rule)
    with MetricsLogger([JSONLSink(tmp_path / "run.jsonl")]) as logger:
        aggregator.record("loss", 1.0)
        logger.log(3, aggregator, prefix="train")
    (record,) = read_jsonl(tmp_path / "run.jsonl")
    assert record.metrics == {"train/loss": 1.0}
    assert (record.alerts[0]["value"], record.alerts[0]["rank"]) == (2.0, 1)
    with pytest.raises(TypeError, match="message=3"):
        Alert(3)  # type: ignore[arg-type]


def test_a_category_of_that_name_is_no_nan() -> None:
    aggregator = aggregator_with(None, NonFinite())
    aggregator.record("kind", "nan_count", "categorical_count")
    assert aggregator.reduce().alerts == ()


def test_infinities_that_a_distribution_leaves_out_are_found() -> None:
    aggregator = aggregator_with(None, NonFinite())
    aggregator.record("lengths", np.array([1.0, math.inf, math.nan]), "distribution", each=True)
    (alert,) = aggregator.reduce().alerts
    assert alert.message == "lengths had NaN and infinity, left out of it, on rank 0"


@pytest.mark.parametrize("route", ["gather", "tree"])
def test_the_cells_that_are_not_finite_are_named(route: str) -> None:
    def rank(communicator: Any) -> list[str]:
        aggregator = aggregator_with(communicator, NonFinite("*/norm"), route=route)
        values = np.ones((2, 3))
        if communicator.rank == 1:
            values[0, 1], values[1, 2] = math.nan, math.inf
        axes = {"layer": 2, "parameter": ["wq", "wk", "wv"]}
        aggregator.record("norm", values, "max", axes=axes)
        return [alert.message for alert in aggregator.reduce().alerts]

    said = "norm is nan, in layer 0 parameter wk, layer 1 parameter wv, on rank 1"
    assert run_threads(rank, 3) == [[said]] * 3


@pytest.mark.parametrize("route", ["gather", "tree"])
@pytest.mark.parametrize("value", [math.inf, 1e9])
def test_of_a_maximum_the_rank_is_known_on_both_exchanges(route: str, value: float) -> None:
    def rank(communicator: Any) -> list[int | None]:
        aggregator = aggregator_with(
            communicator, NonFinite(), Spike("*/norm", least=2), route=route
        )
        for step in range(5):
            worst = step == 4 and communicator.rank == 2
            aggregator.record("norm", value if worst else 1 + step / 10, "max")
            alerts = aggregator.reduce(step).alerts
        return [alert.rank for alert in alerts]

    assert run_threads(rank, 3) == [[2]] * 3


# -- In a logger


class Kept:
    """A sink that keeps its records."""

    def __init__(self) -> None:
        self.records: list[Any] = []

    def write(self, record: Any) -> None:
        self.records.append(record)

    def flush(self) -> None: ...

    def close(self) -> None: ...

    def rewind(self, step: int) -> None: ...


def test_log_returns_what_the_log_before_has_found_and_alerts_what_the_last_has() -> None:
    train, val = aggregator_with(None, NonFinite("*/loss")), aggregator_with(None, NonFinite())
    told: list[Alert] = []
    with MetricsLogger([sink := Kept()], on_alert=told.append) as logger:
        assert logger.alerts() == ()
        returned = []
        for step in range(4):
            train.record("loss", math.nan if step == 1 else 1.0)
            val.record("accuracy", math.inf if step == 2 else 1.0)
            returned.append((logger.log(step, train, prefix="train"), logger.alerts()))
            returned.append((logger.log(step, val, prefix="val"), logger.alerts()))
            assert logger.log(step, {"lr": 1.0}) == ()
        assert logger.log(4, val.reduce(), prefix="val") == ()
    steps = [[[alert.step for alert in some] for some in one] for one in returned]
    assert steps == [
        [[], []],
        [[], []],
        [[], [1]],
        [[], []],
        [[1], []],
        [[], [2]],
        [[], []],
        [[2], []],
    ]
    assert [(alert.name, alert.step) for alert in told] == [("loss", 1), ("accuracy", 2)]
    with_alerts = [record for record in sink.records if record.alerts]
    assert [(record.step, record.prefix) for record in with_alerts] == [(1, "train"), (2, "val")]
    assert with_alerts[0].alerts[0]["severity"] == "severe"


def test_a_file_keeps_alerts(tmp_path: Path) -> None:
    aggregator = aggregator_with(None, NonFinite("*/loss"))
    with MetricsLogger([JSONLSink(tmp_path / "run.jsonl")]) as logger:
        aggregator.record("loss", math.nan, dataset="web")
        logger.log(3, aggregator, prefix="train")
    (record,) = read_jsonl(tmp_path / "run.jsonl")
    (alert,) = record.alerts
    assert (alert["dataset"], alert["name"], alert["rank"], alert["step"]) == ("web", "loss", 0, 3)
    assert "nan" in alert["message"]


def test_a_callback_that_fails_loses_no_record(caplog: pytest.LogCaptureFixture) -> None:
    def broken(alert: Alert) -> None:
        raise ZeroDivisionError

    aggregator = aggregator_with(None, NonFinite("*/loss"))
    with MetricsLogger([sink := Kept()], on_alert=broken) as logger:
        aggregator.record("loss", math.nan)
        logger.log(0, aggregator, prefix="train")
    assert len(sink.records) == 1
    assert "on_alert failed" in caplog.text
    with pytest.raises(TypeError, match="on_alert"):
        MetricsLogger([], on_alert=3)  # type: ignore[arg-type]


def test_alerts_are_told_without_a_sink_too_and_no_one_may_close_from_there() -> None:
    told: list[str] = []

    def on_alert(alert: Alert) -> None:
        with pytest.raises(RuntimeError, match="cannot close that logger"):
            logger.close()
        told.append(alert.message)

    aggregator = aggregator_with(None, NonFinite("*/loss"))
    with MetricsLogger([], on_alert=on_alert) as logger:
        aggregator.record("loss", math.nan)
        logger.log(0, aggregator, prefix="train")
    assert told == ["loss is nan, on rank 0"]
    assert [alert.message for alert in logger.alerts()] == told  # also when it is closed


def test_what_was_found_is_returned_by_the_log_after_one_that_raised() -> None:
    class Refusing(Kept):
        def write(self, record: Any) -> None:
            raise RecordRefused("not this one")

    aggregator = aggregator_with(None, NonFinite("*/loss"))
    logger = MetricsLogger([Refusing()], on_sink_error="raise")
    returned: list[Any] = []
    for step in range(4):
        aggregator.record("loss", math.nan if step == 1 else 1.0)
        # The first record is refused, the second log tells all ranks of it, the third raises.
        try:
            returned.append([alert.step for alert in logger.log(step, aggregator, prefix="train")])
        except SinkError:
            returned.append("raised")
        logger.flush()
    with suppress(SinkError):
        logger.close()
    assert returned == [[], [], "raised", [1]]


def test_a_callback_that_hangs_keeps_no_record_from_its_sink() -> None:
    go = threading.Event()
    aggregator = aggregator_with(None, NonFinite("*/loss"))
    written = threading.Event()

    class Telling(Kept):
        def write(self, record: Any) -> None:
            written.set()

    with MetricsLogger([Telling()], on_alert=lambda _: go.wait(20)) as logger:
        aggregator.record("loss", math.nan)
        logger.log(0, aggregator, prefix="train")
        assert written.wait(20)
        go.set()


def test_alerts_of_a_reduction_that_failed_are_its_error_on_all_ranks() -> None:
    def rank(communicator: Any) -> str:
        aggregator = aggregator_with(communicator, NonFinite("*/loss"))
        with MetricsLogger([]) as logger:
            logger.log(0, aggregator, prefix="train")
            logger.log(0 if communicator.rank else 1, aggregator, prefix="train")
            with pytest.raises(RuntimeError, match="different steps") as raised:
                logger.alerts()
            with pytest.raises(RuntimeError, match="different steps"):
                logger.log(2, aggregator, prefix="train")
        return str(raised.value)

    first, second = run_threads(rank, 2)
    assert first == second


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_is_refused_alerts_that_would_never_come() -> None:
    aggregator = aggregator_with(None, NonFinite("*/loss"))
    with MetricsLogger([]) as logger:
        logger.log(0, aggregator, prefix="train")
        if (child := os.fork()) == 0:
            try:
                logger.alerts()
            except RuntimeError:
                os._exit(7)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_all_ranks_stop_at_the_same_step() -> None:
    def rank(communicator: Any) -> tuple[int, list[tuple[Any, ...]]]:
        aggregator = aggregator_with(communicator, NonFinite("*/loss"))
        with MetricsLogger([]) as logger:
            for step in range(20):
                bad = step == 5 and communicator.rank == 1
                aggregator.record("loss", math.nan if bad else 1.0, dataset="code")
                alerts = logger.log(step, aggregator, prefix="train")
                if alerts.severe:
                    return step, [(one.step, one.rank, one.dataset) for one in alerts]
        return -1, []

    assert run_threads(rank, 4) == [(6, [(5, 1, "code")])] * 4


# -- What was reported elsewhere, in a few lines


def on_two_ranks(train: Any) -> list[Any]:
    """Return what `train(aggregator, logger, rank)` returns on each of two ranks, with rules on losses."""

    def rank(communicator: Any) -> Any:
        aggregator = aggregator_with(communicator, NonFinite("*/loss"), Spike("*/loss", least=5))
        with MetricsLogger([]) as logger:
            return train(aggregator, logger, communicator.rank)

    return run_threads(rank, 2)


def test_a_rank_that_leaves_its_step_at_a_nan_leaves_nobody_alone() -> None:
    """pytorch/audio #3749, ai2cm/ace #850: it never came to the gather, and the others waited there."""

    def train(aggregator: MetricsAggregator, logger: MetricsLogger, rank: int) -> tuple[int, Any]:
        for step in range(20):
            loss = math.nan if (step, rank) == (3, 1) else 1.0
            aggregator.record("loss", loss)
            if math.isfinite(loss):
                aggregator.record("frames", 100, "sum")
            if alerts := logger.log(step, aggregator, prefix="train").severe:
                break
        return step, [alert.rank for alert in alerts]

    assert on_two_ranks(train) == [(4, [1])] * 2


def test_a_spike_that_only_another_rank_has_is_known_to_the_first() -> None:
    """ecmwf/WeatherGenerator #2724: rank 0 decided alone, and its own loss was fine."""

    def train(aggregator: MetricsAggregator, logger: MetricsLogger, rank: int) -> list[Any]:
        found = []
        for step in range(12):
            own = 1 + random.Random(step).random() / 10
            aggregator.record("loss", 30.0 if (step, rank) == (9, 1) else own, dataset="web")
            alerts = logger.log(step, aggregator, prefix="train")
            found += [(step, alert.step, alert.rank, alert.dataset) for alert in alerts]
        return found

    assert on_two_ranks(train) == [[(10, 9, 1, "web")]] * 2


def test_ranks_leave_out_the_same_steps_whatever_each_of_them_sees() -> None:
    """facebookresearch/metaseq #521: each worker skipped a number of batches of its own."""

    def train(aggregator: MetricsAggregator, logger: MetricsLogger, rank: int) -> list[int | None]:
        own, skipped = random.Random(rank), []
        for step in range(60):
            spike = 50.0 if step > 20 and own.random() < 0.1 else 0.0
            aggregator.record("loss", 1 + own.random() / 10 + spike)
            logger.log(step, aggregator, prefix="train")
            skipped += [alert.step for alert in logger.alerts()]
        return skipped

    first, second = on_two_ranks(train)
    assert first == second
    assert len(first) > 3


def test_no_checkpoint_of_a_model_full_of_nan_takes_the_place_of_a_good_one() -> None:
    """kyutai-labs/pocket-tts #262: the last good ones were deleted, and a resume loaded NaN."""

    def train(aggregator: MetricsAggregator, logger: MetricsLogger, rank: int) -> list[int]:
        saved: list[int] = []
        for step in range(10):
            aggregator.record("loss", math.nan if (step >= 6 and rank == 1) else 1.0)
            logger.log(step, aggregator, prefix="train")
            if step % 2 == 0 and not logger.alerts().severe:
                saved = [*saved[-1:], step]  # keeps two
        return saved

    assert on_two_ranks(train) == [[2, 4]] * 2


def test_a_rule_that_counts_logs_in_a_row_goes_on_counting_after_a_resume() -> None:
    """mosaicml/llm-foundry #1473: a loss that stays high for some steps ends the run."""

    def high(snapshot: Snapshot, memory: dict[str, Any]) -> Alert | None:
        loss = snapshot.value(None, "loss", window="interval") or 0.0
        memory["times"] = memory.get("times", 0) + 1 if loss > 4 else 0
        return Alert("the loss stays high", "severe") if memory["times"] == 3 else None

    def train(communicator: Any, losses: list[float], state: Any) -> tuple[int, Any]:
        aggregator = aggregator_with(communicator, high)
        if state is not None:
            aggregator.load_state_dict(state)
        found = 0
        for loss in losses:
            aggregator.record("loss", loss)
            found += len(aggregator.reduce().alerts)
        return found, aggregator.state_dict()

    first = run_threads(lambda c: train(c, [2.0, 5.0, 5.0], None), 2)
    assert [found for found, _ in first] == [0, 0]
    after = run_threads(lambda c: train(c, [5.0], first[0][1]), 3)
    assert [found for found, _ in after] == [1, 1, 1]


def test_norms_that_differ_by_nature_are_no_spikes() -> None:
    """Kai-46/minFM #4: a norm of 2.19 was called a spike, for a limit of 2 was in the configuration."""
    aggregator, norms = aggregator_with(None, Spike("*/grad_norm")), random.Random(0)
    found = []
    for step in range(400):
        aggregator.record("grad_norm", 20.0 if step == 300 else norms.lognormvariate(0.5, 0.25))
        found += [alert.step for alert in aggregator.reduce(step).alerts]
    assert found == [300]
