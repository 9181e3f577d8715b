"""The folder of a run: what it holds, and the checks before anything is written to it.

demo.json       marks the folder as a demo's, and names its datasets, its framework and its settings
data/           the texts, as read when the run began: a resumed run reads these
metrics.jsonl   every record that was logged
tensorboard/    the same for TensorBoard
checkpoint.pt   model, optimiser, metrics and position; of JAX's, checkpoint.npz
ledger/         raw sums of every step and rank or device, for the proof at the end
logs/           what the ranks but the first printed
"""

from __future__ import annotations

import json
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

from metricfold.demo.framework import FRAMEWORKS, Framework
from metricfold.demo.mixture import Corpus, Mixture
from metricfold.demo.texts import DemoError, Text
from metricfold.metric import check_name

__all__ = ["RunFolder"]

_MODEL = 2
"""Which model runs are of: one of another model cannot go on with this one's code."""
DEFAULTS: Mapping[str, float] = MappingProxyType({"seed": 0, "learning_rate": 8e-3})
"""Settings of a run for which no others were given."""
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, RecursionError)
"""What reading a file raises that may hold anything."""


class RunFolder:
    """Paths and texts of one run; the folder at `path` is made by `begin`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.marker = path / "demo.json"
        self.data = path / "data"
        self.metrics = path / "metrics.jsonl"
        self.tensorboard = path / "tensorboard"
        self.ledger = path / "ledger"
        self.logs = path / "logs"

    @property
    def framework(self) -> Framework:
        """What the run is trained with."""
        try:
            name = json.loads(self.marker.read_text(encoding="utf-8"))["framework"]
        except _UNREADABLE:
            name = "torch"  # no run yet, or an early one
        if not isinstance(name, str) or name not in FRAMEWORKS:
            raise _no_resuming(f"{self.marker} names no framework of the demo")
        return FRAMEWORKS[name]

    @property
    def checkpoint(self) -> Path:
        """The file that the run is saved to."""
        return self.path / self.framework.checkpoint

    def check_new(self) -> None:
        """Refuse a folder that cannot be written or that holds someone's work.

        Leaves the disk as it was. An earlier run of the demo may be there: `begin` replaces it.
        """
        if self.path.is_dir() and not self.marker.exists() and any(self.path.iterdir()):
            raise DemoError(
                f"--out {self.path} holds files that are not the demo's: give an empty or a new folder"
            )
        self._check_writable()

    def check_resumable(self, framework: Framework) -> None:
        """Refuse a folder without a run that can go on with `framework`."""
        if not self.marker.is_file():
            raise _no_resuming(f"--out {self.path} holds no run to resume", "to begin one")
        if self.framework is not framework:
            raise DemoError(
                f"the run in {self.path} was begun with {self.framework.title}: give --framework "
                f"{self.framework.name} to go on with it"
            )
        if not self.checkpoint.exists():
            raise _no_resuming(f"the run in {self.path} stopped before its first checkpoint")
        if not zipfile.is_zipfile(self.checkpoint):
            raise _no_resuming(f"{self.checkpoint} is damaged or cut short")
        try:
            self.read_mixture()
            self.settings  # noqa: B018 - is it there
            model = json.loads(self.marker.read_text(encoding="utf-8")).get("model")
        except _UNREADABLE as error:
            raise _no_resuming(f"the texts in {self.data} cannot be read ({error})") from error
        if model != _MODEL:
            raise _no_resuming(f"the run in {self.path} is of the model of an earlier version")
        self._check_writable()

    @property
    def settings(self) -> dict[str, float]:
        """What the run is trained with: the ``"seed"`` of its first weights, and ``"learning_rate"``."""
        marks = json.loads(self.marker.read_text(encoding="utf-8"))
        return {name: type(one)(marks.get(name, one)) for name, one in DEFAULTS.items()}

    def begin(
        self,
        texts: Mapping[str, list[Text]],
        framework: Framework = FRAMEWORKS["torch"],
        settings: Mapping[str, float] | None = None,
    ) -> None:
        """Make the folder, or clear it of an earlier run, and keep the texts in it."""
        with self._writing():
            self.path.mkdir(parents=True, exist_ok=True)
            for folder in (self.data, self.tensorboard, self.ledger, self.logs):
                shutil.rmtree(folder, ignore_errors=True)
            checkpoints = [self.path / one.checkpoint for one in FRAMEWORKS.values()]
            for file in (self.metrics, *checkpoints):
                file.unlink(missing_ok=True)
            marks = {
                "datasets": list(texts),
                "framework": framework.name,
                "model": _MODEL,
                **DEFAULTS,
                **(settings or {}),
            }
            self.marker.write_text(json.dumps(marks), encoding="utf-8")
            self.data.mkdir()
            for name, samples in texts.items():
                lines = "".join(json.dumps(text._asdict()) + "\n" for text in samples)
                (self.data / f"{name}.jsonl").write_text(lines, encoding="utf-8")

    def begin_launch(self) -> None:
        """Clear away what speaks about one launch of ranks only."""
        for folder in (self.ledger, self.logs):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()

    def read_mixture(self) -> Mixture:
        """Return the texts that the run began with."""
        names: list[str] = json.loads(self.marker.read_text(encoding="utf-8"))["datasets"]
        for name in names:
            check_name("a dataset", name)
            if Path(name).name != name:
                raise ValueError(f"{name!r} cannot name a dataset")
        corpora = [Corpus.split(name, self._read(name)) for name in names]
        return Mixture(corpora, cut=self.framework.cut)

    def _read(self, name: str) -> list[Text]:
        with (self.data / f"{name}.jsonl").open(encoding="utf-8") as lines:
            texts = [Text(**json.loads(line)) for line in lines]
        for text in texts:
            check_name("a kind of text", text.kind)
            if not isinstance(text.text, str):
                raise TypeError(f"a text of {name!r} is none")
        return texts

    def _check_writable(self) -> None:
        """Try to write in the nearest folder that there is on the way to this one."""
        existing = next(path for path in (self.path, *self.path.parents) if path.exists())
        with self._writing(existing), tempfile.TemporaryFile(dir=existing):
            pass

    @contextmanager
    def _writing(self, where: Path | None = None) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DemoError(
                f"--out {self.path} cannot be written ({where or error.filename or self.path}: "
                f"{error.strerror}): give a folder that you may write to"
            ) from error


def _no_resuming(why: str, instead: str = "to begin again") -> DemoError:
    return DemoError(f"{why}: leave out --resume {instead}")
