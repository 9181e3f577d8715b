"""`by=`: which axes of a metric remain in what is printed, returned and derived."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
from handlers_of_users import RMSHandler
from ranks import run_ranks, run_threads

from metricfold import JSONLSink, MetricsAggregator, MetricsLogger, read_jsonl

TOKENS = np.arange(6.0).reshape(2, 3)
AXES = {"layer": 2, "expert": 3}


def made(**how: Any) -> MetricsAggregator:
    aggregator = MetricsAggregator(**how)
    aggregator.record("tokens", TOKENS, "sum", axes=AXES, dataset="web")
    aggregator.record("tokens", 10 * TOKENS, "sum", axes=AXES, dataset="code")
    aggregator.record("loss", 2.0, dataset="web")
    return aggregator


LAYERS = {
    "t_web/tokens/layer_0": 3.0,
    "t_web/tokens/layer_1": 12.0,
    "t_code/tokens/layer_0": 30.0,
    "t_code/tokens/layer_1": 120.0,
}
WHOLE = {"t_web/tokens": 15.0, "t_code/tokens": 150.0, "t_web/loss": 2.0}


def test_what_remains_is_printed_beside_the_whole() -> None:
    snapshot = made().reduce()
    assert snapshot.as_dict("t") == WHOLE
    for by in ("layer", ["layer"], {"tokens": "layer"}, {"tokens": ("layer",), "loss": ()}):
        assert snapshot.as_dict("t", by=by) == WHOLE | LAYERS
    both = snapshot.as_dict("t", by={"tokens": ("expert", "layer")})
    assert both["t_web/tokens/expert_2/layer_1"] == 5.0
    assert len(both) == len(WHOLE) + 12


def test_an_aggregator_says_once_for_all_what_remains_and_a_call_says_otherwise() -> None:
    aggregator = made(by="layer")
    assert aggregator.get_metrics_for_logging("t") == WHOLE | LAYERS
    snapshot = aggregator.reduce()
    assert snapshot.as_dict("t", by=()) == WHOLE
    assert snapshot.value("web", "tokens/layer_1", window="run") == 12.0
    assert snapshot.names("*tokens*") == [("code", "tokens"), ("web", "tokens")]


def test_totals_over_datasets_have_the_cells_too() -> None:
    found = made().reduce().as_dict("t", rollup=True, by="layer")
    assert found["t/tokens"] == 165.0
    assert (found["t/tokens/layer_0"], found["t/tokens/layer_1"]) == (33.0, 132.0)


def test_a_logger_writes_what_remains(tmp_path: Any) -> None:
    aggregator = made(by="expert")
    with MetricsLogger([JSONLSink(tmp_path / "run.jsonl")]) as logger:
        logger.log(1, aggregator, prefix="t", rollup=False)
        logger.log(2, aggregator, prefix="t", rollup=False, by={"tokens": "layer"}, window="run")
        with pytest.raises(TypeError, match="name an axis"):
            logger.log(3, aggregator, prefix="t", by=3)  # type: ignore[arg-type]
    first, second = read_jsonl(tmp_path / "run.jsonl")
    assert first.metrics["t_web/tokens/expert_1"] == 5.0
    assert second.metrics == WHOLE | LAYERS


def test_a_logger_leaves_out_an_axis_that_is_not_there_and_says_so_once(
    tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    aggregator = made()
    with (
        caplog.at_level(logging.WARNING, "metricfold"),
        MetricsLogger([JSONLSink(tmp_path / "run.jsonl")]) as logger,
    ):
        for step in (1, 2):
            logger.log(
                step, aggregator, prefix="t", by={"tokens": "layr", "loss": "rank"}, window="run"
            )
            logger.flush()
    assert len(read_jsonl(tmp_path / "run.jsonl")) == 2
    said = [one.getMessage() for one in caplog.records if "layr" in one.getMessage()]
    assert len(said) == 2, "once for each dataset"
    assert "'layer', 'expert'" in said[0]


@pytest.mark.parametrize(
    ("by", "error", "says"),
    [
        ({"tokens": "layr"}, ValueError, "'layr' of metric 'tokens'.*'layer', 'expert'"),
        ({"tokens": ("layer", "layr")}, ValueError, "'layr'"),
        ({"loss": "layer"}, ValueError, "metric 'loss'.*none"),
        (("layer", "layer"), ValueError, "twice"),
        (3, TypeError, "name an axis"),
        ({"tokens": 3}, TypeError, "name an axis"),
        ({3: "layer"}, TypeError, "3 is no name"),
        (b"layer", TypeError, "name an axis"),
        ([("tokens", "layer")], TypeError, "name an axis"),
    ],
)
def test_what_are_no_axes_is_refused_in_words(by: Any, error: type[Exception], says: str) -> None:
    snapshot = made().reduce()
    with pytest.raises(error, match=says):
        snapshot.as_dict("t", by=by)
    assert snapshot.as_dict("t") == WHOLE
    if error is TypeError or "twice" in says:
        with pytest.raises(error, match=says):
            MetricsAggregator(by=by)


@pytest.mark.parametrize(
    ("by", "says"),
    [
        ({"tokns": "layer"}, "'tokns', which no metric so far is called"),
        ("layr", "'layr', which no metric so far has as an axis"),
    ],
)
def test_what_by_names_and_never_comes_is_said_once_and_not_at_first(by: Any, says: str) -> None:
    aggregator = made(by=by)
    for _ in range(3):
        aggregator.record("loss", 1.0, dataset="web")
        aggregator.get_metrics_for_logging("t")
    aggregator.record("loss", 1.0, dataset="web")
    with pytest.warns(RuntimeWarning, match=says):
        aggregator.get_metrics_for_logging("t")
    aggregator.record("loss", 1.0, dataset="web")
    aggregator.get_metrics_for_logging("t")


def test_labels_that_do_not_go_with_values_are_refused_as_in_torchmetrics_3472_they_were_not() -> (
    None
):
    for labels, says in ((["cat", "dog"], r"\(3,\).*\(2,\)"), (["cat", "cat", "dog"], "twice")):
        with pytest.raises(ValueError, match=says):
            MetricsAggregator().record("acc", np.ones(3), axes={"class": labels})


def test_a_class_that_no_batch_had_is_no_zero_as_in_torchmetrics_174() -> None:
    aggregator = MetricsAggregator(by="class")
    classes = {"class": ["a", "b", "c"]}
    for recalls, counts in (([1.0, 0.0, np.nan], [3, 0, 0]), ([0.0, 1.0, np.nan], [1, 2, 0])):
        aggregator.record("recall", np.array(recalls), axes=classes, weight=np.array(counts))
    snapshot = aggregator.reduce()
    found = snapshot.as_dict("t")
    assert found == {"t/recall": 5 / 6, "t/recall/class_a": 0.75, "t/recall/class_b": 1.0}
    np.testing.assert_equal(snapshot.array(None, "recall", window="run")[0], [0.75, 1.0, np.nan])


def test_a_balance_is_of_each_layer_as_in_vllm_39178_it_was_not() -> None:
    aggregator = MetricsAggregator()
    tokens = np.array([[8, 0], [0, 8]])  # over the layers, each expert got as many
    aggregator.record("tokens", tokens, "sum", axes={"layer": 2, "expert": 2})
    aggregator.derive("balance", lambda m: (m["tokens"].max(-1) / m["tokens"].mean(-1)).mean())
    aggregator.derive("dead", lambda m: (m["tokens"] == 0).sum())
    found = aggregator.reduce().as_dict("t")
    assert (found["t/balance"], found["t/dead"]) == (2.0, 2.0)


def test_names_are_padded_and_labels_are_printed_as_they_are() -> None:
    aggregator = MetricsAggregator(by={"n": ("parameter", "octave")})
    labels = ["a", "a.b", "a/b", "a-b"]
    values = np.arange(44.0).reshape(4, 11)
    aggregator.record("n", values, "max", axes={"parameter": labels, "octave": 11})
    found = aggregator.reduce().as_dict("t")
    for row, label in enumerate(sorted(labels)):
        for octave in range(11):
            # What an array holds stands in the order of labels, sorted; see `record`.
            place = labels.index(label)
            assert found[f"t/n/parameter_{label}/octave_{octave:02}"] == values[place, octave], row
    assert found["t/n"] == 43.0
    assert len(found) == 45


def test_derived_metrics_get_arrays_of_cells_for_datasets_and_for_all_together() -> None:
    aggregator = made()
    seen: list[Any] = []

    def imbalance(m: Any) -> Any:
        seen.append(m["tokens"])
        return (m["tokens"].max(-1) / m["tokens"].mean(-1)).max()

    aggregator.derive("imbalance", imbalance)
    aggregator.derive("double", lambda m: 2 * m["loss"])
    found = aggregator.reduce().as_dict("t", "auto", rollup=True)
    assert found["t_web/imbalance"] == found["t/imbalance"] == 2.0
    assert found["t/tokens"] == 165.0
    assert found["t_web/double"] == 4.0
    assert [one.tolist() for one in seen] == [(k * TOKENS).tolist() for k in (10, 1, 11)]
    with pytest.raises(ValueError, match="read-only"):
        seen[0][0] = 3.0


def test_arrays_of_a_derived_metric_speak_about_its_window() -> None:
    aggregator = MetricsAggregator()
    aggregator.derive("run", lambda m: m["t"].max(), window="run")
    aggregator.derive("interval", lambda m: m["t"].max(), window="interval")
    aggregator.derive("shown", lambda m: m["t"].max())
    for number in (1.0, 10.0):
        aggregator.record("t", np.array([number, 0.0]), "sum", axes={"a": 2})
        snapshot = aggregator.reduce()
    names = ("run", "interval", "shown")
    for window, shown in (
        ("auto", 11.0),
        ("interval", 10.0),
        ("run", 11.0),
        ({"t": "interval"}, 10.0),
    ):
        found = snapshot.as_dict("t", window)
        assert [found[f"t/{name}"] for name in names] == [11.0, 10.0, shown]
    aggregator.record("other", 1.0)
    later = aggregator.reduce().as_dict("t", "interval")
    assert "t/interval" not in later, "nothing came in"


@pytest.mark.parametrize("agg", ["sum", "mean", "max"])
def test_a_cell_that_nothing_came_to_is_zero_of_a_sum_and_no_number_of_others(agg: str) -> None:
    aggregator = MetricsAggregator()
    aggregator.record("t", np.array([3.0, 1.0]), agg, axes={"a": 3}, ids={"a": [0, 2]})
    snapshot = aggregator.reduce()
    none = 0.0 if agg == "sum" else np.nan
    np.testing.assert_equal(snapshot.array(None, "t", window="run")[0], [3.0, none, 1.0])
    # What is printed is what came in.
    assert sorted(snapshot.as_dict("t", by="a")) == ["t/t", "t/t/a_0", "t/t/a_2"]
    aggregator.record("other", 1.0)
    later = aggregator.reduce()
    np.testing.assert_equal(later.array(None, "t", window="interval")[0], [np.nan] * 3)


def test_datasets_whose_axes_differ_have_no_array_together() -> None:
    aggregator = MetricsAggregator()
    aggregator.record("t", np.ones(2), "sum", axes={"a": 2}, dataset="x")
    aggregator.record("t", np.ones(3), "sum", axes={"a": 3}, dataset="y")
    aggregator.derive("most", lambda m: m["t"].max())
    snapshot = aggregator.reduce()
    found = snapshot.as_dict("t", rollup=True)
    assert found["t/t"] == 5.0
    assert found["t_x/most"] == found["t_y/most"] == 1.0
    assert "t/most" not in found
    with pytest.raises(ValueError, match=r"axes a=2.*axes a=3"):
        snapshot.array(None, "t")
    assert sorted(snapshot.arrays("t", rollup=True)) == ["t_x/t", "t_y/t"]


ROUTES = pytest.mark.parametrize("route", ["gather", "tree"])


@ROUTES
@pytest.mark.parametrize("per_rank", [False, True])
def test_each_ranks_own_is_an_axis_of_the_interval(route: str, *, per_rank: bool) -> None:
    def rank(communicator: Any) -> Any:
        aggregator = MetricsAggregator(communicator=communicator, route=route)
        for step in range(2):
            values = np.array([1.0, 2.0]) * (communicator.rank + 1) * (10**step)
            if communicator.rank != 1 or step == 0:
                aggregator.record("t", values, "sum", axes={"a": 2}, per_rank=per_rank)
            aggregator.record("loss", float(communicator.rank + 10 * step), per_rank=per_rank)
            snapshot = aggregator.reduce()
        return snapshot

    snapshot = run_threads(rank, 3)[0]
    by: Any = {"loss": "rank", "t": ("a", "rank")}
    if route == "tree" and not per_rank:
        for ask in (
            lambda: snapshot.array(None, "loss", by="rank"),
            lambda: snapshot.as_dict("t", "interval", by=by),
        ):
            with pytest.raises(ValueError, match=r"not known per rank.*per_rank=True"):
                ask()
        assert "t/loss/rank_0" not in snapshot.as_dict("t", "interval", by="rank")
        return
    values, (ranks,) = snapshot.array(None, "loss", by="rank")
    assert (values.tolist(), ranks) == ([10.0, 11.0, 12.0], ("0", "1", "2"))
    assert values.tolist() == snapshot.per_rank(None, "loss")
    cells, labels = snapshot.array(None, "t", by=("rank", "a"))
    np.testing.assert_equal(cells, [[10, 20], [0, 0], [30, 60]])
    assert labels == (("0", "1", "2"), ("0", "1"))
    np.testing.assert_equal(snapshot.array(None, "t", by="rank")[0], [30, 0, 90])
    assert snapshot.per_rank(None, "t") == [30.0, None, 90.0]
    with pytest.raises(ValueError, match="about the interval, and not about the run"):
        snapshot.array(None, "t", by="rank", window="run")
    found = snapshot.as_dict("t", "interval", by=by)
    assert found == {
        "t/loss": 11.0,
        "t/t": 120.0,
        "t/loss/rank_0": 10.0,
        "t/loss/rank_1": 11.0,
        "t/loss/rank_2": 12.0,
        "t/t/a_0/rank_0": 10.0,
        "t/t/a_0/rank_2": 30.0,
        "t/t/a_1/rank_0": 20.0,
        "t/t/a_1/rank_2": 60.0,
    }
    assert sorted(snapshot.as_dict("t", "run", by=by)) == ["t/loss", "t/t"]
    # A SUM is shown of the run, which no rank has of its own.
    assert not any("/t/a" in key for key in snapshot.as_dict("t", "auto", by=by))


def test_ranks_own_values_are_in_no_checkpoint() -> None:
    def rank(communicator: Any) -> Any:
        aggregator = MetricsAggregator(communicator=communicator, by={"loss": "rank"})
        aggregator.record("loss", float(communicator.rank))
        return aggregator.state_dict()

    state = run_threads(rank, 2)[0]
    aggregator = MetricsAggregator(by="rank")
    aggregator.load_state_dict(state)
    assert aggregator.get_metrics_for_logging("t") == {"t/loss": 0.5}


def test_a_name_that_was_recorded_stays_where_a_ranks_own_would_print_the_same() -> None:
    aggregator = MetricsAggregator(by="rank")
    aggregator.record("loss", 1.0)
    aggregator.record("loss/rank_0", 7.0)
    snapshot = aggregator.reduce()
    with pytest.warns(RuntimeWarning, match="'loss/rank_0', which is a metric of its own"):
        assert snapshot.as_dict("t")["t/loss/rank_0"] == 7.0
    with pytest.raises(ValueError, match="'loss/rank_0', which is a metric of its own"):
        snapshot.as_dict("t", by={"loss": "rank"})


def test_distributions_and_counts_have_ranks_and_are_not_printed_by_them() -> None:
    aggregator = MetricsAggregator(by="rank")
    aggregator.record("len", np.array([1.0, 2.0]), "distribution", each=True)
    aggregator.record("kind", "red", "categorical_count")
    snapshot = aggregator.reduce()
    assert snapshot.array(None, "len", by="rank")[0].tolist() == [1.5]
    assert snapshot.array(None, "kind", by="rank")[0].tolist() == [1.0]
    assert snapshot.as_dict("t", "interval") == made_plain()


def made_plain() -> dict[str, float]:
    aggregator = MetricsAggregator()
    aggregator.record("len", np.array([1.0, 2.0]), "distribution", each=True)
    aggregator.record("kind", "red", "categorical_count")
    return aggregator.reduce().as_dict("t", "interval")


@ROUTES
def test_owner_tied_and_lacking_speak_of_cells(route: str) -> None:
    def rank(communicator: Any) -> Any:
        aggregator = MetricsAggregator(communicator=communicator, route=route)
        number = communicator.rank
        aggregator.record(
            "m",
            np.array([float(number), 5.0, -float(number)])[[number % 3, 1]],
            "max",
            axes={"a": 3},
            ids={"a": [number % 3, 1] if number % 3 != 1 else [0, 1]},
            per_rank=True,
        )
        return aggregator.reduce()

    snapshot = run_threads(rank, 3)[0]
    assert snapshot.owner(None, "m") == 0
    assert snapshot.owner(None, "m", by="a") == {"a_0": 1, "a_1": 0, "a_2": 2}
    assert snapshot.tied(None, "m", by="a") == {"a_0": 1, "a_1": 3, "a_2": 1}
    assert snapshot.lacking(None, "m", by=("a",)) == {"a_0": [2], "a_1": [], "a_2": [0, 1]}
    assert snapshot.owner(None, "m", "run", by="a")["a_1"] == 0
    for wrong in ("b", "rank", ()):
        with pytest.raises(ValueError, match="by="):
            snapshot.owner(None, "m", by=wrong)


def test_who_lacks_a_cell_is_not_known_where_ranks_merge_on_the_way() -> None:
    def rank(communicator: Any) -> Any:
        aggregator = MetricsAggregator(communicator=communicator, route="tree")
        value = np.array([np.nan, 1.0]) if communicator.rank else np.ones(2)
        aggregator.record("m", value, "max", axes={"a": 2})
        return aggregator.reduce()

    snapshot = run_threads(rank, 2)[0]
    assert snapshot.lacking(None, "m") == []
    assert snapshot.owner(None, "m") == 1
    assert snapshot.owner(None, "m", by="a") == {"a_0": None, "a_1": 0}
    with pytest.raises(ValueError, match="not known per rank"):
        snapshot.lacking(None, "m", by="a")


def test_rules_see_metrics_alone_whatever_a_rank_prints() -> None:
    def rank(communicator: Any) -> list[tuple[str | None, str]]:
        by: Any = "layer" if communicator.rank == 0 else ()
        aggregator = made(communicator=communicator, by=by)
        seen: list[Any] = []
        aggregator.alert_on(lambda snapshot, memory: seen.append(snapshot.names("*tokens*")))
        aggregator.reduce()
        return seen

    one, other = run_threads(rank, 2)
    assert one == other == [[("code", "tokens"), ("web", "tokens")]]


def test_a_ranks_own_minimum_of_zero_has_one_sign_on_both_exchanges() -> None:
    """On the tree it was -0.0."""

    def rank(communicator: Any, route: str) -> bytes:
        aggregator = MetricsAggregator(communicator=communicator, route=route)
        if communicator.rank == 0:
            aggregator.record("low", 0.0, "min", per_rank=True)
            aggregator.record("high", -0.0, "max", per_rank=True)
        snapshot = aggregator.reduce()
        return b"".join(
            snapshot.array(None, one, by="rank")[0].tobytes() for one in ("low", "high")
        )

    assert run_threads(rank, 2, "gather") == run_threads(rank, 2, "tree")


@pytest.mark.parametrize(
    ("how", "error", "says"),
    [
        ({"name": "loss"}, ValueError, "'loss' of dataset 'web' has no axes: value"),
        ({"name": "loss", "by": "layer"}, ValueError, "has the axes none, but not 'layer'"),
        ({"name": "tokens", "by": ("layer", "layr")}, ValueError, "layer, expert, but not 'layr'"),
        ({"name": "tokens", "by": ("layer", "layer")}, ValueError, "twice"),
        ({"name": "tokens", "by": 3}, TypeError, "name an axis"),
        ({"name": "tokns"}, KeyError, "tokens"),
        ({"name": "tokens", "window": "later"}, ValueError, "window"),
        ({"name": "own"}, ValueError, "handler without lanes"),
    ],
)
def test_an_array_that_cannot_be_is_refused_in_words(
    how: dict[str, Any], error: type[Exception], says: str
) -> None:
    aggregator = made()
    aggregator.register_handler("custom", RMSHandler())
    aggregator.record("own", 1.0, "custom", dataset="web")
    with pytest.raises(error, match=says):
        aggregator.reduce().array("web", **how)


def over_processes(rank: int, path: str) -> None:
    for route in ("gather", "tree"):
        aggregator = MetricsAggregator(route=route, by={"tokens": "layer", "loss": "rank"})
        aggregator.derive("most", lambda m: m["tokens"].max())
        sinks = [JSONLSink(f"{path}/{route}.jsonl")]
        with MetricsLogger(sinks) as logger:
            for step in (1, 2):
                mine = np.array([[1.0, 2.0, 3.0]]) * 10**rank
                aggregator.record(
                    "tokens", mine, "sum", axes=AXES, ids={"layer": [rank]}, dataset="web"
                )
                aggregator.record("loss", float(rank), per_rank=True)
                logger.log(step, aggregator, prefix="t")


def test_processes_that_hold_parts_of_an_axis_write_the_same_on_both_exchanges(
    tmp_path: Any,
) -> None:
    run_ranks(over_processes, 2, str(tmp_path))
    gather, tree = (read_jsonl(tmp_path / f"{route}.jsonl") for route in ("gather", "tree"))
    assert [one.metrics for one in gather] == [one.metrics for one in tree]
    assert [one.arrays.keys() for one in gather] == [{"t/tokens", "t_web/tokens"}] * 2
    last = gather[1].metrics
    assert (last["t_web/tokens/layer_0"], last["t_web/tokens/layer_1"]) == (12.0, 120.0)
    assert (last["t/loss/rank_0"], last["t/loss/rank_1"], last["t_web/most"]) == (0.0, 1.0, 60.0)
    for one, other in zip(gather, tree, strict=True):
        for key, array in one.arrays.items():
            np.testing.assert_equal(array, other.arrays[key])
