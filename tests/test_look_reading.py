"""Run files are read by byte offset, exactly, whatever becomes of the file meanwhile."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest

from metricfold import JSONLSink, MetricsAggregator, MetricsLogger, read_jsonl
from metricfold.look import Key, LookError, find, read
from metricfold.sinks import Record

LOSS = Key("train", "web", "loss")


def record(step, value=None, **more):
    metrics = {"train_web/loss": float(step) if value is None else value}
    return Record(step, 100.5 + step, metrics, prefix="train", **more)


def write(path, *records):
    sink = JSONLSink(path)
    for one in records:
        sink.write(one)
    sink.close()


def values(run, key=LOSS):
    return run.columns[key].values.tolist()


def a_run(path, steps=8):
    """A run with several datasets, distributions, totals, cells, extra numbers and a validation."""
    aggregator = MetricsAggregator()
    aggregator.derive("ppl", lambda of: math.exp(of["loss"]))
    with MetricsLogger([JSONLSink(path)]) as logger:
        for step in range(1, steps + 1):
            for dataset in ("web", "my_docs", "code/python"):
                aggregator.record("loss", step + 0.25, dataset=dataset)
                aggregator.record("other_stat_p50", 3.0, dataset=dataset)
                if step % 2:
                    for length in (1.0, 2.0, 7.0):
                        aggregator.record("len", length, "distribution", dataset=dataset)
            aggregator.record("kind", "prose", "categorical_count", dataset="web")
            aggregator.record("tokens", np.ones((2, 3)), "sum", axes={"layer": 2, "expert": 3})
            logger.log(step, aggregator, prefix="train", extra={"train/lr": 0.1 / step})
            if step % 4 == 0:
                logger.log(step, {"loss": math.nan if step == 4 else math.inf}, prefix="val")
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return read(a_run(tmp_path_factory.mktemp("run") / "run.jsonl"))


def test_columns_hold_every_number_of_the_records_bit_for_bit(whole):
    found = {}
    for key, column in whole.columns.items():
        for step, time, value in zip(column.steps, column.wall_times, column.values, strict=True):
            found[int(step), key.prefix, column.printed] = float(time), repr(float(value))
    wanted = {
        (one.step, one.prefix, printed): (one.wall_time, repr(value))
        for one in read_jsonl(whole.path)
        for printed, value in one.metrics.items()
    }
    assert found == wanted


def test_histograms_and_cells_are_those_of_the_records(whole):
    records = read_jsonl(whole.path)
    of_web = [one.histograms["train_web/len"] for one in records if one.histograms]
    histograms = whole.histograms[Key("train", "web", "len")]
    assert histograms.steps.tolist() == [1, 3, 5, 7]
    for one, other in zip(histograms, of_web, strict=True):
        assert one.edges.tolist() == other.edges.tolist()
        assert one.counts.tolist() == other.counts.tolist()
    (axes, cells) = whole.arrays[Key("train", "", "tokens")][3]
    assert (axes, cells.tolist()) == ([["layer", 2], ["expert", 3]], [[4.0] * 3] * 2)


@pytest.mark.parametrize("line", [1, 3])
def test_a_file_that_is_read_while_it_grows_is_read_the_same(whole, tmp_path, line):
    """By any number of lines at a time, and with half of the next one already there."""
    path = tmp_path / "run.jsonl"
    lines = whole.path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0])
    run = read(path)
    for place in range(1, len(lines), line):
        with path.open("ab") as file:
            half = lines[place][: len(lines[place]) // 2]
            file.write(half)
            file.flush()
            assert run.update() == (0, False, False)
            file.write(lines[place][len(half) :] + b"".join(lines[place + 1 : place + line]))
        assert run.update().records == len(lines[place : place + line])
    assert run.records == whole.records
    for key, column in whole.columns.items():
        np.testing.assert_array_equal(run.columns[key].values, column.values)
        np.testing.assert_array_equal(run.columns[key].steps, column.steps)
    assert [len(one) for one in run.histograms.values()] == [
        len(one) for one in whole.histograms.values()
    ]


def test_what_rewind_cuts_is_gone_also_when_the_file_has_grown_past_it(tmp_path):
    path = tmp_path / "run.jsonl"
    write(path, *map(record, range(1, 11)))
    run = read(path)
    sink = JSONLSink(path)
    sink.rewind(5)
    assert run.update() == (5, True, False)
    assert values(run) == [1.0, 2.0, 3.0, 4.0, 5.0]
    for step in range(6, 8):
        sink.write(record(step))
    assert run.update() == (2, False, False)
    sink.rewind(4)
    for step in range(5, 20):  # the same bytes and more, but for the values
        sink.write(record(step, -1.0))
    sink.close()
    assert run.update().reset
    assert values(run) == [1.0, 2.0, 3.0, 4.0] + [-1.0] * 15


def test_a_deleted_file_stays_as_it_was_until_a_new_one_is_there(tmp_path):
    path = tmp_path / "run.jsonl"
    write(path, record(1), record(2))
    run = read(path)
    path.unlink()
    assert run.update() == (0, False, True)
    assert values(run) == [1.0, 2.0]
    write(path, record(7))
    assert run.update() == (1, True, False)
    assert values(run) == [7.0]


def test_a_file_that_another_has_replaced_is_read_again(tmp_path):
    path, beside = tmp_path / "run.jsonl", tmp_path / "beside"
    write(path, record(1), record(2))
    run = read(path)
    write(beside, record(1), record(2), record(3))
    beside.replace(path)
    assert run.update() == (3, True, False)


def test_lines_that_a_crash_broke_off_are_left_out_and_counted(tmp_path):
    path = tmp_path / "run.jsonl"
    write(path, record(1), record(2), record(3))
    one, two, three = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(
        one[:-30] + two + one[:20] + b"\n" + two[: two.find(b"{}")] + b"\0\0\n" + three
    )
    run = read(path)
    assert values(run) == [2.0, 3.0] == [one.metrics["train_web/loss"] for one in read_jsonl(path)]
    assert run.torn == 3


def test_the_last_line_may_lack_its_end(tmp_path):
    path = tmp_path / "run.jsonl"
    write(path, record(1), record(2))
    text = path.read_bytes()
    path.write_bytes(text[:-1])
    run = read(path)
    assert values(run) == [1.0, 2.0]
    with path.open("ab") as file:
        file.write(b"\n" + text.splitlines(keepends=True)[0])
    assert run.update() == (1, False, False)


def test_every_cut_of_a_file_is_read_as_the_records_before_it(tmp_path):
    """Wherever a copy over the network has stopped."""
    path = tmp_path / "run.jsonl"
    aggregator = MetricsAggregator()
    with MetricsLogger([JSONLSink(path)]) as logger:
        for step in (1, 2):
            aggregator.record("}}}", 1.0, "distribution", dataset="w")
            logger.log(step, aggregator, prefix="train")
    text, cut = path.read_bytes(), tmp_path / "cut.jsonl"
    for end in (*range(3, len(text), 7), *range(len(text) - 40, len(text) + 1)):
        for close in (b"", b"\n"):  # a later start has closed it
            cut.write_bytes(text[:end] + close)
            run = read(cut)
            assert run.records == len(read_jsonl(cut)), text[:end]
            assert all(one.counts.sum() == 1 for part in run.histograms.values() for one in part)


@pytest.mark.parametrize(
    "text",
    [
        b"step,loss\n1,2\n",
        b"\x89PNG\r\n",
        b'{"loss": 1}\n',
        b"[1, 2]\n",
        b'{"step": 1.5, "metrics": {}}\n',
    ],
)
def test_what_is_no_run_is_refused_in_one_sentence(tmp_path, text):
    path = tmp_path / "run.jsonl"
    path.write_bytes(text)
    with pytest.raises(LookError, match="is not a run") as error:
        read(path)
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda line: line.replace(b"2.0", b"true"),
        lambda line: line.replace(b"2.0", b'"two"'),
        lambda line: line.replace(b'"wall_time": 102.5', b'"wall_time": "NaN"'),
        lambda line: line.replace(b"web", b"\\u001b[31m"),
        lambda line: line.replace(b'"step": 2', b'"step": 9223372036854775808'),
        lambda line: b"hello\n",
        lambda line: b"\xff\xfe\n",
        lambda line: b"[" * 100_000 + b"\n",
    ],
)
def test_a_line_that_is_no_record_is_named_and_can_be_mended(tmp_path, spoil):
    path = tmp_path / "run.jsonl"
    write(path, record(1), record(2), record(3))
    one, two, three = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(one)
    run = read(path)
    path.write_bytes(one + spoil(two) + three)
    for _ in range(2):
        with pytest.raises(LookError, match="line 2 is not a record") as error:
            run.update()
        assert str(error.value).isprintable()
    path.write_bytes(one + two + three)
    assert run.update() == (3, True, False)
    assert values(run) == [1.0, 2.0, 3.0]


def test_a_step_that_was_logged_twice_counts_as_written_last(tmp_path):
    """A resume without `rewind` writes steps again."""
    path = tmp_path / "run.jsonl"
    write(path, record(1), record(2), record(3), record(2, -2.0), record(3, -3.0), record(4))
    column = read(path).columns[LOSS]
    assert column.steps.tolist() == [1, 2, 3, 2, 3, 4]
    assert column.ordered().steps.tolist() == [1, 2, 3, 4]
    assert column.ordered().values.tolist() == [1.0, -2.0, -3.0, 4.0]


def test_a_folder_stands_for_the_only_run_in_it(tmp_path):
    (tmp_path / "other.jsonl").write_text('{"text": "of a dataset"}\n')
    (tmp_path / "more").mkdir()
    with pytest.raises(LookError, match="holds no run"):
        find(tmp_path)
    write(tmp_path / "more" / "run.jsonl", record(1))
    with pytest.raises(LookError, match=r"there are some in .*more"):
        find(tmp_path)
    assert find(tmp_path / "more") == tmp_path / "more" / "run.jsonl"
    write(tmp_path / "more" / "two.jsonl", record(1))
    with pytest.raises(LookError, match=r"holds 2 runs: give one of run\.jsonl, two\.jsonl"):
        find(tmp_path / "more")
    with pytest.raises(LookError, match="does not exist"):
        find(tmp_path / "nowhere")


def test_nothing_heavy_is_imported(whole):
    code = (
        "import sys; from metricfold.look import read\n"
        "run = read(sys.argv[1]); [*run.columns.values(), *run.histograms.values()]\n"
        "found = {'torch', 'jax', 'pandas', 'pyarrow', 'rich'} & set(sys.modules)\n"
        "assert not found, found\n"
    )
    environment = {**os.environ, "PYTHONWARNINGS": "error"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(whole.path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(whole.path.read_text().splitlines()[0])["step"] == 1
