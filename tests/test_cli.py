"""The command line: one clear sentence for bad input, and nothing half-done."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from metricfold import __version__
from metricfold.cli import main

needs_torch = pytest.mark.skipif(find_spec("torch") is None, reason="needs torch")


def forbid(path, mode):
    path.chmod(mode)
    if os.access(path, os.R_OK | os.W_OK):
        pytest.skip("this user may read and write everything")


def refused(capsys, *arguments):
    """Run the demo with bad arguments; return what it says, having left nothing behind."""
    before = sorted(Path.cwd().rglob("*"))
    try:
        code = main(["demo", *map(str, arguments)])
    except SystemExit as exit_:
        code = exit_.code
    output = capsys.readouterr()
    assert code in (1, 2)
    assert output.out == ""
    assert output.err.startswith("metricfold demo: ")
    assert output.err.endswith("\n")
    assert output.err.count("\n") == 1
    assert sorted(Path.cwd().rglob("*")) == before
    return output.err


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


class TestHostileFiles:
    """What files hold, and are called, is answered in one line that a terminal shows as it is."""

    @pytest.mark.parametrize(
        "line",
        [
            "[" * 100_000,
            '{"text": ' + "9" * 5000 + "}",
            '{"text": ["a"]}',
            "\x1b[31m{",
            '{"text": "\x1b',
            "null",
        ],
        ids=lambda line: line[:20],
    )
    def test_a_line_that_is_no_text(self, capsys, tmp_path, line):
        """A nested line, and a number of 5,000 digits, were tracebacks."""
        Path("\x1b[31mred.jsonl").write_text(line + "\n")
        said = refused(capsys, "--data", "a=\x1b[31mred.jsonl")
        assert "line 1" in said
        assert said.rstrip("\n").isprintable()

    @pytest.mark.parametrize(
        "marks",
        [
            '{"framework": "\\u001b[31m", "datasets": ["a"]}',
            '{"framework": ["torch"], "datasets": ["a"]}',
            '{"framework": "torch", "datasets": ["../a"]}',
            '{"framework": "torch", "datasets": ["\\u001b"]}',
            '{"framework": "torch", "datasets": 3}',
            '{"framework": "torch", "datasets": [[1]]}',
            "[" * 100_000,
            "7",
        ],
        ids=lambda marks: marks[:45],
    )
    def test_a_run_that_is_none_is_not_resumed(self, capsys, marks):
        """Frameworks that there are not were tracebacks, and a dataset could name any file."""
        folder = Path("run")
        folder.mkdir()
        (folder / "demo.json").write_text(marks)
        with zipfile.ZipFile(folder / "checkpoint.pt", "w") as archive:
            archive.writestr("a", "b")
        said = refused(capsys, "--resume", "--out", folder)
        assert "leave out --resume to begin again" in said
        assert said.rstrip("\n").isprintable()


class TestNumbers:
    @pytest.mark.parametrize("given", ["0", "-1", "two", "1.5", ""])
    @pytest.mark.parametrize("option", ["--ranks", "--devices", "--steps"])
    def test_must_be_whole_and_positive(self, capsys, option, given):
        said = refused(capsys, f"{option}={given}")
        assert option in said
        assert f"'{given}' is not a whole number of at least 1" in said

    def test_more_ranks_than_samples_in_a_step(self, capsys):
        assert "--ranks 17 is too many" in refused(capsys, "--ranks", 17)
        said = refused(capsys, "--framework", "jax", "--devices", 17)
        assert "--devices 17 is too many" in said

    @pytest.mark.parametrize("given", ["-1", "0.5", "one", ""])
    def test_a_seed_is_a_whole_number(self, capsys, given):
        assert "is not a whole number from 0 on" in refused(capsys, f"--seed={given}")

    @pytest.mark.parametrize("given", ["0", "-1", "nan", "inf", "high", ""])
    def test_a_learning_rate_is_above_zero(self, capsys, given):
        assert "is not a number above 0" in refused(capsys, f"--lr={given}")

    def test_of_the_other_framework(self, capsys):
        said = refused(capsys, "--devices", 4)
        assert "--devices does not go with --framework torch: give --ranks" in said
        said = refused(capsys, "--framework", "jax", "--ranks", 2)
        assert "--ranks does not go with --framework jax: give --devices" in said


@needs_torch
class TestData:
    def test_path_that_does_not_exist(self, capsys):
        said = refused(capsys, "--data", "mine=nowhere.txt")
        assert "--data mine: nowhere.txt does not exist" in said

    @pytest.mark.parametrize("content", ["", "\n \n\n", "x"])
    def test_file_without_text(self, capsys, empty_folder, content):
        (empty_folder / "empty.txt").write_text(content)
        assert "empty.txt holds no text" in refused(capsys, "--data", "mine=empty.txt")

    def test_folder_without_texts(self, capsys, empty_folder):
        (empty_folder / "folder").mkdir()
        (empty_folder / "folder" / "picture.png").write_bytes(b"\x89PNG")
        said = refused(capsys, "--data", "mine=folder")
        assert "folder holds no .txt and no .jsonl file" in said

    def test_unknown_kind_of_file(self, capsys, empty_folder):
        (empty_folder / "book.pdf").write_bytes(b"%PDF")
        assert "book.pdf is neither a .txt file" in refused(capsys, "--data", "mine=book.pdf")

    def test_file_that_is_not_utf8_names_the_line(self, capsys, empty_folder):
        (empty_folder / "latin.txt").write_bytes("first\nna\xefve\n".encode("latin-1"))
        said = refused(capsys, "--data", "mine=latin.txt")
        assert "latin.txt line 2 is not UTF-8 (byte 0xef at column 3)" in said

    @pytest.mark.parametrize(
        ("line", "reason"),
        [
            ("{oops", "line 2 is not JSON"),
            ('{"body": "x"}', 'line 2 has no field "text"'),
            ('{"text": 3}', 'line 2 has no field "text" that holds a string'),
            ("[]", 'line 2 has no field "text"'),
        ],
    )
    def test_bad_line_of_jsonl_is_named(self, capsys, empty_folder, line, reason):
        (empty_folder / "t.jsonl").write_text('{"text": "good"}\n' + line + "\n")
        assert reason in refused(capsys, "--data", "mine=t.jsonl")

    def test_file_that_may_not_be_read(self, capsys, empty_folder):
        (empty_folder / "secret.txt").write_text("hidden words")
        forbid(empty_folder / "secret.txt", 0)
        assert "secret.txt cannot be read" in refused(capsys, "--data", "mine=secret.txt")

    @pytest.mark.parametrize("given", ["just-a-path.txt", "name=", "=path"])
    def test_not_of_the_form_name_path(self, capsys, given):
        assert "--data" in refused(capsys, "--data", given)

    @pytest.mark.parametrize("name", ["a/b", "a b", "a\nb", "é", ".."])
    def test_name_that_cannot_name_a_file(self, capsys, name):
        assert "cannot name a dataset" in refused(capsys, "--data", f"{name}=x.txt")

    def test_the_same_name_twice(self, capsys):
        said = refused(capsys, "--data", "mine=a.txt", "--data", "mine=b.txt")
        assert "--data names 'mine' twice" in said

    def test_bad_data_leave_an_earlier_run_alone(self, capsys, empty_folder):
        run = empty_folder / "run"
        run.mkdir()
        (run / "demo.json").write_text(json.dumps({"datasets": ["old"]}))
        (run / "metrics.jsonl").write_text("precious")
        refused(capsys, "--out", "run", "--data", "mine=nowhere.txt")
        assert (run / "metrics.jsonl").read_text() == "precious"


@needs_torch
class TestOut:
    def test_below_a_file(self, capsys, empty_folder):
        (empty_folder / "file").write_text("")
        said = refused(capsys, "--out", "file/run")
        assert "--out file/run cannot be written (file: Not a directory)" in said

    def test_a_file(self, capsys, empty_folder):
        (empty_folder / "file").write_text("")
        assert "--out file cannot be written" in refused(capsys, "--out", "file")

    def test_folder_that_may_not_be_written(self, capsys, empty_folder):
        (empty_folder / "locked").mkdir()
        forbid(empty_folder / "locked", 0o500)
        assert "locked: Permission denied" in refused(capsys, "--out", "locked/run")

    def test_folder_with_files_of_someone_else(self, capsys, empty_folder):
        (empty_folder / "thesis").mkdir()
        (empty_folder / "thesis" / "chapter.txt").write_text("years of work")
        assert "holds files that are not the demo's" in refused(capsys, "--out", "thesis")


@needs_torch
class TestResume:
    def test_without_a_run(self, capsys):
        assert "holds no run to resume" in refused(capsys, "--resume", "--out", "nowhere")

    def test_before_the_first_checkpoint(self, capsys, empty_folder):
        (empty_folder / "demo.json").write_text(json.dumps({"datasets": []}))
        assert "before its first checkpoint" in refused(capsys, "--resume", "--out", ".")

    def test_from_a_damaged_checkpoint(self, capsys, empty_folder):
        (empty_folder / "demo.json").write_text(json.dumps({"datasets": []}))
        (empty_folder / "checkpoint.pt").write_bytes(b"PK\x03\x04 and no more")
        assert "damaged or cut short" in refused(capsys, "--resume", "--out", ".")

    def test_of_the_model_of_an_earlier_version(self, capsys, empty_folder):
        """Version 0.1 trained one with other layers, and marked its runs with no model."""
        (empty_folder / "data").mkdir()
        (empty_folder / "data" / "a.jsonl").write_text('{"text": "words", "kind": "prose"}\n')
        (empty_folder / "demo.json").write_text('{"datasets": ["a"], "framework": "torch"}')
        with zipfile.ZipFile(empty_folder / "checkpoint.pt", "w") as archive:
            archive.writestr("part", "")
        said = refused(capsys, "--resume", "--out", ".")
        assert "is of the model of an earlier version: leave out --resume" in said

    def test_without_its_texts(self, capsys, empty_folder):
        import zipfile

        (empty_folder / "demo.json").write_text(json.dumps({"datasets": ["gone"]}))
        with zipfile.ZipFile(empty_folder / "checkpoint.pt", "w") as archive:
            archive.writestr("part", "")
        assert "cannot be read" in refused(capsys, "--resume", "--out", ".")

    @pytest.mark.parametrize("setting", ["--seed=1", "--lr=0.1"])
    def test_with_other_settings(self, capsys, setting):
        assert "--seed and --lr cannot go with --resume" in refused(capsys, "--resume", setting)

    def test_with_other_data(self, capsys):
        said = refused(capsys, "--resume", "--data", "mine=x.txt")
        assert "--data cannot go with --resume" in said


def without(package, *arguments):
    """Run the command where `package` is not installed."""
    code = (
        "import sys; sys.modules[sys.argv.pop(1)] = None; "
        "from metricfold.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    return subprocess.run(
        [sys.executable, "-c", code, package, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@needs_torch
@pytest.mark.parametrize(
    ("package", "extra"), [("torch", "torch"), ("rich", "console"), ("tensorboard", "tensorboard")]
)
def test_a_missing_package_gives_the_line_that_installs_it(empty_folder, package, extra):
    done = without(package, "demo")
    assert done.returncode == 1
    assert done.stderr == (
        f"metricfold demo: the demo needs {package}: run pip install 'metricfold[{extra}]'\n"
    )
    assert not list(empty_folder.iterdir())


def test_help_and_mistakes_import_nothing_heavy():
    code = (
        "import sys\n"
        "from metricfold.cli import main\n"
        "for arguments in (['demo', '--help'], ['demo', '--ranks', '0'], ['--version']):\n"
        "    try:\n"
        "        main(arguments)\n"
        "    except SystemExit:\n"
        "        pass\n"
        "assert not {'torch', 'rich', 'tensorboard', 'jax'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


def test_version(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"metricfold {__version__}\n"


def test_without_a_command_the_help_is_shown(capsys):
    assert main([]) == 2
    assert "demo" in capsys.readouterr().out


def test_an_unknown_command_is_one_sentence(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["tarin"])
    assert exit_.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
