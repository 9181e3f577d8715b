"""`export` hands on every number as it is: to the bit, with NaN and infinities, none sampled away."""

from __future__ import annotations

import csv
import io
import math
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
from look_runs import training

from metricfold import JSONLSink, read_jsonl
from metricfold.cli import main
from metricfold.look import LookError, export, read_frame, read_table
from metricfold.sinks import Meaning, Record

AWKWARD = [math.nan, math.inf, -math.inf, -0.0, 5e-324, 0.1 + 0.2, 1e300, 2**53 + 1, -1 / 3]


@pytest.fixture
def path(tmp_path):
    """A run whose values and names are awkward for tables."""
    keys = {
        "train_NA/loss": Meaning("NA", "loss", "", "mean"),
        'train_a,"b"/len_stat_p50': Meaning('a,"b"', "len", "p50", "distribution"),
    }
    sink = JSONLSink(tmp_path / "run.jsonl")
    for step, value in enumerate(AWKWARD):
        metrics = {"train_NA/loss": value, 'train_a,"b"/len_stat_p50': -value, "train/=1+1": 1.0}
        sink.write(Record(step, 1e9 + step / 3, metrics, {}, "train", keys=keys))
        if step % 2:
            sink.write(Record(step, 1e9 + step, {"val/loss": value}, prefix="val"))
    sink.close()
    return tmp_path / "run.jsonl"


def wanted(path):
    """Return the bits of every number that the records hold."""
    return sorted(
        (one.step, one.wall_time, key, struct.pack("d", value))
        for one in read_jsonl(path)
        for key, value in one.metrics.items()
    )


def found(rows):
    return sorted(
        (
            int(step),
            float(when),
            printed(prefix, dataset, name, stat),
            struct.pack("d", float(value)),
        )
        for _, step, when, prefix, dataset, name, stat, value in rows
    )


def printed(prefix, dataset, name, statistic):
    group = f"{prefix}_{dataset}" if dataset else prefix
    return f"{group}/{name}" + (f"_stat_{statistic}" if statistic else "")


def test_csv_holds_what_read_jsonl_returns_bit_for_bit(path, tmp_path, capsys):
    out = tmp_path / "all.csv"
    assert main(["export", str(path), "-o", str(out)]) == 0
    with out.open(newline="") as file:
        head, *rows = csv.reader(file)
    assert head == ["run", "step", "wall_time", "prefix", "dataset", "name", "statistic", "value"]
    assert found(rows) == wanted(path)
    assert main(["export", str(path)]) == 0
    assert capsys.readouterr().out == out.read_text()


def test_parquet_holds_the_same_and_nan_is_not_null(path, tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    out = tmp_path / "all.parquet"
    assert main(["export", str(path), "-o", str(out)]) == 0
    table = pq.read_table(out)
    assert found(zip(*(column.to_pylist() for column in table.columns), strict=True)) == wanted(
        path
    )
    assert table.column("value").null_count == 0
    assert [str(one.type) for one in table.columns if one.num_chunks][1] == "int64"


def test_a_frame_and_a_table_hold_the_same(path):
    pytest.importorskip("pandas")
    frame = read_frame(path)
    assert found(frame.itertuples(index=False)) == wanted(path)
    table = read_table(path)
    assert found(zip(*table.values(), strict=True)) == wanted(path)
    assert (table["step"].dtype, table["value"].dtype) == (np.int64, np.float64)


def test_what_pandas_reads_from_csv_has_the_same_numbers(path, tmp_path):
    pd = pytest.importorskip("pandas")
    export([path], tmp_path / "a.csv")
    frame = pd.read_csv(tmp_path / "a.csv", keep_default_na=False, na_values={"value": ["NaN"]})
    frame["value"] = frame["value"].astype(float)
    bits = sorted(struct.pack("d", abs(value)) for value in frame["value"])
    assert bits == sorted(
        struct.pack("d", abs(struct.unpack("d", one[3])[0])) for one in wanted(path)
    )


def test_a_wide_table_has_a_column_for_each_key_and_a_row_for_each_step(path, tmp_path):
    out = io.StringIO()
    rows = export([path], out, names=["loss"], wide=True)
    head, *lines = csv.reader(io.StringIO(out.getvalue()))
    assert head == ["run", "step", "wall_time", "train_NA/loss", "val/loss"]
    assert rows == len(lines) == len(AWKWARD)
    # What was never logged is empty; what was NaN says so.
    assert [line[3] for line in lines[:3]] == ["NaN", "inf", "-inf"]
    assert [line[4] for line in lines[:3]] == ["", "inf", ""]
    pq = pytest.importorskip("pyarrow.parquet")
    export([path], tmp_path / "w.parquet", names=["loss"], wide=True, to="parquet")
    column = pq.read_table(tmp_path / "w.parquet").column("val/loss")
    assert column.null_count == len(AWKWARD) - len(AWKWARD) // 2
    assert math.isnan(pq.read_table(tmp_path / "w.parquet").column("train_NA/loss")[0].as_py())


def test_every_record_is_exported_however_many_there_are(tmp_path):
    """TensorBoard keeps 1,000 points of a scalar, and W&B's history samples 500, unless asked."""
    path = training(tmp_path / "long.jsonl", 1, logs=3000, datasets=("web",))
    assert len(read_table(path, ["train_web/loss"])["step"]) == 3000


def test_several_runs_stand_below_each_other(path, tmp_path):
    other = training(tmp_path / "other.jsonl", 1, logs=3)
    out = io.StringIO()
    export([path, other], out, names=["loss"])
    rows = list(csv.DictReader(io.StringIO(out.getvalue())))
    assert {row["run"] for row in rows} == {tmp_path.name, "other"}


def test_a_step_that_was_written_twice_stays_twice_but_for_wide_tables(tmp_path):
    sink = JSONLSink(tmp_path / "run.jsonl")
    for step, value in ((1, 1.0), (2, 2.0), (2, 3.0)):
        sink.write(Record(step, 1e9, {"t/loss": value}, prefix="t"))
    sink.close()
    assert read_table(tmp_path)["value"].tolist() == [1.0, 2.0, 3.0]
    out = io.StringIO()
    export([tmp_path], out, wide=True)
    assert [line.split(",")[-1] for line in out.getvalue().splitlines()] == ["t/loss", "1.0", "3.0"]


def test_an_export_that_fails_leaves_the_file_as_it_was(path, tmp_path, capsys):
    out = tmp_path / "out.csv"
    out.write_text("precious")
    assert main(["export", str(path), str(tmp_path / "gone"), "-o", str(out)]) == 2
    assert out.read_text() == "precious"
    assert main(["export", str(path), "-o", str(tmp_path / "no" / "folder.csv")]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert not [one for one in tmp_path.iterdir() if one.name.endswith(".writing")]


def test_parquet_needs_a_file_and_pyarrow(path, monkeypatch, tmp_path):
    with pytest.raises(LookError, match="give a file with -o"):
        export([path], io.StringIO(), to="parquet")
    monkeypatch.setattr("metricfold.look.exporting.find_spec", lambda name: None)
    with pytest.raises(LookError, match="pip install pyarrow"):
        export([path], tmp_path / "a.parquet", to="parquet")
    with pytest.raises(ImportError, match="read_table"):
        read_frame(path)


def test_csv_imports_neither_pandas_nor_pyarrow(path):
    code = (
        "import sys; from metricfold.cli import main; code = main(sys.argv[1:])\n"
        "found = {'torch', 'jax', 'pandas', 'pyarrow', 'rich', 'tensorboard'} & set(sys.modules)\n"
        "assert not found, found\nsys.exit(code)"
    )
    for command in (["export", path], ["show", path], ["compare", path, path], ["tail", path]):
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, command)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")


def test_a_file_where_there_can_be_none_and_a_name_that_the_encoding_lacks_get_one_sentence(
    tmp_path,
):
    sink = JSONLSink(tmp_path / "run.jsonl")
    sink.write(Record(1, 1e9, {"train_多言語/loss": 1.0}, {}, "train"))
    sink.close()
    command = [sys.executable, "-m", "metricfold", "export", str(tmp_path / "run.jsonl")]
    below = str(tmp_path / "run.jsonl" / "x.csv")
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    for arguments, said in (([], "cp1252 has no"), (["-o", below], "cannot be written")):
        ended = subprocess.run(
            [*command, *arguments], capture_output=True, text=True, env=environment, check=False
        )
        assert ended.returncode == 2
        assert said in ended.stderr
        assert ended.stderr.count("\n") == 1
