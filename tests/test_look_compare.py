"""`compare` says what is different, and not more: noise is no difference, one percent is."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from look_runs import DATASETS, correlated, plain, training

from metricfold import JSONLSink
from metricfold.cli import main
from metricfold.look import LookError, compare, read
from metricfold.look.statistics import apart_since, crossed_at, final, tail_of
from metricfold.sinks import Meaning, Record


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return {
        "a": training(folder / "a.jsonl", 1),
        "b": training(folder / "b.jsonl", 2),
        "worse": training(folder / "worse.jsonl", 3, shift=0.02, since=2000, config={"lr": 6e-4}),
    }


def row(found, key="train/loss"):
    return next(one for one in found.rows if one.key == key)


def test_a_run_against_itself_is_equal_in_everything(runs):
    found = compare(runs["a"], runs["a"])
    assert {one.verdict for one in found.rows} == {"="}
    assert {(one.difference, one.error, one.area) for one in found.rows} == {(0.0, 0.0, 0.0)}
    assert {one.first_difference for one in found.rows} == {None}
    assert found.first_difference is None
    assert found.data is True
    assert found.settings == {}
    assert found.also == []


def test_equal_runs_of_other_seeds_differ_by_chance_alone(tmp_path):
    """Of 20 pairs that are equal but for noise with a memory, at most two have any verdict but equal."""
    paths = [training(tmp_path / f"{seed}.jsonl", seed, logs=300) for seed in range(21)]
    pairs = [compare(a, b).rows for a, b in itertools.pairwise(paths)]
    assert {len(rows) for rows in pairs} == {len(DATASETS) + 1}
    assert sum(any(one.verdict != "=" for one in rows) for rows in pairs) <= 2


def test_one_percent_is_found_and_which_of_them_is_better(tmp_path):
    a = training(tmp_path / "a.jsonl", 1, logs=2000)
    b = training(tmp_path / "b.jsonl", 2, logs=2000, shift=0.01)
    found = row(compare(a, b))
    assert found.verdict == "worse"
    assert 0.005 < found.relative < 0.015
    assert row(compare(b, a)).verdict == "better"


@pytest.mark.parametrize("memory", [0.0, 0.6, 0.9])
def test_the_error_covers_noise_that_lasts_over_several_logs(memory):
    """Intervals of independent values would be wrong half of the time at 0.9."""
    rng = np.random.default_rng(0)
    wrong = sum(final(correlated(rng, 500, memory)).verdict != "=" for _ in range(200))
    assert wrong <= 20


def test_when_is_three_answers(runs, tmp_path):
    found = row(compare(runs["a"], runs["worse"]))
    assert found.first_difference == 10
    assert found.apart_since is not None
    assert 1900 <= found.apart_since <= 2300
    assert found.crossed_at is None
    steps = np.arange(10, 4010, 10)
    rng = np.random.default_rng(1)
    falling = 3 - steps / 4000
    a = plain(tmp_path / "a.jsonl", steps, falling + correlated(rng, 400))
    tilted = falling + (steps - 1500) / 10_000 + correlated(rng, 400)
    b = plain(tmp_path / "b.jsonl", steps, tilted)
    crossing = compare(a, b).rows[0]
    assert crossing.crossed_at is not None
    assert 1200 <= crossing.crossed_at <= 1800
    assert crossing.verdict == "worse"


def test_equal_curves_are_neither_apart_nor_have_they_crossed():
    rng = np.random.default_rng(0)
    steps = np.arange(400)
    pairs = [correlated(rng, 400) - correlated(rng, 400) for _ in range(100)]
    assert sum(apart_since(steps, one) is not None for one in pairs) <= 5
    assert sum(crossed_at(steps, one) is not None for one in pairs) <= 5


def test_runs_that_were_equal_up_to_a_step_say_which(runs, tmp_path):
    lines = runs["a"].read_text().splitlines(keepends=True)
    other = tmp_path / "other.jsonl"
    changed = json.loads(lines[200])
    changed["metrics"]["train_code/loss"] = math.nextafter(changed["metrics"]["train_code/loss"], 9)
    other.write_text("".join([*lines[:200], json.dumps(changed) + "\n", *lines[201:]]))
    assert compare(runs["a"], other).first_difference == (2010, "train_code/loss")


def test_how_fast_the_machine_was_is_no_difference(tmp_path):
    keys = {
        "train/tok": Meaning("", "tok", "", "rate"),
        "train/loss": Meaning("", "loss", "", "mean"),
    }
    for name in "ab":
        sink = JSONLSink(tmp_path / name)
        for step in range(1, 20):
            metrics = {
                "train/tok": step + ord(name),
                "train/step_seconds": ord(name),
                "train/loss": 1.0,
            }
            sink.write(Record(step, 1e9, metrics, prefix="train", keys=keys))
        sink.close()
    assert compare(tmp_path / "a", tmp_path / "b").first_difference is None


def test_other_grids_of_steps_are_compared_where_both_have_values(tmp_path):
    a = training(tmp_path / "a.jsonl", 1, logs=2000, every=10)
    b = training(tmp_path / "b.jsonl", 2, logs=800, every=25, shift=0.03)
    found = row(compare(a, b))
    assert (found.verdict, found.logs) == ("worse", 400)
    steps = np.arange(1, 4001)
    rng = np.random.default_rng(0)
    curve = 2 + 3 * steps**-0.5
    one = plain(tmp_path / "one.jsonl", steps[::10], (curve + correlated(rng, 4000))[::10])
    # Not a single step in common.
    for shift, verdict in ((0.0, "="), (0.1, "worse")):
        other = plain(
            tmp_path / f"other{shift}.jsonl",
            steps[5::15],
            (curve + shift + correlated(rng, 4000))[5::15],
        )
        found = compare(one, other).rows[0]
        assert found.logs > 50
        assert found.verdict == verdict
        assert abs(found.difference - shift) < 0.03


def test_a_longer_run_is_compared_as_far_as_the_shorter_one_goes(tmp_path, capsys):
    a = training(tmp_path / "a.jsonl", 1, logs=400)
    b = training(tmp_path / "b.jsonl", 2, logs=200)
    assert row(compare(a, b)).last_step == 2000
    assert main(["compare", str(a), str(b)]) == 0
    assert "up to step 2,000; A goes on to step 4,000" in capsys.readouterr().out


def test_datasets_that_one_run_lacks_are_named(tmp_path, capsys):
    a = training(tmp_path / "a.jsonl", 1)
    b = training(tmp_path / "b.jsonl", 2, datasets=("web", "code"))
    found = compare(a, b)
    assert "train_books/loss" in found.only[0]
    assert found.only[1] == []
    assert {one.dataset for one in found.rows} == {"", "web", "code"}
    main(["compare", str(a), str(b)])
    assert "only in A     train_books/loss" in capsys.readouterr().out


def test_settings_data_and_what_is_not_finite(runs, tmp_path, capsys):
    found = compare(runs["a"], runs["worse"])
    assert found.settings == {"lr": (3e-4, 6e-4)}
    bad = tmp_path / "bad.jsonl"
    lines = [json.loads(line) for line in runs["b"].read_text().splitlines()]
    for line in lines[300:]:
        line["metrics"]["train_code/loss"] = "NaN"
    lines[50]["metrics"]["train_web/tokens_seen"] = 1.0
    bad.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = compare(runs["a"], bad)
    assert found.not_finite == ({}, {"train_code/loss": 4000})
    assert (found.data, found.data_differs) == (False, (510, "train_web/tokens_seen"))
    assert row(found, "train_code/loss").verdict == "worse"
    assert math.isnan(row(found, "train_code/loss").b)
    assert row(found, "train_web/loss").verdict == "="
    main(["compare", str(runs["a"]), str(bad)])
    shown = capsys.readouterr().out
    assert "not finite    B: train_code/loss at step 4,000" in shown
    assert "data          not the same from step 510 on, in train_web/tokens_seen" in shown


def test_one_value_that_is_not_finite_spoils_no_final_value(runs, tmp_path):
    lines = runs["b"].read_text().splitlines()
    spoilt = json.loads(lines[390])
    spoilt["metrics"]["train/loss"] = "Infinity"
    path = tmp_path / "spoilt.jsonl"
    path.write_text("\n".join([*lines[:390], json.dumps(spoilt), *lines[391:]]) + "\n")
    found = compare(runs["a"], path)
    assert math.isfinite(row(found).b)
    assert found.not_finite[1] == {"train/loss": 3910}


def test_too_few_logs_are_no_verdict(tmp_path):
    a = plain(tmp_path / "a.jsonl", [1, 2, 3], [3.0, 2.0, 1.0])
    b = plain(tmp_path / "b.jsonl", [1, 2, 3], [3.0, 2.5, 1.5])
    found = compare(a, b).rows[0]
    assert (found.verdict, found.error) == ("?", None)
    assert found.difference == pytest.approx(1 / 3)


def test_a_metric_that_is_better_when_it_is_higher(tmp_path):
    steps = np.arange(1, 401)
    rng = np.random.default_rng(0)
    paths = []
    for name, level in (("a", 0.5), ("b", 0.6)):
        path = plain(tmp_path / name, steps, level + correlated(rng, 400, size=0.01), key="acc")
        lines = path.read_text().splitlines()
        lines[0] = json.dumps(json.loads(lines[0]) | {"run": {"better": {"acc": "higher"}}})
        path.write_text("\n".join(lines) + "\n")
        paths.append(path)
    found = compare(*paths).rows[0]
    assert (found.verdict, found.key) == ("better", "train/acc")
    assert found.best_b > found.best_a
    # Without a word on it, it is just different.
    path.write_text(path.read_text().replace("higher", "sideways"))
    assert compare(paths[1], paths[1]).rows == []


def test_no_name_is_taken_for_another(runs):
    with pytest.raises(LookError, match="called accuracy; there is"):
        compare(runs["a"], runs["b"], ["accuracy"])


@pytest.mark.parametrize(
    ("condition", "code"),
    [
        ("train/loss > +0.5%", 1),
        ("train/loss > +5%", 0),
        ("train/loss > 0.5 %", 1),
        ("train/loss >= +0.01", 1),
        ("train/loss < -1e-3", 0),
        ("train/loss > 1.5", 1),
        ("train_code/loss<1.5", 1),
        ("loss > +0.5%", 1),
        ("val/loss > +0.5%", 2),
        ("train/loss is bad", 2),
        ("train/loss > much", 2),
    ],
)
def test_conditions_decide_the_exit_code(runs, capsys, condition, code):
    assert main(["compare", str(runs["a"]), str(runs["worse"]), "--fail-if", condition]) == code
    said = capsys.readouterr()
    assert ("FAILED" in said.out) == (code == 1)
    assert said.err.count("\n") == (code == 2)
    assert (said.out == "") == (code == 2)


def test_a_condition_on_what_is_not_finite_is_true(tmp_path, capsys):
    steps = np.arange(1, 101)
    a = plain(tmp_path / "a.jsonl", steps, np.ones(100))
    b = plain(tmp_path / "b.jsonl", steps, np.where(steps > 50, np.nan, 1.0))
    for condition in ("train/loss > +1%", "train/loss > 100", "train/loss < -5"):
        assert main(["compare", str(a), str(b), "--fail-if", condition]) == 1
    capsys.readouterr()


def test_a_percentage_of_zero_is_none_where_nothing_differs(tmp_path, capsys):
    steps = np.arange(1, 101)
    zero = plain(tmp_path / "a.jsonl", steps, np.zeros(100))
    same = plain(tmp_path / "b.jsonl", steps, np.zeros(100))
    more = plain(tmp_path / "c.jsonl", steps, np.full(100, 0.1))
    for b, condition, code in [
        (same, "train/loss > +1%", 0),
        (more, "train/loss > +1%", 1),
        (more, "train/loss < -1%", 0),
    ]:
        assert main(["compare", str(zero), str(b), "--fail-if", condition]) == code
    capsys.readouterr()


def test_runs_that_share_no_step_of_a_metric_are_not_called_equal(tmp_path, capsys):
    one = plain(tmp_path / "a.jsonl", np.arange(1, 9), np.ones(8))
    later = plain(tmp_path / "b.jsonl", np.arange(11, 19), np.ones(8))
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    for b in (later, empty):
        assert main(["compare", str(one), str(b)]) == 0
        said = capsys.readouterr().out
        assert "no step of the same metric in common" in said
        assert "the same, to the bit" not in said
    assert compare(one, one).in_common
    assert not compare(one, later).in_common


def test_json_holds_all_of_it(runs, capsys):
    arguments = ["compare", str(runs["a"]), str(runs["worse"]), "--json", "--fail-if", "loss > 0"]
    assert main(arguments) == 1
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found["settings"] == {"lr": [3e-4, 6e-4]}
    assert found["rows"][0]["key"] == "train/loss"
    assert found["rows"][0]["verdict"] == "worse"
    assert "loss > 0" in found["failed"]


def test_the_final_value_is_that_of_the_last_part(runs):
    run = read(runs["a"])
    column = next(one for one in run.columns.values() if one.printed == "train/loss")
    last = column.values[-tail_of(len(column)) :]
    assert row(compare(run, run)).a == pytest.approx(last.mean())


def test_the_page_shows_what_is_printed(tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parent.parent / "docs/look.md").read_text()
    (block, *_) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (shown,) = re.findall(r"```text\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "110")
    exec(block, {})
    assert main(["compare", "runs/1", "runs/2"]) == 0
    assert capsys.readouterr().out == shown
