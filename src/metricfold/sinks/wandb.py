"""Weights & Biases: into the run that you started, or else into an offline run of its own.

W&B's history only grows: it leaves out rows whose steps go back, and nothing can be removed from a
client. Its own step also advances with each row that anything else in the program logs, such as a
table, a profiler or an evaluation by samples. So every row says its step in a column of its own, and
one that is behind joins the row that W&B has not closed yet, or opens the next one:

    _step 20  {"train/loss": 1.5, "train/step": 20, "val/acc": 0.7, "val/step": 3}
    _step 21  {"val/acc": 0.8, "val/step": 4}

What that means after a resume is said by `WandbSink.rewind`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from metricfold.metric import check_name, is_name
from metricfold.sinks.alert_text import text_of, title_of
from metricfold.sinks.buckets import coarsened
from metricfold.sinks.header import better
from metricfold.sinks.heat_map import HeatMaps
from metricfold.sinks.loud import mention
from metricfold.sinks.record import Record, RecordRefused
from metricfold.sinks.selection import SelectiveSink, check_one, require

__all__ = ["WandbSink"]

_log = logging.getLogger("metricfold")

_MAX_BUCKETS = 512  # W&B refuses histograms of more
_LONGEST_TITLE = 63


class WandbSink(SelectiveSink):
    """Logs scalars, histograms and heat maps to Weights & Biases, and sends alerts as `wandb.alert` does.

    Every row has its step as ``{prefix}/step``, or as ``step`` where there is no prefix. A record
    whose step is behind that of the run joins the run's newest row, or opens the next one where that
    has its keys, and W&B is told that its keys have ``{prefix}/step`` as their axis. One whose step
    is behind those of its own prefix, over values that are there, is refused.

    Args:
        run: the run to log to. By default the active one (`wandb.run`) when the first record is
            written, and when there is none a new one, which is offline unless ``mode=`` or the
            environment variable ``WANDB_MODE`` says otherwise. A run that you started is yours to
            finish, after the logger is closed.
        step_metric: a column that is the axis of all keys, such as ``"train/global_step"``: rows are
            then logged without W&B's own step, and none can be behind.
        select: see `SelectiveSink`.
        key_format: see `SelectiveSink`.
        arrays: whether to show the cells of a metric with axes, as a heat map ``{key}/cells``, whose
            colours go from the smallest value of the step to its largest. Each is a file; they need
            the package ``pillow``.
        init: arguments for `wandb.init` of a new run, such as ``project="llm"`` or ``dir="out"``.

    Raises:
        ImportError: the ``wandb`` package is not installed.
        TypeError: both `run` and `init` are given.
    """

    def __init__(
        self,
        *,
        run: Any = None,
        step_metric: str | None = None,
        select: str | Sequence[str] = "*",
        key_format: str | Callable[[str], str] = "{key}",
        arrays: bool = True,
        **init: Any,
    ) -> None:
        super().__init__(select=select, key_format=key_format)
        self.arrays, self._heat_maps = arrays, HeatMaps()
        check_one("WandbSink", "run", run, init, "wandb.init")
        require("wandb", sink="WandbSink", extra="wandb")
        if step_metric is not None:
            check_name("step_metric", step_metric)
        self.run = run
        self._step_metric = step_metric
        if init.get("dir"):
            # A relative one is meant from here, wherever the first record is written.
            init["dir"] = os.path.abspath(init["dir"])  # noqa: PTH100 - as it is, but absolute
        self._init = init
        self._owned = False
        self._axis_names: dict[str, str] = {}  # by prefix
        self._said: dict[str, Any] = {}  # of the run
        # Keys that an aggregator has printed for its prefix, and which of their values is the best.
        self._best: dict[str, str | None] = {}
        self._start()

    def _start(self) -> None:
        """Begin in a run of which nothing is known."""
        self._newest: dict[str, int] = {}  # step by axis
        self._shown: dict[str, int] = {}  # by axis: steps up to here are in the run for good
        self._shown_before = -1  # of axes that were logged before this sink was made
        self._open: tuple[int, set[str]] = (-1, set())  # W&B's step that we logged last, and keys
        self._axis_of_key: dict[str, str] = {}
        self._behind: set[str] = set()  # axes whose steps have been behind W&B's own
        self._defined: set[str] = set()  # keys that W&B knows the axis of

    def __repr__(self) -> str:
        return f"WandbSink(run={self.run.id!r})" if self.run is not None else "WandbSink()"

    def close(self) -> None:
        """Finish the run if this sink started it."""
        if self._owned:
            self.run.finish()
            self.run, self._owned = None, False
            self._start()

    def rewind(self, step: int) -> None:
        """Go on from `step` as far as W&B allows, and say in the log what that is.

        A run of this sink's own that holds later steps is finished, and a new one in the same group
        takes the steps after `step`. In a run that you started, the later steps stay as they are,
        and new values for them are left out.
        """
        run = self._found()
        # A run that was resumed holds what this sink knows nothing of.
        before = -1 if run is None or self._newest else run.step
        held = max(self._newest.values(), default=before)
        if held <= step:
            _log.info("W&B holds no step after %d: nothing to rewind", step)
        elif self._owned:
            group = self._init.get("group") or run.group or run.id
            mention(
                f"W&B cannot remove steps: run {run.id} is finished with what it holds, up to step "
                f"{held}, and a new run in the group {group!r} goes on after step {step}"
            )
            self.close()
            self._init = {name: value for name, value in self._init.items() if name != "id"}
            self._init["group"] = group
        else:
            self._shown = {axis: at for axis, at in self._newest.items() if at > step}
            self._shown_before = before
            mention(
                f"W&B cannot remove steps: your run {run.id} keeps what it holds, up to step {held}, "
                "and new values for the steps until there are left out. To rewind the run itself, "
                f"start it with wandb.init(resume_from='{run.id}?_step={step}')"
            )

    def _write(self, record: Record) -> None:
        import wandb  # noqa: PLC0415

        run = self.run = self._found() or self._started()
        self._say(run, record)
        axis = self._axis_of(record.prefix)
        if record.step <= self._shown.get(axis, self._shown_before):
            raise RecordRefused(
                f"run {run.id} of W&B keeps what it holds of step {record.step}, which rewind() "
                "could not remove"
            )
        row: dict[str, Any] = dict(record.metrics)
        for key, histogram in record.histograms.items():
            if histogram.counts.any():
                row[key] = wandb.Histogram(np_histogram=coarsened(histogram, _MAX_BUCKETS))
        row |= self._images(record)
        if row:
            self._log(run, row, axis, record.step)
        # Behind the row, which must not be logged twice should W&B not take one.
        for alert in record.alerts:
            self._alert(run, alert, record)

    def _say(self, run: Any, record: Record) -> None:
        """Hand on settings, and note which values are better."""
        if record.run is not None:
            self._said = record.run
            known = run.config
            config = record.run.get("config") or {}
            known.update({name: one for name, one in config.items() if name not in known})
        for key, of in record.keys.items():
            if key not in self._best:
                way = None if of.statistic else better(of.name, "", self._said)
                self._best[key] = None if way is None else "min" if way == "lower" else "max"

    def _log(self, run: Any, row: dict[str, Any], axis: str, step: int) -> None:
        row.setdefault(axis, step)
        if self._step_metric is not None:
            if not self._defined:
                self._defined.add(self._step_metric)
                run.define_metric(self._step_metric)
                run.define_metric("*", step_metric=self._step_metric, step_sync=True)
            self._define(run, row, axis)
            run.log({**row, self._step_metric: step})
        else:
            place = self._place_of(run, row, axis, step)
            self._define(run, row, axis)
            run.log(row, step=place)
            if place != self._open[0]:
                self._open = place, set()
            self._open[1].update(row)
        self._newest[axis] = max(self._newest.get(axis, -1), step)

    def _alert(self, run: Any, alert: dict[str, Any], record: Record) -> None:
        """Send an alert, which W&B hands on by e-mail or Slack, if it is told to.

        It leaves out those with the title of one that is less than a minute old.
        """
        title, text = title_of(alert, record), text_of(alert, record)
        level = "ERROR" if alert["severity"] == "severe" else "WARN"
        try:
            run.alert(title[-_LONGEST_TITLE:], text, level)
        except BaseException as error:  # noqa: BLE001 - the row has been written
            mention(f"{self!r} did not take the alert {alert['message']!r}: {error!r}")

    def _images(self, record: Record) -> dict[str, Any]:
        """Return the heat maps of a record, if they can be made."""
        if not record.arrays:
            return {}
        if find_spec("PIL") is None:
            self.arrays = False
            mention(
                "WandbSink leaves out heat maps of metrics with axes, for which W&B needs the package "
                "'pillow': pip install pillow, or give arrays=False"
            )
            return {}
        import wandb  # noqa: PLC0415
        from PIL.Image import fromarray  # noqa: PLC0415

        return {key: wandb.Image(fromarray(one)) for key, one in self._heat_maps.of(record).items()}

    def _place_of(self, run: Any, row: dict[str, Any], axis: str, step: int) -> int:
        """Return the step of W&B's own at which a row is logged, so that it is not left out."""
        for key in row:
            self._axis_of_key.setdefault(key, axis)
        at, keys = self._open
        clash = sorted(keys & row.keys()) if at == run.step else []
        if step > run.step or (step == run.step and not clash):
            return step
        if clash and step < self._newest.get(axis, -1):
            raise RecordRefused(
                f"W&B is at step {run.step} already, where {clash[0]!r} has a value, and leaves out "
                f"step {step}: after a resume call logger.rewind(step); or use "
                "WandbSink(step_metric=...), where steps may go back"
            )
        if step == self._newest.get(axis, -1):
            return int(run.step)  # logged a second time: the later values count
        self._behind.add(axis)
        return int(run.step) + bool(clash)

    def _axis_of(self, prefix: str) -> str:
        """Return the column of the steps that were logged with `prefix`."""
        if prefix not in self._axis_names:
            axis = f"{prefix}/step" if prefix else "step"
            try:
                named = self._format(axis)
            except Exception:  # noqa: BLE001 - the user's, which may know the metrics alone
                named = axis
            self._axis_names[prefix] = named if is_name(named) else axis
        return self._axis_names[prefix]

    def _define(self, run: Any, row: dict[str, Any], axis: str) -> None:
        """Tell W&B over which axis the keys of `row` are drawn, and which of their values is the best."""
        for key in row:
            # What several prefixes log, such as a learning rate, has no axis of its own.
            if key in self._defined or self._axis_of_key.setdefault(key, axis) != axis:
                continue
            best = self._best.get(key)
            ours = axis in self._behind or (key in self._best and axis != "step")
            over = axis if ours and key != axis else None
            if self._step_metric is not None:
                # What is defined by its name is not what "*" says of the others.
                over = self._step_metric if best is not None else None
            if over is None and best is None:
                continue
            if over is not None and axis not in self._defined:
                self._defined.add(axis)
                run.define_metric(axis)
            self._defined.add(key)
            run.define_metric(key, step_metric=over, summary=best)

    def _found(self) -> Any:
        import wandb  # noqa: PLC0415

        return wandb.run if self.run is None else self.run

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
