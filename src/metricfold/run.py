"""`Run`: a folder, an aggregator and a logger with the sinks that are installed, in one line."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, SupportsIndex

from metricfold._core.intake.aggregator import MetricsAggregator
from metricfold._core.view.alert import Alerts
from metricfold.sinks.console import ConsoleSink
from metricfold.sinks.jsonl import JSONLSink
from metricfold.sinks.logger import MetricsLogger
from metricfold.sinks.record import Sink
from metricfold.sinks.tensorboard import TensorBoardSink

__all__ = ["Run"]

_NONE = -1  # the step of the last log, where there was none


class Run:
    """A training's metrics, from a folder to a table in the terminal.

        with metricfold.Run("runs/1", config=config, total_steps=1000) as run:
            for step, batch in enumerate(loader):
                run.aggregator.update(batch.pop("metrics"))
                run.aggregator.record("loss", loss, weight=num_tokens)
                if step % 50 == 0:
                    run.log(step)

    It is no more than its parts, which can be had alone: a `MetricsAggregator`, and a `MetricsLogger` that
    writes ``metrics.jsonl`` and, if the packages are there, a `ConsoleSink` and ``tensorboard/``. Every
    rank makes it, and makes its calls.

    Args:
        folder: of the run, made with the first log; a folder that holds a run already is continued.
        config: see `MetricsLogger`.
        name: of the run; by default that of the folder.
        total_steps: see `MetricsLogger`.
        better: see `MetricsLogger`.
        sinks: further ones.
        aggregator: yours; by default a new `MetricsAggregator`.

    Raises:
        ValueError: `folder` is a URL; or as `MetricsLogger`.

    Attributes:
        folder: its path.
        aggregator: what metrics are given to.
        logger: what writes them.

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> with Run(folder, config={"lr": 0.1}) as run:
    ...     run.aggregator.record("loss", 2.0)
    ...     alerts = run.log(10)
    step 10  train  loss 2.0000
    >>> from metricfold import look
    >>> look.read(folder).header["config"]
    {'lr': 0.1}
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        config: object = None,
        name: str | None = None,
        total_steps: SupportsIndex | None = None,
        better: Mapping[str, str] | None = None,
        sinks: Sequence[Sink] = (),
        aggregator: MetricsAggregator | None = None,
    ) -> None:
        if "://" in os.fspath(folder):
            raise ValueError(
                f"folder={os.fspath(folder)!r} is a URL: give a folder, such as a mounted bucket"
            )
        self.folder = Path(os.path.abspath(folder))  # noqa: PTH100 - resolve() would follow links
        installed: list[Sink] = []
        if find_spec("rich") is not None:
            installed.append(ConsoleSink())
        installed.append(JSONLSink(self.folder / "metrics.jsonl"))
        if find_spec("tensorboard") is not None:
            installed.append(TensorBoardSink(self.folder / "tensorboard"))
        self.logger = MetricsLogger(
            [*installed, *sinks],
            config=config,
            name=name or self.folder.name or None,
            total_steps=total_steps,
            better=better,
        )
        self.aggregator = MetricsAggregator() if aggregator is None else aggregator
        self._logged = _NONE

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"

    def __enter__(self) -> Run:  # noqa: PYI034 - typing.Self needs Python 3.11
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self.logger.__exit__(kind, error, traceback)

    def log(self, step: SupportsIndex, *, prefix: str = "train", **choice: Any) -> Alerts:
        """Log what the aggregator holds, as `MetricsLogger.log` does; all ranks."""
        alerts = self.logger.log(step, self.aggregator, prefix=prefix, **choice)
        self._logged = max(self._logged, operator.index(step))
        return alerts

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs, of plain types; all ranks, as `MetricsAggregator.state_dict`."""
        return {"logged": self._logged, **self.aggregator.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a checkpoint, and take back what was logged after it; all ranks, before the first log.

        Raises:
            ValueError: as `MetricsAggregator.load_state_dict`, or `state_dict` is not that of a `Run`; then
                nothing has changed.
        """
        logged = state_dict.get("logged") if isinstance(state_dict, Mapping) else None
        if not isinstance(logged, int | float) or isinstance(logged, bool) or not _is_step(logged):
            raise ValueError(
                "this is no state of a Run: give what Run.state_dict() returned. That of its aggregator "
                "alone goes to run.aggregator.load_state_dict(), and run.logger.rewind(step) after it"
            )
        self.aggregator.load_state_dict(dict(state_dict))
        self.logger.rewind(int(logged))
        self._logged = int(logged)

    def close(self) -> None:
        """Write everything logged, and close the sinks."""
        self.logger.close()


def _is_step(number: float) -> bool:
    return math.isfinite(number) and number == int(number) >= _NONE
