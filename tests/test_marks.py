"""A step that is skipped leaves no trace, and everything else is as it was."""

from __future__ import annotations

import gc
import math
import sys
import weakref
from typing import Any

import pytest
import torch
from handlers_of_users import MyTypes, ProductHandler
from hypotheses import examples
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_threads
from work import lines_run

from metricfold import Metric, MetricBatch, MetricsAggregator
from metricfold._core.fold import handlers
from metricfold._core.intake import aggregator as aggregator_module
from metricfold._core.intake import held, inbox, layers
from metricfold.torch import DeviceAccumulator

KINDS = ("sum", "mean", "max", "rate", "distribution", "categorical_count", MyTypes.PRODUCT)


def made(**options: Any) -> MetricsAggregator:
    aggregator = MetricsAggregator(4, max_categories=3, **options)
    aggregator.register_handler(MyTypes.PRODUCT, ProductHandler())
    return aggregator


def take(aggregator: MetricsAggregator, kind: Any, value: int, late: bool) -> None:
    """Record, update or drain `value`, lying on a device or not."""
    name = str(getattr(kind, "value", kind))
    number: Any = torch.tensor(float(value)) if late else float(value)
    if kind == "drain":
        acc = DeviceAccumulator({"drained": "sum", "lengths": "distribution"})
        acc.update("drained", number)
        acc.update("lengths", number)
        aggregator.drain(acc)
    elif value % 2:
        weight = 1 + value % 3 if kind in ("mean", "distribution") else 1
        aggregator.record(name, number, kind, dataset="d", weight=weight)
    else:
        aggregator.update([Metric("d", name, number, kind), Metric("e", name, value, kind)])


taking = st.tuples(st.sampled_from([*KINDS, "drain"]), st.integers(1, 9), st.booleans())
step = st.tuples(st.lists(taking, max_size=4), st.booleans())
events = st.lists(st.one_of(step, step, st.sampled_from(["reduce", "fail", "save"])), max_size=12)


@pytest.mark.filterwarnings("ignore:the interval is empty:RuntimeWarning")
@given(events)
@examples(60)
def test_what_is_rolled_back_might_never_have_come(story: Any) -> None:
    marked, plain = made(), made()
    seen: list[list[Any]] = [[], []]

    def look(window: str = "run") -> None:
        for aggregator, found in zip((marked, plain), seen, strict=True):
            snapshot = aggregator.reduce()
            found += [without_rates(snapshot.as_dict("t", view)) for view in ("run", "interval")]

    for event in [*story, "reduce"]:
        if event == "reduce":
            look()
        elif event == "save":
            for aggregator in (marked, plain):
                aggregator.state_dict()
        elif event == "fail":
            for aggregator in (marked, plain):
                with pytest.raises(RuntimeError, match="step"):
                    aggregator.reduce(step=-1)
        else:
            values, skipped = event
            mark = marked.mark()
            for kind, value, late in values:
                take(marked, kind, value, late)
                if not skipped:
                    take(plain, kind, value, late)
            if skipped:
                marked.rollback(mark)
    assert seen[0] == seen[1]


def without_rates(logged: dict[str, float]) -> dict[str, Any]:
    """Leave out what depends on the clock, and let NaN equal itself."""
    return {
        name: "nan" if math.isnan(value) else value
        for name, value in logged.items()
        if "rate" not in name
    }


def test_the_newest_mark_stays_good_and_what_comes_after_a_rollback_counts() -> None:
    aggregator = made()
    aggregator.record("n", 1, "sum")
    mark = aggregator.mark()
    for _ in range(3):
        aggregator.record("n", 10, "sum")
        aggregator.record("new", 1.0)
        aggregator.rollback(mark)
    aggregator.record("n", 5, "sum")
    # A key that came with nothing but what was dropped is not reported.
    assert aggregator.get_metrics_for_logging("t") == {"t/n": 6.0}


def test_marks_that_are_past_or_not_ours_are_refused_and_change_nothing() -> None:
    aggregator, other = made(), made(name="val")
    older = aggregator.mark()
    aggregator.record("n", 1, "sum")
    aggregator.mark()
    aggregator.record("n", 2, "sum")
    with pytest.raises(ValueError, match="newer mark"):
        aggregator.rollback(older)
    with pytest.raises(ValueError, match=r"of aggregator '\d+', not of 'val'"):
        other.rollback(older)
    with pytest.raises(TypeError, match="takes what mark"):
        aggregator.rollback(3)  # type: ignore[arg-type]
    for past in (aggregator.reduce, aggregator.state_dict, aggregator.reset):
        mark = aggregator.mark()
        aggregator.record("n", 4, "sum")
        past()
        with pytest.raises(ValueError, match="reduced, saved or replaced already"):
            aggregator.rollback(mark)
    aggregator.load_state_dict(other.state_dict())
    aggregator.record("n", 7, "sum")
    assert aggregator.get_metrics_for_logging("t") == {"t/n": 7.0}


def test_a_mark_takes_the_time_of_its_step_not_of_all_that_has_come() -> None:
    def lines(keys: int) -> int:
        """Return how much Python runs for ten steps, each with a mark, of which some are skipped."""
        aggregator = MetricsAggregator(None)
        for key in range(keys):
            aggregator.update([Metric("d", f"len {key}", v, "distribution") for v in range(40)])
        aggregator.mark()

        def ten_steps() -> None:
            for value in range(10):
                mark = aggregator.mark()
                aggregator.record("len 0", float(value), "distribution", dataset="d")
                if value % 3 == 0:
                    aggregator.rollback(mark)

        return lines_run(ten_steps, aggregator_module, held, inbox, layers, handlers)

    assert lines(300) == lines(3) > 100


def test_values_that_pile_up_over_many_marks_count_once() -> None:
    aggregator = MetricsAggregator(None)
    for value in range(10_000):  # more than are folded at a time
        mark = aggregator.mark()
        aggregator.record("len", float(value), "distribution")
        aggregator.record("n", 1, "sum")
        if value % 3 == 0:
            aggregator.rollback(mark)
    logged = aggregator.get_metrics_for_logging()
    assert (logged["data/len_stat_count"], logged["data/n"]) == (6666, 6666)


def test_categories_that_are_not_told_apart_take_no_memory_between_marks() -> None:
    aggregator = MetricsAggregator(max_categories=10)
    aggregator.update([Metric("d", "id", v, "categorical_count") for v in range(20)])
    aggregator.reduce()
    for number in range(6000):
        aggregator.mark()
        aggregator.record("id", f"number {number}", "categorical_count", dataset="d")
    stage = aggregator._held.inbox._stage
    for part in (stage.below, stage.above):
        state: Any = part.states.get(("d", "id"))
        assert state is None or len(state.counts) <= 25
    assert sum(aggregator.get_metrics_for_logging("t").values()) == 6020


def test_a_mark_that_is_never_renewed_costs_neither_precision_nor_order() -> None:
    aggregator = MetricsAggregator(4)
    aggregator.record("len", 0.0, "distribution")
    mark = aggregator.mark()
    batch = MetricBatch.from_metrics([Metric("d", "x", 0.1, "sum")])
    for _ in range(2):  # what comes is put away in between: that is dropped, too
        aggregator.rollback(mark)
        for _ in range(100_000):
            aggregator.update(batch)
    for value in range(1, 2000):
        aggregator.record("len", float(value), "distribution")
    logged = aggregator.get_metrics_for_logging("t")
    assert abs(logged["t_d/x"] - 10_000.0) <= 1e-12 * 10_000.0
    assert (logged["t/len_stat_min"], logged["t/len_stat_max"]) == (1996.0, 1999.0)


@pytest.mark.skipif(not hasattr(sys, "getrefcount"), reason="objects are not counted here")
def test_an_aggregator_goes_when_nobody_holds_it_though_it_has_a_mark() -> None:
    aggregator = MetricsAggregator()
    mark = aggregator.mark()
    gone = weakref.ref(aggregator)
    gc.disable()
    try:
        del aggregator
        assert gone() is None
    finally:
        gc.enable()
    with pytest.raises(ValueError, match="this mark is of aggregator"):
        MetricsAggregator().rollback(mark)


def on_ranks(communicator: Any) -> list[dict[str, float]]:
    """Skip steps on some ranks only, while a reduction is under way, and when one fails."""
    aggregator = MetricsAggregator(communicator=communicator)
    rank = communicator.rank
    found = []
    for turn in range(4):
        future = aggregator.reduce_async(step=rank if turn == 2 else turn)
        mark = aggregator.mark()
        aggregator.record("n", 1, "sum")
        aggregator.record("late", torch.tensor(1.0), "sum")
        if (rank + turn) % 2:
            aggregator.rollback(mark)
        error = future.exception()
        assert (error is not None) == (turn == 2)
        mark = aggregator.mark()
        aggregator.record("n", 100, "sum")
        aggregator.rollback(mark)
        if error is None:
            found.append(future.result().as_dict("t"))
    found.append(aggregator.get_metrics_for_logging("t"))
    return found


def test_each_rank_skips_its_own_steps_also_while_a_reduction_runs_or_fails() -> None:
    results = run_threads(on_ranks, 2)
    assert results[0] == results[1]
    # Each turn one of the two ranks keeps its step; the third reduction fails and loses nothing.
    assert [one.get("t/n", 0.0) for one in results[0]] == [0.0, 1.0, 3.0, 4.0]
    assert results[0][-1] == {"t/n": 4.0, "t/late": 4.0}
