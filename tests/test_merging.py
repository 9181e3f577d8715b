"""`merge_state_dicts`: states of separate jobs become that of one job that saw all."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from handlers_of_users import LaneRMS, MyTypes, ProductHandler, RMSHandler
from ranks import run_threads

from metricfold import AggregationType, Metric, MetricBatch, MetricsAggregator, merge_state_dicts

DISTRIBUTION = AggregationType.DISTRIBUTION
JOBS = [list(range(1, 31)), list(range(31, 51)), list(range(51, 61))]
EVERYTHING = [value for values in JOBS for value in values]


def new(window: int | None = 1000, **options: Any) -> MetricsAggregator:
    aggregator = MetricsAggregator(window, **options)
    aggregator.register_handler(MyTypes.RMS, RMSHandler())
    aggregator.register_handler(MyTypes.PRODUCT, ProductHandler())
    aggregator.register_handler("lane rms", LaneRMS())
    return aggregator


def feed(aggregator: MetricsAggregator, values: list[int]) -> MetricsAggregator:
    for value in values:
        aggregator.update(
            [
                Metric("d", "sum", value, AggregationType.SUM),
                Metric("d", "mean", value / 3, AggregationType.MEAN, value),
                Metric("d", "max", value, AggregationType.MAX),
                Metric("d", "min", value, AggregationType.MIN),
                Metric("d", "rate", value, AggregationType.RATE),
                Metric("d", "len", value, DISTRIBUTION),
                Metric("d", "weighted", value, DISTRIBUTION, 1 + value % 3),
                Metric("d", "kind", "even" if value % 2 == 0 else "odd", "categorical_count"),
                Metric("d", "rms", value, MyTypes.RMS),
                Metric("d", "lane", value, "lane rms"),
                Metric("d", "product", 2, MyTypes.PRODUCT),
                Metric(f"of {value % 4}", "sum", value, AggregationType.SUM),
            ]
        )
        aggregator.record("loss", value)
    return aggregator


def drain(aggregator: MetricsAggregator, values: list[int]) -> MetricsAggregator:
    torch = pytest.importorskip("torch")
    from metricfold.torch import DeviceAccumulator

    acc = DeviceAccumulator({"loss": "mean", "top": "max", "len": "distribution"}, ("dev",))
    acc.update_all(dict.fromkeys(("loss", "top", "len"), torch.tensor(values).float()))
    aggregator.drain(acc)
    return aggregator


def on_rank(
    communicator: Any, values: list[int], window: int | None, take_in: Callable[..., Any]
) -> dict[str, Any]:
    """Save in the middle of the second interval."""
    aggregator = new(window, communicator=communicator)
    mine = values[communicator.rank :: communicator.world_size]
    half = len(mine) // 2
    take_in(aggregator, mine[:half])
    aggregator.reduce()
    take_in(aggregator, mine[half:])
    return aggregator.state_dict()


def job(
    values: list[int], ranks: int = 1, window: int | None = 1000, take_in: Any = feed
) -> dict[str, Any]:
    return run_threads(on_rank, ranks, values, window, take_in)[0]


def resumed(communicator: Any, state: dict[str, Any], window: int | None) -> dict[str, float]:
    aggregator = new(window, communicator=communicator)
    aggregator.load_state_dict(state)
    return aggregator.reduce().as_dict("t")


def told(state: dict[str, Any], ranks: int = 1, window: int | None = 1000) -> dict[str, float]:
    """Return what the run says once the state is loaded, but for the rate: the clock goes on."""
    found = run_threads(resumed, ranks, state, window)[0]
    found.pop("t_d/rate", None)
    return found


def seconds(state: dict[str, Any]) -> float:
    return json.loads(state["payload"])["content"]["run"]["seconds"]


def close(found: dict[str, float], expected: dict[str, float]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-12), name


# -- One job that saw all ---------------------------------------------------------------------------


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("window", [1000, None])
def test_jobs_on_1_2_and_4_ranks_merge_to_one_that_saw_all(
    window: int | None, parallel: bool
) -> None:
    states = [job(values, ranks, window) for values, ranks in zip(JOBS, (1, 4, 2), strict=True)]
    merged = merge_state_dicts(states, parallel=parallel)
    assert set(merged) == {"format", "version", "payload"}
    expected = told(job(EVERYTHING, 1, window), 1, window)
    assert expected["t_d/sum"] == sum(EVERYTHING)
    for ranks in (1, 2, 4):
        close(told(merged, ranks, window), expected)
        close(told(json.loads(json.dumps(merged)), ranks, window), expected)


def test_what_devices_sent_merges_too() -> None:
    states = [
        job(values, ranks, take_in=drain) for values, ranks in zip(JOBS, (1, 2, 1), strict=True)
    ]
    expected = told(job(EVERYTHING, take_in=drain))
    assert expected["t_dev/len_stat_count"] == 60
    close(told(merge_state_dicts(states, parallel=True)), expected)
    # Also with what a host recorded, in an aggregator that keeps all values.
    host = new(None)
    for value in EVERYTHING:
        host.record("len", value, "distribution", dataset="dev")
    both = merge_state_dicts([*states, host.state_dict()], parallel=True)
    found = told(both, window=None)
    assert found["t_dev/len_stat_count"] == 120
    assert found["t_dev/len_stat_p50"] == np.quantile(EVERYTHING * 2, 0.5)


def test_more_values_than_are_kept_merge_as_histograms() -> None:
    rng = np.random.default_rng(0)
    values = [rng.lognormal(1, 2, size) for size in (3000, 700, 900)]
    states = []
    for part in values:
        aggregator = MetricsAggregator(None)
        aggregator.update([Metric("d", "x", float(v), DISTRIBUTION) for v in part])
        states.append(aggregator.state_dict())
    found = told(merge_state_dicts(states, parallel=True), window=None)
    together = np.concatenate(values)
    assert found["t_d/x_stat_count"] == together.size
    assert found["t_d/x_stat_max"] == together.max()
    assert found["t_d/x_stat_mean"] == pytest.approx(together.mean(), rel=1e-9)
    for q in (5, 50, 95):
        exact = np.quantile(together, q / 100)
        assert found[f"t_d/x_stat_p{q:02d}"] == pytest.approx(exact, rel=2**-6)


@pytest.mark.parametrize("window", [1000, None])
def test_neither_order_nor_nesting_matters(window: int | None) -> None:
    states = [job(values, 1, window) for values in JOBS]
    expected = told(merge_state_dicts(states, parallel=True), 1, window)
    for order in itertools.permutations(states):
        one, two, three = order
        for merged in (
            merge_state_dicts(order, parallel=True),
            merge_state_dicts([merge_state_dicts([one, two], parallel=True), three], parallel=True),
            merge_state_dicts(
                [one, merge_state_dicts([two, three], parallel=False)], parallel=False
            ),
        ):
            close(told(merged, 1, window), expected)


def test_one_state_is_itself_and_empty_ones_add_nothing() -> None:
    state, empty = job(JOBS[0]), new().state_dict()
    expected = told(state)
    for states in ([state], [empty, state], [state, empty, empty]):
        for parallel in (True, False):
            close(told(merge_state_dicts(iter(states), parallel=parallel)), expected)
    assert told(merge_state_dicts([empty, empty], parallel=True)) == {}


def test_a_merged_run_goes_on_and_can_be_saved_and_merged_again() -> None:
    first = merge_state_dicts([job(JOBS[0]), job(JOBS[1])], parallel=True)
    aggregator = new()
    aggregator.load_state_dict(first)
    feed(aggregator, JOBS[2])
    again = aggregator.state_dict()
    close(told(again), told(job(EVERYTHING)))
    extra = [2, 4]
    close(
        told(merge_state_dicts([again, job(extra)], parallel=True)),
        told(job([*EVERYTHING, *extra])),
    )


def test_a_state_that_is_given_twice_counts_twice_and_is_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    state, empty = job(JOBS[2]), new().state_dict()
    with caplog.at_level("WARNING", logger="metricfold"):
        twice = merge_state_dicts([empty, state, empty, state], parallel=True)
    assert told(twice)["t_d/sum"] == 2 * sum(JOBS[2])
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("states[3] is the same as states[1], and counts again: every rank of")


# -- What is dropped, and what depends on `parallel` ------------------------------------------------


def test_the_open_interval_counts_in_the_run_and_begins_anew() -> None:
    aggregator = new()
    aggregator.load_state_dict(merge_state_dicts([job(JOBS[0]), job(JOBS[1])], parallel=True))
    aggregator.record("since", 1.0)
    snapshot = aggregator.reduce()
    assert snapshot.as_dict("t", "interval") == {"t/since": 1.0}
    assert snapshot.as_dict("t")["t_d/sum"] == sum(JOBS[0] + JOBS[1])
    assert snapshot.owner("d", "max", "run") is None
    assert snapshot.tied("d", "max", "run") == 0


def test_wall_time_is_that_of_the_longest_or_adds_up() -> None:
    states = [job(JOBS[0]), job(JOBS[1])]
    one, other = map(seconds, states)
    assert one > 0 < other
    assert seconds(merge_state_dicts(states, parallel=True)) == max(one, other)
    assert seconds(merge_state_dicts(states, parallel=False)) == pytest.approx(one + other)


def recent_mean(states: list[Any], *, parallel: bool, ranks: int = 1) -> tuple[float, float]:
    logged = told(merge_state_dicts(states, parallel=parallel), ranks, 4)
    return logged["t_d/len_stat_mean"], logged["t_d/len_stat_count"]


def test_recent_values_are_the_last_jobs_or_those_of_all_that_ran_side_by_side() -> None:
    one, other = (job(values, window=4) for values in ([1, 2, 3, 4, 5], [6, 7, 8, 9]))
    # One after the other: as one job that saw all, on as many ranks.
    assert recent_mean([one, other], parallel=False) == (7.5, 4)
    assert recent_mean([other, one], parallel=False) == (3.5, 4)
    # Side by side each job is a rank: of each the newest.
    assert recent_mean([one, other], parallel=True) == (np.mean([4, 5, 8, 9]), 4)
    for parallel in (True, False):
        kept = recent_mean([one, other], parallel=parallel, ranks=2)
        assert kept == (np.mean([2, 3, 4, 5, 6, 7, 8, 9]), 8)


def test_a_merged_state_holds_as_many_recent_values_as_any_checkpoint() -> None:
    states = []
    for job_number in range(3):
        aggregator = MetricsAggregator(40_000)
        values = np.full(40_000, float(job_number))
        aggregator.record("len", 0.0, "distribution")
        aggregator.update([Metric("d", "x", value, DISTRIBUTION) for value in values.tolist()])
        states.append(aggregator.state_dict())
    for parallel in (True, False):
        merged = merge_state_dicts(states, parallel=parallel)
        content = json.loads(merged["payload"])["content"]
        (windows,) = [windows for key, windows in content["windows"] if key == ["d", "x"]]
        values = np.concatenate(
            [np.frombuffer(base64.b64decode(w["values"]), dtype="<f8") for w in windows]
        )
        assert 65_000 < values.size <= 65_536
        shares = [int((values == number).sum()) for number in range(3)]
        if parallel:
            assert shares == [values.size // 3] * 3
        else:
            assert shares == [0, 25_536, 40_000]


def categories(names: str, most: int) -> dict[str, Any]:
    aggregator = MetricsAggregator(max_categories=most)
    aggregator.update([Metric("d", "kind", name, "categorical_count") for name in names])
    return aggregator.state_dict()


@pytest.mark.filterwarnings("error")
def test_categories_beyond_the_bound_of_whoever_loads_are_counted_together() -> None:
    states = [categories("aaz", 3), categories("mz", 3), categories("bbby", 3)]
    for order in itertools.permutations(states):
        merged = merge_state_dicts(order, parallel=True)
        for most, expected in (
            (2, {"a": 2, "b": 3, "__other__": 4}),
            (3, {"a": 2, "b": 3, "m": 1, "__other__": 3}),
            (9, {"a": 2, "b": 3, "m": 1, "y": 1, "z": 2}),
        ):
            aggregator = MetricsAggregator(max_categories=most)
            aggregator.load_state_dict(merged)
            logged = aggregator.get_metrics_for_logging("t")
            assert logged == {f"t_d/kind_count_{name}": n for name, n in expected.items()}


def test_a_job_that_met_its_bound_of_categories_loses_no_count() -> None:
    full = categories("abcde", 3)  # tells a, b and c apart
    for order in itertools.permutations([full, categories("dd", 3), full]):
        aggregator = MetricsAggregator(max_categories=4)
        aggregator.load_state_dict(merge_state_dicts(order, parallel=False))
        logged = aggregator.get_metrics_for_logging("t")
        assert logged == {
            **{f"t_d/kind_count_{name}": 2 for name in "abcd"},
            "t_d/kind_count___other__": 4,
        }


# -- What cannot be merged --------------------------------------------------------------------------


def recorded(name: str, agg: Any, value: Any = 1.0, **options: Any) -> dict[str, Any]:
    aggregator = new(**options)
    aggregator.update([Metric("d", name, value, agg)])
    return aggregator.state_dict()


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        (
            recorded("x", "sum"),
            recorded("x", "mean"),
            (
                r"metric 'x' of dataset 'd' is of kind 'sum' with 3 SUM .* in states\[0\], but of kind "
                r"'mean' with 4 SUM and 0 MAX lanes in states\[1\]"
            ),
        ),
        (
            recorded("x", "distribution"),
            recorded("x", "distribution", window=None),
            "'distribution' of recent values in states.0., but of kind 'distribution' of all",
        ),
        (
            recorded("x", MyTypes.RMS),
            recorded("x", "lane rms"),
            r"'handlers_of_users.MyTypes.RMS' with no lanes .* 'lane rms' with 3 SUM",
        ),
        (
            recorded("x", "distribution"),
            recorded("x_stat_mean", "sum"),
            r"states\[1\]: metric 'x_stat_mean' of dataset 'd' would print",
        ),
    ],
)
def test_other_kinds_under_one_name_are_refused_and_named(
    one: dict[str, Any], other: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        merge_state_dicts([one, other], parallel=True)


def forged(change: Callable[[Any], None]) -> dict[str, Any]:
    """Return a state that says something else, under a checksum that is right."""
    state = job([1, 2, 3])
    content = json.loads(state["payload"])["content"]
    change(content)
    text = json.dumps(content, separators=(",", ":"), sort_keys=True)
    checksum = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    payload = json.dumps({"checksum": checksum, "content": content})
    return {**state, "payload": payload}


def changes() -> dict[str, Callable[[Any], None]]:
    nan = base64.b64encode(np.array([np.nan]).tobytes()).decode()

    def window(content: Any) -> dict[str, Any]:
        return content["windows"][0][1][0]

    return {
        "no entries": lambda c: c.pop("entries"),
        "a key twice": lambda c: c["entries"].append(c["entries"][0]),
        "an unknown field": lambda c: c["entries"][0].update(color="red"),
        "an entry that is none": lambda c: c["entries"].append(3),
        "an entry less": lambda c: c["entries"].pop(),
        "sums that are cut": lambda c: c["run"].update(sums=""),
        "rounding that is cut": lambda c: c["run"].update(lost=""),
        "sums that are no base64": lambda c: c["run"].update(sums="ä"),
        "half a number": lambda c: c["run"].update(sums="AAAA"),
        "time that runs backwards": lambda c: c["run"].update(seconds=-1),
        "endless time": lambda c: c["run"].update(seconds=float("inf")),
        "no time": lambda c: c["run"].update(seconds=None),
        "a pool of a sum": lambda c: c["run"]["pools"].append([["d", "sum"], window(c)]),
        "a window of a sum": lambda c: c["windows"].append([["d", "sum"], [window(c)]]),
        "a window that is none": lambda c: c["windows"].append([["d", "len"], [3]]),
        "a value that is no number": lambda c: window(c).update(values=nan, fresh=0),
        "a weight too many": lambda c: window(c).update(weights=nan),
        "more fresh values than there are": lambda c: window(c).update(fresh=99),
        "a histogram that is none": lambda c: window(c).update(older={"m": 3}),
        "a state of a sum": lambda c: c["custom"]["run"][0].update(name="sum"),
        "a state of another type": lambda c: c["custom"]["run"][0].update(type="lane rms"),
        "a state that is none": lambda c: c["custom"]["run"].append("x"),
        "no states of custom handlers": lambda c: c.update(custom={}),
    }


@pytest.mark.parametrize("name", changes())
def test_a_forged_state_is_a_value_error_that_has_changed_nothing(name: str) -> None:
    bad, good = forged(changes()[name]), job([4, 5])
    with pytest.raises(ValueError, match=r"^states\[1\]: the state's payload is not what"):
        merge_state_dicts([good, bad], parallel=True)
    aggregator = feed(new(), [7])
    with pytest.raises(ValueError, match="load an earlier checkpoint"):
        aggregator.load_state_dict(bad)
    assert aggregator.get_metrics_for_logging("t")["t_d/sum"] == 7


@pytest.mark.parametrize(
    ("states", "error", "message"),
    [
        ([], ValueError, "there is no state to merge"),
        ([{"model": 1}], ValueError, r"states\[0\]: this is no state of a MetricsAggregator"),
        ([None], ValueError, r"states\[0\]: this is no state"),
        (recorded("x", "sum"), TypeError, "a single one: give"),
    ],
)
def test_what_is_no_list_of_states_is_refused(states: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        merge_state_dicts(states, parallel=True)


def test_whether_the_jobs_ran_side_by_side_must_be_said() -> None:
    state = recorded("x", "sum")
    with pytest.raises(TypeError, match="parallel"):
        merge_state_dicts([state])
    with pytest.raises(TypeError, match="parallel=None: say True if the jobs ran side by side"):
        merge_state_dicts([state], parallel=None)


# -- Workers that send what they measured -------------------------------------------------------------


def test_batches_that_workers_send_to_a_controller_count_as_if_it_had_measured_them() -> None:
    controller, alone = MetricsAggregator(), MetricsAggregator()
    for values in ([1.0, 2.0], [3.0, 4.0, 5.0]):
        metrics = [
            metric
            for value in values
            for metric in (
                Metric("env", "reward", value, AggregationType.MEAN),
                Metric("env", "length", value, DISTRIBUTION),
            )
        ]
        sent = pickle.dumps(MetricBatch.from_metrics(metrics))
        controller.update(pickle.loads(sent))
        alone.update(metrics)
    logged = controller.get_metrics_for_logging()
    assert (logged["data_env/reward"], logged["data_env/length_stat_p50"]) == (3.0, 3.0)
    assert logged == alone.get_metrics_for_logging()


def test_the_lines_for_shards_of_an_evaluation_pool_what_all_have_seen(
    tmp_path: Path,
) -> None:
    page = (Path(__file__).parent.parent / "docs" / "checkpoints.md").read_text("utf-8")
    (block,) = [one for one in page.split("```python\n") if one.startswith("# In each job")]
    each, done = block.split("```")[0].split("# When all are done\n")
    first = 'folder, shard = ".", 0\n'
    rewards = "(0.5, 1.0)"
    assert first in each
    assert rewards in each
    names = "import json\nfrom pathlib import Path\nfrom metricfold import *\n"
    for shard, seen in enumerate([[1.0, 2.0], [3.0, 4.0, 5.0]]):
        of_shard = each.replace(first, "").replace(rewards, str(seen))
        exec(names + of_shard, {"folder": tmp_path, "shard": shard})
    namespace = {"folder": tmp_path}
    exec(names + done, namespace)
    assert namespace["total"].get_metrics_for_logging("eval") == {"eval_env/reward": 3.0}
