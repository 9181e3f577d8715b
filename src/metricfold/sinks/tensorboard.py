"""TensorBoard event files, written with TensorBoard's own package; TensorFlow is not needed.

TensorBoard keeps scalars as float32: totals beyond 2^24 are rounded there (not in `JSONLSink`).
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metricfold.sinks.board import rank
from metricfold.sinks.buckets import coarsened
from metricfold.sinks.dashboard import Layout, ended, settings, text
from metricfold.sinks.files import AppendFile, FileSink
from metricfold.sinks.heat_map import HeatMaps, Image, png
from metricfold.sinks.record import Record
from metricfold.sinks.selection import require

if TYPE_CHECKING:
    from metricfold._core.sketch import Histogram

__all__ = ["TensorBoardSink"]

# TensorBoard draws about 30; checksums in pure Python make every further bucket cost CPU time.
_MAX_BUCKETS = 512


class TensorBoardSink(FileSink):
    """Writes scalars, histograms and heat maps to an event file that ``tensorboard --logdir`` shows.

    Alerts are texts: of the prefix ``train`` under ``alerts/train``. The tab *Custom scalars* has a chart
    for each metric that datasets have, the loss first, with all of them in it. ``config=`` of
    `MetricsLogger` is shown as a text, ``run``, and in the tab *HParams*.

    Args:
        logdir: the folder for event files, a local path, made at the first record; a relative one
            is meant from the folder that is current when the sink is made. TensorBoard follows only
            the newest file of a folder: give each sink a folder of its own.
        select: see `SelectiveSink`.
        key_format: see `SelectiveSink`.
        arrays: whether to show the cells of a metric with axes, as a heat map ``{key}/cells``, whose
            colours go from the smallest value of the step to its largest.

    Raises:
        ImportError: the ``tensorboard`` package is not installed.
        ValueError: `logdir` is a URL.
    """

    def __init__(
        self,
        logdir: str | os.PathLike[str],
        *,
        select: str | Sequence[str] = "*",
        key_format: str | Callable[[str], str] = "{key}",
        arrays: bool = True,
    ) -> None:
        super().__init__(select=select, key_format=key_format)
        self.arrays, self._heat_maps = arrays, HeatMaps()
        if "://" in os.fspath(logdir):
            raise ValueError(
                f"logdir={os.fspath(logdir)!r} is a URL: give a folder, such as a mounted bucket"
            )
        require("tensorboard", sink="TensorBoardSink", extra="tensorboard")
        self._layout = Layout()
        self._in_session = False
        self.logdir = Path(os.path.abspath(logdir))  # noqa: PTH100 - resolve() would follow links

    def __repr__(self) -> str:
        return f"TensorBoardSink({str(self.logdir)!r})"

    def close(self) -> None:
        """Say that the session has ended, if settings began one, and close the file."""
        if self._in_session:
            self._in_session = False
            now = time.time()
            _append(self._opened(), wall_time=now, summary=_summary([ended(now)]))
        super().close()

    def rewind(self, step: int) -> None:
        """Start a new event file that tells TensorBoard to drop all steps after `step`."""
        super().close()
        self._layout = Layout()  # what was written may be among them
        if not any(self.logdir.glob("events.out.tfevents.*")):
            return
        from tensorboard.compat.proto.event_pb2 import SessionLog  # noqa: PLC0415

        start = SessionLog(status=SessionLog.START)
        _append(self._opened(), step=step + 1, wall_time=time.time(), session_log=start)

    def _write(self, record: Record) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary  # noqa: PLC0415

        values = [
            *(Summary.Value(tag=key, simple_value=one) for key, one in record.metrics.items()),
            *(
                Summary.Value(tag=key, histo=_proto(one))
                for key, one in record.histograms.items()
                if one.counts.any()
            ),
            *(
                Summary.Value(tag=key, image=_image(one))
                for key, one in self._heat_maps.of(record).items()
            ),
        ]
        if record.alerts:
            rows = [f"**{alert['severity']}**: {alert['message']}" for alert in record.alerts]
            values.append(text(f"alerts/{record.prefix}".rstrip("/"), rows))
        if record.run is not None:
            values += settings(record.run, record.wall_time, _judged(record))
            self._in_session = bool(record.run.get("config"))
        if self._layout.take(record) and (layout := self._layout.value()) is not None:
            values.append(layout)
        # One event for the whole record: it is written whole or not at all.
        summary, seconds = _summary(values), record.wall_time
        _append(self._opened(), step=record.step, wall_time=seconds, summary=summary)

    def _new_file(self) -> AppendFile:
        file = AppendFile(_next_path(self.logdir))
        _append(file, wall_time=time.time(), file_version="brain.Event:2")
        return file


def _append(file: AppendFile, **event: Any) -> None:
    from tensorboard.compat.proto.event_pb2 import Event  # noqa: PLC0415
    from tensorboard.summary.writer.record_writer import RecordWriter  # noqa: PLC0415

    RecordWriter(file).write(Event(**event).SerializeToString())


def _summary(values: Sequence[Any]) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary  # noqa: PLC0415

    return Summary(value=values)


def _judged(record: Record) -> list[str]:
    """Return the keys that a run is judged by: losses over all datasets."""
    return [key for key, of in record.keys.items() if not of.dataset and rank(of) < 3]


def _next_path(logdir: Path) -> Path:
    """Return a path whose name sorts after those of all event files in `logdir`.

    TensorBoard reads event files in the order of their names, which start with a time in seconds.
    A file that rewinds must come after those that it rewinds, although it may be made in the same
    second, by another process, or on a host whose clock is behind.
    """
    made = (path.name.split(".")[3] for path in logdir.glob("events.out.tfevents.*"))
    second = max([int(time.time()), *(int(one) + 1 for one in made if one.isdecimal())])
    name = f"events.out.tfevents.{second:010d}.{platform.node()}.{os.getpid()}.metricfold"
    return logdir / name


def _image(image: Image) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary  # noqa: PLC0415

    height, width, colours = image.shape
    encoded = png(image)
    return Summary.Image(
        height=height, width=width, colorspace=colours, encoded_image_string=encoded
    )


def _proto(histogram: Histogram) -> Any:
    from tensorboard.compat.proto import summary_pb2  # noqa: PLC0415

    counts, edges = coarsened(histogram, _MAX_BUCKETS)
    return summary_pb2.HistogramProto(
        min=histogram.minimum,
        max=histogram.maximum,
        num=float(histogram.counts.sum()),
        sum=histogram.total,
        sum_squares=histogram.total_squares,
        bucket_limit=edges[1:].tolist(),
        bucket=counts.tolist(),
    )
