"""What earlier versions wrote is read for good: the files in `golden`, and the numbers beside them.

`golden/make.py` says what is in them and which version made them.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import pickle
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from handlers_of_users import LaneRMS, MyTypes, ProductHandler, RMSHandler
from ranks import run_threads

from metricfold import MetricsAggregator, read_jsonl
from metricfold._core.intake.checkpoint import decode, encode
from metricfold.sinks import TensorBoardSink, WandbSink

GOLDEN = Path(__file__).parent / "golden"
CHECKPOINTS = GOLDEN / "checkpoints"
STATES = sorted(path.stem for path in CHECKPOINTS.glob("*-*.json"))


def parsed(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def check(found: dict[str, float], expected: dict[str, float], rel: float = 1e-12) -> None:
    """Check numbers: those that are whole to the bit."""
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        if math.isnan(wanted):
            assert math.isnan(found[name]), name
        elif wanted == round(wanted) and "stat_p" not in name and "std" not in name:
            assert found[name] == pytest.approx(wanted, rel=1e-15), name
        else:
            assert found[name] == pytest.approx(wanted, rel=rel), name


# -- Checkpoints ----------------------------------------------------------------------------------


def resumed(communicator: Any, route: str, bounded: bool) -> MetricsAggregator:
    aggregator = MetricsAggregator(
        16 if bounded else None,
        communicator=communicator,
        route=route,
        max_categories=3,
        on_nan="propagate" if bounded else "skip",
    )
    aggregator.register_handler(MyTypes.RMS, RMSHandler())
    aggregator.register_handler(MyTypes.PRODUCT, ProductHandler())
    aggregator.register_handler("lane rms", LaneRMS())
    return aggregator


def seen(communicator: Any, state: dict[str, Any], route: str, bounded: bool) -> list[Any]:
    aggregator = resumed(communicator, route, bounded)
    aggregator.load_state_dict(state)
    aggregator.record("since", 1, "sum")
    snapshot = aggregator.reduce()
    return [snapshot.as_dict("t", view) for view in ("run", "interval")] + [
        snapshot.run_seconds,
        snapshot.seconds,
    ]


@pytest.mark.parametrize("name", STATES)
def test_a_checkpoint_of_either_version_counts_on_on_1_and_2_ranks(name: str) -> None:
    route, saved_on, window, interval = name.split("-")
    expected = parsed(CHECKPOINTS / "expected.json")
    metrics = expected["metrics"][f"{saved_on}-{window}-{interval}"]
    timers, drawn = expected["timers"][name], expected["drawn"].get(name)
    state = parsed(CHECKPOINTS / f"{name}.json")
    # Written again, which is in version 2, it says the same.
    again = encode(decode(state))
    assert (state["version"], again["version"]) == (1, 2)
    for ranks, version in ((1, state), (2, state), (1, again), (2, again)):
        results = run_threads(seen, ranks, version, route, window == "bounded")
        assert repr(results[1:]) == repr(results[:-1])
        run, in_interval, run_seconds, seconds = results[0]
        for view, found, of_time in (("run", run, run_seconds), ("interval", in_interval, seconds)):
            assert found.pop("t/since") == ranks
            wanted = metrics[view][str(ranks)] if view == "run" else metrics[view]
            if wanted:
                assert found.pop("t_d/rate") == pytest.approx(wanted["t_d/sum"] / of_time)
                assert 0 < found.pop("t/data_share") < 1
                wanted = {**wanted, **timers[view], **(drawn[str(ranks)] if drawn else {})}
            check(found, wanted)


def test_every_kind_of_checkpoint_is_there() -> None:
    assert len(STATES) == 2 * 3 * 2 * 2
    state = parsed(CHECKPOINTS / "wide-4-bounded-open.json")
    entries = json.loads(state["payload"])["content"]["entries"]
    assert {entry["type"] for entry in entries} == {
        *("sum", "mean", "max", "min", "rate", "distribution", "categorical_count", "lane rms"),
        *("handlers_of_users.MyTypes.RMS", "handlers_of_users.MyTypes.PRODUCT"),
    }
    for trait in ("drained", "per_rank", "full", "weighted", "condensed"):
        assert any(entry.get(trait) for entry in entries), trait


# -- Accumulators ---------------------------------------------------------------------------------


def check_drained(acc: Any) -> None:
    aggregator = MetricsAggregator()
    aggregator.drain(acc)
    found = aggregator.get_metrics_for_logging("t")
    check(found, parsed(GOLDEN / "accumulators" / "expected.json"))


def unzipped(name: str) -> bytes:
    return gzip.decompress((GOLDEN / "accumulators" / name).read_bytes())


def test_a_pickled_accumulator_of_0_1_0_is_read() -> None:
    pytest.importorskip("torch")
    check_drained(pickle.loads(unzipped("torch.pickle.gz")))


def test_a_pickled_jax_accumulator_of_0_1_0_is_refused_and_converted() -> None:
    """It was read as it came, whatever had been done to its arrays."""
    pytest.importorskip("jax")
    from metricfold.jax import DeviceAccumulator

    old = pickle.loads(unzipped("jax.pickle.gz"))
    for use in (MetricsAggregator().drain, old.merge, lambda acc: acc.update("sum", 1.0)):
        with pytest.raises(ValueError, match=r"saved by metricfold 0\.1.*from_0_1"):
            use(old)
    converted = DeviceAccumulator.from_0_1(old)
    check_drained(converted)
    with pytest.raises(ValueError, match="needs no conversion"):
        DeviceAccumulator.from_0_1(converted)


def test_an_accumulator_of_0_1_0_that_torch_saved_is_read() -> None:
    torch = pytest.importorskip("torch")
    check_drained(torch.load(io.BytesIO(unzipped("torch.pt.gz")), weights_only=False))


@pytest.mark.skipif(find_spec("orbax") is None, reason="needs Orbax")
def test_an_accumulator_of_0_1_0_that_orbax_saved_is_refused_and_converted(tmp_path: Path) -> None:
    import jax
    import orbax.checkpoint as ocp

    from metricfold.jax import DeviceAccumulator

    kinds = {"mean": "mean", "sum": "sum", "max": "max", "min": "min", "len": "distribution"}
    like = DeviceAccumulator(kinds, ("dev", "both"))
    shutil.copytree(GOLDEN / "accumulators" / "jax.orbax", tmp_path / "acc")
    with ocp.StandardCheckpointer() as checkpointer:
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        with pytest.raises(ValueError, match="fingerprint"):
            checkpointer.restore(tmp_path / "acc", shapes)
        arrays = checkpointer.restore(tmp_path / "acc")
    check_drained(DeviceAccumulator.from_0_1(arrays, kinds, ("dev", "both")))
    # Of names that do not come to these arrays nothing can be said but that.
    with pytest.raises(ValueError, match="other metrics or datasets"):
        DeviceAccumulator.from_0_1(arrays, kinds, ("dev", "both", "third"))
    with pytest.raises(TypeError, match="give those with which"):
        DeviceAccumulator.from_0_1(arrays)
    with pytest.raises(TypeError, match="a dict of the arrays counts"):
        DeviceAccumulator.from_0_1(arrays["counts"], kinds)


# -- Percentiles ----------------------------------------------------------------------------------


def percentiles(communicator: Any, route: str, values: Any) -> dict[str, float]:
    q = (1, 5, 25, 50, 75, 95, 99)
    aggregator = MetricsAggregator(communicator=communicator, route=route, percentiles=q)
    for value in values[communicator.rank].tolist():
        aggregator.record("x", value, "distribution", dataset="d")
    return aggregator.get_metrics_for_logging("t")


@pytest.mark.parametrize("route", ["narrow", "wide"])
def test_percentiles_of_8_times_1000_values_stay_what_they_were(route: str) -> None:
    values = np.load(GOLDEN / "percentiles" / "values.npy").astype(np.float64)
    expected = parsed(GOLDEN / "percentiles" / "expected.json")
    found = run_threads(percentiles, 8, route, values)[0]
    said = expected["said"][route]
    if route == "narrow":
        assert {name: found[name] for name in expected["numpy"]} == pytest.approx(
            expected["numpy"], rel=1e-12
        )
        check(found, said)
    else:
        # A sketch: docs/histograms.md says that it is off by 0.8 % of a value at most.
        assert found.keys() == said.keys()
        for name, exact in expected["numpy"].items():
            assert found[name] == pytest.approx(exact, rel=2**-7), name
        rest = said.keys() - expected["numpy"].keys()
        check({k: found[k] for k in rest}, {k: said[k] for k in rest}, rel=1e-9)


# -- Sinks ----------------------------------------------------------------------------------------


def test_json_lines_of_0_1_0_are_read() -> None:
    first, second, third, fourth = read_jsonl(GOLDEN / "sinks" / "records.jsonl")
    assert (first.step, first.wall_time, first.prefix) == (10, 1.7e9, "train")
    assert first.metrics == {"train/loss": 2.5, "train_größe/n": 2.0**53}
    histogram = second.histograms["train_d/len"]
    assert histogram.edges.tolist() == [0.0, 1.0, 2.0, 4.0]
    assert histogram.counts.tolist() == [3.0, 0.0, 1.5]
    assert (histogram.minimum, histogram.maximum) == (0.25, 3.5)
    assert (histogram.total, histogram.total_squares) == (6.0, 20.0)
    assert math.isnan(third.metrics["val/loss"])
    assert third.metrics["val/top"] == math.inf
    assert (fourth.step, fourth.metrics) == (30, {"train/loss": -1e-30, "train/low": -math.inf})


def test_json_lines_of_the_demo_of_0_1_0_are_read() -> None:
    path = GOLDEN / "sinks" / "demo.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    records = read_jsonl(path)
    assert len(records) == len(lines) > 1
    for record, line in zip(records, lines, strict=True):
        assert (record.step, record.wall_time, record.prefix, record.metrics) == (
            *(line["step"], line["wall_time"], line["prefix"], line["metrics"]),
        )
        assert {name: one.counts.tolist() for name, one in record.histograms.items()} == {
            name: one["counts"] for name, one in line["histograms"].items()
        }
    samples = {r.step: r.metrics["train/samples_seen"] for r in records if r.prefix == "train"}
    assert samples == {step: 16 * step for step in samples}


def test_tensorboard_gets_what_it_got_from_0_1_0(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = TensorBoardSink(tmp_path)
    for record in read_jsonl(GOLDEN / "sinks" / "records.jsonl"):
        sink.write(record)
    sink.close()
    shown = []
    for path in (GOLDEN / "sinks" / "events.out.tfevents.golden", *tmp_path.iterdir()):
        events = EventAccumulator(str(path), size_guidance={"scalars": 0, "histograms": 0})
        events.Reload()
        tags = events.Tags()
        shown.append(
            {
                **{tag: events.Scalars(tag) for tag in tags["scalars"]},
                **{tag: events.Histograms(tag) for tag in tags["histograms"]},
            }
        )
    golden, now = shown
    assert {event.step: event.value for event in golden["train/loss"]} == {
        10: 2.5,
        20: pytest.approx(0.1, rel=1e-7),
        30: pytest.approx(-1e-30, rel=1e-7),
    }
    # A later version may write more than that.
    assert golden.keys() <= now.keys()
    assert repr({tag: now[tag] for tag in golden}) == repr(golden)


def test_wandb_gets_what_it_got_from_0_1_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    from wandb_files import history, run_files

    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    golden = history(GOLDEN / "sinks" / "run-golden.wandb")
    assert golden[10] == {"train/loss": 2.5, "train_größe/n": 2.0**53}
    settings = wandb.Settings(silent=True, console="off", x_disable_meta=True)
    run = wandb.init(mode="offline", dir=str(tmp_path), settings=settings)
    sink = WandbSink(run=run)
    for record in read_jsonl(GOLDEN / "sinks" / "records.jsonl"):
        sink.write(record)
    sink.close()
    run.finish()
    now = history(run_files(tmp_path)[0])
    # A later version may write more than that.
    assert golden.keys() <= now.keys()
    for step, row in golden.items():
        assert row.keys() <= now[step].keys()
        assert repr({key: now[step][key] for key in row}) == repr(row)
