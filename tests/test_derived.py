"""Derived metrics: what they are given, in whichever window, and what happens when one fails."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import pytest
from handlers_of_users import RMSHandler
from ranks import run_threads

from metricfold import JSONLSink, Metric, MetricsAggregator, MetricsLogger, read_jsonl

ROUTES = pytest.mark.parametrize("route", ["narrow", "wide"])


def loss_per_step(communicator: Any, route: str) -> list[list[float]]:
    """Add up the parts of each step's loss over ranks and microbatches, in two logs of two steps."""
    aggregator = MetricsAggregator(communicator=communicator, route=route)
    for name, window in (("loss", "interval"), ("run_loss", "run"), ("shown_loss", None)):
        aggregator.derive(name, lambda m: m["parts"] / m["steps"], window=window)
    found = []
    for losses in ((2.0, 4.0), (8.0, 10.0)):
        for loss in losses:
            for _ in range(4):
                aggregator.record("parts", loss / 8, "sum")
            if communicator.rank == 0:
                aggregator.record("steps", 1, "sum")
        snapshot = aggregator.reduce()
        for window in ("auto", "interval", "run", {"steps": "interval", "parts": "interval"}):
            values = snapshot.as_dict("t", window)
            found.append([values[f"t/{name}"] for name in ("loss", "run_loss", "shown_loss")])
    return found


@ROUTES
def test_a_window_of_its_own_gives_ratios_of_sums_that_used_to_be_averages_of_the_run(
    route: str,
) -> None:
    one, two = run_threads(loss_per_step, 2, route)
    assert one == two
    assert one[:4] == [[3.0, 3.0, 3.0]] * 4
    # What the log shows of two SUMs is the run's, unless a window says otherwise.
    assert one[4:] == [[9.0, 6.0, 6.0], [9.0, 6.0, 9.0], [9.0, 6.0, 6.0], [9.0, 6.0, 9.0]]


def test_inputs_of_a_window_are_all_of_that_window_for_datasets_totals_and_levels() -> None:
    aggregator = MetricsAggregator()
    aggregator.derive("rate", lambda m: m["passed"] / m["tried"], window="interval")
    aggregator.derive("red", lambda m: m["kind_count_red"] / m["tried"], window="interval")
    aggregator.derive("norms", lambda m: m["norm"] * m["tried"], window="run")
    aggregator.register_handler("rms", RMSHandler())

    def take(dataset: str, passed: int, tried: int) -> None:
        aggregator.record("passed", passed, "sum", dataset=dataset)
        aggregator.record("tried", tried, "sum", dataset=dataset)
        aggregator.record("kind", "red", "categorical_count", dataset=dataset)
        aggregator.record("norm", 2.0, "rms", dataset=dataset)

    take("code/a", 1, 1)
    take("code/b", 1, 1)
    aggregator.reduce()
    take("code/a", 1, 4)
    values = aggregator.reduce().as_dict("t", "auto", rollup="levels")
    assert values["t_code/a/tried"] == 5.0
    assert values["t_code/a/rate"] == values["t_code/rate"] == values["t/rate"] == 0.25
    assert values["t_code/a/red"] == 0.25
    assert values["t_code/a/norms"] == 10.0
    assert values["t_code/b/norms"] == 2.0
    assert "t_code/b/rate" not in values  # nothing came in


def test_derived_metrics_may_be_derived_from_others_across_windows() -> None:
    aggregator = MetricsAggregator()
    aggregator.derive("a", lambda m: m["n"], window="interval")
    aggregator.derive("b", lambda m: 10 * m["n"])
    aggregator.derive("c", lambda m: m["a"] + m["b"], window="interval")
    aggregator.derive("d", lambda m: m["a"] + m["b"], window="run")
    for _ in range(2):
        aggregator.record("n", 1, "sum")
        snapshot = aggregator.reduce()
    values = snapshot.as_dict("t", "auto")
    assert values == {"t/n": 2.0, "t/a": 1.0, "t/b": 20.0, "t/c": 11.0, "t/d": 21.0}


def test_a_log_and_the_aggregators_own_dict_have_them(tmp_path: Any) -> None:
    aggregator = MetricsAggregator()
    aggregator.derive("rate", lambda m: m["passed"] / m["tried"], window="interval")
    for passed in (1, 3):
        aggregator.record("passed", passed, "sum")
        aggregator.record("tried", 4, "sum")
        if passed == 1:
            assert aggregator.get_metrics_for_logging("t")["t/rate"] == 0.25
    with MetricsLogger([JSONLSink(tmp_path / "run.jsonl")]) as logger:
        logger.log(1, aggregator, prefix="t")
    (record,) = read_jsonl(tmp_path / "run.jsonl")
    assert record.metrics == {"t/passed": 4.0, "t/tried": 8.0, "t/rate": 0.75}


@pytest.mark.parametrize("window", ["auto", "", "Interval", {"n": "run"}, 1, ["run"]])
def test_other_windows_are_refused_and_nothing_is_defined(window: Any) -> None:
    aggregator = MetricsAggregator()
    with pytest.raises(ValueError, match=r"derive\('rate', .*: use 'interval' or 'run'"):
        aggregator.derive("rate", lambda m: 1.0, window=window)
    aggregator.derive("rate", lambda m: m["n"] + 1.0)
    aggregator.record("n", 1, "sum")
    assert aggregator.get_metrics_for_logging("t")["t/rate"] == 2.0


def test_a_failure_in_another_window_is_said_once_and_isolated() -> None:
    aggregator = MetricsAggregator()
    aggregator.derive("rate", lambda m: 1 / (m["n"] - 1), window="interval")
    aggregator.derive("fine", lambda m: m["n"])
    for _ in range(2):
        aggregator.record("n", 1, "sum")
        snapshot = aggregator.reduce()
    with pytest.warns(RuntimeWarning, match="'rate' failed for all datasets together"):
        values = snapshot.as_dict("t", "run")
    assert values == {"t/n": 2.0, "t/fine": 2.0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        snapshot.as_dict("t", "run")


def test_a_missing_metric_is_named_and_one_that_is_derived_is_not_missing() -> None:
    aggregator = MetricsAggregator()
    aggregator.derive("broken", lambda m: 1 / (m["n"] - 1))
    aggregator.derive("on_it", lambda m: m["broken"], window="run")
    aggregator.derive("missing", lambda m: m["tryed"], window="run")
    aggregator.record("n", 1, "sum")
    snapshot = aggregator.reduce()
    with pytest.warns(RuntimeWarning) as said:
        snapshot.as_dict("t", "auto")
    messages = [str(one.message) for one in said]
    assert len(messages) == 2
    assert "'broken' failed" in messages[0]
    assert "'missing' needs 'tryed', which no dataset has; there are: n" in messages[1]


def test_a_function_may_look_at_all_it_is_given_and_changes_nothing() -> None:
    aggregator = MetricsAggregator()

    def share(metrics: Mapping[str, float]) -> float:
        counts = {name: n for name, n in metrics.items() if name.startswith("kind_count_")}
        metrics.clear()  # type: ignore[attr-defined]
        return max(counts.values()) / sum(counts.values())

    aggregator.derive("largest", share, window="interval")
    aggregator.update([Metric("a", "kind", kind, "categorical_count") for kind in "xxyz"])
    values = aggregator.reduce().as_dict("t", "interval")
    assert values["t_a/largest"] == 0.5
    assert values["t_a/kind_count_x"] == 2.0


def restored(communicator: Any, route: str) -> float:
    aggregator = MetricsAggregator(communicator=communicator, route=route)
    aggregator.record("passed", 1, "sum")
    aggregator.record("tried", 4, "sum")
    state = aggregator.state_dict()
    resumed = MetricsAggregator(communicator=communicator, route=route)
    resumed.derive("rate", lambda m: m["passed"] / m["tried"], window="interval")
    resumed.load_state_dict(state)
    resumed.reduce()  # the open interval goes on
    resumed.record("passed", 2, "sum")
    resumed.record("tried", 4, "sum")
    values = resumed.reduce().as_dict("t", "auto")
    assert values["t/tried"] == 16.0
    return values["t/rate"]


@ROUTES
def test_after_a_restart_an_interval_is_still_an_interval(route: str) -> None:
    assert run_threads(restored, 2, route) == [0.5, 0.5]


def test_a_derived_total_is_that_of_the_merged_states() -> None:
    aggregator = MetricsAggregator()
    aggregator.derive("perplexity", lambda m: math.exp(m["loss"]), window="interval")
    aggregator.update([Metric("a", "loss", 1.0, "mean", 3), Metric("b", "loss", 3.0, "mean", 1)])
    values = aggregator.reduce().as_dict("t", "run", rollup=True)
    assert values["t/perplexity"] == math.exp(1.5)
