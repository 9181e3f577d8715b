"""Trackio: into the run of where the sink is made, or else into a run of its own."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from metricfold.sinks.alert_text import text_of, title_of
from metricfold.sinks.buckets import coarsened
from metricfold.sinks.heat_map import HeatMaps
from metricfold.sinks.keywise import KeywiseSink
from metricfold.sinks.record import Record, RecordRefused
from metricfold.sinks.selection import check_one, require

__all__ = ["TrackioSink"]

_MOST_BUCKETS = 512  # as many as Trackio makes itself
_PATIENCE = 5.0  # seconds; it hands over what is queued twice a second


class TrackioSink(KeywiseSink):
    """Logs scalars, histograms and heat maps to a Trackio run, and sends alerts as `trackio.alert` does.

    Trackio calls keys that it has a use for itself, such as ``step``, ``__step``. What it cannot write
    to its database it drops with a warning of its own, of which no sink hears.

    Args:
        run: what to log to, as `trackio.init` returns it. By default the current one, which belongs
            to a thread: that of the thread that makes the sink, or of the first log. A run that you
            started is yours to finish, after the logger is closed.
        select: see `SelectiveSink`.
        key_format: see `SelectiveSink`.
        arrays: whether to show the cells of a metric with axes, as an image ``{key}/cells``.
        init: arguments for `trackio.init` of a new run, such as ``project="llm"``.

    Raises:
        ImportError: the ``trackio`` package is not installed.
        TypeError: both `run` and `init` are given.
    """

    def __init__(
        self,
        run: Any = None,
        *,
        select: str | Sequence[str] = "*",
        key_format: str | Callable[[str], str] = "{key}",
        arrays: bool = True,
        **init: Any,
    ) -> None:
        super().__init__(select=select, key_format=key_format)
        self.arrays, self._heat_maps = arrays, HeatMaps()
        check_one("TrackioSink", "run", run, init, "trackio.init")
        require("trackio", sink="TrackioSink", extra="trackio")
        # One who has started a run has imported it; ranks that write nothing need not.
        loaded = "trackio" in sys.modules and not init and run is None
        self.run = _current() if loaded else run
        self._init = init
        self._owned = False

    def __repr__(self) -> str:
        return f"TrackioSink(run={self.run.name!r})" if self.run is not None else "TrackioSink()"

    def flush(self) -> None:
        """Wait until Trackio has handed over what it was given."""
        give_up_at = time.monotonic() + _PATIENCE
        while self.run is not None and _holds(self.run):
            if time.monotonic() > give_up_at:
                raise TimeoutError("Trackio has not written everything yet")
            time.sleep(0.02)

    def close(self) -> None:
        """Finish the run if this sink started it."""
        if self._owned:
            self.run.finish()
            self.run, self._owned = None, False

    def _is_new(self) -> bool:
        return self.run is None and bool(self._init) and "resume" not in self._init

    def _write(self, record: Record) -> None:
        if self.run is None:
            self.run = self._started(record) if self._init else _current()
        if self.run is None:
            raise RecordRefused(
                "there was no run of Trackio, neither where the sink was made nor at the first log: "
                "call trackio.init() before it, in the same thread, or give TrackioSink(project=...)"
            )
        super()._write(record)

    def _values(self, record: Record) -> Mapping[str, Any]:
        import trackio  # noqa: PLC0415

        shown: dict[str, Any] = dict(record.metrics)
        for key, histogram in record.histograms.items():
            if histogram.counts.any():
                shown[key] = trackio.Histogram(np_histogram=coarsened(histogram, _MOST_BUCKETS))
        images = self._heat_maps.of(record)
        return shown | {key: trackio.Image(image) for key, image in images.items()}

    def _log(self, record: Record, values: dict[str, Any]) -> None:
        self.run.log(values, step=record.step)

    def _beside(self, record: Record) -> Iterator[Callable[[], object]]:
        from trackio import AlertLevel  # noqa: PLC0415

        for alert in record.alerts:
            level = AlertLevel.ERROR if alert["severity"] == "severe" else AlertLevel.WARN
            title, text = title_of(alert, record), text_of(alert, record)
            yield partial(self.run.alert, title=title, text=text, level=level, step=record.step)

    def _started(self, record: Record) -> Any:
        import trackio  # noqa: PLC0415

        # In this thread, whose current run is no other's business.
        config = (record.run or {}).get("config") or {}
        given = {"config": config, "embed": False, **self._init}
        run = trackio.init(**given)
        self._owned = True
        return run


def _current() -> Any:
    from trackio.context_vars import current_run  # noqa: PLC0415

    return current_run.get()


def _holds(run: Any) -> bool:
    """Return whether Trackio has something left to hand over, which only its inside tells."""
    waiting = ("_queued_logs", "_queued_alerts", "_sending_batch")
    return any(getattr(run, name, None) for name in waiting)
