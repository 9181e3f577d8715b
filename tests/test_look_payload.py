"""The data of a page: small, and nothing that can be seen is lost."""

from __future__ import annotations

import gzip
import json
import math

import numpy as np
import pytest

from metricfold import JSONLSink, Metric, MetricsAggregator, MetricsLogger, look
from metricfold.look.families import families
from metricfold.look.payload import packed
from metricfold.look.report import report
from metricfold.look.thinning import thinned


def unpacked(data: bytes):
    """Read a payload as the page does: a second writing of what payload.py says."""
    length = int.from_bytes(data[:4], "little")
    header = json.loads(data[4 : 4 + length])
    rest = data[4 + length :]

    def numbers(kind, offset, count, first=0):
        if kind == "b":
            return np.frombuffer(rest, np.uint8, count, offset)
        if kind == "d":
            return np.frombuffer(rest, "<f8", count, offset)
        size = count if kind == "f" else count - 1
        planes = np.frombuffer(rest, np.uint8, 4 * size, offset).reshape(4, size)
        whole = np.ascontiguousarray(planes.T).view("<f4" if kind == "f" else "<u4").ravel()
        return whole if kind == "f" else first + np.cumsum([0, *whole.tolist()])

    for run in header["runs"]:
        inner = [c[name] for c in run["columns"] for name in ("means", "last") if name in c]
        for part in [*run["columns"], *inner, *run["maps"], *run["heats"]]:
            for name in ("x", "y", "shares", "holes"):
                if name in part:
                    part[name] = numbers(*part[name])
    return header


def logged(path, rows, **options):
    """Write a run of rows of (step, metrics)."""
    with MetricsLogger([JSONLSink(path)], queue_size=100_000) as logger:
        for step, metrics in rows:
            logger.log(step, metrics, **options)
    return look.read(path)


def column_of(data, name):
    return next(c for c in unpacked(data)["runs"][0]["columns"] if c["name"] == name)


def test_values_have_five_digits_and_what_is_not_finite_stays_so(tmp_path):
    values = [math.pi, -1e-12, 6.02e23, 0.0, math.nan, math.inf, -math.inf, 123456.0]
    run = logged(tmp_path / "run.jsonl", [(i, {"loss": v}) for i, v in enumerate(values)])
    column = column_of(packed([run]), "loss")
    assert column["x"].tolist() == list(range(8))
    np.testing.assert_allclose(column["y"], values, rtol=2e-5)
    assert column["bad"] == [3, 4, 6]


def test_values_beyond_a_float32_do_not_become_infinite_or_zero(tmp_path):
    run = logged(tmp_path / "run.jsonl", [(1, {"big": 1e300}), (2, {"big": 1e-300})])
    column = column_of(packed([run]), "big")
    assert column["y"].tolist() == [1e300, 1e-300]
    assert "bad" not in column


def test_steps_beyond_2_to_the_32_come_back(tmp_path):
    steps = [0, 7, 2**33, 2**40]
    run = logged(tmp_path / "run.jsonl", [(step, {"loss": 1.0}) for step in steps])
    assert column_of(packed([run]), "loss")["x"].tolist() == steps


def test_thinning_keeps_every_spike_the_ends_and_what_is_not_finite():
    generator = np.random.default_rng(0)
    values = generator.normal(0, 1, 100_003)
    spikes = generator.choice(values.size, 40, replace=False)
    values[spikes[:20]], values[spikes[20:38]] = 50 + generator.random(20), -50.0
    values[spikes[38]], values[spikes[39]] = math.nan, math.inf
    fewer = thinned(values, 4000)
    assert fewer is not None
    assert set(spikes.tolist()) | {0, values.size - 1} <= set(fewer.points.tolist())
    assert len(fewer.points) <= 4100
    assert (np.diff(fewer.points) > 0).all()
    assert np.isnan(fewer.means).sum() == 2
    assert thinned(values[:6000], 4000) is None


def test_a_curve_of_nan_alone_can_be_thinned():
    fewer = thinned(np.full(5000, np.nan), 100)
    assert fewer is not None
    assert len(fewer.points) > 0


def test_a_long_curve_is_packed_with_its_means(tmp_path):
    rows = [(i, {"loss": 100.0 if i == 777 else 1.0}) for i in range(3000)]
    run = logged(tmp_path / "run.jsonl", rows)
    column = column_of(packed([run], points=500), "loss")
    assert len(column["y"]) < 600
    assert column["count"] == 3000
    assert column["x"][column["y"].argmax()] == 777
    means, length = column["means"]["y"], column["means"]["length"]
    np.testing.assert_allclose(np.max(means), 1 + 99 / length, rtol=1e-4)


def test_the_mean_of_the_last_logs_is_of_the_logs_and_not_of_what_is_drawn(tmp_path):
    """Of the points that thinning leaves it was: of the extremes."""
    rows = [(i, {"loss": 100.0 if i % 10 == 0 else 1.0}) for i in range(3000)]
    column = column_of(packed([logged(tmp_path / "run.jsonl", rows)], points=500), "loss")
    assert column["last"]["x"].tolist() == list(range(2950, 3000))
    np.testing.assert_allclose(column["last"]["y"].mean(), 10.9, rtol=1e-4)


def test_cells_of_maps_take_no_points_from_curves(tmp_path):
    """1,536 experts left 1,200 points to the loss."""
    cells = {f"layer_{i}/expert_{j}": 1.0 for i in range(30) for j in range(40)}
    rows = [(i, {"loss": float(i)} | (cells if i == 0 else {})) for i in range(5000)]
    run = logged(tmp_path / "run.jsonl", rows)
    assert len(column_of(packed([run]), "loss")["y"]) == 5000


def test_a_step_that_was_logged_twice_has_its_later_value(tmp_path):
    run = logged(tmp_path / "run.jsonl", [(1, {"a": 1.0}), (3, {"a": 3.0}), (1, {"a": 9.0})])
    column = column_of(packed([run]), "a")
    assert (column["x"].tolist(), column["y"].tolist()) == ([1, 3], [9, 3])


def test_numbers_in_names_make_curves_of_few_and_maps_of_many(tmp_path):
    cells = {f"layer_{i:02d}/expert_{j}": i + j / 10 for i in range(4) for j in range(5)}
    ranks = {f"step_seconds/rank_{r}": float(r) for r in range(8)}
    run = logged(tmp_path / "run.jsonl", [(s, cells | ranks) for s in (1, 2)], prefix="train")
    (shown,) = unpacked(packed([run]))["runs"]
    assert {c["name"] for c in shown["columns"]} == set(ranks)
    assert shown["columns"][3]["family"] == ["step_seconds/rank_*", 3]
    by_name = {one["name"]: one for one in shown["maps"]}
    experts = by_name["layer_*/expert_*"]
    assert [(title, len(labels)) for title, labels in experts["axes"]] == [
        ("layer", 4),
        ("expert", 5),
    ]
    np.testing.assert_allclose(experts["y"][20:].reshape(4, 5)[3], 3 + np.arange(5) / 10, rtol=1e-4)
    assert by_name["step_seconds/rank_*"]["axes"] == [["rank", [str(r) for r in range(8)]]]


def test_what_was_not_logged_is_told_from_what_is_not_finite(tmp_path):
    """A rank that came later had a row of NaN."""
    ranks = [{f"norm/rank_{r}": math.nan if r == 1 else 1.0 for r in range(2 + s)} for s in (0, 1)]
    run = logged(tmp_path / "run.jsonl", enumerate(ranks), prefix="train")
    (one,) = unpacked(packed([run]))["runs"][0]["maps"]
    assert one["holes"].tolist() == [0, 0, 1, 0, 0, 0]
    assert np.isnan(one["y"]).tolist() == [False, True, True, False, True, False]


@pytest.mark.parametrize(
    "names",
    [
        ["a_1", "a_2"],  # too few
        ["a_1", "a_01", "a_2"],  # two would be one cell
        ["a1b2c3", "a2b3c4", "a3b4c5"],  # three numbers
        [f"x{i}y{i}" for i in range(9)],  # holes mostly
        ["len_stat_p05", "len_stat_p50", "len_stat_p95"],  # percentiles
    ],
)
def test_names_that_are_no_grid_stay_curves(names):
    assert families((name, "train", name) for name in names) == []


def test_arrays_with_axes_become_maps_within_their_room(tmp_path):
    aggregator = MetricsAggregator()
    path = tmp_path / "run.jsonl"
    with MetricsLogger([JSONLSink(path)], queue_size=1000) as logger:
        for step in range(200):
            values = np.arange(6.0).reshape(2, 3) + step
            axes = {"layer": 2, "kind": ["k", "q", "v"]}
            aggregator.record("norm", values, "mean", axes=axes)
            logger.log(step, aggregator, prefix="train")
    (one,) = unpacked(packed([look.read(path)]))["runs"][0]["maps"]
    assert one["axes"] == [["layer", ["0", "1"]], ["kind", ["k", "q", "v"]]]
    assert one["logs"] == 200
    assert len(one["x"]) == 60
    assert one["x"][-1] == 199
    np.testing.assert_allclose(one["y"].reshape(-1, 2, 3)[-1], np.arange(6).reshape(2, 3) + 199)


def test_a_distribution_over_time_holds_the_share_of_each_bin(tmp_path):
    aggregator = MetricsAggregator()
    path = tmp_path / "run.jsonl"
    with MetricsLogger([JSONLSink(path)]) as logger:
        for step in range(4):
            values = [10.0] * 3 + [1000.0] if step < 3 else [1000.0] * 4
            aggregator.update([Metric("web", "len", v, "distribution") for v in values])
            logger.log(step, aggregator, prefix="train")
    heats = unpacked(packed([look.read(path)]))["runs"][0]["heats"]
    heat = next(one for one in heats if one["dataset"] == "web")
    shares = (heat["shares"].reshape(4, -1) / 255) ** 2 * heat["most"]
    assert heat["log"]
    low = np.array(heat["edges"][1:]) < 28  # beyond where the first bucket of the histograms ends
    np.testing.assert_allclose([shares[0][low].sum(), shares[0][-1]], [0.75, 0.25], atol=0.02)
    np.testing.assert_allclose([shares[3][low].sum(), shares[3][-1]], [0.0, 1.0], atol=0.02)


def test_a_report_of_8_datasets_and_5000_logs_is_under_1_MB(tmp_path):
    generator = np.random.default_rng(0)
    names = ("web", "code", "books", "wiki", "papers", "math", "chat", "multilingual")
    lines = []
    for i in range(5000):
        keys = [f"train_{name}/{what}" for name in names for what in ("loss", "tokens_seen")]
        keys += ["train/loss", "train/lr", "train/grad_norm", "train/mfu", "train/step_seconds"]
        keys += [f"train/step_seconds/rank_{r}" for r in range(8)]
        values = generator.normal(2, 1, len(keys)).tolist()
        lines.append(
            json.dumps(
                {
                    "step": i,
                    "wall_time": 1e9 + i,
                    "prefix": "train",
                    "metrics": dict(zip(keys, values, strict=True)),
                    "histograms": {},
                }
            )
        )
    path = tmp_path / "run.jsonl"
    path.write_text("\n".join(lines) + "\n")
    made = report(path, tmp_path / "report.html")
    assert made.stat().st_size < 1_000_000
    assert look.read(path).records == 5000


def test_a_report_that_cannot_be_written_says_so_and_leaves_the_old_one(tmp_path):
    run = logged(tmp_path / "run.jsonl", [(1, {"loss": 1.0})])
    (tmp_path / "folder").mkdir()
    with pytest.raises(look.LookError, match="cannot be written"):
        report(run, tmp_path / "folder")
    with pytest.raises(look.LookError, match="at least one run"):
        report([], tmp_path / "report.html")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["folder", "run.jsonl"]


def test_names_are_nowhere_in_the_file_as_they_are(tmp_path):
    evil = "x</script><script>alert(1)</script>"
    run = logged(tmp_path / "run.jsonl", [(1, {evil: 1.0})])
    text = report(run, tmp_path / "report.html").read_text()
    assert "alert(1)" not in text
    assert text.count("<script") == 3
    start = text.index('id="data">') + len('id="data">')
    import base64

    data = gzip.decompress(base64.b64decode(text[start : text.index("</script>", start)]))
    assert unpacked(data)["runs"][0]["columns"][0]["printed"] == evil
