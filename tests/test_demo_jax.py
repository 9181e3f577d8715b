"""The demo with JAX: devices train, what they log is the truth, and a resumed run counts on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jax_devices import on_devices

from metricfold import read_jsonl
from metricfold.demo.batches import held_out, pad
from metricfold.demo.folder import RunFolder
from metricfold.demo.mixture import SAMPLES_PER_STEP, Corpus, Mixture, cut_evenly
from metricfold.demo.proof import prove
from metricfold.demo.texts import Text

pytestmark = pytest.mark.skipif(
    not all(map(find_spec, ("jax", "flax", "optax"))), reason="needs JAX, Flax and optax"
)


def demo(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does, and kill all its processes if it hangs."""
    command = [sys.executable, "-m", "metricfold.cli", "demo", *map(str, arguments)]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "COLUMNS": "120"},
    ) as process:
        try:
            out, err = process.communicate(timeout=120)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, str]:
    """A run of 6 steps on two devices, which has gone on for 6 more on three."""
    out = tmp_path_factory.mktemp("run") / "made for it"
    texts = out.parent / "texts"
    texts.mkdir()
    for name, words in (("letters", "abcdefghij"), ("digits", "0123456789")):
        lines = [words[n % 7 :] * (1 + n % (5 if name == "digits" else 9)) for n in range(60)]
        (texts / f"{name}.txt").write_text("\n\n".join(lines))
    done = demo(
        *("--framework", "jax", "--devices", 2, "--steps", 6, "--out", out),
        *(f"--data=letters={texts / 'letters.txt'}", f"--data=digits={texts / 'digits.txt'}"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return RunFolder(out), done.stdout


def counted(folder: RunFolder, steps: int) -> dict[str, int]:
    """Count tokens of the first steps from the texts alone."""
    tokens: dict[str, int] = {}
    mixture = folder.read_mixture()
    for number in range(steps * SAMPLES_PER_STEP):
        dataset, (text, _) = mixture.draw(number)
        name = mixture.names[dataset]
        tokens[name] = tokens.get(name, 0) + len(text.encode())
    return tokens


def logs(folder: RunFolder) -> list[Any]:
    return [one for one in read_jsonl(folder.metrics) if "train/grad_norm" in one.metrics]


@pytest.mark.timeout(150)
class TestRun:
    def test_ends_with_a_table_in_which_ours_is_the_truth(self, run: tuple[RunFolder, str]) -> None:
        _, out = run
        rows = re.findall(r"(letters|digits|all) +([\d.,]+) +([\d.,]+)[^\n]*? ([\d.,]+) *\n", out)
        assert len(rows) == 9
        assert all(ours == truth for _, ours, _, truth in rows)
        assert any(average != truth for _, _, average, truth in rows)
        assert "average over devices" in out
        assert "1 log and 1 checkpoint took no collective" in " ".join(out.split())

    def test_totals_after_resuming_on_three_devices_are_those_of_the_data(
        self, run: tuple[RunFolder, str]
    ) -> None:
        folder, out = run
        record, truth = logs(folder)[-1], counted(folder, 12)
        assert record.step == 12
        assert len(prove(folder).rows) == 9
        for name, tokens in truth.items():
            assert record.metrics[f"train_{name}/tokens_seen"] == tokens
            assert f"tokens_seen of {name}: {tokens:,} = {tokens:,} counted" in out
        assert record.metrics["train/tokens_seen"] == sum(truth.values())
        assert record.metrics["train/samples_seen"] == 12 * SAMPLES_PER_STEP

    def test_the_loss_falls_in_training_and_on_texts_held_out(
        self, run: tuple[RunFolder, str]
    ) -> None:
        folder, _ = run
        training = [log.metrics["train/loss"] for log in logs(folder)]
        held_out = [
            one.metrics["val/loss"] for one in read_jsonl(folder.metrics) if one.prefix == "val"
        ]
        assert len(held_out) == 2
        for losses in (training, held_out):
            assert losses == sorted(losses, reverse=True)
            assert losses[-1] < losses[0] < np.log(256)

    def test_the_owner_of_the_largest_gradient_is_the_device_that_had_it(
        self, run: tuple[RunFolder, str]
    ) -> None:
        for record in logs(run[0]):
            devices = range(2 if record.step <= 6 else 3)
            norms = [record.metrics[f"train/grad_norm/device_{device}"] for device in devices]
            assert record.metrics["train/grad_norm"] == max(norms)
            assert record.metrics["train/grad_norm_device"] == np.argmax(norms)

    def test_leaves_events_for_tensorboard_and_says_where(self, run: tuple[RunFolder, str]) -> None:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        folder, out = run
        events = EventAccumulator(str(folder.tensorboard)).Reload()
        assert [one.step for one in events.Scalars("train_letters/loss")] == [
            log.step for log in logs(folder)
        ]
        assert events.Histograms("train_letters/seq_len")
        assert f"demo --framework jax --resume --out '{folder.path}'" in out

    @pytest.mark.skipif(find_spec("torch") is None, reason="needs torch")
    def test_cannot_go_on_with_another_framework(self, run: tuple[RunFolder, str]) -> None:
        done = demo("--resume", "--out", run[0].path)
        assert done.returncode == 1
        assert "was begun with JAX: give --framework jax" in done.stderr


@pytest.fixture
def mixture() -> Mixture:
    corpora = [
        Corpus.split("digits", [Text("0123456789"[: 2 + n % 9], "up") for n in range(60)]),
        Corpus.split("letters", [Text("é" * (1 + n), "same") for n in range(30)]),
    ]
    return Mixture(corpora, cut=cut_evenly)


class TestBatches:
    @pytest.mark.parametrize("devices", [1, 4, 5, 16])
    def test_have_one_shape_and_every_device_its_share(
        self, mixture: Mixture, devices: int
    ) -> None:
        from metricfold.demo.jax.train import training_batches

        for step, batch in enumerate(training_batches(mixture, range(1, 4), devices), 1):
            rows = -(-16 // devices)
            assert batch["tokens"].shape == batch["mask"].shape == (devices * rows, 60)
            for device, share in enumerate(mixture.shares(step, devices)):
                mine = slice(device * rows, (device + 1) * rows)
                parts = (batch[name][mine] for name in ("tokens", "mask", "dataset"))
                texts = [
                    (int(dataset), bytes(tokens[mask].tolist()).decode())
                    for tokens, mask, dataset in zip(*parts, strict=True)
                    if mask.any()
                ]
                drawn = [mixture.draw(number) for number in share]
                assert texts == [(sample.dataset, sample.text.text) for sample in drawn]

    def test_of_validation_hold_each_text_once(self, mixture: Mixture) -> None:
        read = sorted(
            (int(dataset), bytes(tokens[mask].tolist()).decode())
            for batch in (pad(texts, (3, 6, 60)) for texts in held_out(mixture))
            for dataset, tokens, mask in zip(
                batch["dataset"], batch["tokens"], batch["mask"], strict=True
            )
            if mask.any()
        )
        assert read == sorted(
            (i, text.text) for i, corpus in enumerate(mixture.corpora) for text in corpus.validation
        )


@on_devices(4)
def test_the_model_looks_only_back() -> None:
    import jax
    from flax import nnx

    from metricfold.demo.jax.model import ByteTransformer

    model = ByteTransformer(rngs=nnx.Rngs(0))
    assert 50_000 < sum(one.size for one in jax.tree.leaves(nnx.state(model))) < 500_000
    tokens = np.arange(80).reshape(2, 40)
    changed = tokens.copy()
    changed[:, 25:] = 7
    before, after = np.asarray(model(tokens)), np.asarray(model(changed))
    np.testing.assert_allclose(before[:, :25], after[:, :25], rtol=1e-4, atol=1e-5)
    assert not np.allclose(before[:, 25:], after[:, 25:])


def test_what_is_missing_is_named_with_what_installs_it(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules.update(jax=None, optax=None); "
        "from metricfold.cli import main; sys.exit(main(['demo', '--framework', 'jax']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 1
    assert done.stderr == (
        "metricfold demo: the demo needs jax and optax: run pip install 'metricfold[jax]' optax\n"
    )
    assert not list(tmp_path.iterdir())
