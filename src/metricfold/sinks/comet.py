"""Comet: into the experiment that is running, or else into an offline experiment of its own."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from metricfold._core.sketch import Histogram
from metricfold.sinks.alert_text import key_of, text_of
from metricfold.sinks.buckets import coarsened
from metricfold.sinks.config import flattened
from metricfold.sinks.heat_map import HeatMaps, png
from metricfold.sinks.keywise import KeywiseSink
from metricfold.sinks.record import Record, RecordRefused
from metricfold.sinks.selection import check_one, require

__all__ = ["CometSink"]

_LONGEST = 100  # characters of a name
_MOST_BUCKETS = 512


class CometSink(KeywiseSink):
    """Logs scalars, histograms and heat maps to Comet; the configuration as its parameters.

    Histograms are shown in Comet's own bins, which are 10 % wide. The newest alert about a metric
    stands under *Other* as ``alert.{prefix}.{dataset}/{name}``. Comet cuts names of more than 100
    characters, so that several metrics would become one: such a name is left out and counted;
    `key_format` can give it another.

    Args:
        experiment: what to log to. By default the one that is running when the first record is
            written, and when there is none a new offline experiment, which ``comet upload`` sends.
            An experiment that you started is yours to end, after the logger is closed.
        select: see `SelectiveSink`.
        key_format: see `SelectiveSink`.
        arrays: whether to show the cells of a metric with axes, as an image ``{key}/cells``.
        init: arguments for `comet_ml.OfflineExperiment` of a new one, such as
            ``offline_directory="out"``.

    Raises:
        ImportError: the ``comet_ml`` package is not installed.
        TypeError: both `experiment` and `init` are given.
    """

    def __init__(
        self,
        experiment: Any = None,
        *,
        select: str | Sequence[str] = "*",
        key_format: str | Callable[[str], str] = "{key}",
        arrays: bool = True,
        **init: Any,
    ) -> None:
        super().__init__(select=select, key_format=key_format)
        self.arrays, self._heat_maps = arrays, HeatMaps()
        check_one("CometSink", "experiment", experiment, init, "comet_ml.OfflineExperiment")
        require("comet_ml", sink="CometSink", extra="comet")
        if init.get("offline_directory"):
            init["offline_directory"] = os.path.abspath(init["offline_directory"])  # noqa: PTH100
        self.experiment = experiment
        self._init = init
        self._owned = False

    def __repr__(self) -> str:
        shown = "" if self.experiment is None else f"experiment={self.experiment.id!r}"
        return f"CometSink({shown})"

    def flush(self) -> None:
        """Wait until Comet has sent, or written to its file, what it was given."""
        if self.experiment is not None and self.experiment.alive and not self.experiment.flush(5):
            raise TimeoutError("Comet has not sent everything yet")

    def close(self) -> None:
        """End the experiment if this sink started it."""
        if self._owned:
            self.experiment.end()
            self.experiment, self._owned = None, False

    def _is_new(self) -> bool:
        return self.experiment is None and bool(self._init)

    def _write(self, record: Record) -> None:
        if self.experiment is None:
            self.experiment = (None if self._init else _running()) or self._started()
        if not self.experiment.alive:
            raise RecordRefused(
                f"Comet's experiment {self.experiment.id} has ended, and takes nothing any more: end "
                "it after the logger is closed"
            )
        super()._write(record)

    def _log(self, record: Record, values: dict[str, Any]) -> None:
        if too_long := [key for key in values if len(key) > _LONGEST]:
            raise ValueError(f"Comet would cut the name {too_long[0]!r} to {_LONGEST} characters")
        from comet_ml.messages import MetricMessage  # noqa: PLC0415

        # What log_metric does but for one thing: it sets the step of the experiment, and takes it from
        # there again, where another thread that logs may have set its own.
        for key, value in values.items():
            message = MetricMessage(timestamp=round(record.wall_time * 1000))
            message.set_metric(key, value, step=record.step)
            self.experiment._enqueue_message(message)  # noqa: SLF001 - there is no public way

    def _beside(self, record: Record) -> Iterator[Callable[[], object]]:
        config = flattened((record.run or {}).get("config") or {})
        if config:
            yield partial(self.experiment.log_parameters, config, nested_support=False)
        for key, histogram in record.histograms.items():
            if histogram.counts.any():
                yield partial(self._log_histogram, key, histogram, record.step)
        for key, image in self._heat_maps.of(record).items():
            data = io.BytesIO(png(image))
            yield partial(self.experiment.log_image, data, name=key, step=record.step)
        for alert in record.alerts:
            text = f"{alert['severity']}, {text_of(alert, record)}"
            yield partial(self.experiment.log_other, key_of(alert, record), text)

    def _log_histogram(self, key: str, histogram: Histogram, step: int) -> None:
        from comet_ml.data_structure import Histogram as CometHistogram  # noqa: PLC0415

        counts, edges = coarsened(histogram, _MOST_BUCKETS)
        shown = CometHistogram()
        shown.add((edges[:-1] + edges[1:]) / 2, counts.round().astype(int))
        self.experiment.log_histogram_3d(shown, name=key, step=step)

    def _started(self) -> Any:
        import comet_ml  # noqa: PLC0415

        # The terminal is the training's: no capture of what is printed, and no summary.
        quiet = {"auto_output_logging": False, "display_summary_level": 0}
        self._owned = True
        return comet_ml.OfflineExperiment(**{**quiet, **self._init})


def _running() -> Any:
    import comet_ml  # noqa: PLC0415

    experiment = comet_ml.get_running_experiment()  # which may have ended
    return experiment if experiment is not None and experiment.alive else None
