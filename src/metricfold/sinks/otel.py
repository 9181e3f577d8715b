"""OpenTelemetry: the newest values as gauges of a meter."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from metricfold.sinks.labelled import Labelled
from metricfold.sinks.record import KeysRefused, Record, RecordRefused
from metricfold.sinks.selection import SelectiveSink, require

__all__ = ["OTelSink"]


class OTelSink(SelectiveSink):
    """Sets the scalars of each log as gauges such as ``metricfold.loss``, and has them exported.

    Their attributes are ``prefix``, ``dataset`` and ``statistic``, where there is one; ``metricfold.step``
    and ``metricfold.time_seconds`` say when they were logged. Of two names that cannot be told apart
    (``a-b`` and ``a_b``) the second is left out and counted, and so is what is not finite, which
    OpenTelemetry does not take.

    Args:
        provider: a `MeterProvider` of OpenTelemetry's SDK; by default the one that
            `opentelemetry.metrics.set_meter_provider` was given. It is yours to shut down, after the
            logger is closed.
        select: see `SelectiveSink`.
        key_format: see `SelectiveSink`; names are those of metrics, and of keys of which no aggregator
            knows the metric.

    Raises:
        ImportError: the ``opentelemetry-sdk`` package is not installed.
    """

    arrays = False

    def __init__(
        self,
        provider: Any = None,
        *,
        select: str | Sequence[str] = "*",
        key_format: str | Callable[[str], str] = "{key}",
    ) -> None:
        super().__init__(select=select, key_format=key_format)
        require("opentelemetry", sink="OTelSink", extra="otel")
        self.provider = provider
        self._labelled = Labelled()
        self._gauges: dict[str, Any] = {}

    def __repr__(self) -> str:
        return "OTelSink()"

    def flush(self) -> None:
        """Have the values exported: a gauge keeps the newest alone."""
        if self.provider is not None:
            self.provider.force_flush()

    def close(self) -> None:
        self.flush()

    def rewind(self, step: int) -> None:
        """Do nothing: what is exported cannot be taken back, and what comes next is the newest."""

    def _write(self, record: Record) -> None:
        from opentelemetry.metrics import get_meter_provider  # noqa: PLC0415

        provider = self.provider or get_meter_provider()
        if not hasattr(provider, "force_flush"):  # that of an API without an SDK
            raise RecordRefused(
                "OpenTelemetry has no provider, so that nothing would be exported: call "
                "opentelemetry.metrics.set_meter_provider(MeterProvider([reader])), or give OTelSink one"
            )
        self.provider = provider
        series, refused = self._labelled.of(record)
        for key, name, labels, value in series:
            if not math.isfinite(value):
                refused[key] = ValueError("OpenTelemetry takes finite numbers alone")
                continue
            if name not in self._gauges:
                self._gauges[name] = provider.get_meter("metricfold").create_gauge(
                    f"metricfold.{name}"
                )
            self._gauges[name].set(value, labels)
        if refused:
            raise KeysRefused(refused)
