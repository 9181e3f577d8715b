"""Weights & Biases: into the run that you started, or else into an offline run of its own.

W&B's history only grows: it refuses steps that go back, and nothing can be removed from a client.
What that means after a resume is said by `WandbSink.rewind`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from metricfold.sinks.buckets import coarsened
from metricfold.sinks.record import Record
from metricfold.sinks.selection import SelectiveSink, require

__all__ = ["WandbSink"]

_log = logging.getLogger("metricfold")

_MAX_BUCKETS = 512  # W&B refuses histograms of more


class WandbSink(SelectiveSink):
    """Logs scalars and histograms to Weights & Biases.

    Args:
        run: the run to log to. By default the active one (`wandb.run`) when the first record is
            written, and when there is none a new one, which is offline unless ``mode=`` or the
            environment variable ``WANDB_MODE`` says otherwise. A run that you started is yours to
            finish, after the logger is closed.
        select: see `SelectiveSink`.
        key_format: see `SelectiveSink`.
        init: arguments for `wandb.init` of a new run, such as ``project="llm"`` or ``dir="out"``.

    Raises:
        ImportError: the ``wandb`` package is not installed.
        TypeError: both `run` and `init` are given.
    """

    def __init__(
        self,
        *,
        run: Any = None,
        select: str | Sequence[str] = "*",
        key_format: str | Callable[[str], str] = "{key}",
        **init: Any,
    ) -> None:
        super().__init__(select=select, key_format=key_format)
        if run is not None and init:
            raise TypeError(
                f"WandbSink got run= and {', '.join(f'{name}=' for name in init)}: those are for "
                "wandb.init, which has made your run already; leave out one or the other"
            )
        require("wandb", sink="WandbSink", extra="wandb")
        self.run = run
        if init.get("dir"):
            # A relative one is meant from here, wherever the first record is written.
            init["dir"] = os.path.abspath(init["dir"])  # noqa: PTH100 - as it is, but absolute
        self._init = init
        self._owned = False
        self._shown: float = float("-inf")  # steps up to here are in the run for good

    def __repr__(self) -> str:
        return f"WandbSink(run={self.run.id!r})" if self.run is not None else "WandbSink()"

    def flush(self) -> None:
        """Do nothing: W&B's own process has every row as soon as it is written."""

    def close(self) -> None:
        """Finish the run if this sink started it."""
        if self._owned:
            self.run.finish()
            self.run, self._owned = None, False

    def rewind(self, step: int) -> None:
        """Go on from `step` as far as W&B allows, and say in the log what that is.

        A run of this sink's own that holds later steps is finished, and a new one in the same group
        takes the steps after `step`. In a run that you started, the later steps stay as they are,
        and new values for them are left out.
        """
        run = self._found()
        if run is None or run.step <= step:
            _log.info("W&B holds no step after %d: nothing to rewind", step)
        elif self._owned:
            group = self._init.get("group") or run.group or run.id
            _log.warning(
                "W&B cannot remove steps: run %s is finished with what it holds, up to step %d, and "
                "a new run in the group %r goes on after step %d",
                run.id,
                run.step,
                group,
                step,
            )
            self.close()
            self._init = {name: value for name, value in self._init.items() if name != "id"}
            self._init["group"] = group
        else:
            self._shown = run.step
            _log.warning(
                "W&B cannot remove steps: your run %s keeps what it holds, up to step %d, and new "
                "values for the steps until there are left out. To rewind the run itself, start "
                "it with wandb.init(resume_from='%s?_step=%d')",
                run.id,
                run.step,
                run.id,
                step,
            )

    def _write(self, record: Record) -> None:
        import wandb  # noqa: PLC0415

        if record.step <= self._shown:
            return
        run = self.run = self._found() or self._started()
        if record.step < run.step:
            raise ValueError(
                f"W&B refuses step {record.step} after step {run.step} of run {run.id}: after a "
                "resume call logger.rewind(step), and leave the steps of run.log to the logger"
            )
        row: dict[str, Any] = dict(record.metrics)
        for key, histogram in record.histograms.items():
            if histogram.counts.any():
                row[key] = wandb.Histogram(np_histogram=coarsened(histogram, _MAX_BUCKETS))
        run.log(row, step=record.step)

    def _found(self) -> Any:
        if self.run is not None:
            return self.run
        import wandb  # noqa: PLC0415

        return wandb.run

    def _started(self) -> Any:
        import wandb  # noqa: PLC0415

        mode = self._init.get("mode") or os.environ.get("WANDB_MODE") or "offline"
        if mode == "offline":
            # An offline run stays offline: W&B's own error reports are the one thing in it that
            # would use the network.
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        if self._init.get("dir"):
            # W&B would go to the system's temporary folder, and hardly say so.
            Path(self._init["dir"]).mkdir(parents=True, exist_ok=True)
        # The terminal is the training's: no banner, and no capture of what is printed.
        settings = wandb.Settings(silent=True, console="off")
        run = wandb.init(**{"settings": settings, **self._init, "mode": mode})
        self._owned = True
        return run
